//! The manifest: what a bundle is for and what is in it, in JSON that an auditor can read.

use crate::{LinkVa, TextOff, VaRange};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The only schema that this version reads and writes.
pub const SCHEMA: &str = "penumbra.bundle/v1";

/// `manifest.json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: String,
    /// Program and version that wrote the bundle.
    pub generator: String,
    /// The kernel that the bundle is for.
    pub kernel: Kernel,
    /// The kernel's text as in the file.
    pub text: Text,
    /// The [`crate::RunTimeModel`].
    pub model: FileRef,
    /// The [`crate::Symbols`].
    pub symbols: FileRef,
    /// Thunks and tables, shared by all variants.
    pub cave: Cave,
    /// The variants; `stock` first, which edits no return and no indirect branch.
    pub variants: Vec<Variant>,
    /// What indirect branches may reach, when they are checked by class: the [`crate::ForwardSets`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forward: Option<FileRef>,
    /// Behind which indirect calls functions may return, when that is checked by class: the [`crate::BackwardSets`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backward: Option<FileRef>,
    /// Functions whose calls are led through thunks, when a variant does so: the [`crate::Watched`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watched: Option<FileRef>,
    /// Modules whose text has views too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<ModuleSet>,
    /// Byte offsets of structure members, from the image's BTF: `task_struct.mm` to 0x8b0 and the like.
    pub layout: BTreeMap<String, u32>,
    /// Data symbols that the installer needs: `init_task`, `poking_mm`, `poking_addr` and the like.
    pub data: BTreeMap<String, LinkVa>,
}

/// The modules of a bundle.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleSet {
    /// All of them: a list of [`crate::Module`].
    pub file: FileRef,
    /// Which, by name.
    pub modules: Vec<ModuleName>,
}

/// Names one build of a module.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleName {
    /// Its name.
    pub name: String,
    /// Its GNU build-id, in hexadecimal.
    pub build_id: String,
}

/// Names one kernel build.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// The GNU build-id note's payload, in hexadecimal.
    pub build_id: String,
    /// `uname -r`.
    pub release: String,
    /// The `linux_banner`.
    pub banner: String,
    /// SHA-256 of the image file that was read (`vmlinuz` or `vmlinux`), in hexadecimal.
    pub image_sha256: String,
    /// Where the notes stand in the running kernel's memory, build-id among them.
    pub notes: VaRange,
    /// What LSTAR holds, less the slide: the address of `entry_SYSCALL_64`.
    pub syscall_entry: LinkVa,
}

/// The text that is read, explained and mapped.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Text {
    /// First byte; page-aligned.
    pub start: LinkVa,
    /// First byte after; page-aligned.
    pub end: LinkVa,
    /// Its bytes in the image file.
    pub file: FileRef,
}

impl Text {
    /// The text as a range.
    pub fn range(&self) -> VaRange {
        VaRange {
            start: self.start,
            end: self.end,
        }
    }
}

/// A file of the bundle.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRef {
    /// Its name: one path component.
    pub name: String,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
}

/// Filler bytes inside the text that no code uses, and what the bundle puts there.
///
/// `cave.elf` is an `ET_EXEC` ELF file whose loadable sections (`.thunks`, executable; `.tables`) lie inside the range
/// and whose symbol table names every thunk and table.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cave {
    /// The filler that may be used: every byte of it is `filler` in the file.
    pub range: VaRange,
    /// The filler byte (INT3 in Linux).
    pub filler: u8,
    /// `cave.elf`.
    pub file: FileRef,
    /// Absolute addresses inside thunks and tables: a list of [`Reloc`].
    pub relocs: FileRef,
    /// Where a thunk ends by returning: 5 bytes each, `jmp __x86_return_thunk` as a return site has it in the file. The
    /// installer writes there what the kernel chose for its own return sites at boot. Sorted.
    pub return_tails: Vec<LinkVa>,
    /// The tables, by address.
    pub tables: Vec<Table>,
    /// Where thunks report what they stop. Sorted.
    pub traps: Vec<Trap>,
}

impl Cave {
    /// The traps in `range`, by address.
    pub fn traps_in(&self, range: VaRange) -> &[Trap] {
        let before = |end: LinkVa| self.traps.partition_point(|trap| trap.at < end);
        &self.traps[before(range.start)..before(range.end)]
    }

    /// The trap at `at`.
    pub fn trap_at(&self, at: LinkVa) -> Option<&Trap> {
        let index = self.traps.binary_search_by_key(&at, |trap| trap.at).ok()?;
        Some(&self.traps[index])
    }
}

/// Where a thunk reports what it stops: `out %al,$0xe4` when it then goes on, `out %al,$0xe5` when it does not.
///
/// RSP and every register that the thunk must keep are there as at its entry, so the word at RSP is the return address of a
/// slot that called the thunk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trap {
    /// The `out` instruction, 2 bytes.
    pub at: LinkVa,
    /// The pass whose thunk it is.
    pub pass: String,
    /// Where the value stands that the thunk does not accept.
    pub offending: Offending,
    /// What follows.
    pub action: ViolationAction,
}

/// Where a value stands when a thunk reports it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Offending {
    /// In the general register of this number (rax 0 to r15 15).
    Register(u8),
    /// In the word of this index at RSP: 0 is the word that RSP points to.
    Stack(u32),
}

/// What a thunk does about a value that it does not accept, once it has reported it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ViolationAction {
    /// An invalid instruction that is in no bug table: the kernel ends the task.
    #[default]
    Kill,
    /// Goes on as the slot would have.
    Log,
    /// The kernel's own `panic`.
    Panic,
}

impl ViolationAction {
    /// Its name in recipes and manifests.
    pub fn name(self) -> &'static str {
        match self {
            ViolationAction::Kill => "kill",
            ViolationAction::Log => "log",
            ViolationAction::Panic => "panic",
        }
    }

    /// Whether the reporting code is not gone on with.
    pub fn is_fatal(self) -> bool {
        self != ViolationAction::Log
    }
}

/// An absolute address in the cave.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Reloc {
    /// Where it stands.
    pub at: TextOff,
    /// How the slide enters.
    pub kind: RelocKind,
}

/// How an absolute address is relocated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RelocKind {
    /// 32-bit sign-extended; the slide is added.
    Abs32,
    /// 32-bit zero-based per-cpu offset relative to the instruction pointer; the slide is subtracted.
    Inverse32,
    /// 64-bit; the slide is added.
    Abs64,
}

impl RelocKind {
    /// How many bytes the address has.
    pub fn width(self) -> usize {
        match self {
            RelocKind::Abs32 | RelocKind::Inverse32 => 4,
            RelocKind::Abs64 => 8,
        }
    }
}

/// A set of addresses, encoded for thunks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Its symbol in `cave.elf`.
    pub name: String,
    /// What it is.
    pub kind: TableKind,
    /// Where it lies in the cave.
    pub range: VaRange,
    /// The addresses that it speaks about; all others are outside the set or let through, as the thunk says.
    pub covers: VaRange,
    /// Addresses in the set.
    pub count: u64,
}

/// How a set of addresses is encoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "encoding")]
pub enum TableKind {
    /// Bit `n` (of byte `n / 8`, least significant first) stands for `covers.start + n * granule`.
    Bitmap {
        /// Bytes of address space for each bit.
        granule: u32,
    },
    /// Sorted little-endian 32-bit offsets from `covers.start`.
    SortedOffsets,
    /// The low bytes of offsets from `covers.start`, each at one of the places that its hashes give ([`crate::HashedBytes`]);
    /// elsewhere bytes that say offsets past `covers`.
    HashedBytes {
        /// How many bits an offset may have.
        offset_bits: u32,
    },
    /// Little-endian 32-bit offsets from `covers.start`, each at one of the places that its hashes give; 0xffffffff elsewhere.
    HashedOffsets,
    /// Little-endian 32-bit words, each at one of the places that its hashes give; 0xffffffff elsewhere. A word stands for one
    /// member of one class: the low bits are its offset from `covers.start`, those above the number of the class.
    HashedClasses {
        /// How many bits the offset has.
        offset_bits: u32,
    },
    /// Little-endian 32-bit words, each at one of the places that its hashes give; 0xffffffff elsewhere. The low 3 bits are
    /// how many argument registers an entry reads at least, those above its offset from `covers.start`.
    HashedArities,
}

/// One variant of the text.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Its name, as policies use it.
    pub name: String,
    /// The passes that made it, in order.
    pub passes: Vec<PassSummary>,
    /// Speculation mitigations that the variant leaves out: Xen then issues a branch-predictor barrier on entry.
    pub drops: Vec<Mitigation>,
    /// The [`crate::Edits`].
    pub edits: FileRef,
    /// How many slots it edits.
    pub edit_count: u64,
}

/// What one pass did in a variant.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PassSummary {
    /// The pass's name, as in the design.
    pub name: String,
    /// Slots that it edited.
    pub edited: u64,
    /// Slots of its kind that it left alone, by reason.
    pub left: BTreeMap<String, u64>,
    /// Its parameters, as the recipe set them or by default: `on-violation` to `kill`.
    pub parameters: BTreeMap<String, String>,
    /// What it measured on this kernel, sizes of sets mostly.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub figures: BTreeMap<String, u64>,
}

/// A speculation mitigation that a variant can leave out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mitigation {
    /// Indirect branches through thunks (Spectre v2).
    Retpoline,
    /// Returns through thunks (Retbleed, SRSO, ITS).
    ReturnThunk,
}
