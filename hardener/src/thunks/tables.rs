//! Sets of legal targets, encoded so that a thunk needs one memory access for nearly all of them: a bitmap over the main text
//! (before the cave), and a sorted list for the few that the bitmap does not hold. Where there is no room for a bit for each
//! byte of text, a byte for each target takes a fifth of that.

use super::Named;
use super::hashed_bytes::{self, Parts};
use penumbra_bundle::{LinkVa, Table, TableKind, TextOff, VaRange};

/// Functions are aligned to 16 bytes (CONFIG_FUNCTION_ALIGNMENT, `-falign-functions`); the few that are not are listed.
pub const ENTRY_GRANULE: u32 = 16;
/// Fills the sorted list to a power of two, for a search without bounds checks; no text offset is so large.
const PAD: u32 = u32::MAX;

/// How the main text's targets are to be encoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dense {
    /// A bit for so many bytes.
    Bitmap(u32),
    /// A byte for each target.
    Hashed,
}

/// How they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encoding {
    /// A bit for so many bytes.
    Bitmap(u32),
    /// A byte for each target, in parts.
    Hashed(Parts),
}

/// One set of targets in both encodings, placed.
pub struct TargetTables {
    encoding: Encoding,
    dense: Table,
    dense_bytes: Vec<u8>,
    sorted: Table,
    sorted_bytes: Vec<u8>,
}

/// What a thunk needs to know about a set.
#[derive(Clone, Copy, Debug)]
pub struct Targets {
    /// The text: addresses outside pass.
    pub text: VaRange,
    /// What the dense table covers, from the text's start.
    pub dense: u32,
    /// How those are encoded.
    pub encoding: Encoding,
    /// Where the dense table lies.
    pub table: LinkVa,
    /// Where the sorted list lies.
    pub sorted: LinkVa,
    /// Entries in the sorted list with its padding: a power of two.
    pub sorted_len: u32,
}

impl TargetTables {
    /// Encodes `addresses` (sorted) and places both tables from `at` on.
    pub fn build(
        name: &str,
        addresses: &[TextOff],
        text: VaRange,
        dense_end: LinkVa,
        encoding: Dense,
        at: LinkVa,
    ) -> TargetTables {
        let dense = VaRange {
            start: text.start,
            end: dense_end,
        };
        let len = dense.len() as u32;
        let (encoding, dense_bytes, mut sorted) = match encoding {
            Dense::Bitmap(granule) => {
                let (bytes, rest) = bitmap(addresses, len, granule);
                (Encoding::Bitmap(granule), bytes, rest)
            }
            Dense::Hashed => {
                let (bytes, parts, rest) = hashed(addresses, len);
                (Encoding::Hashed(parts), bytes, rest)
            }
        };
        let kind = match encoding {
            Encoding::Bitmap(granule) => TableKind::Bitmap { granule },
            Encoding::Hashed(parts) => TableKind::HashedBytes {
                offset_bits: parts.hash.offset_bits(),
            },
        };
        let in_dense = (addresses.len() - sorted.len()) as u64;
        let count = sorted.len() as u64;
        sorted.resize(sorted.len().max(1).next_power_of_two(), PAD);
        let sorted_bytes: Vec<u8> = sorted.iter().flat_map(|word| word.to_le_bytes()).collect();
        let place = |start: LinkVa, len: usize| VaRange {
            start,
            end: LinkVa(start.0 + len as u64),
        };
        let dense_range = place(at, dense_bytes.len());
        let sorted_range = place(
            LinkVa(dense_range.end.0.next_multiple_of(64)),
            sorted_bytes.len(),
        );
        TargetTables {
            encoding,
            dense: Table {
                name: name.to_owned(),
                kind,
                range: dense_range,
                covers: dense,
                count: in_dense,
            },
            dense_bytes,
            sorted: Table {
                name: format!("{name}_sorted"),
                kind: TableKind::SortedOffsets,
                range: sorted_range,
                covers: text,
                count,
            },
            sorted_bytes,
        }
    }

    /// The first address behind both tables, aligned for the next.
    pub fn end(&self) -> LinkVa {
        LinkVa(self.sorted.range.end.0.next_multiple_of(64))
    }

    /// What thunks need.
    pub fn targets(&self, text: VaRange) -> Targets {
        Targets {
            text,
            dense: self.dense.covers.len() as u32,
            encoding: self.encoding,
            table: self.dense.range.start,
            sorted: self.sorted.range.start,
            sorted_len: (self.sorted_bytes.len() / 4) as u32,
        }
    }

    /// Appends both tables' bytes, symbols and descriptions.
    pub fn append(
        self,
        start: LinkVa,
        bytes: &mut Vec<u8>,
        named: &mut Vec<Named>,
        tables: &mut Vec<Table>,
    ) {
        for (table, own) in [
            (self.dense, self.dense_bytes),
            (self.sorted, self.sorted_bytes),
        ] {
            bytes.resize((table.range.start.0 - start.0) as usize, 0);
            bytes.extend(own);
            named.push(Named {
                name: table.name.clone(),
                range: table.range,
            });
            tables.push(table);
        }
    }
}

/// A bit for each `granule` bytes below `len`, and the addresses that it cannot say.
fn bitmap(addresses: &[TextOff], len: u32, granule: u32) -> (Vec<u8>, Vec<u32>) {
    let bits = len.div_ceil(granule) as usize;
    // Thunks read whole 64-bit words.
    let mut bytes = vec![0u8; bits.div_ceil(64) * 8];
    let mut rest = Vec::new();
    for address in addresses {
        let bit = (address.0 / granule) as usize;
        if address.0 < len && address.0.is_multiple_of(granule) {
            bytes[bit / 8] |= 1 << (bit % 8);
        } else {
            rest.push(address.0);
        }
    }
    (bytes, rest)
}

/// A byte for each address below `len`, and the others.
fn hashed(addresses: &[TextOff], len: u32) -> (Vec<u8>, Parts, Vec<u32>) {
    let addresses = addresses.iter().map(|at| at.0);
    let (held, rest): (Vec<u32>, Vec<u32>) = addresses.partition(|at| *at < len);
    let (parts, bytes) = hashed_bytes::encode(&held, len);
    (bytes, parts, rest)
}

#[cfg(test)]
mod tests {
    use super::{Dense, PAD, TargetTables};
    use penumbra_bundle::{HashedBytes, LinkVa, TableKind, TextOff, VaRange};

    const TEXT: u64 = 0xffff_ffff_8100_0000;

    #[test]
    fn a_target_is_in_the_bitmap_or_in_the_sorted_list_and_in_one_only() {
        let text = VaRange {
            start: LinkVa(TEXT),
            end: LinkVa(TEXT + 0x4000),
        };
        let addresses = [0x0, 0x10, 0x17, 0x1fff, 0x2000, 0x3ff0].map(TextOff);
        let tables = TargetTables::build(
            "x",
            &addresses,
            text,
            LinkVa(TEXT + 0x2000),
            Dense::Bitmap(16),
            LinkVa(TEXT + 0x3000),
        );
        assert_eq!(tables.dense.count, 2);
        assert_eq!(tables.dense_bytes[..2], [0b11, 0]);
        assert_eq!(tables.dense_bytes.len() % 8, 0, "thunks read whole words");
        let sorted: Vec<u32> = tables
            .sorted_bytes
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(sorted, [0x17, 0x1fff, 0x2000, 0x3ff0]);
        assert_eq!(tables.targets(text).sorted_len, 4);
    }

    #[test]
    fn of_hashed_targets_only_those_behind_are_listed() {
        let text = VaRange {
            start: LinkVa(TEXT),
            end: LinkVa(TEXT + 0x4000),
        };
        let addresses = [0x0, 0x10, 0x17, 0x1fff, 0x2000, 0x3ff0].map(TextOff);
        let end = LinkVa(TEXT + 0x2000);
        let tables = TargetTables::build(
            "x",
            &addresses,
            text,
            end,
            Dense::Hashed,
            LinkVa(TEXT + 0x3000),
        );
        let TableKind::HashedBytes { offset_bits } = tables.dense.kind else {
            panic!("{:?}", tables.dense.kind);
        };
        let hash = HashedBytes::new(offset_bits).unwrap();
        let mut said: Vec<u32> = hash.offsets(&tables.dense_bytes).collect();
        said.retain(|at| *at < 0x2000);
        said.sort_unstable();
        assert_eq!(said, [0x0, 0x10, 0x17, 0x1fff]);
        assert_eq!(tables.dense.count, 4);
        assert_eq!(tables.sorted.count, 2);
    }

    #[test]
    fn an_empty_sorted_list_has_one_entry_that_nothing_equals() {
        let text = VaRange {
            start: LinkVa(TEXT),
            end: LinkVa(TEXT + 0x1000),
        };
        let tables = TargetTables::build("x", &[], text, text.end, Dense::Bitmap(1), LinkVa(TEXT));
        assert_eq!(tables.sorted_bytes, PAD.to_le_bytes());
        assert_eq!(tables.sorted.count, 0);
    }
}
