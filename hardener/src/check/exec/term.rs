//! Values as terms over what a thunk finds at its entry.

use super::interval::Set;
use rustc_hash::FxHashMap;

/// A term in an [`Arena`]; equal terms have equal numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Term(pub u32);

/// An operation on 64-bit values; truths are 0 and 1.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Op {
    /// A constant.
    Const(u64),
    /// The address that the thunk checks.
    Subject,
    /// A register at entry.
    Reg(u8),
    /// A flag at entry.
    Flag(u8),
    /// The word on the stack at this offset from RSP at entry.
    Stack(i64),
    /// A value that nothing is known about.
    Unknown(u32),
    /// Two operands.
    Bin(Bin, Term, Term),
    /// The low so many bits, sign-extended.
    SignExtend(u8, Term),
    /// So many bytes of memory at an address, zero-extended.
    Load(u8, Term),
    /// RFLAGS as PUSHFQ stores it; the number names the flags kept aside.
    Flags(u32),
}

/// Operations with two operands: the usual ones, on 64 bits, unsigned where not said otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Bin {
    Add,
    Sub,
    Mul,
    And,
    Or,
    Xor,
    /// Shift counts of 64 and more give 0.
    Shl,
    Shr,
    /// Arithmetic shift right.
    Sar,
    Eq,
    Below,
    /// Signed less-than.
    Less,
}

/// All terms of one proof.
#[derive(Default)]
pub struct Arena {
    ops: Vec<Op>,
    known: FxHashMap<Op, Term>,
    unknowns: u32,
}

/// A sum modulo 2^32.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sum {
    /// How often the subject is in it.
    pub subject: u32,
    /// How often the four bytes before the subject.
    pub named: u32,
    /// Whether one is added where the byte before these four is below a limit, and this limit.
    pub carry: Option<u64>,
    /// What else is added.
    pub constant: u32,
}

impl Sum {
    /// The difference; none when something would be taken away by what a byte is.
    pub fn less(&self, other: &Sum) -> Option<Sum> {
        other.carry.is_none().then(|| Sum {
            subject: self.subject.wrapping_sub(other.subject),
            named: self.named.wrapping_sub(other.named),
            carry: self.carry,
            constant: self.constant.wrapping_sub(other.constant),
        })
    }
}

impl Arena {
    /// Forgets all terms, and keeps the memory.
    pub fn clear(&mut self) {
        self.ops.clear();
        self.known.clear();
        self.unknowns = 0;
    }

    /// What `term` is.
    pub fn op(&self, term: Term) -> Op {
        self.ops[term.0 as usize]
    }

    /// The term of an operation, as it stands.
    pub fn raw(&mut self, op: Op) -> Term {
        if let Some(term) = self.known.get(&op) {
            return *term;
        }
        let term = self.push(op);
        self.known.insert(op, term);
        term
    }

    fn push(&mut self, op: Op) -> Term {
        let term = Term(u32::try_from(self.ops.len()).expect("thunks are small"));
        self.ops.push(op);
        term
    }

    /// A constant.
    pub fn constant(&mut self, value: u64) -> Term {
        self.raw(Op::Const(value))
    }

    /// A fresh value that nothing is known about.
    pub fn unknown(&mut self) -> Term {
        self.unknowns += 1;
        self.push(Op::Unknown(self.unknowns))
    }

    /// The constant that `term` is.
    pub fn value(&self, term: Term) -> Option<u64> {
        match self.op(term) {
            Op::Const(value) => Some(value),
            _ => None,
        }
    }

    /// `!truth`.
    pub fn not(&mut self, truth: Term) -> Term {
        let zero = self.constant(0);
        self.bin(Bin::Eq, truth, zero)
    }

    /// `term` cut to `bits`.
    pub fn truncate(&mut self, term: Term, bits: u32) -> Term {
        if bits >= 64 {
            return term;
        }
        let mask = self.constant((1 << bits) - 1);
        self.bin(Bin::And, term, mask)
    }

    /// The low `bits` of `term`, sign-extended to 64.
    pub fn sign_extend(&mut self, term: Term, bits: u32) -> Term {
        if bits >= 64 {
            return term;
        }
        if let Some(value) = self.value(term) {
            return self.constant(sign_extend(value, bits));
        }
        self.raw(Op::SignExtend(bits as u8, term))
    }

    /// `left op right`, simplified where that is plain.
    pub fn bin(&mut self, op: Bin, left: Term, right: Term) -> Term {
        let (a, b) = (self.value(left), self.value(right));
        if let (Some(a), Some(b)) = (a, b) {
            return self.constant(apply(op, a, b));
        }
        // Constants stand on the right of what commutes.
        if a.is_some() && matches!(op, Bin::Add | Bin::And | Bin::Or | Bin::Xor | Bin::Eq) {
            return self.bin(op, right, left);
        }
        if left == right {
            match op {
                Bin::Sub | Bin::Xor | Bin::Below | Bin::Less => return self.constant(0),
                Bin::And | Bin::Or => return left,
                Bin::Eq => return self.constant(1),
                _ => {}
            }
        }
        let Some(value) = b else {
            return self.raw(Op::Bin(op, left, right));
        };
        match (op, value) {
            (Bin::Add | Bin::Or | Bin::Xor | Bin::Shl | Bin::Shr | Bin::Sar, 0) => return left,
            (Bin::And | Bin::Below, 0) => return self.constant(0),
            (Bin::Sub, _) => {
                let negative = self.constant(value.wrapping_neg());
                return self.bin(Bin::Add, left, negative);
            }
            (Bin::And, _) if self.ceiling(left) & !value == 0 => return left,
            _ => {}
        }
        if let Op::Bin(inner, x, y) = self.op(left)
            && let Some(known) = self.value(y)
        {
            let merged = match (op, inner) {
                (Bin::Add, Bin::Add) => Some((Bin::Add, known.wrapping_add(value))),
                (Bin::And, Bin::And) => Some((Bin::And, known & value)),
                (Bin::Eq, Bin::Add) => Some((Bin::Eq, value.wrapping_sub(known))),
                _ => None,
            };
            if let Some((op, value)) = merged {
                let value = self.constant(value);
                return self.bin(op, x, value);
            }
        }
        self.raw(Op::Bin(op, left, right))
    }

    /// All bits that `term` can have, as a mask of ones from bit 0 up.
    fn ceiling(&self, term: Term) -> u64 {
        let ones = |value: u64| match value {
            0 => 0,
            _ => u64::MAX >> value.leading_zeros(),
        };
        match self.op(term) {
            Op::Const(value) => ones(value),
            Op::Load(bytes, _) if bytes < 8 => (1 << (8 * bytes)) - 1,
            Op::Bin(Bin::And, left, right) => self.ceiling(left).min(self.ceiling(right)),
            Op::Bin(Bin::Or | Bin::Xor, left, right) => self.ceiling(left).max(self.ceiling(right)),
            Op::Bin(Bin::Shr, left, right) => match self.value(right) {
                Some(count) if count < 64 => self.ceiling(left) >> count,
                _ => self.ceiling(left),
            },
            Op::Bin(Bin::Eq | Bin::Below | Bin::Less, ..) => 1,
            _ => u64::MAX,
        }
    }

    /// For which subjects in `within` the truth `term` holds, when that is a set of intervals that can be told.
    pub fn holds(&self, term: Term, within: &Set) -> Option<Set> {
        match self.op(term) {
            Op::Const(0) => Some(Set::none()),
            Op::Const(_) => Some(Set::all()),
            Op::Bin(Bin::Eq, x, y) => {
                let value = self.value(y)?;
                match value {
                    // "x is false" and "x is true" of a truth
                    0 if self.is_truth(x) => Some(self.holds(x, within)?.complement()),
                    1 if self.is_truth(x) => self.holds(x, within),
                    _ => self.preimage(x, &Set::span(value, value), within),
                }
            }
            Op::Bin(Bin::Below, x, y) => match (self.value(x), self.value(y)) {
                (_, Some(limit)) => self.preimage(x, &Set::span(0, limit.checked_sub(1)?), within),
                (Some(limit), _) => {
                    let above = match limit.checked_add(1) {
                        Some(from) => Set::span(from, u64::MAX),
                        None => Set::none(),
                    };
                    self.preimage(y, &above, within)
                }
                _ => None,
            },
            Op::Bin(Bin::Less, x, y) => {
                let least = i64::MIN as u64;
                match (self.value(x), self.value(y)) {
                    (_, Some(limit)) if limit == least => Some(Set::none()),
                    (_, Some(limit)) => {
                        self.preimage(x, &Set::around(least, limit.wrapping_sub(1)), within)
                    }
                    (Some(limit), _) if limit == i64::MAX as u64 => Some(Set::none()),
                    (Some(limit), _) => {
                        let most = i64::MAX as u64;
                        self.preimage(y, &Set::around(limit.wrapping_add(1), most), within)
                    }
                    _ => None,
                }
            }
            Op::Bin(Bin::Or, x, y) if self.is_truth(x) && self.is_truth(y) => {
                Some(self.holds(x, within)?.union(&self.holds(y, within)?))
            }
            Op::Bin(Bin::And, x, y) if self.is_truth(x) && self.is_truth(y) => {
                Some(self.holds(x, within)?.intersect(&self.holds(y, within)?))
            }
            _ => None,
        }
    }

    /// Whether nothing else from the entry is in `term`.
    pub fn depends_only_on_subject(&self, term: Term) -> bool {
        match self.op(term) {
            Op::Const(_) | Op::Subject => true,
            Op::Bin(_, left, right) => {
                self.depends_only_on_subject(left) && self.depends_only_on_subject(right)
            }
            Op::SignExtend(_, inner) | Op::Load(_, inner) => self.depends_only_on_subject(inner),
            Op::Reg(_) | Op::Flag(_) | Op::Stack(_) | Op::Unknown(_) | Op::Flags(_) => false,
        }
    }

    /// `term` modulo 2^32 as a sum. None when it is no such sum.
    pub fn sum(&self, term: Term) -> Option<Sum> {
        let of = |subject, named, constant| Sum {
            subject,
            named,
            carry: None,
            constant,
        };
        match self.op(term) {
            Op::Const(value) => Some(of(0, 0, value as u32)),
            Op::Subject => Some(of(1, 0, 0)),
            Op::Load(4, address) if self.before_subject(address) == Some(4) => Some(of(0, 1, 0)),
            // A byte is less than a constant, or not.
            Op::Bin(Bin::Below, byte, limit) => match (self.op(byte), self.value(limit)?) {
                (Op::Load(1, address), limit) if self.before_subject(address) == Some(5) => {
                    Some(Sum {
                        carry: Some(limit),
                        ..of(0, 0, 0)
                    })
                }
                _ => None,
            },
            // Neither touches the low half.
            Op::Bin(Bin::And, inner, mask) if self.value(mask) == Some(0xffff_ffff) => {
                self.sum(inner)
            }
            Op::SignExtend(32, inner) => self.sum(inner),
            Op::Bin(Bin::Add, left, right) => {
                let (left, right) = (self.sum(left)?, self.sum(right)?);
                // Once is enough.
                if left.carry.is_some() && right.carry.is_some() {
                    return None;
                }
                Some(Sum {
                    subject: left.subject.wrapping_add(right.subject),
                    named: left.named.wrapping_add(right.named),
                    carry: left.carry.or(right.carry),
                    constant: left.constant.wrapping_add(right.constant),
                })
            }
            Op::Bin(Bin::Sub, left, right) => self.sum(left)?.less(&self.sum(right)?),
            _ => None,
        }
    }

    /// How many bytes before the subject `address` lies, when that is a few.
    pub fn before_subject(&self, address: Term) -> Option<u64> {
        match self.op(address) {
            Op::Bin(Bin::Add, base, offset) if self.op(base) == Op::Subject => {
                let before = self.value(offset)?.wrapping_neg();
                (1..=8).contains(&before).then_some(before)
            }
            _ => None,
        }
    }

    /// Whether `term` has no bit above the low 32.
    pub fn is_half(&self, term: Term) -> bool {
        self.ceiling(term) <= u64::from(u32::MAX)
    }

    fn is_truth(&self, term: Term) -> bool {
        self.ceiling(term) <= 1
    }

    /// The subjects in `within` for which `term` has one of `values`.
    fn preimage(&self, term: Term, values: &Set, within: &Set) -> Option<Set> {
        match self.op(term) {
            Op::Subject => Some(values.clone()),
            Op::Bin(Bin::Add, x, y) => {
                let value = self.value(y)?;
                let moved = values.flat_map(|low, high| {
                    if (low, high) == (0, u64::MAX) {
                        return Set::all();
                    }
                    Set::around(low.wrapping_sub(value), high.wrapping_sub(value))
                });
                self.preimage(x, &moved, within)
            }
            Op::Bin(Bin::Shr, x, y) => {
                let count = self.value(y).filter(|count| *count < 64)?;
                let most = u64::MAX >> count;
                let fitting = values.intersect(&Set::span(0, most));
                self.preimage(x, &unshift(&fitting, count), within)
            }
            Op::Bin(Bin::Sar, x, y) => {
                let count = self.value(y).filter(|count| *count < 64)?;
                let most = i64::MAX as u64 >> count;
                let fitting = values.intersect(&Set::around(!most, most));
                self.preimage(x, &unshift(&fitting, count), within)
            }
            Op::Bin(Bin::And, x, y) => {
                let mask = self.value(y)?;
                let low = !mask;
                if low & low.wrapping_add(1) == 0 {
                    // Clears low bits: each multiple stands for all values up to the next.
                    let whole = values.flat_map(|from, to| {
                        let from = from.checked_add(low).map(|from| from & mask);
                        from.map_or(Set::none(), |from| Set::span(from, to & mask))
                    });
                    let whole = whole.flat_map(|from, to| Set::span(from, to | low));
                    return self.preimage(x, &whole, within);
                }
                if mask & mask.wrapping_add(1) == 0 {
                    // Keeps low bits: plain while all candidates share the others.
                    let (from, to) = self.image(x, within)?;
                    let base = from & !mask;
                    if base != to & !mask {
                        return None;
                    }
                    let fitting = values.intersect(&Set::span(0, mask));
                    let moved = fitting.flat_map(|low, high| Set::span(base | low, base | high));
                    return self.preimage(x, &moved, within);
                }
                None
            }
            _ => None,
        }
    }

    /// The least and greatest value of `term` for subjects in `within`, when it moves with the subject without wrapping.
    fn image(&self, term: Term, within: &Set) -> Option<(u64, u64)> {
        match self.op(term) {
            Op::Subject => within.hull(),
            Op::Bin(Bin::Add, x, y) => {
                let value = self.value(y)?;
                let (low, high) = self.image(x, within)?;
                let (low, high) = (low.wrapping_add(value), high.wrapping_add(value));
                (low <= high).then_some((low, high))
            }
            Op::Bin(Bin::Shr, x, y) => {
                let count = self.value(y).filter(|count| *count < 64)?;
                let (low, high) = self.image(x, within)?;
                Some((low >> count, high >> count))
            }
            _ => None,
        }
    }
}

fn unshift(values: &Set, count: u64) -> Set {
    let low = (1u64 << count) - 1;
    values.flat_map(|from, to| Set::around(from << count, to << count | low))
}

/// The low `bits` of `value`, sign-extended.
pub fn sign_extend(value: u64, bits: u32) -> u64 {
    let unused = 64 - bits;
    ((value << unused) as i64 >> unused) as u64
}

/// Applies an operation to each place: `place op operand`.
pub fn apply_all(op: Bin, places: &mut [u64], operands: impl Iterator<Item = u64>) {
    // One loop an operation, so that the operation is not chosen again for each place.
    macro_rules! each {
        ($($op:ident),*) => {
            match op {
                $(Bin::$op => places
                    .iter_mut()
                    .zip(operands)
                    .for_each(|(place, operand)| *place = apply(Bin::$op, *place, operand)),)*
            }
        };
    }
    each!(Add, Sub, Mul, And, Or, Xor, Shl, Shr, Sar, Eq, Below, Less);
}

/// What an operation gives.
#[inline(always)]
pub fn apply(op: Bin, a: u64, b: u64) -> u64 {
    match op {
        Bin::Add => a.wrapping_add(b),
        Bin::Sub => a.wrapping_sub(b),
        Bin::Mul => a.wrapping_mul(b),
        Bin::And => a & b,
        Bin::Or => a | b,
        Bin::Xor => a ^ b,
        Bin::Shl if b < 64 => a << b,
        Bin::Shr if b < 64 => a >> b,
        Bin::Sar => ((a as i64) >> b.min(63)) as u64,
        Bin::Shl | Bin::Shr => 0,
        Bin::Eq => u64::from(a == b),
        Bin::Below => u64::from(a < b),
        Bin::Less => u64::from((a as i64) < (b as i64)),
    }
}
