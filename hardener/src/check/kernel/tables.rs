//! The tables in which the image says where it rewrites itself, where it faults on purpose and whom it exports.
//!
//! Sections give the bounds of some, symbols those of the rest; BTF gives the layout of an entry.

use super::KernelError;
use super::btf::Btf;
use super::elf::Vmlinux;
use super::symbols::SymbolMap;
use penumbra_bundle::{LinkVa, VaRange};

/// An alternative: `site` may be overwritten by the code at `replacement`.
#[derive(Clone, Copy, Debug)]
pub struct Alternative {
    /// The bytes that may be overwritten.
    pub site: VaRange,
    /// The code that may be copied there.
    pub replacement: VaRange,
    /// The call there becomes one of the function to which it goes (ALT_FLAG_DIRECT_CALL).
    pub direct_call: bool,
}

/// What the tables of one image say.
#[derive(Debug, Default)]
pub struct Tables {
    /// `.return_sites`.
    pub return_sites: Vec<LinkVa>,
    /// `.retpoline_sites`.
    pub retpoline_sites: Vec<LinkVa>,
    /// `.altinstructions`.
    pub alternatives: Vec<Alternative>,
    /// `.parainstructions` (up to Linux 6.7), and alternatives that make indirect calls direct (later).
    pub paravirt: Vec<VaRange>,
    /// `runtime_ptr_*`, `runtime_shift_*`: values inside instructions, written at boot.
    pub constants: Vec<VaRange>,
    /// `__mcount_loc`: calls to `__fentry__`.
    pub fentry: Vec<LinkVa>,
    /// `__jump_table`: places of jump labels.
    pub jump_labels: Vec<LinkVa>,
    /// `.static_call_sites`.
    pub static_calls: Vec<LinkVa>,
    /// `.ibt_endbr_seal`: ENDBR64 that no indirect branch needs; none where the kernel is built without IBT.
    pub sealed: Option<Vec<LinkVa>>,
    /// `.smp_locks`.
    pub smp_locks: Vec<LinkVa>,
    /// `__ex_table`: instructions that may fault.
    pub may_fault: Vec<LinkVa>,
    /// `__ex_table` and `__jump_table`: places, and where each may go on without a branch there.
    pub silent_jumps: Vec<(LinkVa, LinkVa)>,
    /// `__bug_table`: UD2 instructions.
    pub bugs: Vec<LinkVa>,
    /// `_kprobe_blacklist`: functions that must not be probed.
    pub kprobe_blacklist: Vec<LinkVa>,
    /// `__ksymtab` and `__ksymtab_gpl`: values of exported symbols.
    pub exports: Vec<LinkVa>,
    /// Pointers kept as 32-bit offsets: init calls and PCI fix-ups.
    pub relative_pointers: Vec<LinkVa>,
    /// Places of the tables whose 64-bit pointers describe code and are never called.
    pub descriptive: Vec<VaRange>,
}

impl Tables {
    /// Reads every table.
    pub fn read(
        vmlinux: &Vmlinux,
        symbols: &SymbolMap,
        btf: &Btf<'_>,
    ) -> Result<Tables, KernelError> {
        let read = Reader { vmlinux, btf };
        let section = |name| vmlinux.section(name).map(|section| section.range);
        let optional = |name| vmlinux.find_section(name).map(|section| section.range);
        let between = |start, end| symbols.between(start, end);
        let mut tables = Tables {
            return_sites: read.offsets(section(".return_sites")?)?,
            retpoline_sites: read.offsets(section(".retpoline_sites")?)?,
            smp_locks: read.offsets(section(".smp_locks")?)?,
            alternatives: read.alternatives(section(".altinstructions")?)?,
            fentry: read.pointers(between("__start_mcount_loc", "__stop_mcount_loc")?)?,
            kprobe_blacklist: read.pointers(between(
                "__start_kprobe_blacklist",
                "__stop_kprobe_blacklist",
            )?)?,
            jump_labels: read.member(
                between("__start___jump_table", "__stop___jump_table")?,
                "jump_entry",
                "code",
            )?,
            static_calls: read.member(
                between("__start_static_call_sites", "__stop_static_call_sites")?,
                "static_call_site",
                "addr",
            )?,
            may_fault: read.member(section("__ex_table")?, "exception_table_entry", "insn")?,
            bugs: read.member(section("__bug_table")?, "bug_entry", "bug_addr_disp")?,
            ..Tables::default()
        };
        if let Some(range) = optional(".ibt_endbr_seal") {
            tables.sealed = Some(read.offsets(range)?);
        }
        let faults = section("__ex_table")?;
        tables.silent_jumps = read.pairs(faults, "exception_table_entry", ["insn", "fixup"])?;
        let labels = between("__start___jump_table", "__stop___jump_table")?;
        let labels = read.pairs(labels, "jump_entry", ["code", "target"])?;
        tables.silent_jumps.extend(labels);
        if let Some(range) = optional(".parainstructions") {
            tables.paravirt = read.paravirt(range)?;
            tables.descriptive.push(range);
        }
        let calls = tables.alternatives.iter().filter(|entry| entry.direct_call);
        let calls: Vec<VaRange> = calls.map(|entry| entry.site).collect();
        tables.paravirt.extend(calls);
        for (prefix, width) in [("runtime_ptr_", 8), ("runtime_shift_", 1)] {
            for range in vmlinux.named(prefix) {
                let places = read.offsets(range)?.into_iter();
                tables.constants.extend(places.map(|at| span(at, width)));
            }
        }
        for name in ["__ksymtab", "__ksymtab_gpl"] {
            if let Some(range) = optional(name) {
                let exports = read.member(range, "kernel_symbol", "value_offset")?;
                tables.exports.extend(exports);
            }
        }
        if let Some(range) = optional(".pci_fixup") {
            tables.relative_pointers = read.member(range, "pci_fixup", "hook_offset")?;
        }
        if let Ok(range) = between("__initcall_start", "__initcall_end") {
            tables.relative_pointers.extend(read.offsets(range)?);
        }
        for (start, end) in [
            ("__start_mcount_loc", "__stop_mcount_loc"),
            ("__start_kprobe_blacklist", "__stop_kprobe_blacklist"),
            (
                "__start_error_injection_whitelist",
                "__stop_error_injection_whitelist",
            ),
        ] {
            tables.descriptive.extend(between(start, end).ok());
        }
        Ok(tables)
    }
}

struct Reader<'a> {
    vmlinux: &'a Vmlinux,
    btf: &'a Btf<'a>,
}

impl Reader<'_> {
    /// A table of `.long target - .`; SMP locks pad with zeros, which denote no place.
    fn offsets(&self, range: VaRange) -> Result<Vec<LinkVa>, KernelError> {
        let mut places = Vec::new();
        for at in entries(range, 4)? {
            if self.vmlinux.u32(at).ok_or(KernelError::Truncated)? != 0 {
                places.extend(self.vmlinux.pc_relative(at));
            }
        }
        Ok(sorted(places))
    }

    /// A table of `.quad target`; ftrace zeroes entries that it does not want.
    fn pointers(&self, range: VaRange) -> Result<Vec<LinkVa>, KernelError> {
        let places: Option<Vec<LinkVa>> = entries(range, 8)?
            .map(|at| self.vmlinux.u64(at).map(LinkVa))
            .collect();
        let mut places = places.ok_or(KernelError::Truncated)?;
        places.retain(|place| place.0 != 0);
        Ok(sorted(places))
    }

    /// A table of structures, one member of which is an offset from itself.
    fn member(
        &self,
        range: VaRange,
        structure: &'static str,
        member: &'static str,
    ) -> Result<Vec<LinkVa>, KernelError> {
        let (size, offset) = (self.size(structure)?, self.offset(structure, member)?);
        let places: Option<Vec<LinkVa>> = entries(range, size)?
            .map(|at| self.vmlinux.pc_relative(place(at, offset)))
            .collect();
        Ok(sorted(places.ok_or(KernelError::Truncated)?))
    }

    /// Two members of each entry, which belong together.
    fn pairs(
        &self,
        range: VaRange,
        structure: &'static str,
        members: [&'static str; 2],
    ) -> Result<Vec<(LinkVa, LinkVa)>, KernelError> {
        let size = self.size(structure)?;
        let [from, to] = members.map(|member| self.offset(structure, member));
        let (from, to) = (from?, to?);
        let pair = |at: LinkVa| {
            let from = self.vmlinux.pc_relative(place(at, from))?;
            Some((from, self.vmlinux.pc_relative(place(at, to))?))
        };
        let pairs: Option<Vec<_>> = entries(range, size)?.map(pair).collect();
        pairs.ok_or(KernelError::Truncated)
    }

    fn alternatives(&self, range: VaRange) -> Result<Vec<Alternative>, KernelError> {
        let size = self.size("alt_instr")?;
        let site = self.offset("alt_instr", "instr_offset")?;
        let site_len = self.offset("alt_instr", "instrlen")?;
        let replacement = self.offset("alt_instr", "repl_offset")?;
        let replacement_len = self.offset("alt_instr", "replacementlen")?;
        let flags = self.btf.offset("alt_instr", "ft_flags").map(u64::from);
        let direct_call = |at: LinkVa| match flags {
            Some(flags) => Some(self.vmlinux.u32(LinkVa(at.0 + flags))? & 0x2_0000 != 0),
            None => Some(false),
        };
        let span = |at: LinkVa, pointer: u64, len: u64| {
            let start = self.vmlinux.pc_relative(place(at, pointer))?;
            let len = self.vmlinux.bytes(place(at, len), 1)?[0];
            Some(span(start, u64::from(len)))
        };
        entries(range, size)?
            .map(|at| {
                Some(Alternative {
                    site: span(at, site, site_len)?,
                    replacement: span(at, replacement, replacement_len)?,
                    direct_call: direct_call(at)?,
                })
            })
            .collect::<Option<Vec<_>>>()
            .ok_or(KernelError::Truncated)
    }

    fn paravirt(&self, range: VaRange) -> Result<Vec<VaRange>, KernelError> {
        let size = self.size("paravirt_patch_site")?;
        let site = self.offset("paravirt_patch_site", "instr")?;
        let len = self.offset("paravirt_patch_site", "len")?;
        // BTF gives the C structure; `_paravirt_alt` pads each entry to 8 bytes as the structure's alignment does.
        entries(range, size)?
            .map(|at| {
                let start = self.vmlinux.u64(place(at, site))?;
                let len = self.vmlinux.bytes(place(at, len), 1)?[0];
                Some(span(LinkVa(start), u64::from(len)))
            })
            .collect::<Option<Vec<_>>>()
            .ok_or(KernelError::Truncated)
    }

    fn size(&self, name: &'static str) -> Result<u64, KernelError> {
        self.btf
            .size(name)
            .map(u64::from)
            .ok_or(KernelError::Layout {
                structure: name,
                member: "",
            })
    }

    fn offset(&self, structure: &'static str, member: &'static str) -> Result<u64, KernelError> {
        self.btf
            .offset(structure, member)
            .map(u64::from)
            .ok_or(KernelError::Layout { structure, member })
    }
}

/// The entries' addresses; a table is a whole number of them, or its layout is not what we think.
fn entries(range: VaRange, size: u64) -> Result<impl Iterator<Item = LinkVa>, KernelError> {
    if size == 0 || !range.len().is_multiple_of(size) {
        return Err(KernelError::TableSize { range, size });
    }
    Ok((range.start.0..range.end.0)
        .step_by(size as usize)
        .map(LinkVa))
}

/// Where a member of an entry stands. What wraps is in no segment of a sound image.
fn place(entry: LinkVa, offset: u64) -> LinkVa {
    LinkVa(entry.0.wrapping_add(offset))
}

fn span(start: LinkVa, len: u64) -> VaRange {
    VaRange {
        start,
        end: LinkVa(start.0.wrapping_add(len)),
    }
}

fn sorted(mut places: Vec<LinkVa>) -> Vec<LinkVa> {
    places.sort_unstable();
    places
}
