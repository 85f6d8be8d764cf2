//! Views of loaded modules' text.
//!
//! A module comes and goes while the views are on. It is given copies once it is live, if nothing was poked and nothing was
//! freed since its text was read (Xen compares its generation); and Xen itself takes the copies out when the guest says,
//! by the hook of the `module-free` pass, that it is about to free the module. So its frames are the guest's own again
//! before they can hold anything else.

use super::apply::Request;
use super::journal::{Journal, JournalError, ModuleState, State};
use crate::guest::GuestMemory;
use crate::guest::modules::{Known, Loaded, ModuleReader, Verdict, examine};
use crate::xen::{
    Errno, EventKind, Events, Gfn, Group, GuestVa, Hypervisor, PAGE, ViewId, XenError,
};
use penumbra_bundle::{Bundle, Module};
use std::collections::{BTreeMap, HashMap, HashSet};
use thiserror::Error;

/// The pass whose hook says that a module is freed.
pub const FREE_HOOK: &str = "module-free";
/// Frames kept for copies of modules' pages: 4 MiB.
const SPARE: u64 = 1024;

/// Why modules could not be looked after.
#[derive(Debug, Error)]
pub enum ModuleError {
    /// Xen refused.
    #[error(transparent)]
    Xen(#[from] XenError),
    /// The journal cannot be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What became of a module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum News {
    /// It has views.
    Mapped {
        /// Its `struct module`.
        module: GuestVa,
        /// Its name.
        name: String,
        /// Its build-id.
        build_id: String,
        /// Pages in all views.
        pages: usize,
    },
    /// It stays on its own text.
    Stays {
        /// Its `struct module`.
        module: GuestVa,
        /// Its name, as the guest has it.
        name: String,
        /// Why.
        why: String,
    },
}

/// Whether the bundle can give modules views, and if not why.
pub fn able(bundle: &Bundle) -> Result<(), &'static str> {
    if bundle.modules.is_empty() {
        return Err("the bundle has no modules; `hardener emit --module` puts them there");
    }
    let hooked = bundle.manifest.variants.iter().all(|variant| {
        let mut passes = variant.passes.iter();
        passes.any(|pass| pass.name == FREE_HOOK && pass.edited > 0)
    });
    if hooked {
        Ok(())
    } else {
        Err("this kernel has no place for the hook that tells when a module is freed")
    }
}

/// How many frames an apply keeps for modules.
pub fn spare(request: &Request<'_>) -> u64 {
    if able(request.bundle).is_ok() {
        SPARE
    } else {
        0
    }
}

/// Looks after the modules of one guest.
pub struct Modules<'a> {
    bundle: &'a Bundle,
    reader: Option<ModuleReader>,
    free: Vec<Gfn>,
    /// Modules that stay, by what they are: each is said once.
    stay: HashSet<(GuestVa, GuestVa, Option<String>)>,
    /// The newest module at the last look, and whether one was not live yet.
    seen: Option<(Option<GuestVa>, usize, bool)>,
    /// Modules that were on their own text at the last look, by name.
    foreign: Option<Vec<String>>,
}

impl<'a> Modules<'a> {
    /// Begins with no module mapped: see [`reset`].
    pub fn new(bundle: &'a Bundle, state: &State) -> Modules<'a> {
        Modules {
            bundle,
            // Kernels whose modules look otherwise have none in the bundle.
            reader: ModuleReader::new(&bundle.manifest, state.reader.slide()).ok(),
            free: state.spare.map_or_else(Vec::new, |(first, count)| {
                (first.0..first.0 + count).rev().map(Gfn).collect()
            }),
            stay: HashSet::new(),
            seen: None,
            foreign: None,
        }
    }

    /// The modules that were on their own text at the last look, by name; `None` before the first, or if none can be made.
    pub fn foreign(&self) -> Option<&[String]> {
        self.foreign.as_deref()
    }

    /// Why no module of this guest gets views, if none can.
    pub fn unable(&self) -> Option<&'static str> {
        match able(self.bundle) {
            Ok(()) if self.reader.is_none() => {
                Some("this kernel keeps its modules in a way that is not known")
            }
            Ok(()) => None,
            Err(why) => Some(why),
        }
    }

    /// One look: drops what Xen dropped, maps what is new.
    pub fn look(
        &mut self,
        hypervisor: &dyn Hypervisor,
        journal: &Journal,
        state: &mut State,
        events: &Events,
    ) -> Result<Vec<News>, ModuleError> {
        let mut news = Vec::new();
        let Some(reader) = self.reader.clone().filter(|_| able(self.bundle).is_ok()) else {
            return Ok(news);
        };
        let dropped: HashSet<GuestVa> = events
            .records
            .iter()
            .filter(|event| event.kind == EventKind::Dropped)
            .map(|event| GuestVa(event.addr))
            .collect();
        self.forget(journal, state, |one| dropped.contains(&one.module))?;
        // Before anything is read: what is poked or freed from here on makes Xen refuse.
        let generation = hypervisor.stats()?.generation;
        let kernel = *state.reader.kernel();
        let memory = kernel.memory(hypervisor);
        let list = reader.list(&memory);
        if !list.trouble.is_empty() {
            // The list changes under the walk now and then: the next look tells.
            return Ok(news);
        }
        let now = (
            list.modules.first().map(|one| one.module),
            list.modules.len(),
        );
        if dropped.is_empty() && self.seen == Some((now.0, now.1, false)) {
            return Ok(news);
        }
        self.drop_gone(hypervisor, journal, state, &list.modules)?;
        let with = With {
            hypervisor,
            journal,
            memory: &memory,
            generation,
        };
        let mut again = false;
        for loaded in &list.modules {
            let what = (loaded.module, loaded.text(), loaded.build_id.clone());
            let mapped = state.modules.iter().any(|one| one.module == loaded.module);
            if mapped || self.stay.contains(&what) {
                continue;
            }
            let mut stays = |why: String| {
                self.stay.insert(what.clone());
                News::Stays {
                    module: loaded.module,
                    name: loaded.name.clone(),
                    why,
                }
            };
            let slide = state.reader.slide();
            match examine(&memory, self.bundle, slide, loaded, &list.modules) {
                Ok(Verdict::Known(known)) => match self.map(&with, state, loaded, &known)? {
                    Outcome::Mapped(pages) => news.push(News::Mapped {
                        module: loaded.module,
                        name: loaded.name.clone(),
                        build_id: self.bundle.modules[known.index].build_id.clone(),
                        pages,
                    }),
                    Outcome::Again => again = true,
                    Outcome::Stays(why) => {
                        self.stay.insert(what.clone());
                        news.push(News::Stays {
                            module: loaded.module,
                            name: loaded.name.clone(),
                            why,
                        });
                    }
                },
                Ok(Verdict::Unknown(why)) => news.push(stays(why)),
                // Not live yet, or changing under the reading.
                Ok(Verdict::Early) | Err(_) => again = true,
            }
        }
        self.seen = Some((now.0, now.1, again));
        let on_its_own = |loaded: &&Loaded| {
            let mut mapped = state.modules.iter();
            !mapped.any(|one| one.module == loaded.module)
        };
        let foreign = list.modules.iter().filter(on_its_own);
        self.foreign = Some(foreign.map(|loaded| loaded.name.clone()).collect());
        Ok(news)
    }

    /// Forgets modules that are in no view any more, and has their copies back.
    fn forget(
        &mut self,
        journal: &Journal,
        state: &mut State,
        gone: impl Fn(&ModuleState) -> bool,
    ) -> Result<(), JournalError> {
        let before = state.modules.len();
        let free = &mut self.free;
        state.modules.retain(|one| {
            let gone = gone(one);
            if gone {
                free.extend(copies(one));
            }
            !gone
        });
        if state.modules.len() != before {
            journal.save(state)?;
        }
        Ok(())
    }

    /// Takes out what the state has and the guest has not: Xen's record of it was overwritten.
    fn drop_gone(
        &mut self,
        hypervisor: &dyn Hypervisor,
        journal: &Journal,
        state: &mut State,
        loaded: &[Loaded],
    ) -> Result<(), ModuleError> {
        let there: HashMap<GuestVa, GuestVa> = loaded
            .iter()
            .map(|loaded| (loaded.module, loaded.text()))
            .collect();
        let gone: Vec<ModuleState> = state
            .modules
            .iter()
            .filter(|one| there.get(&one.module) != Some(&one.base))
            .cloned()
            .collect();
        for one in &gone {
            take_out(hypervisor, state, one)?;
        }
        self.forget(journal, state, |one| gone.contains(one))?;
        Ok(())
    }

    /// Gives a module copies in every view.
    fn map(
        &mut self,
        with: &With<'_>,
        state: &mut State,
        loaded: &Loaded,
        known: &Known,
    ) -> Result<Outcome, ModuleError> {
        let With {
            hypervisor,
            journal,
            memory,
            generation,
        } = *with;
        let module = &self.bundle.modules[known.index];
        let frames = match memory.frames(loaded.text(), known.text.len() / PAGE) {
            Ok(frames) => frames,
            Err(_) => return Ok(Outcome::Again),
        };
        let mut one = ModuleState {
            module: loaded.module,
            name: loaded.name.clone(),
            base: loaded.text(),
            views: Vec::new(),
        };
        let mut writes: Vec<(Gfn, Vec<u8>)> = Vec::new();
        let mut left = self.free.clone();
        for edits in &module.edits {
            let Some(pages) = pages(known, edits) else {
                return Ok(Outcome::Stays("it is out of the thunks' reach".to_owned()));
            };
            let mut entries = Vec::new();
            for (index, frame) in frames.iter().enumerate() {
                let copy = match pages.get(&index) {
                    None => None,
                    Some(bytes) => {
                        let Some(copy) = left.pop() else {
                            return Ok(Outcome::Stays(
                                "no frames are left for copies of modules".to_owned(),
                            ));
                        };
                        writes.push((copy, bytes.clone()));
                        Some(copy)
                    }
                };
                entries.push((index as u32, *frame, copy));
            }
            one.views.push(entries);
        }
        self.free = left;
        let pages = writes.len();
        state.modules.push(one.clone());
        journal.save(state)?;
        let writes: Vec<(Gfn, usize, &[u8])> = writes
            .iter()
            .map(|(copy, bytes)| (*copy, 0, bytes.as_slice()))
            .collect();
        let key = loaded.module;
        let result = hypervisor
            .write_all(&writes)
            .and_then(|()| remap(hypervisor, state, &one, Group { key, generation }));
        if let Err(error) = result {
            take_out(hypervisor, state, &one)?;
            self.forget(journal, state, |other| *other == one)?;
            return if error.is(Errno::AGAIN) {
                Ok(Outcome::Again)
            } else {
                Ok(Outcome::Stays(error.to_string()))
            };
        }
        Ok(Outcome::Mapped(pages))
    }
}

/// Takes out all modules that an earlier watcher mapped: nobody knows what Xen dropped since it ended.
pub fn reset(
    hypervisor: &dyn Hypervisor,
    journal: &Journal,
    state: &mut State,
) -> Result<(), ModuleError> {
    for one in &state.modules {
        take_out(hypervisor, state, one)?;
    }
    if !state.modules.is_empty() {
        state.modules.clear();
        journal.save(state)?;
    }
    Ok(())
}

/// What it takes to map a module.
struct With<'g> {
    hypervisor: &'g dyn Hypervisor,
    journal: &'g Journal,
    memory: &'g GuestMemory<'g>,
    generation: u64,
}

enum Outcome {
    Mapped(usize),
    Again,
    Stays(String),
}

/// The copies of a module.
fn copies(one: &ModuleState) -> impl Iterator<Item = Gfn> + '_ {
    let entries = one.views.iter().flatten();
    entries.filter_map(|(_, _, copy)| *copy)
}

/// The pages that one variant's edits change; `None` if a thunk is out of reach.
fn pages(known: &Known, edits: &[penumbra_bundle::ModuleEdit]) -> Option<BTreeMap<usize, Vec<u8>>> {
    let mut pages = BTreeMap::new();
    for edit in edits {
        let start = edit.at.0 as usize;
        let bytes = edit.bytes(&known.placement)?;
        for (at, byte) in (start..).zip(bytes) {
            if known.text[at] != byte {
                let page = pages
                    .entry(at / PAGE)
                    .or_insert_with(|| known.text[at / PAGE * PAGE..][..PAGE].to_vec());
                page[at % PAGE] = byte;
            }
        }
    }
    Some(pages)
}

/// Maps a module's copies into every view, all of its text read-only.
fn remap(
    hypervisor: &dyn Hypervisor,
    state: &State,
    one: &ModuleState,
    group: Group,
) -> Result<(), XenError> {
    for (id, entries) in ids(state).zip(&one.views) {
        let entries: Vec<(Gfn, Option<Gfn>)> =
            entries.iter().map(|(_, gfn, copy)| (*gfn, *copy)).collect();
        hypervisor.remap_group(id, &entries, group)?;
    }
    Ok(())
}

/// Shows the guest's own frames again in every view.
fn take_out(hypervisor: &dyn Hypervisor, state: &State, one: &ModuleState) -> Result<(), XenError> {
    for (id, entries) in ids(state).zip(&one.views) {
        let own: Vec<(Gfn, Option<Gfn>)> = entries.iter().map(|(_, gfn, _)| (*gfn, None)).collect();
        hypervisor.remap_all(id, &own, false)?;
    }
    Ok(())
}

fn ids(state: &State) -> impl Iterator<Item = ViewId> + '_ {
    state.views.iter().filter_map(|view| view.view)
}

/// The bundle's module of that name.
pub fn module_of<'b>(bundle: &'b Bundle, one: &ModuleState) -> Option<&'b Module> {
    let modules = &bundle.modules;
    let index = modules.binary_search_by(|module| module.name.as_str().cmp(&one.name));
    index.ok().map(|index| &modules[index])
}

#[cfg(test)]
#[path = "modules_tests.rs"]
mod tests;
