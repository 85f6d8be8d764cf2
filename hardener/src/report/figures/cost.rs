//! What thunks cost, in instructions: an estimate from their code alone, by walking every way through it.

use crate::report::cave::{CaveView, Thunk};
use crate::report::place;
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind};
use penumbra_bundle::{Bundle, LinkVa, Manifest, SlotKind, VaRange};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Instructions on a way through a thunk, at most; a longer one is a loop.
const LONGEST: u32 = 4096;

/// What the slots of one pass cost.
#[derive(Serialize)]
pub struct Cost {
    /// In which variant.
    pub variant: String,
    /// Which pass.
    pub pass: String,
    /// Which kind of slot.
    pub slot: SlotKind,
    /// Slots that branch to a thunk.
    pub slots: u64,
    /// Instructions on the shortest way through a thunk that goes on, of all thunks.
    pub least: u32,
    /// Instructions on the shortest such way that reads a table, where there is one: the mean over the slots.
    pub usual: f64,
    /// Instructions on the longest such way without going round a loop, of all thunks; none when there is no end to it.
    pub most: Option<u32>,
}

/// The ways through one thunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Ways {
    least: u32,
    usual: u32,
    most: Option<u32>,
}

/// The costs of every pass whose edits branch to thunks.
pub fn of(bundle: &Bundle, cave: &CaveView<'_>) -> Vec<Cost> {
    let manifest = &bundle.manifest;
    let ways: BTreeMap<LinkVa, (Option<Ways>, &Thunk)> = cave
        .thunks()
        .iter()
        .map(|thunk| (thunk.range.start, (ways(cave, manifest, thunk), thunk)))
        .collect();
    let mut costs = Vec::new();
    for (variant, edits) in manifest.variants.iter().zip(&bundle.edits) {
        let mut by_pass: BTreeMap<(SlotKind, String), Vec<Ways>> = BTreeMap::new();
        for edit in &edits.0 {
            let at = manifest.text.start.0 + u64::from(edit.at.0);
            let Some(target) = branch_target(at, &edit.bytes) else {
                continue;
            };
            // A slot may enter a thunk behind its first instruction.
            let Some((_, (Some(ways), thunk))) = ways.range(..=target).next_back() else {
                continue;
            };
            if thunk.range.contains(target) {
                let pass = place::pass_of(&manifest.cave, variant, edit.slot, Some(thunk));
                let pass = pass.map_or("another pass", |pass| &pass.name).to_owned();
                by_pass.entry((edit.slot, pass)).or_default().push(*ways);
            }
        }
        for ((slot, pass), ways) in by_pass {
            let usual: u64 = ways.iter().map(|ways| u64::from(ways.usual)).sum();
            let most: Option<Vec<u32>> = ways.iter().map(|ways| ways.most).collect();
            costs.push(Cost {
                variant: variant.name.clone(),
                pass,
                slot,
                slots: ways.len() as u64,
                least: ways.iter().map(|ways| ways.least).min().unwrap_or(0),
                usual: usual as f64 / ways.len() as f64,
                most: most.and_then(|all| all.into_iter().max()),
            });
        }
    }
    costs
}

/// Where the branch at the end of an edit's bytes goes.
fn branch_target(at: u64, bytes: &[u8]) -> Option<LinkVa> {
    let mut decoder = Decoder::with_ip(64, bytes, at, DecoderOptions::NONE);
    let target = decoder.decode().near_branch_target();
    (target != 0).then_some(LinkVa(target))
}

/// How many addresses the tables hold that the thunks of `pass` read.
pub fn members(cave: &CaveView<'_>, manifest: &Manifest, pass: &str) -> u64 {
    let mut read = BTreeSet::new();
    for thunk in cave.thunks() {
        let mut traps = manifest.cave.traps_in(thunk.range).iter();
        if !traps.any(|trap| trap.pass == pass) {
            continue;
        }
        for instruction in decoded(cave, thunk) {
            read.extend(table(manifest, &instruction));
        }
    }
    let tables = read.iter().map(|index| &manifest.cave.tables[*index]);
    tables.map(|table| table.count).sum()
}

fn decoded(cave: &CaveView<'_>, thunk: &Thunk) -> Vec<Instruction> {
    let code = cave.bytes(thunk.range).unwrap_or_default();
    let decoder = Decoder::with_ip(64, code, thunk.range.start.0, DecoderOptions::NONE);
    decoder.into_iter().collect()
}

/// The table that an instruction reads.
fn table(manifest: &Manifest, instruction: &Instruction) -> Option<usize> {
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    let at = LinkVa(instruction.memory_displacement64());
    let mut tables = manifest.cave.tables.iter();
    memory.then(|| tables.position(|table| table.range.contains(at)))?
}

/// Walks a thunk; `None` when no way through it goes on.
fn ways(cave: &CaveView<'_>, manifest: &Manifest, thunk: &Thunk) -> Option<Ways> {
    let code: BTreeMap<u64, Instruction> = decoded(cave, thunk)
        .into_iter()
        .map(|instruction| (instruction.ip(), instruction))
        .collect();
    let walk = Walk {
        code: &code,
        manifest,
        thunk: thunk.range,
    };
    let start = thunk.range.start.0;
    let least = walk.shortest(start, false)?;
    Some(Ways {
        least,
        usual: walk.shortest(start, true).unwrap_or(least),
        most: walk.longest(start, &mut BTreeSet::new()).flatten(),
    })
}

struct Walk<'a> {
    code: &'a BTreeMap<u64, Instruction>,
    manifest: &'a Manifest,
    thunk: VaRange,
}

impl Walk<'_> {
    /// Where an instruction goes on to inside the thunk, and whether it may leave as the slot would have gone on.
    fn next(&self, instruction: &Instruction) -> (Vec<u64>, bool) {
        let (next, to) = (instruction.next_ip(), instruction.near_branch_target());
        let inside = |at: &u64| self.thunk.contains(LinkVa(*at));
        let reports = |at: u64| self.manifest.cave.trap_at(LinkVa(at)).is_some();
        if reports(instruction.ip()) || instruction.code() == Code::Ud2 {
            return (Vec::new(), false);
        }
        let all = match instruction.flow_control() {
            FlowControl::Next | FlowControl::Call | FlowControl::IndirectCall => vec![next],
            FlowControl::ConditionalBranch => vec![next, to],
            FlowControl::UnconditionalBranch => vec![to],
            FlowControl::Return | FlowControl::IndirectBranch => return (Vec::new(), true),
            _ => Vec::new(),
        };
        let leaves = all.iter().any(|at| !inside(at));
        (all.into_iter().filter(inside).collect(), leaves)
    }

    /// Instructions on the shortest way out; with `reads`, on the shortest one that reads a table.
    fn shortest(&self, start: u64, reads: bool) -> Option<u32> {
        // A place, and whether a table was read on the way there.
        let mut seen = BTreeSet::from([(start, false)]);
        let mut front = vec![(start, false)];
        for count in 1..LONGEST {
            let mut next = Vec::new();
            for (at, read) in front {
                let instruction = self.code.get(&at)?;
                let read = read || table(self.manifest, instruction).is_some();
                let (then, leaves) = self.next(instruction);
                if leaves && (read || !reads) {
                    return Some(count);
                }
                let then = then.into_iter().map(|at| (at, read));
                next.extend(then.filter(|state| seen.insert(*state)));
            }
            front = next;
        }
        None
    }

    /// Instructions on the longest way out that comes to no place twice; `None` when there is no way out, `Some(None)` when
    /// there are too many to follow.
    fn longest(&self, at: u64, path: &mut BTreeSet<u64>) -> Option<Option<u32>> {
        if path.len() as u32 > LONGEST {
            return Some(None);
        }
        let instruction = self.code.get(&at)?;
        if !path.insert(at) {
            return None;
        }
        let (then, leaves) = self.next(instruction);
        let mut best = leaves.then_some(Some(1));
        for at in then {
            let rest = match path.contains(&at) {
                true => None,
                false => self.longest(at, path),
            };
            if let Some(rest) = rest {
                let own = rest.map(|rest| rest + 1);
                best = match (best, own) {
                    (Some(None), _) | (_, None) => Some(None),
                    (Some(Some(best)), Some(own)) => Some(Some(best.max(own))),
                    (None, own) => Some(own),
                };
            }
        }
        path.remove(&at);
        best
    }
}
