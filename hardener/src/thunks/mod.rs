//! What goes into the cave: tables of legal targets and the thunks that slots jump to. One cave for all variants, so that an
//! address inside it is valid in every view (design, invariant 2).

mod assembler;
mod elf;
pub mod forward_cfi;
mod lookup;
pub mod return_cfi;
mod tables;

use crate::text::{PAGE, Text, TextError};
use assembler::Section;
use penumbra_bundle::{LinkVa, Reloc, Table, VaRange};
use std::collections::BTreeMap;

pub use tables::{TargetTables, Targets};

/// A named piece of the cave.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Named {
    /// Its symbol.
    pub name: String,
    /// Where it lies.
    pub range: VaRange,
}

/// Thunks and tables at their link addresses.
pub struct CaveContents {
    /// Whole pages of the cave that are used.
    pub range: VaRange,
    /// `cave.elf`.
    pub elf: Vec<u8>,
    /// Thunks by symbol.
    pub thunks: BTreeMap<String, LinkVa>,
    /// The tables.
    pub tables: Vec<Table>,
    /// Absolute addresses. Sorted.
    pub relocs: Vec<Reloc>,
    /// Where thunks end by returning. Sorted.
    pub return_tails: Vec<LinkVa>,
}

/// Addresses that thunks need from the kernel.
pub struct KernelThunks {
    /// `__x86_return_thunk`.
    pub return_thunk: LinkVa,
    /// `__x86_indirect_thunk_REG`, by register number.
    pub indirect: BTreeMap<u8, LinkVa>,
}

impl KernelThunks {
    fn named(&self) -> Vec<(String, LinkVa)> {
        let indirect = self.indirect.iter().map(|(register, va)| {
            let register = crate::text::REGISTERS[usize::from(*register)];
            (format!("__x86_indirect_thunk_{register}"), *va)
        });
        let own = ("__x86_return_thunk".to_owned(), self.return_thunk);
        indirect.chain([own]).collect()
    }
}

/// Builds the cave for a text: tables first, thunks behind them.
pub fn build(text: &Text, kernel: &KernelThunks) -> Result<CaveContents, TextError> {
    let start = text.cave.pages.start;
    let dense_end = text.cave.run.start;
    let mut at = start;
    let mut place = |name: &str, addresses, granule| {
        let table = TargetTables::build(name, addresses, text.range, dense_end, granule, at);
        at = table.end();
        table
    };
    let returns = place("return_targets", &text.return_targets, 1);
    let entries = place("entries", &text.entries, tables::ENTRY_GRANULE);
    let code_start = LinkVa(at.0.next_multiple_of(PAGE));

    let mut code = Section::new(code_start);
    return_cfi::emit(&mut code, &returns.targets(text.range), kernel.return_thunk);
    forward_cfi::emit(&mut code, &entries.targets(text.range), kernel, text);
    let code_end = LinkVa(code_start.0 + code.bytes().len() as u64);
    let range = VaRange {
        start,
        end: LinkVa(code_end.0.next_multiple_of(PAGE)),
    };
    if range.end > text.cave.pages.end {
        return Err(TextError::Cave {
            needed: range.len(),
            found: text.cave.pages.len(),
        });
    }
    let mut table_bytes = Vec::new();
    let mut named = Vec::new();
    let mut tables = Vec::new();
    for part in [returns, entries] {
        part.append(start, &mut table_bytes, &mut named, &mut tables);
    }
    let mut relocs = code.relocs().to_vec();
    relocs.sort_by_key(|reloc| reloc.at);
    let mut return_tails = code.return_tails().to_vec();
    return_tails.sort_unstable();
    Ok(CaveContents {
        range,
        elf: elf::write(
            &elf::Part {
                start,
                bytes: &table_bytes,
                named: &named,
            },
            &elf::Part {
                start: code_start,
                bytes: code.bytes(),
                named: code.named(),
            },
            &kernel.named(),
        ),
        thunks: code
            .named()
            .iter()
            .map(|one| (one.name.clone(), one.range.start))
            .collect(),
        tables,
        relocs,
        return_tails,
    })
}
