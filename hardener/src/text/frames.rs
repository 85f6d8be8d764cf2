//! How much stack a function surely used before it returns: what lies below its return address and was written by it, by its
//! callees or by nobody.
//!
//! A forward walk from each function's start, over all ways, that counts what PUSH, SUB and the like do to RSP. Of all ways to a
//! return, the one that went least deep counts: no further down may anything be assumed to be stack. An alignment (`and
//! $-64,%rsp`) and an array of variable size move RSP by nothing, at least.

use super::steps::also;
use super::{Bitmap, Span, Sweep, Text};
use crate::image::Tables;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use penumbra_bundle::{LinkVa, TextOff};
use rayon::prelude::*;
use rustc_hash::FxHashMap;

/// Deeper than any frame: the guard page below the stack has this many bytes.
const DEEPEST: i32 = 4096;
/// No function has more where ways meet; one that does is given up.
const MAX_STATES: usize = 1 << 17;
const INT3: u8 = 0xcc;

/// Functions that one thread walks at a time.
const CHUNK: usize = 1024;

/// The bytes below the return address that were surely in use at each R slot, by number; none where no way there is known.
pub fn depths(text: &Text, tables: &Tables) -> Vec<Option<u32>> {
    let (span, functions, returns) = (text.span, &text.functions, &text.slots.returns);
    let code = &text.bytes[..span.code.len() as usize];
    let all: Vec<TextOff> = (0..functions.count())
        .map(|number| functions.start(number))
        .collect();
    let mut starts = Bitmap::new(code.len());
    all.iter().for_each(|at| starts.set(at.0 as usize));
    let also = also(span, tables);
    let mut joins = starts.clone();
    let jumps = text.sweep.jumps.iter().filter_map(|jump| jump.to);
    let jumps = jumps.filter_map(|to| span.offset(to));
    let silent = also.values().flatten().copied();
    jumps.chain(silent).for_each(|to| joins.set(to.0 as usize));
    let ways = Ways {
        code,
        span,
        sweep: &text.sweep,
        starts,
        joins,
        also,
        numbers: returns.iter().map(|slot| slot.at).zip(0..).collect(),
    };
    let found = all.par_chunks(CHUNK).map(|starts| {
        let mut walk = Walk::new(&ways);
        starts.iter().for_each(|start| walk.function(*start));
        walk.found
    });
    let mut depths: Vec<Option<u32>> = vec![None; returns.len()];
    for (number, deepest) in found.collect::<Vec<_>>().into_iter().flatten() {
        let depth = depths[number].get_or_insert(u32::MAX);
        *depth = (*depth).min(deepest as u32);
    }
    depths
}

/// Where a way has got to.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct State {
    at: TextOff,
    /// How far RSP is below the return address.
    depth: i32,
    /// The same of RBP, where it is a frame pointer.
    frame: Option<i32>,
}

/// Where ways go.
struct Ways<'a> {
    code: &'a [u8],
    span: Span,
    sweep: &'a Sweep,
    /// Where functions start.
    starts: Bitmap,
    /// Where jumps go, and all of `starts`.
    joins: Bitmap,
    also: FxHashMap<TextOff, Vec<TextOff>>,
    /// The returns' numbers.
    numbers: FxHashMap<TextOff, usize>,
}

impl Ways<'_> {
    /// Whether a way may come to `at` other than from the instruction before. No way goes round without such a place: where the
    /// sweep has no instruction, each counts.
    fn meets(&self, at: TextOff) -> bool {
        self.joins.get(at.0 as usize) || !self.sweep.is_boundary(at)
    }
}

/// Walks functions, one after another.
struct Walk<'a> {
    ways: &'a Ways<'a>,
    decoder: Decoder<'a>,
    /// How deep the shallowest way to each place has been where ways meet, of one function.
    reached: FxHashMap<State, i32>,
    /// Places to go on from, and how deep the way there has been.
    open: Vec<(State, i32)>,
    next: Vec<State>,
    /// Returns by number, and how deep a way there has been.
    found: Vec<(usize, i32)>,
}

impl<'a> Walk<'a> {
    fn new(ways: &'a Ways<'a>) -> Walk<'a> {
        Walk {
            ways,
            decoder: Decoder::new(64, ways.code, DecoderOptions::NONE),
            reached: FxHashMap::default(),
            open: Vec::new(),
            next: Vec::new(),
            found: Vec::new(),
        }
    }

    /// Follows all ways from `start`, a shallower one again where a deeper one has been.
    fn function(&mut self, start: TextOff) {
        let entry = State {
            at: start,
            depth: 0,
            frame: None,
        };
        self.reached.clear();
        self.reached.insert(entry, 0);
        self.open.clear();
        self.open.push((entry, 0));
        let before = self.found.len();
        while let Some((state, deepest)) = self.open.pop() {
            // A shallower way has been there since.
            if self
                .reached
                .get(&state)
                .is_some_and(|known| *known < deepest)
            {
                continue;
            }
            let mut on = Some((state, deepest));
            while let Some((state, deepest)) = on.take() {
                if self.reached.len() > MAX_STATES {
                    self.found.truncate(before);
                    return;
                }
                if state.depth == 0
                    && let Some(number) = self.ways.numbers.get(&state.at)
                {
                    self.found.push((*number, deepest));
                    break;
                }
                self.step(state);
                for next in self.next.drain(..) {
                    let deepest = deepest.max(next.depth);
                    if !(0..=DEEPEST).contains(&next.depth) {
                        continue;
                    }
                    let mut is_new = || {
                        let known = self.reached.entry(next).or_insert(i32::MAX);
                        let is_new = deepest < *known;
                        *known = deepest.min(*known);
                        is_new
                    };
                    if !self.ways.meets(next.at) || is_new() {
                        match on {
                            None => on = Some((next, deepest)),
                            Some(_) => self.open.push((next, deepest)),
                        }
                    }
                }
            }
        }
    }

    /// Adds where an instruction leads.
    fn step(&mut self, state: State) {
        let (at, ways) = (state.at, self.ways);
        let place = at.0 as usize;
        if ways.code.get(place).is_none_or(|byte| *byte == INT3)
            || self.decoder.set_position(place).is_err()
        {
            return;
        }
        self.decoder.set_ip(ways.span.va(at).0);
        let instruction = self.decoder.decode();
        let next = &mut self.next;
        let silent = ways.also.get(&at).into_iter().flatten();
        next.extend(silent.map(|to| State { at: *to, ..state }));
        let behind = TextOff(at.0 + instruction.len() as u32);
        let is_start = |at: TextOff| ways.starts.get(at.0 as usize);
        let branch = instruction.op0_kind() == OpKind::NearBranch64;
        let to = branch.then(|| LinkVa(instruction.near_branch_target()));
        let to = to.and_then(|to| ways.span.offset(to));
        match instruction.flow_control() {
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                // With nothing on the stack, what starts a function is one.
                let goes = to.filter(|to| state.depth != 0 || !is_start(*to));
                next.extend(goes.map(|at| State { at, ..state }));
                if instruction.flow_control() == FlowControl::ConditionalBranch {
                    next.push(State {
                        at: behind,
                        ..state
                    });
                }
            }
            // A WARN's UD2 is gone on behind.
            FlowControl::Next
            | FlowControl::Exception
            | FlowControl::Interrupt
            | FlowControl::Call
            | FlowControl::IndirectCall
                // Behind a call that does not come back stands another function.
                if !is_start(behind) =>
            {
                next.extend(moved(state, behind, &instruction));
            }
            _ => {}
        }
    }
}

/// The state behind an instruction; none when RSP cannot be followed through it.
fn moved(state: State, behind: TextOff, instruction: &Instruction) -> Option<State> {
    let State { depth, frame, .. } = state;
    let to = instruction.op0_register();
    let from = instruction.op1_register();
    let constant = || {
        let value = instruction.try_immediate(1).ok()?;
        i32::try_from(value as i64).ok()
    };
    let calls = matches!(
        instruction.flow_control(),
        FlowControl::Call | FlowControl::IndirectCall
    );
    let (depth, frame) = match (instruction.mnemonic(), to) {
        _ if calls => (depth, frame),
        (Mnemonic::Pop, Register::RSP) => return None,
        (Mnemonic::Pop, Register::RBP) => (depth - 8, None),
        (Mnemonic::Leave, _) => (frame? - 8, None),
        (Mnemonic::Sub, Register::RSP) => (depth.checked_add(constant().unwrap_or(0))?, frame),
        (Mnemonic::Add, Register::RSP) => (depth.checked_sub(constant()?)?, frame),
        (Mnemonic::And, Register::RSP) => (depth, frame),
        (Mnemonic::Mov, Register::RSP) if from == Register::RBP => (frame?, frame),
        (Mnemonic::Mov, Register::RBP) if from == Register::RSP => (depth, Some(depth)),
        (Mnemonic::Lea, Register::RSP) if instruction.memory_index() == Register::None => {
            let from = match instruction.memory_base() {
                Register::RSP => depth,
                Register::RBP => frame?,
                _ => return None,
            };
            let by = i32::try_from(instruction.memory_displacement64() as i64).ok()?;
            (from.checked_sub(by)?, frame)
        }
        (Mnemonic::Cmp | Mnemonic::Test, _) => (depth, frame),
        (Mnemonic::Push | Mnemonic::Pushfq | Mnemonic::Pop | Mnemonic::Popfq, _) => {
            (depth - instruction.stack_pointer_increment(), frame)
        }
        (Mnemonic::Xchg, _) if to == Register::RSP || from == Register::RSP => return None,
        (Mnemonic::Xchg, _) if from == Register::RBP => (depth, None),
        (_, Register::RSP | Register::ESP | Register::SP | Register::SPL) => return None,
        (_, register) if register.full_register() == Register::RBP => (depth, None),
        _ if instruction.stack_pointer_increment() != 0 => return None,
        _ => (depth, frame),
    };
    Some(State {
        at: behind,
        depth,
        frame,
    })
}
