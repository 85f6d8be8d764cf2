//! The image as the checker sees it: read afresh, sharing nothing with the emitter but decompression.

pub mod btf;
pub mod elf;
pub mod kallsyms;
pub mod sweep;
pub mod symbols;
pub mod system_map;
pub mod tables;

use btf::Btf;
use elf::Vmlinux;
use kallsyms::KernelSymbol;
use penumbra_bundle::{LinkVa, VaRange};
use sweep::Sweep;
use symbols::SymbolMap;
use tables::Tables;
use thiserror::Error;

/// Why an image cannot be checked.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The ELF headers make no sense.
    #[error("the uncompressed kernel is no ELF file: {0}; fetch the kernel package again")]
    Elf(String),
    /// Something lies outside the file.
    #[error(
        "the uncompressed kernel ends before its own tables do; it is truncated, fetch the kernel package again"
    )]
    Truncated,
    /// The relocations after the ELF file are not three lists.
    #[error("the KASLR relocations after the ELF file are not three zero-terminated lists")]
    Relocations,
    /// A part that the check needs is not there.
    #[error("{what} `{name}` is not in the image; this kernel's layout is unknown to the checker")]
    Missing {
        /// Section or symbol.
        what: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// Kallsyms could not be decoded.
    #[error(
        "kallsyms: {0} not found or inconsistent; give a vmlinux with .symtab, or this kernel's System.map"
    )]
    Kallsyms(&'static str),
    /// A line of the `System.map` is none.
    #[error("System.map: line {0} {1}; give the one that was built with this kernel")]
    SystemMap(usize, &'static str),
    /// The `System.map` is another kernel's.
    #[error(
        "System.map has `{name}` at {said}, the image's own symbols have it at {found}; give the one of this kernel, or none"
    )]
    OtherMap {
        /// The symbol.
        name: String,
        /// Where the map has it.
        said: LinkVa,
        /// Where the image has it.
        found: LinkVa,
    },
    /// BTF could not be decoded.
    #[error("the image's .BTF section does not decode")]
    Btf,
    /// BTF lacks a layout.
    #[error("BTF has no `struct {structure}` with a byte-aligned `{member}`")]
    Layout {
        /// The structure.
        structure: &'static str,
        /// The member, or empty for the structure itself.
        member: &'static str,
    },
    /// A table is not a whole number of entries.
    #[error(
        "the table from {} to {} is not a whole number of entries of {size} bytes", .range.start, .range.end
    )]
    TableSize {
        /// Where it is.
        range: VaRange,
        /// What BTF says about an entry.
        size: u64,
    },
}

/// The image with everything that the rules ask about.
pub struct Kernel {
    /// Sections, bytes, relocations.
    pub vmlinux: Vmlinux,
    /// Those of `.symtab`, else of kallsyms, else of the `System.map`.
    pub symbols: SymbolMap,
    /// Self-modification and other tables.
    pub tables: Tables,
    /// Instruction boundaries and calls of the text.
    pub sweep: Sweep,
    /// `.text`: everything that is executable after boot.
    pub text: VaRange,
}

impl Kernel {
    /// Reads the uncompressed kernel `elf`; if it has no symbols, those of its `System.map` are taken.
    pub fn read(elf: Vec<u8>, system_map: Option<&[u8]>) -> Result<Kernel, KernelError> {
        let vmlinux = Vmlinux::parse(elf)?;
        let map = system_map.map(system_map::read).transpose()?;
        let section = vmlinux.section(".text");
        // Neither needs anything of the other.
        let (swept, named) = rayon::join(
            || {
                section.map(|one| {
                    (
                        one.range,
                        Sweep::new(one.range.start, vmlinux.section_bytes(one)),
                    )
                })
            },
            || {
                let symbols = symbols(&vmlinux, map)?;
                let tables = Tables::read(&vmlinux, &symbols, &Btf::read(&vmlinux)?)?;
                Ok::<_, KernelError>((symbols, tables))
            },
        );
        let (symbols, tables) = named?;
        let (text, sweep) = swept?;
        Ok(Kernel {
            vmlinux,
            symbols,
            tables,
            sweep,
            text,
        })
    }

    /// The bytes of `range`, all in the file.
    pub fn bytes(&self, range: VaRange) -> Option<&[u8]> {
        self.vmlinux.bytes(range.start, range.len() as usize)
    }

    /// Retpolines, return thunks and what untrains them, which return on purpose: `.text..__x86.*`.
    pub fn thunk_text(&self) -> Result<Vec<VaRange>, KernelError> {
        let mut ranges = vec![
            self.symbols
                .between("__indirect_thunk_start", "__indirect_thunk_end")
                .or_else(|missing| self.unbounded_thunks().ok_or(missing))?,
        ];
        // SRSO's pair stands apart from the rest, at addresses that alias in the branch predictor.
        for name in [
            "srso_alias_untrain_ret",
            "srso_alias_safe_ret",
            "srso_alias_return_thunk",
        ] {
            ranges.extend(
                self.symbols
                    .find(name)
                    .and_then(|at| self.symbols.around(at)),
            );
        }
        Ok(ranges)
    }

    /// From the first retpoline to the end of the last thunk: from Linux 6.9 on no symbols bound them.
    fn unbounded_thunks(&self) -> Option<VaRange> {
        let thunks = self.symbols.iter().filter(|symbol| {
            symbol.name.starts_with("__x86_indirect_") || symbol.name == "__x86_return_thunk"
        });
        let thunks: Vec<LinkVa> = thunks.map(|symbol| symbol.at).collect();
        let (first, last) = (thunks.iter().min()?, thunks.iter().max()?);
        Some(VaRange {
            start: *first,
            end: self.symbols.around(*last)?.end,
        })
    }

    /// Where a per-CPU variable stands, from a CPU's GS base, that is a member of `pcpu_hot` from Linux 6.2 to 6.14 and no symbol.
    pub fn in_pcpu_hot(&self, btf: &Btf<'_>, member: &str) -> Option<LinkVa> {
        let hot = self.symbols.find("pcpu_hot")?;
        Some(LinkVa(hot.0 + u64::from(btf.offset("pcpu_hot", member)?)))
    }

    /// Whether `va` is in the text.
    pub fn in_text(&self, va: LinkVa) -> bool {
        self.text.contains(va)
    }
}

/// The image's own symbols, which those of its `System.map` must not contradict; or these.
fn symbols(vmlinux: &Vmlinux, map: Option<Vec<KernelSymbol>>) -> Result<SymbolMap, KernelError> {
    let own = match vmlinux.symtab.is_empty() {
        true => kallsyms::read(vmlinux),
        false => Ok(vmlinux.symtab.clone()),
    };
    let symbols = match (own, map) {
        (Ok(own), Some(map)) => system_map::compare(&map, &own).map(|()| own)?,
        (Err(_), Some(map)) => map,
        (own, None) => own?,
    };
    Ok(SymbolMap::new(symbols))
}
