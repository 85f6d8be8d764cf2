//! Sets of legal targets, encoded so that a thunk needs one memory access for nearly all of them: a bitmap over the main text
//! (before the cave), and a sorted list for the few that the bitmap does not hold. Where there is no room for a bit for each
//! byte of text, a dictionary takes half of that: calls are 2 bytes or longer, so 16 bytes of text hold few patterns of return
//! addresses (measured: fewer than 256 in all but some hundred places).

use super::Named;
use penumbra_bundle::{LinkVa, Table, TableKind, TextOff, VaRange};
use std::collections::BTreeMap;

/// Functions are aligned to 16 bytes (CONFIG_FUNCTION_ALIGNMENT, `-falign-functions`); the few that are not are listed.
pub const ENTRY_GRANULE: u32 = 16;
/// Fills the sorted list to a power of two, for a search without bounds checks; no text offset is so large.
const PAD: u32 = u32::MAX;

/// Bytes of text for which a dictionary has one byte.
pub const GROUP: u32 = 16;
/// Masks in a dictionary: one for each value of a byte.
pub const MASKS: usize = 256;

/// How the main text's targets are encoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dense {
    /// A bit for so many bytes.
    Bitmap(u32),
    /// A byte for [`GROUP`] bytes, which chooses one of 256 masks.
    Dictionary,
}

/// One set of targets in both encodings, placed.
pub struct TargetTables {
    encoding: Dense,
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
    /// How those are encoded.
    pub encoding: Dense,
    /// Where the bitmap or the dictionary lies.
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
        encoding: Dense,
        at: LinkVa,
    ) -> TargetTables {
        let dense = VaRange {
            start: text.start,
            end: dense_end,
        };
        let len = dense.len() as u32;
        let (kind, bitmap_bytes, mut sorted) = match encoding {
            Dense::Bitmap(granule) => {
                let (bytes, rest) = bitmap(addresses, len, granule);
                (TableKind::Bitmap { granule }, bytes, rest)
            }
            Dense::Dictionary => {
                let (bytes, rest) = dictionary(addresses, len);
                (TableKind::Dictionary, bytes, rest)
            }
        };
        let in_bitmap = (addresses.len() - sorted.len()) as u64;
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
            encoding,
            bitmap: Table {
                name: name.to_owned(),
                kind,
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
        Targets {
            text,
            dense: self.bitmap.covers.len() as u32,
            encoding: self.encoding,
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

/// The 255 most frequent masks of [`GROUP`] bytes and the empty one, a byte for each group below `len`, and the addresses in
/// groups with other masks or past `len`.
fn dictionary(addresses: &[TextOff], len: u32) -> (Vec<u8>, Vec<u32>) {
    let mut groups = vec![0u16; len.div_ceil(GROUP) as usize];
    for address in addresses.iter().filter(|address| address.0 < len) {
        groups[(address.0 / GROUP) as usize] |= 1 << (address.0 % GROUP);
    }
    let mut frequency = BTreeMap::new();
    for mask in groups.iter().filter(|mask| **mask != 0) {
        *frequency.entry(*mask).or_insert(0u32) += 1;
    }
    let mut masks: Vec<u16> = frequency.keys().copied().collect();
    // Stable: of masks as frequent, the smaller comes first.
    masks.sort_by_key(|mask| std::cmp::Reverse(frequency[mask]));
    masks.truncate(MASKS - 1);
    masks.insert(0, 0);
    let codes: BTreeMap<u16, u8> = masks.iter().copied().zip(0u8..=255).collect();
    let filled = (0..MASKS).map(|n| masks.get(n).copied().unwrap_or(0));
    let mut bytes: Vec<u8> = filled.flat_map(u16::to_le_bytes).collect();
    bytes.extend(groups.iter().map(|mask| codes.get(mask).unwrap_or(&0)));
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let said = |address: &TextOff| {
        let group = groups.get((address.0 / GROUP) as usize);
        address.0 < len && group.is_some_and(|mask| codes.contains_key(mask))
    };
    let rest = addresses.iter().filter(|address| !said(address));
    (bytes, rest.map(|address| address.0).collect())
}

#[cfg(test)]
mod tests {
    use super::{Dense, MASKS, PAD, TargetTables};
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
            Dense::Bitmap(16),
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

    /// The members that a dictionary's bytes say, as the manifest's documentation has it.
    fn members(bytes: &[u8], len: usize) -> Vec<u32> {
        let (masks, codes) = bytes.split_at(2 * MASKS);
        let mask = |code: u8| {
            let at = 2 * usize::from(code);
            u16::from_le_bytes([masks[at], masks[at + 1]])
        };
        let set = |at: &u32| mask(codes[*at as usize / 16]) >> (at % 16) & 1 == 1;
        (0..len as u32).filter(set).collect()
    }

    #[test]
    fn a_dictionary_holds_what_the_list_does_not() {
        let text = VaRange {
            start: LinkVa(TEXT),
            end: LinkVa(TEXT + 0x4000),
        };
        // The group at 16 n has the mask 2 n + 1: 512 of them, so some have no place in the dictionary.
        let groups = (0..512u32).flat_map(|n| {
            let mask = 2 * n + 1;
            let bits = (0..16).filter(move |bit| mask >> bit & 1 == 1);
            bits.map(move |bit| 16 * n + bit)
        });
        let all: Vec<u32> = groups.chain([0x2000, 0x3ff1]).collect();
        let addresses: Vec<TextOff> = all.iter().copied().map(TextOff).collect();
        let end = LinkVa(TEXT + 0x2000);
        let build = |addresses: &[TextOff]| {
            TargetTables::build("x", addresses, text, end, Dense::Dictionary, LinkVa(TEXT))
        };
        let tables = build(&addresses);
        assert_eq!(tables.bitmap.range.len(), 2 * 256 + 0x2000 / 16);
        let listed = tables.sorted_bytes.chunks_exact(4);
        let listed: Vec<u32> = listed
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .filter(|word| *word != PAD)
            .collect();
        let mut held = members(&tables.bitmap_bytes, 0x2000);
        assert_eq!(held.len() as u64, tables.bitmap.count);
        assert_eq!(listed.len() as u64, tables.sorted.count);
        assert!(listed.len() > 2, "more masks than a byte can name");
        held.extend(listed);
        held.sort_unstable();
        assert_eq!(held, all);
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
