//! Which structure a pointer points into, by all that one function does with it.
//!
//! A pointer that is declared as one to a structure may be one into a larger structure around it (`container_of`), and one that
//! is declared as a pointer to anything is what it is passed on as. Each such use, and each word behind the pointer that is followed
//! or called, must fit to one structure. Those that all of it fits to are what the pointer may point into.

use super::btf::{Btf, Type};
use super::flow::Flow;
use super::layout::{Containers, Layout, Ptr};
use super::resolve::Pointers;
use super::values::{Op, UNKNOWN, Value};
use rustc_hash::{FxHashMap, FxHashSet, FxHasher};
use smallvec::SmallVec;
use std::hash::{Hash as _, Hasher as _};
use std::sync::{Mutex, OnceLock, PoisonError};

/// More structures that fit than this are as good as none.
const MAX_FITTING: usize = 512;
/// More structures around one than any kernel has, and more members of one, with those of its members.
const MAX_AROUND: usize = 1 << 16;
const MAX_PARTS: u32 = 1 << 17;
/// More bytes than a structure has that is not an array.
const MAX_SIZE: u32 = 1 << 20;
/// A structure of which there is none: it names types that belong together (kernel/bpf/btf.c).
const NO_OBJECT: &str = "bpf_ctx_convert";
/// Structures in structures nest no deeper.
const MAX_DEPTH: u32 = 12;

/// Parts of what is remembered, so that threads seldom wait for each other.
const SHARDS: usize = 64;

/// What one function does with the words behind a pointer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Use {
    /// Reads or writes where the word points to.
    Follows,
    /// Calls it.
    Calls,
}

/// A word behind a pointer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Word {
    /// The pointer.
    base: Value,
    /// Bytes from where it points to.
    offset: i32,
    /// What is done with it.
    how: Use,
    /// The word.
    value: Value,
}

/// The words behind pointers that a function follows or calls, by pointer.
pub struct Uses(Vec<Word>);

impl Uses {
    /// Of one function.
    pub fn of(flow: &Flow) -> Uses {
        let mut used: Vec<Option<Use>> = vec![None; flow.values.count()];
        let values = (0..used.len() as u32).map(Value);
        for value in values.clone() {
            let Op::Load(base, ..) = flow.values.op(value) else {
                continue;
            };
            used[base.0 as usize] = Some(Use::Follows);
            // A table and an index of which nothing is known.
            if let Op::Sum(UNKNOWN, table) | Op::Sum(table, UNKNOWN) = flow.values.op(base) {
                used[table.0 as usize] = Some(Use::Follows);
            }
        }
        for store in &flow.stores {
            used[store.base.0 as usize] = Some(Use::Follows);
        }
        for site in &flow.sites {
            used[site.target.0 as usize] = Some(Use::Calls);
        }
        let words = values.filter_map(|value| match flow.values.op(value) {
            Op::Load(base, offset, 8) => Some(Word {
                base,
                offset,
                how: used[value.0 as usize]?,
                value,
            }),
            _ => None,
        });
        let mut words: Vec<Word> = words.collect();
        words.sort_unstable();
        words.shrink_to_fit();
        Uses(words)
    }

    /// The words behind `value`, by offset.
    pub fn behind(&self, value: Value) -> &[Word] {
        let from = self.0.partition_point(|word| word.base < value);
        let count = self.0[from..].partition_point(|word| word.base == value);
        &self.0[from..from + count]
    }
}

/// What is asked: all that a pointer is, and the words that are used behind it, with those that are behind them.
#[derive(PartialEq, Eq, Hash)]
struct Question {
    pointers: Pointers,
    words: SmallVec<[(u8, i32, Use); 8]>,
}

impl Question {
    fn of(pointers: &[Ptr], value: Value, uses: &Uses) -> Question {
        let mut question = Question {
            pointers: pointers.into(),
            words: SmallVec::new(),
        };
        question.pointers.sort_unstable();
        question.pointers.dedup();
        for word in uses.behind(value) {
            question.words.push((0, word.offset, word.how));
            let inner = uses.behind(word.value).iter();
            question
                .words
                .extend(inner.map(|word| (1, word.offset, word.how)));
        }
        question
    }
}

/// What a structure's words may be, a bit for each 8 bytes.
#[derive(Default)]
struct Words {
    followed: Vec<u64>,
    called: Vec<u64>,
}

impl Words {
    fn has(bits: &[u64], at: u32) -> bool {
        let word = at / 8;
        at.is_multiple_of(8)
            && bits
                .get(word as usize / 64)
                .is_some_and(|bits| bits >> (word % 64) & 1 == 1)
    }

    fn set(bits: &mut Vec<u64>, at: u32) {
        let word = at / 8;
        let index = word as usize / 64;
        if bits.len() <= index {
            bits.resize(index + 1, 0);
        }
        bits[index] |= 1 << (word % 64);
    }
}

/// All structures, by what is in them.
pub struct Around<'a> {
    btf: &'a Btf,
    containers: &'a Containers,
    layout: &'a Layout<'a>,
    words: Vec<OnceLock<Words>>,
    outer: Vec<OnceLock<Vec<(u32, u32)>>>,
    answered: [Mutex<FxHashMap<Question, Option<Pointers>>>; SHARDS],
}

impl<'a> Around<'a> {
    /// Nothing looked up yet.
    pub fn new(btf: &'a Btf, containers: &'a Containers, layout: &'a Layout<'a>) -> Around<'a> {
        let count = btf.ids().len();
        Around {
            btf,
            containers,
            layout,
            words: (0..count).map(|_| OnceLock::new()).collect(),
            outer: (0..count).map(|_| OnceLock::new()).collect(),
            answered: std::array::from_fn(|_| Mutex::default()),
        }
    }

    /// Into what `value` points that is `pointers`, all of them at the same time. None when nothing fits to how it is used, or too
    /// much.
    pub fn narrow(&self, pointers: &[Ptr], value: Value, uses: &Uses) -> Option<Pointers> {
        // A pointer to a pointer tells nothing.
        let is_structure = |ptr: &&Ptr| matches!(self.btf.at(ptr.ty), Type::Composite { .. });
        let pointers: Pointers = pointers.iter().filter(is_structure).copied().collect();
        let pointers = &pointers[..];
        let question = Question::of(pointers, value, uses);
        let mut hasher = FxHasher::default();
        question.hash(&mut hasher);
        let shard = &self.answered[hasher.finish() as usize % SHARDS];
        // Nothing panics while it holds the lock; what is there is whole.
        let answered = || shard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = answered().get(&question) {
            return known.clone();
        }
        let found = self.find(pointers, value, uses);
        answered().insert(question, found.clone());
        found
    }

    fn find(&self, pointers: &[Ptr], value: Value, uses: &Uses) -> Option<Pointers> {
        let pivot = pointers.iter().min_by_key(|ptr| self.outer(ptr.ty).len())?;
        let own = std::iter::once((pivot.ty, 0));
        let all = own.chain(self.outer(pivot.ty).iter().copied());
        let all = all.map(|(ty, at)| Ptr {
            ty,
            delta: pivot.delta.saturating_add_unsigned(at),
        });
        let fitting = all.filter(|one| {
            self.allows(*one, value, uses)
                && pointers.iter().all(|ptr| self.is_in(*ptr, *one))
                && self.leads(*one, value, uses)
        });
        let fitting: Vec<Ptr> = fitting.take(MAX_FITTING + 1).collect();
        if fitting.len() > MAX_FITTING {
            return None;
        }
        // What is around one that fits says no more than it does.
        let inner = |one: &&Ptr| {
            let mut others = fitting.iter().filter(|other| other != one);
            !others.any(|other| self.is_in(*other, **one))
        };
        let mut found: Pointers = fitting.iter().filter(inner).copied().collect();
        found.sort_unstable();
        (!found.is_empty()).then_some(found)
    }

    /// Whether something may be pointed to as both at the same time.
    pub fn are_one(&self, one: Ptr, other: Ptr) -> bool {
        let (few, many) = match self.outer(one.ty).len() <= self.outer(other.ty).len() {
            true => (one, other),
            false => (other, one),
        };
        let own = std::iter::once((few.ty, 0));
        own.chain(self.outer(few.ty).iter().copied())
            .any(|(ty, at)| {
                let delta = few.delta.saturating_add_unsigned(at);
                self.is_in(many, Ptr { ty, delta })
            })
    }

    /// Whether `place` has all the words that are used behind `value`.
    pub fn allows(&self, place: Ptr, value: Value, uses: &Uses) -> bool {
        uses.behind(value).iter().all(|word| {
            let at = place.delta.checked_add(word.offset);
            at.is_some_and(|at| self.may(place.ty, at, word.how))
        })
    }

    /// Whether the word at `at` of a structure may be used so.
    fn may(&self, ty: u32, at: i32, how: Use) -> bool {
        let words = self.words(ty);
        let bits = match how {
            Use::Follows => &words.followed,
            Use::Calls => &words.called,
        };
        let at = self.btf.in_last_array(ty, at).unwrap_or(at);
        u32::try_from(at).is_ok_and(|at| Words::has(bits, at))
    }

    /// Whether the words behind `place` point to what has such words itself as are used behind those.
    pub fn leads(&self, place: Ptr, value: Value, uses: &Uses) -> bool {
        let mut words = uses.behind(value).iter();
        words.all(|word| {
            let inner = uses.behind(word.value);
            if inner.is_empty() {
                return true;
            }
            let field = self.layout.field(Ptr {
                ty: place.ty,
                delta: place.delta.saturating_add(word.offset),
            });
            let has = |to: u32| {
                let size = self.btf.size(to) as i32;
                let own = inner.iter().filter(|word| (0..size).contains(&word.offset));
                own.clone().all(|word| self.may(to, word.offset, word.how))
            };
            let untold = field.anything || field.number || field.to.is_empty();
            untold || field.to.iter().any(|to| has(*to))
        })
    }

    /// Whether what points to `inner` and to `outer` at the same time points into one thing.
    fn is_in(&self, inner: Ptr, outer: Ptr) -> bool {
        let Some(at) = outer.delta.checked_sub(inner.delta) else {
            return false;
        };
        if inner.ty == outer.ty {
            return at == 0;
        }
        let at = u32::try_from(at);
        at.is_ok_and(|at| self.outer(inner.ty).binary_search(&(outer.ty, at)).is_ok())
    }

    /// The structures around `ty`, and where in each it stands. Sorted.
    fn outer(&self, ty: u32) -> &[(u32, u32)] {
        let Some(known) = self.outer.get(ty as usize) else {
            return &[];
        };
        let find = || {
            let mut seen: FxHashSet<(u32, u32)> = FxHashSet::default();
            let mut open = vec![(ty, 0u32, MAX_DEPTH)];
            while let Some((inner, at, depth)) = open.pop() {
                let Some(depth) = depth.checked_sub(1) else {
                    continue;
                };
                for (outer, inside) in self.containers.around(inner) {
                    let there = (*outer, at.saturating_add(*inside));
                    if self.btf.name(*outer) != NO_OBJECT
                        && seen.len() < MAX_AROUND
                        && seen.insert(there)
                    {
                        open.push((there.0, there.1, depth));
                    }
                }
            }
            let mut found: Vec<(u32, u32)> = seen.into_iter().collect();
            found.sort_unstable();
            found
        };
        known.get_or_init(find)
    }

    fn words(&self, ty: u32) -> &Words {
        static NONE: Words = Words {
            followed: Vec::new(),
            called: Vec::new(),
        };
        let Some(known) = self.words.get(ty as usize) else {
            return &NONE;
        };
        known.get_or_init(|| {
            let mut words = Words::default();
            self.add(ty, 0, MAX_DEPTH, &mut words, &mut { MAX_PARTS });
            words
        })
    }

    /// Adds the words of a thing of type `ty` at `at`, as long as there are some `left` to look at.
    fn add(&self, ty: u32, at: u32, depth: u32, words: &mut Words, left: &mut u32) {
        let (Some(depth), Some(fewer)) = (depth.checked_sub(1), left.checked_sub(1)) else {
            return;
        };
        *left = fewer;
        if at >= MAX_SIZE {
            return;
        }
        match self.btf.at(ty) {
            Type::Pointer(to) => {
                let to = self.btf.at(self.btf.plain(to));
                if !matches!(to, Type::Prototype { .. }) {
                    Words::set(&mut words.followed, at);
                }
                if matches!(
                    to,
                    Type::Prototype { .. } | Type::Void | Type::Scalar(_) | Type::Forward
                ) {
                    Words::set(&mut words.called, at);
                }
            }
            // An address as a number.
            Type::Scalar(8) => {
                Words::set(&mut words.followed, at);
                Words::set(&mut words.called, at);
            }
            Type::Array(element, count) => {
                let element = self.btf.plain(element);
                let size = self.btf.size(element);
                // A last array may have no length; bytes may be anything.
                let (element, size, count) = match size {
                    0 => return,
                    1 => (None, 8, count / 8),
                    _ => (Some(element), size, count.max(1)),
                };
                for index in 0..count {
                    let Some(at) = index.checked_mul(size).and_then(|by| at.checked_add(by)) else {
                        return;
                    };
                    if *left == 0 || at >= MAX_SIZE {
                        return;
                    }
                    match element {
                        Some(element) => self.add(element, at, depth, words, left),
                        None => {
                            Words::set(&mut words.followed, at.next_multiple_of(8));
                            Words::set(&mut words.called, at.next_multiple_of(8));
                        }
                    }
                }
            }
            Type::Composite { .. } => {
                for member in self.btf.members_of(ty) {
                    if !member.bitfield && member.bit.is_multiple_of(8) {
                        let at = at.saturating_add(member.bit / 8);
                        self.add(self.btf.plain(member.ty), at, depth, words, left);
                    }
                }
            }
            _ => {}
        }
    }
}
