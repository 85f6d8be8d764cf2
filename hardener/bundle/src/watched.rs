//! What the manifest claims about functions whose calls are led through thunks.

use crate::TextOff;
use serde::{Deserialize, Serialize};

/// Functions by their first bytes. Each list is sorted.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Watched {
    /// Those outside a profile, which the pass `debloat` keeps from being entered.
    pub outside: Vec<TextOff>,
    /// Those that the pass `probe` reports.
    pub probed: Vec<TextOff>,
    /// Those that the pass `stack-depth` counts as having large frames.
    pub large: Vec<TextOff>,
}

impl Watched {
    /// Whether the addresses are sorted and inside a text of `len` bytes.
    pub(crate) fn is_sound(&self, len: usize) -> bool {
        let inside = |at: &TextOff| (at.0 as usize) < len;
        [&self.outside, &self.probed, &self.large]
            .into_iter()
            .all(|list| list.is_sorted_by(|a, b| a < b) && list.last().is_none_or(inside))
    }
}
