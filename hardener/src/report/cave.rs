//! `cave.elf` and the tables in it, as people ask about them.

use goblin::elf::Elf;
use goblin::elf::section_header::SHN_ABS;
use penumbra_bundle::{Bundle, HashedBytes, LinkVa, Table, TableKind, VaRange};
use std::ops::Range;

/// The cave of a bundle, parsed.
pub struct CaveView<'a> {
    bytes: &'a [u8],
    segments: Vec<(VaRange, Range<usize>)>,
    thunks: Vec<Thunk>,
}

/// A thunk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Thunk {
    /// Its symbol.
    pub name: String,
    /// Its code.
    pub range: VaRange,
}

impl<'a> CaveView<'a> {
    /// Parses; what goblin says when the file is none.
    pub fn read(bundle: &'a Bundle) -> Result<CaveView<'a>, String> {
        let elf = Elf::parse(&bundle.cave).map_err(|error| error.to_string())?;
        let mut segments = Vec::new();
        for header in &elf.program_headers {
            let end = header.p_offset.checked_add(header.p_filesz);
            let end = end.filter(|end| *end <= bundle.cave.len() as u64);
            let end = end.ok_or_else(|| "a segment leaves the file".to_owned())?;
            let range = VaRange {
                start: LinkVa(header.p_vaddr),
                end: LinkVa(header.p_vaddr.saturating_add(header.p_filesz)),
            };
            segments.push((range, header.p_offset as usize..end as usize));
        }
        let functions = elf.syms.iter().filter(|symbol| {
            symbol.is_function() && symbol.st_shndx != SHN_ABS as usize && symbol.st_size > 0
        });
        let mut thunks: Vec<Thunk> = functions
            .filter_map(|symbol| {
                let name = elf.strtab.get_at(symbol.st_name)?.to_owned();
                let start = LinkVa(symbol.st_value);
                let end = start.checked_add(symbol.st_size)?;
                let range = VaRange { start, end };
                Some(Thunk { name, range })
            })
            .collect();
        thunks.sort_by_key(|thunk| thunk.range.start);
        Ok(CaveView {
            bytes: &bundle.cave,
            segments,
            thunks,
        })
    }

    /// All thunks by address.
    pub fn thunks(&self) -> &[Thunk] {
        &self.thunks
    }

    /// The thunk that holds `va`.
    pub fn thunk_at(&self, va: LinkVa) -> Option<&Thunk> {
        let after = self.thunks.partition_point(|thunk| thunk.range.start <= va);
        let thunk = self.thunks[..after].last()?;
        thunk.range.contains(va).then_some(thunk)
    }

    /// The bytes of `range`; `None` when the file has not all of them.
    pub fn bytes(&self, range: VaRange) -> Option<&'a [u8]> {
        let (segment, file) = self
            .segments
            .iter()
            .find(|(segment, _)| segment.encloses(&range))?;
        let start = file.start + (range.start.0 - segment.start.0) as usize;
        self.bytes.get(start..start + range.len() as usize)
    }

    /// Whether `table` holds `va`; `None` when it says nothing about it.
    pub fn holds(&self, table: &Table, va: LinkVa) -> Option<bool> {
        if !table.covers.contains(va) {
            return None;
        }
        let bytes = self.bytes(table.range)?;
        let at = va.0 - table.covers.start.0;
        Some(match table.kind {
            TableKind::Bitmap { granule } => {
                let granule = u64::from(granule.max(1));
                let bit = at / granule;
                let byte = bytes.get((bit / 8) as usize).copied().unwrap_or(0);
                at.is_multiple_of(granule) && byte >> (bit % 8) & 1 == 1
            }
            TableKind::HashedBytes { offset_bits } => HashedBytes::new(offset_bits)
                .is_some_and(|hash| hash.offsets(bytes).any(|offset| u64::from(offset) == at)),
            TableKind::SortedOffsets | TableKind::HashedOffsets => {
                words(bytes).any(|word| u64::from(word) == at)
            }
            TableKind::HashedClasses { offset_bits } => {
                let mut held = words(bytes).filter(|word| *word != u32::MAX);
                held.any(|word| offset(word, offset_bits) == at)
            }
            TableKind::HashedArities => {
                let mut held = words(bytes).filter(|word| *word != u32::MAX);
                held.any(|word| u64::from(word >> 3) == at)
            }
        })
    }

    /// All members of `table`, ascending.
    pub fn members(&self, table: &Table) -> Vec<LinkVa> {
        let Some(bytes) = self.bytes(table.range) else {
            return Vec::new();
        };
        let from = |offset: u64| LinkVa(table.covers.start.0.wrapping_add(offset));
        match table.kind {
            TableKind::Bitmap { granule } => {
                let ones = bytes.iter().enumerate().flat_map(|(index, byte)| {
                    let bits = (0..8).filter(move |bit| byte >> bit & 1 == 1);
                    bits.map(move |bit| (index as u64 * 8 + bit) * u64::from(granule))
                });
                ones.map(from).collect()
            }
            TableKind::HashedBytes { offset_bits } => {
                let hash = HashedBytes::new(offset_bits);
                let said = hash.into_iter().flat_map(|hash| hash.offsets(bytes));
                let mut held: Vec<u64> = said.map(u64::from).collect();
                held.retain(|offset| *offset < table.covers.len());
                held.sort_unstable();
                held.into_iter().map(from).collect()
            }
            TableKind::SortedOffsets => words(bytes)
                .take(table.count as usize)
                .map(|word| from(u64::from(word)))
                .collect(),
            TableKind::HashedOffsets => {
                let mut held: Vec<u32> = words(bytes).filter(|word| *word != u32::MAX).collect();
                held.sort_unstable();
                held.into_iter().map(|word| from(word.into())).collect()
            }
            TableKind::HashedClasses { offset_bits } => {
                let held = words(bytes).filter(|word| *word != u32::MAX);
                let mut held: Vec<u64> = held.map(|word| offset(word, offset_bits)).collect();
                held.sort_unstable();
                held.dedup();
                held.into_iter().map(from).collect()
            }
            TableKind::HashedArities => {
                let held = words(bytes).filter(|word| *word != u32::MAX);
                let mut held: Vec<u32> = held.map(|word| word >> 3).collect();
                held.sort_unstable();
                held.into_iter().map(|word| from(word.into())).collect()
            }
        }
    }
}

/// The offset in a word of a table of classes.
fn offset(word: u32, bits: u32) -> u64 {
    u64::from(word) & ((1 << bits.min(32)) - 1)
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    let words = bytes.chunks_exact(4);
    words.map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")))
}
