//! Slot edits: what a variant changes in the running text.

use crate::TextOff;
use serde::{Deserialize, Serialize};

/// Which kind of slot an edit replaces (design, invariant 3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SlotKind {
    /// C: a direct `call rel32`, 5 bytes.
    Call,
    /// R: a return site, 5 bytes.
    Return,
    /// I: a retpoline site, 5 bytes, or 6 with a CS prefix.
    Indirect,
}

/// One slot's new instruction: same start, same length as the slot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Edit {
    /// Where the slot starts.
    pub at: TextOff,
    /// What is replaced there.
    pub slot: SlotKind,
    /// The new bytes: 5 or 6, relative displacements only.
    pub bytes: Vec<u8>,
}

/// All edits of one variant, by address, none overlapping another.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Edits(pub Vec<Edit>);
