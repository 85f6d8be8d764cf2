//! Rule 4: every thunk that an edit reaches keeps what its slots must keep and lets through exactly what its tables hold.

use super::cave::CaveImage;
use super::dead::{self, Cleared};
use super::exec::calls::{Decides, Named};
use super::exec::exits::Reports;
use super::exec::machine::{Code, Contract, Exit, Fault, Machine};
use super::exec::memo::{Basis, Decided};
use super::exec::term::Arena;
use super::exec::tree::{Leaf, Lookup, Node, Tree};
use super::kernel::symbols::hex;
use super::owed::{computed_gotos, contract, has_fentry};
use super::promoted::{self, Promoted};
use super::report::{Findings, Rule, RuleReport};
use super::slots::{Original, Replacement};
use super::violations::{self, Reported};
use super::watched;
use super::wrong::explain;
use super::{Subject, decoded_tables, module, stack};
use iced_x86::{Code as Opcode, Decoder, DecoderOptions, Instruction, Mnemonic};
use penumbra_bundle::{LinkVa, RelocKind};
use rustc_hash::FxHashSet;
use std::collections::{BTreeMap, BTreeSet, btree_map};

/// KASLR moves the kernel by multiples of 2 MiB inside its 1 GiB mapping (`CONFIG_PHYSICAL_ALIGN`). Each thunk is proved
/// where it was linked and at this slide; relocations are linear, and rule 4 also proves that none is missing or too many.
const SLIDES: [u64; 2] = [0, 0x2ca0_0000];

/// Where the kernel's image may be mapped (`__START_KERNEL_map`, `KERNEL_IMAGE_SIZE`).
const MAPPING: std::ops::Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;

/// Which tables the thunks of each kind were seen to read.
#[derive(Default)]
pub struct Roles {
    /// Sets of tables, by index in the manifest, of which return thunks pass the members.
    pub returns: BTreeSet<Vec<usize>>,
    /// The same for indirect branches.
    pub entries: BTreeSet<Vec<usize>>,
    /// What thunks that read no table, or the words of hashed ones, let through of the text, by thunk. Sorted.
    pub classes: BTreeMap<LinkVa, Vec<LinkVa>>,
    /// With which targets thunks compare that stop nobody. Sorted.
    pub promoted: BTreeMap<LinkVa, Vec<LinkVa>>,
    /// Return thunks that pass the members of tables.
    pub by_table: BTreeSet<LinkVa>,
    /// Return thunks that look at the call, and what they decide.
    pub followed: BTreeMap<LinkVa, Decides>,
    /// Tables that these read.
    pub hashed: BTreeSet<usize>,
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
    stack::check(subject, &mut findings);
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
    let traced: FxHashSet<LinkVa> = kernel.tables.fentry.iter().copied().collect();
    let gotos = computed_gotos(kernel);
    let mut slots = Vec::new();
    let mut cleared = Cleared::of(subject);
    let mut promoted = Promoted::of(subject);
    for (variant, edit) in subject.edits() {
        let at = subject.place(edit);
        let to = match subject.check_of(edit) {
            Some(Replacement::Call(to) | Replacement::Jump(to)) => to,
            // No thunk is reached, or rule 1 says what is wrong.
            _ => continue,
        };
        let Some((original, _)) = subject.thunks.original(kernel, at) else {
            continue;
        };
        if let Original::Direct { .. } = original {
            continue;
        }
        if let Original::ModuleFree(cleanup) = original {
            // Neither registers nor stack are touched by the two instructions that this thunk is.
            match subject.cave {
                Ok(image) if image.is_module_free(&subject.bundle.manifest.cave, to, cleanup) => {
                    findings.proved("calls that report a freed module", 1);
                }
                _ => {
                    let what = "goes to no thunk that reports a freed module and calls on";
                    findings.broken(Some(variant), Some(at), what.to_owned());
                }
            }
            continue;
        }
        let function = kernel.symbols.around(at);
        let traced = function.is_some_and(|range| has_fentry(kernel, &traced, range.start));
        let goto = function.is_some_and(|range| gotos.contains(&range.start));
        let image = subject.cave.as_ref();
        // So is this name: a thunk that does not say that it saves asks for a proof that nothing is lost.
        let saves = image.is_ok_and(|image| image.saves(to));
        let free = original == Original::Return && !traced && !saves;
        let free = traced || free && cleared.loses(at).is_none();
        let mut contract = contract(original, free, goto);
        // The name is a claim: it asks for more of the thunk, and for the proof that nothing is lost by it.
        let clears = subject.cave.as_ref().is_ok_and(|image| image.clears(to));
        if original == Original::Return && clears {
            contract.cleared = dead::CLEARED;
            cleared.slot(variant, at, traced);
        }
        let compares = subject.cave.as_ref().is_ok_and(|image| image.promotes(to));
        if original != Original::Return && compares {
            contract.plain = true;
            promoted.slot(variant);
        }
        slots.push((variant, at, to, contract));
    }
    cleared.check(findings);
    promoted.check(findings);
    let of_modules = module::thunk_slots(subject).into_iter();
    slots.extend(of_modules.map(|slot| (slot.variant, slot.at, slot.thunk, slot.contract)));
    let mut groups = BTreeMap::new();
    for (variant, at, to, contract) in slots {
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

/// Absolute addresses in thunks are exactly the relocations, and jumps to the return thunk exactly the return tails.
fn fields(subject: &Subject<'_>, image: &CaveImage, findings: &mut Findings<'_>) {
    let cave = &subject.bundle.manifest.cave;
    let mut relocs = BTreeSet::new();
    let mut tails = BTreeSet::new();
    let mut outs = BTreeSet::new();
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
        if instruction.mnemonic() == Mnemonic::Out {
            // The report of a freed module is no violation's; where it may stand, and nothing else, is known.
            let cleanup = subject.thunks.module_free.map(|(_, cleanup)| cleanup);
            let free = cleanup.is_some_and(|to| image.is_module_free(cave, LinkVa(at), to));
            if !free {
                outs.insert(LinkVa(at));
            }
        }
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
    let declared = subject.bundle.cave_relocs();
    let declared: BTreeSet<(LinkVa, bool)> = declared
        .map(|(at, kind)| (at, kind == RelocKind::Abs64))
        .collect();
    let mut all = subject.bundle.cave_relocs();
    if let Some((inverse, _)) = all.find(|(_, kind)| *kind == RelocKind::Inverse32) {
        let what = "is relocated as per-cpu, which no thunk uses".to_owned();
        findings.broken(None, Some(inverse), what);
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
    let listed: BTreeSet<LinkVa> = cave.traps.iter().map(|trap| trap.at).collect();
    for at in outs.difference(&listed) {
        let what = format!("{}: a report that the manifest lacks", image.describe(*at));
        findings.broken(None, Some(*at), what);
    }
    for at in listed.difference(&outs) {
        let what = "the manifest's trap is no `out`".to_owned();
        findings.broken(None, Some(*at), what);
    }
    if !subject.bundle.relocs.is_sorted_by_key(|reloc| reloc.at) || !cave.return_tails.is_sorted() {
        findings.broken(
            None,
            None,
            "relocations or return tails are unsorted".to_owned(),
        );
    }
    findings.proved("thunk instructions", count);
    findings.proved("relocations", relocs.len() as u64);
    findings.proved("return tails", tails.len() as u64);
    findings.proved("traps", outs.len() as u64);
}

/// A thunk and what its slots ask of it.
type Key = (LinkVa, Contract);
/// The tables that a thunk reads and what it reports, or where it fails and how.
type Verdict = Result<(Passes, Reports), (LinkVa, String)>;

/// Who passes a thunk.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Passes {
    /// The members of these tables, by index in the manifest.
    Tables(Vec<usize>),
    /// These entries, and all that lies outside the text; the tables that were read for it.
    Entries(Vec<LinkVa>, BTreeSet<usize>),
    /// Everybody, who is one of these or not.
    All(Vec<LinkVa>),
}

/// What is proved of all thunks at one slide.
struct Proofs {
    /// The slots' thunks, then those to which these hand over.
    verdicts: Vec<(Key, Verdict)>,
    followed: BTreeMap<LinkVa, Decides>,
    decisions: u64,
}

fn prove(
    subject: &Subject<'_>,
    image: &CaveImage,
    groups: &BTreeMap<Key, Group<'_>>,
    findings: &mut Findings<'_>,
    roles: &mut Roles,
) {
    let tables = decoded_tables(subject.bundle, image);
    let keys: Vec<Key> = groups.keys().copied().collect();
    let (keys, tables) = (&keys, &tables);
    // Evaluating a decision for every address takes longest by far, so each slide has its own thread.
    let mut proofs: Vec<Proofs> = std::thread::scope(|scope| {
        let threads =
            SLIDES.map(|slide| scope.spawn(move || prove_at(subject, image, keys, tables, slide)));
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    });
    let (mut contracts, mut slots, mut kinds) = (0, 0, BTreeSet::new());
    let (mut reported, mut failed) = (watched::thunks(subject, findings), BTreeSet::new());
    for ((thunk, contract), verdict) in proofs.iter().flat_map(|proofs| &proofs.verdicts) {
        let group = groups.get(&(*thunk, *contract));
        let (seen, reports) = match verdict {
            Ok(proved) => proved,
            Err((at, what)) => {
                if failed.insert((*thunk, *contract)) {
                    let users = group.map_or("other thunks use it".to_owned(), |group| {
                        let (slots, first) = (group.slots, hex(group.first));
                        format!("{slots} slots use it, the first is {first}")
                    });
                    let what = format!("{} {what}; {users}", image.describe(*thunk));
                    findings.broken(group.map(|group| group.variant), Some(*at), what);
                }
                continue;
            }
        };
        let reports = reports.iter();
        reported.extend(reports.map(|(at, report)| Reported::of(LinkVa(*at), *report, contract)));
        match (contract.target, seen) {
            (Some(_), Passes::Tables(seen)) => {
                roles.entries.insert(seen.clone());
            }
            (None, Passes::Tables(seen)) if proofs[0].followed.contains_key(thunk) => {
                roles.hashed.extend(seen);
            }
            (None, Passes::Tables(seen)) => {
                roles.returns.insert(seen.clone());
                roles.by_table.insert(*thunk);
            }
            (_, Passes::Entries(entries, _) | Passes::All(entries)) => {
                let role = match seen {
                    Passes::Entries(_, read) => {
                        roles.hashed.extend(read);
                        &mut roles.classes
                    }
                    _ => &mut roles.promoted,
                };
                let other = role.insert(*thunk, entries.clone());
                if other.is_some_and(|other| other != *entries) {
                    let what = "decides otherwise when the kernel is moved".to_owned();
                    findings.broken(group.map(|group| group.variant), Some(*thunk), what);
                }
            }
        }
    }
    for (key, group) in groups.iter().filter(|(key, _)| !failed.contains(key)) {
        contracts += 1;
        slots += group.slots;
        kinds.insert((key.1.target, key.1.flags));
    }
    let decisions = proofs.iter().map(|proofs| proofs.decisions).max();
    roles.followed = std::mem::take(&mut proofs[0].followed);
    for (thunk, decides) in proofs[1..].iter().flat_map(|proofs| &proofs.followed) {
        if roles
            .followed
            .get(thunk)
            .is_some_and(|other| other != decides)
        {
            let what = "decides otherwise when the kernel is moved".to_owned();
            findings.broken(None, Some(*thunk), what);
        }
    }
    findings.proved(
        "decisions evaluated for every address",
        decisions.unwrap_or(0),
    );
    findings.proved("kinds of thunk", kinds.len() as u64);
    findings.proved("thunk contracts", contracts);
    findings.proved("slots behind them", slots);
    // A thunk that fails is not followed to its reports.
    if failed.is_empty() {
        violations::check(subject, image, &reported, findings);
    }
}

/// The verdict on each thunk with the kernel at `slide`.
fn prove_at(
    subject: &Subject<'_>,
    image: &CaveImage,
    keys: &[Key],
    tables: &[Vec<u64>],
    slide: u64,
) -> Proofs {
    let cave = &subject.bundle.manifest.cave;
    let bytes = image.relocated(subject.bundle, slide);
    let text = subject.kernel.text;
    let up = |va: LinkVa| va.0.wrapping_add(slide);
    let down = |at: u64| LinkVa(at.wrapping_sub(slide));
    let code = Code {
        // What names a callee is relative to its own place and the same at every slide.
        text: (
            up(text.start),
            subject.kernel.bytes(text).unwrap_or_default(),
        ),
        start: up(cave.range.start),
        bytes: &bytes,
        executable: (up(image.thunks.start), up(image.thunks.end)),
    };
    let moved: Vec<Vec<u64>> = tables
        .iter()
        .map(|members| members.iter().map(|at| at.wrapping_add(slide)).collect())
        .collect();
    let lookups: Vec<Lookup<'_>> = cave
        .tables
        .iter()
        .zip(&moved)
        .map(|(table, members)| Lookup {
            place: (up(table.range.start), up(table.range.end)),
            covers: (up(table.covers.start), up(table.covers.end)),
            members,
        })
        .collect();
    let entries = image.symbols.iter().map(|(at, _)| *at);
    let entries: FxHashSet<LinkVa> = entries.filter(|at| image.thunks.contains(*at)).collect();
    let exit = |at: u64| {
        let at = down(at);
        if cave.return_tails.binary_search(&at).is_ok() {
            return Some(Exit::Return);
        }
        if at == subject.thunks.panic {
            return Some(Exit::Panic);
        }
        if entries.contains(&at) {
            return Some(Exit::Thunk);
        }
        let register = subject.thunks.indirect.get(&at)?;
        Some(Exit::Indirect(*register))
    };
    let home = |reports: Reports| -> Reports {
        let homes = reports.into_iter().map(|(at, mut report)| {
            report.message = report.message.map(|message| down(message).0);
            (down(at).0, report)
        });
        homes.collect()
    };
    // Those that hand over bring those to which they do.
    let mut keys = keys.to_vec();
    let mut known: FxHashSet<Key> = keys.iter().copied().collect();
    let (mut runs, mut room) = (Vec::new(), Arena::default());
    while let Some((thunk, contract)) = keys.get(runs.len()).copied() {
        let run = Machine::run(&code, &exit, contract, up(thunk), &mut room);
        if let Ok((tree, _)) = &run {
            for node in &tree.nodes {
                if let Node::Leaf(Leaf::HandOver(to), _) = node {
                    let key = (down(*to), contract);
                    if known.insert(key) {
                        keys.push(key);
                    }
                }
            }
        }
        runs.push(run);
    }
    let followed = runs
        .iter()
        .flatten()
        .filter(|(tree, _)| tree.follows_calls());
    let names = followed.flat_map(|(tree, _)| tree.names());
    let names = names.map(|name| name.wrapping_sub(code.text.0 as u32));
    let names: BTreeSet<u32> = names.collect();
    let named = match names.is_empty() {
        true => Named::default(),
        false => Named::find(code.text.1, &names.into_iter().collect::<Vec<_>>()),
    };
    let span = subject.bundle.manifest.text.range();
    let span = (up(span.start), up(span.end) - 1);
    let basis = Basis::of(&code, &lookups);
    let mut decisions: Vec<(Tree, Decided)> = Vec::new();
    let mut proofs = Proofs {
        verdicts: Vec::new(),
        followed: BTreeMap::new(),
        decisions: 0,
    };
    for ((thunk, contract), run) in keys.into_iter().zip(runs) {
        let verdict = || -> Verdict {
            let (tree, reports) = run.map_err(|fault| {
                let Fault { at, what } = fault;
                let at = down(at);
                (at, format!("fails at {}, which {what}", image.describe(at)))
            })?;
            let wrong = |wrong| (thunk, explain(subject, wrong, slide));
            if contract.target.is_none() && tree.follows_calls() {
                let mut seen = BTreeSet::new();
                if let btree_map::Entry::Vacant(place) = proofs.followed.entry(thunk) {
                    let decides = tree.follow(&code, &lookups, &named, &mut seen);
                    place.insert(decides.map_err(wrong)?.moved(slide));
                }
                let seen = seen.into_iter().collect();
                return Ok((Passes::Tables(seen), home(reports)));
            }
            if contract.plain {
                let targets = promoted::targets(&tree).map_err(|what| (thunk, what))?;
                let targets = targets.into_iter().map(down).collect();
                return Ok((Passes::All(targets), home(reports)));
            }
            // What compares only is proved by that.
            let compared = tree.compared().filter(|_| contract.target.is_some());
            if let Some(members) = compared.and_then(|compared| compared.members(span.0, span.1)) {
                let members = members.into_iter().map(down).collect();
                return Ok((Passes::Entries(members, BTreeSet::new()), home(reports)));
            }
            let looked_up = match contract.target {
                Some(_) => tree.looked_up(&code, &lookups, span),
                None => None,
            };
            if let Some(found) = looked_up {
                let (members, seen) = found.map_err(wrong)?;
                let members = members.into_iter().map(down).collect();
                return Ok((Passes::Entries(members, seen), home(reports)));
            }
            // Thunks that decide alike are proved once.
            let alike = decisions.iter().position(|(other, _)| *other == tree);
            let index = alike.unwrap_or_else(|| {
                let prove = || tree.prove(&code, &lookups);
                let verdict = subject.memo.decide(basis, &tree, prove);
                decisions.push((tree, verdict));
                decisions.len() - 1
            });
            match &decisions[index].1 {
                Ok(seen) => {
                    let seen = seen.iter().copied().collect();
                    Ok((Passes::Tables(seen), home(reports)))
                }
                Err(cause) => Err(wrong(*cause)),
            }
        };
        let verdict = verdict();
        proofs.verdicts.push(((thunk, contract), verdict));
    }
    proofs.decisions = decisions.len() as u64;
    proofs
}
