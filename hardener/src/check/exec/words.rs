//! What a thunk decides by words of hashed tables.
//!
//! Such a thunk reads one word or byte for each subject, at a place that hashing makes of it, and asks whether the word is what the
//! subject's own would be. For nearly all of them it is not: the word at a place says which subject can be meant. So a thunk is
//! followed for the subjects that the words in its tables mean; for all others every such question has the answer no, and
//! what they come to is told by the comparisons with constants.

use super::calls::MOST_BEFORE;
use super::machine::Code;
use super::term::{Bin, Op, Term};
use super::tree::{Leaf, Lookup, Node, NodeId, Tree, Wrong};
use rustc_hash::FxHashMap;
use std::collections::BTreeSet;

/// So many subjects that pass by comparisons alone are followed one by one; more are no list of entries.
const MAX_COMPARED: u64 = 1 << 16;

/// More answers that mean yes are no question about a word.
const MAX_ANSWERS: u32 = 8;

/// `subjects * (subject) + loads * (load) + constant`, modulo 2^32.
#[derive(Clone, Copy)]
struct Linear {
    subjects: u32,
    loads: u32,
    constant: u32,
    load: Option<Term>,
}

/// A question about a word: whether `word - factor * subject + constant`, modulo 2^32, is below `limit`.
struct Question {
    load: Term,
    factor: u32,
    constant: u32,
    limit: u32,
}

/// A question about a byte: whether it is the low byte of `subject + own`, where it stands at `start` and the high bits of
/// `factor * subject + constant`, modulo 2^32, moved down by `shift`.
struct ByteQuestion {
    start: u64,
    factor: u32,
    /// What the odd part of `factor` gives 1 with.
    inverse: u32,
    constant: u32,
    shift: u32,
    own: u32,
}

/// A question about a bit: that of number `subject + constant`, modulo 2^64, moved down by `shift`, of the `1 << word` bits each
/// from `start` on.
struct BitQuestion {
    load: Term,
    start: u64,
    word: u32,
    constant: u64,
    shift: u32,
}

/// Who passes, and which tables say so.
type Members = (Vec<u64>, BTreeSet<usize>);

impl Tree {
    /// The subjects from `low` to `high`, both inside, that pass; none when it decides in other ways than by words of tables
    /// and by comparing. Which tables it reads.
    pub fn looked_up(
        &self,
        code: &Code<'_>,
        tables: &[Lookup<'_>],
        (low, high): (u64, u64),
    ) -> Option<Result<Members, Wrong>> {
        for node in &self.nodes {
            match node {
                Node::Leaf(Leaf::Trap, subjects) => {
                    let outside = |(first, last)| first < low || last > high;
                    if subjects.hull().is_some_and(outside) {
                        return None;
                    }
                }
                // A string of bits is a set of its own, not one class of many.
                Node::Branch { cond, .. } if self.bit_question(*cond).is_some() => return None,
                _ => {}
            }
        }
        let meant = match self.concerned(code, tables, (low, high), false)? {
            Ok(meant) => meant,
            Err(wrong) => return Some(Err(wrong)),
        };
        let mut seen = BTreeSet::new();
        let ended = self.evaluate_each(code, tables, &meant, &mut seen);
        Some(ended.map(|ended| (ended.passed, seen)))
    }

    /// The subjects from `low` to `high`, both inside, that a word of a table may mean or that comparisons alone let through:
    /// whoever else is there does not pass. Sorted. None when it decides in other ways than by words of tables and by comparing,
    /// or leaves subjects to others; with `leaves` it may, and by what stands before the subject too, whose answer is not looked
    /// at here.
    pub(super) fn concerned(
        &self,
        code: &Code<'_>,
        tables: &[Lookup<'_>],
        (low, high): (u64, u64),
        leaves: bool,
    ) -> Option<Result<Vec<u64>, Wrong>> {
        let mut meant = Vec::new();
        let mut asks = false;
        // Who reads a word at all.
        let mut readers: FxHashMap<Term, (u64, u64)> = FxHashMap::default();
        for node in &self.nodes {
            if let Node::Touch { load, subjects, .. } = node
                && let Some((first, last)) = subjects.hull()
            {
                let some = (first.max(low), last.min(high));
                let all = readers.entry(*load).or_insert(some);
                *all = (all.0.min(some.0), all.1.max(some.1));
                // Wherever the subject leads, a table stands there.
                if some.0 <= some.1 {
                    self.place(*load, tables, some)?;
                }
            }
        }
        for node in &self.nodes {
            match node {
                Node::Branch { cond, .. } if leaves && self.looks_before(*cond) => {}
                Node::Branch { cond, .. } if self.loads(*cond) => {
                    self.all_meant(code, tables, *cond, (low, high), &readers, &mut meant)?;
                    asks = true;
                }
                Node::Leaf(Leaf::HandOver(_), _) if !leaves => return None,
                Node::Branch { .. } | Node::Touch { .. } | Node::Leaf(..) => {}
            }
        }
        // Without such words, and with no others to ask, it is followed for everybody.
        if !asks && !leaves {
            return None;
        }
        // Who is meant by no word, and passes all the same.
        let mut open = vec![self.root];
        while let Some(at) = open.pop() {
            match &self.nodes[at.0] {
                Node::Touch { next, .. } => open.push(*next),
                Node::Branch { cond, yes, no }
                    if self.loads(*cond) && !(leaves && self.looks_before(*cond)) =>
                {
                    open.push(self.when_no_word_is_meant(*cond, *yes, *no)?);
                }
                Node::Branch { yes, no, .. } => open.extend([*yes, *no]),
                Node::Leaf(Leaf::Pass, subjects) => {
                    for (first, last) in subjects.spans() {
                        let (first, last) = (*first.max(&low), *last.min(&high));
                        if first <= last {
                            if last - first > MAX_COMPARED {
                                return Some(Err(Wrong::Passes(first)));
                            }
                            meant.extend(first..=last);
                        }
                    }
                }
                Node::Leaf(..) => {}
            }
        }
        meant.sort_unstable();
        meant.dedup();
        Some(Ok(meant))
    }

    /// Adds the subjects for which some word makes the answer to `cond` yes.
    fn all_meant(
        &self,
        code: &Code<'_>,
        tables: &[Lookup<'_>],
        cond: Term,
        span: (u64, u64),
        readers: &FxHashMap<Term, (u64, u64)>,
        meant: &mut Vec<u64>,
    ) -> Option<()> {
        if let Some(question) = self.bit_question(cond) {
            let (low, high) = *readers.get(&question.load)?;
            return match low <= high {
                true => question.meant(code, (low, high), meant),
                false => Some(()),
            };
        }
        if let Some(question) = self.byte_question(cond) {
            for index in 0..=u32::MAX >> question.shift {
                let byte = code.load(question.start.checked_add(index.into())?, 1)? as u8;
                question.meant(index, byte, span, meant)?;
            }
            return Some(());
        }
        let question = self.question(cond)?;
        let (first, last, step) = self.place(question.load, tables, span)?;
        for at in (first..=last).step_by(step as usize) {
            let word = code.load(at, 4)? as u32;
            self.meant(&question, word, span, meant)?;
        }
        Some(())
    }

    /// Whether `cond` is a question about a table.
    pub(super) fn asks_table(&self, cond: Term) -> bool {
        self.loads(cond) && !self.looks_before(cond)
    }

    /// Whether all that is read for `cond` stands shortly before the subject, and something does.
    fn looks_before(&self, cond: Term) -> bool {
        self.loads(cond) && self.loads_only_before(cond)
    }

    fn loads_only_before(&self, term: Term) -> bool {
        match self.ops[term.0 as usize] {
            Op::Load(_, address) => match self.ops[address.0 as usize] {
                Op::Bin(Bin::Add, base, by) => {
                    let before = self.value(by).map_or(0, u64::wrapping_neg);
                    self.ops[base.0 as usize] == Op::Subject && (1..=MOST_BEFORE).contains(&before)
                }
                _ => false,
            },
            Op::Bin(_, left, right) => {
                self.loads_only_before(left) && self.loads_only_before(right)
            }
            Op::SignExtend(_, inner) => self.loads_only_before(inner),
            _ => true,
        }
    }

    /// What `cond` asks about a bit of a string of bits, or asks the contrary of.
    fn bit_question(&self, cond: Term) -> Option<BitQuestion> {
        let Op::Bin(op, left, right) = self.ops[cond.0 as usize] else {
            return None;
        };
        let Op::Bin(Bin::Shr, load, bit) = (match (op, self.value(right)?) {
            (Bin::Eq, 0) => return self.bit_question(left),
            (Bin::And, 1) => self.ops[left.0 as usize],
            _ => return None,
        }) else {
            return None;
        };
        let (Op::Load(bytes, address), Op::Bin(Bin::And, number, last)) =
            (self.ops[load.0 as usize], self.ops[bit.0 as usize])
        else {
            return None;
        };
        let bits = u64::from(bytes) * 8;
        let word = bits.trailing_zeros();
        let Op::Bin(Bin::Add, offset, start) = self.ops[address.0 as usize] else {
            return None;
        };
        let Op::Bin(Bin::Shl, index, scale) = self.ops[offset.0 as usize] else {
            return None;
        };
        let Op::Bin(Bin::Shr | Bin::Sar, other, count) = self.ops[index.0 as usize] else {
            return None;
        };
        // Masks of 32 bits and none are alike where numbers have no more, which is asked below.
        let (constant, shift) = self.moved(number)?;
        let same = self.moved(other) == Some((constant, shift))
            && self.value(last) == Some(bits - 1)
            && self.value(scale) == Some(u64::from(word) - 3)
            && self.value(count) == Some(u64::from(word));
        same.then_some(BitQuestion {
            load,
            start: self.value(start)?,
            word,
            constant,
            shift,
        })
    }

    /// What `term` adds to the subject, and how far it then moves that down; [`Tree::place`] tells that no bit is lost.
    fn moved(&self, term: Term) -> Option<(u64, u32)> {
        match self.ops[term.0 as usize] {
            Op::Subject => Some((0, 0)),
            Op::Bin(Bin::Add, inner, by) if self.ops[inner.0 as usize] == Op::Subject => {
                Some((self.value(by)?, 0))
            }
            Op::SignExtend(64, inner) => self.moved(inner),
            Op::Bin(Bin::And, inner, mask) if self.value(mask) == Some(u32::MAX.into()) => {
                self.moved(inner)
            }
            Op::Bin(Bin::Shr, inner, by) => {
                let (constant, shift) = self.moved(inner)?;
                let by = u32::try_from(self.value(by)?).ok()?;
                (by < 32 && shift == 0).then_some((constant, by))
            }
            _ => None,
        }
    }

    /// What `cond` asks about a byte, or asks the contrary of.
    fn byte_question(&self, cond: Term) -> Option<ByteQuestion> {
        let Op::Bin(Bin::Eq, left, right) = self.ops[cond.0 as usize] else {
            return None;
        };
        if self.is_truth(left) && self.value(right) == Some(0) {
            return self.byte_question(left);
        }
        let (Op::Bin(Bin::And, own, low), Op::Load(1, address)) =
            (self.ops[left.0 as usize], self.ops[right.0 as usize])
        else {
            return None;
        };
        let own = self
            .linear(own)
            .filter(|own| own.subjects & 0xff == 1 && own.loads == 0)?;
        let Op::Bin(Bin::Add, place, start) = self.ops[address.0 as usize] else {
            return None;
        };
        let Op::Bin(Bin::Shr, product, shift) = self.ops[place.0 as usize] else {
            return None;
        };
        // Only of what has no higher bits are its high bits those of the product modulo 2^32.
        let hash = self
            .linear(product)
            .filter(|hash| hash.loads == 0 && self.is_half(product))?;
        let question = ByteQuestion {
            start: self.value(start)?,
            factor: hash.subjects,
            inverse: inverse(hash.subjects.checked_shr(hash.subjects.trailing_zeros())?),
            constant: hash.constant,
            shift: u32::try_from(self.value(shift)?).ok()?,
            own: own.constant,
        };
        let known = question.factor.trailing_zeros() + 8;
        let tells = question.factor != 0
            && self.value(low) == Some(0xff)
            && (1..=known.min(31)).contains(&question.shift);
        tells.then_some(question)
    }

    /// Whether anything is read for `term`.
    fn loads(&self, term: Term) -> bool {
        match self.ops[term.0 as usize] {
            Op::Load(..) => true,
            Op::Bin(_, left, right) => self.loads(left) || self.loads(right),
            Op::SignExtend(_, inner) => self.loads(inner),
            _ => false,
        }
    }

    fn value(&self, term: Term) -> Option<u64> {
        match self.ops[term.0 as usize] {
            Op::Const(value) => Some(value),
            _ => None,
        }
    }

    /// What `cond` asks, or asks the contrary of.
    fn question(&self, cond: Term) -> Option<Question> {
        match self.ops[cond.0 as usize] {
            Op::Bin(Bin::Eq, truth, zero) if self.is_truth(truth) => {
                (self.value(zero) == Some(0)).then(|| self.question(truth))?
            }
            // Only of what has no higher bits is it a question modulo 2^32.
            Op::Bin(Bin::Eq, left, right) if self.is_half(left) && self.is_half(right) => {
                let (left, right) = (self.linear(left)?, self.linear(right)?);
                let difference = combine(left, right, u32::wrapping_sub)?;
                asked(difference, 1)
            }
            Op::Bin(Bin::Below, left, limit) if self.is_half(left) => {
                let limit = u32::try_from(self.value(limit)?).ok()?;

                (limit <= MAX_ANSWERS).then_some(())?;
                asked(self.linear(left)?, limit)
            }
            _ => None,
        }
    }

    /// Where a branch leads whose question has the answer no.
    pub(super) fn when_no_word_is_meant(
        &self,
        cond: Term,
        yes: NodeId,
        no: NodeId,
    ) -> Option<NodeId> {
        match self.ops[cond.0 as usize] {
            Op::Bin(Bin::Eq, truth, _) if self.is_truth(truth) => {
                self.when_no_word_is_meant(truth, no, yes)
            }
            Op::Bin(Bin::Eq, bit, zero)
                if self.bit_question(bit).is_some() && self.value(zero) == Some(0) =>
            {
                Some(yes)
            }
            Op::Bin(Bin::Eq | Bin::Below, ..) => Some(no),
            Op::Bin(Bin::And, ..) if self.bit_question(cond).is_some() => Some(no),
            _ => None,
        }
    }

    /// Adds the subjects in the text for which `word` makes the answer yes. None when it would be more than one for each
    /// answer.
    fn meant(
        &self,
        question: &Question,
        word: u32,
        (low, high): (u64, u64),
        meant: &mut Vec<u64>,
    ) -> Option<()> {
        let Question {
            factor, constant, ..
        } = *question;
        let shift = factor.trailing_zeros();
        if !factor.is_power_of_two() || high - low >= 1 << (32 - shift) {
            return None;
        }
        for answer in 0..question.limit {
            // factor * subject = word + constant - answer, modulo 2^32.
            let product = word.wrapping_add(constant).wrapping_sub(answer);
            if product.trailing_zeros() < shift {
                continue;
            }
            let mask = u32::MAX >> shift;
            let after = (product >> shift).wrapping_sub(low as u32) & mask;
            let subject = low.checked_add(after.into());
            meant.extend(subject.filter(|subject| *subject <= high));
        }
        Some(())
    }

    /// Where a word or byte may be read, whatever the subject: first and last place, and how far places are apart. None when
    /// that may be outside a table.
    fn place(
        &self,
        load: Term,
        tables: &[Lookup<'_>],
        subjects: (u64, u64),
    ) -> Option<(u64, u64, u64)> {
        let Op::Load(bytes, address) = self.ops[load.0 as usize] else {
            return None;
        };
        let (first, last, step) = self.range(address, subjects)?;
        let end = last.checked_add(bytes.into())?;
        let mut places = tables.iter().map(|table| table.place);
        places
            .any(|place| place.0 <= first && end <= place.1)
            .then_some((first, last, step))
    }

    /// The least and the greatest value that `term` may have for subjects from `low` to `high`, and what all values differ by
    /// multiples of.
    fn range(&self, term: Term, subjects: (u64, u64)) -> Option<(u64, u64, u64)> {
        match self.ops[term.0 as usize] {
            Op::Const(value) => Some((value, value, 1)),
            Op::Subject => Some((subjects.0, subjects.1, 1)),
            Op::SignExtend(64, inner) => self.range(inner, subjects),
            Op::Load(bytes, _) if bytes < 8 => Some((0, (1 << (8 * bytes)) - 1, 1)),
            Op::Bin(Bin::And, inner, mask) => {
                let mask = self.value(mask)?;
                let inner = self.range(inner, subjects);
                // Low bits that are all kept, of what has no others, are what they are.
                let kept =
                    inner.filter(|(_, high, _)| *high <= mask && mask & mask.wrapping_add(1) == 0);
                Some(kept.unwrap_or((0, mask, 1)))
            }
            Op::Bin(op @ (Bin::Shr | Bin::Sar), inner, count) => {
                let count = self.value(count).filter(|count| *count < 64)?;
                let (low, high, _) = self.range(inner, subjects)?;
                // Without a sign both are one.
                let plain = op == Bin::Shr || high <= i64::MAX as u64;
                plain.then_some((low >> count, high >> count, 1))
            }
            Op::Bin(Bin::Shl, inner, count) => {
                let count = self.value(count).filter(|count| *count < 64)?;
                let (low, high, step) = self.range(inner, subjects)?;
                (high <= u64::MAX >> count).then(|| (low << count, high << count, step << count))
            }
            Op::Bin(Bin::Add, inner, constant) => {
                let constant = self.value(constant)?;
                let (low, high, step) = self.range(inner, subjects)?;
                let (low, high) = (low.wrapping_add(constant), high.wrapping_add(constant));
                (low <= high).then_some((low, high, step))
            }
            _ => None,
        }
    }

    fn linear(&self, term: Term) -> Option<Linear> {
        let plain = |subjects, loads, constant, load| Linear {
            subjects,
            loads,
            constant,
            load,
        };
        match self.ops[term.0 as usize] {
            Op::Const(value) => Some(plain(0, 0, value as u32, None)),
            Op::Subject => Some(plain(1, 0, 0, None)),
            Op::Load(4, _) => Some(plain(0, 1, 0, Some(term))),
            // Neither touches the low half.
            Op::Bin(Bin::And, inner, mask) if self.value(mask) == Some(u32::MAX.into()) => {
                self.linear(inner)
            }
            Op::SignExtend(32, inner) => self.linear(inner),
            Op::Bin(Bin::Add, left, right) => {
                combine(self.linear(left)?, self.linear(right)?, u32::wrapping_add)
            }
            Op::Bin(Bin::Sub, left, right) => {
                combine(self.linear(left)?, self.linear(right)?, u32::wrapping_sub)
            }
            Op::Bin(Bin::Shl, inner, count) => {
                let count = self.value(count).filter(|count| *count < 32)?;
                Some(self.linear(inner)?.times(1 << count))
            }
            Op::Bin(Bin::Mul, inner, factor) => {
                Some(self.linear(inner)?.times(self.value(factor)? as u32))
            }
            _ => None,
        }
    }

    fn is_half(&self, term: Term) -> bool {
        match self.ops[term.0 as usize] {
            Op::Const(value) => value <= u32::MAX.into(),
            Op::Load(bytes, _) => bytes <= 4,
            Op::Bin(Bin::And, _, mask) => {
                self.value(mask).is_some_and(|mask| mask <= u32::MAX.into())
            }
            _ => self.is_truth(term),
        }
    }

    fn is_truth(&self, term: Term) -> bool {
        matches!(
            self.ops[term.0 as usize],
            Op::Bin(Bin::Eq | Bin::Below | Bin::Less, ..)
        )
    }
}

impl Linear {
    fn times(self, factor: u32) -> Linear {
        Linear {
            subjects: self.subjects.wrapping_mul(factor),
            loads: self.loads.wrapping_mul(factor),
            constant: self.constant.wrapping_mul(factor),
            load: self.load,
        }
    }
}

impl BitQuestion {
    /// Adds the subjects from `low` to `high` whose bits are set. None when some bit is in no table, or its number is not in
    /// proportion.
    fn meant(&self, code: &Code<'_>, (low, high): (u64, u64), meant: &mut Vec<u64>) -> Option<()> {
        let BitQuestion {
            word,
            constant,
            shift,
            ..
        } = *self;
        let (first, last) = (low.wrapping_add(constant), high.wrapping_add(constant));
        // Then it is what was masked, or taken for a signed number, too.
        if first > last || last > u32::MAX.into() {
            return None;
        }
        let bytes = 1u8 << (word - 3);
        for index in first >> shift >> word..=last >> shift >> word {
            let at = self.start.checked_add(index * u64::from(bytes))?;
            let mut bits = code.load(at, bytes)?;
            while bits != 0 {
                let number = (index << word) + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                let from = (number << shift).max(first);
                let to = ((number + 1) << shift).min(last + 1);
                meant.extend((from..to).map(|at| at.wrapping_sub(constant)));
            }
        }
        Some(())
    }
}

impl ByteQuestion {
    /// Adds the subjects in the text for which `byte` at place `index` makes the answer yes. None when it would be more than a
    /// few.
    fn meant(
        &self,
        index: u32,
        byte: u8,
        (low, high): (u64, u64),
        meant: &mut Vec<u64>,
    ) -> Option<()> {
        let ByteQuestion {
            factor,
            constant,
            shift,
            own,
            ..
        } = *self;
        let even = factor.trailing_zeros();
        // The subject's low byte, and with it the product's lowest bits, which reach up to the place's.
        let subject = u32::from(byte).wrapping_sub(own) & 0xff;
        let ends = factor.wrapping_mul(subject).wrapping_add(constant);
        let known = u32::MAX >> 24u32.saturating_sub(even);
        let product = index << shift | ends & ((1 << shift) - 1);
        if (product ^ ends) & known != 0 {
            return Some(());
        }
        let difference = product.wrapping_sub(constant);
        if difference & ((1 << even) - 1) != 0 {
            return Some(());
        }
        // The subject modulo 2^(32 - even).
        let period = u64::from(u32::MAX >> even) + 1;
        let subject = (difference >> even).wrapping_mul(self.inverse);
        let after = u64::from(subject.wrapping_sub(low as u32)) % period;
        let mut next = low.checked_add(after);
        for _ in 0..MAX_ANSWERS {
            match next.filter(|at| *at <= high) {
                Some(at) => meant.push(at),
                None => return Some(()),
            }
            next = next.and_then(|at| at.checked_add(period));
        }
        None
    }
}

/// What `odd` gives 1 with, modulo 2^32: the order of each odd number divides 2^30, so it is the power before that.
fn inverse(odd: u32) -> u32 {
    (0..30).fold(1u32, |power, _| power.wrapping_mul(power).wrapping_mul(odd))
}

/// One term by term with the other; none when both read a word, and not the same.
fn combine(left: Linear, right: Linear, by: impl Fn(u32, u32) -> u32) -> Option<Linear> {
    let load = match (left.load, right.load) {
        (Some(one), Some(other)) if one != other => return None,
        (one, other) => one.or(other),
    };
    Some(Linear {
        subjects: by(left.subjects, right.subjects),
        loads: by(left.loads, right.loads),
        constant: by(left.constant, right.constant),
        load,
    })
}

/// The question whether `sum` is below `limit`; of the difference the other way round, only whether it is 0.
fn asked(sum: Linear, limit: u32) -> Option<Question> {
    let load = sum.load?;
    match sum.loads {
        1 => Some(Question {
            load,
            factor: sum.subjects.wrapping_neg(),
            constant: sum.constant,
            limit,
        }),
        u32::MAX if limit == 1 => Some(Question {
            load,
            factor: sum.subjects,
            constant: sum.constant.wrapping_neg(),
            limit,
        }),
        _ => None,
    }
}
