//! Sets of offsets with one byte for each member: the place in the table says all but the low byte (quotienting).
//!
//! A table has one or more parts of `2^(offset_bits - 8)` bytes each. An offset's place in a part is the high bits of its
//! product with the part's multiplier, modulo `2^offset_bits`. The multiplier is odd, so the product modulo 256 and the offset
//! modulo 256 say one another: place and low byte together say the offset, and no other one has both.

use std::ops::RangeInclusive;

/// Where a multiplier's high bits come from, by part: the fractions of the square roots of 2, 5, 11, 17, 19, 23, 29 and 37. None,
/// however many of its high bits are taken, looks like an address of the kernel.
const FRACTIONS: [u32; 8] = [
    0x6a09_e667,
    0x3c6e_f372,
    0x510e_527f,
    0x1f83_d9ab,
    0x5be0_cd19,
    0xcbbb_9d5d,
    0x629a_292a,
    0x152f_ecd8,
];

/// The parts of a table of offsets of so many bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HashedBytes {
    offset_bits: u32,
}

impl HashedBytes {
    /// How many bits an offset may have.
    pub const BITS: RangeInclusive<u32> = 12..=32;
    /// The most parts that a table may have.
    pub const PARTS: usize = FRACTIONS.len();

    /// Offsets below `2^offset_bits`; none when that is outside [`HashedBytes::BITS`].
    pub fn new(offset_bits: u32) -> Option<HashedBytes> {
        HashedBytes::BITS
            .contains(&offset_bits)
            .then_some(HashedBytes { offset_bits })
    }

    /// How many bits an offset has.
    pub fn offset_bits(self) -> u32 {
        self.offset_bits
    }

    /// The bytes of each part.
    pub fn part_len(self) -> usize {
        1 << (self.offset_bits - 8)
    }

    /// The multiplier of part `part`, moved up so that its product modulo `2^32` begins with the place.
    pub fn multiplier(self, part: usize) -> u32 {
        let low = 32 - self.offset_bits;
        (FRACTIONS[part] >> low | 1) << low
    }

    /// The place of `offset` in part `part`.
    pub fn place(self, part: usize, offset: u32) -> usize {
        (offset.wrapping_mul(self.multiplier(part)) >> (40 - self.offset_bits)) as usize
    }

    /// The offset that `byte` says at `place` of part `part`.
    pub fn offset(self, part: usize, place: usize, byte: u8) -> u32 {
        let low = 32 - self.offset_bits;
        let odd = self.multiplier(part) >> low;
        let product = (place as u32) << 8 | u32::from(byte).wrapping_mul(odd) & 0xff;
        product.wrapping_mul(inverse(odd)) & (u32::MAX >> low)
    }

    /// The offsets that a table's bytes say, in the order of its places.
    pub fn offsets(self, table: &[u8]) -> impl Iterator<Item = u32> {
        let parts = table.chunks_exact(self.part_len()).take(Self::PARTS);
        parts.enumerate().flat_map(move |(part, bytes)| {
            let places = bytes.iter().enumerate();
            places.map(move |(place, byte)| self.offset(part, place, *byte))
        })
    }
}

/// What `odd` gives 1 with, modulo 2^32: each round of Newton's iteration doubles the low bits that are right, and of an odd
/// number three are its own inverse's.
fn inverse(odd: u32) -> u32 {
    (0..4).fold(odd, |known, _| {
        known.wrapping_mul(2u32.wrapping_sub(odd.wrapping_mul(known)))
    })
}

#[cfg(test)]
mod tests {
    use super::HashedBytes;

    #[test]
    fn place_and_low_byte_say_the_offset() {
        for bits in HashedBytes::BITS {
            let hash = HashedBytes::new(bits).unwrap();
            let last = u32::MAX >> (32 - bits);
            for part in 0..HashedBytes::PARTS {
                for offset in [0, 1, 0xff, last / 3, last / 2 + 1, last - 1, last] {
                    let place = hash.place(part, offset);
                    assert!(place < hash.part_len(), "{bits} {part} {offset:#x}");
                    assert_eq!(hash.offset(part, place, offset as u8), offset);
                }
            }
        }
    }

    #[test]
    fn every_byte_of_a_part_says_another_offset() {
        let hash = HashedBytes::new(16).unwrap();
        for part in 0..HashedBytes::PARTS {
            let mut seen = vec![false; 1 << 16];
            for place in 0..hash.part_len() {
                for byte in 0..=255 {
                    let offset = hash.offset(part, place, byte) as usize;
                    assert!(!std::mem::replace(&mut seen[offset], true));
                }
            }
        }
    }

    #[test]
    fn no_multiplier_looks_like_an_address_of_the_kernel() {
        let all = HashedBytes::BITS.filter_map(HashedBytes::new);
        let all = all.flat_map(|hash| (0..HashedBytes::PARTS).map(move |n| hash.multiplier(n)));
        for multiplier in all {
            assert!(
                !(0x8000_0000..0xc000_0000).contains(&multiplier),
                "{multiplier:#x}"
            );
        }
    }
}
