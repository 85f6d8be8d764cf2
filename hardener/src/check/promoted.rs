//! Rule 4 for indirect branches that compare first: whatever the target is, that is where they go.
//!
//! A thunk that is named so owes its slots this: all registers but the scratch one, no report, and an end that is either the
//! plain branch through the slot's own register or a direct jump that only one target takes: the address it goes to. Such a
//! slot has no retpoline any more, so its variant must have the pass and say what it drops.

use super::Subject;
use super::exec::tree::{Leaf, Node, Tree};
use super::report::Findings;
use super::sets::Legal;
use penumbra_bundle::{LinkVa, Mitigation};
use std::collections::BTreeMap;

/// How thunks are named that claim to be such.
pub const PREFIX: &str = "promote_";
const PASS: &str = "promote";

/// The slots of each variant that compare.
pub struct Promoted<'a> {
    subject: &'a Subject<'a>,
    slots: BTreeMap<&'a str, u64>,
}

impl<'a> Promoted<'a> {
    /// None yet.
    pub fn of(subject: &'a Subject<'a>) -> Promoted<'a> {
        Promoted {
            subject,
            slots: BTreeMap::new(),
        }
    }

    /// A slot that goes to such a thunk.
    pub fn slot(&mut self, variant: &'a str) {
        *self.slots.entry(variant).or_default() += 1;
    }

    /// Compares the manifest with the slots.
    pub fn check(&self, findings: &mut Findings<'_>) {
        for (variant, _) in self.subject.variants() {
            let found = self.slots.get(variant.name.as_str()).copied();
            let pass = variant.passes.iter().find(|pass| pass.name == PASS);
            let said = pass.map(|pass| pass.edited);
            if found.unwrap_or(0) != said.unwrap_or(0) || found.is_some() && said.is_none() {
                let (found, said) = (found.unwrap_or(0), said.unwrap_or(0));
                let what = format!(
                    "{found} indirect branches compare with targets, pass {PASS} says {said}"
                );
                findings.broken(Some(&variant.name), None, what);
            }
            if found.is_some() && !variant.drops.contains(&Mitigation::Retpoline) {
                let what = format!("pass {PASS} drops the retpoline, the manifest does not say so");
                findings.broken(Some(&variant.name), None, what);
            }
            findings.proved("branches that compare first", found.unwrap_or(0));
        }
    }
}

/// The targets with which a thunk compares; or what it does that none of these may do.
pub fn targets(tree: &Tree) -> Result<Vec<u64>, String> {
    let mut targets = Vec::new();
    for node in &tree.nodes {
        match node {
            Node::Leaf(Leaf::Pass, subjects) => match subjects.spans() {
                [(low, high)] if low == high => targets.push(*low),
                _ => {}
            },
            Node::Leaf(Leaf::Trap, _) => return Err("stops a target".to_owned()),
            Node::Leaf(Leaf::HandOver(_), _) => {
                return Err("leaves a target to another thunk".to_owned());
            }
            Node::Touch { .. } => return Err("reads memory".to_owned()),
            Node::Branch { .. } => {}
        }
    }
    targets.sort_unstable();
    targets.dedup();
    Ok(targets)
}

/// Proves that all those targets are entries.
pub fn are_entries(
    promoted: &BTreeMap<LinkVa, Vec<LinkVa>>,
    entries: &Legal,
    findings: &mut Findings<'_>,
) {
    for (thunk, targets) in promoted {
        for target in targets {
            if entries.required.contains(target) || entries.optional.contains(target) {
                findings.proved("compared targets that are entries", 1);
            } else {
                let what = "a branch compares with it, but it is no entry".to_owned();
                findings.broken(None, Some(*target), what);
            }
        }
        if targets.is_empty() {
            let what = "the thunk compares with no target".to_owned();
            findings.broken(None, Some(*thunk), what);
        }
    }
}
