//! Verdicts that were reached before: proving a decision takes seconds, and bundles of one kernel decide mostly alike.

use super::machine::Code;
use super::tree::{Lookup, Tree, Wrong};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::sync::Mutex;

/// The tables that a decision asks, or what is wrong with it.
pub type Decided = Result<BTreeSet<usize>, Wrong>;

/// What a verdict rests on beside the decision: where the tables are, what they hold and cover.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Basis([u8; 32]);

impl Basis {
    /// Of the tables as they lie in the cave.
    pub fn of(code: &Code<'_>, tables: &[Lookup<'_>]) -> Basis {
        let mut digest = Sha256::new();
        let mut number = |value: u64| digest.update(value.to_le_bytes());
        number(code.start);
        number(code.bytes.len() as u64);
        for table in tables {
            let (low, high) = table.place;
            for value in [low, high, table.covers.0, table.covers.1] {
                number(value);
            }
            number(table.members.len() as u64);
            table.members.iter().copied().for_each(&mut number);
            // What is read of the table, word by word; a rest of less is read with what follows it.
            for at in (low..high.saturating_add(8)).step_by(8) {
                number(code.load(at, 8).unwrap_or(0));
            }
        }
        Basis(digest.finalize().into())
    }
}

/// Verdicts by basis and decision.
#[derive(Default)]
pub struct Memo(Mutex<Vec<(Basis, Tree, Decided)>>);

impl Memo {
    /// The verdict on `tree`, reached now or before.
    pub fn decide(&self, basis: Basis, tree: &Tree, decide: impl FnOnce() -> Decided) -> Decided {
        let same = |(known, other, _): &&(Basis, Tree, Decided)| *known == basis && other == tree;
        let found = |known: &[_]| known.iter().find(same).map(|(.., decided)| decided.clone());
        let lock = || self.0.lock().unwrap_or_else(|broken| broken.into_inner());
        if let Some(decided) = found(&lock()) {
            return decided;
        }
        let decided = decide();
        lock().push((basis, tree.clone(), decided.clone()));
        decided
    }
}
