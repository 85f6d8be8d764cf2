//! Which indirect branches compare with which targets, by a profile.
//!
//! A compared target costs every branch that does not go there two instructions. So a target is promoted when it takes a fair
//! share of what is left after those before it, and few are.

use super::{Indirect, Text};
use crate::image::Image;
use crate::profile::{Branches, Resolved};
use penumbra_bundle::{LinkVa, TextOff};
use std::collections::BTreeMap;

/// At most so many comparisons stand before the indirect branch.
const MAX_TARGETS: usize = 3;
/// A target is compared with when it takes at least one in so many of the branches that get that far.
const SHARE: u64 = 4;

/// The indirect branches of one kernel that compare.
pub struct Promotion {
    /// The targets of each I slot, in the order of the slots, hottest first; most have none.
    pub of_slot: Vec<Vec<LinkVa>>,
    /// How many slots have none, by reason.
    pub left: BTreeMap<String, u64>,
    /// What there was in the profile.
    pub figures: BTreeMap<String, u64>,
}

const COLD: &str = "not-in-profile";
const FLAGS: &str = "flags-in-use";
const SPREAD: &str = "targets-too-many-or-not-in-text";

impl Promotion {
    /// Asks the profile about every I slot.
    pub fn find(image: &Image, text: &Text, profile: &Branches) -> Promotion {
        let Resolved {
            mut branches,
            unknown,
        } = profile.resolve(image);
        let mut promotion = Promotion {
            of_slot: Vec::with_capacity(text.slots.indirect.len()),
            left: text.slots.indirect_left.clone(),
            figures: BTreeMap::new(),
        };
        let total = |targets: &BTreeMap<LinkVa, u64>| targets.values().sum::<u64>();
        let all: u64 = branches.values().map(total).sum();
        let mut covered = 0;
        for slot in &text.slots.indirect {
            let counts = at_slot(text, slot, &mut branches);
            let (targets, reason) = match (counts.is_empty(), slot.scratch_free) {
                (true, _) => (Vec::new(), Some(COLD)),
                (_, false) => (Vec::new(), Some(FLAGS)),
                _ => {
                    let targets = hottest(text, &counts);
                    let reason = targets.is_empty().then_some(SPREAD);
                    (targets, reason)
                }
            };
            if let Some(reason) = reason {
                *promotion.left.entry(reason.to_owned()).or_default() += 1;
            }
            covered += targets.iter().map(|target| counts[target]).sum::<u64>();
            promotion.of_slot.push(targets);
        }
        let targets = promotion.of_slot.iter().map(|targets| targets.len() as u64);
        promotion.figures.extend([
            ("compared-targets".to_owned(), targets.sum()),
            ("profiled-branches".to_owned(), all),
            ("profiled-branches-compared".to_owned(), covered),
            (
                "profile-branches-at-no-slot".to_owned(),
                branches.len() as u64,
            ),
            ("profile-lines-unknown".to_owned(), unknown),
        ]);
        promotion
    }
}

/// Takes what the profile says of a slot, by its address or that of its opcode behind the prefix.
fn at_slot(
    text: &Text,
    slot: &Indirect,
    branches: &mut BTreeMap<LinkVa, BTreeMap<LinkVa, u64>>,
) -> BTreeMap<LinkVa, u64> {
    let opcode = TextOff(slot.at.0 + u32::from(slot.len) - 5);
    let mut counts = BTreeMap::new();
    for at in [slot.at, opcode] {
        for (target, count) in branches.remove(&text.va(at)).unwrap_or_default() {
            let known: &mut u64 = counts.entry(target).or_default();
            *known = known.saturating_add(count);
        }
    }
    counts
}

/// The targets worth a comparison. Only entries of the text are: anything else may be gone or be something else later.
fn hottest(text: &Text, counts: &BTreeMap<LinkVa, u64>) -> Vec<LinkVa> {
    let mut left: u64 = counts.values().sum();
    let is_entry = |target: LinkVa| {
        let at = text.span.offset(target);
        at.is_some_and(|at| text.entries.binary_search(&at).is_ok())
    };
    let mut known: Vec<(LinkVa, u64)> = counts
        .iter()
        .map(|(target, count)| (*target, *count))
        .filter(|(target, count)| *count > 0 && is_entry(*target))
        .collect();
    known.sort_by_key(|(target, count)| (std::cmp::Reverse(*count), *target));
    let mut targets = Vec::new();
    for (target, count) in known.into_iter().take(MAX_TARGETS) {
        if count < left.div_ceil(SHARE) {
            break;
        }
        left -= count;
        targets.push(target);
    }
    targets
}
