//! The guest's modules: walked from its list, recognised by name and build-id, their text explained byte by byte.
//!
//! Nothing is written here. A module's memory lies in the module area, where the kernel put it; a module whose text cannot
//! be explained, or that the bundle does not hold, stays on stock text and is reported.
//!
//! A module is looked at in three steps: [`Reader::list`] walks `modules`; [`recognise`] finds each one's build in the
//! bundle; [`explain`] proves the running text. [`edited`] then makes a variant's text from it.

use crate::guest::explain::{Differences, range_of};
use crate::guest::forms;
use crate::guest::kernel::{Kernel, Slide};
use crate::guest::layout::{self, MissingName};
use crate::guest::memory::{GuestMemory, ReadError};
use crate::xen::GuestVa;
use penumbra_bundle::{
    Bundle, Form, Manifest, Module, Place, Placement, Site, SiteKind, Target, TextOff,
};
use std::collections::{BTreeMap, HashSet};
use thiserror::Error;

/// More modules than this are not read; those not read stay on stock text.
const MAX_MODULES: usize = 4096;
/// Walks over the list before a broken one is taken for what it is.
const WALKS: u32 = 3;
/// `MODULE_NAME_LEN` (include/linux/moduleparam.h).
const NAME: usize = 64 - 8;
/// The module area (arch/x86/include/asm/pgtable_64_types.h, `MODULES_VADDR` at its lowest, `MODULES_END`).
const AREA: std::ops::Range<u64> = 0xffff_ffff_a000_0000..0xffff_ffff_ff00_0000;
/// A note: sizes, type and owner stand before the build-id (System V gABI, note section).
const NOTE_HEADER: usize = 16;
/// `NT_GNU_BUILD_ID` (elf.h).
const NT_GNU_BUILD_ID: u32 = 3;
const BUILD_ID_SECTION: &str = ".note.gnu.build-id";
/// Rounds after which no form explains more.
const ROUNDS: usize = 3;

/// `enum module_state` (include/linux/module.h).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Its init function has returned.
    Live,
    /// Its text is in place; its init function runs or is about to.
    Coming,
    /// It is being removed.
    Going,
    /// Its memory is not yet its own.
    Unformed,
}

/// A module as the guest shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Loaded {
    /// `struct module`.
    pub at: GuestVa,
    /// Its name.
    pub name: String,
    /// How far it is.
    pub state: State,
    /// Where its core memory starts.
    pub core: GuestVa,
    /// Bytes of core memory.
    pub core_size: u32,
    /// Bytes of it that hold code.
    pub text_size: u32,
    /// Where its initialisation memory starts; 0 when that is gone.
    pub init: GuestVa,
    /// Its per-CPU memory.
    pub percpu: u64,
}

/// What one walk over the list found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ModuleList {
    /// The modules, the last loaded first.
    pub modules: Vec<Loaded>,
    /// Entries that could not be read, and why the walk ended early if it did.
    pub trouble: Vec<String>,
}

/// Reads the modules of one guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reader {
    head: GuestVa,
    list: u64,
    name: u64,
    state: u64,
    core_base: u64,
    core_size: u64,
    text_size: u64,
    init_base: u64,
    percpu: Option<u64>,
}

impl Reader {
    /// Takes offsets and the list's head from the manifest. A kernel that keeps modules in another way (`module.mem`, from
    /// Linux 6.4 on) has not all of them.
    pub fn new(manifest: &Manifest, kernel: &Kernel) -> Result<Reader, MissingName> {
        let get = |key: &str| {
            let found = manifest.layout.get(key).copied().map(u64::from);
            found.ok_or_else(|| MissingName(key.to_owned()))
        };
        let core = get("module.core_layout")?;
        let base = get("module_layout.base")?;
        Ok(Reader {
            head: layout::data(manifest, kernel.slide, "modules")?,
            list: get("module.list")?,
            name: get("module.name")?,
            state: get("module.state")?,
            core_base: core + base,
            core_size: core + get("module_layout.size")?,
            text_size: core + get("module_layout.text_size")?,
            init_base: get("module.init_layout")? + base,
            percpu: get("module.percpu").ok(),
        })
    }

    /// Reads all modules. The list is walked while the guest changes it.
    pub fn list(&self, memory: &GuestMemory<'_>) -> ModuleList {
        let mut tries = 1;
        let (entries, trouble) = loop {
            let (entries, trouble) = self.entries(memory);
            if trouble.is_none() || tries == WALKS {
                break (entries, trouble);
            }
            tries += 1;
        };
        let mut list = ModuleList {
            modules: Vec::new(),
            trouble: trouble.into_iter().collect(),
        };
        for at in entries {
            match self.read(memory, at) {
                Ok(module) => list.modules.push(module),
                Err(error) => {
                    let what = format!("the module at {at} cannot be read: {error}");
                    list.trouble.push(what);
                }
            }
        }
        list
    }

    /// Every `struct module`, and what went wrong. The walk ends at its head, at a second visit of any entry, at an
    /// unreadable entry or at the limit.
    fn entries(&self, memory: &GuestMemory<'_>) -> (Vec<GuestVa>, Option<String>) {
        let (mut found, mut seen) = (Vec::new(), HashSet::from([self.head]));
        let mut link = self.head;
        while found.len() < MAX_MODULES {
            // `list_head.next` is the first member.
            let next = match memory.pointer(link) {
                Ok(next) => next,
                Err(error) => {
                    return (found, Some(format!("the module list breaks off: {error}")));
                }
            };
            if next == self.head {
                return (found, None);
            }
            if !seen.insert(next) {
                let what = format!("the module list runs in a circle at {next}");
                return (found, Some(what));
            }
            found.push(GuestVa(next.0.wrapping_sub(self.list)));
            link = next;
        }
        let what = format!("more than {MAX_MODULES} modules; the rest are not read");
        (found, Some(what))
    }

    fn read(&self, memory: &GuestMemory<'_>, at: GuestVa) -> Result<Loaded, ReadError> {
        let name = memory.bytes(at.offset(self.name), NAME)?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(Loaded {
            at,
            name: String::from_utf8_lossy(name).into_owned(),
            state: match memory.u32(at.offset(self.state))? {
                0 => State::Live,
                1 => State::Coming,
                2 => State::Going,
                _ => State::Unformed,
            },
            core: memory.pointer(at.offset(self.core_base))?,
            core_size: memory.u32(at.offset(self.core_size))?,
            text_size: memory.u32(at.offset(self.text_size))?,
            init: memory.pointer(at.offset(self.init_base))?,
            percpu: match self.percpu {
                Some(percpu) => memory.u64(at.offset(percpu))?,
                None => 0,
            },
        })
    }
}

/// Why a module stays on stock text.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Unknown {
    /// It is coming or going.
    #[error("is being loaded or removed")]
    NotReady,
    /// The bundle does not hold it.
    #[error("is not in the bundle; emit the bundle again with its .ko file (--module)")]
    NotInBundle,
    /// The bundle holds another build of it.
    #[error(
        "has build-id {found}, the bundle's has {expected}; emit the bundle again with the .ko file that the guest loads"
    )]
    OtherBuild {
        /// The guest's, or what stands in its place.
        found: String,
        /// The bundle's.
        expected: String,
    },
    /// It is not laid out as this loader lays out that file.
    #[error("is not laid out as its file: {0}")]
    OtherLayout(String),
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] ReadError),
    /// What it refers to is not known.
    #[error("{0}")]
    Refers(#[from] penumbra_bundle::RelocateError),
    /// The guest runs without retpolines.
    #[error("has {0} retpolines rewritten, so return addresses differ from the bundle's")]
    RetpolinesOff(usize),
    /// Bytes that no table of the module accounts for.
    #[error("has text that nothing explains: {}", .0.join("; "))]
    Unexplained(Vec<String>),
}

/// Finds the build of a loaded module in the bundle, by its name, its layout and the build-id in its memory.
pub fn recognise<'b>(
    bundle: &'b Bundle,
    memory: &GuestMemory<'_>,
    loaded: &Loaded,
) -> Result<&'b Module, Unknown> {
    if matches!(loaded.state, State::Going | State::Unformed) {
        return Err(Unknown::NotReady);
    }
    let found = bundle
        .modules
        .binary_search_by(|module| module.name.as_str().cmp(&loaded.name));
    let module = &bundle.modules[found.map_err(|_| Unknown::NotInBundle)?];
    let fits = loaded.text_size == module.text_size && loaded.core_size >= module.core_size;
    if !fits {
        return Err(Unknown::OtherLayout(format!(
            "{} bytes of code in {}, the file makes {} in {}",
            loaded.text_size, loaded.core_size, module.text_size, module.core_size
        )));
    }
    let end = loaded.core.0.checked_add(u64::from(loaded.core_size));
    let inside = AREA.contains(&loaded.core.0) && end.is_some_and(|end| end <= AREA.end);
    if !inside || loaded.core.in_page() != 0 {
        let what = format!("its memory at {} is not in the module area", loaded.core);
        return Err(Unknown::OtherLayout(what));
    }
    let note = module
        .sections
        .iter()
        .find_map(|section| match section.place {
            Place::Core(at) if section.name == BUILD_ID_SECTION => Some((at, section.size)),
            _ => None,
        });
    // The bundle's own: a note of a few bytes.
    let (at, size) = note.filter(|(_, size)| *size <= 128).unwrap_or((0, 0));
    let note = memory.bytes(loaded.core.offset(u64::from(at)), size as usize)?;
    let digits =
        |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
    let kind = note.get(8..12).and_then(|kind| kind.try_into().ok());
    let found = note.get(NOTE_HEADER..).unwrap_or_default();
    let named =
        kind.map(u32::from_le_bytes) == Some(NT_GNU_BUILD_ID) && note.get(12..16) == Some(b"GNU\0");
    if !named || digits(found) != module.build_id {
        return Err(Unknown::OtherBuild {
            found: digits(found),
            expected: module.build_id.clone(),
        });
    }
    Ok(module)
}

/// Where recognised modules export what, for the text of the others.
#[derive(Default)]
pub struct Exports(BTreeMap<String, u64>);

impl Exports {
    /// Adds a module's. Of two modules that export one name the first counts, as in the kernel.
    pub fn add(&mut self, module: &Module, loaded: &Loaded) {
        let placement = placement(loaded, Slide(0), loaded.init.0);
        for export in &module.exports {
            let at = placement.address(export.place);
            self.0.entry(export.name.clone()).or_insert(at);
        }
    }
}

/// A module whose text is explained.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExplainedModule {
    /// Its text as it runs.
    pub running: Vec<u8>,
    /// Bytes that differ from the relocated file, by the table that explains them.
    pub changed: BTreeMap<SiteKind, u64>,
}

/// Reads the module's text and explains every byte of it.
pub fn explain(
    bundle: &Bundle,
    slide: Slide,
    module: &Module,
    loaded: &Loaded,
    exports: &Exports,
    memory: &GuestMemory<'_>,
) -> Result<ExplainedModule, Unknown> {
    let running = memory.bytes(loaded.core, module.text_size as usize)?;
    let init = match loaded.init.0 {
        0 => init_base(module, loaded, &running),
        base => base,
    };
    let placement = placement(loaded, slide, init);
    let resolve = |name: &str| exports.0.get(name).copied();
    let expected = module.relocated(&placement, &resolve)?;
    let mut open = Differences::new(&expected, &running);
    let sites = sites(module, &placement, &resolve)?;
    let mut pending = open.sites_with_any(&sites);
    let mut changed = BTreeMap::new();
    let from_text = loaded
        .core
        .0
        .wrapping_sub(slide.guest(bundle.manifest.text.start).0);
    for round in 0..ROUNDS {
        let before = pending.len();
        pending.retain(|site| {
            let range = range_of(site);
            let bytes = &running[range.clone()];
            // In the first round a form must match by itself.
            let ignore = |index: usize| round > 0 && open.was_explained(range.start + index);
            // Branches are to the kernel's functions and thunks: the same site, as an offset from the kernel's text.
            let seen = Site {
                at: TextOff(site.at.0.wrapping_add(from_text as u32)),
                len: site.len,
                kind: site.kind,
                forms: Vec::new(),
            };
            let model = &bundle.model;
            let matched = site.forms.iter().any(|form| {
                forms::matches(form, model, &seen, bytes, slide, bundle.text.len(), ignore)
            });
            if matched {
                let range = range.clone();
                let differing = range
                    .clone()
                    .filter(|at| expected[*at] != running[*at] && !open.was_explained(*at))
                    .count();
                *changed.entry(site.kind).or_insert(0) += differing as u64;
                open.explain(range);
            }
            !matched
        });
        if pending.is_empty() || (round > 0 && pending.len() == before) {
            break;
        }
    }
    let left = open.left();
    if !left.is_empty() {
        let shown = left.iter().take(5).map(|(start, end)| {
            let shown = *start as usize..(*end as usize).min(*start as usize + 16);
            let at = loaded.core.offset(u64::from(*start));
            format!(
                "{at} ({}): {} where {} was expected",
                symbol(module, TextOff(*start)),
                crate::guest::explain::hex(&running[shown.clone()]),
                crate::guest::explain::hex(&expected[shown])
            )
        });
        return Err(Unknown::Unexplained(shown.collect()));
    }
    let off = module.sites.iter().filter(|site| {
        let range = range_of(site);
        site.kind == SiteKind::Retpoline && expected[range.clone()] != running[range]
    });
    // Slots are never inside alternatives, so each rewritten one that is a slot was rewritten for itself.
    let slots: HashSet<TextOff> = module.edits.iter().flatten().map(|edit| edit.at).collect();
    let off = off.filter(|site| slots.contains(&site.at)).count();
    if off > 0 {
        return Err(Unknown::RetpolinesOff(off));
    }
    Ok(ExplainedModule { running, changed })
}

/// A variant's text for a module at `base`: what runs, with the variant's edits. `None` when a thunk is out of reach.
pub fn edited(
    module: &Module,
    variant: usize,
    base: GuestVa,
    slide: Slide,
    running: &[u8],
) -> Option<Vec<u8>> {
    let mut text = running.to_vec();
    for edit in module.edits.get(variant)? {
        let bytes = edit.bytes(base.0, slide.0)?;
        text.get_mut(edit.at.0 as usize..)?
            .get_mut(..bytes.len())?
            .copy_from_slice(&bytes);
    }
    Some(text)
}

fn placement(loaded: &Loaded, slide: Slide, init: u64) -> Placement {
    Placement {
        core: loaded.core.0,
        init,
        percpu: loaded.percpu,
        slide: slide.0,
    }
}

/// Initialisation memory is freed once the init function has returned. Code that refers to it is in `.altinstr_aux`, which
/// nothing executes after its alternative is patched; where it was is told by the first such field, and the others must agree.
fn init_base(module: &Module, loaded: &Loaded, running: &[u8]) -> u64 {
    let dead = module
        .sections
        .iter()
        .find_map(|section| match section.place {
            Place::Core(at) if section.name == ".altinstr_aux" => Some(at..at + section.size),
            _ => None,
        });
    let first = module.relocs.iter().find_map(|reloc| {
        let Target::Own(Place::Init(at)) = module.targets[reloc.target as usize] else {
            return None;
        };
        dead.as_ref()?.contains(&reloc.at.0).then_some(())?;
        let field = running.get(reloc.at.0 as usize..)?.first_chunk()?;
        let there = loaded.core.0.wrapping_add(u64::from(reloc.at.0));
        let target = there.wrapping_add_signed(i64::from(i32::from_le_bytes(*field)));
        let start = target.wrapping_sub(reloc.addend.cast_unsigned());
        Some(start.wrapping_sub(u64::from(at)))
    });
    first
        .filter(|base| base % 4096 == 0 && AREA.contains(base))
        .unwrap_or(0)
}

/// The module's sites with the relocated fields of their forms filled in.
fn sites(
    module: &Module,
    placement: &Placement,
    resolve: &dyn Fn(&str) -> Option<u64>,
) -> Result<Vec<Site>, Unknown> {
    let mut sites = module.sites.clone();
    for one in &module.form_relocs {
        let bytes = module.field(&one.reloc, placement, resolve)?;
        let site = &mut sites[one.site as usize];
        let inside = (one.reloc.at.0 - site.at.0) as usize;
        if let Form::Exact { bytes: form, .. } = &mut site.forms[one.form as usize] {
            let width = one.reloc.kind.width();
            form[inside..inside + width].copy_from_slice(&bytes[..width]);
        }
    }
    Ok(sites)
}

/// `name+0x12` for a text offset.
pub fn symbol(module: &Module, at: TextOff) -> String {
    let after = module.symbols.partition_point(|symbol| symbol.at <= at);
    match module.symbols[..after].last() {
        Some(symbol) => format!(
            "{}+{:#x} [{}]",
            symbol.name,
            at.0 - symbol.at.0,
            module.name
        ),
        None => format!("text+{:#x} [{}]", at.0, module.name),
    }
}

#[cfg(test)]
mod tests;
