//! How the text that runs may differ from the text in the file (design, invariant 5).
//!
//! The hardener derives the model from the image's own tables; the installer applies it byte by byte and refuses a guest
//! whose text holds a difference that no [`Site`] explains.

use crate::TextOff;
use serde::{Deserialize, Serialize};

/// Every edit that the kernel itself may make to its text, from boot on.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RunTimeModel {
    /// Where a 32-bit sign-extended absolute address stands: the slide is added. Sorted.
    pub abs32: Vec<TextOff>,
    /// Where a 32-bit offset to zero-based per-cpu data stands: the slide is subtracted. Sorted.
    pub inverse32: Vec<TextOff>,
    /// Where a 64-bit absolute address stands: the slide is added. Sorted.
    pub abs64: Vec<TextOff>,
    /// Poke sites by start; several may start at one place or overlap (an alternative over a paravirt call).
    pub sites: Vec<Site>,
    /// Function entries: what [`Form::Call`] and [`Form::Jump`] may reach. Sorted.
    pub functions: Vec<TextOff>,
    /// The return thunks that a return site may jump to. Sorted.
    pub return_thunks: Vec<TextOff>,
}

/// A place that the kernel rewrites, with all it may hold beside what the file has there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Site {
    /// Where it starts.
    pub at: TextOff,
    /// How many bytes the kernel rewrites there.
    pub len: u8,
    /// Which table describes it.
    pub kind: SiteKind,
    /// What it may hold; the file's own bytes (relocated) are always allowed and not listed.
    pub forms: Vec<Form>,
}

impl Site {
    /// Whether it has a length and every exact form has the same, with its relocated fields inside.
    pub(crate) fn has_sound_forms(&self) -> bool {
        let len = usize::from(self.len);
        let sound = |form: &Form| match form {
            Form::Exact {
                bytes,
                abs32,
                inverse32,
            } => {
                let mut fields = abs32.iter().chain(inverse32);
                bytes.len() == len && fields.all(|at| usize::from(*at) + 4 <= len)
            }
            Form::KernelPointer => len == 8,
            Form::Shift => len == 1,
            _ => true,
        };
        len > 0 && self.forms.iter().all(sound)
    }
}

/// The table that a poke site comes from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SiteKind {
    /// `.altinstructions`.
    Alternative,
    /// `.parainstructions`, and the alternatives that took their place in Linux 6.8.
    Paravirt,
    /// `.retpoline_sites`; a form other than the file's means that retpolines are off.
    Retpoline,
    /// `.return_sites`.
    Return,
    /// `__mcount_loc`: the call to `__fentry__`.
    Fentry,
    /// `__jump_table`.
    JumpLabel,
    /// `.static_call_sites`.
    StaticCall,
    /// A `__SCT__` trampoline.
    StaticCallTrampoline,
    /// `.smp_locks`.
    SmpLock,
    /// Any other place that the image's tables name; the manifest of the pass says which.
    Other,
    /// `runtime_ptr_*`, `runtime_shift_*`: a value inside an instruction, written once at boot.
    RuntimeConstant,
}

/// One thing that a site may hold. A form covers the site's whole length.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Form {
    /// Exactly these bytes, before relocation: as many as the site is long.
    Exact {
        /// The bytes.
        bytes: Vec<u8>,
        /// Offsets in `bytes` of 32-bit sign-extended absolute addresses: the slide is added.
        abs32: Vec<u8>,
        /// Offsets in `bytes` of 32-bit offsets to zero-based per-cpu data: the slide is subtracted.
        inverse32: Vec<u8>,
    },
    /// `call rel32` to one of [`RunTimeModel::functions`], then canonical NOPs.
    Call,
    /// `jmp rel32` to one of [`RunTimeModel::functions`], then canonical NOPs or INT3s.
    Jump,
    /// `call rel32` to anywhere: a tracer's trampoline may lie outside the text.
    CallAnywhere,
    /// `jmp rel32` to one of [`RunTimeModel::return_thunks`].
    JumpReturnThunk,
    /// `jmp rel32` to anywhere: a return thunk that the kernel allocated itself (ITS).
    JumpAnywhere,
    /// Canonical NOPs (SDM volume 2, NOP) that fill the site, however split.
    Nops,
    /// Eight bytes: an address in the kernel's half of the address space, of data that the kernel allocated.
    KernelPointer,
    /// One byte: how far a 32-bit value is shifted.
    Shift,
}

/// A named address in the text.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Symbol {
    /// Where it points.
    pub at: TextOff,
    /// Its name; names repeat (static functions of one name).
    pub name: String,
}

/// Text symbols by address, then name.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Symbols(pub Vec<Symbol>);

impl Symbols {
    /// The last symbol at or before `at`, and how many bytes `at` lies behind it.
    pub fn lookup(&self, at: TextOff) -> Option<(&str, u32)> {
        let after = self.0.partition_point(|symbol| symbol.at <= at);
        let symbol = self.0[..after].last()?;
        Some((&symbol.name, at.0 - symbol.at.0))
    }
}
