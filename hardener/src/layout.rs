//! Where a kernel's structures have their members, and where its data is: what the installer reads a guest with.

use crate::image::{Fault, Image, Lacks};
use penumbra_bundle::{LinkVa, Memory};
use std::collections::BTreeMap;

/// Structure members whose offsets the installer reads guests with.
const LAYOUT: &[(&str, &[&str])] = &[
    (
        "task_struct",
        &[
            "tasks",
            "mm",
            "active_mm",
            "pid",
            "tgid",
            "comm",
            "cred",
            "real_cred",
            "start_time",
            "start_boottime",
            "stack",
            "flags",
            "real_parent",
            "group_leader",
            "thread_node",
            "signal",
            "exit_state",
            "__state",
            "thread",
        ],
    ),
    ("thread_struct", &["sp"]),
    ("signal_struct", &["thread_head"]),
    (
        "mm_struct",
        &[
            "pgd",
            "exe_file",
            "mm_users",
            "mm_count",
            "start_code",
            "arg_start",
            "arg_end",
        ],
    ),
    ("file", &["f_path", "f_inode"]),
    ("path", &["mnt", "dentry"]),
    ("dentry", &["d_name", "d_parent", "d_inode", "d_iname"]),
    ("qstr", &["name", "len"]),
    ("vfsmount", &["mnt_root", "mnt_sb"]),
    ("mount", &["mnt", "mnt_parent", "mnt_mountpoint"]),
    ("cred", &["uid", "euid", "gid"]),
    ("list_head", &["next"]),
    ("module", &["list", "name", "state"]),
];
/// Members that not every kernel has.
const LAYOUT_OPTIONAL: &[(&str, &[&str])] = &[
    ("task_struct", &["thread_group", "thread_info", "on_cpu"]),
    // A module's memory: two layouts to Linux 6.3, one array of regions from then on. Its notes, sections and symbols depend
    // on the configuration.
    (
        "module",
        &[
            "core_layout",
            "init_layout",
            "mem",
            "srcversion",
            "notes_attrs",
            "sect_attrs",
            "kallsyms",
            "percpu",
        ],
    ),
    (
        "module_layout",
        &["base", "size", "text_size", "ro_size", "ro_after_init_size"],
    ),
    ("module_memory", &["base", "size"]),
    ("module_notes_attrs", &["notes", "attrs"]),
    ("module_sect_attrs", &["nsections", "attrs"]),
    ("module_sect_attr", &["battr", "address"]),
    ("bin_attribute", &["attr", "size", "private"]),
    ("attribute", &["name"]),
];
/// Structures whose sizes the installer needs.
const SIZES: &[&str] = &["task_struct", "mm_struct"];
/// Sizes of structures that not every kernel has.
const SIZES_OPTIONAL: &[&str] = &["bin_attribute", "module_sect_attr", "module_memory"];
/// 16 KiB on x86-64 without KASAN (arch/x86/include/asm/page_64_types.h, `THREAD_SIZE_ORDER` 2).
const THREAD_SIZE: u32 = 0x4000;
/// Data symbols that the installer needs, and those that not every kernel has.
const DATA: &[&str] = &[
    "init_task",
    "poking_mm",
    "poking_addr",
    "init_top_pgt",
    "page_offset_base",
    "vmemmap_base",
    "phys_base",
    "linux_banner",
    "init_mm",
    "__per_cpu_offset",
    "modules",
];
const DATA_OPTIONAL: &[&str] = &[
    "efi_mm",
    "nr_cpu_ids",
    "_text",
    "_end",
    "__start_rodata",
    "hypercall_page",
    "__start_orc_unwind_ip",
    "__stop_orc_unwind_ip",
    "__start_orc_unwind",
];

/// The kernel's numbers for the memories of a module, from Linux 6.4 on.
const MEMORIES: &str = "mod_mem_type";
/// A per-CPU variable: its address is an offset.
const CURRENT: &str = "current_task";

/// Offsets, sizes and numbers by name: `structure.member`, `sizeof.structure`, `enumeration.value`, `const.NAME`. What every
/// kernel has must be there; `lacks` collects what is not.
pub fn members(image: &Image, lacks: &mut Lacks) -> Result<BTreeMap<String, u32>, Fault> {
    let mut layout = BTreeMap::from([("const.THREAD_SIZE".to_owned(), THREAD_SIZE)]);
    let offset = |structure: &str, member: &str| image.btf.member(structure, member)?.byte();
    let named = |list: &'static [(&str, &[&str])]| {
        list.iter().flat_map(|(structure, members)| {
            members.iter().map(move |member| (*structure, *member))
        })
    };
    for (structure, member) in named(LAYOUT) {
        let found = offset(structure, member).ok_or_else(|| {
            Fault::unsupported(
                ".BTF",
                format!("`struct {structure}` has no member `{member}`, which the installer reads"),
            )
        });
        layout.insert(format!("{structure}.{member}"), lacks.note(found)?);
    }
    for (structure, member) in named(LAYOUT_OPTIONAL) {
        if let Some(found) = offset(structure, member) {
            layout.insert(format!("{structure}.{member}"), found);
        }
    }
    for structure in SIZES {
        let size = image.btf.size_of(structure);
        let size = size.ok_or_else(|| {
            Fault::unsupported(".BTF", format!("does not describe `struct {structure}`"))
        });
        layout.insert(format!("sizeof.{structure}"), lacks.note(size)?);
    }
    for structure in SIZES_OPTIONAL {
        if let Some(size) = image.btf.size_of(structure) {
            layout.insert(format!("sizeof.{structure}"), size);
        }
    }
    // `struct orc_entry` by which the kernel unwinds its stacks: its type took in, with Linux 6.4, what `end` had said.
    if image.btf.size_of("orc_entry").is_some() {
        let end = image.btf.member("orc_entry", "end");
        let bits = if end.is_some() { 2 } else { 3 };
        layout.insert("const.ORC_TYPE_BITS".to_owned(), bits);
    }
    let numbers = image.btf.enumeration(MEMORIES).unwrap_or_default();
    for name in Memory::ALL.into_iter().filter_map(Memory::kernel_name) {
        if let Some((_, number)) = numbers.iter().find(|(known, _)| *known == name) {
            layout.insert(format!("{MEMORIES}.{name}"), *number);
        }
    }
    Ok(layout)
}

/// Link addresses of data symbols; of a per-CPU variable its offset.
pub fn data(image: &Image, lacks: &mut Lacks) -> Result<BTreeMap<String, LinkVa>, Fault> {
    let mut data = BTreeMap::new();
    for name in DATA {
        let va = image.need_symbol(name).map(|va| va.0);
        data.insert((*name).to_owned(), LinkVa(lacks.note(va)?));
    }
    for name in DATA_OPTIONAL {
        if let Some(va) = image.symbol(name) {
            data.insert((*name).to_owned(), va);
        }
    }
    let current = image.per_cpu(CURRENT, CURRENT).map(|va| va.0);
    data.insert(CURRENT.to_owned(), LinkVa(lacks.note(current)?));
    Ok(data)
}
