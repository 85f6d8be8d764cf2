//! Rule 7: what the bundle says about modules is what their files say, and edits of modules obey rules 1 and 3.
//!
//! Each module is loaded here afresh at two places, with the kernel at two slides; the bundle's text must come out the same
//! at both. Its slots, tables and symbols are read out of that memory. Rule 4 asks for the thunks of its slots as well.

pub(super) mod exports;
pub(super) mod load;
pub(super) mod tables;

use super::exec::machine::Contract;
use super::kernel::btf::Btf;
use super::kernel::sweep::Sweep;
use super::kernel::{Kernel, KernelError};
use super::report::{Findings, Rule, RuleReport};
use super::slots::{KernelThunks, Original, Replacement, replacement};
use super::{Subject, owed};
use crate::image::unpacked_module;
use load::{Loaded, Part, load};
use penumbra_bundle::{
    Bundle, LinkVa, Memory, Mitigation, Module, ModuleEdit, PerMemory, Placement, SiteKind,
    SlotKind, TextOff, Variant,
};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use tables::{Layouts, ModuleTables};

/// Two guests: other places for every memory, other distances between them, another slide.
pub(super) fn places() -> [Placement; 2] {
    let at = |start: u64, step: u64, percpu: u64, slide: u64| Placement {
        bases: PerMemory::new(|memory| match memory {
            Memory::PerCpu => percpu,
            memory => start + memory as u64 * step,
        }),
        slide,
    };
    [
        at(0xffff_ffff_c000_0000, 0x0400_0000, 0x3_0000, 0),
        at(0xffff_ffff_c0a3_7000, 0x0414_5000, 0x4_1240, 0x2ca0_0000),
    ]
}

/// INT3 between sections, so that each is decoded from its start.
const FILLER: u8 = 0xcc;
/// Code that runs nowhere or before the kernel has patched it, or that must not be hooked.
const UNTOUCHABLE: [&str; 5] = [
    ".noinstr.text",
    ".kprobes.text",
    ".static_call.text",
    ".altinstr_replacement",
    ".altinstr_aux",
];

/// Module files by the name that the module in them should have.
pub type Files = BTreeMap<String, PathBuf>;

/// A module of the bundle beside what its file says.
pub struct Read<'a> {
    module: &'a Module,
    /// Where it is read.
    places: [Placement; 2],
    loaded: Loaded,
    /// The same, elsewhere.
    moved: Loaded,
    tables: ModuleTables,
    sweep: Sweep,
    /// Where functions start. Sorted.
    starts: Vec<u32>,
}

/// Reads the files of the bundle's modules; what is wrong with those that cannot be read.
pub fn read<'a>(
    kernel: &Kernel,
    bundle: &'a Bundle,
    files: &Files,
) -> Result<(Vec<Read<'a>>, Vec<String>), KernelError> {
    let (mut read, mut faults) = (Vec::new(), Vec::new());
    if bundle.modules.is_empty() {
        return Ok((read, faults));
    }
    let btf = Btf::read(&kernel.vmlinux)?;
    let exports = exports::read(kernel, &btf)?;
    let layouts = Layouts::read(&btf)?;
    for module in &bundle.modules {
        let name = &module.name;
        let Some(path) = files.get(name) else {
            faults.push(format!(
                "module {name}: no file was given to prove it against; say --module FILE or FOLDER"
            ));
            continue;
        };
        let loaded = std::fs::read(path)
            .map_err(|error| error.to_string())
            .and_then(|file| unpacked_module(file).map_err(|fault| fault.to_string()))
            .and_then(|file| {
                let places = places();
                let at = |place| load(&file, &exports, &layouts.module, place, &elsewhere);
                let loaded = at(&places[0])?;
                let tables = ModuleTables::read(&loaded, &layouts, &places[0])?;
                Ok((loaded, at(&places[1])?, tables))
            });
        match loaded {
            Ok((loaded, moved, tables)) => read.push(Read::new(module, loaded, moved, tables)),
            Err(what) => faults.push(format!("module {name}: {}: {what}", path.display())),
        }
    }
    Ok((read, faults))
}

/// Where another module's export may be: any place will do, as long as both sides take the same.
pub(super) fn elsewhere(name: &str) -> Option<u64> {
    let sum = name.bytes().fold(0xcbf2_9ce4_u32, |sum, byte| {
        (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    Some(0xffff_ffff_c800_0000 + u64::from(sum & 0x00ff_ffff) * 4)
}

/// Proves rule 7.
pub fn check(subject: &Subject<'_>) -> RuleReport {
    let mut findings = Findings::new(Rule::Modules, subject.kernel);
    for what in subject.module_faults {
        findings.broken(None, None, what.clone());
    }
    for read in subject.modules {
        let mut wrong = Vec::new();
        read.names(&mut wrong);
        read.layout(&mut wrong);
        let fields = read.text(&mut wrong);
        let sites = read.sites(&mut wrong);
        for what in wrong {
            findings.broken(None, None, format!("module {}: {what}", read.module.name));
        }
        findings.proved("relocations at two places", fields);
        findings.proved("poke sites", sites);
        for ((variant, _), edits) in subject.variants().zip(&read.module.edits) {
            let (slots, wrong) = read.edits(edits, variant, subject.thunks);
            findings.proved("edits", slots);
            for what in wrong {
                let what = format!("module {}: {what}", read.module.name);
                findings.broken(Some(&variant.name), None, what);
            }
        }
    }
    findings.proved("modules", subject.modules.len() as u64);
    findings.done()
}

/// A slot of a module that branches to a thunk, and what it asks of it.
pub struct ThunkSlot<'a> {
    /// The variant.
    pub variant: &'a str,
    /// Where it would be if the module were at the first place.
    pub at: LinkVa,
    /// The thunk.
    pub thunk: LinkVa,
    /// What it asks.
    pub contract: Contract,
}

/// Every edit of a module that branches.
pub fn thunk_slots<'a>(subject: &Subject<'a>) -> Vec<ThunkSlot<'a>> {
    let mut slots = Vec::new();
    for read in subject.modules {
        for ((variant, _), edits) in subject.variants().zip(&read.module.edits) {
            for edit in edits {
                let at = read.va(edit.at.0);
                let bytes = edit.bytes(&read.places[0]);
                let Some(Replacement::Call(thunk) | Replacement::Jump(thunk)) =
                    bytes.and_then(|bytes| replacement(&bytes, at))
                else {
                    continue;
                };
                if let Some((original, _)) = read.original(edit.at.0, subject.thunks) {
                    slots.push(ThunkSlot {
                        variant: &variant.name,
                        at,
                        thunk,
                        contract: read.contract(edit.at.0, original),
                    });
                }
            }
        }
    }
    slots
}

impl<'a> Read<'a> {
    fn new(module: &'a Module, loaded: Loaded, moved: Loaded, tables: ModuleTables) -> Read<'a> {
        let size = loaded.text_size as usize;
        let mut text = vec![FILLER; size];
        for part in &loaded.parts {
            if let Some(at) = part.place.in_text(loaded.text_size) {
                let range = at.0 as usize..at.0 as usize + part.size as usize;
                text[range.clone()].copy_from_slice(&loaded.text()[range]);
            }
        }
        let places = places();
        let sweep = Sweep::new(LinkVa(places[0].text(TextOff(0))), &text);
        let traced = tables.poked[&SiteKind::Fentry].iter().map(|(at, _)| *at);
        let mut starts: Vec<u32> = loaded.code.iter().map(|(at, _)| *at).collect();
        starts.extend(traced);
        starts.sort_unstable();
        starts.dedup();
        Read {
            module,
            places,
            loaded,
            moved,
            tables,
            sweep,
            starts,
        }
    }

    fn va(&self, at: u32) -> LinkVa {
        LinkVa(self.places[0].text(TextOff(at)))
    }

    fn place(&self, at: u32) -> String {
        let after = self
            .module
            .symbols
            .partition_point(|symbol| symbol.at.0 <= at);
        match self.module.symbols[..after].last() {
            Some(symbol) => format!("{}+{:#x}", symbol.name, at - symbol.at.0),
            None => format!("text+{at:#x}"),
        }
    }

    /// Which module it is.
    fn names(&self, wrong: &mut Vec<String>) {
        let (said, found) = (self.module, &self.loaded);
        let info = |key: &str| found.info.get(key).cloned();
        for (what, said, found) in [
            ("name", Some(said.name.clone()), Some(found.name.clone())),
            (
                "build-id",
                Some(said.build_id.clone()),
                Some(found.build_id.clone()),
            ),
            (
                "SHA-256",
                Some(said.file_sha256.clone()),
                Some(found.digest.clone()),
            ),
            ("vermagic", Some(said.vermagic.clone()), info("vermagic")),
            ("srcversion", said.srcversion.clone(), info("srcversion")),
        ] {
            if said != found {
                let none = || "nothing".to_owned();
                let (said, found) = (said.unwrap_or_else(none), found.unwrap_or_else(none));
                wrong.push(format!("its {what} is `{said}`, the file has `{found}`"));
            }
        }
        let symbols = said.symbols.iter().map(|one| (one.at.0, one.name.clone()));
        if symbols.collect::<BTreeSet<_>>() != found.code {
            wrong.push("its symbols are not the file's".to_owned());
        }
        let exports = said.exports.iter().map(|one| (one.name.clone(), one.place));
        if exports.collect::<BTreeMap<_, _>>() != found.exports {
            wrong.push("its exports are not the file's".to_owned());
        }
    }

    /// Where the loader puts what.
    fn layout(&self, wrong: &mut Vec<String>) {
        let (said, found) = (self.module, &self.loaded);
        let parts = said.sections.iter().map(|section| Part {
            name: section.name.clone(),
            flags: section.flags,
            size: section.size.into(),
            align: section.align.into(),
            place: section.place,
        });
        let parts: Vec<Part> = parts.collect();
        if let Some((said, found)) = parts.iter().zip(&found.parts).find(|(a, b)| a != b) {
            wrong.push(format!("says {said:?}, the loader makes {found:?}"));
        } else if parts.len() != found.parts.len() {
            wrong.push("lists other sections than the loader allocates".to_owned());
        }
        if (said.text_size, said.sizes) != (found.text_size, found.sizes) {
            wrong.push("has other sizes than the loader gives it".to_owned());
        }
    }

    /// The text is the file's, relocated to any place; how many relocations that took.
    fn text(&self, wrong: &mut Vec<String>) -> u64 {
        for (placement, loaded) in self.places.iter().zip([&self.loaded, &self.moved]) {
            let found = loaded.text();
            match self.module.relocated(placement, &elsewhere) {
                Ok(text) if text == found => {}
                Ok(text) => {
                    let differs = text.iter().zip(found).position(|(a, b)| a != b);
                    let at = differs.unwrap_or(text.len().min(found.len())) as u32;
                    let place = self.place(at);
                    wrong.push(format!("its text differs from the file's at {place}"));
                    return 0;
                }
                Err(error) => {
                    wrong.push(format!("its text cannot be relocated: it {error}"));
                    return 0;
                }
            }
        }
        self.module.relocs.len() as u64
    }

    /// What the kernel itself edits; how many places.
    fn sites(&self, wrong: &mut Vec<String>) -> u64 {
        let mut proved = 0;
        let alternatives = &self.tables.poked[&SiteKind::Alternative];
        for (kind, found) in &self.tables.poked {
            let found: BTreeSet<u32> = found.iter().map(|(at, _)| *at).collect();
            let said = self.module.sites.iter().filter(|site| site.kind == *kind);
            // A part of an alternative may be a site of its own: it explains no byte that the alternative does not.
            let part = |at: u32, len: u32| {
                let mut whole = alternatives.iter();
                *kind == SiteKind::Alternative
                    && whole.any(|(start, size)| *start <= at && at + len <= start + size)
            };
            let said: BTreeSet<u32> = said
                .filter(|site| found.contains(&site.at.0) || !part(site.at.0, site.len.into()))
                .map(|site| site.at.0)
                .collect();
            // Alternatives that overlap are one site, which starts where the first does.
            let missing = found.difference(&said).filter(|at| {
                !part(**at, 1) || {
                    let mut sites = self.module.sites.iter();
                    !sites.any(|site| {
                        site.kind == *kind
                            && site.at.0 <= **at
                            && **at < site.at.0 + u32::from(site.len)
                    })
                }
            });
            for at in missing {
                wrong.push(format!("lacks a {kind:?} site at {}", self.place(*at)));
            }
            for at in said.difference(&found) {
                let place = self.place(*at);
                wrong.push(format!(
                    "has a {kind:?} site at {place} that no table names"
                ));
            }
            proved += said.intersection(&found).count() as u64;
        }
        let others = self.module.sites.iter();
        for site in others.filter(|site| !self.tables.poked.contains_key(&site.kind)) {
            let place = self.place(site.at.0);
            wrong.push(format!(
                "has a {:?} site at {place} that no table names",
                site.kind
            ));
        }
        proved
    }

    fn original(&self, at: u32, thunks: &KernelThunks) -> Option<(Original, usize)> {
        let rest = self.loaded.text().get(at as usize..)?;
        thunks.original_in(&rest[..rest.len().min(15)], self.va(at))
    }

    /// Rules 1 and 3 for one variant: how many edits hold, and what is wrong with the others.
    fn edits(
        &self,
        edits: &[ModuleEdit],
        variant: &Variant,
        thunks: &KernelThunks,
    ) -> (u64, Vec<String>) {
        let forbidden = self.forbidden();
        let (mut good, mut wrong) = (0, Vec::new());
        for edit in edits {
            match self.edit(edit, variant, thunks, &forbidden) {
                Ok(()) => good += 1,
                Err(what) => wrong.push(format!("the edit at {} {what}", self.place(edit.at.0))),
            }
        }
        (good, wrong)
    }

    fn edit(
        &self,
        edit: &ModuleEdit,
        variant: &Variant,
        thunks: &KernelThunks,
        forbidden: &BTreeMap<u32, &'static str>,
    ) -> Result<(), String> {
        let (start, len) = (edit.at.0, edit.len());
        let end = start + len as u32;
        let original = self.original(start, thunks);
        let Some((original, old)) = original else {
            return Err("replaces something other than a return or retpoline site's branch".into());
        };
        let listed = |table| self.tables.poked[&table].contains(&(start, 0));
        let listed = match (edit.slot, original) {
            (SlotKind::Return, Original::Return) => listed(SiteKind::Return),
            (SlotKind::Indirect, Original::Call(_) | Original::Jump(_)) => {
                listed(SiteKind::Retpoline)
            }
            // What it calls says it. Nothing of a module is watched.
            (SlotKind::Call, Original::Direct { to, jump: false }) => {
                let check = thunks.checks.get(&to);
                check.is_some_and(|check| check.is_dropped(variant))
            }
            _ => false,
        };
        if !listed {
            return Err("is not a slot that the module's tables list, nor a call that the variant leaves out".into());
        }
        let boundary = |at| self.sweep.is_boundary(self.va(at));
        if old != len || !boundary(start) || !boundary(end) {
            return Err(format!(
                "replaces an instruction of {old} bytes by {len} bytes"
            ));
        }
        if let Some((at, why)) = forbidden.range(start..end).next() {
            return Err(format!("edits {why} at {}", self.place(*at)));
        }
        for placement in &self.places {
            let at = LinkVa(placement.text(edit.at));
            let bytes = edit.bytes(placement);
            let bytes = bytes.ok_or("branches too far")?;
            let new = replacement(&bytes, at);
            let new = new
                .ok_or("is not one whole instruction of the slot's length that may stand there")?;
            thunks.fits(original, new)?;
            if edit.slot == SlotKind::Call && !matches!(new, Replacement::Gives(_)) {
                return Err("leads a call elsewhere".to_owned());
            }
            let dropped = match new {
                Replacement::Ret => Some(Mitigation::ReturnThunk),
                Replacement::CallRegister(_) | Replacement::JumpRegister(_) => {
                    Some(Mitigation::Retpoline)
                }
                _ => None,
            };
            if let Some(dropped) = dropped.filter(|dropped| !variant.drops.contains(dropped)) {
                return Err(format!(
                    "drops {dropped:?}, which the manifest does not say"
                ));
            }
        }
        Ok(())
    }

    /// Every byte that no edit may touch, and why.
    fn forbidden(&self) -> BTreeMap<u32, &'static str> {
        let mut bytes = BTreeMap::new();
        let mut add = |start: u32, len: u32, why| {
            bytes.extend((start..start.saturating_add(len)).map(|at| (at, why)));
        };
        let whole = |at: u32| {
            let boundary = |len: &u32| self.sweep.is_boundary(self.va(at + len));
            (1..=15).find(boundary).unwrap_or(15)
        };
        for (kind, why) in [
            (SiteKind::Fentry, "an ftrace entry"),
            (SiteKind::JumpLabel, "a jump label"),
            (SiteKind::StaticCall, "a static call"),
            (SiteKind::SmpLock, "an SMP lock prefix"),
            (SiteKind::Other, "an ENDBR64 that the kernel takes away"),
        ] {
            for (at, _) in &self.tables.poked[&kind] {
                add(*at, whole(*at), why);
            }
        }
        for (kind, why) in [
            (SiteKind::Alternative, "an alternative"),
            (SiteKind::Paravirt, "a paravirt site"),
        ] {
            for (at, len) in &self.tables.poked[&kind] {
                add(*at, *len, why);
            }
        }
        for at in &self.tables.special {
            add(
                *at,
                whole(*at),
                "an instruction that faults or traps on purpose",
            );
        }
        for start in &self.tables.blacklist {
            let after = self.starts.partition_point(|known| known <= start);
            let end = self.starts.get(after).copied();
            let end = end.unwrap_or(self.loaded.text_size);
            add(*start, end - start, "a function on the kprobe blacklist");
        }
        for part in &self.loaded.parts {
            if part.place.memory == Memory::Text && UNTOUCHABLE.contains(&part.name.as_str()) {
                add(
                    part.place.at,
                    part.size as u32,
                    "code that must stay as it is",
                );
            }
        }
        bytes
    }

    /// What the slot at `at` asks of its thunk: as for the kernel's own slots.
    fn contract(&self, at: u32, original: Original) -> Contract {
        let after = self.starts.partition_point(|start| *start <= at);
        let start = after.checked_sub(1).map_or(0, |index| self.starts[index]);
        let end = self.starts.get(after).copied().unwrap_or(u32::MAX);
        let fentry = &self.tables.poked[&SiteKind::Fentry];
        let endbr = self.loaded.text().get(start as usize..start as usize + 4);
        let traced = fentry.contains(&(start, 0))
            || fentry.contains(&(start + 4, 0)) && endbr == Some(&[0xf3, 0x0f, 0x1e, 0xfa]);
        let labels = self.loaded.pointers.range(start..end);
        let goto = labels.into_iter().any(|label| *label != start);
        owed::contract(original, traced, goto)
    }
}
