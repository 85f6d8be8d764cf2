//! The uncompressed kernel as an ELF file: sections by name, bytes by link address, KASLR relocations.

use super::KernelError;
use super::kallsyms::KernelSymbol;
use goblin::elf::section_header::{SHN_ABS, SHT_NOBITS};
use goblin::elf::{Elf, sym};
use penumbra_bundle::{LinkVa, VaRange};
use std::collections::BTreeMap;

/// `__START_KERNEL_map` (arch/x86/include/asm/page_64_types.h).
const MAP_START: u64 = 0xffff_ffff_8000_0000;

/// The number of no section: the value is no address to be relocated.
const ABSOLUTE: usize = SHN_ABS as usize;

/// A section with an address: where it lies in memory and in the file.
#[derive(Clone, Copy, Debug)]
pub struct Section {
    /// Its link addresses. Zero-based for `.data..percpu`.
    pub range: VaRange,
    offset: usize,
    /// Whether the file holds its bytes (`SHT_NOBITS` otherwise).
    in_file: bool,
}

/// The relocations that the decompressor applies for KASLR.
///
/// They follow the ELF file, read backwards from its end: 32-bit ones, a zero, inverse 32-bit ones, a zero, 64-bit ones, a
/// zero (Linux, arch/x86/boot/compressed/misc.c, `handle_relocations`). Each names the place, sign-extended from 32 bits.
#[derive(Debug, Default)]
pub struct Relocs {
    /// Places of 32-bit sign-extended addresses. Sorted.
    pub abs32: Vec<LinkVa>,
    /// Places of 32-bit RIP-relative offsets to zero-based per-cpu data. Sorted.
    pub inverse32: Vec<LinkVa>,
    /// Places of 64-bit addresses. Sorted.
    pub abs64: Vec<LinkVa>,
}

/// The image, parsed.
pub struct Vmlinux {
    bytes: Vec<u8>,
    sections: BTreeMap<String, Section>,
    /// Loaded segments: link addresses, and where the file has their bytes.
    segments: Vec<(VaRange, usize)>,
    /// KASLR relocations; empty when the image carries none.
    pub relocs: Relocs,
    /// What `.symtab` names, by address; empty when the image is stripped.
    pub symtab: Vec<KernelSymbol>,
}

impl Vmlinux {
    /// Parses an uncompressed kernel, relocations after it included.
    pub fn parse(bytes: Vec<u8>) -> Result<Vmlinux, KernelError> {
        let elf = Elf::parse(&bytes).map_err(|error| KernelError::Elf(error.to_string()))?;
        let mut sections = BTreeMap::new();
        let headers = usize::from(elf.header.e_shnum) * usize::from(elf.header.e_shentsize);
        let mut elf_end = (elf.header.e_shoff as usize).saturating_add(headers);
        for header in &elf.section_headers {
            let in_file = header.sh_type != SHT_NOBITS;
            let offset = header.sh_offset as usize;
            let size = header.sh_size as usize;
            if in_file {
                let end = offset.checked_add(size).filter(|end| *end <= bytes.len());
                elf_end = elf_end.max(end.ok_or(KernelError::Truncated)?);
            }
            let name = elf.shdr_strtab.get_at(header.sh_name).unwrap_or_default();
            let end = below_top(header.sh_addr, header.sh_size);
            let range = VaRange {
                start: LinkVa(header.sh_addr),
                end: LinkVa(end.ok_or(KernelError::Truncated)?),
            };
            // Debug sections have no address; the first section of a name counts.
            let allocated =
                header.sh_flags & u64::from(goblin::elf::section_header::SHF_ALLOC) != 0;
            if allocated {
                sections.entry(name.to_owned()).or_insert(Section {
                    range,
                    offset,
                    in_file,
                });
            }
        }
        let mut segments = Vec::new();
        for header in &elf.program_headers {
            let end = below_top(header.p_vaddr, header.p_filesz);
            let in_file = header.p_offset.checked_add(header.p_filesz);
            if header.p_type != goblin::elf::program_header::PT_LOAD {
                continue;
            }
            let (Some(end), Some(true)) = (end, in_file.map(|end| end <= bytes.len() as u64))
            else {
                return Err(KernelError::Truncated);
            };
            let range = VaRange {
                start: LinkVa(header.p_vaddr),
                end: LinkVa(end),
            };
            segments.push((range, header.p_offset as usize));
            // Per-cpu data is linked at zero and loaded with the rest of the kernel: `__START_KERNEL_map` plus its physical
            // address (arch/x86/kernel/vmlinux.lds.S). Relocations name that place.
            if header.p_vaddr < MAP_START && header.p_paddr < 1 << 30 {
                let start = MAP_START + header.p_paddr;
                let range = VaRange {
                    start: LinkVa(start),
                    end: LinkVa(start + header.p_filesz.min(1 << 30)),
                };
                segments.push((range, header.p_offset as usize));
            }
        }
        let relocs = read_relocs(bytes.get(elf_end..).ok_or(KernelError::Truncated)?)?;
        let symtab = symtab(&elf);
        Ok(Vmlinux {
            symtab,
            bytes,
            sections,
            segments,
            relocs,
        })
    }

    /// The section called `name`, or why the image cannot be checked without it.
    pub fn section(&self, name: &'static str) -> Result<&Section, KernelError> {
        self.sections.get(name).ok_or(KernelError::Missing {
            what: "section",
            name,
        })
    }

    /// Where the sections are whose names start with `prefix`.
    pub fn named<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = VaRange> + 'a {
        let named = self.sections.range(prefix.to_owned()..);
        let named = named.take_while(move |(name, _)| name.starts_with(prefix));
        named.map(|(_, section)| section.range)
    }

    /// The section called `name`, if the image has it.
    pub fn find_section(&self, name: &str) -> Option<&Section> {
        self.sections.get(name)
    }

    /// The bytes of a section as the file has them; none for `SHT_NOBITS`.
    pub fn section_bytes(&self, section: &Section) -> &[u8] {
        if !section.in_file {
            return &[];
        }
        &self.bytes[section.offset..section.offset + section.range.len() as usize]
    }

    /// `len` bytes at `va` as the boot loader puts them into memory, before relocation.
    pub fn bytes(&self, va: LinkVa, len: usize) -> Option<&[u8]> {
        let (range, offset) = self.segments.iter().find(|(range, _)| range.contains(va))?;
        if len as u64 > range.end.0 - va.0 {
            return None;
        }
        let start = offset + (va.0 - range.start.0) as usize;
        self.bytes.get(start..start + len)
    }

    /// The little-endian 32-bit word at `va`.
    pub fn u32(&self, va: LinkVa) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes(va, 4)?.try_into().ok()?))
    }

    /// The little-endian 64-bit word at `va`.
    pub fn u64(&self, va: LinkVa) -> Option<u64> {
        Some(u64::from_le_bytes(self.bytes(va, 8)?.try_into().ok()?))
    }

    /// The address that a 32-bit offset from its own place denotes (`.long target - .`).
    pub fn pc_relative(&self, at: LinkVa) -> Option<LinkVa> {
        let offset = self.u32(at)? as i32;
        Some(LinkVa(at.0.wrapping_add_signed(i64::from(offset))))
    }
}

/// Named places of code, of data and without a type (System V gABI, symbol table), in sections or absolute.
fn symtab(elf: &Elf<'_>) -> Vec<KernelSymbol> {
    let mut symbols = Vec::new();
    for symbol in &elf.syms {
        let section = elf.section_headers.get(symbol.st_shndx);
        let absolute = symbol.st_shndx == ABSOLUTE;
        let placed = symbol.st_shndx != 0 && (absolute || section.is_some());
        let typed = matches!(
            symbol.st_type(),
            sym::STT_NOTYPE | sym::STT_OBJECT | sym::STT_FUNC
        );
        let name = elf.strtab.get_at(symbol.st_name).unwrap_or_default();
        if !placed || !typed || name.is_empty() || below_top(symbol.st_value, 1).is_none() {
            continue;
        }
        let code = !absolute && section.is_some_and(|section| section.is_executable());
        let letter = match symbol.st_bind() {
            sym::STB_WEAK => b'W',
            _ if code => b't',
            _ => b'd',
        };
        symbols.push(KernelSymbol {
            at: LinkVa(symbol.st_value),
            letter,
            name: name.to_owned(),
        });
    }
    symbols.sort_by_key(|symbol| symbol.at);
    symbols
}

/// Where `size` bytes at `start` end. No kernel is linked to the topmost pages, so that what is added to an address does not
/// wrap.
fn below_top(start: u64, size: u64) -> Option<u64> {
    start
        .checked_add(size)
        .filter(|end| *end < u64::MAX - 0xffff)
}

fn read_relocs(tail: &[u8]) -> Result<Relocs, KernelError> {
    let mut words = tail
        .rchunks_exact(4)
        .map(|word| i32::from_le_bytes(word.try_into().expect("four bytes")));
    let mut list = || -> Result<Vec<LinkVa>, KernelError> {
        let mut list = Vec::new();
        loop {
            match words.next() {
                Some(0) => break,
                Some(word) => list.push(LinkVa(i64::from(word) as u64)),
                None => return Err(KernelError::Relocations),
            }
        }
        list.sort_unstable();
        Ok(list)
    };
    if tail.len() < 12 {
        return Ok(Relocs::default());
    }
    Ok(Relocs {
        abs32: list()?,
        inverse32: list()?,
        abs64: list()?,
    })
}
