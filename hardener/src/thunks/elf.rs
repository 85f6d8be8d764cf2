//! `cave.elf`: an `ET_EXEC` file that objdump reads, with a section and a segment for the tables and one for the thunks.

use super::Named;
use object::write::elf::{FileHeader, ProgramHeader, SectionHeader, Sym, Writer};
use object::{Endianness, elf};
use penumbra_bundle::LinkVa;

const PAGE: usize = 4096;

/// A section's contents.
pub struct Part<'a> {
    /// Its address.
    pub start: LinkVa,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// Its symbols.
    pub named: &'a [Named],
}

/// Writes the file. `kernel` names the kernel's own thunks, so that a disassembly says where jumps out of the cave go.
pub fn write(tables: &Part<'_>, thunks: &Part<'_>, kernel: &[(String, LinkVa)]) -> Vec<u8> {
    let parts = [
        (
            &b".tables"[..],
            tables,
            elf::PF_R,
            elf::SHF_ALLOC,
            elf::STT_OBJECT,
        ),
        (
            &b".thunks"[..],
            thunks,
            elf::PF_R | elf::PF_X,
            elf::SHF_ALLOC | elf::SHF_EXECINSTR,
            elf::STT_FUNC,
        ),
    ];
    let mut file = Vec::new();
    let mut writer = Writer::new(Endianness::Little, true, &mut file);
    writer.reserve_file_header();
    writer.reserve_program_headers(parts.len() as u32);
    // Offsets and addresses agree modulo the page: both start on one.
    let offsets = parts.map(|(_, part, ..)| writer.reserve(part.bytes.len(), PAGE));
    let names = parts.map(|(name, ..)| {
        (
            writer.add_section_name(name),
            writer.reserve_section_index(),
        )
    });
    let mut symbols = Vec::new();
    for ((_, part, _, _, kind), (_, section)) in parts.iter().zip(&names) {
        for one in part.named {
            let name = writer.add_string(one.name.as_bytes());
            writer.reserve_symbol_index(Some(*section));
            symbols.push(Sym {
                name: Some(name),
                section: Some(*section),
                st_info: elf::STB_GLOBAL << 4 | kind,
                st_other: elf::STV_DEFAULT,
                st_shndx: 0,
                st_value: one.range.start.0,
                st_size: one.range.len(),
            });
        }
    }
    for (name, va) in kernel {
        let name = writer.add_string(name.as_bytes());
        writer.reserve_symbol_index(None);
        symbols.push(Sym {
            name: Some(name),
            section: None,
            st_info: elf::STB_GLOBAL << 4 | elf::STT_NOTYPE,
            st_other: elf::STV_DEFAULT,
            st_shndx: elf::SHN_ABS,
            st_value: va.0,
            st_size: 0,
        });
    }
    writer.reserve_symtab_section_index();
    writer.reserve_strtab_section_index();
    writer.reserve_shstrtab_section_index();
    writer.reserve_symtab();
    writer.reserve_strtab();
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
    // Writing into memory fails only when it is out of step with what was reserved.
    writer
        .write_file_header(&header)
        .expect("the file is small");
    writer.write_align_program_headers();
    for ((_, part, flags, ..), offset) in parts.iter().zip(offsets) {
        writer.write_program_header(&ProgramHeader {
            p_type: elf::PT_LOAD,
            p_flags: *flags,
            p_offset: offset as u64,
            p_vaddr: part.start.0,
            p_paddr: part.start.0,
            p_filesz: part.bytes.len() as u64,
            p_memsz: part.bytes.len() as u64,
            p_align: PAGE as u64,
        });
    }
    for ((_, part, ..), offset) in parts.iter().zip(offsets) {
        writer.pad_until(offset);
        writer.write(part.bytes);
    }
    writer.write_null_symbol();
    for symbol in &symbols {
        writer.write_symbol(symbol);
    }
    writer.write_strtab();
    writer.write_shstrtab();
    writer.write_null_section_header();
    for (((_, part, _, flags, _), offset), (name, _)) in parts.iter().zip(offsets).zip(&names) {
        writer.write_section_header(&SectionHeader {
            name: Some(*name),
            sh_type: elf::SHT_PROGBITS,
            sh_flags: u64::from(*flags),
            sh_addr: part.start.0,
            sh_offset: offset as u64,
            sh_size: part.bytes.len() as u64,
            sh_link: 0,
            sh_info: 0,
            sh_addralign: PAGE as u64,
            sh_entsize: 0,
        });
    }
    writer.write_symtab_section_header(1);
    writer.write_strtab_section_header();
    writer.write_shstrtab_section_header();
    file
}
