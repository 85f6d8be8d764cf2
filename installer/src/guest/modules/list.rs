//! Walks the kernel's list of modules (`modules`, kernel/module/main.c).

use crate::guest::Slide;
use crate::guest::layout::{self, MissingName};
use crate::guest::memory::{GuestMemory, ReadError};
use crate::xen::GuestVa;
use penumbra_bundle::Manifest;
use std::collections::HashSet;

/// More modules than this are not read.
const MAX_MODULES: usize = 4096;
/// `MODULE_NAME_LEN` on 64-bit kernels (include/linux/module.h).
const NAME: usize = 56;
/// A module has a handful of notes.
const MAX_NOTES: u64 = 64;
/// Longest note that is read.
const MAX_NOTE: u64 = 4096;
/// More text than any module has.
const MAX_TEXT: u32 = 64 << 20;
/// Notes of this section hold the build-id.
const BUILD_ID: &str = ".note.gnu.build-id";

/// Where a module is in its life (`enum module_state`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ModuleState {
    /// Its init function has returned.
    Live,
    /// Its text is final, its init function has not returned.
    Coming,
    /// Being removed, or not yet formed.
    Other,
}

/// One entry of the list: what the guest says of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Loaded {
    /// Its `struct module`.
    pub module: GuestVa,
    /// Its name.
    pub name: String,
    /// Where it is in its life.
    pub state: ModuleState,
    /// Where its core memory starts: the text first.
    pub base: GuestVa,
    /// Bytes of it that are text: whole pages, not 0.
    pub text_size: u32,
    /// Its initialisation memory; null once that is freed.
    pub init: GuestVa,
    /// Its per-CPU memory.
    pub percpu: GuestVa,
    /// Its build-id in hexadecimal, if the kernel keeps its notes.
    pub build_id: Option<String>,
}

/// All of the list.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ModuleList {
    /// The modules, newest first.
    pub modules: Vec<Loaded>,
    /// What could not be read, and why the walk ended early if it did.
    pub trouble: Vec<String>,
}

/// Reads modules of one guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModuleReader {
    head: GuestVa,
    list: u64,
    name: u64,
    state: u64,
    core: u64,
    init: u64,
    percpu: u64,
    base: u64,
    text_size: u64,
    notes: Option<Notes>,
}

/// Where the notes are, in kernels that keep them.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Notes {
    attrs: u64,
    count: u64,
    array: u64,
    stride: u64,
    size: u64,
    private: u64,
    name: u64,
}

impl ModuleReader {
    /// Takes offsets from the manifest.
    pub fn new(manifest: &Manifest, slide: Slide) -> Result<ModuleReader, MissingName> {
        let get = |key: &str| {
            let offset = manifest.layout.get(key).copied();
            offset
                .map(u64::from)
                .ok_or_else(|| MissingName(key.to_owned()))
        };
        let notes = || {
            let attr = get("bin_attribute.attr")?;
            Ok::<Notes, MissingName>(Notes {
                attrs: get("module.notes_attrs")?,
                count: get("module_notes_attrs.notes")?,
                array: get("module_notes_attrs.attrs")?,
                stride: get("sizeof.bin_attribute")?,
                size: get("bin_attribute.size")?,
                private: get("bin_attribute.private")?,
                name: attr + get("attribute.name")?,
            })
        };
        Ok(ModuleReader {
            head: layout::data(manifest, slide, "modules")?,
            list: get("module.list")?,
            name: get("module.name")?,
            state: get("module.state")?,
            core: get("module.core_layout")?,
            init: get("module.init_layout")?,
            percpu: get("module.percpu")?,
            base: get("module_layout.base")?,
            text_size: get("module_layout.text_size")?,
            notes: notes().ok(),
        })
    }

    /// Reads the list. It is walked while the guest changes it: it ends at its head, at a second visit of any entry, at an
    /// unreadable entry or at the limit.
    pub fn list(&self, memory: &GuestMemory<'_>) -> ModuleList {
        let mut found = ModuleList::default();
        let mut seen = HashSet::new();
        let mut link = self.head;
        loop {
            link = match memory.pointer(link) {
                Ok(next) => next,
                Err(error) => {
                    let broken = format!("the module list breaks off: {error}");
                    found.trouble.push(broken);
                    return found;
                }
            };
            if link == self.head {
                return found;
            }
            if !seen.insert(link) || seen.len() > MAX_MODULES {
                let broken = format!("the module list does not end ({link})");
                found.trouble.push(broken);
                return found;
            }
            let module = GuestVa(link.0.wrapping_sub(self.list));
            match self.read(memory, module) {
                Ok(loaded) => found.modules.push(loaded),
                Err(error) => found
                    .trouble
                    .push(format!("the module at {module} cannot be read: {error}")),
            }
        }
    }

    /// Reads one entry.
    pub fn read(&self, memory: &GuestMemory<'_>, module: GuestVa) -> Result<Loaded, ReadError> {
        let text_size = memory.u32(module.offset(self.core + self.text_size))?;
        Ok(Loaded {
            module,
            name: string(memory, module.offset(self.name), NAME)?,
            state: match memory.u32(module.offset(self.state))? {
                0 => ModuleState::Live,
                1 => ModuleState::Coming,
                _ => ModuleState::Other,
            },
            base: memory.pointer(module.offset(self.core + self.base))?,
            text_size: text_size.min(MAX_TEXT),
            init: memory.pointer(module.offset(self.init + self.base))?,
            percpu: memory.pointer(module.offset(self.percpu))?,
            build_id: self.build_id(memory, module),
        })
    }

    /// The build-id from the notes that sysfs shows; `None` for a module without.
    fn build_id(&self, memory: &GuestMemory<'_>, module: GuestVa) -> Option<String> {
        let notes = self.notes.as_ref()?;
        let attrs = memory.pointer(module.offset(notes.attrs)).ok()?;
        if attrs == GuestVa(0) {
            return None;
        }
        let count = u64::from(memory.u32(attrs.offset(notes.count)).ok()?);
        for index in 0..count.min(MAX_NOTES) {
            let attr = attrs.offset(notes.array + index * notes.stride);
            let name = memory.pointer(attr.offset(notes.name)).ok()?;
            if string(memory, name, BUILD_ID.len() + 1).ok()? != BUILD_ID {
                continue;
            }
            let size = memory.u64(attr.offset(notes.size)).ok()?;
            let at = memory.pointer(attr.offset(notes.private)).ok()?;
            let len = usize::try_from(size.min(MAX_NOTE)).ok()?;
            let note = memory.bytes(at, len).ok()?;
            return crate::guest::kernel::build_id(&note);
        }
        None
    }
}

/// A string of at most `len` bytes, up to its zero.
fn string(memory: &GuestMemory<'_>, at: GuestVa, len: usize) -> Result<String, ReadError> {
    let bytes = memory.bytes(at, len)?;
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}
