//! What the manifest claims about returns: behind which indirect calls each function may return.

use crate::TextOff;
use serde::{Deserialize, Serialize};

/// Where indirect calls return to, by what they may reach, when a variant checks returns by function and indirect branches by class.
///
/// Code outside the kernel's text (modules, BPF programs, trampolines) is not spoken of: every class lets it through.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct BackwardSets {
    /// Where any function returns to that an indirect call may reach: of these calls too little is known. Sorted.
    pub any: Vec<TextOff>,
    /// The classes: where some functions return to besides. Each sorted.
    pub classes: Vec<Vec<TextOff>>,
    /// The functions that are in a class, by address.
    pub functions: Vec<BackwardFunction>,
}

/// A function whose returns are in a class.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BackwardFunction {
    /// Its first byte.
    pub at: TextOff,
    /// Its class: an index into [`BackwardSets::classes`].
    pub class: u32,
}

impl BackwardSets {
    /// Whether indices are in range, and addresses sorted and inside a text of `len` bytes.
    pub(crate) fn is_sound(&self, len: usize) -> bool {
        let inside = |at: &TextOff| (at.0 as usize) < len;
        let mut lists = self.classes.iter().chain([&self.any]);
        let functions = self.functions.is_sorted_by(|a, b| a.at < b.at)
            && self.functions.last().is_none_or(|last| inside(&last.at));
        let mut indices = self
            .functions
            .iter()
            .map(|function| function.class as usize);
        functions
            && indices.all(|class| class < self.classes.len())
            && lists.all(|list| list.is_sorted_by(|a, b| a < b) && list.last().is_none_or(inside))
    }

    /// The class of the function that starts at `at`, if it is in one.
    pub fn class_of(&self, at: TextOff) -> Option<u32> {
        let index = self
            .functions
            .binary_search_by_key(&at, |function| function.at);
        index.ok().map(|index| self.functions[index].class)
    }
}
