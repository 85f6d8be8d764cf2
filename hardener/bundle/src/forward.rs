//! What the manifest claims about indirect branches: which entries each may reach.

use crate::TextOff;
use serde::{Deserialize, Serialize};

/// All indirect branches that a variant checks against a class.
///
/// Code outside the kernel's text (modules, BPF programs, trampolines) is not spoken of: every class lets it through.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ForwardSets {
    /// The classes.
    pub classes: Vec<ForwardClass>,
    /// The branches, by address.
    pub sites: Vec<ForwardSite>,
    /// Entries of which BTF may have another function's prototype, by address. Those that are not told every branch by
    /// prototype lets through, besides its class.
    pub doubts: Vec<ForwardDoubt>,
    /// Calls and jumps by a pointer that the kernel makes direct ones (paravirt and static calls), by address. Nothing checks them;
    /// what they reach returns behind them.
    pub patched: Vec<ForwardSite>,
}

/// An entry of which BTF may have another function's prototype.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ForwardDoubt {
    /// The entry.
    pub at: TextOff,
    /// Why: `name` (BTF has fewer prototypes than there are functions of its name), `place` (it is put where something else is
    /// declared) or `code` (its code does what its prototype forbids).
    pub by: String,
    /// Whether all places where its address is put say as what it is called; it is in the classes of these.
    pub told: bool,
}

/// What some indirect branches may reach in the kernel's text.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ForwardClass {
    /// What decides it: `prototype` (of one prototype), `prototypes` (of several), `functions` (by address), `arity-N` (at most
    /// N argument registers are read, as far as is known) or `address-taken` (all).
    pub by: String,
    /// The entries. Sorted.
    pub entries: Vec<TextOff>,
}

/// An indirect branch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ForwardSite {
    /// Where it stands.
    pub at: TextOff,
    /// Its class: an index into [`ForwardSets::classes`].
    pub class: u32,
}

impl ForwardSets {
    /// Whether indices are in range, and addresses sorted and inside a text of `len` bytes.
    pub(crate) fn is_sound(&self, len: usize) -> bool {
        let inside = |at: &TextOff| (at.0 as usize) < len;
        let classes = self.classes.iter().all(|class| {
            class.entries.is_sorted_by(|a, b| a < b) && class.entries.last().is_none_or(inside)
        });
        let sorted = |sites: &[ForwardSite]| {
            sites.is_sorted_by(|a, b| a.at < b.at)
                && sites.last().is_none_or(|site| inside(&site.at))
        };
        let sites = sorted(&self.sites) && sorted(&self.patched);
        let all = self.sites.iter().chain(&self.patched);
        let mut indices = all.map(|site| site.class as usize);
        let doubts = self.doubts.is_sorted_by(|a, b| a.at < b.at)
            && self.doubts.last().is_none_or(|doubt| inside(&doubt.at));
        classes && sites && doubts && indices.all(|class| class < self.classes.len())
    }

    /// The class of the branch at `at`.
    pub fn class_at(&self, at: TextOff) -> Option<&ForwardClass> {
        let index = self.sites.binary_search_by_key(&at, |site| site.at).ok()?;
        Some(&self.classes[self.sites[index].class as usize])
    }
}
