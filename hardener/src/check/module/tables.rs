//! What a loaded module's own tables say about its text.

use super::load::Loaded;
use crate::check::kernel::KernelError;
use crate::check::kernel::btf::Btf;
use penumbra_bundle::{Memory, Place, Placement, SiteKind};
use std::collections::{BTreeMap, BTreeSet};

/// What BTF says of `struct module`.
pub struct OfModules {
    /// Where its name is.
    pub name: u32,
    /// Whether each class of sections has a memory of its own (from Linux 6.4 on).
    pub apart: bool,
}

/// The layout of the tables' entries.
pub struct Layouts {
    /// Of modules themselves.
    pub module: OfModules,
    alternative: [usize; 3],
    /// Where the flags of an alternative are (from Linux 6.5 on).
    flags: Option<usize>,
    paravirt: [usize; 3],
    jump: [usize; 2],
    static_call: [usize; 2],
    exception: [usize; 2],
    bug: [usize; 2],
}

impl Layouts {
    /// From the kernel's BTF.
    pub fn read(btf: &Btf<'_>) -> Result<Layouts, KernelError> {
        let need = |structure: &'static str, member: &'static str| {
            let found = match member {
                "" => btf.size(structure),
                _ => btf.offset(structure, member),
            };
            let found = found.ok_or(KernelError::Layout { structure, member })?;
            Ok::<usize, KernelError>(found as usize)
        };
        let two = |structure, member| Ok([need(structure, "")?, need(structure, member)?]);
        let three = |structure, a, b| {
            Ok([
                need(structure, "")?,
                need(structure, a)?,
                need(structure, b)?,
            ])
        };
        let apart = match need("module", "core_layout") {
            Ok(_) => false,
            Err(_) => need("module", "mem").map(|_| true)?,
        };
        Ok(Layouts {
            module: OfModules {
                name: need("module", "name")? as u32,
                apart,
            },
            alternative: three("alt_instr", "instr_offset", "instrlen")?,
            flags: need("alt_instr", "ft_flags").ok(),
            // Not in kernels from 6.8 on, nor in their modules.
            paravirt: three("paravirt_patch_site", "instr", "len").unwrap_or([0; 3]),
            jump: two("jump_entry", "code")?,
            static_call: two("static_call_site", "addr")?,
            exception: two("exception_table_entry", "insn")?,
            bug: two("bug_entry", "bug_addr_disp")?,
        })
    }
}

/// Places in the text: offset and, where the table says it, length.
pub struct ModuleTables {
    /// What the kernel edits, by kind.
    pub poked: BTreeMap<SiteKind, BTreeSet<(u32, u32)>>,
    /// Instructions that may fault or trap on purpose.
    pub special: BTreeSet<u32>,
    /// Functions that must not be probed.
    pub blacklist: BTreeSet<u32>,
}

impl ModuleTables {
    /// Reads them out of the module's memories at `placement`.
    pub fn read(
        loaded: &Loaded,
        layouts: &Layouts,
        placement: &Placement,
    ) -> Result<ModuleTables, String> {
        let read = Reader { loaded, placement };
        let plain = |name| read.relative(name, [4, 0], None);
        let mut poked = BTreeMap::new();
        poked.insert(SiteKind::Return, plain(".return_sites")?);
        poked.insert(SiteKind::Retpoline, plain(".retpoline_sites")?);
        poked.insert(SiteKind::SmpLock, plain(".smp_locks")?);
        poked.insert(
            SiteKind::Fentry,
            read.absolute("__mcount_loc", [8, 0], None)?,
        );
        let [size, at, len] = layouts.alternative;
        let alternatives = read.relative(".altinstructions", [size, at], Some(len))?;
        poked.insert(SiteKind::Alternative, alternatives);
        let mut paravirt = match layouts.flags {
            Some(flags) => read.direct_calls([size, at, len, flags])?,
            None => BTreeSet::new(),
        };
        let [size, at, len] = layouts.paravirt;
        paravirt.extend(read.absolute(".parainstructions", [size, at], Some(len))?);
        poked.insert(SiteKind::Paravirt, paravirt);
        poked.insert(SiteKind::Other, plain(".ibt_endbr_seal")?);
        let jumps = read.relative("__jump_table", layouts.jump, None)?;
        poked.insert(SiteKind::JumpLabel, jumps);
        let calls = read.relative(".static_call_sites", layouts.static_call, None)?;
        poked.insert(SiteKind::StaticCall, calls);
        let trampolines = loaded.code.iter();
        let trampolines = trampolines.filter(|(_, name)| name.starts_with("__SCT__"));
        poked.insert(
            SiteKind::StaticCallTrampoline,
            trampolines.map(|(at, _)| (*at, 0)).collect(),
        );
        let starts = |places: BTreeSet<(u32, u32)>| places.into_iter().map(|(at, _)| at);
        let faults = read.relative("__ex_table", layouts.exception, None)?;
        let bugs = read.relative("__bug_table", layouts.bug, None)?;
        let blacklist = read.absolute("_kprobe_blacklist", [8, 0], None)?;
        Ok(ModuleTables {
            poked,
            special: starts(faults).chain(starts(bugs)).collect(),
            blacklist: starts(blacklist).collect(),
        })
    }
}

struct Reader<'a> {
    loaded: &'a Loaded,
    placement: &'a Placement,
}

impl Reader<'_> {
    /// Entries of `[size, member]` whose member is a 32-bit distance from itself, with the byte at `len`.
    fn relative(
        &self,
        name: &str,
        layout: [usize; 2],
        len: Option<usize>,
    ) -> Result<BTreeSet<(u32, u32)>, String> {
        self.entries(name, layout, len, relative)
    }

    /// The same for 64-bit addresses.
    fn absolute(
        &self,
        name: &str,
        layout: [usize; 2],
        len: Option<usize>,
    ) -> Result<BTreeSet<(u32, u32)>, String> {
        self.entries(name, layout, len, |_, entry, member| {
            let field = entry.get(member..).and_then(<[u8]>::first_chunk);
            Ok(u64::from_le_bytes(*field.ok_or("an entry is too short")?))
        })
    }

    /// Alternatives after which an indirect call is a direct one (ALT_FLAG_DIRECT_CALL: what paravirt calls are from
    /// Linux 6.8 on).
    fn direct_calls(&self, layout: [usize; 4]) -> Result<BTreeSet<(u32, u32)>, String> {
        let [size, member, len, flags] = layout;
        let mut found = BTreeSet::new();
        for (at, entry) in self.table(".altinstructions", size)? {
            let (Some([_, _, flags, _]), Some(len)) = (
                entry.get(flags..).and_then(<[u8]>::first_chunk),
                entry.get(len),
            ) else {
                return Err("an entry is too short".to_owned());
            };
            if flags & 2 != 0
                && let Some(start) = self.in_text(relative(at, entry, member)?)
            {
                found.insert((start, u32::from(*len)));
            }
        }
        Ok(found)
    }

    fn entries(
        &self,
        name: &str,
        [size, member]: [usize; 2],
        len: Option<usize>,
        follow: impl Fn(u64, &[u8], usize) -> Result<u64, String>,
    ) -> Result<BTreeSet<(u32, u32)>, String> {
        let mut found = BTreeSet::new();
        for (at, entry) in self.table(name, size)? {
            // Initialisation code has sites too, and is gone.
            if let Some(start) = self.in_text(follow(at, entry, member)?) {
                let len = len.map_or(Some(&0), |len| entry.get(len));
                let len = len.ok_or("an entry is too short")?;
                found.insert((start, u32::from(*len)));
            }
        }
        Ok(found)
    }

    /// The offset in the text, of what is there.
    fn in_text(&self, va: u64) -> Option<u32> {
        let start = self.placement.bases[Memory::Text];
        let at = va.wrapping_sub(start);
        (at < u64::from(self.loaded.text_size)).then_some(at as u32)
    }

    /// The entries of all sections of that name, of `size` bytes each, with their addresses.
    fn table(&self, name: &str, size: usize) -> Result<Vec<(u64, &[u8])>, String> {
        let mut entries = Vec::new();
        for part in self.loaded.parts.iter().filter(|part| part.name == name) {
            let Place { memory, at } = part.place;
            let bytes = self.loaded.memories[memory].get(at as usize..);
            let bytes = bytes.and_then(|bytes| bytes.get(..part.size as usize));
            let bytes = bytes.ok_or_else(|| format!("{name} is in no memory of the module"))?;
            if size == 0 || !bytes.len().is_multiple_of(size) {
                return Err(format!(
                    "{name} is not a whole number of entries of {size} bytes"
                ));
            }
            let start = self.placement.address(part.place);
            let each = (start..).step_by(size).zip(bytes.chunks_exact(size));
            entries.extend(each);
        }
        Ok(entries)
    }
}

/// Where the 32-bit distance at `member` of an entry at `at` leads, counted from itself.
fn relative(at: u64, entry: &[u8], member: usize) -> Result<u64, String> {
    let field = entry.get(member..).and_then(<[u8]>::first_chunk);
    let distance = i32::from_le_bytes(*field.ok_or("an entry is too short")?);
    let place = at.wrapping_add(member as u64);
    Ok(place.wrapping_add_signed(i64::from(distance)))
}
