//! What a thunk decides by words of hashed tables.
//!
//! Such a thunk reads one word for each subject, at a place that hashing makes of it, and asks whether the word is what the
//! subject's own would be. For nearly all of them it is not: the word at a place says which subject can be meant. So a thunk is
//! followed for the subjects that the words in its tables mean; for all others every such question has the answer no, and
//! what they come to is told by the comparisons with constants.

use super::machine::Code;
use super::term::{Bin, Op, Term};
use super::tree::{Ended, Leaf, Lookup, Node, NodeId, Tree, Wrong};
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
        let mut meant = BTreeSet::new();
        let mut asks = false;
        for node in &self.nodes {
            match node {
                Node::Touch { load, .. } => {
                    // Wherever the hash leads, a table stands there.
                    self.place(*load, tables)?;
                }
                Node::Branch { cond, .. } if self.loads(*cond) => {
                    let question = self.question(*cond)?;
                    let (first, last, step) = self.place(question.load, tables)?;
                    for at in (first..=last).step_by(step as usize) {
                        let word = code.load(at, 4)? as u32;
                        self.meant(&question, word, (low, high), &mut meant)?;
                    }
                    asks = true;
                }
                Node::Leaf(Leaf::Trap, subjects) => {
                    if let Some((first, last)) = subjects.hull()
                        && (first < low || last > high)
                    {
                        return None;
                    }
                }
                Node::Leaf(Leaf::HandOver(_), _) => return None,
                Node::Branch { .. } | Node::Leaf(Leaf::Pass, _) => {}
            }
        }
        if !asks {
            return None;
        }
        // Who is meant by no word, and passes all the same.
        let mut open = vec![self.root];
        while let Some(at) = open.pop() {
            match &self.nodes[at.0] {
                Node::Touch { next, .. } => open.push(*next),
                Node::Branch { cond, yes, no } if self.loads(*cond) => {
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
        let (mut ended, mut seen) = (Ended::default(), BTreeSet::new());
        let meant: Vec<u64> = meant.into_iter().collect();
        if let Err(wrong) = self.evaluate_all(code, tables, meant, &mut seen, &mut ended) {
            return Some(Err(wrong));
        }
        ended.passed.sort_unstable();
        Some(Ok((ended.passed, seen)))
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
    fn when_no_word_is_meant(&self, cond: Term, yes: NodeId, no: NodeId) -> Option<NodeId> {
        match self.ops[cond.0 as usize] {
            Op::Bin(Bin::Eq, truth, _) if self.is_truth(truth) => {
                self.when_no_word_is_meant(truth, no, yes)
            }
            Op::Bin(Bin::Eq | Bin::Below, ..) => Some(no),
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
        meant: &mut BTreeSet<u64>,
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

    /// Where a word may be read, whatever the subject: first and last place, and how far places are apart. None when that
    /// may be outside a table.
    fn place(&self, load: Term, tables: &[Lookup<'_>]) -> Option<(u64, u64, u64)> {
        let Op::Load(4, address) = self.ops[load.0 as usize] else {
            return None;
        };
        let (first, last, step) = self.range(address)?;
        let end = last.checked_add(4)?;
        let mut places = tables.iter().map(|table| table.place);
        places
            .any(|place| place.0 <= first && end <= place.1)
            .then_some((first, last, step))
    }

    /// The least and the greatest value of `term` for any subject, and what all values differ by multiples of.
    fn range(&self, term: Term) -> Option<(u64, u64, u64)> {
        match self.ops[term.0 as usize] {
            Op::Const(value) => Some((value, value, 1)),
            Op::Load(bytes, _) if bytes < 8 => Some((0, (1 << (8 * bytes)) - 1, 1)),
            Op::Bin(Bin::And, _, mask) => Some((0, self.value(mask)?, 1)),
            Op::Bin(Bin::Shr, inner, count) => {
                let count = self.value(count).filter(|count| *count < 64)?;
                let (low, high, _) = self.range(inner)?;
                Some((low >> count, high >> count, 1))
            }
            Op::Bin(Bin::Shl, inner, count) => {
                let count = self.value(count).filter(|count| *count < 64)?;
                let (low, high, step) = self.range(inner)?;
                (high <= u64::MAX >> count).then(|| (low << count, high << count, step << count))
            }
            Op::Bin(Bin::Add, inner, constant) => {
                let constant = self.value(constant)?;
                let (low, high, step) = self.range(inner)?;
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
                let inner = self.linear(inner)?;
                Some(Linear {
                    subjects: inner.subjects << count,
                    loads: inner.loads << count,
                    constant: inner.constant << count,
                    load: inner.load,
                })
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
