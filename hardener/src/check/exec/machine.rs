//! Following every path through a thunk.

use super::exits::{Made, Reports};
use super::interval::Set;
use super::term::{Arena, Bin, Op, Term};
use super::tree::{Leaf, Node, NodeId, Tree};
use iced_x86::{ConditionCode, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use std::collections::BTreeMap;

/// Paths longer than this are no thunk's.
const MAX_STEPS: usize = 4096;
/// Trees larger than this are no thunk's.
const MAX_NODES: usize = 1 << 16;

const RSP: usize = 4;
pub(super) const FLAG_NAMES: [&str; 7] = ["CF", "PF", "AF", "ZF", "SF", "OF", "SF and OF"];
const REGISTER_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// A register's name by its number in the encoding.
pub fn register_name(number: u8) -> &'static str {
    REGISTER_NAMES[usize::from(number & 15)]
}

/// A register's number by its name.
pub fn register_number(name: &str) -> Option<u8> {
    let at = REGISTER_NAMES.iter().position(|known| *known == name)?;
    u8::try_from(at).ok()
}

/// The cave as it is once installed at some slide.
pub struct Code<'a> {
    /// The kernel's text at that slide, and where it stands.
    pub text: (u64, &'a [u8]),
    /// Where `bytes` stand.
    pub start: u64,
    /// The whole cave: sections over filler.
    pub bytes: &'a [u8],
    /// Where instructions are: `.thunks`.
    pub executable: (u64, u64),
}

impl Code<'_> {
    /// `len` bytes at `at`, zero-extended, when all are in the cave.
    pub fn load(&self, at: u64, len: u8) -> Option<u64> {
        Code::load_from((self.start, self.bytes), at, len)
    }

    /// The same of the text.
    pub fn load_text(&self, at: u64, len: u8) -> Option<u64> {
        Code::load_from(self.text, at, len)
    }

    fn load_from((start, bytes): (u64, &[u8]), at: u64, len: u8) -> Option<u64> {
        let rest = bytes.get(at.wrapping_sub(start) as usize..)?;
        // Loads are evaluated for every address in the text, so each width has its own short way.
        Some(match len {
            1 => u64::from(*rest.first()?),
            2 => u64::from(u16::from_le_bytes(*rest.first_chunk()?)),
            4 => u64::from(u32::from_le_bytes(*rest.first_chunk()?)),
            _ => u64::from_le_bytes(*rest.first_chunk()?),
        })
    }
}

/// What a thunk that leaves the cave does there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// Through a return tail.
    Return,
    /// Through the retpoline of this register.
    Indirect(u8),
    /// By the plain branch through this register.
    Plain(u8),
    /// To a fixed address, by the only subject that is this address.
    Direct,
    /// To the kernel's `panic`.
    Panic,
    /// To another thunk, which is proved by itself.
    Thunk,
}

/// What a thunk owes the slots that reach it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct Contract {
    /// The register that holds the checked target; none: the checked address is the return address at RSP.
    pub target: Option<u8>,
    /// Registers, by number, that may differ at the exit.
    pub scratch: u16,
    /// Whether flags may differ at the exit.
    pub flags: bool,
    /// Registers, by number, that must be 0 when a return goes on.
    pub cleared: u16,
    /// Whether it goes on without the retpoline, and stops nobody.
    pub plain: bool,
}

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The instruction, at the slide in use.
    pub at: u64,
    /// What it does.
    pub what: String,
}

#[derive(Clone)]
pub(super) struct State {
    pub(super) ip: u64,
    pub(super) registers: [Term; 16],
    /// In the order of `FLAG_NAMES`; the last is "SF differs from OF", which signed comparisons ask.
    pub(super) flags: [Term; 7],
    /// What was reported on the way.
    pub(super) report: Option<Made>,
    /// Words pushed, by offset from RSP at entry.
    stack: BTreeMap<i64, Term>,
    /// The subjects that come this way.
    subjects: Set,
    steps: usize,
}

/// Executes one thunk.
pub struct Machine<'a> {
    code: &'a Code<'a>,
    /// What leaving to an address, or reaching a listed return tail, means.
    exit: &'a dyn Fn(u64) -> Option<Exit>,
    pub(super) contract: Contract,
    pub(super) arena: Arena,
    pub(super) reports: Reports,
    saved_flags: Vec<[Term; 7]>,
    nodes: Vec<Node>,
    rsp: Term,
}

pub(super) type Step<T> = Result<T, Fault>;

impl<'a> Machine<'a> {
    /// Follows every path from `entry`: what is decided, and what is reported. Terms are made in the memory that `room` has.
    pub fn run(
        code: &'a Code<'a>,
        exit: &'a dyn Fn(u64) -> Option<Exit>,
        contract: Contract,
        entry: u64,
        room: &mut Arena,
    ) -> Step<(Tree, Reports)> {
        room.clear();
        let mut arena = std::mem::take(room);
        let subject = arena.raw(Op::Subject);
        let mut registers = std::array::from_fn(|number| arena.raw(Op::Reg(number as u8)));
        if let Some(target) = contract.target {
            registers[usize::from(target)] = subject;
        }
        let flags = std::array::from_fn(|number| arena.raw(Op::Flag(number as u8)));
        let rsp = registers[RSP];
        let mut machine = Machine {
            code,
            exit,
            contract,
            arena,
            reports: Reports::new(),
            saved_flags: Vec::new(),
            nodes: Vec::new(),
            rsp,
        };
        let root = machine.explore(State {
            ip: entry,
            registers,
            flags,
            report: None,
            stack: BTreeMap::new(),
            subjects: Set::all(),
            steps: 0,
        })?;
        let tree = Tree::new(&machine.arena, machine.nodes, root);
        *room = machine.arena;
        Ok((tree, machine.reports))
    }

    fn node(&mut self, at: u64, node: Node) -> Step<NodeId> {
        if self.nodes.len() >= MAX_NODES {
            return Err(fault(at, "has too many paths to prove"));
        }
        self.nodes.push(node);
        Ok(NodeId(self.nodes.len() - 1))
    }

    fn explore(&mut self, mut state: State) -> Step<NodeId> {
        // Memory reads on the way to the next branch, to be kept in the tree in order.
        let mut touched: Vec<(Term, Set, u64)> = Vec::new();
        let end = loop {
            let at = state.ip;
            let (low, high) = self.code.executable;
            if self.contract.plain
                && !(low..high).contains(&at)
                && state.subjects == Set::span(at, at)
            {
                let leaf = self.leave(&state, Exit::Direct)?;
                break self.node(at, Node::Leaf(leaf, state.subjects.clone()))?;
            }
            match (self.exit)(at) {
                // As if the slot had jumped there; otherwise it is a piece of this one, as all is of thunks of indirect branches.
                Some(Exit::Thunk)
                    if self.contract.target.is_some()
                        || state.steps == 0
                        || !self.is_entry(&state) => {}
                Some(Exit::Thunk) => {
                    let leaf = Leaf::HandOver(at);
                    break self.node(at, Node::Leaf(leaf, state.subjects.clone()))?;
                }
                Some(exit) => {
                    let leaf = self.leave(&state, exit)?;
                    break self.node(at, Node::Leaf(leaf, state.subjects.clone()))?;
                }
                None => {}
            }
            if !(low..high).contains(&at) {
                return Err(fault(
                    at,
                    "is reached but is no thunk, return tail or retpoline",
                ));
            }
            state.steps += 1;
            if state.steps > MAX_STEPS {
                return Err(fault(at, "is reached by a path without end"));
            }
            let from = (at - self.code.start) as usize;
            let window = &self.code.bytes[from..(high - self.code.start) as usize];
            let mut decoder = Decoder::with_ip(64, window, at, DecoderOptions::NONE);
            let instruction = decoder.decode();
            if instruction.is_invalid() {
                return Err(fault(at, "is no instruction"));
            }
            state.ip = instruction.next_ip();
            match instruction.mnemonic() {
                Mnemonic::Ud2 => {
                    let leaf = self.kill(&state, at)?;
                    break self.node(at, Node::Leaf(leaf, state.subjects.clone()))?;
                }
                Mnemonic::Out => self.report(&mut state, &instruction)?,
                _ if state.report.is_some() && instruction.is_jcc_short_or_near() => {
                    return Err(fault(at, "decides after a report"));
                }
                Mnemonic::Jmp if instruction.op0_kind() == OpKind::NearBranch64 => {
                    state.ip = instruction.near_branch_target();
                }
                Mnemonic::Jmp if instruction.op0_kind() == OpKind::Register => {
                    let register = instruction.op0_register().number() as u8;
                    state.ip = at;
                    let leaf = self.leave(&state, Exit::Plain(register))?;
                    break self.node(at, Node::Leaf(leaf, state.subjects.clone()))?;
                }
                _ if instruction.is_jcc_short_or_near() => {
                    let cond = self.condition(&state, &instruction)?;
                    let to = instruction.near_branch_target();
                    break self.branch(state, cond, to)?;
                }
                _ => {
                    for load in self.execute(&mut state, &instruction)? {
                        touched.push((load, state.subjects.clone(), at));
                    }
                }
            }
        };
        let mut next = end;
        for (load, subjects, at) in touched.into_iter().rev() {
            next = self.node(
                at,
                Node::Touch {
                    load,
                    subjects,
                    next,
                },
            )?;
        }
        Ok(next)
    }

    fn branch(&mut self, state: State, cond: Term, to: u64) -> Step<NodeId> {
        let (yes, no) = match self.arena.holds(cond, &state.subjects) {
            Some(set) => (state.subjects.intersect(&set), state.subjects.minus(&set)),
            None => (state.subjects.clone(), state.subjects.clone()),
        };
        let at = state.ip;
        let mut arm = |mut state: State, ip: u64, subjects: Set| {
            state.ip = ip;
            state.subjects = subjects;
            self.explore(state)
        };
        if yes.is_empty() {
            return arm(state, at, no);
        }
        if no.is_empty() {
            return arm(state, to, yes);
        }
        let (yes, no) = (arm(state.clone(), to, yes)?, arm(state, at, no)?);
        self.node(at, Node::Branch { cond, yes, no })
    }

    /// How far RSP is from where it was at entry; none when that is no constant.
    pub(super) fn depth(&self, state: &State) -> Option<i64> {
        self.stack_offset(state.registers[RSP])
    }

    fn stack_offset(&self, address: Term) -> Option<i64> {
        if address == self.rsp {
            return Some(0);
        }
        match self.arena.op(address) {
            Op::Bin(Bin::Add, base, offset) if base == self.rsp => {
                Some(self.arena.value(offset)? as i64)
            }
            _ => None,
        }
    }

    /// Executes an instruction that goes on to the next one; the loads from the cave that it makes.
    fn execute(&mut self, state: &mut State, instruction: &Instruction) -> Step<Vec<Term>> {
        let at = instruction.ip();
        let mut loads = Vec::new();
        let width = self.width(instruction);
        let bits = width.unwrap_or(64);
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Nop | M::Endbr64 => {}
            M::Mov | M::Movzx => {
                let value = self.read(state, instruction, 1, &mut loads)?;
                self.write(state, instruction, bits, value)?;
            }
            M::Movsx | M::Movsxd => {
                let value = self.read(state, instruction, 1, &mut loads)?;
                let from = operand_bits(instruction, 1).ok_or_else(|| unknown(at))?;
                let value = self.arena.sign_extend(value, from);
                self.write(state, instruction, bits, value)?;
            }
            M::Lea => {
                let value = self.address(state, instruction)?;
                self.write(state, instruction, bits, value)?;
            }
            M::Push => {
                let value = self.read(state, instruction, 0, &mut loads)?;
                if instruction.stack_pointer_increment() != -8 {
                    return Err(unknown(at));
                }
                let value = self
                    .arena
                    .sign_extend(value, operand_bits(instruction, 0).unwrap_or(64));
                self.push(state, at, value)?;
            }
            M::Pop if instruction.stack_pointer_increment() == 8 => {
                let value = self.pop(state, at)?;
                self.write(state, instruction, 64, value)?;
            }
            M::Pushfq => {
                self.saved_flags.push(state.flags);
                let number = self.saved_flags.len() as u32 - 1;
                let value = self.arena.raw(Op::Flags(number));
                self.push(state, at, value)?;
            }
            M::Popfq => {
                let value = self.pop(state, at)?;
                let Op::Flags(number) = self.arena.op(value) else {
                    return Err(fault(at, "loads flags that no pushfq stored"));
                };
                state.flags = self.saved_flags[number as usize];
            }
            M::Cmp | M::Sub | M::Add | M::And | M::Or | M::Xor | M::Test => {
                let left = self.read(state, instruction, 0, &mut loads)?;
                let right = self.read(state, instruction, 1, &mut loads)?;
                let result = self.arithmetic(state, instruction.mnemonic(), left, right, bits);
                if !matches!(instruction.mnemonic(), M::Cmp | M::Test) {
                    self.write(state, instruction, bits, result)?;
                }
            }
            M::Adc => {
                let left = self.read(state, instruction, 0, &mut loads)?;
                let right = self.read(state, instruction, 1, &mut loads)?;
                let carry = state.flags[0];
                let sum = self.arena.bin(Bin::Add, left, right);
                let sum = self.arena.bin(Bin::Add, sum, carry);
                let result = self.arena.truncate(sum, bits);
                state.flags = std::array::from_fn(|_| self.arena.unknown());
                self.set_result(state, result, bits);
                self.write(state, instruction, bits, result)?;
            }
            M::Shl | M::Sal | M::Shr | M::Sar | M::Shlx | M::Shrx | M::Sarx => {
                let flagless = matches!(instruction.mnemonic(), M::Shlx | M::Shrx | M::Sarx);
                let first = u32::from(flagless);
                let left = self.read(state, instruction, first, &mut loads)?;
                let count = self.read(state, instruction, first + 1, &mut loads)?;
                let mask = self.arena.constant(if bits == 64 { 63 } else { 31 });
                let count = self.arena.bin(Bin::And, count, mask);
                let (op, left) = match instruction.mnemonic() {
                    M::Shr | M::Shrx => (Bin::Shr, left),
                    M::Sar | M::Sarx => (Bin::Sar, self.arena.sign_extend(left, bits)),
                    _ => (Bin::Shl, left),
                };
                let result = self.arena.bin(op, left, count);
                let result = self.arena.truncate(result, bits);
                if !flagless && self.arena.value(count) != Some(0) {
                    state.flags = std::array::from_fn(|_| self.arena.unknown());
                    self.set_result(state, result, bits);
                    state.flags[6] = self.arena.unknown();
                }
                self.write(state, instruction, bits, result)?;
            }
            M::Imul if instruction.op_count() == 3 => {
                let left = self.read(state, instruction, 1, &mut loads)?;
                let right = self.read(state, instruction, 2, &mut loads)?;
                let product = self.arena.bin(Bin::Mul, left, right);
                let product = self.arena.truncate(product, bits);
                state.flags = std::array::from_fn(|_| self.arena.unknown());
                self.write(state, instruction, bits, product)?;
            }
            M::Not => {
                let value = self.read(state, instruction, 0, &mut loads)?;
                let ones = self.arena.constant(u64::MAX);
                let value = self.arena.bin(Bin::Xor, value, ones);
                self.write(state, instruction, bits, value)?;
            }
            M::Bt => self.bit_test(state, instruction, bits, &mut loads)?,
            _ if instruction.is_string_instruction() => return Err(unknown(at)),
            _ if matches!(instruction.op0_kind(), OpKind::Register)
                && instruction.condition_code() != ConditionCode::None
                && instruction.op_count() == 1 =>
            {
                // SETcc
                let cond = self.condition(state, instruction)?;
                self.write(state, instruction, 8, cond)?;
            }
            _ => return Err(unknown(at)),
        }
        match self.depth(state) {
            None => return Err(fault(at, "moves rsp to where it cannot be followed")),
            Some(depth) if depth > 0 => {
                return Err(fault(
                    at,
                    "leaves the caller's stack below rsp, where an interrupt overwrites it",
                ));
            }
            // What lies below RSP is lost to the next interrupt.
            Some(depth) => state.stack.retain(|offset, _| *offset >= depth),
        }
        Ok(loads)
    }

    fn arithmetic(
        &mut self,
        state: &mut State,
        mnemonic: Mnemonic,
        left: Term,
        right: Term,
        bits: u32,
    ) -> Term {
        let arena = &mut self.arena;
        let op = match mnemonic {
            Mnemonic::Cmp | Mnemonic::Sub => Bin::Sub,
            Mnemonic::Add => Bin::Add,
            Mnemonic::Or => Bin::Or,
            Mnemonic::Xor => Bin::Xor,
            _ => Bin::And,
        };
        let (left, right) = (arena.truncate(left, bits), arena.truncate(right, bits));
        let result = arena.bin(op, left, right);
        let result = arena.truncate(result, bits);
        let zero = arena.constant(0);
        state.flags = std::array::from_fn(|_| arena.unknown());
        match op {
            Bin::Sub => {
                state.flags[0] = arena.bin(Bin::Below, left, right);
                let (a, b) = (
                    arena.sign_extend(left, bits),
                    arena.sign_extend(right, bits),
                );
                state.flags[6] = arena.bin(Bin::Less, a, b);
            }
            Bin::Add => state.flags[0] = arena.bin(Bin::Below, result, left),
            _ => (state.flags[0], state.flags[5]) = (zero, zero),
        }
        self.set_result(state, result, bits);
        if !matches!(op, Bin::Sub | Bin::Add) {
            state.flags[6] = state.flags[4];
        }
        if op == Bin::Sub {
            // More telling than "the difference is 0", and the same.
            state.flags[3] = self.arena.bin(Bin::Eq, left, right);
        }
        result
    }

    /// ZF and SF from a result.
    fn set_result(&mut self, state: &mut State, result: Term, bits: u32) {
        let zero = self.arena.constant(0);
        state.flags[3] = self.arena.bin(Bin::Eq, result, zero);
        let signed = self.arena.sign_extend(result, bits);
        state.flags[4] = self.arena.bin(Bin::Less, signed, zero);
    }

    /// BT: CF is the bit; ZF stays, the others are undefined (SDM volume 2A, BT).
    fn bit_test(
        &mut self,
        state: &mut State,
        instruction: &Instruction,
        bits: u32,
        loads: &mut Vec<Term>,
    ) -> Step<()> {
        let count = self.read(state, instruction, 1, loads)?;
        let wrap = self.arena.constant(u64::from(bits) - 1);
        let (word, bit) = if instruction.op0_kind() == OpKind::Memory
            && instruction.op1_kind() == OpKind::Register
        {
            // A bit string: the register's high part moves the address, as a signed number.
            let count = self.arena.sign_extend(count, bits);
            let shift = self.arena.constant(u64::from(bits.trailing_zeros()));
            let words = self.arena.bin(Bin::Sar, count, shift);
            let scale = self
                .arena
                .constant(u64::from(bits / 8).trailing_zeros().into());
            let offset = self.arena.bin(Bin::Shl, words, scale);
            let base = self.address(state, instruction)?;
            let address = self.arena.bin(Bin::Add, base, offset);
            let word = self.load(state, instruction.ip(), address, bits, loads)?;
            (word, self.arena.bin(Bin::And, count, wrap))
        } else {
            let word = self.read(state, instruction, 0, loads)?;
            (word, self.arena.bin(Bin::And, count, wrap))
        };
        let shifted = self.arena.bin(Bin::Shr, word, bit);
        let one = self.arena.constant(1);
        let zero_flag = state.flags[3];
        state.flags = std::array::from_fn(|_| self.arena.unknown());
        state.flags[0] = self.arena.bin(Bin::And, shifted, one);
        state.flags[3] = zero_flag;
        Ok(())
    }

    fn condition(&mut self, state: &State, instruction: &Instruction) -> Step<Term> {
        let [carry, _, _, zero, sign, overflow, less] = state.flags;
        use ConditionCode as C;
        let (cond, negate) = match instruction.condition_code() {
            C::o => (overflow, false),
            C::no => (overflow, true),
            C::b => (carry, false),
            C::ae => (carry, true),
            C::e => (zero, false),
            C::ne => (zero, true),
            C::be => (self.arena.bin(Bin::Or, carry, zero), false),
            C::a => (self.arena.bin(Bin::Or, carry, zero), true),
            C::s => (sign, false),
            C::ns => (sign, true),
            C::l => (less, false),
            C::ge => (less, true),
            C::le => (self.arena.bin(Bin::Or, less, zero), false),
            C::g => (self.arena.bin(Bin::Or, less, zero), true),
            _ => return Err(fault(instruction.ip(), "asks a flag that is not modelled")),
        };
        let known = self.arena.depends_only_on_subject(cond);
        if !known {
            return Err(fault(
                instruction.ip(),
                "decides by something other than the checked address",
            ));
        }
        Ok(if negate { self.arena.not(cond) } else { cond })
    }

    fn width(&self, instruction: &Instruction) -> Option<u32> {
        operand_bits(instruction, 0)
    }

    /// The value of an operand, zero-extended.
    fn read(
        &mut self,
        state: &State,
        instruction: &Instruction,
        operand: u32,
        loads: &mut Vec<Term>,
    ) -> Step<Term> {
        let at = instruction.ip();
        match instruction.op_kind(operand) {
            OpKind::Register => {
                let register = instruction.op_register(operand);
                let bits = gpr_bits(register).ok_or_else(|| unknown(at))?;
                let value = state.registers[register.full_register().number()];
                Ok(self.arena.truncate(value, bits))
            }
            OpKind::Memory => {
                let bits = operand_bits(instruction, operand).ok_or_else(|| unknown(at))?;
                let address = self.address(state, instruction)?;
                self.load(state, at, address, bits, loads)
            }
            _ => {
                let value = instruction
                    .try_immediate(operand)
                    .map_err(|_| unknown(at))?;
                let bits = operand_bits(instruction, 0).unwrap_or(64);
                let value = self.arena.constant(value);
                Ok(self.arena.truncate(value, bits))
            }
        }
    }

    fn load(
        &mut self,
        state: &State,
        at: u64,
        address: Term,
        bits: u32,
        loads: &mut Vec<Term>,
    ) -> Step<Term> {
        if let Some(offset) = self.stack_offset(address) {
            let depth = self.depth(state).unwrap_or(0);
            if offset % 8 != 0 || bits != 64 {
                return Err(fault(at, "reads part of a stack word"));
            }
            if offset < depth {
                return Err(fault(at, "reads below rsp, where an interrupt writes"));
            }
            if offset >= 0 {
                let op = match self.contract.target {
                    None if offset == 0 => Op::Subject,
                    _ => Op::Stack(offset),
                };
                return Ok(self.arena.raw(op));
            }
            return match state.stack.get(&offset) {
                Some(value) => Ok(*value),
                None => Ok(self.arena.unknown()),
            };
        }
        let bytes = (bits / 8) as u8;
        if let Some(constant) = self.arena.value(address) {
            let value = self.code.load(constant, bytes);
            let value = value.ok_or_else(|| fault(at, "reads memory outside the cave"))?;
            // Kept as a read, so that the table counts as one that the thunk asks.
            loads.push(self.arena.raw(Op::Load(bytes, address)));
            return Ok(self.arena.constant(value));
        }
        // What stands before a return address can be read wherever the return itself would not fault.
        if self.contract.target.is_none()
            && self
                .arena
                .before_subject(address)
                .is_some_and(|before| u64::from(bytes) <= before)
        {
            return Ok(self.arena.raw(Op::Load(bytes, address)));
        }
        if !self.arena.depends_only_on_subject(address) {
            return Err(fault(
                at,
                "reads memory through something other than the checked address",
            ));
        }
        let load = self.arena.raw(Op::Load(bytes, address));
        loads.push(load);
        Ok(load)
    }

    fn address(&mut self, state: &State, instruction: &Instruction) -> Step<Term> {
        let at = instruction.ip();
        if matches!(instruction.memory_segment(), Register::FS | Register::GS)
            && instruction.mnemonic() != Mnemonic::Lea
        {
            return Err(fault(at, "uses per-cpu or thread memory"));
        }
        let displacement = self.arena.constant(instruction.memory_displacement64());
        if instruction.is_ip_rel_memory_operand() {
            return Ok(displacement);
        }
        let mut sum = displacement;
        for (register, scale) in [
            (instruction.memory_base(), 1),
            (instruction.memory_index(), instruction.memory_index_scale()),
        ] {
            if register == Register::None {
                continue;
            }
            if gpr_bits(register) != Some(64) {
                return Err(unknown(at));
            }
            let shift = self.arena.constant(u64::from(scale.trailing_zeros()));
            let value = state.registers[register.number()];
            let scaled = self.arena.bin(Bin::Shl, value, shift);
            sum = self.arena.bin(Bin::Add, scaled, sum);
        }
        Ok(sum)
    }

    fn write(
        &mut self,
        state: &mut State,
        instruction: &Instruction,
        bits: u32,
        value: Term,
    ) -> Step<()> {
        let at = instruction.ip();
        if instruction.op0_kind() == OpKind::Memory {
            let address = self.address(state, instruction)?;
            let depth = self.depth(state).unwrap_or(0);
            return match self.stack_offset(address) {
                Some(offset) if (depth..0).contains(&offset) && offset % 8 == 0 && bits == 64 => {
                    state.stack.insert(offset, value);
                    Ok(())
                }
                Some(offset) if offset < depth => Err(fault(
                    at,
                    "writes below rsp, where an interrupt overwrites it",
                )),
                _ => Err(fault(at, "writes memory that is not its own")),
            };
        }
        let register = instruction.op0_register();
        let full = register.full_register();
        if gpr_bits(register).is_none() {
            return Err(unknown(at));
        }
        let place = &mut state.registers[full.number()];
        *place = match bits {
            64 => value,
            // A 32-bit result clears the high half (SDM volume 1, 3.4.1.1).
            32 => self.arena.truncate(value, 32),
            _ => {
                let mask = self.arena.constant((1 << bits) - 1);
                let keep = self.arena.constant(!((1 << bits) - 1));
                let low = self.arena.bin(Bin::And, value, mask);
                let high = self.arena.bin(Bin::And, *place, keep);
                self.arena.bin(Bin::Or, high, low)
            }
        };
        Ok(())
    }

    fn push(&mut self, state: &mut State, at: u64, value: Term) -> Step<()> {
        let eight = self.arena.constant(8);
        let rsp = self.arena.bin(Bin::Sub, state.registers[RSP], eight);
        state.registers[RSP] = rsp;
        let depth = self.stack_offset(rsp);
        let depth = depth.ok_or_else(|| fault(at, "pushes where rsp cannot be followed"))?;
        state.stack.insert(depth, value);
        Ok(())
    }

    fn pop(&mut self, state: &mut State, at: u64) -> Step<Term> {
        let depth = self.depth(state).unwrap_or(0);
        if depth >= 0 {
            return Err(fault(at, "pops what it did not push"));
        }
        let value = state.stack.get(&depth).copied();
        let eight = self.arena.constant(8);
        state.registers[RSP] = self.arena.bin(Bin::Add, state.registers[RSP], eight);
        Ok(match value {
            Some(value) => value,
            None => self.arena.unknown(),
        })
    }
}

/// The width of an operand in bits, when it is a plain one.
fn operand_bits(instruction: &Instruction, operand: u32) -> Option<u32> {
    match instruction.op_kind(operand) {
        OpKind::Register => gpr_bits(instruction.op_register(operand)),
        OpKind::Memory => match instruction.memory_size().size() {
            bytes @ (1 | 2 | 4 | 8) => Some(bytes as u32 * 8),
            _ => None,
        },
        _ => None,
    }
}

/// The width of a general register; AH, CH, DH and BH are not modelled.
fn gpr_bits(register: Register) -> Option<u32> {
    let high = matches!(
        register,
        Register::AH | Register::BH | Register::CH | Register::DH
    );
    (register.is_gpr() && !high).then(|| register.size() as u32 * 8)
}

pub(super) fn fault(at: u64, what: &str) -> Fault {
    Fault {
        at,
        what: what.to_owned(),
    }
}

pub(super) fn unknown(at: u64) -> Fault {
    fault(at, "is an instruction that no thunk needs")
}
