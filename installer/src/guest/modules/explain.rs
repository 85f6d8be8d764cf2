//! Recognises a loaded module and explains its text byte by byte, as [`crate::guest::explain`] does the kernel's.

use super::list::{Loaded, ModuleState};
use crate::guest::differences::{self, Differences, Unexplained};
use crate::guest::memory::{GuestMemory, ReadError};
use crate::guest::{Slide, forms};
use crate::xen::{GuestVa, PAGE};
use penumbra_bundle::{Bundle, Form, Module, Placement, RelocateError, Site, TextOff};

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
    if module.text_size != loaded.text_size || !loaded.base.0.is_multiple_of(PAGE as u64) {
        return Ok(Verdict::Unknown(format!(
            "it has {:#x} bytes of text at {}, the bundle's has {:#x}",
            loaded.text_size, loaded.base, module.text_size
        )));
    }
    let placement = placement(loaded, slide);
    let resolve = |name: &str| export(bundle, slide, others, name);
    let expected = match module.relocated(&placement, &resolve) {
        Ok(expected) => expected,
        Err(error) => return Ok(Verdict::Unknown(error.to_string())),
    };
    let running = memory.bytes(loaded.base, expected.len())?;
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
        core: loaded.base.0,
        init: loaded.init.0,
        percpu: loaded.percpu.0,
        slide: slide.0,
    }
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
            let seen = placement.core.wrapping_add(u64::from(site.at.0));
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
        let address = GuestVa(placement.core.wrapping_add(u64::from(at.0)));
        (address, symbol(module, at))
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
