//! What each instruction does to registers and stack slots.

use super::flow::{ARGUMENTS, Call, Site, State, Store, UNKNOWN_REACH, Walk, branch_target};
use super::values::{Op, UNKNOWN, Value};
use iced_x86::{Instruction, Mnemonic, OpAccess, OpKind, Register};

const RAX: usize = 0;
const RDX: usize = 2;
const RSP: usize = 4;
const RBP: usize = 5;

impl<F: Fn(u64) -> Option<u32>> Walk<'_, F> {
    fn register(&self, state: &State, register: Register) -> Value {
        if register.is_gpr64() {
            return state.registers[register.number()];
        }
        if register.is_gpr32()
            && let Some(value) = self
                .flow
                .values
                .as_constant(state.registers[register.number()])
        {
            // Kept apart from others: only constants are followed in halves.
            return match value {
                0..=0x7fff_ffff => state.registers[register.number()],
                _ => UNKNOWN,
            };
        }
        UNKNOWN
    }

    fn write(&mut self, state: &mut State, register: Register, value: Value) {
        if register.is_gpr() {
            self.set(state, register.full_register().number(), value);
        }
    }

    /// Sets the register of this number.
    fn set(&mut self, state: &mut State, number: usize, value: Value) {
        state.registers[number] = value;
        if let Some(argument) = ARGUMENTS.iter().position(|at| *at == number) {
            state.defined |= 1 << argument;
            state.set |= 1 << argument;
        }
    }

    /// The address of a memory operand: a base and an offset.
    fn address(&mut self, state: &State, instruction: &Instruction) -> Value {
        let values = &mut self.flow.values;
        let displacement = instruction.memory_displacement64();
        let gs = instruction.memory_segment() == Register::GS;
        let base = instruction.memory_base();
        let index = instruction.memory_index();
        let mut address = if instruction.is_ip_rel_memory_operand() {
            values.constant(instruction.ip_rel_memory_address())
        } else {
            match (base == Register::None, index == Register::None) {
                (true, true) => values.constant(displacement),
                (false, true) => {
                    let base = state.registers[base.number()];
                    values.add(base, displacement as i64)
                }
                (true, false) => {
                    let index = state.registers[index.number()];
                    let scaled = instruction.memory_index_scale();
                    let index = if scaled == 1 { index } else { UNKNOWN };
                    let base = values.constant(displacement);
                    values.sum(base, index)
                }
                (false, false) => {
                    let base = state.registers[base.number()];
                    let index = state.registers[index.number()];
                    let scaled = instruction.memory_index_scale();
                    let index = if scaled == 1 { index } else { UNKNOWN };
                    let sum = values.sum(base, index);
                    values.add(sum, displacement as i64)
                }
            }
        };
        if gs {
            let area = values.intern(Op::PerCpu);
            address = match values.op(address) {
                Op::Const(at) => values.add(area, at as u32 as i32 as i64),
                _ => values.sum(area, address),
            };
        }
        address
    }

    fn load(&mut self, state: &State, instruction: &Instruction) -> Value {
        let bytes = instruction.memory_size().size() as u8;
        let address = self.address(state, instruction);
        if let Op::Stack(at) = self.flow.values.op(address)
            && bytes == 8
            && let Some(value) = state.slot(at)
        {
            return value;
        }
        self.flow.values.load(address, 0, bytes)
    }

    /// The value of operand `number`.
    fn operand(&mut self, state: &State, instruction: &Instruction, number: u32) -> Value {
        match instruction.op_kind(number) {
            OpKind::Register => self.register(state, instruction.op_register(number)),
            OpKind::Memory => {
                let bytes = instruction.memory_size().size();
                match bytes {
                    8 => self.load(state, instruction),
                    _ => UNKNOWN,
                }
            }
            OpKind::Immediate32 => self
                .flow
                .values
                .constant(u64::from(instruction.immediate32())),
            OpKind::Immediate8to64
            | OpKind::Immediate32to64
            | OpKind::Immediate64
            | OpKind::Immediate8to32 => match instruction.try_immediate(number) {
                Ok(value) => self.flow.values.constant(value),
                Err(_) => UNKNOWN,
            },
            _ => UNKNOWN,
        }
    }

    fn store(&mut self, state: &mut State, instruction: &Instruction, value: Value) {
        let address = self.address(state, instruction);
        let bytes = instruction.memory_size().size();
        if let Op::Stack(at) = self.flow.values.op(address) {
            // What is overwritten in part is lost.
            state.forget(at - 7..at + bytes.max(1) as i32);
            if bytes == 8 {
                state.set_slot(at, value);
            }
            self.keep(at, value);
            return;
        }
        let (base, offset) = self.flow.values.split(address);
        match i32::try_from(offset) {
            Ok(offset) if base != UNKNOWN && bytes == 8 => self.flow.stores.push(Store {
                base,
                offset,
                value,
            }),
            _ => self.lose(value),
        }
    }

    /// What is kept on the stack, where it matters.
    fn keep(&mut self, at: i32, value: Value) {
        if matches!(self.flow.values.op(value), Op::Phi(_)) || self.code_address(value).is_some() {
            self.flow.kept.push((at, value));
        }
    }

    fn arguments(&self, state: &State) -> [Value; 6] {
        ARGUMENTS.map(|register| state.registers[register])
    }

    /// A callee may change what it is given the address of.
    fn expose(&mut self, state: &mut State, arguments: &[Value; 6], callee: Option<u32>) {
        let known = callee.and_then(|callee| self.code.reaches.get(&callee).copied());
        for (number, value) in arguments.iter().enumerate() {
            let Op::Stack(from) = self.flow.values.op(*value) else {
                continue;
            };
            let reach = match known {
                Some(known) => known[number] as i32,
                None if state.defined >> number & 1 == 1 => UNKNOWN_REACH,
                None => 0,
            };
            if reach > 0 {
                let to = from.saturating_add(reach);
                state.forget(from..to);
            }
        }
    }

    /// A call or a jump out of the function.
    fn leave(&mut self, state: &mut State, to: u64, at: u32, call: bool) {
        let arguments = self.arguments(state);
        let mut result = UNKNOWN;
        let mut keeps = false;
        if let Some(register) = self.code.retpolines.get(&to) {
            let target = state.registers[usize::from(*register)];
            self.flow.sites.push(Site {
                at,
                target,
                arity: state.defined.trailing_ones().min(6) as u8,
                most: state.set.trailing_ones().min(6) as u8,
                arguments,
                set: state.set,
            });
            result = self.flow.values.intern(Op::IndirectResult(target));
            self.expose(state, &arguments, None);
        } else if to == self.code.return_thunk {
            let rax = state.registers[RAX];
            self.flow.returns.push(rax);
        } else if let Ok(offset) = u32::try_from(to.wrapping_sub(self.code.start)) {
            if to == self.code.fentry {
                self.flow.traced = true;
                return;
            }
            keeps = self.code.keeping.contains(&offset);
            self.flow.calls.push(Call {
                to: offset,
                arguments,
                set: state.set,
            });
            result = self.flow.values.intern(Op::Result(offset));
            if !keeps {
                self.expose(state, &arguments, Some(offset));
            }
        }
        if call {
            state.registers[RAX] = result;
            state.registers[RDX] = UNKNOWN;
            if !keeps {
                state.defined = 0;
                state.set = 0;
            }
        } else if to != self.code.return_thunk {
            self.flow.returns.push(result);
        }
    }

    /// Executes one instruction.
    pub(super) fn step(&mut self, state: &mut State, instruction: &Instruction) {
        let at = (instruction.ip() - self.code.start) as u32;
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Nop | M::Endbr64 | M::Cmp | M::Test | M::Ud2 | M::Prefetcht0 => {}
            M::Mov => {
                if instruction.op0_kind() == OpKind::Memory {
                    let value = match instruction.memory_size().size() {
                        8 => self.operand(state, instruction, 1),
                        _ => UNKNOWN,
                    };
                    self.store(state, instruction, value);
                } else if instruction.op0_kind() == OpKind::Register {
                    let register = instruction.op0_register();
                    let value = match register.is_gpr64() || register.is_gpr32() {
                        true => self.operand(state, instruction, 1),
                        false => UNKNOWN,
                    };
                    self.write(state, register, value);
                }
            }
            M::Lea => {
                for register in [instruction.memory_base(), instruction.memory_index()] {
                    if register.is_gpr64() {
                        self.lose(state.registers[register.number()]);
                    }
                }
                let value = match instruction.op0_register().is_gpr64() {
                    true => self.address(state, instruction),
                    false => UNKNOWN,
                };
                self.write(state, instruction.op0_register(), value);
            }
            M::Add | M::Sub if instruction.op0_kind() == OpKind::Register => {
                let register = instruction.op0_register();
                let (left, right) = (
                    self.register(state, register),
                    self.operand(state, instruction, 1),
                );
                self.lose(left);
                self.lose(right);
                let minus = instruction.mnemonic() == M::Sub;
                let value = match (self.flow.values.as_constant(right), minus) {
                    _ if !register.is_gpr64() => UNKNOWN,
                    (Some(by), true) => self.flow.values.add(left, (by as i64).wrapping_neg()),
                    (None, true) => self.flow.values.sum(left, UNKNOWN),
                    (_, false) => self.flow.values.sum(left, right),
                };
                self.write(state, register, value);
            }
            M::And
                if instruction.op0_kind() == OpKind::Register
                    && instruction.op0_register() == Register::RSP =>
            {
                // Stack slots below are counted from here on.
                state.slots.clear();
                state.registers[RSP] = self.flow.values.intern(Op::Stack(-0x10_0000));
            }
            M::And
                if instruction.op0_kind() == OpKind::Register
                    && instruction.op0_register().is_gpr64()
                    && matches!(
                        instruction.op1_kind(),
                        OpKind::Immediate8to64 | OpKind::Immediate32to64
                    )
                    && instruction.try_immediate(1).is_ok_and(|mask| {
                        // Flags in the low bits of a pointer.
                        mask as i64 >= -16 && (mask as i64) < 0
                    }) => {}
            M::Xor | M::Sub
                if instruction.op0_kind() == OpKind::Register
                    && instruction.op1_kind() == OpKind::Register
                    && instruction.op0_register() == instruction.op1_register() =>
            {
                let zero = self.flow.values.constant(0);
                self.write(state, instruction.op0_register(), zero);
            }
            M::Push => {
                let value = self.operand(state, instruction, 0);
                let rsp = self.flow.values.add(state.registers[RSP], -8);
                state.registers[RSP] = rsp;
                match self.flow.values.op(rsp) {
                    Op::Stack(at) => {
                        state.set_slot(at, value);
                        self.keep(at, value);
                    }
                    _ => self.lose(value),
                }
            }
            M::Pop => {
                let rsp = state.registers[RSP];
                let value = match self.flow.values.op(rsp) {
                    Op::Stack(at) => state.slot(at).unwrap_or(UNKNOWN),
                    _ => UNKNOWN,
                };
                if instruction.op0_kind() == OpKind::Register {
                    self.write(state, instruction.op0_register(), value);
                }
                state.registers[RSP] = self.flow.values.add(rsp, 8);
            }
            M::Leave => {
                let rbp = state.registers[RBP];
                let value = match self.flow.values.op(rbp) {
                    Op::Stack(at) => state.slot(at).unwrap_or(UNKNOWN),
                    _ => UNKNOWN,
                };
                state.registers[RSP] = self.flow.values.add(rbp, 8);
                state.registers[RBP] = value;
            }
            M::Ret => {
                let rax = state.registers[RAX];
                self.flow.returns.push(rax);
            }
            M::Call => match branch_target(instruction) {
                Some(to) => self.leave(state, to, at, true),
                None => {
                    // Paravirt: what its callee keeps depends on the operation.
                    for (number, value) in self.arguments(state).into_iter().enumerate() {
                        if state.set >> number & 1 == 1 {
                            self.lose(value);
                        }
                    }
                    state.registers[RAX] = UNKNOWN;
                    state.registers[RDX] = UNKNOWN;
                }
            },
            M::Jmp => {
                if let Some(to) = branch_target(instruction)
                    && (self.inside)(to).is_none()
                {
                    self.leave(state, to, at, false);
                }
            }
            _ if instruction.is_jcc_short_or_near() => {
                if let Some(to) = branch_target(instruction)
                    && (self.inside)(to).is_none()
                {
                    let mut gone = state.clone();
                    self.leave(&mut gone, to, at, false);
                }
            }
            _ if is_cmov(instruction.mnemonic()) => {
                let register = instruction.op0_register();
                let (old, new) = (
                    self.register(state, register),
                    self.operand(state, instruction, 1),
                );
                if !register.is_gpr64() {
                    self.lose(old);
                    self.lose(new);
                }
                let value = match register.is_gpr64() && old != new {
                    true => {
                        let phi = self.flow.values.phi();
                        if let Op::Phi(index) = self.flow.values.op(phi) {
                            self.flow.values.fill(index, &[old, new]);
                        }
                        phi
                    }
                    false if old == new => old,
                    false => UNKNOWN,
                };
                self.write(state, register, value);
            }
            M::Xchg if instruction.op0_kind() == OpKind::Memory => {
                let old = self.operand(state, instruction, 0);
                let new = self.operand(state, instruction, 1);
                let register = instruction.op1_register();
                self.store(state, instruction, new);
                self.write(state, register, old);
            }
            M::Cmpxchg if instruction.op0_kind() == OpKind::Memory => {
                let new = self.operand(state, instruction, 1);
                let address = self.address(state, instruction);
                // Whether it is stored is not known, but to the stack that makes a difference.
                if !matches!(self.flow.values.op(address), Op::Stack(_)) {
                    self.store(state, instruction, new);
                }
                self.other(state, instruction);
            }
            _ => self.other(state, instruction),
        }
    }

    /// Everything that an instruction writes is lost, and so is the trace of what it reads.
    fn other(&mut self, state: &mut State, instruction: &Instruction) {
        if instruction.op_count() > 0
            && instruction.op0_kind() == OpKind::Memory
            && matches!(instruction.op_kind(0), OpKind::Memory)
        {
            let address = self.address(state, instruction);
            if let Op::Stack(at) = self.flow.values.op(address) {
                let bytes = instruction.memory_size().size().max(8) as i32;
                state.forget(at - 7..at + bytes);
            }
        }
        let mut read = 0u16;
        let mut written = 0u16;
        for used in self.info.info(instruction).used_registers() {
            let register = used.register();
            if !register.is_gpr() {
                continue;
            }
            let bit = 1 << register.full_register().number();
            if !matches!(used.access(), OpAccess::Write | OpAccess::CondWrite) {
                read |= bit;
            }
            if matches!(
                used.access(),
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            ) {
                written |= bit;
            }
        }
        for number in (0..16).filter(|number| read >> number & 1 == 1) {
            self.lose(state.registers[number]);
        }
        for number in (0..16).filter(|number| written >> number & 1 == 1 && *number != RSP) {
            self.set(state, number, UNKNOWN);
        }
    }
}

fn is_cmov(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Cmova
            | Mnemonic::Cmovae
            | Mnemonic::Cmovb
            | Mnemonic::Cmovbe
            | Mnemonic::Cmove
            | Mnemonic::Cmovg
            | Mnemonic::Cmovge
            | Mnemonic::Cmovl
            | Mnemonic::Cmovle
            | Mnemonic::Cmovne
            | Mnemonic::Cmovno
            | Mnemonic::Cmovnp
            | Mnemonic::Cmovns
            | Mnemonic::Cmovo
            | Mnemonic::Cmovp
            | Mnemonic::Cmovs
    )
}
