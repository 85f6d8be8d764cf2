//! The proof that a thunk clears the stack, by running it at every place that RSP may have in a stack. What the stack holds is
//! not known; where the thunk decides by it, both ways are followed.

use crate::check::cave::CaveImage;
use iced_x86::{ConditionCode, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use penumbra_bundle::{Cave, LinkVa, VaRange};
use rayon::prelude::*;
use rustc_hash::FxHashSet;
use std::collections::BTreeMap;

use super::UNUSED;

/// The stack's size; it lies at a multiple of it (arch/x86/include/asm/page_64_types.h, `THREAD_SIZE`).
const STACK: i64 = 0x4000;
/// Less than so many bytes from its end, a thunk may give up: `STACK_END_MAGIC` stands there, and whoever comes as far has all
/// but left the stack.
const END: i64 = 1024;
/// r10, r11 and the flags: nothing else is pushed.
const PUSHED: usize = 3;
/// With less room than this below RSP, the next call or interrupt leaves the stack.
const LEAST: i64 = 64;
/// The longest thunk.
const LONGEST: u64 = 512;

/// A thunk's instructions, by address.
pub struct Code(BTreeMap<LinkVa, Instruction>);

impl Code {
    /// Decodes what stands at `at`.
    pub fn read(image: &CaveImage, cave: &Cave, at: LinkVa) -> Code {
        let end = LinkVa(image.thunks.end.0.min(at.0 + LONGEST));
        let bytes = image.slice(cave, VaRange { start: at, end });
        let decoder = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE);
        let instructions = decoder.into_iter().take_while(|one| !one.is_invalid());
        Code(instructions.map(|one| (LinkVa(one.ip()), one)).collect())
    }

    /// The instruction at `at`.
    pub fn at(&self, at: LinkVa) -> Option<&Instruction> {
        self.0.get(&at)
    }
}

/// What a register or a word that was pushed holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Value {
    /// An address in the stack, from its start.
    Stack(i64),
    /// Zero.
    Zero,
    /// Some of these words of the stack, ORed: bit n is the word n + 1 words below the lowest known zero.
    Words(u64),
    /// What this register, by number, held at the thunk's entry.
    Entry(usize),
    /// These flags.
    Flags(Flag),
}

/// ZF, or all flags where nothing has changed them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Flag {
    Known(bool),
    /// Whether all of these words are zero.
    Words(u64),
    /// As at the thunk's entry.
    Entry,
    Unknown,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    ip: LinkVa,
    /// r10 and r11.
    registers: [Value; 2],
    flags: Flag,
    /// What was pushed, and how much of it is there still.
    pushed: [Value; PUSHED],
    depth: usize,
    /// Which words of what was pushed are not cleared.
    dirty: u8,
    /// From here to RSP, or to what was pushed, all is zero.
    zero: i64,
    /// Words below that are zero as well, as in [`Value::Words`].
    below: u64,
    /// How many of the lowest words of zeros have been looked at, not written.
    seen: u32,
}

type Fault = (LinkVa, String);

/// A word of the stack.
#[derive(Clone, Copy)]
enum Word {
    /// Where something is or was pushed, by number: not known to be zero.
    Pushed(u8),
    /// Known to be zero.
    Zero,
    /// Below the lowest known zero, by number.
    Below(u32),
}

/// Proves that the thunk at `entry` clears what was written below RSP, touches nothing else, and goes on to `next`; whether it
/// keeps r10, r11 and the flags.
pub fn prove(code: &Code, entry: LinkVa, next: LinkVa) -> Result<bool, Fault> {
    let places: Vec<i64> = (LEAST..STACK).step_by(8).collect();
    let places = places.par_iter();
    let proved: Vec<Result<bool, Fault>> = places
        .map(|rsp| at_place(code, entry, next, *rsp))
        .collect();
    // The lowest place that fails is the one that is told.
    proved
        .into_iter()
        .try_fold(true, |keeps, one| Ok(one? && keeps))
}

fn at_place(code: &Code, entry: LinkVa, next: LinkVa, rsp: i64) -> Result<bool, Fault> {
    let start = State {
        ip: entry,
        registers: [Value::Entry(0), Value::Entry(1)],
        flags: Flag::Entry,
        pushed: [Value::Zero; PUSHED],
        depth: 0,
        dirty: 0,
        zero: rsp,
        below: 0,
        seen: 0,
    };
    let mut keeps = true;
    let mut seen = FxHashSet::default();
    let mut open = vec![start];
    while let Some(mut state) = open.pop() {
        loop {
            if state.ip == next {
                let enough = i64::from(state.seen) * 8 >= UNUSED;
                if !enough && state.zero > END {
                    let what = format!(
                        "goes on with the stack from {:#x} on not cleared, and RSP at {rsp:#x}",
                        state.zero
                    );
                    return Err((state.ip, what));
                }
                if state.depth > 0 || state.dirty > 0 {
                    let what = "goes on with what it pushed on the stack".to_owned();
                    return Err((state.ip, what));
                }
                keeps &= state.registers == start.registers && state.flags == start.flags;
                break;
            }
            let fault = |what: &str| (state.ip, what.to_owned());
            let instruction = code.at(state.ip);
            let instruction = instruction.ok_or_else(|| fault("is no instruction of the thunk"))?;
            let at = state.ip;
            state.ip = LinkVa(instruction.next_ip());
            if instruction.is_jmp_short_or_near() {
                state.ip = LinkVa(instruction.near_branch_target());
            } else if instruction.is_jcc_short_or_near() {
                let equal = match instruction.condition_code() {
                    ConditionCode::e => true,
                    ConditionCode::ne => false,
                    _ => return Err((at, "asks a flag that is not modelled".to_owned())),
                };
                let to = LinkVa(instruction.near_branch_target());
                let (mut yes, mut no) = (state, state);
                (if equal { &mut yes } else { &mut no }).ip = to;
                match state.flags {
                    Flag::Known(zero) => state = if zero { yes } else { no },
                    Flag::Unknown | Flag::Entry => {
                        return Err((at, "decides by something other than the stack".to_owned()));
                    }
                    Flag::Words(words) => {
                        yes.learn(words, true);
                        open.extend([yes, no].into_iter().filter(|state| seen.insert(*state)));
                        break;
                    }
                }
            } else {
                state
                    .execute(instruction, rsp)
                    .map_err(|what| (at, what.to_owned()))?;
            }
        }
    }
    Ok(keeps)
}

impl State {
    /// These words are zero: they were looked at, or written.
    fn learn(&mut self, mut words: u64, looked: bool) {
        self.below |= words;
        while self.below & 1 == 1 {
            self.seen = if looked && words & 1 == 1 {
                self.seen + 1
            } else {
                0
            };
            self.below >>= 1;
            words >>= 1;
            self.zero -= 8;
            // What registers and flags say about words counts from the same place.
            for value in &mut self.registers {
                if let Value::Words(words) = value {
                    *words >>= 1;
                }
            }
            if let Flag::Words(words) = &mut self.flags {
                *words >>= 1;
            }
        }
    }

    /// An address that is read or written: a word of the stack below RSP.
    fn word(&self, instruction: &Instruction, rsp: i64) -> Result<Word, &'static str> {
        let now = rsp - 8 * self.depth as i64;
        let base = match instruction.memory_base() {
            Register::RSP => Some(Value::Stack(now)),
            other => self.register(other).map(|number| self.registers[number]),
        };
        let Some(Value::Stack(base)) = base else {
            return Err("uses memory through something other than the stack");
        };
        let plain = instruction.memory_index() == Register::None
            && instruction.segment_prefix() == Register::None
            && instruction.memory_size().size() == 8;
        let at = base + instruction.memory_displacement64() as i64;
        if !plain || at % 8 != 0 {
            return Err("uses something other than a word of the stack");
        }
        if at >= now {
            return Err("uses what is not below RSP");
        }
        // The word at the end tells whether the stack was too small.
        if at < 8 {
            return Err("uses the end of the stack");
        }
        let below = (self.zero - at) / 8 - 1;
        let from_top = (rsp - at) / 8 - 1;
        match below {
            ..0 if (0..PUSHED as i64).contains(&from_top) => Ok(Word::Pushed(from_top as u8)),
            ..0 => Ok(Word::Zero),
            0..64 => Ok(Word::Below(below as u32)),
            _ => Err("uses the stack out of order"),
        }
    }

    /// Before anything else, so that what is pushed lies above all that is cleared.
    fn push(&mut self, value: Value, rsp: i64) -> Result<(), &'static str> {
        let now = rsp - 8 * self.depth as i64;
        if self.depth == PUSHED || self.zero != now || self.below != 0 {
            return Err("pushes more, or later, than such a thunk needs");
        }
        self.pushed[self.depth] = value;
        self.dirty |= 1 << self.depth;
        self.depth += 1;
        self.zero -= 8;
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, &'static str> {
        self.depth = self
            .depth
            .checked_sub(1)
            .ok_or("pops what it did not push")?;
        Ok(self.pushed[self.depth])
    }

    fn register(&self, register: Register) -> Option<usize> {
        match register {
            Register::R10 => Some(0),
            Register::R11 => Some(1),
            _ => None,
        }
    }

    fn execute(&mut self, instruction: &Instruction, rsp: i64) -> Result<(), &'static str> {
        const OTHER: &str = "is an instruction that no such thunk needs";
        let from = instruction.op1_register();
        let to = instruction.op0_register();
        let mnemonic = instruction.mnemonic();
        match mnemonic {
            Mnemonic::Nop => return Ok(()),
            Mnemonic::Push => {
                let number = self.register(to).ok_or(OTHER)?;
                return self.push(self.registers[number], rsp);
            }
            Mnemonic::Pushfq => return self.push(Value::Flags(self.flags), rsp),
            Mnemonic::Pop => {
                let number = self.register(to).ok_or(OTHER)?;
                self.registers[number] = self.pop()?;
                return Ok(());
            }
            Mnemonic::Popfq => {
                let Value::Flags(flags) = self.pop()? else {
                    return Err("loads flags that no pushfq stored");
                };
                self.flags = flags;
                return Ok(());
            }
            _ => {}
        }
        if instruction.op0_kind() == OpKind::Memory {
            let zero = match instruction.op1_kind() {
                OpKind::Register => {
                    let number = self.register(from);
                    number.is_some_and(|number| self.registers[number] == Value::Zero)
                }
                _ => instruction.try_immediate(1).is_ok_and(|value| value == 0),
            };
            if mnemonic != Mnemonic::Mov || !zero {
                return Err("writes something other than zero");
            }
            match self.word(instruction, rsp)? {
                Word::Pushed(number) => self.dirty &= !(1 << number),
                Word::Zero => {}
                Word::Below(word) => self.learn(1 << word, false),
            }
            return Ok(());
        }
        let number = self.register(to.full_register()).ok_or(OTHER)?;
        let value = self.registers[number];
        let read = match instruction.op1_kind() {
            OpKind::Memory if mnemonic != Mnemonic::Lea => match self.word(instruction, rsp)? {
                Word::Pushed(_) => return Err("looks at what it pushed"),
                Word::Zero => Some(0),
                Word::Below(word) => Some(1 << word),
            },
            _ => None,
        };
        let immediate = instruction.try_immediate(1).ok().map(|value| value as i64);
        let wide = to.size() == 8;
        let (result, flag) = match (mnemonic, value, read) {
            (Mnemonic::Mov, _, Some(words)) if wide => (Value::Words(words), self.flags),
            (Mnemonic::Mov, _, None) if from == Register::RSP => {
                (Value::Stack(rsp - 8 * self.depth as i64), self.flags)
            }
            (Mnemonic::Or, Value::Words(words), Some(more)) if wide => {
                let words = words | more;
                (Value::Words(words), Flag::Words(words))
            }
            (Mnemonic::Xor, _, None) if from == to && to.size() >= 4 => {
                (Value::Zero, Flag::Known(true))
            }
            (Mnemonic::Sub, Value::Stack(at), None) if wide => {
                (Value::Stack(at - immediate.ok_or(OTHER)?), Flag::Unknown)
            }
            (Mnemonic::Lea, _, None) if wide && instruction.memory_index() == Register::None => {
                let base = self.register(instruction.memory_base()).ok_or(OTHER)?;
                let Value::Stack(at) = self.registers[base] else {
                    return Err(OTHER);
                };
                let at = at + instruction.memory_displacement64() as i64;
                (Value::Stack(at), self.flags)
            }
            // The bits below the stack's size are those of the place in it.
            (Mnemonic::Test, Value::Stack(at), None) => {
                let mask = immediate.filter(|mask| (0..STACK).contains(mask) && at >= 0);
                let mask = mask.ok_or("asks more of an address than its place in the stack")?;
                (value, Flag::Known(at & mask == 0))
            }
            _ => return Err(OTHER),
        };
        self.registers[number] = result;
        self.flags = flag;
        Ok(())
    }
}
