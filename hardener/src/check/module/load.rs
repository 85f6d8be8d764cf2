//! A `.ko` file loaded as the kernel would load it, at one place: what the checker believes about modules, without the emitter.
//!
//! kernel/module/main.c: `layout_sections`, `move_module`, `simplify_symbols`, `apply_relocations`.

use super::exports::Exports;
use super::tables::OfModules;
use goblin::elf::section_header::{SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE, SHT_NOBITS, SHT_RELA};
use goblin::elf::{Elf, SectionHeader, header, reloc, sym};
use penumbra_bundle::{Memory, ModuleRelocKind, PerMemory, Place, Placement, TextOff};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};

/// `SHF_RO_AFTER_INIT` (include/linux/module.h).
const RO_AFTER_INIT: u64 = 0x0020_0000;
const PAGE: u64 = 4096;
/// Larger than any module.
const MAX: u64 = 64 << 20;
/// Where classes of sections go that have a memory each: code, read-only data, data that becomes read-only, other data; last
/// those of initialisation.
const APART: [[Memory; 4]; 2] = [
    [
        Memory::Text,
        Memory::Rodata,
        Memory::RoAfterInit,
        Memory::Data,
    ],
    [
        Memory::InitText,
        Memory::InitRodata,
        Memory::InitData,
        Memory::InitData,
    ],
];
/// Section numbers from here on mean something else (System V gABI, special section indexes).
const RESERVED: usize = 0xff00;
const ABSOLUTE: usize = 0xfff1;
/// Below it kernel symbols are per-CPU offsets, which do not move.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Tables whose 64-bit pointers describe code and are never jumped to.
const DESCRIPTIVE: [&str; 3] = ["__mcount_loc", ".parainstructions", "_kprobe_blacklist"];

/// A section that the loader allocates.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    pub name: String,
    pub flags: u64,
    pub size: u64,
    pub align: u64,
    pub place: Place,
}

/// A module as it stands in memory.
pub struct Loaded {
    /// SHA-256 of the file, in hexadecimal.
    pub digest: String,
    /// `struct module`'s name.
    pub name: String,
    /// The GNU build-id, in hexadecimal.
    pub build_id: String,
    /// `.modinfo`.
    pub info: BTreeMap<String, String>,
    /// What is allocated.
    pub parts: Vec<Part>,
    /// What its memories hold, relocated.
    pub memories: PerMemory<Vec<u8>>,
    /// How much sections take of each memory.
    pub sizes: PerMemory<u32>,
    /// How much code there is: whole pages.
    pub text_size: u32,
    /// Names of code that stays, by offset.
    pub code: BTreeSet<(u32, String)>,
    /// What is exported, by name.
    pub exports: BTreeMap<String, Place>,
    /// Offsets in the text that 64-bit pointers hold which may be jumped to.
    pub pointers: BTreeSet<u32>,
}

impl Loaded {
    /// The code that stays, to the end of its last page.
    pub fn text(&self) -> &[u8] {
        &self.memories[Memory::Text][..self.text_size as usize]
    }
}

/// Loads `file` at `placement`; what is wrong with it.
pub fn load(
    file: &[u8],
    exports: &Exports,
    of_modules: &OfModules,
    placement: &Placement,
    resolve: &dyn Fn(&str) -> Option<u64>,
) -> Result<Loaded, String> {
    let elf = Elf::parse(file).map_err(|error| error.to_string())?;
    if elf.header.e_type != header::ET_REL || elf.header.e_machine != header::EM_X86_64 {
        return Err("is no x86-64 module".to_owned());
    }
    let file = Ko { file, elf };
    let (places, parts, sizes, text_size) = file.lay_out(of_modules.apart)?;
    let mut memories = PerMemory::new(|memory| {
        let code = if memory == Memory::Text { text_size } else { 0 };
        vec![0; sizes[memory].max(code) as usize]
    });
    // Copied for each processor, and no part of the module's own memory.
    memories[Memory::PerCpu].clear();
    let of_its_own = |place: &Place| place.memory != Memory::PerCpu;
    for (index, place) in places.iter().enumerate() {
        if let Some(place) = place.filter(of_its_own) {
            let bytes = file.bytes(index)?;
            memories[place.memory][place.at as usize..][..bytes.len()].copy_from_slice(bytes);
        }
    }
    let mut pointers = BTreeSet::new();
    for (index, list) in &file.elf.shdr_relocs {
        let of = file.elf.section_headers[*index].sh_info as usize;
        let Some(place) = places.get(of).copied().flatten() else {
            continue;
        };
        if file.elf.section_headers[*index].sh_type != SHT_RELA {
            return Err(format!("{} has REL relocations", file.name(of)));
        }
        let described = DESCRIPTIVE.contains(&file.name(of));
        for entry in list.iter() {
            let Some(kind) = kind(entry.r_type)? else {
                continue;
            };
            if !of_its_own(&place) {
                continue;
            }
            let symbol = file.symbol(entry.r_sym, &places, exports, placement, resolve)?;
            let at = u64::from(place.at).saturating_add(entry.r_offset) as usize;
            let here = placement.address(place).wrapping_add(entry.r_offset);
            let value = symbol.wrapping_add_signed(entry.r_addend.unwrap_or(0));
            let wide = kind == ModuleRelocKind::Abs64 || kind == ModuleRelocKind::Relative64;
            let stored = match kind {
                ModuleRelocKind::Relative32 | ModuleRelocKind::Relative64 => {
                    value.wrapping_sub(here)
                }
                _ => value,
            };
            let fits = match kind {
                ModuleRelocKind::Abs32 => stored >> 32 == 0,
                ModuleRelocKind::Abs32Signed | ModuleRelocKind::Relative32 => {
                    stored as i32 as i64 as u64 == stored
                }
                _ => true,
            };
            let width = if wide { 8 } else { 4 };
            let end = at.checked_add(width);
            let field = end.and_then(|end| memories[place.memory].get_mut(at..end));
            match field.filter(|field| fits && field.iter().all(|byte| *byte == 0)) {
                Some(field) => field.copy_from_slice(&stored.to_le_bytes()[..width]),
                None => return Err(format!("{} has a bad relocation at {at:#x}", file.name(of))),
            }
            let inside = value.wrapping_sub(placement.text(TextOff(0)));
            if kind == ModuleRelocKind::Abs64 && !described && inside < u64::from(text_size) {
                pointers.insert(inside as u32);
            }
        }
    }
    let (code, exports) = file.names(&places, text_size);
    Ok(Loaded {
        digest: Sha256::digest(file.file)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
        name: file.own_name(of_modules.name)?,
        build_id: file.build_id()?,
        info: file.info()?,
        parts,
        memories,
        sizes,
        text_size,
        code,
        exports,
        pointers,
    })
}

fn kind(number: u32) -> Result<Option<ModuleRelocKind>, String> {
    Ok(Some(match number {
        reloc::R_X86_64_NONE => return Ok(None),
        reloc::R_X86_64_64 => ModuleRelocKind::Abs64,
        reloc::R_X86_64_32 => ModuleRelocKind::Abs32,
        reloc::R_X86_64_32S => ModuleRelocKind::Abs32Signed,
        reloc::R_X86_64_PC32 | reloc::R_X86_64_PLT32 => ModuleRelocKind::Relative32,
        reloc::R_X86_64_PC64 => ModuleRelocKind::Relative64,
        other => return Err(format!("has a relocation of type {other}")),
    }))
}

struct Ko<'a> {
    file: &'a [u8],
    elf: Elf<'a>,
}

type Layout = (Vec<Option<Place>>, Vec<Part>, PerMemory<u32>, u32);

impl Ko<'_> {
    fn name(&self, index: usize) -> &str {
        let header = &self.elf.section_headers[index];
        self.elf.shdr_strtab.get_at(header.sh_name).unwrap_or("")
    }

    fn bytes(&self, index: usize) -> Result<&[u8], String> {
        let header = &self.elf.section_headers[index];
        if header.sh_type == SHT_NOBITS {
            return Ok(&[]);
        }
        let start = header.sh_offset as usize;
        let end = start.checked_add(header.sh_size as usize);
        end.and_then(|end| self.file.get(start..end))
            .ok_or_else(|| format!("{} leaves the file", self.name(index)))
    }

    fn find(&self, name: &str) -> Result<&[u8], String> {
        let count = self.elf.section_headers.len();
        match (0..count).find(|index| self.name(*index) == name) {
            Some(index) => self.bytes(index),
            None => Err(format!("has no {name}")),
        }
    }

    /// Each section's class decides its order: code, read-only data, data that becomes read-only, other data. Each class is
    /// in a memory of its own if classes are `apart`; else those that stay share one, those of initialisation another, and
    /// all but the last end with their page. Places by section, what is allocated, and the sizes of memories and of the text.
    fn lay_out(&self, apart: bool) -> Result<Layout, String> {
        let flag = |flags: u64, bit: u32| flags & u64::from(bit) != 0;
        let mut classes: BTreeMap<(bool, u8), Vec<usize>> = BTreeMap::new();
        let count = self.elf.section_headers.len();
        let mut flags = vec![0; count];
        for (index, header) in self.elf.section_headers.iter().enumerate() {
            let name = self.name(index);
            flags[index] = header.sh_flags;
            if matches!(name, "__jump_table" | ".data..ro_after_init") {
                flags[index] |= RO_AFTER_INIT;
            }
            if matches!(name, "__versions" | ".modinfo" | ".data..percpu") {
                flags[index] &= !u64::from(SHF_ALLOC);
            }
            if !flag(flags[index], SHF_ALLOC) {
                continue;
            }
            let class = if flag(flags[index], SHF_EXECINSTR) {
                0
            } else if !flag(flags[index], SHF_WRITE) {
                1
            } else if flags[index] & RO_AFTER_INIT != 0 {
                2
            } else {
                3
            };
            let init = name.starts_with(".init");
            classes.entry((init, class)).or_default().push(index);
        }
        let mut places = vec![None; count];
        let mut sizes = PerMemory::<u64>::default();
        let mut text_size = 0;
        for init in [false, true] {
            for class in 0..4 {
                let memory = match (apart, init) {
                    (true, _) => APART[usize::from(init)][usize::from(class)],
                    (false, false) => Memory::Text,
                    (false, true) => Memory::InitText,
                };
                for index in classes.remove(&(init, class)).unwrap_or_default() {
                    let header = &self.elf.section_headers[index];
                    let at = align(sizes[memory], header)?;
                    sizes[memory] = at + header.sh_size.min(MAX);
                    if sizes.iter().map(|(_, size)| size).sum::<u64>() >= MAX {
                        return Err("is too large".to_owned());
                    }
                    places[index] = Some(Place::new(memory, at as u32));
                }
                let whole = sizes[memory].next_multiple_of(PAGE);
                if class < 3 && !apart {
                    sizes[memory] = whole;
                }
                if class == 0 && !init {
                    text_size = whole as u32;
                }
            }
        }
        let mut parts = Vec::new();
        for (index, header) in self.elf.section_headers.iter().enumerate() {
            let name = self.name(index).to_owned();
            if name == ".data..percpu" {
                places[index] = Some(Place::new(Memory::PerCpu, 0));
                sizes[Memory::PerCpu] = header.sh_size.min(MAX);
            }
            if let Some(place) = places[index] {
                parts.push(Part {
                    name,
                    flags: flags[index],
                    size: header.sh_size,
                    align: header.sh_addralign.max(1),
                    place,
                });
            }
        }
        let sizes = PerMemory::new(|memory| sizes[memory] as u32);
        Ok((places, parts, sizes, text_size))
    }

    fn symbol(
        &self,
        index: usize,
        places: &[Option<Place>],
        exports: &Exports,
        placement: &Placement,
        resolve: &dyn Fn(&str) -> Option<u64>,
    ) -> Result<u64, String> {
        let symbol = self
            .elf
            .syms
            .get(index)
            .ok_or("a relocation has no symbol")?;
        let name = self.elf.strtab.get_at(symbol.st_name).unwrap_or("");
        match symbol.st_shndx {
            0 => match exports.get(name) {
                Some(at) if at.0 >= KERNEL_MAP => Ok(at.0.wrapping_add(placement.slide)),
                Some(at) => Ok(at.0),
                None if symbol.st_bind() == sym::STB_WEAK => Ok(0),
                None => resolve(name).ok_or_else(|| format!("needs `{name}`")),
            },
            ABSOLUTE => Ok(symbol.st_value),
            section if section >= RESERVED => Err(format!("`{name}` is in no section")),
            section => {
                let place = places.get(section).copied().flatten();
                let place = place.ok_or_else(|| format!("`{name}` is in a dropped section"))?;
                Ok(placement.address(place).wrapping_add(symbol.st_value))
            }
        }
    }

    fn names(
        &self,
        places: &[Option<Place>],
        text_size: u32,
    ) -> (BTreeSet<(u32, String)>, BTreeMap<String, Place>) {
        let mut code = BTreeSet::new();
        let mut global = BTreeMap::new();
        let mut exported = BTreeSet::new();
        for symbol in self.elf.syms.iter() {
            let name = self.elf.strtab.get_at(symbol.st_name).unwrap_or("");
            let place = places.get(symbol.st_shndx).copied().flatten();
            if name.is_empty() || symbol.st_type() == sym::STT_SECTION {
                continue;
            }
            if let Some(name) = name.strip_prefix("__ksymtab_") {
                exported.insert(name.to_owned());
            }
            let Ok(value) = u32::try_from(symbol.st_value) else {
                continue;
            };
            let place = place.map(|place| Place::new(place.memory, place.at.saturating_add(value)));
            if let Some(place) = place.filter(|_| symbol.st_type() <= sym::STT_FUNC)
                && let Some(at) = place.in_text(text_size)
            {
                code.insert((at.0, name.to_owned()));
            }
            if let Some(place) = place.filter(|_| symbol.st_bind() != sym::STB_LOCAL) {
                global.insert(name.to_owned(), place);
            }
        }
        global.retain(|name, _| exported.contains(name));
        (code, global)
    }

    fn own_name(&self, at: u32) -> Result<String, String> {
        let this = self.find(".gnu.linkonce.this_module")?;
        let name = this.get(at as usize..).unwrap_or_default();
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(0);
        Ok(String::from_utf8_lossy(&name[..end]).into_owned())
    }

    fn build_id(&self) -> Result<String, String> {
        let note = self.find(".note.gnu.build-id")?;
        crate::check::image::build_id(note).ok_or_else(|| "has no GNU build-id".to_owned())
    }

    fn info(&self) -> Result<BTreeMap<String, String>, String> {
        let text = String::from_utf8_lossy(self.find(".modinfo")?).into_owned();
        let mut info = BTreeMap::new();
        for (key, value) in text.split('\0').filter_map(|entry| entry.split_once('=')) {
            info.entry(key.to_owned()).or_insert(value.to_owned());
        }
        Ok(info)
    }
}

fn align(size: u64, header: &SectionHeader) -> Result<u64, String> {
    let align = header.sh_addralign.max(1);
    match align.is_power_of_two() && align <= PAGE {
        true => Ok(size.next_multiple_of(align)),
        false => Err(format!("a section is aligned to {align}")),
    }
}
