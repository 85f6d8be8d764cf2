//! Recognises a loaded module and explains its text byte by byte, as [`crate::guest::explain`] does the kernel's.

use super::list::{Loaded, ModuleState};
use crate::guest::differences::{self, Differences, Unexplained};
use crate::guest::memory::{GuestMemory, ReadError};
use crate::guest::{Slide, forms};
use crate::xen::{GuestVa, PAGE};
use penumbra_bundle::{
    Bundle, Form, Memory, Module, PerMemory, Place, Placement, RelocateError, Site, Target, TextOff,
};

/// The area for modules with any KASLR (arch/x86/include/asm/pgtable_64_types.h, `MODULES_VADDR` at its lowest, `MODULES_END`).
const AREA: std::ops::Range<u64> = 0xffff_ffff_a000_0000..0xffff_ffff_ff00_0000;

/// A module whose text is the bundle's, every byte of it explained.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Known {
    /// Index into the bundle's modules.
    pub index: usize,
    /// Where it is.
    pub placement: Placement,
    /// Its text as it runs.
    pub text: Vec<u8>,
}

/// What a loaded module is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The bundle's, explained.
    Known(Box<Known>),
    /// Not yet or no longer live; to be looked at again.
    Early,
    /// It stays on its own text, and why.
    Unknown(String),
}

/// Examines one module. `others` are all modules of the guest, for what they export to each other.
pub fn examine(
    memory: &GuestMemory<'_>,
    bundle: &Bundle,
    slide: Slide,
    loaded: &Loaded,
    others: &[Loaded],
) -> Result<Verdict, ReadError> {
    if loaded.state != ModuleState::Live {
        return Ok(Verdict::Early);
    }
    let (index, module) = match find(bundle, loaded) {
        Ok(found) => found,
        Err(why) => return Ok(Verdict::Unknown(why)),
    };
    let base = loaded.text();
    if module.text_size != loaded.text_size || !base.0.is_multiple_of(PAGE as u64) {
        return Ok(Verdict::Unknown(format!(
            "it has {:#x} bytes of text at {base}, the bundle's has {:#x}",
            loaded.text_size, module.text_size
        )));
    }
    let kernel = bundle.manifest.text.range();
    let apart = end(loaded) < slide.guest(kernel.start) || slide.guest(kernel.end) <= base;
    if !apart {
        return Ok(Verdict::Unknown(format!(
            "its text at {base} would be the kernel's own"
        )));
    }
    // As long as the bundle's, which its reader has bounded.
    let running = memory.bytes(base, module.text.len())?;
    let mut placement = placement(loaded, slide);
    for freed in Memory::ALL.into_iter().filter(|memory| memory.is_init()) {
        if placement.bases[freed] == 0 {
            placement.bases[freed] = freed_base(module, freed, base, &running);
        }
    }
    let resolve = |name: &str| export(bundle, slide, others, name);
    let expected = match module.relocated(&placement, &resolve) {
        Ok(expected) => expected,
        Err(error) => return Ok(Verdict::Unknown(error.to_string())),
    };
    let left = match unexplained(bundle, module, &placement, &resolve, &expected, &running) {
        Ok(left) => left,
        Err(error) => return Ok(Verdict::Unknown(error.to_string())),
    };
    Ok(match left.first() {
        None => Verdict::Known(Box::new(Known {
            index,
            placement,
            text: running,
        })),
        Some(first) => Verdict::Unknown(format!(
            "{} range{} of its text cannot be explained, first {first}",
            left.len(),
            if left.len() == 1 { "" } else { "s" }
        )),
    })
}

/// The bundle's module of that name and build.
fn find<'b>(bundle: &'b Bundle, loaded: &Loaded) -> Result<(usize, &'b Module), String> {
    let by_name = |module: &Module| module.name.as_str().cmp(&loaded.name);
    let Ok(index) = bundle.modules.binary_search_by(by_name) else {
        return Err(
            "the bundle does not have it; `hardener emit --module FILE.ko` puts it there"
                .to_owned(),
        );
    };
    let module = &bundle.modules[index];
    match &loaded.build_id {
        Some(found) if *found == module.build_id => Ok((index, module)),
        Some(found) => Err(format!(
            "it is another build: {found}, the bundle's is {}",
            module.build_id
        )),
        None => Err("the guest's kernel keeps no build-id of it".to_owned()),
    }
}

fn placement(loaded: &Loaded, slide: Slide) -> Placement {
    Placement {
        bases: PerMemory::new(|memory| loaded.memories[memory].0),
        slide: slide.0,
    }
}

/// The last byte of its text.
fn end(loaded: &Loaded) -> GuestVa {
    loaded
        .text()
        .offset(u64::from(loaded.text_size).saturating_sub(1))
}

/// Where a memory of a module's initialisation was, once it is freed; 0 when nothing in its text says.
///
/// Code that refers to it stands in `.altinstr_aux` and is not executed after its alternative is patched. The first such
/// field says where the memory was; that the others agree is for the comparison to find.
fn freed_base(module: &Module, freed: Memory, base: GuestVa, running: &[u8]) -> u64 {
    let mut sections = module.sections.iter();
    let dead = sections.find(|one| one.place.memory == Memory::Text && one.name == ".altinstr_aux");
    let dead = dead.map(|one| one.place.at..one.place.at.saturating_add(one.size));
    let first = module.relocs.iter().find_map(|reloc| {
        let Target::Own(Place { memory, at }) = module.targets[reloc.target as usize] else {
            return None;
        };
        (memory == freed).then_some(())?;
        dead.as_ref()?.contains(&reloc.at.0).then_some(())?;
        let field = running.get(reloc.at.0 as usize..)?.first_chunk()?;
        let there = base.0.wrapping_add(u64::from(reloc.at.0));
        let target = there.wrapping_add_signed(i64::from(i32::from_le_bytes(*field)));
        let start = target.wrapping_sub(reloc.addend.cast_unsigned());
        Some(start.wrapping_sub(u64::from(at)))
    });
    let inside = |base: &u64| base.is_multiple_of(PAGE as u64) && AREA.contains(base);
    first.filter(inside).unwrap_or(0)
}

/// Where another loaded module of the bundle has what it exports as `name`.
fn export(bundle: &Bundle, slide: Slide, others: &[Loaded], name: &str) -> Option<u64> {
    let exporter = |loaded: &Loaded| {
        let (_, module) = find(bundle, loaded).ok()?;
        let export = module.exports.iter().find(|export| export.name == name)?;
        Some(placement(loaded, slide).address(export.place))
    };
    others.iter().find_map(exporter)
}

/// The ranges that no site of the module accounts for.
fn unexplained(
    bundle: &Bundle,
    module: &Module,
    placement: &Placement,
    resolve: &dyn Fn(&str) -> Option<u64>,
    expected: &[u8],
    running: &[u8],
) -> Result<Vec<Unexplained>, RelocateError> {
    let sites = placed_forms(module, placement, resolve)?;
    let slide = Slide(placement.slide);
    let text = &bundle.manifest.text;
    let kernel = text.start.0.wrapping_add(slide.0);
    let kernel_len = bundle.text.len();
    let mut open = Differences::new(expected, running);
    differences::explain_sites(
        &sites,
        |site, form, bytes, ignore| {
            // Calls and jumps go to the kernel's functions: seen from there, the module lies behind the kernel's text.
            let seen = placement.text(site.at);
            let Ok(at) = u32::try_from(seen.wrapping_sub(kernel)) else {
                return false;
            };
            let seen = Site {
                at: TextOff(at),
                len: site.len,
                kind: site.kind,
                forms: Vec::new(),
            };
            forms::matches(form, &bundle.model, &seen, bytes, slide, kernel_len, ignore)
        },
        expected,
        running,
        &mut open,
    );
    Ok(open.ranges(expected, running, |at| {
        (GuestVa(placement.text(at)), symbol(module, at))
    }))
}

/// The module's sites, with the relocated fields of their forms filled in for this guest.
fn placed_forms(
    module: &Module,
    placement: &Placement,
    resolve: &dyn Fn(&str) -> Option<u64>,
) -> Result<Vec<Site>, RelocateError> {
    let mut sites = module.sites.clone();
    for one in &module.form_relocs {
        let value = module.field(&one.reloc, placement, resolve)?;
        let width = one.reloc.kind.width();
        // The bundle's reader checked that site and form are there and hold the field.
        let site = &mut sites[one.site as usize];
        let inside = (one.reloc.at.0 - site.at.0) as usize;
        if let Form::Exact { bytes, .. } = &mut site.forms[one.form as usize] {
            bytes[inside..inside + width].copy_from_slice(&value[..width]);
        }
    }
    Ok(sites)
}

/// `name+0x12 [module]` for an offset into a module's text.
fn symbol(module: &Module, at: TextOff) -> String {
    let after = module.symbols.partition_point(|symbol| symbol.at <= at);
    match module.symbols[..after].last() {
        Some(symbol) => format!(
            "{}+{:#x} [{}]",
            symbol.name,
            at.0 - symbol.at.0,
            module.name
        ),
        None => format!("{:#x} [{}]", at.0, module.name),
    }
}

#[cfg(test)]
mod tests {
    use super::freed_base;
    use crate::xen::GuestVa;
    use penumbra_bundle::{
        Memory, Module, ModuleReloc, ModuleRelocKind, ModuleSection, PerMemory, Place, Target,
        TextOff,
    };
    use std::collections::BTreeMap;

    /// A module whose `.altinstr_aux` at 0x60 jumps to offset 0x30 of its initialisation memory.
    fn module() -> Module {
        Module {
            name: "m".to_owned(),
            build_id: String::new(),
            srcversion: None,
            vermagic: String::new(),
            file_sha256: String::new(),
            sections: vec![ModuleSection {
                name: ".altinstr_aux".to_owned(),
                flags: 6,
                size: 6,
                align: 1,
                place: Place::new(Memory::Text, 0x60),
            }],
            text_size: 0x1000,
            sizes: PerMemory::new(|_| 0x1000),
            text: vec![0; 0x1000],
            targets: vec![Target::Own(Place::new(Memory::InitText, 0x10))],
            relocs: vec![ModuleReloc {
                at: TextOff(0x62),
                kind: ModuleRelocKind::Relative32,
                target: 0,
                addend: 0x20 - 4,
            }],
            sites: Vec::new(),
            form_relocs: Vec::new(),
            symbols: Vec::new(),
            exports: Vec::new(),
            edits: Vec::new(),
            left: BTreeMap::new(),
        }
    }

    #[test]
    fn freed_initialisation_memory_is_where_dead_code_says_that_it_was() {
        let (core, init) = (0xffff_ffff_c040_0000_u64, 0xffff_ffff_c051_2000_u64);
        let says = |target: u64| {
            let mut running = module().text;
            let distance = target.wrapping_sub(core + 0x66) as u32;
            running[0x62..0x66].copy_from_slice(&distance.to_le_bytes());
            running
        };
        let base = |module: &Module, target| {
            freed_base(module, Memory::InitText, GuestVa(core), &says(target))
        };
        assert_eq!(base(&module(), init + 0x30), init);
        // Not a whole page, and not in the area for modules.
        assert_eq!(base(&module(), init + 0x31), 0);
        assert_eq!(base(&module(), 0xffff_ffff_8100_0030), 0);
        // Code that may run is not believed.
        let mut live = module();
        live.sections[0].name = ".text".to_owned();
        assert_eq!(base(&live, init + 0x30), 0);
        // It says nothing of another memory.
        let text = says(init + 0x30);
        let other = freed_base(&module(), Memory::InitData, GuestVa(core), &text);
        assert_eq!(other, 0);
    }
}
