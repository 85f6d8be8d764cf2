//! How much stack every way to a return has used: for each return the way that went least deep, found first.

use crate::check::kernel::Kernel;
use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register,
};
use penumbra_bundle::LinkVa;
use rayon::prelude::*;
use rustc_hash::{FxHashMap, FxHashSet};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// No frame goes deeper.
const DEEPEST: i64 = 4096;
/// No function has more places where ways meet, counted once for each depth.
const MOST: usize = 1 << 17;

/// Functions that one thread walks at a time.
const CHUNK: usize = 512;

/// A place on a way: the address, how far RSP is below the return address there, and the same of RBP where that is known.
type Place = (LinkVa, i64, Option<i64>);

/// By return site, what is surely in use below the return address, in bytes.
pub fn surely_used(kernel: &Kernel) -> FxHashMap<LinkVa, u32> {
    let mut starts: FxHashSet<LinkVa> = kernel.tables.fentry.iter().copied().collect();
    // Behind ENDBR64 a site starts nothing that its symbol does not.
    let code = kernel.symbols.iter();
    let code = code.filter(|symbol| matches!(symbol.letter, b't' | b'T' | b'w' | b'W'));
    let named: FxHashSet<LinkVa> = code.map(|symbol| symbol.at).collect();
    starts.retain(|site| !named.contains(&LinkVa(site.0.wrapping_sub(4))));
    starts.extend(named);
    starts.retain(|at| kernel.in_text(*at));
    let mut silent: FxHashMap<LinkVa, Vec<LinkVa>> = FxHashMap::default();
    for (at, to) in &kernel.tables.silent_jumps {
        silent.entry(*at).or_default().push(*to);
    }
    let all: Vec<LinkVa> = starts.iter().copied().collect();
    let joins = kernel.sweep.branches.iter().map(|branch| &branch.to);
    let joins = joins.chain(silent.values().flatten()).chain(&starts);
    let walk = Walk {
        kernel,
        code: kernel.bytes(kernel.text).unwrap_or_default(),
        starts: Marks::of(kernel, starts.iter()),
        has_silent: Marks::of(kernel, silent.keys()),
        joins: Marks::of(kernel, joins),
        silent,
        returns: Marks::of(kernel, kernel.tables.return_sites.iter()),
    };
    let found = all.par_chunks(CHUNK).map(|starts| {
        let mut room = Room {
            decoder: Decoder::new(64, walk.code, DecoderOptions::NONE),
            factory: InstructionInfoFactory::new(),
            seen: FxHashSet::default(),
            open: BinaryHeap::new(),
        };
        let mut found = Vec::new();
        for start in starts {
            walk.from(*start, &mut room, &mut found);
        }
        found
    });
    let mut least: FxHashMap<LinkVa, u32> = FxHashMap::default();
    for (at, depth) in found.collect::<Vec<_>>().into_iter().flatten() {
        let known = least.entry(at).or_insert(depth);
        *known = (*known).min(depth);
    }
    least
}

/// What one thread needs to walk, function after function.
struct Room<'a> {
    decoder: Decoder<'a>,
    factory: InstructionInfoFactory,
    seen: FxHashSet<Place>,
    open: BinaryHeap<Reverse<(i64, Place)>>,
}

/// Addresses in the text, one bit each: every instruction is looked for among them.
struct Marks {
    start: LinkVa,
    words: Vec<u64>,
}

impl Marks {
    fn of<'a>(kernel: &Kernel, marked: impl Iterator<Item = &'a LinkVa>) -> Marks {
        let mut marks = Marks {
            start: kernel.text.start,
            words: vec![0; kernel.text.len() as usize / 64 + 1],
        };
        for at in marked.filter(|at| kernel.in_text(**at)) {
            let at = at.0 - marks.start.0;
            marks.words[at as usize / 64] |= 1 << (at % 64);
        }
        marks
    }

    fn contains(&self, at: LinkVa) -> bool {
        let at = at.0.wrapping_sub(self.start.0);
        let word = usize::try_from(at / 64)
            .ok()
            .and_then(|word| self.words.get(word));
        word.is_some_and(|word| word >> (at % 64) & 1 == 1)
    }
}

struct Walk<'a> {
    kernel: &'a Kernel,
    /// The text.
    code: &'a [u8],
    starts: Marks,
    /// Where the text goes on without a branch.
    silent: FxHashMap<LinkVa, Vec<LinkVa>>,
    has_silent: Marks,
    returns: Marks,
    /// Where branches go, and all of `starts`.
    joins: Marks,
}

impl Walk<'_> {
    /// Whether a way may come to `at` other than from the instruction before. No way goes round without such a place: where the
    /// sweep has no instruction, each counts.
    fn meets(&self, at: LinkVa) -> bool {
        self.joins.contains(at) || !self.kernel.sweep.is_boundary(at)
    }

    /// Adds the returns that are reached from `start`. Ways are followed in the order of how deep they have been, so the first that
    /// comes to a place is the one that counts there.
    fn from(&self, start: LinkVa, room: &mut Room<'_>, found: &mut Vec<(LinkVa, u32)>) {
        let Room {
            decoder,
            factory,
            seen,
            open,
        } = room;
        let before = found.len();
        seen.clear();
        open.clear();
        open.push(Reverse((0, (start, 0, None))));
        // A place to which the way just followed goes on no deeper: none that is open is shallower.
        let mut next = None;
        while let Some((deepest, place)) = next.take().or_else(|| open.pop().map(|one| one.0)) {
            let (at, depth, frame) = place;
            if self.meets(at) && !seen.insert(place) {
                continue;
            }
            if seen.len() > MOST {
                found.truncate(before);
                return;
            }
            if depth == 0 && self.returns.contains(at) {
                found.push((at, deepest as u32));
                continue;
            }
            let place = at.0.wrapping_sub(self.kernel.text.start.0) as usize;
            if self.code.get(place).is_none_or(|byte| *byte == 0xcc)
                || decoder.set_position(place).is_err()
            {
                continue;
            }
            decoder.set_ip(at.0);
            let instruction = decoder.decode();
            let mut go = |(to, depth, frame): Place| {
                if !(0..=DEEPEST).contains(&depth) {
                    return;
                }
                let way = (deepest.max(depth), (to, depth, frame));
                match next {
                    None if depth <= deepest => next = Some(way),
                    _ => open.push(Reverse(way)),
                }
            };
            let silent = self.has_silent.contains(at).then(|| &self.silent[&at]);
            silent
                .into_iter()
                .flatten()
                .for_each(|to| go((*to, depth, frame)));
            let flow = instruction.flow_control();
            let behind = LinkVa(instruction.next_ip());
            if instruction.op0_kind() == OpKind::NearBranch64 && flow != FlowControl::Call {
                let to = LinkVa(instruction.near_branch_target());
                // A tail call, with nothing of its own left on the stack.
                if self.kernel.in_text(to) && !(depth == 0 && self.starts.contains(to)) {
                    go((to, depth, frame));
                }
            }
            match flow {
                FlowControl::ConditionalBranch => go((behind, depth, frame)),
                FlowControl::Next
                | FlowControl::Exception
                | FlowControl::Interrupt
                | FlowControl::Call
                | FlowControl::IndirectCall
                    if !self.starts.contains(behind) =>
                {
                    let moved = moved(&instruction, factory, depth, frame);
                    if let Some((depth, frame)) = moved {
                        go((behind, depth, frame));
                    }
                }
                _ => {}
            }
        }
    }
}

/// RSP and RBP behind an instruction; none where RSP is lost.
fn moved(
    instruction: &Instruction,
    factory: &mut InstructionInfoFactory,
    depth: i64,
    frame: Option<i64>,
) -> Option<(i64, Option<i64>)> {
    if instruction.flow_control() != FlowControl::Next {
        return Some((depth, frame));
    }
    let touches =
        |register: Register| [Register::RSP, Register::RBP].contains(&register.full_register());
    let mut operands = (0..instruction.op_count()).map(|number| instruction.op_register(number));
    // Nothing else writes either of them without an operand that says so.
    let stack = instruction.is_stack_instruction()
        || matches!(instruction.mnemonic(), Mnemonic::Enter | Mnemonic::Leave);
    if !stack && !operands.any(touches) {
        return Some((depth, frame));
    }
    let mut writes = (false, false);
    for used in factory.info(instruction).used_registers() {
        let written = matches!(
            used.access(),
            OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite
        );
        match used.register().full_register() {
            Register::RSP => writes.0 |= written,
            Register::RBP => writes.1 |= written,
            _ => {}
        }
    }
    let (to, from) = (instruction.op0_register(), instruction.op1_register());
    let whole = |register| to == register && instruction.op_count() >= 1;
    let immediate = || instruction.try_immediate(1).ok().map(|value| value as i64);
    let mnemonic = instruction.mnemonic();
    let rbp = match mnemonic {
        Mnemonic::Mov if to == Register::RBP && from == Register::RSP => Some(depth),
        _ if writes.1 => None,
        _ => frame,
    };
    if !writes.0 {
        return Some((depth, rbp));
    }
    let base = |register| match register {
        Register::RSP => Some(depth),
        Register::RBP => frame,
        _ => None,
    };
    let rsp = match mnemonic {
        Mnemonic::Leave => frame? - 8,
        Mnemonic::Pop if whole(Register::RSP) => return None,
        Mnemonic::Push | Mnemonic::Pushfq | Mnemonic::Pop | Mnemonic::Popfq => {
            depth - i64::from(instruction.stack_pointer_increment())
        }
        _ if !whole(Register::RSP) => return None,
        // How much an array of variable size takes is not known: nothing, at least.
        Mnemonic::Sub => depth.checked_add(immediate().unwrap_or(0))?,
        Mnemonic::Add => depth.checked_sub(immediate()?)?,
        Mnemonic::And => depth,
        Mnemonic::Mov => base(from)?,
        Mnemonic::Lea if instruction.memory_index() == Register::None => {
            let displacement = instruction.memory_displacement64() as i64;
            base(instruction.memory_base())?.checked_sub(displacement)?
        }
        _ => return None,
    };
    Some((rsp, rbp))
}
