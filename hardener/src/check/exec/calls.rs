//! What a thunk decides by the call before a return address.
//!
//! A direct call names its callee: its last four bytes, added to the return address, give it. A thunk that compares them with a
//! constant asks whether they name one function, and the text says for which addresses they do. So a thunk that only asks
//! that, or whether the return address is a constant, and leaves all others to another thunk, is followed for the few addresses for which it has an answer; any other one
//! is followed for every address in the text.

use super::machine::Code;
use super::tree::{Ended, Leaf, Lookup, Node, NodeId, Tree, Wrong};
use std::collections::BTreeSet;

/// The text is mapped in whole pages; what fills the last one is nowhere to return to.
const PAGE: u64 = 0xfff;
/// No thunk looks further before its subject (see [`super::term::Arena::before_subject`]).
pub(super) const MOST_BEFORE: u64 = 8;

/// Addresses by what the four bytes before them name, both as offsets from the text's start.
#[derive(Default)]
pub struct Named(Vec<(u32, u32)>);

impl Named {
    /// Finds all addresses in `text` before which one of `wanted` (offsets, ascending) is named, whatever instruction does it.
    pub fn find(text: &[u8], wanted: &[u32]) -> Named {
        // A bit for each place: that much fits into a cache.
        let mut is_wanted = vec![0u64; text.len() / 64 + 1];
        for at in wanted.iter().filter(|at| (**at as usize) < text.len()) {
            is_wanted[*at as usize / 64] |= 1 << (at % 64);
        }
        let mut named = Vec::new();
        for (at, bytes) in text.windows(4).enumerate() {
            let after = at as u32 + 4;
            let displacement = i32::from_le_bytes(bytes.try_into().expect("4 bytes"));
            let to = after.wrapping_add_signed(displacement);
            let word = is_wanted.get(to as usize / 64);
            if word.is_some_and(|word| word >> (to % 64) & 1 == 1) {
                named.push((to, after));
            }
        }
        named.sort_unstable();
        Named(named)
    }

    fn after(&self, callee: u32) -> impl Iterator<Item = u32> {
        let from = self.0.partition_point(|(to, _)| *to < callee);
        let found = self.0[from..].iter();
        found
            .take_while(move |(to, _)| *to == callee)
            .map(|(_, after)| *after)
    }
}

/// What a thunk does.
#[derive(PartialEq, Eq, Debug)]
pub enum Decides {
    /// It has an answer for some subjects, ascending; all others it leaves to the thunk at an address.
    Some {
        /// Those that pass.
        passed: Vec<u64>,
        /// Those that it stops.
        stopped: Vec<u64>,
        /// The callees with which it compares, modulo 2^32.
        names: Vec<u32>,
        /// Where all others go, and some of those with a name.
        others: u64,
    },
    /// Every subject in the text was followed.
    Each(Ended),
}

impl Decides {
    /// The same with the kernel where it was linked; it was followed at `slide`.
    pub fn moved(mut self, slide: u64) -> Decides {
        match &mut self {
            Decides::Some {
                passed,
                stopped,
                names,
                others,
            } => {
                for name in names {
                    *name = name.wrapping_sub(slide as u32);
                }
                let all = passed.iter_mut().chain(stopped);
                all.for_each(|at| *at = at.wrapping_sub(slide));
                *others = others.wrapping_sub(slide);
            }
            Decides::Each(ended) => {
                let all = ended.passed.iter_mut();
                all.for_each(|at| *at = at.wrapping_sub(slide));
                for (to, at) in &mut ended.handed_over {
                    (*to, *at) = (to.wrapping_sub(slide), at.wrapping_sub(slide));
                }
                let leaves_to = ended.leaves_to.iter();
                ended.leaves_to = leaves_to.map(|to| to.wrapping_sub(slide)).collect();
            }
        }
        self
    }
}

impl Tree {
    /// How the subjects from `low` to `high` end, both inside: all that pass, and of those that it leaves to others the members of
    /// tables; nobody else is let through there.
    fn evaluate_told(
        &self,
        code: &Code<'_>,
        tables: &[Lookup<'_>],
        (low, high): (u64, u64),
        seen: &mut BTreeSet<usize>,
    ) -> Result<Ended, Wrong> {
        let Some(Ok(mut subjects)) = self.concerned(code, tables, (low, high), true) else {
            return self.evaluate(code, tables, low, high, seen);
        };
        let members = tables.iter().flat_map(|table| table.members).copied();
        subjects.extend(members.filter(|at| (low..=high).contains(at)));
        subjects.sort_unstable();
        subjects.dedup();
        self.evaluate_each(code, tables, &subjects, seen)
    }

    /// The addresses with which it compares what a call names, modulo 2^32, and others that are like these to it.
    pub fn names(&self) -> impl Iterator<Item = u32> {
        self.names.values().flat_map(|name| name.each())
    }

    /// Where all subjects end before which none of [`Tree::names`] is named and that are none of those compared with, when that
    /// is one place.
    fn end_of_others(&self, at: NodeId) -> Option<Leaf> {
        match &self.nodes[at.0] {
            Node::Leaf(leaf, _) => Some(*leaf),
            Node::Touch { next, .. } => self.end_of_others(*next),
            Node::Branch { cond, no, .. }
                if self.names.contains_key(cond) || self.exact.contains_key(cond) =>
            {
                self.end_of_others(*no)
            }
            Node::Branch { cond, yes, no } if self.asks_table(*cond) => {
                self.end_of_others(self.when_no_word_is_meant(*cond, *yes, *no)?)
            }
            Node::Branch { yes, no, .. } => {
                let (yes, no) = (self.end_of_others(*yes)?, self.end_of_others(*no)?);
                (yes == no).then_some(yes)
            }
        }
    }

    /// Follows the thunk for the subjects in the text; which tables it reads.
    pub fn follow(
        &self,
        code: &Code<'_>,
        tables: &[Lookup<'_>],
        named: &Named,
        seen: &mut BTreeSet<usize>,
    ) -> Result<Decides, Wrong> {
        let (start, text) = code.text;
        let last = start + text.len() as u64 - 1;
        // What lies outside the text is nobody's: it passes, or the next thunk passes it.
        for node in &self.nodes {
            if let Node::Leaf(Leaf::Trap, subjects) = node {
                let hull = subjects.hull();
                if let Some((low, _)) =
                    hull.filter(|(low, high)| *low < start || *high > last | PAGE)
                {
                    return Err(Wrong::Unbounded(low));
                }
            }
        }
        let Some(Leaf::HandOver(others)) = self.end_of_others(self.root) else {
            return self.follow_each(code, tables, (start, last), seen);
        };
        let meant = match self.reads_tables() {
            true => match self.concerned(code, tables, (start, last), true) {
                Some(meant) => meant?,
                None => return self.follow_each(code, tables, (start, last), seen),
            },
            false => Vec::new(),
        };
        let inside = |at: &u64| (start..=last).contains(at);
        let mut subjects: Vec<u64> = self.exact.values().copied().filter(inside).collect();
        for name in self.names() {
            let after = named.after(name.wrapping_sub(start as u32));
            subjects.extend(after.map(|after| start + u64::from(after)));
        }
        subjects.extend(meant);
        subjects.sort_unstable();
        subjects.dedup();
        let ended = self.evaluate_each(code, tables, &subjects, seen)?;
        let handed: BTreeSet<u64> = ended
            .handed_over
            .iter()
            .map(|(_, subject)| *subject)
            .collect();
        if let Some((_, stray)) = ended.handed_over.iter().find(|(to, _)| *to != others) {
            return Err(Wrong::Passes(*stray));
        }
        subjects.retain(|subject| {
            ended.passed.binary_search(subject).is_err() && !handed.contains(subject)
        });
        let mut names: Vec<u32> = self.names.values().map(|name| name.called()).collect();
        names.sort_unstable();
        Ok(Decides::Some {
            passed: ended.passed,
            stopped: subjects,
            names,
            others,
        })
    }

    /// The same, with every subject from `low` to `high`, both inside.
    fn follow_each(
        &self,
        code: &Code<'_>,
        tables: &[Lookup<'_>],
        (low, high): (u64, u64),
        seen: &mut BTreeSet<usize>,
    ) -> Result<Decides, Wrong> {
        let mut ended = self.evaluate_told(code, tables, (low, high), seen)?;
        // What stands before an address in the cave is the thunks' own and moves with the slide. Who is left to another
        // thunk there is no member of its tables.
        let cave = code.start..=code.start + code.bytes.len() as u64 + MOST_BEFORE;
        ended.handed_over.retain(|(_, at)| !cave.contains(at));
        ended
            .leaves_to
            .extend(self.nodes.iter().filter_map(|node| match node {
                Node::Leaf(Leaf::HandOver(to), _) => Some(*to),
                _ => None,
            }));
        Ok(Decides::Each(ended))
    }

    /// Whether it reads anything but what stands before its subject.
    fn reads_tables(&self) -> bool {
        self.nodes
            .iter()
            .any(|node| matches!(node, Node::Branch { cond, .. } if self.asks_table(*cond)))
    }
}
