//! Sets of offsets with one byte for each member (see [`HashedBytes`]): whatever is in one stands at its place in one of the
//! parts, so a thunk compares one byte for each part with the offset's low byte.

use super::assembler::{Thunk, imm32};
use super::hashed::settle;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use penumbra_bundle::{HashedBytes, LinkVa};

/// The parts are filled to this at most: with four places for each member 97 % is where none fits any more, with more of them later.
const FILL_PERCENT: usize = 96;
/// With fewer parts too little of them can be filled.
const LEAST_PARTS: usize = 3;

/// How a table is hashed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parts {
    /// Their length and multipliers.
    pub hash: HashedBytes,
    /// How many there are.
    pub count: usize,
}

/// Encodes `offsets`, all below `end`.
pub fn encode(offsets: &[u32], end: u32) -> (Parts, Vec<u8>) {
    let least = (u32::BITS - end.leading_zeros()).max(*HashedBytes::BITS.start());
    let mut sizes = (least..=*HashedBytes::BITS.end())
        .filter_map(HashedBytes::new)
        .flat_map(|hash| {
            (LEAST_PARTS..=HashedBytes::PARTS).map(move |count| Parts { hash, count })
        });
    sizes
        .find_map(|parts| Some((parts, fill(offsets, end, parts)?)))
        .expect("parts of 2^24 bytes hold any text's offsets")
}

/// The bytes of all parts; none when they have no room, or no byte says that nothing stands at a place.
fn fill(offsets: &[u32], end: u32, parts: Parts) -> Option<Vec<u8>> {
    let Parts { hash, count } = parts;
    let len = hash.part_len();
    if offsets.len() * 100 > count * len * FILL_PERCENT {
        return None;
    }
    let place = |offset: &u32, part| part * len + hash.place(part, *offset);
    let places = settle(offsets, count, count * len, place)?;
    let byte = |(at, member): (usize, &Option<u32>)| match member {
        Some(offset) => Some(*offset as u8),
        // What it says is no offset that anybody asks for.
        None => (0..=255).find(|byte| hash.offset(at / len, at % len, *byte) >= end),
    };
    places.iter().enumerate().map(byte).collect()
}

/// Goes to `found` when `offset` (below the `end` that it was encoded for) is in the table at `start`. Changes `index` and the
/// flags.
pub fn look_up(
    thunk: &mut Thunk,
    parts: Parts,
    start: LinkVa,
    offset: (AsmRegister32, AsmRegister8),
    index: (AsmRegister64, AsmRegister32),
    found: CodeLabel,
) -> Result<(), IcedError> {
    let Parts { hash, count } = parts;
    for part in 0..count {
        let part_start = LinkVa(start.0 + (part * hash.part_len()) as u64);
        let a = &mut thunk.asm;
        a.imul_3(index.1, offset.0, hash.multiplier(part) as i32)?;
        a.shr(index.1, 40 - hash.offset_bits())?;
        a.cmp(offset.1, byte_ptr(index.0 + i64::from(imm32(part_start))))?;
        thunk.absolute();
        thunk.asm.je(found)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{LEAST_PARTS, encode};
    use std::collections::BTreeSet;

    fn said(offsets: &[u32], end: u32) -> (usize, BTreeSet<u32>) {
        let (parts, bytes) = encode(offsets, end);
        assert_eq!(bytes.len(), parts.count * parts.hash.part_len());
        let said: Vec<u32> = parts.hash.offsets(&bytes).filter(|at| *at < end).collect();
        let once: BTreeSet<u32> = said.iter().copied().collect();
        assert_eq!(once.len(), said.len(), "each stands once");
        (bytes.len(), once)
    }

    #[test]
    fn a_table_says_its_members_and_nothing_else_below_its_end() {
        let end = 0x00ce_f7df;
        for step in [53, 61, 997] {
            let offsets: Vec<u32> = (0..end).step_by(step).map(|at| at + at / 7 % 5).collect();
            let (len, said) = said(&offsets, end);
            assert!(said.iter().eq(&offsets));
            assert!(len < 2 * offsets.len() || len == LEAST_PARTS << 16, "{len}");
        }
    }

    #[test]
    fn an_end_that_leaves_no_byte_for_nothing_takes_another_bit() {
        let (parts, bytes) = encode(&[5, 6, 0xffff], 1 << 16);
        assert_eq!(parts.hash.offset_bits(), 17);
        let said = parts.hash.offsets(&bytes).filter(|at| *at < 1 << 16);
        assert_eq!(
            said.collect::<BTreeSet<_>>(),
            BTreeSet::from([5, 6, 0xffff])
        );
    }
}
