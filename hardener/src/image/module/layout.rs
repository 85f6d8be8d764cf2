//! Which section goes to which memory of a module, and where in it (kernel/module/main.c, `layout_sections`).

use super::{Loader, MAX_MODULE};
use crate::image::{Btf, Fault};
use goblin::elf::section_header::{SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE};
use penumbra_bundle::{Memory, ModuleSection, PerMemory, Place};

/// A flag of the loader itself (include/linux/module.h, `SHF_RO_AFTER_INIT`).
const SHF_RO_AFTER_INIT: u64 = 0x0020_0000;
const PAGE: u64 = 4096;

/// How a kernel arranges modules in memory; its BTF tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arrangement {
    /// What stays in one memory, and what only the init function needs in another (`struct module_layout`).
    Together,
    /// Each kind of section in a memory of its own (`struct module_memory`, from Linux 6.4 on).
    Apart,
}

/// A kind of section: the flags that it has, those that it has not, and where it goes, before and after init.
struct Kind {
    with: u64,
    without: u64,
    memory: [Memory; 2],
}

/// In the order in which the loader looks for them; what an earlier kind takes is no later one's.
const KINDS: [Kind; 5] = [
    kind(SHF_EXECINSTR as u64, 0, [Memory::Text, Memory::InitText]),
    kind(0, SHF_WRITE as u64, [Memory::Rodata, Memory::InitRodata]),
    // Nothing that is freed is of this kind: its sections have their names from the loader.
    kind(
        SHF_RO_AFTER_INIT,
        0,
        [Memory::RoAfterInit, Memory::InitData],
    ),
    kind(SHF_WRITE as u64, 0, [Memory::Data, Memory::InitData]),
    kind(0, 0, [Memory::Data, Memory::InitData]),
];

const fn kind(with: u64, without: u64, memory: [Memory; 2]) -> Kind {
    Kind {
        with: with | SHF_ALLOC as u64,
        without,
        memory,
    }
}

impl Arrangement {
    /// The arrangement of the kernel with these types.
    pub fn of(btf: &Btf) -> Result<Arrangement, Fault> {
        let unknown = |what: &str| {
            let what = format!(
                "{what}; where modules are in memory is not known, leave --module out, they then stay on stock text"
            );
            Err(Fault::unsupported(".BTF", what))
        };
        if btf.member("module", "core_layout").is_some() {
            return Ok(Arrangement::Together);
        }
        if btf.member("module", "mem").is_none() {
            return unknown("`struct module` has neither `core_layout` nor `mem`");
        }
        let Some(kinds) = btf.enumeration("mod_mem_type") else {
            return unknown("does not describe `enum mod_mem_type`");
        };
        // Last their number, and -1 for none.
        let known = |name: &str| {
            let mut memories = Memory::ALL.into_iter().filter_map(Memory::kernel_name);
            memories.any(|memory| memory == name)
        };
        let others = |name: &str| ["MOD_MEM_NUM_TYPES", "MOD_INVALID"].contains(&name);
        let all = kinds.iter().filter(|(name, _)| known(name)).count() == Memory::ALL.len() - 1;
        if !all || kinds.iter().any(|(name, _)| !known(name) && !others(name)) {
            return unknown("has other memories in `enum mod_mem_type` than are known");
        }
        Ok(Arrangement::Apart)
    }

    /// The memory that takes what would have `memory` of its own.
    fn memory(self, memory: Memory) -> Memory {
        match self {
            Arrangement::Apart => memory,
            Arrangement::Together if memory.is_init() => Memory::InitText,
            Arrangement::Together => Memory::Text,
        }
    }
}

impl Loader<'_> {
    /// Places each section; the size of the code in whole pages, and what is used of each memory.
    pub(super) fn lay_out(&mut self) -> Result<(u32, PerMemory<u32>), Fault> {
        let headers = &self.elf.section_headers;
        let alloc = u64::from(SHF_ALLOC);
        let flags: Vec<u64> = headers
            .iter()
            .enumerate()
            .map(|(index, header)| match self.section_name(index) {
                // `rewrite_section_headers`, `setup_load_info`: not kept with the module.
                "__versions" | ".modinfo" | ".data..percpu" => header.sh_flags & !alloc,
                // `module_mark_ro_after_init`.
                ".data..ro_after_init" | "__jump_table" => header.sh_flags | SHF_RO_AFTER_INIT,
                _ => header.sh_flags,
            })
            .collect();
        self.places = vec![None; headers.len()];
        let mut sizes = PerMemory::<u64>::default();
        let mut text_size = 0;
        for (number, kind) in KINDS.iter().enumerate() {
            for (index, header) in headers.iter().enumerate() {
                let fits =
                    flags[index] & kind.with == kind.with && flags[index] & kind.without == 0;
                if !fits || self.places[index].is_some() {
                    continue;
                }
                let align = header.sh_addralign.max(1);
                if !align.is_power_of_two() || align > PAGE {
                    return Err(self.damaged(index, format!("is aligned to {align}")));
                }
                // `module_init_layout_section` with CONFIG_MODULE_UNLOAD.
                let is_init = self.section_name(index).starts_with(".init");
                let memory = self
                    .host
                    .arrangement
                    .memory(kind.memory[usize::from(is_init)]);
                let at = sizes[memory].next_multiple_of(align);
                sizes[memory] = at.saturating_add(header.sh_size);
                let total = sizes
                    .iter()
                    .fold(0u64, |sum, (_, size)| sum.saturating_add(*size));
                if total > MAX_MODULE {
                    return Err(self.damaged(index, "makes the module too large"));
                }
                self.places[index] = Some(Place::new(memory, at as u32));
            }
            // `strict_align`, `module_memory_alloc`: what has other rights begins with a page of its own.
            let code = sizes[Memory::Text].next_multiple_of(PAGE);
            if number == 0 {
                text_size = code;
            }
            if self.host.arrangement == Arrangement::Together && number < 3 {
                sizes[Memory::Text] = code;
                sizes[Memory::InitText] = sizes[Memory::InitText].next_multiple_of(PAGE);
            }
        }
        for (index, header) in headers.iter().enumerate() {
            let name = self.section_name(index).to_owned();
            if name == ".data..percpu" {
                self.places[index] = Some(Place::new(Memory::PerCpu, 0));
                sizes[Memory::PerCpu] = header.sh_size.min(u64::from(u32::MAX));
            }
            if let Some(place) = self.places[index] {
                self.sections.push(ModuleSection {
                    name,
                    flags: flags[index],
                    size: header.sh_size as u32,
                    align: header.sh_addralign.max(1) as u32,
                    place,
                });
            }
        }
        self.memories = PerMemory::new(|memory| match memory {
            Memory::PerCpu => Vec::new(),
            // Code to the end of its page.
            Memory::Text => vec![0; sizes[memory].max(text_size) as usize],
            _ => vec![0; sizes[memory] as usize],
        });
        Ok((
            text_size as u32,
            PerMemory::new(|memory| sizes[memory] as u32),
        ))
    }
}
