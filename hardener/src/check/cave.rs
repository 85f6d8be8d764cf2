//! Rule 2: thunks and tables lie in filler that no code uses, apart from one another.

use super::Subject;
use super::dead::{SAVING, SUFFIX};
use super::kernel::symbols::hex;
use super::promoted;
use super::report::{Findings, Rule, RuleReport};
use super::sets;
use goblin::elf::{Elf, header, program_header, section_header, sym};
use penumbra_bundle::{Bundle, Cave, HashedBytes, LinkVa, RelocKind, TableKind, VaRange};

/// INT3, with which Linux fills the gaps in its text (`vmlinux.lds.S`).
const INT3: u8 = 0xcc;

/// `cave.elf` as the installer will put it into memory.
pub struct CaveImage {
    /// `.thunks`; empty when the bundle has none.
    pub thunks: VaRange,
    /// `.tables`; empty when the bundle has none.
    pub tables: VaRange,
    /// The whole cave, sections over filler, before relocation.
    pub bytes: Vec<u8>,
    /// Names in the cave, by address.
    pub symbols: Vec<(LinkVa, String)>,
}

impl CaveImage {
    /// Reads `cave.elf`; what is wrong with it.
    pub fn read(file: &[u8], cave: &Cave) -> Result<CaveImage, String> {
        let elf = Elf::parse(file).map_err(|error| format!("cave.elf: {error}"))?;
        if elf.header.e_type != header::ET_EXEC || elf.header.e_machine != header::EM_X86_64 {
            return Err("cave.elf is no x86-64 ET_EXEC file".to_owned());
        }
        let nowhere = VaRange {
            start: cave.range.start,
            end: cave.range.start,
        };
        let mut image = CaveImage {
            thunks: nowhere,
            tables: nowhere,
            bytes: vec![cave.filler; cave.range.len() as usize],
            symbols: Vec::new(),
        };
        for section in &elf.section_headers {
            if section.sh_flags & u64::from(section_header::SHF_ALLOC) == 0 || section.sh_size == 0
            {
                continue;
            }
            let name = elf.shdr_strtab.get_at(section.sh_name).unwrap_or_default();
            let range = span(section.sh_addr, section.sh_size)?;
            let place = match name {
                ".thunks" => &mut image.thunks,
                ".tables" => &mut image.tables,
                _ => return Err(format!("cave.elf has a section `{name}`")),
            };
            if !place.is_empty() {
                return Err(format!("cave.elf has two sections `{name}`"));
            }
            if section.sh_type != section_header::SHT_PROGBITS || !cave.range.encloses(&range) {
                return Err(format!(
                    "section `{name}` from {} to {} leaves the cave or has no bytes",
                    hex(range.start),
                    hex(range.end)
                ));
            }
            *place = range;
            let from = section.sh_offset as usize;
            let bytes = from.checked_add(range.len() as usize);
            let bytes = bytes.and_then(|to| file.get(from..to));
            let bytes = bytes.ok_or_else(|| format!("section `{name}` leaves cave.elf"))?;
            let at = (range.start.0 - cave.range.start.0) as usize;
            image.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        }
        for segment in &elf.program_headers {
            let load = segment.p_type == program_header::PT_LOAD && segment.p_memsz > 0;
            if load
                && !cave
                    .range
                    .encloses(&span(segment.p_vaddr, segment.p_memsz)?)
            {
                return Err(format!(
                    "a segment at {:#x} leaves the cave",
                    segment.p_vaddr
                ));
            }
        }
        for symbol in elf.syms.iter() {
            let name = elf.strtab.get_at(symbol.st_name).unwrap_or_default();
            if !name.is_empty() && sym::st_type(symbol.st_info) != sym::STT_FILE {
                image
                    .symbols
                    .push((LinkVa(symbol.st_value), name.to_owned()));
            }
        }
        image.symbols.sort();
        Ok(image)
    }

    /// The cave's bytes at a slide. Relocations that leave the cave are a violation elsewhere and do nothing here.
    pub fn relocated(&self, bundle: &Bundle, slide: u64) -> Vec<u8> {
        let start = bundle.manifest.cave.range.start.0;
        let mut bytes = self.bytes.clone();
        for (at, kind) in bundle.cave_relocs() {
            let Some(at) = at.0.checked_sub(start) else {
                continue;
            };
            let wide = kind == RelocKind::Abs64;
            let len = if wide { 8 } else { 4 };
            let Some(field) = bytes
                .get_mut(at as usize..)
                .and_then(|rest| rest.get_mut(..len))
            else {
                continue;
            };
            if wide {
                let value = u64::from_le_bytes(field.try_into().expect("8 bytes"));
                field.copy_from_slice(&value.wrapping_add(slide).to_le_bytes());
                continue;
            }
            let value = u32::from_le_bytes(field.try_into().expect("4 bytes"));
            let value = match kind {
                RelocKind::Inverse32 => value.wrapping_sub(slide as u32),
                _ => value.wrapping_add(slide as u32),
            };
            field.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// The bytes of `range`, which lies in the cave.
    pub fn slice(&self, cave: &Cave, range: VaRange) -> &[u8] {
        let from = (range.start.0 - cave.range.start.0) as usize;
        &self.bytes[from..from + range.len() as usize]
    }

    /// Whether `out %al,$0xe6; jmp cleanup` stands at `at` among the thunks.
    pub fn is_module_free(&self, cave: &Cave, at: LinkVa, cleanup: LinkVa) -> bool {
        let range = VaRange {
            start: at,
            end: LinkVa(at.0.saturating_add(7)),
        };
        if !self.thunks.encloses(&range) {
            return false;
        }
        let bytes = self.slice(cave, range);
        let distance = cleanup.0.wrapping_sub(range.end.0) as u32;
        bytes[..3] == [0xe6, 0xe6, 0xe9] && bytes[3..] == distance.to_le_bytes()
    }

    /// Whether the thunk at `at` says by its name that it clears registers.
    pub fn clears(&self, at: LinkVa) -> bool {
        self.name(at).is_some_and(|name| name.ends_with(SUFFIX))
    }

    /// Whether the thunk at `at` says by its name that it saves what it uses.
    pub fn saves(&self, at: LinkVa) -> bool {
        self.name(at).is_some_and(|name| name.ends_with(SAVING))
    }

    /// Whether the thunk at `at` says by its name that it compares with targets and goes on without the retpoline.
    pub fn promotes(&self, at: LinkVa) -> bool {
        let name = self.name(at);
        name.is_some_and(|name| name.starts_with(promoted::PREFIX))
    }

    /// The first name at `at`.
    pub fn name(&self, at: LinkVa) -> Option<&str> {
        let from = self.symbols.partition_point(|(symbol, _)| *symbol < at);
        let (symbol, name) = self.symbols.get(from)?;
        (*symbol == at).then_some(name.as_str())
    }

    /// The thunk or table at or before `at`, for messages.
    pub fn describe(&self, at: LinkVa) -> String {
        let after = self.symbols.partition_point(|(symbol, _)| *symbol <= at);
        match self.symbols[..after].last() {
            Some((symbol, name)) => format!("{name}+{:#x}", at.0 - symbol.0),
            None => "cave".to_owned(),
        }
    }
}

fn span(start: u64, len: u64) -> Result<VaRange, String> {
    let end = start.checked_add(len);
    Ok(VaRange {
        start: LinkVa(start),
        end: LinkVa(end.ok_or("cave.elf wraps around the address space")?),
    })
}

/// Proves rule 2.
pub fn check(subject: &Subject<'_>) -> RuleReport {
    let (kernel, bundle) = (subject.kernel, subject.bundle);
    let mut findings = Findings::new(Rule::OneSharedCave, kernel);
    let cave = &bundle.manifest.cave;
    let range = cave.range;
    if range.is_empty() {
        let used = !cave.tables.is_empty() || !bundle.relocs.is_empty();
        if used {
            findings.broken(
                None,
                Some(range.start),
                "the cave is empty but used".to_owned(),
            );
        }
        return findings.done();
    }
    filler(subject, &mut findings);
    unused(subject, &mut findings);
    let mut parts: Vec<(&str, VaRange)> = Vec::new();
    match subject.cave {
        Ok(image) => parts.extend([(".thunks", image.thunks), (".tables", image.tables)]),
        Err(what) => findings.broken(None, Some(range.start), what.clone()),
    }
    parts.retain(|(_, range)| !range.is_empty());
    apart(&parts, &mut findings);
    let mut tables: Vec<(&str, VaRange)> = Vec::new();
    for table in &cave.tables {
        tables.push((&table.name, table.range));
        let inside = subject
            .cave
            .as_ref()
            .is_ok_and(|image| image.tables.encloses(&table.range));
        let named = subject.cave.as_ref().is_ok_and(|image| {
            image
                .symbols
                .contains(&(table.range.start, table.name.clone()))
        });
        if !inside || !named {
            let what = format!("table `{}` is not in .tables under its name", table.name);
            findings.broken(None, Some(table.range.start), what);
        }
        // Behind its last entry a table may be filled up: a bitmap with zeros, offsets with 0xffffffff, which rule 5
        // proves to be no members.
        let least = match table.kind {
            TableKind::Bitmap { granule: 0 } => u64::MAX,
            TableKind::Bitmap { granule } => table.covers.len().div_ceil(u64::from(granule) * 8),
            TableKind::SortedOffsets
            | TableKind::HashedOffsets
            | TableKind::HashedClasses { .. }
            | TableKind::HashedArities => table.count.saturating_mul(4),
            TableKind::HashedBytes { offset_bits } => match HashedBytes::new(offset_bits) {
                // Nothing behind its parts is read.
                Some(hash) if table.range.len().is_multiple_of(hash.part_len() as u64) => {
                    table.count
                }
                _ => u64::MAX,
            },
        };
        let fits = least <= table.range.len() && table.range.len().is_multiple_of(4);
        if !fits {
            let what = format!("table `{}` has not the size of what it covers", table.name);
            findings.broken(None, Some(table.range.start), what);
        }
    }
    apart(&tables, &mut findings);
    findings.proved(
        "sections and tables apart",
        (parts.len() + tables.len()) as u64,
    );
    let mut edits = 0;
    for (variant, edit) in subject.edits() {
        edits += 1;
        let at = subject.place(edit);
        if at < range.end && at.0 + edit.bytes.len() as u64 > range.start.0 {
            findings.broken(Some(variant), Some(at), "edits the cave".to_owned());
        }
    }
    findings.proved("edits outside it", edits);
    findings.done()
}

/// Every byte of the cave is filler in the image.
fn filler(subject: &Subject<'_>, findings: &mut Findings<'_>) {
    let cave = &subject.bundle.manifest.cave;
    if cave.filler != INT3 {
        let what = format!("filler is {:#04x}, not INT3", cave.filler);
        findings.broken(None, Some(cave.range.start), what);
    }
    let Some(bytes) = subject.kernel.bytes(cave.range) else {
        let what = "the cave is not in the image".to_owned();
        findings.broken(None, Some(cave.range.start), what);
        return;
    };
    if !subject.kernel.text.encloses(&cave.range) {
        let what =
            "the cave leaves .text: what follows is freed and made non-executable".to_owned();
        findings.broken(None, Some(cave.range.end), what);
    }
    let mut filler = 0;
    for (at, byte) in bytes.iter().enumerate() {
        if *byte == cave.filler {
            filler += 1;
        } else {
            let at = LinkVa(cave.range.start.0 + at as u64);
            findings.broken(
                None,
                Some(at),
                format!("the cave holds {byte:#04x} in the image"),
            );
        }
    }
    findings.proved("filler bytes", filler);
}

/// No symbol, branch, pointer or table leads into the cave.
fn unused(subject: &Subject<'_>, findings: &mut Findings<'_>) {
    let kernel = subject.kernel;
    let range = subject.bundle.manifest.cave.range;
    let mut seen = 0;
    for symbol in kernel.symbols.iter() {
        seen += 1;
        // `__kprobes_text_end` and the like mark where something before the cave ends.
        let mark = symbol.at == range.start
            && (symbol.name.ends_with("_end") || symbol.name.ends_with("_start"));
        if range.contains(symbol.at) && !mark {
            let what = format!("symbol `{}` lies in the cave", symbol.name);
            findings.broken(None, Some(symbol.at), what);
        }
    }
    for branch in &kernel.sweep.branches {
        seen += 1;
        if range.contains(branch.to) {
            let what = format!("branches into the cave, to {}", hex(branch.to));
            findings.broken(None, Some(branch.at), what);
        }
    }
    let tables = &kernel.tables;
    let sites = [
        &tables.return_sites,
        &tables.retpoline_sites,
        &tables.fentry,
        &tables.jump_labels,
        &tables.static_calls,
        &tables.smp_locks,
        &tables.may_fault,
        &tables.bugs,
        &tables.kprobe_blacklist,
    ];
    let spans = tables
        .alternatives
        .iter()
        .map(|alternative| alternative.site);
    let spans = spans.chain(tables.paravirt.iter().copied());
    let spans = spans.chain(tables.constants.iter().copied());
    let places = sites.into_iter().flatten().copied();
    let pointers = places
        .chain(spans.map(|span| span.start))
        .chain(sets::pointers(kernel));
    for to in pointers {
        seen += 1;
        if range.contains(to) && to != range.start {
            findings.broken(
                None,
                Some(to),
                "a table or pointer leads into the cave".to_owned(),
            );
        }
    }
    findings.proved("symbols, branches and pointers elsewhere", seen);
}

fn apart(parts: &[(&str, VaRange)], findings: &mut Findings<'_>) {
    for (index, (name, range)) in parts.iter().enumerate() {
        for (other, before) in &parts[..index] {
            if range.start < before.end && before.start < range.end {
                let what = format!("`{name}` overlaps `{other}`");
                findings.broken(None, Some(range.start), what);
            }
        }
    }
}
