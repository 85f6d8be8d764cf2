//! The ELF file inside (System V gABI, chapter 4 and 5), read with goblin.

use super::{Fault, KernelSymbol};
use goblin::elf::header::{EM_X86_64, ET_EXEC};
use goblin::elf::program_header::PT_LOAD;
use goblin::elf::section_header::{SHF_ALLOC, SHF_EXECINSTR, SHN_ABS, SHN_UNDEF, SHT_NOBITS};
use penumbra_bundle::{LinkVa, VaRange};
use std::ops::Range;

/// Nothing of a kernel is linked here or above: what points there is an error code (include/linux/err.h, `MAX_ERRNO`). So sums
/// of an address and a small length do not wrap.
pub(super) const TOP: u64 = u64::MAX - 0xffff;

/// A loadable segment.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Virtual address.
    pub va: u64,
    /// Physical address.
    pub pa: u64,
    /// Its bytes in the file.
    pub file: Range<usize>,
}

/// A section.
#[derive(Clone, Debug)]
pub struct Section {
    /// Its name.
    pub name: String,
    /// Where it is linked.
    pub range: VaRange,
    /// Its bytes in the file; empty for `.bss` and its like.
    pub file: Range<usize>,
    /// Whether it occupies memory when the kernel runs.
    pub alloc: bool,
    /// Whether it holds code.
    pub exec: bool,
}

/// What is read from the ELF structures.
pub struct Elf {
    pub segments: Vec<Segment>,
    pub sections: Vec<Section>,
    /// From `.symtab`; empty when stripped.
    pub symbols: Vec<KernelSymbol>,
    /// Where the ELF file ends: relocations follow in a bzImage's payload.
    pub end: usize,
}

/// Reads the ELF structures of `bytes`.
pub fn read(bytes: &[u8]) -> Result<Elf, Fault> {
    let elf = goblin::elf::Elf::parse(bytes)
        .map_err(|error| Fault::damaged("ELF headers", error.to_string()))?;
    let header = &elf.header;
    if header.e_machine != EM_X86_64 || !elf.is_64 || !elf.little_endian {
        return Err(Fault::not_a_kernel("ELF header", "is not for x86-64"));
    }
    if header.e_type != ET_EXEC {
        return Err(Fault::not_a_kernel(
            "ELF header",
            "is not an executable at fixed addresses (ET_EXEC)",
        ));
    }
    let file_range = |what: &str, offset: u64, size: u64| {
        let end = offset
            .checked_add(size)
            .filter(|end| *end <= bytes.len() as u64);
        end.map(|end| offset as usize..end as usize).ok_or_else(|| {
            Fault::damaged(
                what.to_owned(),
                format!(
                    "{size} bytes at offset {offset:#x} leave the file of {}",
                    bytes.len()
                ),
            )
        })
    };
    let below_top = |what: &str, start: u64, size: u64| {
        let end = start.checked_add(size).filter(|end| *end <= TOP);
        end.map(|_| ()).ok_or_else(|| {
            let what = what.to_owned();
            Fault::damaged(
                what,
                format!("{size} bytes at {start:#x} leave what a kernel may be linked to"),
            )
        })
    };
    let mut segments = Vec::new();
    for (index, program) in elf.program_headers.iter().enumerate() {
        if program.p_type == PT_LOAD {
            let what = format!("ELF segment {index}");
            below_top(&what, program.p_vaddr, program.p_filesz)?;
            segments.push(Segment {
                va: program.p_vaddr,
                pa: program.p_paddr,
                file: file_range(&what, program.p_offset, program.p_filesz)?,
            });
        }
    }
    let headers_len = u64::from(header.e_shnum) * u64::from(header.e_shentsize);
    let headers_end = header.e_shoff.saturating_add(headers_len);
    let mut end = headers_end.min(bytes.len() as u64) as usize;
    let mut sections = Vec::new();
    for section in &elf.section_headers {
        let name = elf.shdr_strtab.get_at(section.sh_name).unwrap_or("");
        let file = if section.sh_type == SHT_NOBITS {
            0..0
        } else {
            file_range(
                &format!("ELF section {name}"),
                section.sh_offset,
                section.sh_size,
            )?
        };
        end = end.max(file.end);
        let what = format!("ELF section {name}");
        below_top(&what, section.sh_addr, section.sh_size)?;
        sections.push(Section {
            name: name.to_owned(),
            range: VaRange {
                start: LinkVa(section.sh_addr),
                end: LinkVa(section.sh_addr.saturating_add(section.sh_size)),
            },
            file,
            alloc: section.sh_flags & u64::from(SHF_ALLOC) != 0,
            exec: section.sh_flags & u64::from(SHF_EXECINSTR) != 0,
        });
    }
    if sections.is_empty() || segments.is_empty() {
        return Err(Fault::not_a_kernel(
            "ELF headers",
            "there are no sections or no segments",
        ));
    }
    let symbols = symbols(&elf, &sections);
    Ok(Elf {
        segments,
        sections,
        symbols,
        end,
    })
}

/// The named symbols of `.symtab`, with the letters that `nm` gives them.
fn symbols(elf: &goblin::elf::Elf<'_>, sections: &[Section]) -> Vec<KernelSymbol> {
    elf.syms
        .iter()
        .filter(|symbol| symbol.st_shndx != SHN_UNDEF as usize && symbol.st_type() <= 2)
        .filter_map(|symbol| {
            let name = elf
                .strtab
                .get_at(symbol.st_name)
                .filter(|name| !name.is_empty())?;
            let section = sections.get(symbol.st_shndx);
            let lower = match section {
                _ if symbol.st_shndx == SHN_ABS as usize => b'a',
                Some(section) if section.exec => b't',
                Some(_) => b'd',
                None => return None,
            };
            if symbol.st_value > TOP {
                return None;
            }
            let kind = match symbol.st_bind() {
                0 => lower,
                2 => b'W',
                _ => lower.to_ascii_uppercase(),
            };
            Some(KernelSymbol {
                va: LinkVa(symbol.st_value),
                kind,
                name: name.to_owned(),
            })
        })
        .collect()
}
