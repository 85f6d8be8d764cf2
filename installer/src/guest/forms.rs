//! Whether the bytes at a site are one of the forms that the kernel may write there.

use super::kernel::Slide;
use penumbra_bundle::{Form, RunTimeModel, Site, TextOff};

/// How many bytes the NOP at the start of `bytes` has: an optional run of 66 and 2e prefixes before 90 or before 0f 1f with
/// a zero displacement (SDM volume 2B, NOP; the kernel's x86_nops and the assembler's long ones).
pub fn nop_len(bytes: &[u8]) -> Option<usize> {
    let prefixes = bytes
        .iter()
        .take_while(|byte| matches!(byte, 0x66 | 0x2e))
        .count();
    let operand = match bytes.get(prefixes..)? {
        [0x90, ..] => 1,
        [0x0f, 0x1f, 0x00, ..] => 3,
        [0x0f, 0x1f, 0x40, 0, ..] => 4,
        [0x0f, 0x1f, 0x44, 0, 0, ..] => 5,
        [0x0f, 0x1f, 0x80, 0, 0, 0, 0, ..] => 7,
        [0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0, ..] => 8,
        _ => return None,
    };
    // An instruction has at most 15 bytes.
    (prefixes + operand <= 15).then_some(prefixes + operand)
}

/// Whether `bytes` are NOPs and nothing else; no bytes are.
pub fn all_nops(mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match nop_len(bytes) {
            Some(len) => bytes = &bytes[len..],
            None => return false,
        }
    }
    true
}

/// Where a 5-byte relative branch with `opcode` at text offset `at` goes, as an offset from the text's start.
pub fn branch_target(opcode: u8, at: TextOff, bytes: &[u8]) -> Option<i64> {
    match *bytes {
        [first, a, b, c, d, ..] if first == opcode => {
            Some(i64::from(at.0) + 5 + i64::from(i32::from_le_bytes([a, b, c, d])))
        }
        _ => None,
    }
}

/// Where the kernel's half starts, with five levels of page tables (Documentation/arch/x86/x86_64/mm.rst).
const KERNEL_HALF: u64 = 0xff00_0000_0000_0000;
/// `call rel32`.
pub const CALL: u8 = 0xe8;
/// `jmp rel32`.
pub const JMP: u8 = 0xe9;

fn lands_in(list: &[TextOff], target: Option<i64>) -> bool {
    target
        .and_then(|target| u32::try_from(target).ok())
        .is_some_and(|target| list.binary_search(&TextOff(target)).is_ok())
}

/// The bytes of an exact form as this guest has them.
pub fn relocated(bytes: &[u8], abs32: &[u8], inverse32: &[u8], slide: Slide) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    // The bundle's reader checked that each offset leaves four bytes.
    for (offsets, delta) in [
        (abs32, slide.0 as u32),
        (inverse32, (slide.0 as u32).wrapping_neg()),
    ] {
        for at in offsets {
            add32(&mut bytes[usize::from(*at)..][..4], delta);
        }
    }
    bytes
}

/// Adds to a little-endian 32-bit field, wrapping as the relocation does.
pub fn add32(field: &mut [u8], delta: u32) {
    let old = u32::from_le_bytes([field[0], field[1], field[2], field[3]]);
    field.copy_from_slice(&old.wrapping_add(delta).to_le_bytes());
}

/// Whether `bytes` (as many as the site is long) are `form`; `ignore` says which offsets something else explains.
pub fn matches(
    form: &Form,
    model: &RunTimeModel,
    site: &Site,
    bytes: &[u8],
    slide: Slide,
    text_len: usize,
    ignore: impl Fn(usize) -> bool,
) -> bool {
    let at = site.at;
    // "Anywhere" is for code outside the text (modules, tracers' trampolines). Inside the text only what the tables name is
    // believed: a torn poke is a call to the middle of something.
    let outside = |target: Option<i64>| {
        target.is_some_and(|target| usize::try_from(target).map_or(true, |to| to >= text_len))
    };
    let rest = bytes.get(5..).unwrap_or_default();
    match form {
        Form::Exact {
            bytes: exact,
            abs32,
            inverse32,
        } => {
            let same = |exact: &[u8]| {
                let mut pairs = exact.iter().zip(bytes).enumerate();
                pairs.all(|(index, (want, have))| want == have || ignore(index))
            };
            // Most forms hold no address: these are compared where they lie.
            if abs32.is_empty() && inverse32.is_empty() {
                same(exact)
            } else {
                same(&relocated(exact, abs32, inverse32, slide))
            }
        }
        Form::Call => lands_in(&model.functions, branch_target(CALL, at, bytes)) && all_nops(rest),
        Form::Jump => {
            lands_in(&model.functions, branch_target(JMP, at, bytes))
                && (all_nops(rest) || rest.iter().all(|byte| *byte == 0xcc))
        }
        Form::CallAnywhere => {
            let target = branch_target(CALL, at, bytes);
            (outside(target) || lands_in(&model.functions, target)) && all_nops(rest)
        }
        Form::JumpReturnThunk => lands_in(&model.return_thunks, branch_target(JMP, at, bytes)),
        Form::JumpAnywhere => {
            let target = branch_target(JMP, at, bytes);
            outside(target)
                || lands_in(&model.functions, target)
                || lands_in(&model.return_thunks, target)
        }
        Form::Nops => all_nops(bytes),
        Form::KernelPointer => bytes
            .first_chunk()
            .is_some_and(|bytes| u64::from_le_bytes(*bytes) >= KERNEL_HALF),
        Form::Shift => bytes.first().is_some_and(|bits| *bits < 32),
    }
}

#[cfg(test)]
mod tests {
    use super::{all_nops, matches, nop_len, relocated};
    use crate::guest::kernel::Slide;
    use penumbra_bundle::{Form, RunTimeModel, Site, SiteKind, TextOff};

    #[test]
    fn nops_are_nops_and_nothing_else_is() {
        for nop in [
            &[0x90][..],
            &[0x66, 0x90],
            &[0x0f, 0x1f, 0x00],
            &[0x0f, 0x1f, 0x40, 0],
            &[0x0f, 0x1f, 0x44, 0, 0],
            &[0x66, 0x0f, 0x1f, 0x44, 0, 0],
            &[0x0f, 0x1f, 0x80, 0, 0, 0, 0],
            &[0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
            &[0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(nop_len(nop), Some(nop.len()), "{nop:x?}");
            // Cut short it is none, unless what is left is one by itself.
            assert!(nop_len(&nop[..nop.len() - 1]).is_none_or(|len| len < nop.len()));
        }
        assert!(all_nops(&[0x0f, 0x1f, 0x00, 0x90, 0x66, 0x90]));
        assert!(!all_nops(&[0x90, 0xc3]));
        // pause is f3 90; a non-zero displacement is not canonical; f2 and segment prefixes change other opcodes.
        assert!(!all_nops(&[0xf3, 0x90]));
        assert!(!all_nops(&[0x0f, 0x1f, 0x40, 1]));
        assert!(!all_nops(&[0x66, 0x66]));
    }

    fn site(len: u8) -> Site {
        Site {
            at: TextOff(0x100),
            len,
            kind: SiteKind::Other,
            forms: Vec::new(),
        }
    }

    fn rel(opcode: u8, target: i32) -> Vec<u8> {
        let mut bytes = vec![opcode];
        bytes.extend((target - 0x105).to_le_bytes());
        bytes
    }

    #[test]
    fn calls_and_jumps_must_land_on_what_the_model_names() {
        let model = RunTimeModel {
            functions: vec![TextOff(0x20), TextOff(0x4000)],
            return_thunks: vec![TextOff(0x8000)],
            ..RunTimeModel::default()
        };
        let is = |form: Form, len: u8, bytes: &[u8]| {
            matches(&form, &model, &site(len), bytes, Slide(0), 0x10000, |_| {
                false
            })
        };
        assert!(is(Form::Call, 5, &rel(0xe8, 0x4000)));
        assert!(is(Form::Call, 5, &rel(0xe8, 0x20)));
        assert!(!is(Form::Call, 5, &rel(0xe8, 0x4001)));
        assert!(!is(Form::Call, 5, &rel(0xe8, -0x4000)));
        assert!(!is(Form::Call, 5, &rel(0xe9, 0x4000)));
        assert!(is(Form::CallAnywhere, 5, &rel(0xe8, -0x4000)));
        assert!(is(Form::CallAnywhere, 5, &rel(0xe8, 0x10000)));
        assert!(is(Form::CallAnywhere, 5, &rel(0xe8, 0x4000)));
        assert!(!is(Form::CallAnywhere, 5, &rel(0xe8, 0x4001)));
        assert!(is(Form::JumpAnywhere, 5, &rel(0xe9, 0x8000)));
        assert!(!is(Form::JumpAnywhere, 5, &rel(0xe9, 0x8001)));
        assert!(is(Form::JumpReturnThunk, 5, &rel(0xe9, 0x8000)));
        assert!(!is(Form::JumpReturnThunk, 5, &rel(0xe9, 0x4000)));
        let mut padded = rel(0xe8, 0x20);
        padded.push(0x90);
        assert!(is(Form::Call, 6, &padded));
        padded[5] = 0xcc;
        assert!(!is(Form::Call, 6, &padded));
    }

    #[test]
    fn a_runtime_constant_is_an_address_of_the_kernels_or_a_shift() {
        let model = RunTimeModel::default();
        let is = |form: Form, bytes: &[u8]| {
            let site = site(bytes.len() as u8);
            matches(&form, &model, &site, bytes, Slide(0), 0x10000, |_| false)
        };
        assert!(is(
            Form::KernelPointer,
            &0xff11_0000_0412_3000_u64.to_le_bytes()
        ));
        assert!(!is(
            Form::KernelPointer,
            &0x0000_7fff_1234_5000_u64.to_le_bytes()
        ));
        assert!(is(Form::Shift, &[19]));
        assert!(!is(Form::Shift, &[32]));
    }

    #[test]
    fn exact_forms_move_with_the_slide() {
        // mov $0xffffffff81000010, %rax-like: 4 bytes absolute at 3; per-cpu field at 8.
        let exact = [0x48, 0xc7, 0xc0, 0x10, 0, 0, 0x81, 0, 0x00, 0x10, 0, 0];
        let form = Form::Exact {
            bytes: exact.to_vec(),
            abs32: vec![3],
            inverse32: vec![8],
        };
        let slide = Slide(0x1a0_0000);
        let mut running = exact;
        running[3..7].copy_from_slice(&0x82a0_0010_u32.to_le_bytes());
        running[8..12].copy_from_slice(&0x1000_u32.wrapping_sub(0x1a0_0000).to_le_bytes());
        assert_eq!(relocated(&exact, &[3], &[8], slide), running);
        let model = RunTimeModel::default();
        let check = |bytes: &[u8], ignore: usize| {
            matches(&form, &model, &site(12), bytes, slide, 0x10000, |at| {
                at == ignore
            })
        };
        assert!(check(&running, 99));
        assert!(!check(&exact, 99));
        running[0] = 0xcc;
        assert!(!check(&running, 99));
        assert!(check(&running, 0));
    }
}
