//! What the manifest claims about functions outside a profile.

use crate::TextOff;
use serde::{Deserialize, Serialize};

/// The functions that the pass `debloat` keeps from being entered, by their first bytes. Sorted.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Outside(pub Vec<TextOff>);

impl Outside {
    /// Whether the addresses are sorted and inside a text of `len` bytes.
    pub(crate) fn is_sound(&self, len: usize) -> bool {
        let inside = |at: &TextOff| (at.0 as usize) < len;
        self.0.is_sorted_by(|a, b| a < b) && self.0.last().is_none_or(inside)
    }

    /// Whether the function that starts at `at` is one.
    pub fn contains(&self, at: TextOff) -> bool {
        self.0.binary_search(&at).is_ok()
    }
}
