//! Rule 6: what the bundle says about the kernel is what the image says.

use super::Subject;
use super::kernel::Kernel;
use super::kernel::btf::Btf;
use super::kernel::symbols::hex;
use super::report::{Findings, Rule, RuleReport};
use super::{self_checks, watched};
use penumbra_bundle::{LinkVa, Site, SiteKind, SlotKind, TextOff, VaRange};
use rustc_hash::FxHashSet;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};

/// `THREAD_SIZE` without KASAN (arch/x86/include/asm/page_64_types.h): 4 pages.
const THREAD_SIZE: u32 = 4 << 12;

/// Proves rule 6. `digest` is the image's, as it was read, compressed or not.
pub fn check(subject: &Subject<'_>, digest: &str) -> RuleReport {
    let mut findings = Findings::new(Rule::TrueToImage, subject.kernel);
    names(subject, digest, &mut findings);
    text(subject, &mut findings);
    model(subject, &mut findings);
    layout(subject, &mut findings);
    symbols(subject, &mut findings);
    counts(subject, &mut findings);
    findings.done()
}

/// The SHA-256 of `bytes`, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Which kernel it is.
fn names(subject: &Subject<'_>, digest: &str, findings: &mut Findings<'_>) {
    let (kernel, said) = (subject.kernel, &subject.bundle.manifest.kernel);
    let banner = kernel
        .symbols
        .find("linux_banner")
        .and_then(|at| string(kernel, at));
    let release = banner.as_deref().and_then(|banner| {
        let words = banner.strip_prefix("Linux version ")?;
        words.split(' ').next().map(str::to_owned)
    });
    let notes = notes(kernel);
    let build_id = own_build_id(kernel);
    let entry = kernel.symbols.find("entry_SYSCALL_64");
    let mut same = |name: &str, said: String, found: Option<String>| {
        let found = found.unwrap_or_else(|| "nothing".to_owned());
        if said == found {
            findings.proved("facts about the kernel", 1);
        } else {
            let what = format!("kernel.{name} is `{said}`, the image has `{found}`");
            findings.broken(None, None, what);
        }
    };
    let range = |range: VaRange| format!("{} to {}", hex(range.start), hex(range.end));
    same(
        "image_sha256",
        said.image_sha256.clone(),
        Some(digest.to_owned()),
    );
    same(
        "banner",
        said.banner.trim_end().to_owned(),
        banner.map(|text| text.trim_end().to_owned()),
    );
    same("release", said.release.clone(), release);
    same("build_id", said.build_id.clone(), build_id);
    same("notes", range(said.notes), notes.map(range));
    same("syscall_entry", hex(said.syscall_entry), entry.map(hex));
}

fn notes(kernel: &Kernel) -> Option<VaRange> {
    Some(kernel.vmlinux.find_section(".notes")?.range)
}

/// The image's build-id, in hexadecimal.
pub fn own_build_id(kernel: &Kernel) -> Option<String> {
    build_id(kernel.bytes(notes(kernel)?)?)
}

/// The build-id in a `.notes` section (System V gABI, note section; owner "GNU", type 3).
pub(super) fn build_id(mut notes: &[u8]) -> Option<String> {
    loop {
        let word = |at: usize| {
            let bytes = notes.get(at..at + 4)?.try_into().ok()?;
            Some(u32::from_le_bytes(bytes) as usize)
        };
        let (owner, payload, kind) = (word(0)?, word(4)?, word(8)?);
        let start = 12 + owner.next_multiple_of(4);
        let bytes = notes.get(start..start + payload)?;
        if kind == 3 && notes.get(12..12 + owner) == Some(b"GNU\0") {
            return Some(bytes.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        notes = notes.get(start + payload.next_multiple_of(4)..)?;
    }
}

pub(super) fn string(kernel: &Kernel, at: LinkVa) -> Option<String> {
    let bytes = (1..=512).find_map(|len| {
        let bytes = kernel.vmlinux.bytes(at, len)?;
        (bytes.last() == Some(&0)).then_some(&bytes[..len - 1])
    });
    Some(String::from_utf8_lossy(bytes?).into_owned())
}

/// The text is the image's, byte for byte.
fn text(subject: &Subject<'_>, findings: &mut Findings<'_>) {
    let (kernel, bundle) = (subject.kernel, subject.bundle);
    let range = bundle.manifest.text.range();
    if !range.encloses(&kernel.text) {
        let what = "the bundle's text leaves out part of .text".to_owned();
        findings.broken(None, Some(kernel.text.start), what);
    }
    let Some(bytes) = kernel.bytes(range) else {
        let what = "the bundle's text is not in one segment of the image".to_owned();
        findings.broken(None, Some(range.start), what);
        return;
    };
    let mut same = 0;
    for (at, (said, found)) in bundle.text.iter().zip(bytes).enumerate() {
        if said == found {
            same += 1;
        } else {
            let at = LinkVa(range.start.0 + at as u64);
            let what = format!("text.bin has {said:#04x}, the image {found:#04x}");
            findings.broken(None, Some(at), what);
        }
    }
    findings.proved("bytes of text", same);
}

/// Relocations and poke sites are those of the image's tables.
fn model(subject: &Subject<'_>, findings: &mut Findings<'_>) {
    let (kernel, bundle) = (subject.kernel, subject.bundle);
    let range = bundle.manifest.text.range();
    let (model, relocs) = (&bundle.model, &kernel.vmlinux.relocs);
    let place = |at: &TextOff| LinkVa(range.start.0 + u64::from(at.0));
    for (name, said, found) in [
        ("abs32", &model.abs32, &relocs.abs32),
        ("inverse32", &model.inverse32, &relocs.inverse32),
        ("abs64", &model.abs64, &relocs.abs64),
    ] {
        let said: BTreeSet<LinkVa> = said.iter().map(place).collect();
        let found = found.iter().copied().filter(|at| range.contains(*at));
        let found: BTreeSet<LinkVa> = found.collect();
        findings.proved(
            "relocations of text",
            said.intersection(&found).count() as u64,
        );
        for at in said.symmetric_difference(&found) {
            let what = match said.contains(at) {
                true => format!("model.{name} has a relocation that the image lacks"),
                false => format!("model.{name} lacks a relocation that the image has"),
            };
            findings.broken(None, Some(*at), what);
        }
    }
    let tables = &kernel.tables;
    let starts = |sites: &[VaRange]| sites.iter().map(|site| site.start).collect::<Vec<_>>();
    let alternatives: Vec<VaRange> = tables.alternatives.iter().map(|entry| entry.site).collect();
    for (kind, found) in [
        (SiteKind::Return, tables.return_sites.clone()),
        (SiteKind::Retpoline, tables.retpoline_sites.clone()),
        (SiteKind::Fentry, tables.fentry.clone()),
        (SiteKind::JumpLabel, tables.jump_labels.clone()),
        (SiteKind::StaticCall, tables.static_calls.clone()),
        (SiteKind::SmpLock, tables.smp_locks.clone()),
        (SiteKind::Paravirt, starts(&tables.paravirt)),
        (SiteKind::Alternative, starts(&alternatives)),
        (SiteKind::RuntimeConstant, starts(&tables.constants)),
    ] {
        // A part of an alternative may be a site of its own: it explains no byte that the alternative does not.
        let enclosed = |site: &&Site| {
            let start = place(&site.at);
            let range = VaRange {
                start,
                end: LinkVa(start.0 + u64::from(site.len)),
            };
            kind == SiteKind::Alternative && alternatives.iter().any(|other| other.encloses(&range))
        };
        let said = model.sites.iter().filter(|site| site.kind == kind);
        let known: FxHashSet<LinkVa> = found.iter().copied().collect();
        let said = said.filter(|site| known.contains(&place(&site.at)) || !enclosed(site));
        let said: FxHashSet<LinkVa> = said.map(|site| place(&site.at)).collect();
        let found = found.into_iter().filter(|at| kernel.in_text(*at));
        let found: FxHashSet<LinkVa> = found.collect();
        let mut differ: Vec<&LinkVa> = said.symmetric_difference(&found).collect();
        differ.sort_unstable();
        findings.proved("poke sites", said.intersection(&found).count() as u64);
        for at in differ {
            let what = match said.contains(at) {
                true => format!("the model has a {kind:?} site that no table of the image names"),
                false => format!("the model lacks a {kind:?} site that the image's table names"),
            };
            findings.broken(None, Some(*at), what);
        }
    }
}

/// Bits of the type in `struct orc_entry`: since Linux 6.4 three, and no `end` beside it (arch/x86/include/asm/orc_types.h).
fn orc_type_bits(btf: &Btf) -> Option<u32> {
    btf.size("orc_entry")?;
    Some(if btf.has_member("orc_entry", "end") {
        2
    } else {
        3
    })
}

/// Structure offsets and data symbols.
fn layout(subject: &Subject<'_>, findings: &mut Findings<'_>) {
    let (kernel, manifest) = (subject.kernel, &subject.bundle.manifest);
    let Ok(btf) = Btf::read(&kernel.vmlinux) else {
        return findings.broken(None, None, "the image's BTF does not decode".to_owned());
    };
    for (key, said) in &manifest.layout {
        let found = match key.split_once('.') {
            Some(("sizeof", structure)) => btf.size(structure),
            Some(("const", "THREAD_SIZE")) => Some(THREAD_SIZE),
            Some(("const", "ORC_TYPE_BITS")) => orc_type_bits(&btf),
            Some((of, name)) => btf.offset(of, name).or_else(|| btf.enumerator(of, name)),
            None => None,
        };
        if found == Some(*said) {
            findings.proved("structure offsets", 1);
        } else {
            let found = found.map_or("nothing".to_owned(), |found| format!("{found:#x}"));
            let what = format!("layout `{key}` is {said:#x}, BTF has {found}");
            findings.broken(None, None, what);
        }
    }
    for (name, said) in &manifest.data {
        let named = kernel.symbols.named(name).any(|at| at == *said);
        if named || name == "current_task" && kernel.in_pcpu_hot(&btf, name) == Some(*said) {
            findings.proved("data symbols", 1);
        } else {
            let what = format!("data `{name}` is not where the image has it");
            findings.broken(None, Some(*said), what);
        }
    }
}

/// The bundle's text symbols are kallsyms'.
fn symbols(subject: &Subject<'_>, findings: &mut Findings<'_>) {
    let range = subject.bundle.manifest.text.range();
    let said: BTreeSet<(LinkVa, &str)> = subject
        .bundle
        .symbols
        .0
        .iter()
        .map(|symbol| {
            (
                LinkVa(range.start.0 + u64::from(symbol.at.0)),
                symbol.name.as_str(),
            )
        })
        .collect();
    let found: BTreeSet<(LinkVa, &str)> = subject
        .kernel
        .symbols
        .iter()
        .filter(|symbol| range.contains(symbol.at))
        .map(|symbol| (symbol.at, symbol.name.as_str()))
        .collect();
    findings.proved("text symbols", said.intersection(&found).count() as u64);
    for (at, name) in said.symmetric_difference(&found) {
        let what = match said.contains(&(*at, *name)) {
            true => format!("symbol `{name}` is not in the image"),
            false => format!("symbol `{name}` is not in the bundle"),
        };
        findings.broken(None, Some(*at), what);
    }
}

/// The passes whose slots are also those of `return-cfi` and of `no-retpoline`.
const SHARING: [&str; 3] = ["zero-regs", "stack-clear", "promote"];

/// The manifest's counts are those of the edits, and each pass accounts for every slot of its kind.
fn counts(subject: &Subject<'_>, findings: &mut Findings<'_>) {
    let kernel = subject.kernel;
    let slots = |sites: &[LinkVa]| sites.iter().filter(|at| kernel.in_text(**at)).count() as u64;
    let all = [
        slots(&kernel.tables.return_sites),
        slots(&kernel.tables.retpoline_sites),
    ];
    for (variant, edits) in subject.variants() {
        let mut edited: BTreeMap<SlotKind, u64> = BTreeMap::new();
        for edit in edits {
            *edited.entry(edit.slot).or_default() += 1;
        }
        let total = edits.len() as u64;
        // The slots of these are another's too.
        let own = variant.passes.iter();
        let own = own.filter(|pass| !SHARING.contains(&pass.name.as_str()));
        let by_passes: u64 = own.map(|pass| pass.edited).sum();
        if variant.edit_count != total || by_passes != total {
            let what = format!(
                "has {total} edits; the manifest says {}, its passes {by_passes}",
                variant.edit_count
            );
            findings.broken(Some(&variant.name), None, what);
        } else {
            findings.proved("counts", 1);
        }
        for pass in &variant.passes {
            let seen = pass.edited + pass.left.values().sum::<u64>();
            let hook = pass.name == "module-free" && seen == 1;
            if watched::PASSES.contains(&pass.name.as_str()) {
                let into = watched::into(subject, &pass.name).count() as u64;
                if seen != into {
                    let what = format!(
                        "pass {} accounts for {seen} calls and jumps; {into} enter what it watches",
                        pass.name
                    );
                    findings.broken(Some(&variant.name), None, what);
                }
            } else if pass.name == self_checks::PASS {
                let into = self_checks::into(subject, pass);
                if seen != into {
                    let what = format!(
                        "pass {} accounts for {seen} calls and jumps; {into} enter what it leaves out",
                        pass.name
                    );
                    findings.broken(Some(&variant.name), None, what);
                }
            } else if !hook && !all.contains(&seen) {
                let what = format!(
                    "pass {} accounts for {seen} slots; the image has {} return and {} retpoline sites",
                    pass.name, all[0], all[1]
                );
                findings.broken(Some(&variant.name), None, what);
            } else {
                findings.proved("counts", 1);
            }
        }
    }
}
