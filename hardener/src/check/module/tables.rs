//! What a loaded module's own tables say about its text.

use super::load::Loaded;
use crate::check::kernel::KernelError;
use crate::check::kernel::btf::Btf;
use penumbra_bundle::{Place, SiteKind};
use std::collections::{BTreeMap, BTreeSet};

/// The layout of the tables' entries.
pub struct Layouts {
    /// `module.name`.
    pub name: u32,
    alternative: [usize; 3],
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
        Ok(Layouts {
            name: need("module", "name")? as u32,
            alternative: three("alt_instr", "instr_offset", "instrlen")?,
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
    /// Reads them out of the module's memory at `base`.
    pub fn read(loaded: &Loaded, layouts: &Layouts, base: u64) -> Result<ModuleTables, String> {
        let read = Reader { loaded, base };
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
        let [size, at, len] = layouts.paravirt;
        let paravirt = read.absolute(".parainstructions", [size, at], Some(len))?;
        poked.insert(SiteKind::Paravirt, paravirt);
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
    base: u64,
}

impl Reader<'_> {
    /// Entries of `[size, member]` whose member is a 32-bit distance from itself, with the byte at `len`.
    fn relative(
        &self,
        name: &str,
        layout: [usize; 2],
        len: Option<usize>,
    ) -> Result<BTreeSet<(u32, u32)>, String> {
        self.entries(name, layout, len, |at, field| {
            let distance = i32::from_le_bytes(*field.first_chunk()?);
            Some(at.wrapping_add_signed(i64::from(distance)))
        })
    }

    /// The same for 64-bit addresses.
    fn absolute(
        &self,
        name: &str,
        layout: [usize; 2],
        len: Option<usize>,
    ) -> Result<BTreeSet<(u32, u32)>, String> {
        self.entries(name, layout, len, |_, field| {
            Some(u64::from_le_bytes(*field.first_chunk()?))
        })
    }

    fn entries(
        &self,
        name: &str,
        [size, member]: [usize; 2],
        len: Option<usize>,
        follow: impl Fn(u64, &[u8]) -> Option<u64>,
    ) -> Result<BTreeSet<(u32, u32)>, String> {
        let mut found = BTreeSet::new();
        for part in self.loaded.parts.iter().filter(|part| part.name == name) {
            let Place::Core(start) = part.place else {
                return Err(format!("{name} is not in core memory"));
            };
            if size == 0 || !part.size.is_multiple_of(size as u64) {
                return Err(format!(
                    "{name} is not a whole number of entries of {size} bytes"
                ));
            }
            let bytes = &self.loaded.core[start as usize..][..part.size as usize];
            for (index, entry) in bytes.chunks_exact(size).enumerate() {
                let at = self.base + u64::from(start) + (index * size + member) as u64;
                let short = "an entry is too short";
                let field = entry.get(member..).ok_or(short)?;
                let to = follow(at, field).ok_or(short)?;
                let to = to.wrapping_sub(self.base);
                // Initialisation code has sites too, and is gone.
                if to < u64::from(self.loaded.text_size) {
                    let len = len.map_or(Some(&0), |len| entry.get(len)).ok_or(short)?;
                    found.insert((to as u32, u32::from(*len)));
                }
            }
        }
        Ok(found)
    }
}
