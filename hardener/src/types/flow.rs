//! One function: its instructions as blocks, and what its registers hold at indirect branches, calls and stores.

pub use super::blocks::branch_target;
use super::blocks::{Block, blocks, decode, order};
use super::functions::Places;
use super::values::{Op, UNKNOWN, Value, Values};
use iced_x86::{Instruction, InstructionInfoFactory, OpKind};
use rustc_hash::{FxHashMap, FxHashSet};
use smallvec::SmallVec;
use std::ops::Range;

/// rdi, rsi, rdx, rcx, r8, r9 as x86 numbers them (System V psABI, 3.2.3).
pub const ARGUMENTS: [usize; 6] = [7, 6, 2, 1, 8, 9];
const RSP: usize = 4;
const ALL_DEFINED: u8 = 0x3f;
/// So often a function is followed, at most.
const ROUNDS: u32 = 3;
/// Bytes that a callee of which nothing is known writes behind a pointer into the stack.
pub const UNKNOWN_REACH: i32 = 64;

/// An indirect branch through a retpoline.
#[derive(Clone, Debug)]
pub struct Site {
    /// Where it stands, as an offset in the text.
    pub at: u32,
    /// Where it goes.
    pub target: Value,
    /// At most so many registers hold arguments, if the ways that are followed to it are all there are.
    pub arity: u8,
    /// At most so many hold arguments even if some of them cannot be gone.
    pub most: u8,
    /// What the argument registers hold.
    pub arguments: [Value; 6],
    /// Those that were set since the last call on some way: bit 0 is rdi.
    pub set: u8,
}

/// A direct call or tail call.
#[derive(Clone, Debug)]
pub struct Call {
    /// The callee's offset in the text.
    pub to: u32,
    /// What the argument registers hold.
    pub arguments: [Value; 6],
    /// Those that were set since the last call on some way: bit 0 is rdi.
    pub set: u8,
}

/// A store of 8 bytes, not to the function's own stack.
#[derive(Clone, Copy, Debug)]
pub struct Store {
    /// Where to.
    pub base: Value,
    /// Bytes from there.
    pub offset: i32,
    /// What.
    pub value: Value,
}

/// One function, followed.
pub struct Flow {
    /// Its values.
    pub values: Values,
    /// Its indirect branches.
    pub sites: Vec<Site>,
    /// Its direct calls.
    pub calls: Vec<Call>,
    /// Its stores.
    pub stores: Vec<Store>,
    /// What it keeps on its own stack, by offset from RSP at entry.
    pub kept: Vec<(i32, Value)>,
    /// Addresses in code that it puts where nothing is followed.
    pub lost: Vec<u64>,
    /// What it returns.
    pub returns: Vec<Value>,
    /// It is traced, so compiled with `-pg`, so without `-fipa-ra`: it knows of no callee which registers that leaves alone.
    pub traced: bool,
}

/// What is known about the text from elsewhere; offsets are from the text's start.
pub struct Code64<'a> {
    /// The code's bytes.
    pub places: &'a Places<'a>,
    /// The text's link address.
    pub start: u64,
    /// Retpolines, by register.
    pub retpolines: &'a FxHashMap<u64, u8>,
    /// Return thunk.
    pub return_thunk: u64,
    /// Jump labels: either way may be gone.
    pub jump_labels: &'a FxHashMap<u32, u32>,
    /// Instructions that may fault, and where they then go on.
    pub faults: &'a FxHashMap<u32, u32>,
    /// `ud2` that is gone on behind (warnings).
    pub warnings: &'a rustc_hash::FxHashSet<u32>,
    /// Callees that do not return.
    pub no_return: &'a rustc_hash::FxHashSet<u32>,
    /// Callees that keep what their callers hold in argument registers: assembly with its own rules.
    pub keeping: &'a rustc_hash::FxHashSet<u32>,
    /// `__fentry__`, which tracing calls.
    pub fentry: u64,
    /// How many bytes behind each pointer argument a callee may write.
    pub reaches: &'a FxHashMap<u32, [u32; 6]>,
}

/// Few functions keep more words than this on their stacks.
type Slots = SmallVec<[(i32, Value); 8]>;

/// What is known at one instruction.
#[derive(Clone)]
pub struct State {
    /// By x86's numbers.
    pub registers: [Value; 16],
    /// Words on the stack, by offset from RSP at entry. Sorted.
    pub slots: Slots,
    /// Argument registers that hold something since the last call on all ways here: bit 0 is rdi.
    pub defined: u8,
    /// The same, on any way.
    pub set: u8,
}

impl State {
    /// The word at `at`.
    pub fn slot(&self, at: i32) -> Option<Value> {
        let index = self.slots.binary_search_by_key(&at, |slot| slot.0).ok()?;
        Some(self.slots[index].1)
    }

    /// Sets the word at `at`.
    pub fn set_slot(&mut self, at: i32, value: Value) {
        match self.slots.binary_search_by_key(&at, |slot| slot.0) {
            Ok(index) => self.slots[index].1 = value,
            Err(index) => self.slots.insert(index, (at, value)),
        }
    }

    /// Forgets the words that start in a range.
    pub fn forget(&mut self, range: Range<i32>) {
        let from = self.slots.partition_point(|slot| slot.0 < range.start);
        let to = self.slots.partition_point(|slot| slot.0 < range.end);
        if from < to {
            self.slots.drain(from..to);
        }
    }
}

/// Memory that one function after another is followed in.
pub struct Room {
    instructions: Vec<Instruction>,
    values: Values,
    made: Vec<(usize, Place, Value)>,
    phis_lost: Vec<Value>,
    exits: Vec<Option<State>>,
    info: InstructionInfoFactory,
}

impl Default for Room {
    fn default() -> Room {
        Room {
            instructions: Vec::new(),
            values: Values::default(),
            made: Vec::new(),
            phis_lost: Vec::new(),
            exits: Vec::new(),
            info: InstructionInfoFactory::new(),
        }
    }
}

/// Follows the function that takes up `ranges` of the text, the first of which starts with its entry, and is given
/// `parameters` argument registers.
pub fn follow(code: &Code64<'_>, ranges: &[(u32, u32)], parameters: u8, room: &mut Room) -> Flow {
    let Room {
        instructions,
        values,
        made,
        phis_lost,
        exits,
        info,
    } = room;
    decode(code, ranges, instructions);
    let instructions = &instructions[..];
    let inside = |va: u64| -> Option<u32> {
        let at = u32::try_from(va.checked_sub(code.start)?).ok()?;
        ranges
            .iter()
            .any(|range| (range.0..range.1).contains(&at))
            .then_some(at)
    };
    let blocks = blocks(code, instructions, &inside);
    let order = order(&blocks);
    let mut plain = Plain {
        registers: vec![0; blocks.len()],
        slots: FxHashSet::default(),
    };
    let mut walk = Walk {
        code,
        instructions,
        flow: Flow {
            values: std::mem::take(values),
            sites: Vec::new(),
            calls: Vec::new(),
            stores: Vec::new(),
            kept: Vec::new(),
            lost: Vec::new(),
            returns: Vec::new(),
            traced: false,
        },
        made,
        phis_lost,
        info,
        inside: &inside,
    };
    let mut round = 0;
    loop {
        walk.clear();
        walk.run(&blocks, &order, &plain, parameters, exits);
        walk.fill(&blocks, exits);
        round += 1;
        if round == ROUNDS || !walk.simplify(&mut plain) {
            break;
        }
    }
    walk.miss(instructions);
    let mut flow = walk.flow;
    *values = std::mem::take(&mut flow.values);
    flow.values = values.finished();
    flow.sites.shrink_to_fit();
    flow.calls.shrink_to_fit();
    flow.stores.shrink_to_fit();
    flow.kept.shrink_to_fit();
    flow.lost.shrink_to_fit();
    flow.returns.shrink_to_fit();
    flow
}

/// A register, or a stack slot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Place {
    Register(u8),
    Slot(i32),
}

/// Places at blocks' starts whose phis turned out to be one value only: when the function is followed again, they are that value.
struct Plain {
    /// By block: bit n is register n.
    registers: Vec<u16>,
    /// Blocks and offsets of stack slots.
    slots: FxHashSet<(usize, i32)>,
}

/// A walk over all blocks.
pub struct Walk<'a, F> {
    pub(super) code: &'a Code64<'a>,
    instructions: &'a [Instruction],
    pub(super) flow: Flow,
    /// Phis and where they stand.
    made: &'a mut Vec<(usize, Place, Value)>,
    /// Phis that go where nothing is followed.
    phis_lost: &'a mut Vec<Value>,
    pub(super) info: &'a mut InstructionInfoFactory,
    pub(super) inside: &'a F,
}

impl<F: Fn(u64) -> Option<u32>> Walk<'_, F> {
    /// Forgets what was found, to follow the function again.
    fn clear(&mut self) {
        let Flow {
            values,
            sites,
            calls,
            stores,
            kept,
            lost,
            returns,
            traced,
        } = &mut self.flow;
        values.clear();
        sites.clear();
        calls.clear();
        stores.clear();
        kept.clear();
        lost.clear();
        returns.clear();
        *traced = false;
        self.made.clear();
        self.phis_lost.clear();
    }

    /// How each block ends that is reached.
    fn run(
        &mut self,
        blocks: &[Block],
        order: &[usize],
        plain: &Plain,
        parameters: u8,
        exits: &mut Vec<Option<State>>,
    ) {
        exits.clear();
        exits.resize_with(blocks.len(), || None);
        let mut reached = vec![false; blocks.len()];
        for block in order {
            reached[*block] = true;
        }
        for block in order {
            let before = &blocks[*block].before;
            let ways = before.iter().filter(|from| reached[**from]).count();
            let known = before.iter().filter_map(|from| exits[*from].as_ref());
            let mut state = self.entry_state(*block, ways, known, plain, parameters);
            for index in blocks[*block].first..blocks[*block].end {
                self.step(&mut state, &self.instructions[index]);
            }
            exits[*block] = Some(state);
        }
    }

    /// What is known at the start of a block to which so many ways lead; of those that are `known` by now, how they end.
    fn entry_state<'b>(
        &mut self,
        block: usize,
        ways: usize,
        known: impl Iterator<Item = &'b State> + Clone,
        plain: &Plain,
        parameters: u8,
    ) -> State {
        if block == 0 && ways == 0 {
            let mut registers = [UNKNOWN; 16];
            for (number, register) in (0u8..).zip(ARGUMENTS) {
                registers[register] = self.flow.values.intern(Op::Arg(number));
            }
            registers[RSP] = self.flow.values.intern(Op::Stack(0));
            return State {
                registers,
                slots: Slots::new(),
                defined: ALL_DEFINED >> (6 - parameters.min(6)),
                set: ALL_DEFINED >> (6 - parameters.min(6)),
            };
        }
        let Some(first) = known.clone().next() else {
            // Nothing that is followed leads here.
            let registers = [UNKNOWN; 16];
            return State {
                registers,
                slots: Slots::new(),
                defined: ALL_DEFINED,
                set: ALL_DEFINED,
            };
        };
        if ways == 1 && block != 0 {
            return first.clone();
        }
        // A loop to the entry itself: what is given comes in as well, unknown.
        let whole = known.clone().count() == ways && block != 0;
        let mut state = State {
            registers: first.registers,
            slots: Slots::new(),
            defined: known
                .clone()
                .fold(ALL_DEFINED, |all, one| all & one.defined),
            // What is passed is set on every way, so on each one that is known; a way too many only adds.
            set: known.clone().fold(0, |all, one| all | one.set),
        };
        if block == 0 {
            state.set = ALL_DEFINED;
        }
        for register in 0..16 {
            let same = known
                .clone()
                .all(|one| one.registers[register] == first.registers[register]);
            // RSP is the same on all ways that the compiler makes.
            let plain = register == RSP || plain.registers[block] >> register & 1 == 1;
            if !(same && (whole || plain)) {
                let phi = self.flow.values.phi();
                let place = Place::Register(register as u8);
                self.made.push((block, place, phi));
                state.registers[register] = phi;
            }
        }
        for (at, value) in &first.slots {
            let mut same = true;
            let everywhere = known.clone().all(|one| {
                let other = one.slot(*at);
                same &= other == Some(*value);
                other.is_some()
            });
            if !everywhere {
                continue;
            }
            if same && (whole || plain.slots.contains(&(block, *at))) {
                state.slots.push((*at, *value));
            } else {
                let phi = self.flow.values.phi();
                self.made.push((block, Place::Slot(*at), phi));
                state.slots.push((*at, phi));
            }
        }
        state
    }

    /// Whether a value is the address of code, all of it or in part.
    pub(super) fn code_address(&self, value: Value) -> Option<u64> {
        let at = self.flow.values.as_constant(value)?;
        self.code.places.offset(at).map(|_| at)
    }

    /// A value goes where nothing is followed.
    pub(super) fn lose(&mut self, value: Value) {
        match self.flow.values.op(value) {
            Op::Phi(_) => self.phis_lost.push(value),
            Op::Const(_) => self.flow.lost.extend(self.code_address(value)),
            Op::Sum(..) => self.lose_each(value),
            _ => {}
        }
    }

    /// All that a sum is made from goes there.
    fn lose_each(&mut self, value: Value) {
        let mut seen = FxHashSet::default();
        let mut open = vec![value];
        while let Some(value) = open.pop() {
            match self.flow.values.op(value) {
                // Its operands are not known yet.
                Op::Phi(_) => self.phis_lost.push(value),
                Op::Sum(a, b) if seen.insert(value) => open.extend([a, b]),
                _ => self.flow.lost.extend(self.code_address(value)),
            }
        }
    }

    /// Addresses of code that instructions name which are not reached, or which do with them what is not followed.
    fn miss(&mut self, instructions: &[Instruction]) {
        let places = self.code.places;
        let code = |at: &u64| places.offset(*at).is_some();
        let phis = std::mem::take(self.phis_lost);
        let constants = self.flow.values.constants(phis);
        self.flow.lost.extend(constants.into_iter().filter(code));
        for at in instructions.iter().flat_map(named).flatten() {
            if code(&at) && self.flow.values.known(Op::Const(at)).is_none() {
                self.flow.lost.push(at);
            }
        }
        self.flow.lost.sort_unstable();
        self.flow.lost.dedup();
    }

    /// Fills the phis from the blocks' ends.
    fn fill(&mut self, blocks: &[Block], exits: &[Option<State>]) {
        let mut operands: Vec<Value> = Vec::new();
        for (block, place, phi) in self.made.iter() {
            let Op::Phi(index) = self.flow.values.op(*phi) else {
                continue;
            };
            let before = blocks[*block].before.iter();
            let states = before.filter_map(|from| exits[*from].as_ref());
            operands.clear();
            operands.extend(states.map(|state| match place {
                Place::Register(register) => state.registers[usize::from(*register)],
                Place::Slot(at) => state.slot(*at).unwrap_or(UNKNOWN),
            }));
            if *block == 0 {
                operands.push(UNKNOWN);
            }
            operands.sort_unstable();
            operands.dedup();
            self.flow.values.fill(index, &operands);
        }
    }

    /// Adds the places whose phis are one value only; whether there are any.
    fn simplify(&self, plain: &mut Plain) -> bool {
        let values = &self.flow.values;
        // What phis stand for, by their indices, until nothing changes.
        let mut stands: Vec<Option<Value>> = vec![None; values.phis()];
        let find = |stands: &[Option<Value>], mut value: Value| {
            while let Op::Phi(index) = values.op(value)
                && let Some(next) = stands[index as usize]
            {
                value = next;
            }
            value
        };
        let mut any = false;
        loop {
            let mut changed = false;
            for (block, place, phi) in self.made.iter() {
                let Op::Phi(index) = values.op(*phi) else {
                    continue;
                };
                if stands[index as usize].is_some() {
                    continue;
                }
                let mut only = None;
                let mut many = false;
                for operand in values.operands(index) {
                    let operand = find(&stands, *operand);
                    if operand == *phi {
                        continue;
                    }
                    many |= only.is_some_and(|only| only != operand);
                    only = Some(operand);
                }
                if let Some(only) = only.filter(|_| !many) {
                    stands[index as usize] = Some(only);
                    changed = true;
                    match place {
                        Place::Register(register) => plain.registers[*block] |= 1 << register,
                        Place::Slot(at) => _ = plain.slots.insert((*block, *at)),
                    }
                }
            }
            if !changed {
                return any;
            }
            any = true;
        }
    }
}

/// The constants that an instruction has in it as addresses: relative to the instruction pointer, and an immediate.
fn named(instruction: &Instruction) -> [Option<u64>; 2] {
    let relative = instruction.is_ip_rel_memory_operand();
    let relative = relative.then(|| instruction.ip_rel_memory_address());
    let immediate = (0..instruction.op_count())
        .filter(|operand| {
            !matches!(
                instruction.op_kind(*operand),
                OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
            )
        })
        .find_map(|operand| instruction.try_immediate(operand).ok())
        .map(|value| match u32::try_from(value) {
            // A 32-bit operand: the low half of an address.
            Ok(low) if low > i32::MAX as u32 => i64::from(low as i32) as u64,
            _ => value,
        });
    [relative, immediate]
}
