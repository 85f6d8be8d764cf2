//! The proof that a thunk clears the stack, by running it at every place that RSP may have in a stack. What the stack holds is
//! not known; where the thunk decides by it, both ways are followed.

use crate::check::cave::CaveImage;
use iced_x86::{ConditionCode, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use penumbra_bundle::{Cave, LinkVa, VaRange};
use rayon::prelude::*;
use rustc_hash::FxHashSet;
use std::hash::{Hash, Hasher};

use super::UNUSED;

/// The stack's size; it lies at a multiple of it (arch/x86/include/asm/page_64_types.h, `THREAD_SIZE`).
const STACK: i64 = 0x4000;
/// Less than so many bytes from its end, a thunk may give up: `STACK_END_MAGIC` stands there, and whoever comes as far has all
/// but left the stack.
const END: i64 = 1024;
/// r10, r11, the flags and xmm0: nothing else is saved.
const PUSHED: usize = 5;
/// xmm0, among the registers.
const VECTOR: usize = 2;
/// Its words.
const WORDS: usize = 2;
/// With less room than this below RSP, the next call or interrupt leaves the stack.
const LEAST: i64 = 64;
/// The longest thunk.
const LONGEST: u64 = 512;

/// A thunk's instructions, by how far behind its start they stand.
pub struct Code {
    start: LinkVa,
    instructions: Vec<Option<Instruction>>,
}

impl Code {
    /// Decodes what stands at `at`.
    pub fn read(image: &CaveImage, cave: &Cave, at: LinkVa) -> Code {
        let end = LinkVa(image.thunks.end.0.min(at.0 + LONGEST));
        let bytes = image.slice(cave, VaRange { start: at, end });
        let decoder = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE);
        let instructions = decoder.into_iter().take_while(|one| !one.is_invalid());
        let mut code = Code {
            start: at,
            instructions: vec![None; bytes.len()],
        };
        for one in instructions {
            code.instructions[(one.ip() - at.0) as usize] = Some(one);
        }
        code
    }

    /// The instruction at `at`.
    pub fn at(&self, at: LinkVa) -> Option<&Instruction> {
        let place = at.0.checked_sub(self.start.0)?;
        self.instructions
            .get(usize::try_from(place).ok()?)?
            .as_ref()
    }
}

/// What a register or a word that was pushed holds; what xmm0 held lies in two words.
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
    /// Nobody knows what.
    Unknown,
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

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct State {
    ip: LinkVa,
    /// r10, r11 and xmm0.
    registers: [Value; 3],
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

impl Hash for State {
    /// By what tells states apart, mostly.
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        (self.ip, self.zero, self.below, self.seen, self.flags).hash(hasher);
    }
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

/// Proves that the thunk at `entry` clears what was written below RSP, touches nothing else, and goes on to `next` with xmm0 as it
/// was; whether it keeps r10, r11 and the flags too.
pub fn prove(code: &Code, entry: LinkVa, next: LinkVa) -> Result<bool, Fault> {
    let places: Vec<i64> = (LEAST..STACK).step_by(8).collect();
    let places = places.par_iter();
    let proved: Vec<Result<bool, Fault>> = places
        .map_init(Room::default, |room, rsp| {
            at_place(code, entry, next, *rsp, room)
        })
        .collect();
    // The lowest place that fails is the one that is told.
    proved
        .into_iter()
        .try_fold(true, |keeps, one| Ok(one? && keeps))
}

/// Memory for the states of one place of RSP after another.
#[derive(Default)]
struct Room {
    seen: FxHashSet<State>,
    open: Vec<State>,
}

fn at_place(
    code: &Code,
    entry: LinkVa,
    next: LinkVa,
    rsp: i64,
    room: &mut Room,
) -> Result<bool, Fault> {
    let start = State {
        ip: entry,
        registers: [0, 1, VECTOR].map(Value::Entry),
        flags: Flag::Entry,
        pushed: [Value::Zero; PUSHED],
        depth: 0,
        dirty: 0,
        zero: rsp,
        below: 0,
        seen: 0,
    };
    let mut keeps = true;
    let Room { seen, open } = room;
    seen.clear();
    open.clear();
    open.push(start);
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
                if state.registers[VECTOR] != start.registers[VECTOR] {
                    // Nobody has seen to it that the process's own is loaded again.
                    return Err((state.ip, "goes on with xmm0 changed".to_owned()));
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

    /// RSP, from the stack's start.
    fn now(&self, rsp: i64) -> i64 {
        rsp - 8 * self.depth as i64
    }

    /// An address that is read or written: of so many bytes of the stack.
    fn address(
        &self,
        instruction: &Instruction,
        rsp: i64,
        size: usize,
    ) -> Result<i64, &'static str> {
        let base = match instruction.memory_base() {
            Register::RSP => Some(Value::Stack(self.now(rsp))),
            other => self.register(other).map(|number| self.registers[number]),
        };
        let Some(Value::Stack(base)) = base else {
            return Err("uses memory through something other than the stack");
        };
        let plain = instruction.memory_index() == Register::None
            && instruction.segment_prefix() == Register::None
            && instruction.memory_size().size() == size;
        let at = base + instruction.memory_displacement64() as i64;
        match plain && at % 8 == 0 {
            true => Ok(at),
            false => Err("uses something other than a word of the stack"),
        }
    }

    /// The word of the stack that is read or written: one below RSP.
    fn word(&self, instruction: &Instruction, rsp: i64) -> Result<Word, &'static str> {
        self.word_at(self.address(instruction, rsp, 8)?, rsp)
    }

    fn word_at(&self, at: i64, rsp: i64) -> Result<Word, &'static str> {
        if at >= self.now(rsp) {
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

    /// Writes zero to a word.
    fn clear(&mut self, at: i64, rsp: i64) -> Result<(), &'static str> {
        match self.word_at(at, rsp)? {
            Word::Pushed(number) => self.dirty &= !(1 << number),
            Word::Zero => {}
            Word::Below(word) => self.learn(1 << word, false),
        }
        Ok(())
    }

    /// Before anything else, so that what is pushed lies above all that is cleared.
    fn push(&mut self, value: Value, rsp: i64) -> Result<(), &'static str> {
        if self.depth == PUSHED || self.zero != self.now(rsp) || self.below != 0 {
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

    /// RSP goes down, or up, over words that a vector register is kept in.
    fn move_rsp(&mut self, instruction: &Instruction, rsp: i64) -> Result<(), &'static str> {
        let room = instruction.try_immediate(1).ok();
        if instruction.op0_register() != Register::RSP || room != Some(8 * WORDS as u64) {
            return Err("moves RSP by something other than a vector register's size");
        }
        for _ in 0..WORDS {
            match instruction.mnemonic() {
                Mnemonic::Sub => self.push(Value::Unknown, rsp)?,
                _ => {
                    self.pop()?;
                }
            }
        }
        self.flags = Flag::Unknown;
        Ok(())
    }

    /// An instruction with xmm0: it is kept at RSP, or taken back from there, or is zero and clears two words.
    fn vector(&mut self, instruction: &Instruction, rsp: i64) -> Result<(), &'static str> {
        const OTHER: &str = "is an instruction that no such thunk needs";
        let is_vector = |operand| instruction.op_register(operand) == Register::XMM0;
        let kinds = (instruction.op0_kind(), instruction.op1_kind());
        match (instruction.mnemonic(), kinds) {
            (Mnemonic::Xorps, (OpKind::Register, OpKind::Register))
                if is_vector(0) && is_vector(1) =>
            {
                self.registers[VECTOR] = Value::Zero;
                return Ok(());
            }
            (Mnemonic::Movups, (OpKind::Memory, OpKind::Register)) if is_vector(1) => {}
            (Mnemonic::Movups, (OpKind::Register, OpKind::Memory)) if is_vector(0) => {}
            _ => return Err(OTHER),
        }
        let at = self.address(instruction, rsp, 8 * WORDS)?;
        let stores = kinds.0 == OpKind::Memory;
        if stores && self.registers[VECTOR] == Value::Zero {
            (0..WORDS as i64)
                .rev()
                .try_for_each(|word| self.clear(at + 8 * word, rsp))
        } else if at != self.now(rsp) || self.depth < WORDS {
            Err("keeps xmm0 elsewhere than at RSP")
        } else {
            let kept = &mut self.pushed[self.depth - WORDS..self.depth];
            let own = Value::Entry(VECTOR);
            match stores {
                true if self.registers[VECTOR] == own
                    && kept.iter().all(|word| *word == Value::Unknown) =>
                {
                    kept.fill(own);
                }
                false if kept.iter().all(|word| *word == own) => self.registers[VECTOR] = own,
                _ => return Err("keeps something other than xmm0"),
            }
            Ok(())
        }
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
            Mnemonic::Movups | Mnemonic::Xorps => return self.vector(instruction, rsp),
            Mnemonic::Sub | Mnemonic::Add if to == Register::RSP => {
                return self.move_rsp(instruction, rsp);
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
            let at = self.address(instruction, rsp, 8)?;
            return self.clear(at, rsp);
        }
        if mnemonic == Mnemonic::Test && to.full_register() == Register::RSP {
            self.flags = ends(self.now(rsp), instruction)?;
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
                (Value::Stack(self.now(rsp)), self.flags)
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
                let base = match instruction.memory_base() {
                    Register::RSP => Value::Stack(self.now(rsp)),
                    other => self.registers[self.register(other).ok_or(OTHER)?],
                };
                let Value::Stack(at) = base else {
                    return Err(OTHER);
                };
                let at = at + instruction.memory_displacement64() as i64;
                (Value::Stack(at), self.flags)
            }
            (Mnemonic::Test, Value::Stack(at), None) => (value, ends(at, instruction)?),
            _ => return Err(OTHER),
        };
        self.registers[number] = result;
        self.flags = flag;
        Ok(())
    }
}

/// What a test of an address in the stack says: the bits below the stack's size are those of the place in it.
fn ends(at: i64, instruction: &Instruction) -> Result<Flag, &'static str> {
    let immediate = instruction.try_immediate(1).ok().map(|value| value as i64);
    let mask = immediate.filter(|mask| (0..STACK).contains(mask) && at >= 0);
    let mask = mask.ok_or("asks more of an address than its place in the stack")?;
    Ok(Flag::Known(at & mask == 0))
}
