//! A kernel in small: the sections that the readers look for, at their own addresses, each with its first entries. Of the
//! text there are only the addresses, which is what tables are checked against.

use crate::elf::{self, Part};
use crate::symbols::{self, Named};
use hardener::image::Image;
use penumbra_bundle::LinkVa;

/// Structures whose layouts are looked up, an enumeration, and a structure with much inside that has no name.
pub const STRUCTURES: [&str; 12] = [
    "alt_instr",
    "paravirt_patch_site",
    "exception_table_entry",
    "bug_entry",
    "kernel_symbol",
    "pci_fixup",
    "jump_entry",
    "static_call_site",
    "module",
    "mod_mem_type",
    "list_head",
    "page",
];
/// Tables in sections of their own, and the structure of an entry or its size.
const SECTIONS: [(&str, Entry); 8] = [
    (".return_sites", Entry::Bytes(4)),
    (".retpoline_sites", Entry::Bytes(4)),
    (".smp_locks", Entry::Bytes(4)),
    (".altinstructions", Entry::Of("alt_instr")),
    (".parainstructions", Entry::Of("paravirt_patch_site")),
    ("__ex_table", Entry::Of("exception_table_entry")),
    ("__bug_table", Entry::Of("bug_entry")),
    (".pci_fixup", Entry::Of("pci_fixup")),
];
/// Tables between symbols.
const BETWEEN: [(&str, &str, Entry); 6] = [
    ("__start_mcount_loc", "__stop_mcount_loc", Entry::Bytes(8)),
    (
        "__start_kprobe_blacklist",
        "__stop_kprobe_blacklist",
        Entry::Bytes(8),
    ),
    (
        "__start___jump_table",
        "__stop___jump_table",
        Entry::Of("jump_entry"),
    ),
    (
        "__start_static_call_sites",
        "__stop_static_call_sites",
        Entry::Of("static_call_site"),
    ),
    ("__initcall_start", "__initcall_end", Entry::Bytes(4)),
    (
        "__start_error_injection_whitelist",
        "__stop_error_injection_whitelist",
        Entry::Bytes(16),
    ),
];
/// Entries of each.
const ENTRIES: u64 = 12;
/// Symbols: fewer than this are none to the readers.
const SYMBOLS: usize = 1100;

#[derive(Clone, Copy)]
enum Entry {
    Bytes(u64),
    Of(&'static str),
}

impl Entry {
    fn size(self, image: &Image) -> u64 {
        match self {
            Entry::Bytes(size) => size,
            Entry::Of(structure) => u64::from(image.btf.size_of(structure).unwrap_or(0)),
        }
    }
}

/// A kernel in small.
pub struct Small {
    /// The ELF file and the relocations behind it.
    pub vmlinux: Vec<u8>,
    /// The same with a symbol table in place of kallsyms.
    pub with_symtab: Vec<u8>,
    /// Its `.rodata`.
    pub rodata: Vec<u8>,
    /// Its `.BTF`.
    pub btf: Vec<u8>,
    /// Its symbols.
    pub symbols: Vec<Named>,
}

/// Cuts `image`; `late`: with the tables of kallsyms as from Linux 6.4 on.
pub fn cut(image: &Image, late: bool) -> Small {
    let bytes = |at: u64, len: u64| {
        image
            .at(LinkVa(at), len as usize)
            .map(<[u8]>::to_vec)
            .unwrap_or_default()
    };
    let btf = crate::btf::cut(
        image.section_bytes(".BTF").expect("a kernel with BTF"),
        &STRUCTURES,
    );
    let mut parts = Vec::new();
    for section in image.sections().iter().filter(|section| section.exec) {
        parts.push(Part {
            name: section.name.clone(),
            at: section.range.start.0,
            bytes: Vec::new(),
            size: section.range.len(),
            exec: true,
        });
    }
    let mut put = |name: &str, at: u64, bytes: Vec<u8>| {
        let size = bytes.len() as u64;
        parts.push(Part {
            name: name.to_owned(),
            at,
            bytes,
            size,
            exec: false,
        });
    };
    for (name, entry) in SECTIONS {
        if let Some(section) = image.section(name) {
            let size = section.range.len().min(ENTRIES * entry.size(image));
            put(
                name,
                section.range.start.0,
                bytes(section.range.start.0, size),
            );
        }
    }
    let mut moved = Vec::new();
    for (start, end, entry) in BETWEEN {
        if let Ok(range) = image.between(start, end) {
            let size = range.len().min(ENTRIES * entry.size(image));
            put(
                &format!(".{start}"),
                range.start.0,
                bytes(range.start.0, size),
            );
            moved.push((end, range.start.0 + size));
        }
    }
    for (name, size) in [("__ksymtab", 12), ("__ksymtab_gpl", 12)] {
        if let Some(section) = image.section(name) {
            let at = section.range.start.0;
            let table = bytes(at, ENTRIES * size);
            // The second word of an entry leads to its name.
            let names = (0..ENTRIES).map(|n| (n * size + 4) as usize);
            let names = names.map(|n| {
                at.wrapping_add(n as u64)
                    .wrapping_add_signed(i64::from(i32::from_le_bytes(
                        table[n..n + 4].try_into().expect("four bytes"),
                    )))
            });
            for (n, name) in names.enumerate() {
                // Parts that overlap would end one another's strings.
                let mut string = bytes(name, 128);
                string.truncate(1 + string.iter().position(|byte| *byte == 0).expect("it ends"));
                put(&format!(".string{n}.{name:x}"), name, string);
            }
            put(name, at, table);
        }
    }
    let notes = image.section(".notes").expect("a kernel with notes").range;
    put(".notes", notes.start.0, bytes(notes.start.0, notes.len()));
    put(
        ".BTF",
        image.section(".BTF").expect("as above").range.start.0,
        btf.clone(),
    );
    let text = image
        .section(".text")
        .expect("a kernel with text")
        .range
        .start
        .0;
    let start = image
        .section(".rodata")
        .expect("a kernel with data")
        .range
        .start
        .0;
    let symbols = some(image, &moved, start);
    let banner = image
        .symbol("linux_banner")
        .expect("a kernel with a banner")
        .0;
    let banner = [bytes(banner, 128), vec![0; 512]].concat();
    let rodata = [banner.clone(), symbols::tables(&symbols, text, late)].concat();
    put(".rodata", start, rodata.clone());
    let mut vmlinux = elf::write(&parts, &[]);
    let last = parts.last_mut().expect("just put there");
    (last.size, last.bytes) = (banner.len() as u64, banner);
    let named: Vec<elf::Name> = symbols
        .iter()
        .map(|(at, name)| (*at, 16, name[1..].to_owned()))
        .collect();
    let mut with_symtab = elf::write(&parts, &named);
    for file in [&mut vmlinux, &mut with_symtab] {
        file.resize(file.len().next_multiple_of(8), 0);
        let few = |list: &[LinkVa]| {
            list.iter()
                .take(8)
                .map(|at| at.0 as u32)
                .collect::<Vec<_>>()
        };
        let relocs = &image.relocs;
        for list in [&relocs.abs64, &relocs.inverse32, &relocs.abs32] {
            let words = std::iter::once(0).chain(few(list));
            file.extend(words.flat_map(u32::to_le_bytes));
        }
    }
    Small {
        vmlinux,
        with_symtab,
        rodata,
        btf,
        symbols,
    }
}

/// Symbols that are looked up by name, and others until there are enough; those in `moved` elsewhere.
fn some(image: &Image, moved: &[(&str, u64)], banner: u64) -> Vec<Named> {
    let wanted = |name: &str| {
        let known = [
            "__start_",
            "__stop_",
            "__initcall_",
            "__indirect_thunk_",
            "__x86_",
        ];
        known.iter().any(|start| name.starts_with(start)) && name.len() < 40
            || name == "linux_banner"
    };
    let mut symbols: Vec<Named> = Vec::new();
    let mut rest = SYMBOLS;
    for symbol in &image.symbols {
        let looked_up = wanted(&symbol.name);
        if !looked_up && (rest == 0 || symbol.name.len() > 20) {
            continue;
        }
        rest -= usize::from(!looked_up && rest > 0);
        let place = moved
            .iter()
            .find(|(name, _)| *name == symbol.name)
            .map(|(_, at)| *at);
        let at = if symbol.name == "linux_banner" {
            banner
        } else {
            place.unwrap_or(symbol.va.0)
        };
        symbols.push((at, format!("{}{}", char::from(symbol.kind), symbol.name)));
    }
    symbols.sort();
    symbols
}
