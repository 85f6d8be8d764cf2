//! One function: its instructions as blocks, and what its registers hold at indirect branches, calls and stores.

pub use super::blocks::branch_target;
use super::blocks::{Block, blocks, decode, order};
use super::functions::Places;
use super::values::{Op, UNKNOWN, Value, Values};
use iced_x86::{Instruction, InstructionInfoFactory, OpKind};
use rustc_hash::{FxHashMap, FxHashSet};

/// rdi, rsi, rdx, rcx, r8, r9 as x86 numbers them (System V psABI, 3.2.3).
pub const ARGUMENTS: [usize; 6] = [7, 6, 2, 1, 8, 9];
const RSP: usize = 4;
const ALL_DEFINED: u8 = 0x3f;
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

/// What is known at one instruction.
#[derive(Clone)]
pub struct State {
    /// By x86's numbers.
    pub registers: [Value; 16],
    /// Words on the stack, by offset from RSP at entry. Sorted.
    pub slots: Vec<(i32, Value)>,
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

    /// Sets or forgets the word at `at`.
    pub fn set_slot(&mut self, at: i32, value: Option<Value>) {
        match (self.slots.binary_search_by_key(&at, |slot| slot.0), value) {
            (Ok(index), Some(value)) => self.slots[index].1 = value,
            (Ok(index), None) => {
                self.slots.remove(index);
            }
            (Err(index), Some(value)) => self.slots.insert(index, (at, value)),
            (Err(_), None) => {}
        }
    }
}

/// Follows the function that takes up `ranges` of the text, the first of which starts with its entry, and is given
/// `parameters` argument registers.
pub fn follow(code: &Code64<'_>, ranges: &[(u32, u32)], parameters: u8) -> Flow {
    let instructions = decode(code, ranges);
    let inside = |va: u64| -> Option<u32> {
        let at = u32::try_from(va.checked_sub(code.start)?).ok()?;
        ranges
            .iter()
            .any(|range| (range.0..range.1).contains(&at))
            .then_some(at)
    };
    let blocks = blocks(code, &instructions, &inside);
    let order = order(&blocks);
    // A phi that turned out to be one value only is that value when the function is followed again.
    let mut plain = FxHashMap::default();
    let mut round = 0;
    loop {
        let mut walk = Walk {
            code,
            instructions: &instructions,
            flow: Flow {
                values: Values::new(),
                sites: Vec::new(),
                calls: Vec::new(),
                stores: Vec::new(),
                kept: Vec::new(),
                lost: Vec::new(),
                returns: Vec::new(),
                traced: false,
            },
            made: Vec::new(),
            phis_lost: Vec::new(),
            info: InstructionInfoFactory::new(),
            inside: &inside,
        };
        let exits = walk.run(&blocks, &order, &plain, parameters);
        let found = walk.fill(&blocks, &exits);
        round += 1;
        if round == 3 || found.is_empty() {
            walk.miss(&instructions);
            return walk.flow;
        }
        plain.extend(found);
    }
}

/// A register, or a stack slot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Place {
    Register(u8),
    Slot(i32),
}

/// A walk over all blocks.
pub struct Walk<'a, F> {
    pub(super) code: &'a Code64<'a>,
    instructions: &'a [Instruction],
    pub(super) flow: Flow,
    /// Phis and where they stand.
    made: Vec<(usize, Place, Value)>,
    /// Phis that go where nothing is followed.
    phis_lost: Vec<Value>,
    pub(super) info: InstructionInfoFactory,
    pub(super) inside: &'a F,
}

impl<F: Fn(u64) -> Option<u32>> Walk<'_, F> {
    fn run(
        &mut self,
        blocks: &[Block],
        order: &[usize],
        plain: &FxHashMap<(usize, Place), ()>,
        parameters: u8,
    ) -> Vec<Option<State>> {
        let mut exits: Vec<Option<State>> = (0..blocks.len()).map(|_| None).collect();
        let mut reached = vec![false; blocks.len()];
        for block in order {
            reached[*block] = true;
        }
        for block in order {
            let before: Vec<usize> = blocks[*block]
                .before
                .iter()
                .copied()
                .filter(|from| reached[*from])
                .collect();
            let mut state = self.entry_state(*block, &before, &exits, plain, parameters);
            for index in blocks[*block].first..blocks[*block].end {
                let instruction = self.instructions[index];
                self.step(&mut state, &instruction);
            }
            exits[*block] = Some(state);
        }
        exits
    }

    fn entry_state(
        &mut self,
        block: usize,
        before: &[usize],
        exits: &[Option<State>],
        plain: &FxHashMap<(usize, Place), ()>,
        parameters: u8,
    ) -> State {
        let known: Vec<&State> = before
            .iter()
            .filter_map(|from| exits[*from].as_ref())
            .collect();
        if block == 0 && before.is_empty() {
            let mut registers = [UNKNOWN; 16];
            for (number, register) in (0u8..).zip(ARGUMENTS) {
                registers[register] = self.flow.values.intern(Op::Arg(number));
            }
            registers[RSP] = self.flow.values.intern(Op::Stack(0));
            return State {
                registers,
                slots: Vec::new(),
                defined: ALL_DEFINED >> (6 - parameters.min(6)),
                set: ALL_DEFINED >> (6 - parameters.min(6)),
            };
        }
        let Some(first) = known.first().copied() else {
            // Nothing that is followed leads here.
            let registers = [UNKNOWN; 16];
            return State {
                registers,
                slots: Vec::new(),
                defined: ALL_DEFINED,
                set: ALL_DEFINED,
            };
        };
        let mut state = (*first).clone();
        if before.len() == 1 && block != 0 {
            return state;
        }
        // A loop to the entry itself: what is given comes in as well, unknown.
        let whole = known.len() == before.len() && block != 0;
        state.defined = known.iter().fold(ALL_DEFINED, |all, one| all & one.defined);
        // What is passed is set on every way, so on each one that is known; a way too many only adds.
        state.set = known.iter().fold(0, |all, one| all | one.set);
        if block == 0 {
            state.set = ALL_DEFINED;
        }
        for register in 0..16 {
            let place = Place::Register(register as u8);
            let same = known
                .iter()
                .all(|one| one.registers[register] == first.registers[register]);
            // RSP is the same on all ways that the compiler makes.
            let plain = register == RSP || plain.contains_key(&(block, place));
            if !(same && (whole || plain)) {
                let phi = self.flow.values.phi();
                self.made.push((block, place, phi));
                state.registers[register] = phi;
            }
        }
        let mut slots: Vec<(i32, Value)> = Vec::new();
        for (at, value) in &first.slots {
            let place = Place::Slot(*at);
            let others: Option<Vec<Value>> = known.iter().map(|one| one.slot(*at)).collect();
            let Some(others) = others else {
                continue;
            };
            let same = others.iter().all(|other| other == value);
            if same && (whole || plain.contains_key(&(block, place))) {
                slots.push((*at, *value));
            } else {
                let phi = self.flow.values.phi();
                self.made.push((block, place, phi));
                slots.push((*at, phi));
            }
        }
        state.slots = slots;
        state
    }

    /// Whether a value is the address of code, all of it or in part.
    pub(super) fn code_address(&self, value: Value) -> Option<u64> {
        let at = self.flow.values.as_constant(value)?;
        self.code.places.offset(at).map(|_| at)
    }

    /// A value goes where nothing is followed.
    pub(super) fn lose(&mut self, value: Value) {
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
        let phis = std::mem::take(&mut self.phis_lost);
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

    /// Fills the phis from the blocks' ends; those that are one value only.
    fn fill(&mut self, blocks: &[Block], exits: &[Option<State>]) -> Vec<((usize, Place), ())> {
        for (block, place, phi) in &self.made {
            let Op::Phi(index) = self.flow.values.op(*phi) else {
                continue;
            };
            let states = blocks[*block]
                .before
                .iter()
                .filter_map(|from| exits[*from].as_ref());
            let mut operands: Vec<Value> = states
                .map(|state| match place {
                    Place::Register(register) => state.registers[usize::from(*register)],
                    Place::Slot(at) => state.slot(*at).unwrap_or(UNKNOWN),
                })
                .collect();
            if *block == 0 {
                operands.push(UNKNOWN);
            }
            operands.sort_unstable();
            operands.dedup();
            self.flow.values.phis[index as usize] = operands;
        }
        // Values that phis stand for, until nothing changes.
        let mut stands: FxHashMap<Value, Value> = FxHashMap::default();
        let find = |stands: &FxHashMap<Value, Value>, mut value: Value| {
            while let Some(next) = stands.get(&value) {
                value = *next;
            }
            value
        };
        loop {
            let mut changed = false;
            for (_, _, phi) in &self.made {
                if stands.contains_key(phi) {
                    continue;
                }
                let Op::Phi(index) = self.flow.values.op(*phi) else {
                    continue;
                };
                let mut only = None;
                let mut many = false;
                for operand in &self.flow.values.phis[index as usize] {
                    let operand = find(&stands, *operand);
                    if operand == *phi {
                        continue;
                    }
                    many |= only.is_some_and(|only| only != operand);
                    only = Some(operand);
                }
                if let Some(only) = only.filter(|_| !many) {
                    stands.insert(*phi, only);
                    changed = true;
                }
            }
            if !changed {
                break;
            }
        }
        let made = self.made.iter();
        made.filter(|(_, _, phi)| stands.contains_key(phi))
            .map(|(block, place, _)| ((*block, *place), ()))
            .collect()
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
