//! What registers and stack slots hold in one function, as terms over what it was given (static single assignment).

use rustc_hash::{FxHashMap, FxHashSet};

/// A value of one function.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Value(pub u32);

/// Nothing is known about it.
pub const UNKNOWN: Value = Value(0);

/// More values than most functions have.
const ROOM: usize = 1024;

/// How a value comes about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Op {
    /// In no way that is followed.
    Unknown,
    /// The argument register of this number (rdi 0 to r9 5).
    Arg(u8),
    /// A constant, sign-extended.
    Const(u64),
    /// RSP at entry and so many bytes.
    Stack(i32),
    /// The CPU's own per-cpu area.
    PerCpu,
    /// So many bytes at an address and an offset from it.
    Load(Value, i32, u8),
    /// A value and a constant.
    Add(Value, i64),
    /// Two values; one may be an index.
    Sum(Value, Value),
    /// One of several: an index into [`Values::phis`].
    Phi(u32),
    /// What a direct call returns: the callee's offset in the text.
    Result(u32),
    /// What an indirect call of a value returns.
    IndirectResult(Value),
}

/// All values of one function; equal ones have equal numbers.
#[derive(Default)]
pub struct Values {
    ops: Vec<Op>,
    known: FxHashMap<Op, Value>,
    /// What each phi may be, as a range of `operands`.
    phis: Vec<(u32, u32)>,
    operands: Vec<Value>,
}

impl Values {
    /// Starts again, in the memory that is there.
    pub fn clear(&mut self) {
        self.ops.clear();
        self.known.clear();
        self.phis.clear();
        self.operands.clear();
        self.intern(Op::Unknown);
    }

    /// The values as they are, without what only those need who add some; leaves the memory to the next function's.
    pub fn finished(&mut self) -> Values {
        // Emptying a map takes as long as it is large.
        self.known.clear();
        self.known.shrink_to(ROOM);
        Values {
            ops: self.ops.clone(),
            known: FxHashMap::default(),
            phis: self.phis.clone(),
            operands: self.operands.clone(),
        }
    }

    /// How `value` comes about.
    pub fn op(&self, value: Value) -> Op {
        self.ops[value.0 as usize]
    }

    /// The value of an operation, if there is one.
    pub fn known(&self, op: Op) -> Option<Value> {
        self.known.get(&op).copied()
    }

    /// The constants that these values may be, through phis.
    pub fn constants(&self, mut open: Vec<Value>) -> Vec<u64> {
        let mut found = Vec::new();
        let mut seen = FxHashSet::default();
        while let Some(value) = open.pop() {
            match self.op(value) {
                Op::Const(at) => found.push(at),
                Op::Phi(index) if seen.insert(value) => {
                    open.extend(self.operands(index));
                }
                _ => {}
            }
        }
        found
    }

    /// The arguments by which memory is read, by their numbers.
    pub fn read_through(&self) -> impl Iterator<Item = u8> {
        self.ops.iter().filter_map(|op| match op {
            Op::Load(base, ..) => match self.op(*base) {
                Op::Arg(number) => Some(number),
                _ => None,
            },
            _ => None,
        })
    }

    /// All constants that occur.
    pub fn all_constants(&self) -> impl Iterator<Item = u64> {
        self.ops.iter().filter_map(|op| match op {
            Op::Const(at) => Some(*at),
            _ => None,
        })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.ops.len()
    }

    /// The value of an operation as it stands.
    pub fn intern(&mut self, op: Op) -> Value {
        if let Some(known) = self.known.get(&op) {
            return *known;
        }
        let value = Value(self.ops.len() as u32);
        self.ops.push(op);
        self.known.insert(op, value);
        value
    }

    /// A constant.
    pub fn constant(&mut self, value: u64) -> Value {
        self.intern(Op::Const(value))
    }

    /// The constant that `value` is.
    pub fn as_constant(&self, value: Value) -> Option<u64> {
        match self.op(value) {
            Op::Const(value) => Some(value),
            _ => None,
        }
    }

    /// `value + by`.
    pub fn add(&mut self, value: Value, by: i64) -> Value {
        if by == 0 {
            return value;
        }
        // A table's address as the displacement of an index.
        if (-0x8000_0000..-0x10_0000).contains(&by) && !matches!(self.op(value), Op::Const(_)) {
            let table = self.constant(by as u64);
            return self.sum(value, table);
        }
        match self.op(value) {
            Op::Unknown => UNKNOWN,
            Op::Const(value) => self.constant(value.wrapping_add_signed(by)),
            Op::Stack(at) => match i32::try_from(i64::from(at) + by) {
                Ok(at) => self.intern(Op::Stack(at)),
                Err(_) => UNKNOWN,
            },
            Op::Add(inner, more) => {
                let by = more.wrapping_add(by);
                self.add(inner, by)
            }
            _ => self.intern(Op::Add(value, by)),
        }
    }

    /// `a + b`.
    pub fn sum(&mut self, a: Value, b: Value) -> Value {
        match (self.op(a), self.op(b)) {
            (_, Op::Const(by)) if by as i64 >= -0x10_0000 && (by as i64) < 0x1000 => {
                self.add(a, by as i64)
            }
            (Op::Const(by), _) if by as i64 >= -0x10_0000 && (by as i64) < 0x1000 => {
                self.add(b, by as i64)
            }
            (Op::Unknown, Op::Unknown) => UNKNOWN,
            (Op::Sum(..), Op::Unknown) => a,
            (Op::Unknown, Op::Sum(..)) => b,
            // An offset of either stays outside, where members are looked up.
            (Op::Add(a, by), _) => {
                let inner = self.sum(a, b);
                self.add(inner, by)
            }
            (_, Op::Add(b, by)) => {
                let inner = self.sum(a, b);
                self.add(inner, by)
            }
            _ => self.intern(Op::Sum(a.min(b), a.max(b))),
        }
    }

    /// `bytes` bytes at `base + offset`.
    pub fn load(&mut self, base: Value, offset: i64, bytes: u8) -> Value {
        let address = self.add(base, offset);
        let (base, offset) = self.split(address);
        match i32::try_from(offset) {
            Ok(offset) if base != UNKNOWN => self.intern(Op::Load(base, offset, bytes)),
            _ => UNKNOWN,
        }
    }

    /// The word of 8 bytes at `from + at`, if it is read.
    pub fn load_of(&self, from: Value, at: i32) -> Option<Value> {
        let (base, offset) = self.split(from);
        let offset = i32::try_from(offset).ok()?.checked_add(at)?;
        let is = |op: &Op| match (self.op(base), *op) {
            (Op::Const(start), Op::Load(from, 0, 8)) => {
                self.as_constant(from) == Some(start.wrapping_add_signed(offset.into()))
            }
            (_, op) => op == Op::Load(base, offset, 8),
        };
        let number = self.ops.iter().position(is)?;
        Some(Value(number as u32))
    }

    /// An address as a base and an offset from it.
    pub fn split(&self, address: Value) -> (Value, i64) {
        match self.op(address) {
            Op::Add(base, by) => (base, by),
            _ => (address, 0),
        }
    }

    /// A new phi, to be filled.
    pub fn phi(&mut self) -> Value {
        let value = Value(self.ops.len() as u32);
        self.ops.push(Op::Phi(self.phis.len() as u32));
        self.phis.push((0, 0));
        value
    }

    /// Says what the phi of this index may be.
    pub fn fill(&mut self, index: u32, operands: &[Value]) {
        let start = self.operands.len() as u32;
        self.operands.extend_from_slice(operands);
        self.phis[index as usize] = (start, self.operands.len() as u32);
    }

    /// What the phi of this index may be.
    pub fn operands(&self, index: u32) -> &[Value] {
        let (start, end) = self.phis[index as usize];
        &self.operands[start as usize..end as usize]
    }

    /// How many phis there are.
    pub fn phis(&self) -> usize {
        self.phis.len()
    }
}
