//! Rule 4: every thunk that an edit reaches keeps what its slots must keep and lets through exactly what its tables hold.

use super::cave::CaveImage;
use super::exec::machine::{Code, Contract, Exit, Fault, Machine, register_name};
use super::exec::tree::{Lookup, Tree, Wrong};
use super::kernel::Kernel;
use super::kernel::symbols::hex;
use super::report::{Findings, Rule, RuleReport};
use super::slots::{Original, Replacement, replacement};
use super::{Subject, decoded_tables};
use iced_x86::{Code as Opcode, Decoder, DecoderOptions, Instruction};
use penumbra_bundle::{LinkVa, Reloc, RelocKind};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// KASLR moves the kernel by multiples of 2 MiB inside its 1 GiB mapping (`CONFIG_PHYSICAL_ALIGN`). Each thunk is proved
/// where it was linked and at this slide; relocations are linear, and rule 4 also proves that none is missing or too many.
const SLIDES: [u64; 2] = [0, 0x2ca0_0000];

/// r10 and r11 as a set of register numbers.
const R10_R11: u16 = 1 << 10 | 1 << 11;

/// Where the kernel's image may be mapped (`__START_KERNEL_map`, `KERNEL_IMAGE_SIZE`).
const MAPPING: std::ops::Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;

/// Which tables the thunks of each kind were seen to read.
#[derive(Default)]
pub struct Roles {
    /// Sets of tables, by index in the manifest, of which return thunks pass the members.
    pub returns: BTreeSet<Vec<usize>>,
    /// The same for indirect branches.
    pub entries: BTreeSet<Vec<usize>>,
}

/// Slots that owe and are owed the same.
struct Group<'a> {
    slots: u64,
    first: LinkVa,
    variant: &'a str,
}

/// Proves rule 4; what the tables were used for.
pub fn check(subject: &Subject<'_>) -> (RuleReport, Roles) {
    let mut findings = Findings::new(Rule::ThunkContract, subject.kernel);
    let mut roles = Roles::default();
    let groups = groups(subject, &mut findings);
    match subject.cave {
        Ok(image) => {
            fields(subject, image, &mut findings);
            prove(subject, image, &groups, &mut findings, &mut roles);
        }
        Err(_) if groups.is_empty() => {}
        Err(what) => findings.broken(None, None, format!("no thunk is proved: {what}")),
    }
    (findings.done(), roles)
}

/// All pairs of a thunk and what its slots ask of it.
fn groups<'a>(
    subject: &Subject<'a>,
    findings: &mut Findings<'_>,
) -> BTreeMap<(LinkVa, Contract), Group<'a>> {
    let kernel = subject.kernel;
    let traced: HashSet<LinkVa> = kernel.tables.fentry.iter().copied().collect();
    let gotos = computed_gotos(kernel);
    let mut groups = BTreeMap::new();
    for (variant, edit) in subject.edits() {
        let at = subject.place(edit);
        let to = match replacement(&edit.bytes, at) {
            Some(Replacement::Call(to) | Replacement::Jump(to)) => to,
            // No thunk is reached, or rule 1 says what is wrong.
            _ => continue,
        };
        let Some((original, _)) = subject.thunks.original(kernel, at) else {
            continue;
        };
        let contract = match original {
            Original::Return => {
                let free = kernel
                    .symbols
                    .around(at)
                    .is_some_and(|function| has_fentry(kernel, &traced, function.start));
                Contract {
                    target: None,
                    scratch: if free { R10_R11 } else { 0 },
                    flags: free,
                }
            }
            Original::Call(register) | Original::Jump(register) => {
                // A call and a tail call may clobber r11 and flags, which carry no argument (System V psABI, 3.2.1 and
                // figure 3.4); r10 may be a static chain. A computed goto stays in its function, where all may be live.
                let inside = matches!(original, Original::Jump(_))
                    && kernel
                        .symbols
                        .around(at)
                        .is_some_and(|function| gotos.contains(&function.start));
                let scratch = if inside || register == 11 { 0 } else { 1 << 11 };
                Contract {
                    target: Some(register),
                    scratch,
                    flags: !inside,
                }
            }
        };
        if !subject.bundle.manifest.cave.range.contains(to) {
            let what = format!("branches to {}, which is no thunk", hex(to));
            findings.broken(Some(variant), Some(at), what);
            continue;
        }
        let group = groups.entry((to, contract)).or_insert(Group {
            slots: 0,
            first: at,
            variant,
        });
        group.slots += 1;
    }
    groups
}

/// A function traced by ftrace: compiled with -pg, so without -fipa-ra, so its callers expect r10, r11 and flags to be
/// lost. With IBT the call follows a 4-byte ENDBR64.
fn has_fentry(kernel: &Kernel, traced: &HashSet<LinkVa>, start: LinkVa) -> bool {
    traced.contains(&start)
        || traced.contains(&LinkVa(start.0 + 4))
            && kernel.vmlinux.bytes(start, 4) == Some(&[0xf3, 0x0f, 0x1e, 0xfa])
}

/// Functions with labels that data points to.
fn computed_gotos(kernel: &Kernel) -> HashSet<LinkVa> {
    let places = kernel.vmlinux.relocs.abs64.iter();
    let places = places.filter(|place| {
        let tables = &kernel.tables.descriptive;
        !tables.iter().any(|table| table.contains(**place))
    });
    let labels = places.filter_map(|place| kernel.vmlinux.u64(*place).map(LinkVa));
    labels
        .filter(|label| kernel.in_text(*label))
        .filter_map(|label| {
            let function = kernel.symbols.around(label)?;
            (function.start != label).then_some(function.start)
        })
        .collect()
}

/// Absolute addresses in thunks are exactly the relocations, and jumps to the return thunk exactly the return tails.
fn fields(subject: &Subject<'_>, image: &CaveImage, findings: &mut Findings<'_>) {
    let cave = &subject.bundle.manifest.cave;
    let mut relocs = BTreeSet::new();
    let mut tails = BTreeSet::new();
    let mut decoder = Decoder::with_ip(
        64,
        image.slice(cave, image.thunks),
        image.thunks.start.0,
        DecoderOptions::NONE,
    );
    let mut instruction = Instruction::default();
    let mut count = 0;
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        let at = instruction.ip();
        if instruction.is_invalid() {
            let what = "no instruction among the thunks".to_owned();
            findings.broken(None, Some(LinkVa(at)), what);
            continue;
        }
        count += 1;
        let offsets = decoder.get_constant_offsets(&instruction);
        let mut field = |offset: usize, size: usize, value: u64| {
            let (kind, value) = match size {
                8 => (RelocKind::Abs64, value),
                4 => (RelocKind::Abs32, i64::from(value as i32) as u64),
                _ => return,
            };
            if MAPPING.contains(&value) {
                let at = LinkVa(at + offset as u64);
                relocs.insert((at, kind == RelocKind::Abs64));
            }
        };
        if offsets.has_displacement() && !instruction.is_ip_rel_memory_operand() {
            let (offset, size) = (offsets.displacement_offset(), offsets.displacement_size());
            field(offset, size, instruction.memory_displacement64());
        }
        let is_branch = instruction.is_jmp_short_or_near()
            || instruction.is_jcc_short_or_near()
            || instruction.is_call_near();
        if offsets.has_immediate() && !is_branch {
            let immediate = (0..instruction.op_count())
                .find_map(|operand| instruction.try_immediate(operand).ok());
            let (offset, size) = (offsets.immediate_offset(), offsets.immediate_size());
            field(offset, size, immediate.unwrap_or(0));
        }
        if is_branch && instruction.near_branch_target() == subject.thunks.ret.0 {
            tails.insert(LinkVa(at));
            if instruction.code() != Opcode::Jmp_rel32_64 || instruction.len() != 5 {
                let what =
                    "reaches the return thunk by something other than `jmp rel32`".to_owned();
                findings.broken(None, Some(LinkVa(at)), what);
            }
        }
    }
    let declared: BTreeSet<(LinkVa, bool)> = cave
        .relocs
        .iter()
        .map(|Reloc { at, kind }| (*at, *kind == RelocKind::Abs64))
        .collect();
    if let Some(inverse) = cave
        .relocs
        .iter()
        .find(|reloc| reloc.kind == RelocKind::Inverse32)
    {
        let what = "is relocated as per-cpu, which no thunk uses".to_owned();
        findings.broken(None, Some(inverse.at), what);
    }
    for (at, _) in relocs.difference(&declared) {
        let what = format!(
            "{}: an absolute address without relocation",
            image.describe(*at)
        );
        findings.broken(None, Some(*at), what);
    }
    for (at, _) in declared.difference(&relocs) {
        let what = format!("{}: relocated but no absolute address", image.describe(*at));
        findings.broken(None, Some(*at), what);
    }
    let listed: BTreeSet<LinkVa> = cave.return_tails.iter().copied().collect();
    for at in tails.difference(&listed) {
        let what = format!(
            "{}: a return tail that the manifest lacks",
            image.describe(*at)
        );
        findings.broken(None, Some(*at), what);
    }
    for at in listed.difference(&tails) {
        let what = "the manifest's return tail is no jump to __x86_return_thunk".to_owned();
        findings.broken(None, Some(*at), what);
    }
    if !cave.relocs.is_sorted_by_key(|reloc| reloc.at) || !cave.return_tails.is_sorted() {
        findings.broken(
            None,
            None,
            "relocations or return tails are unsorted".to_owned(),
        );
    }
    findings.proved("thunk instructions", count);
    findings.proved("relocations", relocs.len() as u64);
    findings.proved("return tails", tails.len() as u64);
}

fn prove(
    subject: &Subject<'_>,
    image: &CaveImage,
    groups: &BTreeMap<(LinkVa, Contract), Group<'_>>,
    findings: &mut Findings<'_>,
    roles: &mut Roles,
) {
    let cave = &subject.bundle.manifest.cave;
    let tables = decoded_tables(subject.bundle, image);
    let mut faulty = BTreeSet::new();
    for slide in SLIDES {
        let bytes = image.relocated(cave, slide);
        let code = Code {
            start: cave.range.start.0.wrapping_add(slide),
            bytes: &bytes,
            executable: (
                image.thunks.start.0.wrapping_add(slide),
                image.thunks.end.0.wrapping_add(slide),
            ),
        };
        let moved: Vec<Vec<u64>> = tables
            .iter()
            .map(|members| members.iter().map(|at| at.wrapping_add(slide)).collect())
            .collect();
        let lookups: Vec<Lookup<'_>> = cave
            .tables
            .iter()
            .zip(&moved)
            .map(|(table, members)| {
                let at = |va: LinkVa| va.0.wrapping_add(slide);
                Lookup {
                    place: (at(table.range.start), at(table.range.end)),
                    covers: (at(table.covers.start), at(table.covers.end)),
                    members,
                }
            })
            .collect();
        let exit = |at: u64| {
            let at = LinkVa(at.wrapping_sub(slide));
            if cave.return_tails.binary_search(&at).is_ok() {
                return Some(Exit::Return);
            }
            subject
                .thunks
                .indirect
                .get(&at)
                .map(|register| Exit::Indirect(*register))
        };
        let mut proved: Vec<(Tree, Result<BTreeSet<usize>, Wrong>)> = Vec::new();
        for ((thunk, contract), group) in groups {
            if faulty.contains(&(*thunk, *contract)) {
                continue;
            }
            let name = image.describe(*thunk);
            let mut broken = |address: LinkVa, what: String| {
                let what = format!(
                    "{name} {what}; {} slots use it, the first is {}",
                    group.slots,
                    hex(group.first)
                );
                findings.broken(Some(group.variant), Some(address), what);
                faulty.insert((*thunk, *contract));
            };
            let tree = match Machine::run(&code, &exit, *contract, thunk.0.wrapping_add(slide)) {
                Ok(tree) => tree,
                Err(Fault { at, what }) => {
                    let at = LinkVa(at.wrapping_sub(slide));
                    broken(at, format!("fails at {}: it {what}", image.describe(at)));
                    continue;
                }
            };
            let known = proved.iter().position(|(other, _)| *other == tree);
            let index = known.unwrap_or_else(|| {
                let verdict = tree.prove(&code, &lookups);
                proved.push((tree, verdict));
                proved.len() - 1
            });
            match &proved[index].1 {
                Ok(seen) => {
                    let seen: Vec<usize> = seen.iter().copied().collect();
                    match contract.target {
                        None => roles.returns.insert(seen),
                        Some(_) => roles.entries.insert(seen),
                    };
                }
                Err(wrong) => broken(*thunk, explain(subject, *wrong, slide)),
            }
        }
        if slide == 0 {
            findings.proved("decisions evaluated for every address", proved.len() as u64);
        }
    }
    let good = groups.keys().filter(|key| !faulty.contains(key));
    let keeps: BTreeSet<String> = good
        .clone()
        .map(|(_, contract)| match contract.target {
            None if contract.flags => "return thunk that may lose r10, r11, flags".to_owned(),
            None => "return thunk that keeps all".to_owned(),
            Some(register) => format!("thunk for {}", register_name(register)),
        })
        .collect();
    findings.proved("thunk contracts", good.clone().count() as u64);
    findings.proved("kinds of thunk", keeps.len() as u64);
    findings.proved("slots behind them", good.map(|key| groups[key].slots).sum());
}

fn explain(subject: &Subject<'_>, wrong: Wrong, slide: u64) -> String {
    let symbols = &subject.kernel.symbols;
    let name = |at: u64| {
        let at = LinkVa(at.wrapping_sub(slide));
        match symbols.name(at) {
            Some(name) if subject.kernel.in_text(at) => format!("{} ({name})", hex(at)),
            _ => hex(at),
        }
    };
    match wrong {
        Wrong::Unbounded(first) => format!(
            "reads its table or traps for addresses that it has not compared with the table's range, from {}",
            name(first)
        ),
        Wrong::NoTable => "lets addresses through without looking in a table".to_owned(),
        Wrong::Outside(first) => {
            format!(
                "reads or traps for {}, of which its tables say nothing",
                name(first)
            )
        }
        Wrong::Reads(first, at) => {
            format!("reads {} outside the cave for {}", name(at), name(first))
        }
        Wrong::NotATable(first, at) => {
            format!("reads {} outside every table for {}", name(at), name(first))
        }
        Wrong::Passes(first) => format!("passes {}, which its tables do not hold", name(first)),
        Wrong::Traps(first) => format!("traps {}, which its tables hold", name(first)),
    }
}
