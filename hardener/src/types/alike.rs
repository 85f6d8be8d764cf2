//! Functions that share a name and are the same code, as a header's are that several files take the address of: whichever of them
//! a prototype is about, it is about all.

use super::functions::Places;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};

/// Whether the functions that take up these ranges of the text do the same by the same instructions.
pub fn are_alike(places: &Places<'_>, ranges: &[(u32, u32)]) -> bool {
    let Some((first, others)) = ranges.split_first() else {
        return true;
    };
    let own = instructions(places, *first);
    let same = |range: &(u32, u32)| {
        let other = instructions(places, *range);
        let mut pairs = own.iter().zip(&other);
        own.len() == other.len() && pairs.all(|(one, other)| is_same((one, first), (other, range)))
    };
    !own.is_empty() && others.iter().all(same)
}

fn instructions(places: &Places<'_>, (start, end): (u32, u32)) -> Vec<Instruction> {
    let code = places.bytes(start, end);
    let decoder = Decoder::with_ip(64, code, u64::from(start), DecoderOptions::NONE);
    let mut all: Vec<Instruction> = decoder.into_iter().collect();
    // Filler behind the function.
    let filler = |last: &Instruction| matches!(last.mnemonic(), Mnemonic::Int3 | Mnemonic::Nop);
    while all.last().is_some_and(filler) {
        all.pop();
    }
    all
}

/// Whether two instructions are the same, but for what they name in their own functions, which must stand at the same place there.
fn is_same(
    (one, range): (&Instruction, &(u32, u32)),
    (other, others): (&Instruction, &(u32, u32)),
) -> bool {
    let (one, at) = apart(*one, range);
    let (other, there) = apart(*other, others);
    // Other addresses are absolute in both.
    one == other && at == there && !one.is_invalid()
}

/// An instruction without the address in its own function that it names, and how far from the start that is.
fn apart(mut instruction: Instruction, (start, end): &(u32, u32)) -> (Instruction, Option<u64>) {
    let own = |to: u64| (u64::from(*start)..u64::from(*end)).contains(&to);
    let offset = |to: u64| Some(to - u64::from(*start));
    let branch = instruction.near_branch_target();
    if instruction.op0_kind() == OpKind::NearBranch64 && own(branch) {
        instruction.set_near_branch64(0);
        return (instruction, offset(branch));
    }
    let memory = instruction.memory_displacement64();
    if instruction.is_ip_rel_memory_operand() && own(memory) {
        instruction.set_memory_displacement64(0);
        return (instruction, offset(memory));
    }
    (instruction, None)
}

#[cfg(test)]
mod tests {
    use super::{Places, are_alike};

    /// Three functions of 16 bytes: `test %edi,%edi; je 1f; call 0x100; 1: ret`.
    fn text() -> Vec<u8> {
        let mut text = Vec::new();
        for start in [0i32, 16, 32] {
            text.extend([0x85, 0xff, 0x74, 0x05, 0xe8]);
            text.extend((0x100 - (start + 9)).to_le_bytes());
            text.push(0xc3);
            text.resize(start as usize + 16, 0xcc);
        }
        text
    }

    fn alike(text: &[u8]) -> bool {
        let places = Places::alone(text);
        are_alike(&places, &[(0, 16), (16, 32), (32, 48)])
    }

    #[test]
    fn what_calls_the_same_function_from_elsewhere_is_alike() {
        assert!(alike(&text()));
    }

    #[test]
    fn what_calls_another_function_is_not() {
        let mut text = text();
        text[16 + 5] ^= 1;
        assert!(!alike(&text));
    }

    #[test]
    fn what_jumps_elsewhere_in_itself_is_not() {
        let mut text = text();
        text[32 + 3] = 0;
        assert!(!alike(&text));
    }

    #[test]
    fn what_names_a_place_in_itself_is_alike() {
        let mut text = text();
        for start in [0, 16, 32] {
            // lea -16(%rip),%rdi: the function's start
            let lea = [0x48, 0x8d, 0x3d, 0xf0, 0xff, 0xff, 0xff];
            text[start + 9..start + 16].copy_from_slice(&lea);
        }
        assert!(alike(&text));
        text[16 + 12] = 0xf1;
        assert!(!alike(&text));
    }

    #[test]
    fn what_goes_on_longer_is_not() {
        let mut text = text();
        text[10] = 0xf4;
        assert!(!alike(&text));
    }

    #[test]
    fn what_does_not_decode_is_not() {
        let mut text = text();
        for start in [0, 16, 32] {
            text[start] = 0x06;
        }
        assert!(!alike(&text));
    }
}
