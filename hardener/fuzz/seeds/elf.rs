//! A small ELF file: sections at any address, each with a segment of its own.

use object::write::elf::{FileHeader, ProgramHeader, SectionHeader, Sym, Writer};
use object::{Endianness, elf};

/// A section to be.
pub struct Part {
    pub name: String,
    pub at: u64,
    /// Its bytes in the file; none for code whose bytes nobody reads.
    pub bytes: Vec<u8>,
    /// How large it is in memory.
    pub size: u64,
    pub exec: bool,
}

/// A symbol to be: where, how long, its name.
pub type Name = (u64, u64, String);

/// Writes the file; `symbols` are of code, or absolute.
pub fn write(parts: &[Part], symbols: &[Name]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut writer = Writer::new(Endianness::Little, true, &mut file);
    writer.reserve_file_header();
    let held: Vec<&Part> = parts.iter().filter(|part| !part.bytes.is_empty()).collect();
    writer.reserve_program_headers(held.len() as u32);
    let offsets: Vec<usize> = parts
        .iter()
        .map(|part| writer.reserve(part.bytes.len(), 8))
        .collect();
    let names: Vec<_> = parts
        .iter()
        .map(|part| {
            (
                writer.add_section_name(part.name.as_bytes()),
                writer.reserve_section_index(),
            )
        })
        .collect();
    let inside = |at: u64| {
        parts
            .iter()
            .position(|part| part.exec && at >= part.at && at - part.at < part.size)
    };
    let symbols: Vec<Sym> = symbols
        .iter()
        .map(|(at, size, name)| {
            let section = inside(*at).map(|index| names[index].1);
            let name = writer.add_string(name.as_bytes());
            writer.reserve_symbol_index(section);
            Sym {
                name: Some(name),
                section,
                st_info: elf::STB_GLOBAL << 4 | elf::STT_FUNC,
                st_other: elf::STV_DEFAULT,
                st_shndx: if section.is_some() { 0 } else { elf::SHN_ABS },
                st_value: *at,
                st_size: *size,
            }
        })
        .collect();
    if !symbols.is_empty() {
        writer.reserve_symtab_section_index();
        writer.reserve_strtab_section_index();
    }
    writer.reserve_shstrtab_section_index();
    if !symbols.is_empty() {
        writer.reserve_symtab();
        writer.reserve_strtab();
    }
    writer.reserve_shstrtab();
    writer.reserve_section_headers();
    let header = FileHeader {
        os_abi: elf::ELFOSABI_NONE,
        abi_version: 0,
        e_type: elf::ET_EXEC,
        e_machine: elf::EM_X86_64,
        e_entry: 0,
        e_flags: 0,
    };
    writer
        .write_file_header(&header)
        .expect("the file is small");
    writer.write_align_program_headers();
    for (part, offset) in parts
        .iter()
        .zip(&offsets)
        .filter(|(part, _)| !part.bytes.is_empty())
    {
        writer.write_program_header(&ProgramHeader {
            p_type: elf::PT_LOAD,
            p_flags: elf::PF_R | if part.exec { elf::PF_X } else { 0 },
            p_offset: *offset as u64,
            p_vaddr: part.at,
            p_paddr: part.at & 0x7fff_ffff,
            p_filesz: part.bytes.len() as u64,
            p_memsz: part.size,
            p_align: 8,
        });
    }
    for (part, offset) in parts.iter().zip(&offsets) {
        writer.pad_until(*offset);
        writer.write(&part.bytes);
    }
    if !symbols.is_empty() {
        writer.write_null_symbol();
        symbols
            .iter()
            .for_each(|symbol| writer.write_symbol(symbol));
        writer.write_strtab();
    }
    writer.write_shstrtab();
    writer.write_null_section_header();
    for ((part, offset), (name, _)) in parts.iter().zip(&offsets).zip(&names) {
        let nobits = part.bytes.is_empty() && part.size > 0;
        writer.write_section_header(&SectionHeader {
            name: Some(*name),
            sh_type: if nobits {
                elf::SHT_NOBITS
            } else {
                elf::SHT_PROGBITS
            },
            sh_flags: u64::from(elf::SHF_ALLOC | if part.exec { elf::SHF_EXECINSTR } else { 0 }),
            sh_addr: part.at,
            sh_offset: *offset as u64,
            sh_size: part.size,
            sh_link: 0,
            sh_info: 0,
            sh_addralign: 8,
            sh_entsize: 0,
        });
    }
    if !symbols.is_empty() {
        writer.write_symtab_section_header(1);
        writer.write_strtab_section_header();
    }
    writer.write_shstrtab_section_header();
    file
}
