//! Rule 5, returns behind indirect calls: what an indirect call lets through may return behind it.
//!
//! The claims say what each indirect branch may reach, and behind which calls each function may return. Here the one follows from the
//! other: every call that may reach a function, by name, by pointer, or by jumps of what it reaches, has to be among those behind
//! which that function may return. Which branch may reach what is claimed, and for checked branches proved by `classes.rs`.

use super::Subject;
use super::callers::{Goes, Parts};
use super::kernel::Kernel;
use super::kernel::symbols::hex;
use super::report::Findings;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind};
use penumbra_bundle::{ForwardSets, ForwardSite, LinkVa};
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet};

/// Branches of these classes may reach too much to be told apart by it.
const WIDE: &str = "address-taken";
const WIDE_BY: &str = "arity-";
/// Branches of this class reach what is listed, and no module's functions.
const CLOSED: &str = "functions";
/// Classes that let those entries through as well of which nothing is known.
const BY_PROTOTYPE: &str = "prototype";
/// Functions whose code is less may be alike by chance.
const LEAST_CODE: usize = 16;

/// What is claimed, by address.
pub struct Claimed {
    /// Behind what every function may return that an indirect call reaches.
    pub any: BTreeSet<LinkVa>,
    classes: Vec<BTreeSet<LinkVa>>,
    of: BTreeMap<LinkVa, u32>,
    none: BTreeSet<LinkVa>,
}

impl Claimed {
    /// The claims of a bundle, if it makes any.
    pub fn of(subject: &Subject<'_>) -> Option<Claimed> {
        let claims = subject.bundle.backward.as_ref()?;
        let text = subject.bundle.manifest.text.start.0;
        let places = |list: &[penumbra_bundle::TextOff]| {
            let list = list.iter();
            list.map(|at| LinkVa(text + u64::from(at.0))).collect()
        };
        let functions = claims.functions.iter();
        Some(Claimed {
            any: places(&claims.any),
            classes: claims.classes.iter().map(|class| places(class)).collect(),
            of: functions
                .map(|one| (LinkVa(text + u64::from(one.at.0)), one.class))
                .collect(),
            none: BTreeSet::new(),
        })
    }

    /// Behind what else the function that starts at `start` may return.
    pub fn class(&self, start: LinkVa) -> &BTreeSet<LinkVa> {
        let class = self.of.get(&start);
        class.map_or(&self.none, |class| &self.classes[*class as usize])
    }
}

/// Where a frame may get by pointers.
#[derive(Clone, Default)]
struct Beyond {
    /// Nothing says where.
    anywhere: bool,
    classes: BTreeSet<usize>,
}

/// The claims about branches, and the parts that they are about.
struct Drawn<'a> {
    parts: &'a Parts,
    forward: &'a ForwardSets,
    /// The class of each branch that reaches nothing else, no module either: what a module's function jumps to is not known.
    of_branch: FxHashMap<LinkVa, usize>,
    /// The parts that each class lets through.
    entries: Vec<BTreeSet<u32>>,
    /// The same, but for copies of a header's function that nothing tells of: what these jump to their namesakes tell.
    jumping: Vec<BTreeSet<u32>>,
    /// Where what each class lets through jumps by pointers.
    beyond: Vec<Beyond>,
}

fn is_wide(forward: &ForwardSets, class: usize) -> bool {
    let by = &forward.classes[class].by;
    by == WIDE || by.starts_with(WIDE_BY)
}

impl<'a> Drawn<'a> {
    fn of(subject: &Subject<'_>, parts: &'a Parts, forward: &'a ForwardSets) -> Drawn<'a> {
        let text = subject.bundle.manifest.text.start.0;
        let at = |at: penumbra_bundle::TextOff| LinkVa(text + u64::from(at.0));
        let by = |site: &&ForwardSite| &forward.classes[site.class as usize].by[..];
        let sites = forward.sites.iter().filter(|site| by(site) == CLOSED);
        let patched = forward.patched.iter();
        let patched = patched.filter(|site| !is_wide(forward, site.class as usize));
        let branches = sites.chain(patched);
        let untold: Vec<LinkVa> = forward
            .doubts
            .iter()
            .filter(|doubt| !doubt.told)
            .map(|doubt| at(doubt.at))
            .collect();
        let copies = untold.iter().copied();
        let copies: BTreeSet<LinkVa> = copies
            .filter(|at| are_copies(subject.kernel, parts, *at))
            .collect();
        let of_class = |number: usize, less: &BTreeSet<LinkVa>| -> BTreeSet<u32> {
            let class = &forward.classes[number];
            if is_wide(forward, number) {
                return BTreeSet::new();
            }
            let own = class.entries.iter().map(|entry| at(*entry));
            let more = untold.iter().copied();
            let more = more.filter(|at| class.by.starts_with(BY_PROTOTYPE) && !less.contains(at));
            own.chain(more).filter_map(|at| parts.part(at)).collect()
        };
        let numbers = 0..forward.classes.len();
        let mut drawn = Drawn {
            parts,
            forward,
            of_branch: branches
                .map(|site| (at(site.at), site.class as usize))
                .collect(),
            entries: numbers
                .clone()
                .map(|class| of_class(class, &BTreeSet::new()))
                .collect(),
            jumping: numbers.map(|class| of_class(class, &copies)).collect(),
            beyond: Vec::new(),
        };
        let mut known = FxHashMap::default();
        drawn.beyond = (0..forward.classes.len())
            .map(|class| {
                let mut all = Beyond {
                    anywhere: is_wide(forward, class),
                    classes: BTreeSet::new(),
                };
                for part in &drawn.jumping[class] {
                    let own = known
                        .entry(*part)
                        .or_insert_with(|| drawn.beyond_part(*part));
                    all.anywhere |= own.anywhere;
                    all.classes.extend(&own.classes);
                }
                all
            })
            .collect();
        drawn
    }

    /// All parts that get the frame of `part` by jumps that name them, itself among them.
    fn reached(&self, part: u32) -> BTreeSet<u32> {
        let mut seen = BTreeSet::from([part]);
        let mut open = vec![part];
        while let Some(at) = open.pop() {
            let next = self.parts.jumps[at as usize].iter();
            open.extend(next.filter(|to| seen.insert(**to)));
        }
        seen
    }

    /// Where the frame of `part` may get by pointers.
    fn beyond_part(&self, part: u32) -> Beyond {
        let mut beyond = Beyond::default();
        for reached in self.reached(part) {
            // Assembly that jumps by a pointer starts or resumes a processor, or is a retpoline's thunk.
            if self.parts.assembly.contains(&reached) {
                continue;
            }
            for at in self.parts.open_jumps.get(&reached).into_iter().flatten() {
                match at.and_then(|at| self.of_branch.get(&at)) {
                    Some(class) if !is_wide(self.forward, *class) => {
                        beyond.classes.insert(*class);
                    }
                    _ => beyond.anywhere = true,
                }
            }
        }
        beyond
    }

    /// All classes whose entries may get a frame that has got to these; none when anything may.
    fn closure(&self, beyond: Beyond) -> Option<BTreeSet<usize>> {
        let mut all = beyond.classes;
        let mut anywhere = beyond.anywhere;
        let mut open: Vec<usize> = all.iter().copied().collect();
        while let (Some(class), false) = (open.pop(), anywhere) {
            anywhere |= self.beyond[class].anywhere;
            let next = self.beyond[class].classes.iter();
            open.extend(next.filter(|class| all.insert(**class)));
        }
        (!anywhere).then_some(all)
    }

    /// The places behind calls that may reach anything, and by class those behind calls that may reach its entries.
    fn places(&self) -> (BTreeSet<LinkVa>, Vec<BTreeSet<LinkVa>>) {
        let mut any = BTreeSet::new();
        let mut of = vec![BTreeSet::new(); self.forward.classes.len()];
        let mut put = |back: LinkVa, closure: &Option<BTreeSet<usize>>| match closure {
            None => _ = any.insert(back),
            Some(classes) => {
                for class in classes {
                    of[*class].insert(back);
                }
            }
        };
        let mut known: BTreeMap<Option<usize>, Option<BTreeSet<usize>>> = BTreeMap::new();
        for (at, back) in &self.parts.open_calls {
            let class = at.and_then(|at| self.of_branch.get(&at)).copied();
            let closure = known.entry(class).or_insert_with(|| {
                let wide = class.is_none_or(|class| is_wide(self.forward, class));
                self.closure(Beyond {
                    anywhere: wide,
                    classes: class.into_iter().collect(),
                })
            });
            put(*back, closure);
        }
        for part in 0..self.parts.count() {
            let direct = &self.parts.back[part as usize];
            let replaced = &self.parts.replaced[part as usize];
            if direct.is_empty() && replaced.is_empty() {
                continue;
            }
            let beyond = self.beyond_part(part);
            if beyond.anywhere || !beyond.classes.is_empty() {
                let closure = self.closure(beyond);
                for back in direct.iter().chain(replaced) {
                    put(*back, &closure);
                }
            }
        }
        (any, of)
    }
}

/// Proves that the claims about returns follow from those about branches, for the parts that are `checked`: no other one has a
/// return.
pub fn check(
    subject: &Subject<'_>,
    (parts, checked): (&Parts, &BTreeSet<u32>),
    claimed: &Claimed,
    findings: &mut Findings<'_>,
) {
    let Some(forward) = &subject.bundle.forward else {
        let what = "the manifest claims classes of returns, and none of branches".to_owned();
        findings.broken(None, None, what);
        return;
    };
    let lists = claimed.classes.iter().chain([&claimed.any]);
    for stray in lists.flat_map(|list| list.difference(&parts.indirect)) {
        let what = "is claimed to be behind an indirect call, and is not".to_owned();
        findings.broken(None, Some(*stray), what);
    }
    let drawn = Drawn::of(subject, parts, forward);
    let (any, places) = drawn.places();
    for missing in any.difference(&claimed.any) {
        let what = "is behind a call that may reach anything, and not everything is claimed to return there";
        findings.broken(None, Some(*missing), what.to_owned());
    }
    // The classes of branches from which each part gets frames. No branch that is checked lets through what is in no class.
    let mut from: BTreeMap<u32, BTreeSet<usize>> = BTreeMap::new();
    for (class, entries) in drawn.entries.iter().enumerate() {
        for part in entries.iter().flat_map(|entry| drawn.reached(*entry)) {
            from.entry(part).or_default().insert(class);
        }
    }
    let mut known: BTreeMap<(Option<u32>, usize), Option<LinkVa>> = BTreeMap::new();
    let mut proved = 0;
    for (part, classes) in from {
        let goes = &parts.goes[part as usize];
        if !checked.contains(&part) || !matches!(goes, Goes::Behind { indirect: true, .. }) {
            continue;
        }
        let start = parts.entry(part);
        let own = claimed.of.get(&start).copied();
        proved += 1;
        for class in classes {
            let missing = *known.entry((own, class)).or_insert_with(|| {
                let list = claimed.class(start);
                let mut all = places[class].iter();
                let missing = all.find(|at| !list.contains(at) && !claimed.any.contains(at));
                missing.copied()
            });
            if let Some(at) = missing {
                let what = format!(
                    "is behind a call that may reach the function at {}, which is not claimed to return there",
                    hex(start)
                );
                findings.broken(None, Some(at), what);
            }
        }
    }
    for start in claimed.of.keys() {
        let part = parts
            .part(*start)
            .filter(|part| parts.start(*part) == *start);
        let goes = part.map(|part| &parts.goes[part as usize]);
        if !matches!(goes, Some(Goes::Behind { indirect: true, .. })) {
            let what = "is claimed to return behind indirect calls of a class, and none reaches it";
            findings.broken(None, Some(*start), what.to_owned());
        }
    }
    findings.proved("functions whose indirect callers are told apart", proved);
    findings.proved("classes of returns", claimed.classes.len() as u64);
}

/// Whether every function that is called as the one at `at` is, has its code, so that all are one function of a header.
fn are_copies(kernel: &Kernel, parts: &Parts, at: LinkVa) -> bool {
    let named = |wanted: LinkVa| {
        let symbols = kernel.symbols.iter().filter(|symbol| symbol.is_code());
        symbols.filter(move |symbol| symbol.at == wanted)
    };
    let names: BTreeSet<&str> = named(at).map(|symbol| symbol.name.as_str()).collect();
    let all = kernel.symbols.iter().filter(|symbol| symbol.is_code());
    let all = all.filter(|symbol| names.contains(symbol.name.as_str()));
    let codes: BTreeSet<LinkVa> = all.map(|symbol| symbol.at).collect();
    let mut first: Option<Vec<Instruction>> = None;
    for place in codes {
        let part = parts.part(place).filter(|part| parts.start(*part) == place);
        let Some(part) = part.filter(|_| kernel.in_text(place)) else {
            return false;
        };
        let Some(code) = kernel.bytes(parts.range(part, kernel.text.end)) else {
            return false;
        };
        let own = instructions(code, place);
        if own.iter().map(Instruction::len).sum::<usize>() < LEAST_CODE {
            return false;
        }
        match &first {
            None => first = Some(own),
            Some(other) if *other != own => return false,
            Some(_) => {}
        }
    }
    first.is_some()
}

/// The instructions of a function, with branches inside it as if it started at 0, up to what fills the room behind it.
fn instructions(code: &[u8], start: LinkVa) -> Vec<Instruction> {
    let end = start.0 + code.len() as u64;
    let mut all: Vec<Instruction> = Vec::new();
    let mut whole = 0;
    for mut one in Decoder::with_ip(64, code, start.0, DecoderOptions::NONE) {
        let filling =
            one.flow_control() == FlowControl::Interrupt || one.mnemonic() == Mnemonic::Nop;
        if one.op0_kind() == OpKind::NearBranch64 && (start.0..end).contains(&one.near_branch64()) {
            one.set_near_branch64(one.near_branch64() - start.0);
        }
        all.push(one);
        if !filling {
            whole = all.len();
        }
    }
    all.truncate(whole);
    all
}
