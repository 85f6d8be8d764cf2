//! A module's relocations (`apply_relocations` and `simplify_symbols`, kernel/module/main.c), applied at nominal addresses and
//! kept by what they point to.

use super::{Loader, MAX_MODULE, nominal};
use crate::image::{Fault, START_KERNEL_MAP};
use goblin::elf::section_header::{SHN_ABS, SHN_COMMON, SHN_LORESERVE, SHN_UNDEF, SHT_RELA};
use goblin::elf::{reloc, sym};
use penumbra_bundle::{LinkVa, Memory, ModuleReloc, ModuleRelocKind, Place, Target};

/// Other modules' exports, apart from one another.
const EXPORTS: u64 = 0xffff_ffff_e000_0000;
const EXPORT_STEP: u64 = 64;

/// The relocations of all allocated sections, applied at nominal addresses.
#[derive(Default)]
pub(super) struct Applied {
    pub(super) text: Vec<ModuleReloc>,
    pub(super) narrow: Vec<LinkVa>,
    pub(super) wide: Vec<LinkVa>,
}

impl Loader<'_> {
    /// `apply_relocations`, for every section that is allocated.
    pub(super) fn relocate(&mut self, text_size: u32) -> Result<Applied, Fault> {
        let mut applied = Applied::default();
        for (index, list) in &self.elf.shdr_relocs {
            let header = &self.elf.section_headers[*index];
            let section = header.sh_info as usize;
            let Some(place) = self.places.get(section).copied().flatten() else {
                continue;
            };
            if header.sh_type != SHT_RELA {
                return Err(self.damaged(*index, "has relocations without addends"));
            }
            let len = self.elf.section_headers[section].sh_size;
            for one in list.iter() {
                let kind = match one.r_type {
                    reloc::R_X86_64_NONE => continue,
                    reloc::R_X86_64_64 => ModuleRelocKind::Abs64,
                    reloc::R_X86_64_32 => ModuleRelocKind::Abs32,
                    reloc::R_X86_64_32S => ModuleRelocKind::Abs32Signed,
                    reloc::R_X86_64_PC32 | reloc::R_X86_64_PLT32 => ModuleRelocKind::Relative32,
                    reloc::R_X86_64_PC64 => ModuleRelocKind::Relative64,
                    other => {
                        let what = format!("has a relocation of type {other}");
                        return Err(self.damaged(section, what));
                    }
                };
                let width = kind.width() as u64;
                if one.r_offset.checked_add(width).is_none_or(|end| end > len) {
                    let what = format!("the relocation at {:#x} leaves it", one.r_offset);
                    return Err(self.damaged(section, what));
                }
                let target = self.target(one.r_sym, section)?;
                let addend = one.r_addend.unwrap_or(0);
                if place.memory == Memory::PerCpu {
                    continue;
                }
                let place = Place::new(place.memory, place.at + one.r_offset as u32);
                let va = nominal(place);
                let at = place.at as usize;
                let field = &mut self.memories[place.memory][at..at + kind.width()];
                let value = kind.value(target_address(&target), addend, va.0);
                let Some(value) = value.filter(|_| field.iter().all(|byte| *byte == 0)) else {
                    let what = format!(
                        "the relocation at {:#x} does not fit or has a value already",
                        one.r_offset
                    );
                    return Err(self.damaged(section, what));
                };
                field.copy_from_slice(&value[..kind.width()]);
                match kind.width() {
                    4 => applied.narrow.push(va),
                    _ if kind == ModuleRelocKind::Abs64 => applied.wide.push(va),
                    _ => {}
                }
                if let Some(at) = place.in_text(text_size) {
                    let target = self.index(target);
                    applied.text.push(ModuleReloc {
                        at,
                        kind,
                        target,
                        addend,
                    });
                }
            }
        }
        applied.text.sort_by_key(|reloc| reloc.at);
        applied.narrow.sort_unstable();
        applied.wide.sort_unstable();
        Ok(applied)
    }

    fn index(&mut self, target: Target) -> u32 {
        if let Some(known) = self.known.get(&target) {
            return *known;
        }
        let index = self.targets.len() as u32;
        self.targets.push(target.clone());
        self.known.insert(target, index);
        index
    }

    /// `simplify_symbols`.
    fn target(&self, symbol: usize, section: usize) -> Result<Target, Fault> {
        let symbol = self
            .elf
            .syms
            .get(symbol)
            .ok_or_else(|| self.damaged(section, "a relocation names no symbol"))?;
        let name = self.elf.strtab.get_at(symbol.st_name).unwrap_or("");
        let index = symbol.st_shndx;
        let unsupported = |what: &str| {
            Fault::unsupported(
                format!("symbol {}", name.escape_default()),
                format!("{what}; such a module stays on stock text"),
            )
        };
        if index == SHN_UNDEF as usize {
            return Ok(match self.host.exports.get(name) {
                Some(va) if va.0 >= START_KERNEL_MAP => Target::Kernel(*va),
                Some(va) => Target::Fixed(va.0),
                None if symbol.st_bind() == sym::STB_WEAK => Target::Fixed(0),
                None => Target::Export(name.to_owned()),
            });
        }
        if index == SHN_ABS as usize {
            return Ok(Target::Fixed(symbol.st_value));
        }
        if index == SHN_COMMON as usize || index >= SHN_LORESERVE as usize {
            return Err(unsupported("is common or for live patching"));
        }
        let offset = u32::try_from(symbol.st_value).ok();
        let place = self.places.get(index).copied().flatten();
        match place.and_then(|place| moved(place, offset?)) {
            Some(place) => Ok(Target::Own(place)),
            None => Err(unsupported("lies in no section that the loader keeps")),
        }
    }
}

/// Where what a relocation points to is taken to be.
pub fn target_address(target: &Target) -> u64 {
    match target {
        Target::Own(place) => nominal(*place).0,
        Target::Kernel(va) => va.0,
        Target::Fixed(value) => *value,
        // Apart from all else, and from one another as far as it matters here.
        Target::Export(name) => {
            let sum = name.bytes().fold(0u64, |sum, byte| {
                sum.wrapping_mul(31).wrapping_add(u64::from(byte))
            });
            EXPORTS + sum % (1 << 16) * EXPORT_STEP
        }
    }
}

/// So many bytes further; nothing of a module is farther than it may be large.
pub(super) fn moved(place: Place, by: u32) -> Option<Place> {
    let at = place.at.checked_add(by)?;
    (u64::from(at) <= MAX_MODULE).then_some(Place { at, ..place })
}
