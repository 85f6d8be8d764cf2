//! Each indirect branch and the entries that it may reach.

use super::btf::Btf;
use super::functions::{Doubt, FunctionIndex, least_arity};
use super::prototypes::{ProtoId, Prototypes};
use super::puts::Puts;
use crate::text::Indirect;
use penumbra_bundle::{ForwardClass, ForwardDoubt, ForwardSets, ForwardSite, TextOff};
use rustc_hash::FxHashMap;
use std::collections::BTreeMap;

/// The kinds of classes by arity.
const ARITIES: [&str; 6] = [
    "arity-0", "arity-1", "arity-2", "arity-3", "arity-4", "arity-5",
];

/// A class of several prototypes has no more entries: each takes some 6 bytes, and tells little.
const MOST_OF_SEVERAL: usize = 1300;

/// What an indirect branch may reach in the kernel's text. Modules' functions and other code outside it are not spoken of.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Reach {
    /// These functions only: their addresses are all that the target is ever made from. Sorted.
    Functions(Vec<TextOff>),
    /// Functions of one of these prototypes. Sorted.
    Prototypes(Vec<ProtoId>),
    /// Functions that read at most so many argument registers, as far as is known; fewer than 6.
    Arity(u8),
    /// Every function whose address is taken.
    Any,
}

impl Reach {
    /// These functions only.
    pub fn functions(mut all: Vec<TextOff>) -> Reach {
        all.sort_unstable();
        all.dedup();
        Reach::Functions(all)
    }

    /// Functions of these prototypes.
    pub fn prototypes(mut all: Vec<ProtoId>) -> Reach {
        all.sort_unstable();
        all.dedup();
        Reach::Prototypes(all)
    }

    /// Whether prototypes decide it.
    pub fn is_by_prototype(&self) -> bool {
        matches!(self, Reach::Prototypes(_))
    }

    /// How it is called in manifests.
    pub fn kind(&self) -> &'static str {
        match self {
            Reach::Functions(_) => "functions",
            Reach::Prototypes(all) if all.len() <= 1 => "prototype",
            Reach::Prototypes(_) => "prototypes",
            Reach::Arity(most) => ARITIES[usize::from(*most).min(5)],
            Reach::Any => "address-taken",
        }
    }
}

impl Doubt {
    /// How it is called in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Doubt::Name => "name",
            Doubt::Place => "place",
            Doubt::Code => "code",
        }
    }
}

/// An indirect branch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Site {
    /// Where it stands.
    pub at: TextOff,
    /// Its class: an index into [`Forward::classes`].
    pub class: u32,
}

/// What some indirect branches may reach.
#[derive(Clone, Debug)]
pub struct Class {
    /// As found.
    pub reach: Reach,
    /// The entries, sorted.
    pub entries: Vec<TextOff>,
}

/// The entries with their prototypes.
pub struct Entries {
    all: Vec<TextOff>,
    /// How many argument registers each reads at least.
    arity: Vec<u8>,
    by_prototype: FxHashMap<ProtoId, Vec<TextOff>>,
    doubts: Vec<ForwardDoubt>,
}

impl Entries {
    /// Of `entries`, which are sorted.
    ///
    /// What has no prototype is assembly, whose entries C calls directly or the processor does: it is reached by what is not
    /// typed only.
    ///
    /// The clones of a function have other parameters than it was declared with.
    ///
    /// Each is in the classes of what is declared where it is put, besides its own. Of one whose own may be another function's,
    /// and which is put where nothing is declared, nothing is known.
    pub fn of(
        entries: &[TextOff],
        btf: &Btf,
        index: &FunctionIndex,
        prototypes: &Prototypes,
        puts: &Puts,
    ) -> Entries {
        let mut all = Entries {
            all: entries.to_vec(),
            arity: Vec::with_capacity(entries.len()),
            by_prototype: FxHashMap::default(),
            doubts: Vec::new(),
        };
        for at in entries {
            let function = index.at(at.0);
            let declared = function.map_or(&[][..], |one| &one.declared);
            let doubt = function.and_then(|one| one.doubt);
            let least = declared.iter().map(|ty| least_arity(btf, *ty)).min();
            let clone = function.is_none_or(|one| one.clone);
            let known = !clone && doubt.is_none();
            all.arity.push(least.filter(|_| known).unwrap_or(0));
            if let Some(doubt) = doubt {
                all.doubts.push(ForwardDoubt {
                    at: *at,
                    by: doubt.name().to_owned(),
                    told: puts.is_told(at.0),
                });
            }
            let own = declared.iter().filter_map(|ty| prototypes.class(*ty));
            let own: Vec<ProtoId> = own.collect();
            // Where its own is one of those that are possible, it is the one that is meant.
            let others = puts
                .declared(at.0)
                .iter()
                .filter(|place| doubt.is_some() || !place.iter().any(|class| own.contains(class)));
            let mut classes: Vec<ProtoId> = others.flatten().copied().collect();
            classes.extend(own);
            classes.sort_unstable();
            classes.dedup();
            for id in classes {
                all.by_prototype.entry(id).or_default().push(*at);
            }
        }
        all
    }

    /// Whether a class of `reach` is worth its room.
    pub fn are_few(&self, reach: &Reach) -> bool {
        match reach {
            Reach::Prototypes(all) if all.len() > 1 => self.reached(reach).len() <= MOST_OF_SEVERAL,
            _ => true,
        }
    }

    /// What `reach` comes to.
    fn reached(&self, reach: &Reach) -> Vec<TextOff> {
        match reach {
            Reach::Functions(all) => {
                let taken = |at: &&TextOff| self.all.binary_search(at).is_ok();
                all.iter().filter(taken).copied().collect()
            }
            Reach::Prototypes(all) => {
                let lists = all.iter().filter_map(|id| self.by_prototype.get(id));
                let mut found: Vec<TextOff> = lists.flatten().copied().collect();
                found.sort_unstable();
                found.dedup();
                found
            }
            Reach::Arity(most) => {
                let all = self.all.iter().zip(&self.arity);
                let fitting = all.filter(|(_, arity)| *arity <= most);
                fitting.map(|(at, _)| *at).collect()
            }
            Reach::Any => self.all.clone(),
        }
    }
}

/// All indirect branches through retpolines, and what they may reach.
#[derive(Clone, Debug)]
pub struct Forward {
    /// The branches, by address.
    pub sites: Vec<Site>,
    /// The classes that they are in. The first is [`Reach::Any`].
    pub classes: Vec<Class>,
    /// All entries, and how many argument registers each reads at least. Sorted.
    pub arities: Vec<(TextOff, u8)>,
    /// The entries of which BTF may have another function's prototype. Sorted.
    pub doubts: Vec<ForwardDoubt>,
    /// Branches by a pointer that the kernel makes direct ones, by address.
    pub patched: Vec<Site>,
    known: FxHashMap<Reach, u32>,
}

impl Forward {
    /// No branches yet.
    pub fn new(entries: &Entries) -> Forward {
        let mut forward = Forward {
            sites: Vec::new(),
            classes: Vec::new(),
            arities: entries
                .all
                .iter()
                .copied()
                .zip(entries.arity.iter().copied())
                .collect(),
            doubts: entries.doubts.clone(),
            patched: Vec::new(),
            known: FxHashMap::default(),
        };
        forward.class(Reach::Any, entries);
        forward
    }

    fn class(&mut self, reach: Reach, entries: &Entries) -> u32 {
        if let Some(known) = self.known.get(&reach) {
            return *known;
        }
        let number = self.classes.len() as u32;
        self.classes.push(Class {
            entries: entries.reached(&reach),
            reach: reach.clone(),
        });
        self.known.insert(reach, number);
        number
    }

    /// Adds a branch.
    pub fn add(&mut self, at: TextOff, reach: Reach, entries: &Entries) {
        let class = self.class(reach, entries);
        self.sites.push(Site { at, class });
    }

    /// Adds branches that the kernel makes direct ones.
    pub fn add_patched(&mut self, branches: Vec<(TextOff, Reach)>, entries: &Entries) {
        for (at, reach) in branches {
            let class = self.class(reach, entries);
            self.patched.push(Site { at, class });
        }
        self.patched.sort_unstable_by_key(|site| site.at);
        self.patched.dedup_by_key(|site| site.at);
    }

    /// Keeps the branches that are `slots`, and adds those that were not reached.
    pub fn finish(&mut self, slots: &[Indirect]) {
        // Of a branch that two functions share, as a cold part may be, the wider class.
        let mut by_place: BTreeMap<TextOff, u32> = BTreeMap::new();
        for site in &self.sites {
            let class = by_place.entry(site.at).or_insert(site.class);
            if *class != site.class {
                *class = 0;
            }
        }
        let sites = slots.iter().map(|slot| Site {
            at: slot.at,
            class: by_place.get(&slot.at).copied().unwrap_or(0),
        });
        self.sites = sites.collect();
    }

    /// Takes entries out of every class.
    pub fn retain(&mut self, keep: impl Fn(TextOff) -> bool) {
        for class in &mut self.classes {
            class.entries.retain(|at| keep(*at));
        }
        self.arities.retain(|(at, _)| keep(*at));
        self.doubts.retain(|doubt| keep(doubt.at));
    }

    /// The entries of which nothing is known: every branch that is checked by prototype lets them through. Sorted.
    pub fn untold(&self) -> Vec<TextOff> {
        let untold = self.doubts.iter().filter(|doubt| !doubt.told);
        untold.map(|doubt| doubt.at).collect()
    }

    /// The number of the class of the branch at `at`.
    pub fn class_number(&self, at: TextOff) -> Option<u32> {
        let index = self.sites.binary_search_by_key(&at, |site| site.at).ok()?;
        Some(self.sites[index].class)
    }

    /// The same for a manifest.
    pub fn claims(&self) -> ForwardSets {
        let classes = self.classes.iter().map(|class| ForwardClass {
            by: class.reach.kind().to_owned(),
            entries: class.entries.clone(),
        });
        let listed = |sites: &[Site]| {
            let sites = sites.iter().map(|site| ForwardSite {
                at: site.at,
                class: site.class,
            });
            sites.collect()
        };
        ForwardSets {
            classes: classes.collect(),
            sites: listed(&self.sites),
            doubts: self.doubts.clone(),
            patched: listed(&self.patched),
        }
    }

    /// The number of the class of the branch at `at` if that is all that it ever reaches: no module's function, from which a frame may
    /// get anywhere.
    pub fn closed_class(&self, at: TextOff) -> Option<u32> {
        let index = self.patched.binary_search_by_key(&at, |site| site.at);
        let reach = |class: u32| &self.classes[class as usize].reach;
        match index.ok().map(|index| self.patched[index].class) {
            Some(class) => Some(class).filter(|class| !matches!(reach(*class), Reach::Any)),
            None => {
                let class = self.class_number(at)?;
                matches!(reach(class), Reach::Functions(_)).then_some(class)
            }
        }
    }

    /// The class of the branch at `at`.
    pub fn class_at(&self, at: TextOff) -> Option<&Class> {
        let index = self.sites.binary_search_by_key(&at, |site| site.at).ok()?;
        Some(&self.classes[self.sites[index].class as usize])
    }

    /// What manifests say: branches by what decides their class, by the size of their class, and sums.
    pub fn figures(&self) -> BTreeMap<String, u64> {
        let mut figures = BTreeMap::new();
        let mut sizes: Vec<u64> = Vec::with_capacity(self.sites.len());
        let untold = self.untold();
        for site in &self.sites {
            let class = &self.classes[site.class as usize];
            let mut size = class.entries.len() as u64;
            if class.reach.is_by_prototype() {
                let more = untold.iter();
                let more = more.filter(|at| class.entries.binary_search(at).is_err());
                size += more.count() as u64;
            }
            *figures
                .entry(format!("by.{}", class.reach.kind()))
                .or_default() += 1;
            *figures.entry(format!("set-size.{size}")).or_default() += 1;
            sizes.push(size);
        }
        sizes.sort_unstable();
        let median = sizes.get(sizes.len() / 2).copied().unwrap_or(0);
        let sum: u64 = sizes.iter().sum();
        figures.insert("median".to_owned(), median);
        figures.insert("mean".to_owned(), sum / (sizes.len() as u64).max(1));
        figures.insert("classes".to_owned(), self.classes.len() as u64);
        for doubt in &self.doubts {
            *figures.entry(format!("doubted.{}", doubt.by)).or_default() += 1;
        }
        figures.insert("untold".to_owned(), untold.len() as u64);
        figures
    }
}
