//! The tables by which the kernel edits its own text. Their layouts come from BTF, their bounds from ELF sections or from
//! kallsyms.

use super::{Fault, Image};
use penumbra_bundle::{LinkVa, VaRange};

/// Tables that every kernel must have, and what it is built with then. Without the first two there is nothing to edit, without
/// the others it is not known where nothing may be edited.
pub(super) const NEEDED: [(&str, &str); 4] = [
    (
        ".retpoline_sites",
        "CONFIG_RETPOLINE (forward-cfi and no-retpoline edit what it lists)",
    ),
    (
        ".return_sites",
        "CONFIG_RETHUNK (return-cfi and no-rethunk edit what it lists)",
    ),
    (
        ".altinstructions",
        "alternatives (no edit may touch what they replace)",
    ),
    (
        "__ex_table",
        "exception tables (no edit may touch what may fault)",
    ),
];

/// One entry of `.altinstructions`.
#[derive(Clone, Copy, Debug)]
pub struct AltEntry {
    /// What is replaced.
    pub site: LinkVa,
    /// How long it is.
    pub site_len: u8,
    /// The replacement.
    pub replacement: LinkVa,
    /// How long it is.
    pub replacement_len: u8,
    /// It stands for the function to which the indirect call at the site goes when alternatives are applied
    /// (`ALT_FLAG_DIRECT_CALL`, what paravirt calls became in Linux 6.8).
    pub direct_call: bool,
}

/// A value that the kernel writes into an instruction at boot (include/asm-generic/runtime-const.h, from Linux 6.11 on).
#[derive(Clone, Copy, Debug)]
pub struct RuntimeConstant {
    /// The immediate.
    pub at: LinkVa,
    /// What is written there.
    pub value: ConstantValue,
}

/// What a run-time constant holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConstantValue {
    /// A 64-bit address of data.
    Pointer,
    /// The 64-bit end of user space.
    UserEnd,
    /// By how much a 32-bit value is shifted: a byte.
    Shift,
}

impl ConstantValue {
    /// How many bytes it has.
    pub fn width(self) -> u8 {
        match self {
            ConstantValue::Pointer | ConstantValue::UserEnd => 8,
            ConstantValue::Shift => 1,
        }
    }
}

/// One entry of `.parainstructions`, or of `.altinstructions` that says the same.
#[derive(Clone, Copy, Debug)]
pub struct ParavirtSite {
    /// The indirect call.
    pub site: LinkVa,
    /// Its length.
    pub len: u8,
}

/// One entry of `__jump_table`.
#[derive(Clone, Copy, Debug)]
pub struct JumpEntry {
    /// The NOP or jump.
    pub code: LinkVa,
    /// Where the jump goes.
    pub target: LinkVa,
}

/// One entry of `.static_call_sites`.
#[derive(Clone, Copy, Debug)]
pub struct StaticCallSite {
    /// The call or jump.
    pub site: LinkVa,
    /// Whether it is a tail call.
    pub tail: bool,
    /// Its `struct static_call_key`, which holds the pointer.
    pub key: LinkVa,
}

/// All tables.
#[derive(Debug, Default)]
pub struct Tables {
    /// `.altinstructions`, in order: a later entry overrides an earlier one.
    pub alternatives: Vec<AltEntry>,
    /// `.parainstructions`; from Linux 6.8 on, alternatives that make an indirect call direct.
    pub paravirt: Vec<ParavirtSite>,
    /// `runtime_ptr_*` and `runtime_shift_*`.
    pub runtime_constants: Vec<RuntimeConstant>,
    /// `.retpoline_sites`.
    pub retpolines: Vec<LinkVa>,
    /// `.return_sites`.
    pub returns: Vec<LinkVa>,
    /// `.ibt_endbr_seal`.
    pub sealed_endbr: Vec<LinkVa>,
    /// `.smp_locks`: LOCK prefixes.
    pub smp_locks: Vec<LinkVa>,
    /// `__ex_table`: instructions that may fault.
    pub faulting: Vec<LinkVa>,
    /// `__ex_table`: where they go on.
    pub fixups: Vec<LinkVa>,
    /// `__bug_table`.
    pub bugs: Vec<LinkVa>,
    /// Those of `__bug_table` that are gone on behind: warnings.
    pub warnings: Vec<LinkVa>,
    /// `__mcount_loc`: calls of `__fentry__`.
    pub fentry: Vec<LinkVa>,
    /// `__jump_table`.
    pub jump_labels: Vec<JumpEntry>,
    /// `.static_call_sites`.
    pub static_calls: Vec<StaticCallSite>,
    /// Kprobe blacklist: functions.
    pub no_kprobes: Vec<LinkVa>,
    /// `__ksymtab`, `__ksymtab_gpl`: exported addresses.
    pub exports: Vec<LinkVa>,
    /// `.pci_fixup` hooks.
    pub pci_hooks: Vec<LinkVa>,
    /// Initcalls.
    pub initcalls: Vec<LinkVa>,
    /// Where `__mcount_loc`, the blacklist and the like hold absolute addresses that take no function's address.
    pub not_taken: Vec<VaRange>,
}

/// The bytes of a table and where they are linked.
pub(super) struct Table<'a> {
    name: &'static str,
    start: LinkVa,
    bytes: &'a [u8],
}

impl Table<'_> {
    fn range(&self) -> VaRange {
        VaRange {
            start: self.start,
            end: LinkVa(self.start.0 + self.bytes.len() as u64),
        }
    }

    /// Offsets of all entries of `size` bytes; a rest is damage.
    fn entries(&self, size: u32) -> Result<impl Iterator<Item = usize>, Fault> {
        let (len, size) = (self.bytes.len(), size as usize);
        if size == 0 || !len.is_multiple_of(size) {
            return Err(Fault::damaged(
                self.name,
                format!("{len} bytes do not hold whole entries of {size}"),
            ));
        }
        Ok((0..len / size).map(move |n| n * size))
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        // Entries are whole (see `entries`) and `need_member` checked that members fit.
        self.bytes[at..at + N]
            .try_into()
            .expect("the slice has this length")
    }

    /// The address that the 32-bit offset at `at`, relative to its own place, points to.
    fn relative(&self, at: usize) -> LinkVa {
        let offset = i64::from(i32::from_le_bytes(self.array(at)));
        LinkVa((self.start.0 + at as u64).wrapping_add_signed(offset))
    }

    /// All addresses of a table of 32-bit relative offsets.
    fn all_relative(&self) -> Result<Vec<LinkVa>, Fault> {
        Ok(self.entries(4)?.map(|at| self.relative(at)).collect())
    }

    /// All addresses of a table of 64-bit absolute addresses.
    fn all_absolute(&self) -> Result<Vec<LinkVa>, Fault> {
        let word = |at| LinkVa(u64::from_le_bytes(self.array(at)));
        Ok(self.entries(8)?.map(word).collect())
    }
}

impl Image {
    fn in_section(&self, name: &'static str) -> Option<Table<'_>> {
        Some(Table {
            name,
            start: self.section(name)?.range.start,
            bytes: self.section_bytes(name)?,
        })
    }

    /// The table in the section `name`, which a kernel has that is built with `why`.
    pub(super) fn need_table(&self, name: &'static str, why: &str) -> Result<Table<'_>, Fault> {
        self.in_section(name).ok_or_else(|| {
            Fault::unsupported(name, format!("the section is missing; Penumbra needs a kernel built with {why}, as Debian's are"))
        })
    }

    fn in_symbols(&self, name: &'static str, start: &str, end: &str) -> Result<Table<'_>, Fault> {
        let range = self.between(start, end)?;
        let bytes = self.at(range.start, range.len() as usize);
        Ok(Table {
            name,
            start: range.start,
            bytes: bytes.ok_or_else(|| {
                Fault::damaged(
                    name,
                    format!("{} to {} is not in the file", range.start, range.end),
                )
            })?,
        })
    }

    fn need_size(&self, name: &str) -> Result<u32, Fault> {
        self.btf
            .size_of(name)
            .ok_or_else(|| Fault::unsupported(".BTF", format!("does not describe `struct {name}`")))
    }

    /// The offset of a member that is `width` bytes wide; checked to lie inside its structure.
    fn need_member(&self, name: &str, member: &str, width: u32) -> Result<usize, Fault> {
        let size = self.need_size(name)?;
        self.btf
            .member(name, member)
            .and_then(|member| member.byte())
            .filter(|byte| byte.checked_add(width).is_some_and(|end| end <= size))
            .map(|byte| byte as usize)
            .ok_or_else(|| {
                Fault::unsupported(
                    ".BTF",
                    format!("`struct {name}` has no `{member}` of {width} bytes"),
                )
            })
    }

    /// Where the 32-bit relative offset at `at` points, which must be code: a site anywhere else would be missed in
    /// silence.
    fn code(&self, table: &Table<'_>, at: usize) -> Result<LinkVa, Fault> {
        let va = table.relative(at);
        let mut sections = self.sections().iter().filter(|section| section.exec);
        if sections.any(|section| section.range.contains(va)) {
            return Ok(va);
        }
        let detail = format!("the entry at {at:#x} points to {va}, which is no code");
        Err(Fault::damaged(table.name, detail))
    }

    /// All addresses of a table of 32-bit relative offsets to code.
    fn all_code(&self, table: &Table<'_>) -> Result<Vec<LinkVa>, Fault> {
        table.entries(4)?.map(|at| self.code(table, at)).collect()
    }

    /// Reads all tables.
    pub fn tables(&self) -> Result<Tables, Fault> {
        let need = |name, why| self.need_table(name, why);
        let [retpolines, returns, alternatives, exceptions] = NEEDED;
        let mut tables = Tables {
            retpolines: self.all_code(&need(retpolines.0, retpolines.1)?)?,
            returns: self.all_code(&need(returns.0, returns.1)?)?,
            ..Tables::default()
        };
        if let Some(table) = self.in_section(".ibt_endbr_seal") {
            tables.sealed_endbr = table.all_relative()?;
        }
        if let Some(table) = self.in_section(".smp_locks") {
            // The section is padded with zeros to whole pages.
            let words = table
                .entries(4)?
                .filter(|at| table.array::<4>(*at) != [0; 4]);
            tables.smp_locks = words.map(|at| table.relative(at)).collect();
        }
        self.alternatives(&need(alternatives.0, alternatives.1)?, &mut tables)?;
        if let Some(table) = self.in_section(".parainstructions") {
            self.paravirt(&table, &mut tables)?;
            tables.not_taken.push(table.range());
        }
        self.runtime_constants(&mut tables)?;
        self.exceptions(&need(exceptions.0, exceptions.1)?, &mut tables)?;
        if let Some(table) = self.in_section("__bug_table") {
            let size = self.need_size("bug_entry")?;
            let at = self.need_member("bug_entry", "bug_addr_disp", 4)?;
            let flags = self.need_member("bug_entry", "flags", 2)?;
            for entry in table.entries(size)? {
                let bug = table.relative(entry + at);
                tables.bugs.push(bug);
                // BUGFLAG_WARNING (include/asm-generic/bug.h)
                if table.array::<2>(entry + flags)[0] & 1 == 1 {
                    tables.warnings.push(bug);
                }
            }
        }
        for name in ["__ksymtab", "__ksymtab_gpl"] {
            if let Some(table) = self.in_section(name) {
                let size = self.need_size("kernel_symbol")?;
                let at = self.need_member("kernel_symbol", "value_offset", 4)?;
                tables
                    .exports
                    .extend(table.entries(size)?.map(|entry| table.relative(entry + at)));
            }
        }
        if let Some(table) = self.in_section(".pci_fixup") {
            let size = self.need_size("pci_fixup")?;
            let at = self.need_member("pci_fixup", "hook_offset", 4)?;
            tables.pci_hooks = table
                .entries(size)?
                .map(|entry| table.relative(entry + at))
                .collect();
        }

        let table = self.in_symbols("__mcount_loc", "__start_mcount_loc", "__stop_mcount_loc")?;
        tables.fentry = table.all_absolute()?;
        // Entries of discarded weak functions may be zeroed.
        tables.fentry.retain(|va| va.0 != 0);
        tables.not_taken.push(table.range());
        if self.symbol("__start_kprobe_blacklist").is_some() {
            let name = "_kprobe_blacklist";
            let table =
                self.in_symbols(name, "__start_kprobe_blacklist", "__stop_kprobe_blacklist")?;
            tables.no_kprobes = table.all_absolute()?;
            tables.not_taken.push(table.range());
        }
        let (start, end) = (
            "__start_error_injection_whitelist",
            "__stop_error_injection_whitelist",
        );
        if self.symbol(start).is_some() {
            tables.not_taken.push(self.between(start, end)?);
        }
        if self.symbol("__initcall_start").is_some() {
            let table = self.in_symbols("initcalls", "__initcall_start", "__initcall_end")?;
            tables.initcalls = table.all_relative()?;
        }
        self.jump_labels(&mut tables)?;
        self.static_calls(&mut tables)?;
        Ok(tables)
    }

    /// Reads the tables of a module, which are all sections of their own and none of which it must have
    /// (arch/x86/kernel/module.c, `module_finalize`; kernel/module/main.c, `find_module_sections`).
    pub fn module_tables(&self) -> Result<Tables, Fault> {
        let mut tables = Tables::default();
        let code = |name| match self.in_section(name) {
            Some(table) => self.all_code(&table),
            None => Ok(Vec::new()),
        };
        tables.retpolines = code(".retpoline_sites")?;
        tables.returns = code(".return_sites")?;
        tables.sealed_endbr = code(".ibt_endbr_seal")?;
        tables.smp_locks = code(".smp_locks")?;
        for (name, list) in [
            ("__mcount_loc", &mut tables.fentry),
            ("_kprobe_blacklist", &mut tables.no_kprobes),
        ] {
            if let Some(table) = self.in_section(name) {
                *list = table.all_absolute()?;
                list.retain(|va| va.0 != 0);
                tables.not_taken.push(table.range());
            }
        }
        if let Some(table) = self.in_section(".altinstructions") {
            self.alternatives(&table, &mut tables)?;
        }
        if let Some(table) = self.in_section(".parainstructions") {
            self.paravirt(&table, &mut tables)?;
            tables.not_taken.push(table.range());
        }
        if let Some(table) = self.in_section("__ex_table") {
            self.exceptions(&table, &mut tables)?;
        }
        if let Some(table) = self.in_section("__bug_table") {
            let size = self.need_size("bug_entry")?;
            let at = self.need_member("bug_entry", "bug_addr_disp", 4)?;
            tables.bugs = table
                .entries(size)?
                .map(|entry| table.relative(entry + at))
                .collect();
        }
        if let Some(table) = self.in_section("__jump_table") {
            self.jump_table(&table, &mut tables)?;
        }
        if let Some(table) = self.in_section(".static_call_sites") {
            self.static_call_sites(&table, &mut tables)?;
        }
        Ok(tables)
    }

    fn alternatives(&self, table: &Table<'_>, tables: &mut Tables) -> Result<(), Fault> {
        let size = self.need_size("alt_instr")?;
        let member = |name, width| self.need_member("alt_instr", name, width);
        let (site, replacement) = (member("instr_offset", 4)?, member("repl_offset", 4)?);
        let (len, replacement_len) = (member("instrlen", 1)?, member("replacementlen", 1)?);
        // Before Linux 6.5 there is no such word, and no such flag.
        let flags = self.btf.member("alt_instr", "ft_flags");
        let flags = flags.map(|_| member("ft_flags", 4)).transpose()?;
        for at in table.entries(size)? {
            let flags = flags.map_or(0, |flags| u32::from_le_bytes(table.array(at + flags)));
            let place = self.code(table, at + site)?;
            // The upper half has the flags (arch/x86/include/asm/alternative.h, `ALT_FLAG_DIRECT_CALL`).
            let direct_call = flags >> 16 & 2 != 0;
            if direct_call {
                tables.paravirt.push(ParavirtSite {
                    site: place,
                    len: table.bytes[at + len],
                });
            }
            tables.alternatives.push(AltEntry {
                site: place,
                site_len: table.bytes[at + len],
                replacement: self.code(table, at + replacement)?,
                replacement_len: table.bytes[at + replacement_len],
                direct_call,
            });
        }
        Ok(())
    }

    fn runtime_constants(&self, tables: &mut Tables) -> Result<(), Fault> {
        for section in self.sections() {
            let value = match section.name.strip_prefix("runtime_") {
                Some("ptr_USER_PTR_MAX") => ConstantValue::UserEnd,
                Some(name) if name.starts_with("ptr_") => ConstantValue::Pointer,
                Some(name) if name.starts_with("shift_") => ConstantValue::Shift,
                _ => continue,
            };
            let table = Table {
                name: "runtime_*",
                start: section.range.start,
                bytes: self.section_bytes(&section.name).unwrap_or_default(),
            };
            let places = self.all_code(&table)?.into_iter();
            let constants = places.map(|at| RuntimeConstant { at, value });
            tables.runtime_constants.extend(constants);
        }
        Ok(())
    }

    fn paravirt(&self, table: &Table<'_>, tables: &mut Tables) -> Result<(), Fault> {
        let size = self.need_size("paravirt_patch_site")?;
        let site = self.need_member("paravirt_patch_site", "instr", 8)?;
        let len = self.need_member("paravirt_patch_site", "len", 1)?;
        for at in table.entries(size)? {
            tables.paravirt.push(ParavirtSite {
                site: LinkVa(u64::from_le_bytes(table.array(at + site))),
                len: table.bytes[at + len],
            });
        }
        Ok(())
    }

    fn exceptions(&self, table: &Table<'_>, tables: &mut Tables) -> Result<(), Fault> {
        let size = self.need_size("exception_table_entry")?;
        let insn = self.need_member("exception_table_entry", "insn", 4)?;
        let fixup = self.need_member("exception_table_entry", "fixup", 4)?;
        for at in table.entries(size)? {
            tables.faulting.push(table.relative(at + insn));
            tables.fixups.push(table.relative(at + fixup));
        }
        Ok(())
    }

    fn jump_labels(&self, tables: &mut Tables) -> Result<(), Fault> {
        let table = self.in_symbols(
            "__jump_table",
            "__start___jump_table",
            "__stop___jump_table",
        )?;
        self.jump_table(&table, tables)
    }

    fn jump_table(&self, table: &Table<'_>, tables: &mut Tables) -> Result<(), Fault> {
        let size = self.need_size("jump_entry")?;
        let code = self.need_member("jump_entry", "code", 4)?;
        let target = self.need_member("jump_entry", "target", 4)?;
        for at in table.entries(size)? {
            tables.jump_labels.push(JumpEntry {
                code: self.code(table, at + code)?,
                target: self.code(table, at + target)?,
            });
        }
        Ok(())
    }

    fn static_calls(&self, tables: &mut Tables) -> Result<(), Fault> {
        let table = self.in_symbols(
            ".static_call_sites",
            "__start_static_call_sites",
            "__stop_static_call_sites",
        )?;
        self.static_call_sites(&table, tables)
    }

    fn static_call_sites(&self, table: &Table<'_>, tables: &mut Tables) -> Result<(), Fault> {
        let size = self.need_size("static_call_site")?;
        let site = self.need_member("static_call_site", "addr", 4)?;
        let key = self.need_member("static_call_site", "key", 4)?;
        for at in table.entries(size)? {
            // include/linux/static_call_types.h: bit 0 of the key is STATIC_CALL_SITE_TAIL, bit 1 STATIC_CALL_SITE_INIT.
            let key = table.relative(at + key).0;
            tables.static_calls.push(StaticCallSite {
                site: self.code(table, at + site)?,
                tail: key & 1 == 1,
                key: LinkVa(key & !3),
            });
        }
        Ok(())
    }
}
