//! Walks the kernel's list of modules (`modules`, kernel/module/main.c).

use crate::guest::Slide;
use crate::guest::layout::{self, MissingName};
use crate::guest::memory::{GuestMemory, ReadError};
use crate::xen::GuestVa;
use penumbra_bundle::{Manifest, Memory, PerMemory};
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
    /// Where its memories are; null what it has not, and once it is freed.
    pub memories: PerMemory<GuestVa>,
    /// Bytes of its text: whole pages.
    pub text_size: u32,
    /// Its build-id in hexadecimal, if the kernel keeps its notes.
    pub build_id: Option<String>,
}

impl Loaded {
    /// Where its text starts.
    pub fn text(&self) -> GuestVa {
        self.memories[Memory::Text]
    }
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
    /// Where the addresses of its memories are, of those that this kernel has.
    memories: PerMemory<Option<u64>>,
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
        let (mut memories, text_size) = match get("module.core_layout") {
            Ok(core) => together(core, &get)?,
            Err(_) => apart(&get)?,
        };
        memories[Memory::PerCpu] = Some(get("module.percpu")?);
        Ok(ModuleReader {
            head: layout::data(manifest, slide, "modules")?,
            list: get("module.list")?,
            name: get("module.name")?,
            state: get("module.state")?,
            memories,
            text_size,
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
        let mut memories = PerMemory::new(|_| GuestVa(0));
        for (which, at) in self.memories.iter() {
            if let Some(at) = *at {
                memories[which] = memory.pointer(module.offset(at))?;
            }
        }
        let text_size = memory.u32(module.offset(self.text_size))?;
        Ok(Loaded {
            module,
            name: string(memory, module.offset(self.name), NAME)?,
            state: match memory.u32(module.offset(self.state))? {
                0 => ModuleState::Live,
                1 => ModuleState::Coming,
                _ => ModuleState::Other,
            },
            memories,
            text_size: text_size.min(MAX_TEXT),
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

type Get<'a> = &'a dyn Fn(&str) -> Result<u64, MissingName>;

/// Where a kernel that arranges modules in two memories (`struct module_layout`) has their addresses and the text's size.
fn together(core: u64, get: Get<'_>) -> Result<(PerMemory<Option<u64>>, u64), MissingName> {
    let base = get("module_layout.base")?;
    let mut memories = PerMemory::default();
    memories[Memory::Text] = Some(core + base);
    memories[Memory::InitText] = Some(get("module.init_layout")? + base);
    Ok((memories, core + get("module_layout.text_size")?))
}

/// The same where each kind of section has a memory (`struct module_memory`, from Linux 6.4 on).
fn apart(get: Get<'_>) -> Result<(PerMemory<Option<u64>>, u64), MissingName> {
    let (all, stride) = (get("module.mem")?, get("sizeof.module_memory")?);
    let (base, size) = (get("module_memory.base")?, get("module_memory.size")?);
    let mut memories = PerMemory::default();
    let named = |memory: Memory| Some((memory, memory.kernel_name()?));
    for (memory, name) in Memory::ALL.into_iter().filter_map(named) {
        let number = get(&format!("mod_mem_type.{name}"))?;
        memories[memory] = Some(all + number * stride + base);
    }
    let text = all + get("mod_mem_type.MOD_TEXT")? * stride;
    Ok((memories, text + size))
}

/// A string of at most `len` bytes, up to its zero.
fn string(memory: &GuestMemory<'_>, at: GuestVa, len: usize) -> Result<String, ReadError> {
    let bytes = memory.bytes(at, len)?;
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}
