//! What the hardener writes for one kernel image, and what the signer attests and the installer maps.
//!
//! A bundle is a directory:
//!
//! | file | holds |
//! |---|---|
//! | `manifest.json` | [`Manifest`]: the kernel, the cave, the variants, and the digest of every other file |
//! | `text.bin` | the kernel's text as in the image file, before relocation: `[text.start, text.end)` |
//! | `model.postcard` | [`RunTimeModel`]: every edit that the kernel itself may make to that text |
//! | `symbols.postcard` | [`Symbols`]: text symbols by address |
//! | `cave.elf` | thunks and tables at their link addresses; read it with `objdump -d` |
//! | `relocations.postcard` | a list of [`Reloc`]: the absolute addresses in the cave |
//! | `VARIANT.edits` | [`Edits`]: the slots that a variant replaces |
//! | `forward.postcard` | [`ForwardSets`], when a variant checks indirect branches by class |
//! | `backward.postcard` | [`BackwardSets`], when a variant checks returns by class besides |
//! | `watched.postcard` | [`Watched`], when a variant leads the calls of some functions through thunks |
//! | `modules.postcard` | a list of [`Module`], when the bundle has modules |
//! | `statement.dsse.json` | the signer's envelope; not part of what it signs |
//!
//! Addresses are link-time ones: the installer adds the guest's KASLR slide. Everything a slot edit holds is relative,
//! so edits need no relocation; the cave lists its own.
//!
//! This crate trusts no input: a bundle that is read has every digest, range and order checked, or is refused whole.
#![forbid(unsafe_code)]

mod addr;
mod backward;
mod edits;
mod forward;
mod hashed_bytes;
mod io;
mod manifest;
mod memory;
mod model;
mod module;
mod watched;

pub use addr::{LinkVa, TextOff, VaRange};
pub use backward::{BackwardFunction, BackwardSets};
pub use edits::{Edit, Edits, SlotKind};
pub use forward::{ForwardClass, ForwardDoubt, ForwardSets, ForwardSite};
pub use hashed_bytes::HashedBytes;
pub use io::{Bundle, ENVELOPE, MANIFEST, ReadError, WriteError};
pub use manifest::{
    Cave, FileRef, Kernel, Manifest, Mitigation, ModuleName, ModuleSet, Offending, PassSummary,
    Reloc, RelocKind, SCHEMA, Table, TableKind, Text, Trap, Variant, ViolationAction,
};
pub use memory::{Memory, PerMemory, Place, Placement};
pub use model::{Form, RunTimeModel, Site, SiteKind, Symbol, Symbols};
pub use module::{
    Export, FormReloc, Module, ModuleEdit, ModuleReloc, ModuleRelocKind, ModuleSection, Put,
    RelocateError, Target,
};
pub use watched::Watched;
