//! Rule 5 for indirect branches that are checked by class: each branch lets through exactly what the manifest claims of it, and
//! no claim goes beyond the entries whose addresses are taken.
//!
//! Which class a branch ought to be in is not proved: that is the emitter's analysis of types, and a class too narrow shows
//! as a violation when the kernel runs, one too wide in the figures of the manifest. What a class by arity must hold is: the
//! number of arguments of each entry is read from BTF once more. So is of which entries BTF may have another function's
//! prototype, because several share a name; see `doubts.rs`.

use super::Subject;
use super::doubts;
use super::kernel::btf::Btf;
use super::kernel::{Kernel, KernelError};
use super::report::Findings;
use super::sets::Legal;
use super::slots::{Replacement, replacement};
use super::thunks::Roles;
use penumbra_bundle::{LinkVa, SlotKind};
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet};

/// The pass that classes are about, and its parameter.
const PASS: &str = "forward-cfi";
const POLICY: &str = "policy";
const TYPED: &str = "typed";
/// What classes by arity are called, before the number.
const ARITY: &str = "arity-";
/// The class of all entries.
const ALL: &str = "address-taken";
/// Classes that prototypes decide.
const BY_PROTOTYPE: [&str; 2] = ["prototype", "prototypes"];

/// Proves it; `entries` are all entries that an indirect branch may reach.
pub fn check(
    subject: &Subject<'_>,
    roles: &Roles,
    entries: &Legal,
    findings: &mut Findings<'_>,
) -> Result<(), KernelError> {
    let bundle = subject.bundle;
    let passes = bundle
        .manifest
        .variants
        .iter()
        .flat_map(|variant| &variant.passes);
    let typed = passes.filter(|pass| pass.name == PASS).any(|pass| {
        pass.parameters
            .get(POLICY)
            .is_some_and(|policy| policy == TYPED)
    });
    let Some(claims) = &bundle.forward else {
        if typed {
            let what =
                format!("pass {PASS} says {POLICY} `{TYPED}`, the manifest claims no classes");
            findings.broken(None, None, what);
        }
        for thunk in roles.classes.keys() {
            let what = "the thunk lets a class through that the manifest does not claim".to_owned();
            findings.broken(None, Some(*thunk), what);
        }
        return Ok(());
    };
    if !typed {
        let what =
            format!("the manifest claims classes, pass {PASS} does not say {POLICY} `{TYPED}`");
        findings.broken(None, None, what);
    }
    let text = bundle.manifest.text.start.0;
    let classes: Vec<BTreeSet<LinkVa>> = claims
        .classes
        .iter()
        .map(|class| {
            let entries = class.entries.iter();
            entries.map(|at| LinkVa(text + u64::from(at.0))).collect()
        })
        .collect();
    let doubts = doubts::check(subject, claims, entries, findings)?;
    let arities = least_arities(subject.kernel, &entries.required, &doubts.all)?;
    for (number, (class, said)) in classes.iter().zip(&claims.classes).enumerate() {
        if let Some(most) = said.by.strip_prefix(ARITY) {
            let most: u8 = most.parse().unwrap_or(0);
            let fitting = arities.iter().filter(|(_, arity)| **arity <= most);
            let fitting: BTreeSet<LinkVa> = fitting.map(|(at, _)| *at).collect();
            if let Some(missing) = fitting.difference(class).next() {
                let what = format!(
                    "class {number} is `{}` and lacks an entry that reads no more",
                    said.by
                );
                findings.broken(None, Some(*missing), what);
            }
            let more = class.difference(&fitting);
            let mut more = more.filter(|at| entries.required.contains(at));
            if let Some(more) = more.next() {
                let what = format!(
                    "class {number} is `{}` and claims an entry that reads more",
                    said.by
                );
                findings.broken(None, Some(*more), what);
            }
        }
        let stray = class.difference(&entries.required);
        if let Some(stray) = stray.into_iter().find(|at| !entries.optional.contains(at)) {
            let what = format!("class {number} claims an entry whose address is never taken");
            findings.broken(None, Some(*stray), what);
        }
        if said.by == ALL && !class.is_superset(&entries.required) {
            let what = format!(
                "class {number} is `{ALL}` but claims {} of {} entries",
                class.len(),
                entries.required.len()
            );
            findings.broken(None, None, what);
        }
    }
    let mut proved = 0;
    // Whether a thunk lets exactly a class through.
    let mut known: FxHashMap<(LinkVa, usize), bool> = FxHashMap::default();
    for (variant, edit) in subject.edits() {
        let at = subject.place(edit);
        let (SlotKind::Indirect, Some(Replacement::Call(to) | Replacement::Jump(to))) =
            (edit.slot, replacement(&edit.bytes, at))
        else {
            continue;
        };
        if roles.promoted.contains_key(&to) {
            continue;
        }
        let index = claims.sites.binary_search_by_key(&edit.at, |site| site.at);
        let Ok(index) = index else {
            let what = "is checked, but the manifest claims no class for it".to_owned();
            findings.broken(Some(variant), Some(at), what);
            continue;
        };
        let number = claims.sites[index].class as usize;
        let right = || match roles.classes.get(&to) {
            Some(members) if BY_PROTOTYPE.contains(&claims.classes[number].by.as_str()) => {
                members.iter().eq(classes[number].union(&doubts.untold))
            }
            Some(members) => members.iter().eq(&classes[number]),
            // What reads the table of entries, or what is broken and named by rule 4.
            None => claims.classes[number].by == ALL,
        };
        if *known.entry((to, number)).or_insert_with(right) {
            proved += 1;
        } else {
            let what = format!(
                "lets through something other than class {number}, which the manifest claims"
            );
            findings.broken(Some(variant), Some(at), what);
        }
    }
    findings.proved("branches that let exactly their class through", proved);
    findings.proved("classes", classes.len() as u64);
    Ok(())
}

/// How many argument registers each entry reads at least. Of assembly, of the clones that a compiler makes and of what is
/// `doubted` nothing is known.
fn least_arities(
    kernel: &Kernel,
    entries: &BTreeSet<LinkVa>,
    doubted: &BTreeSet<LinkVa>,
) -> Result<BTreeMap<LinkVa, u8>, KernelError> {
    let declared = Btf::read(&kernel.vmlinux)?.least_arities();
    let mut known: BTreeMap<LinkVa, (Option<u8>, bool)> = BTreeMap::new();
    for symbol in kernel
        .symbols
        .iter()
        .filter(|symbol| entries.contains(&symbol.at))
    {
        let (least, clone) = known.entry(symbol.at).or_insert((None, true));
        *clone &= symbol.name.contains('.');
        let own = declared.get(symbol.name.as_bytes()).copied();
        *least = match (*least, own) {
            (Some(least), Some(own)) => Some(least.min(own)),
            (least, own) => least.or(own),
        };
    }
    let arity = |at: &LinkVa| match known.get(at) {
        Some((Some(least), false)) if !doubted.contains(at) => *least,
        _ => 0,
    };
    Ok(entries.iter().map(|at| (*at, arity(at))).collect())
}
