//! Loadable modules: what the hardener knows about a `.ko` file, so that the installer can recognise the module in a guest,
//! explain its text and give it views.
//!
//! Offsets ([`TextOff`]) count from where the memory that holds its code starts ([`Memory::Text`]). Nothing here is
//! absolute: a guest puts a module anywhere, so relocations and edits name what they point to, and
//! [`Module::relocated`] and [`ModuleEdit::bytes`] make bytes of them for one [`Placement`].

use crate::{LinkVa, Memory, PerMemory, Place, Placement, Site, SlotKind, Symbol, TextOff};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// One module.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Module {
    /// Its name in the kernel: `module.name`.
    pub name: String,
    /// Its GNU build-id, in hexadecimal: the note `.note.gnu.build-id`.
    pub build_id: String,
    /// `srcversion`, when the kernel's build made one.
    pub srcversion: Option<String>,
    /// `vermagic`: kernel release and options.
    pub vermagic: String,
    /// SHA-256 of the file that was read, in hexadecimal.
    pub file_sha256: String,
    /// The sections that the loader allocates, in the file's order.
    pub sections: Vec<ModuleSection>,
    /// Bytes of [`Memory::Text`] that hold code: whole pages.
    pub text_size: u32,
    /// Bytes that the sections take of each memory; the loader fills the last page, and adds symbols.
    pub sizes: PerMemory<u32>,
    /// The code as in the file, before relocation: [`Module::text_size`] bytes, zeros between and behind the sections.
    pub text: Vec<u8>,
    /// What relocations point to.
    pub targets: Vec<Target>,
    /// The relocations of the text, by address.
    pub relocs: Vec<ModuleReloc>,
    /// What the kernel itself may edit, as in [`crate::RunTimeModel::sites`]. [`crate::Form::Call`],
    /// [`crate::Form::Jump`] and [`crate::Form::JumpReturnThunk`] mean functions and return thunks of the kernel.
    pub sites: Vec<Site>,
    /// Relocated fields in those forms.
    pub form_relocs: Vec<FormReloc>,
    /// Names in the text, by address.
    pub symbols: Vec<Symbol>,
    /// What other modules may use, by name.
    pub exports: Vec<Export>,
    /// Edits of each variant, in the manifest's order.
    pub edits: Vec<Vec<ModuleEdit>>,
    /// Slots left alone, by reason.
    pub left: std::collections::BTreeMap<String, u64>,
}

/// A section that the loader allocates.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ModuleSection {
    /// Its name; the guest lists it in `module.sect_attrs`.
    pub name: String,
    /// ELF section flags, with what the loader adds.
    pub flags: u64,
    /// Bytes.
    pub size: u32,
    /// A power of two.
    pub align: u32,
    /// Where it is put.
    pub place: Place,
}

/// What a relocation points to.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Target {
    /// The module itself.
    Own(Place),
    /// The kernel: the slide is added.
    Kernel(LinkVa),
    /// A value that never moves: an offset into per-CPU memory of the kernel, or nothing (a weak symbol).
    Fixed(u64),
    /// What another module exports by this name.
    Export(String),
}

/// One relocation (System V psABI, 4.4; arch/x86/kernel/module.c, `__write_relocate_add`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ModuleReloc {
    /// The field.
    pub at: TextOff,
    /// How it is computed.
    pub kind: ModuleRelocKind,
    /// Index into [`Module::targets`].
    pub target: u32,
    /// Added to the target.
    pub addend: i64,
}

/// How a field is computed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum ModuleRelocKind {
    /// 64-bit address.
    Abs64,
    /// 32-bit zero-extended address.
    Abs32,
    /// 32-bit sign-extended address.
    Abs32Signed,
    /// 32-bit distance from the field.
    Relative32,
    /// 64-bit distance from the field.
    Relative64,
}

impl ModuleRelocKind {
    /// The field's width in bytes.
    pub fn width(self) -> usize {
        match self {
            ModuleRelocKind::Abs64 | ModuleRelocKind::Relative64 => 8,
            _ => 4,
        }
    }

    /// The field's bytes, 8 of which the first [`ModuleRelocKind::width`] count; `None` when the value does not fit.
    pub fn value(self, target: u64, addend: i64, field: u64) -> Option<[u8; 8]> {
        let value = target.wrapping_add_signed(addend);
        let relative = value.wrapping_sub(field);
        let signed = |value: u64| i32::try_from(value as i64).ok().map(|_| value);
        let value = match self {
            ModuleRelocKind::Abs64 => Some(value),
            ModuleRelocKind::Abs32 => u32::try_from(value).ok().map(u64::from),
            ModuleRelocKind::Abs32Signed => signed(value),
            ModuleRelocKind::Relative32 => signed(relative),
            ModuleRelocKind::Relative64 => Some(relative),
        };
        value.map(u64::to_le_bytes)
    }
}

/// A relocated field in a form of a site.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FormReloc {
    /// Index into [`Module::sites`].
    pub site: u32,
    /// Index into the site's forms: a [`crate::Form::Exact`] with zeros in the field.
    pub form: u32,
    /// The relocation; its place is the field's in the text, inside the site.
    pub reloc: ModuleReloc,
}

/// A symbol for other modules.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Export {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub place: Place,
}

/// One slot's new instruction.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ModuleEdit {
    /// Where the slot starts.
    pub at: TextOff,
    /// What is replaced there.
    pub slot: SlotKind,
    /// What is put there.
    pub put: Put,
}

/// What an edit puts into a slot of a module.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Put {
    /// These bytes: 5 or 6, the same wherever the module is.
    Bytes(Vec<u8>),
    /// These bytes (prefixes and `e8` or `e9`), then the distance to this thunk.
    Branch(Vec<u8>, LinkVa),
}

impl ModuleEdit {
    /// The slot's length.
    pub fn len(&self) -> usize {
        match &self.put {
            Put::Bytes(bytes) => bytes.len(),
            Put::Branch(before, _) => before.len() + 4,
        }
    }

    /// Whether nothing is edited; never in a bundle that was read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes for a module at `placement`; `None` when the thunk is out of reach.
    pub fn bytes(&self, placement: &Placement) -> Option<Vec<u8>> {
        let (before, thunk) = match &self.put {
            Put::Bytes(bytes) => return Some(bytes.clone()),
            Put::Branch(before, thunk) => (before, thunk),
        };
        let next = placement.text(self.at).wrapping_add(self.len() as u64);
        let thunk = thunk.0.wrapping_add(placement.slide);
        let distance = thunk.wrapping_sub(next) as i64;
        let distance = i32::try_from(distance).ok()?;
        Some([before, &distance.to_le_bytes()[..]].concat())
    }
}

/// Why a module's text cannot be computed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum RelocateError {
    /// Nobody says where another module's symbol is.
    #[error("uses `{0}` of another module that is not known; give hardener that module too")]
    Unresolved(String),
    /// A value does not fit its field.
    #[error("text offset {0:#x}: what it refers to is out of reach")]
    Overflow(u32),
}

impl Module {
    /// The bytes of one relocated field: the first [`ModuleRelocKind::width`] of them.
    pub fn field(
        &self,
        reloc: &ModuleReloc,
        placement: &Placement,
        resolve: &dyn Fn(&str) -> Option<u64>,
    ) -> Result<[u8; 8], RelocateError> {
        let target = match &self.targets[reloc.target as usize] {
            Target::Own(place) => placement.address(*place),
            Target::Kernel(va) => va.0.wrapping_add(placement.slide),
            Target::Fixed(value) => *value,
            Target::Export(name) => {
                resolve(name).ok_or_else(|| RelocateError::Unresolved(name.clone()))?
            }
        };
        reloc
            .kind
            .value(target, reloc.addend, placement.text(reloc.at))
            .ok_or(RelocateError::Overflow(reloc.at.0))
    }

    /// The text as the loader relocates it, before any poke. `resolve` knows other modules' exports.
    pub fn relocated(
        &self,
        placement: &Placement,
        resolve: &dyn Fn(&str) -> Option<u64>,
    ) -> Result<Vec<u8>, RelocateError> {
        let mut text = self.text.clone();
        for reloc in &self.relocs {
            let bytes = self.field(reloc, placement, resolve)?;
            let (at, width) = (reloc.at.0 as usize, reloc.kind.width());
            text[at..at + width].copy_from_slice(&bytes[..width]);
        }
        Ok(text)
    }

    /// What does not hold together, if anything: every index, range and order that users rely on.
    pub(crate) fn fault(&self, variants: usize) -> Option<String> {
        let size = self.text_size as usize;
        let within = |at: TextOff, len: usize| at.0 as usize + len <= size;
        let reloc = |reloc: &ModuleReloc| {
            (reloc.target as usize) < self.targets.len() && within(reloc.at, reloc.kind.width())
        };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        let edits = |edits: &Vec<ModuleEdit>| {
            let mut free = 0;
            edits.iter().all(|edit| {
                let good = edit.at.0 >= free
                    && (5..=6).contains(&edit.len())
                    && within(edit.at, edit.len());
                free = edit.at.0.saturating_add(edit.len() as u32);
                good
            })
        };
        let form_reloc = |one: &FormReloc| {
            let Some(site) = self.sites.get(one.site as usize) else {
                return false;
            };
            let inside = one.reloc.at.0.checked_sub(site.at.0);
            let exact = matches!(
                site.forms.get(one.form as usize),
                Some(crate::Form::Exact { .. })
            );
            reloc(&one.reloc)
                && exact
                && inside
                    .is_some_and(|at| at as usize + one.reloc.kind.width() <= usize::from(site.len))
        };
        let checks = [
            (
                !self.name.is_empty() && self.name.len() < 64 && self.name.bytes().all(plain),
                "its name is no module's",
            ),
            (
                size == self.text.len()
                    && size.is_multiple_of(4096)
                    && (self.sizes[Memory::Text] as usize).next_multiple_of(4096) >= size,
                "its sizes contradict each other",
            ),
            (
                self.sections.iter().all(|section| {
                    let end = u64::from(section.place.at) + u64::from(section.size);
                    end <= u64::from(self.sizes[section.place.memory])
                }),
                "a section leaves its memory",
            ),
            (
                self.relocs.iter().all(reloc) && self.relocs.is_sorted_by_key(|reloc| reloc.at),
                "its relocations are unsorted or leave the text",
            ),
            (
                self.sites.is_sorted_by_key(|site| site.at)
                    && self.sites.iter().all(|site| {
                        within(site.at, usize::from(site.len)) && site.has_sound_forms()
                    }),
                "its sites are unsorted or leave the text",
            ),
            (
                self.form_relocs.iter().all(form_reloc),
                "a form's relocation leaves it",
            ),
            (
                self.edits.len() == variants && self.edits.iter().all(edits),
                "its edits overlap, leave the text or are not of each variant",
            ),
            (
                self.symbols.is_sorted() && self.symbols.iter().all(|symbol| within(symbol.at, 0)),
                "its symbols are unsorted or leave the text",
            ),
        ];
        let broken = checks.into_iter().find(|(holds, _)| !holds);
        broken.map(|(_, what)| format!("module {}: {what}", self.name.escape_default()))
    }
}
