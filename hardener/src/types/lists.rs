//! What the kernel's lists hold, by what is added to them.
//!
//! The kernel checks each addition of an entry (lib/list_debug.c, `CONFIG_DEBUG_LIST`): a call that is given the entry and its
//! neighbours, one of which is the head, or an entry beside which it is put. A pointer out of a list that is known by its head
//! points into what was added there; one out of an entry, into another one of its kind.

use super::btf::{Btf, Type};
use super::flow::{Call, Flow};
use super::layout::{Field, Layout, Ptr};
use super::resolve::{Known, Pointers};
use super::values::{Op, Value};
use rustc_hash::FxHashMap;

/// The functions that check an addition (the longer name from Linux 6.6 on): entry, the one before, the one behind.
const ADDS: [&str; 2] = ["__list_add_valid", "__list_add_valid_or_report"];
/// More kinds of entries in one list than this are as good as none.
const MAX_KINDS: usize = 4;
/// Where an entry has its neighbours: the one behind, the one before.
const NEXT: i32 = 0;
const PREV: i32 = 8;

/// Where a list is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Head {
    /// At an address.
    Data(u64),
    /// In a structure.
    Member(Ptr),
}

/// A list, and an entry that is added to it.
pub type Added = (Head, Ptr);

/// What lists hold.
#[derive(Default)]
pub struct Lists {
    /// `struct list_head`.
    ty: Option<u32>,
    held: FxHashMap<Head, Pointers>,
}

impl Lists {
    /// Nothing is known of any.
    pub fn of(btf: &Btf) -> Lists {
        let mut lists = btf.ids().filter(|id| {
            matches!(btf.at(*id), Type::Composite { .. }) && btf.name(*id) == "list_head"
        });
        Lists {
            ty: lists.next(),
            held: FxHashMap::default(),
        }
    }

    /// Whether a function of this name checks what is added.
    pub fn adds(name: &str) -> bool {
        ADDS.contains(&name)
    }

    /// Which of the neighbours that a checked addition is given is its list's head; the other one is read from there.
    pub fn head(flow: &Flow, call: &Call) -> Option<Value> {
        let [_, before, behind, ..] = call.arguments;
        let read = |from: Value, at: i32| flow.values.load_of(from, at);
        if read(before, NEXT) == Some(behind) {
            Some(before)
        } else if read(behind, PREV) == Some(before) {
            Some(behind)
        } else {
            None
        }
    }

    /// The list whose head is at `value`, of which `known` is known.
    pub fn at(
        &self,
        layout: &Layout<'_>,
        flow: &Flow,
        value: Value,
        known: &Known,
    ) -> Option<Head> {
        match (flow.values.op(value), known) {
            (Op::Const(at), _) => Some(Head::Data(at)),
            (_, Known::Pointers(all)) => match all[..] {
                [only] => layout.holder(only, self.ty?).map(Head::Member),
                _ => None,
            },
            _ => None,
        }
    }

    /// The entry of which `known` is known, when that says what it is in.
    pub fn entry(&self, layout: &Layout<'_>, known: &Known) -> Option<Ptr> {
        match known {
            Known::Pointers(all) => match all[..] {
                [only] => layout.holder(only, self.ty?).map(|_| only),
                _ => None,
            },
            _ => None,
        }
    }

    /// Adds an entry to its list, and to those of its own kind.
    pub fn add(&mut self, layout: &Layout<'_>, (head, entry): Added) {
        let own = self.ty.and_then(|ty| layout.holder(entry, ty));
        for head in [Some(head), own.map(Head::Member)].into_iter().flatten() {
            let held = self.held.entry(head).or_default();
            if !held.contains(&entry) {
                held.push(entry);
                held.sort_unstable();
            }
        }
    }

    /// Forgets it all, to be counted again.
    pub fn forget(&mut self) {
        self.held.clear();
    }

    /// What the word at `place`, which is declared as `field`, points to, when it is one of a list of which that is known.
    pub fn word(&self, layout: &Layout<'_>, place: Ptr, field: &Field) -> Option<&Pointers> {
        let ty = self.ty.filter(|ty| field.to.contains(ty))?;
        let inner = layout.innermost(place);
        let own = inner.ty == ty && [NEXT, PREV].contains(&inner.delta);
        let start = Ptr {
            ty: place.ty,
            delta: place.delta.wrapping_sub(inner.delta),
        };
        let head = layout.holder(start, ty).filter(|_| own)?;
        self.held_by(Head::Member(head))
    }

    /// What the word at an address points to.
    pub fn data(&self, at: u64) -> Option<&Pointers> {
        let before = at.wrapping_sub(PREV as u64);
        let own = self.held_by(Head::Data(at));
        own.or_else(|| self.held_by(Head::Data(before)))
    }

    fn held_by(&self, head: Head) -> Option<&Pointers> {
        let held = self.held.get(&head);
        held.filter(|all| all.len() <= MAX_KINDS)
    }
}
