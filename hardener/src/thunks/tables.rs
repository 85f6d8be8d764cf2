//! Sets of legal targets, encoded so that a thunk needs one memory access for nearly all of them: a bitmap over the main text
//! (before the cave), and a sorted list for the few that the bitmap does not hold.

use super::Named;
use penumbra_bundle::{LinkVa, Table, TableKind, TextOff, VaRange};

/// Functions are aligned to 16 bytes (CONFIG_FUNCTION_ALIGNMENT, `-falign-functions`); the few that are not are listed.
pub const ENTRY_GRANULE: u32 = 16;
/// Fills the sorted list to a power of two, for a search without bounds checks; no text offset is so large.
const PAD: u32 = u32::MAX;

/// One set of targets in both encodings, placed.
pub struct TargetTables {
    bitmap: Table,
    bitmap_bytes: Vec<u8>,
    sorted: Table,
    sorted_bytes: Vec<u8>,
}

/// What a thunk needs to know about a set.
#[derive(Clone, Copy, Debug)]
pub struct Targets {
    /// The text: addresses outside pass.
    pub text: VaRange,
    /// What the bitmap covers, from the text's start.
    pub dense: u32,
    /// Bytes for each bit.
    pub granule: u32,
    /// Where the bitmap lies.
    pub bitmap: LinkVa,
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
        granule: u32,
        at: LinkVa,
    ) -> TargetTables {
        let dense = VaRange {
            start: text.start,
            end: dense_end,
        };
        let bits = (dense.len() as u32).div_ceil(granule) as usize;
        // Thunks read whole 64-bit words.
        let mut bitmap_bytes = vec![0u8; bits.div_ceil(64) * 8];
        let (mut in_bitmap, mut sorted) = (0, Vec::new());
        for address in addresses {
            let bit = (address.0 / granule) as usize;
            if bit < bits && u64::from(address.0) < dense.len() && address.0.is_multiple_of(granule)
            {
                bitmap_bytes[bit / 8] |= 1 << (bit % 8);
                in_bitmap += 1;
            } else {
                sorted.push(address.0);
            }
        }
        let count = sorted.len() as u64;
        sorted.resize(sorted.len().max(1).next_power_of_two(), PAD);
        let sorted_bytes: Vec<u8> = sorted.iter().flat_map(|word| word.to_le_bytes()).collect();
        let place = |start: LinkVa, len: usize| VaRange {
            start,
            end: LinkVa(start.0 + len as u64),
        };
        let bitmap_range = place(at, bitmap_bytes.len());
        let sorted_range = place(
            LinkVa(bitmap_range.end.0.next_multiple_of(64)),
            sorted_bytes.len(),
        );
        TargetTables {
            bitmap: Table {
                name: name.to_owned(),
                kind: TableKind::Bitmap { granule },
                range: bitmap_range,
                covers: dense,
                count: in_bitmap,
            },
            bitmap_bytes,
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
        let TableKind::Bitmap { granule } = self.bitmap.kind else {
            unreachable!("built so above")
        };
        Targets {
            text,
            dense: self.bitmap.covers.len() as u32,
            granule,
            bitmap: self.bitmap.range.start,
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
            (self.bitmap, self.bitmap_bytes),
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

#[cfg(test)]
mod tests {
    use super::{PAD, TargetTables};
    use penumbra_bundle::{LinkVa, TextOff, VaRange};

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
            16,
            LinkVa(TEXT + 0x3000),
        );
        assert_eq!(tables.bitmap.count, 2);
        assert_eq!(tables.bitmap_bytes[..2], [0b11, 0]);
        assert_eq!(tables.bitmap_bytes.len() % 8, 0, "thunks read whole words");
        let sorted: Vec<u32> = tables
            .sorted_bytes
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(sorted, [0x17, 0x1fff, 0x2000, 0x3ff0]);
        assert_eq!(tables.targets(text).sorted_len, 4);
    }

    #[test]
    fn an_empty_sorted_list_has_one_entry_that_nothing_equals() {
        let text = VaRange {
            start: LinkVa(TEXT),
            end: LinkVa(TEXT + 0x1000),
        };
        let tables = TargetTables::build("x", &[], text, text.end, 1, LinkVa(TEXT));
        assert_eq!(tables.sorted_bytes, PAD.to_le_bytes());
        assert_eq!(tables.sorted.count, 0);
    }
}
