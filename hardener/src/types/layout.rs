//! What stands at an offset from a pointer: members, and the structures around what it points to.

use super::btf::{Btf, Type, VOID};
use rustc_hash::{FxHashMap, FxHashSet, FxHasher};
use std::hash::{Hash as _, Hasher as _};
use std::sync::{Arc, Mutex, PoisonError};

/// A pointer: so many bytes behind the start of a thing of a type.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ptr {
    /// The plain type that is pointed into.
    pub ty: u32,
    /// Bytes from its start.
    pub delta: i32,
}

/// What a word of 8 bytes may be.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Field {
    /// What it may point to.
    pub to: Vec<u32>,
    /// It may be a pointer to anything.
    pub anything: bool,
    /// It was found at all.
    pub found: bool,
    /// It may be a number of 8 bytes instead, in a union.
    pub number: bool,
    /// It may be a pointer to anything, but only if the structure around it is the right one: those pointers.
    pub loose: Vec<Ptr>,
}

impl Field {
    fn merge(&mut self, other: &Field) {
        self.to.extend(&other.to);
        self.anything |= other.anything;
        self.found |= other.found;
        self.number |= other.number;
        self.loose.extend(&other.loose);
    }

    fn done(mut self) -> Field {
        self.to.sort_unstable();
        self.to.dedup();
        self.loose.sort_unstable();
        self.loose.dedup();
        self
    }
}

/// Structures in structures nest no deeper.
const MAX_DEPTH: u32 = 12;
/// An array of structures counts as so many places for the structure at most.
const MAX_ELEMENTS: u32 = 16;

/// Structures around one that are looked at; some are part of thousands.
const MAX_CONTAINERS: usize = 4096;

/// In which structures a type is, and where.
pub struct Containers {
    by_inner: FxHashMap<u32, Vec<(u32, u32)>>,
}

impl Containers {
    /// Of all types.
    pub fn of(btf: &Btf) -> Containers {
        let mut by_inner: FxHashMap<u32, Vec<(u32, u32)>> = FxHashMap::default();
        for id in btf.ids() {
            for member in btf.members_of(id) {
                if member.bitfield || !member.bit.is_multiple_of(8) {
                    continue;
                }
                let mut ty = btf.plain(member.ty);
                let mut count = 1;
                while let Type::Array(element, elements) = btf.at(ty) {
                    count = elements.min(MAX_ELEMENTS);
                    ty = btf.plain(element);
                }
                if !matches!(btf.at(ty), Type::Composite { .. }) {
                    continue;
                }
                let size = btf.size(ty);
                for index in 0..count {
                    let at = member.bit / 8 + index * size;
                    by_inner.entry(ty).or_default().push((id, at));
                }
            }
        }
        Containers { by_inner }
    }

    /// The structures that have `ty` as a member, and where.
    pub fn around(&self, ty: u32) -> &[(u32, u32)] {
        self.by_inner.get(&ty).map_or(&[], Vec::as_slice)
    }
}

/// Parts of what is remembered, so that threads seldom wait for each other.
const SHARDS: usize = 64;

/// Looks up members; remembers, for all threads.
pub struct Layout<'a> {
    btf: &'a Btf,
    containers: &'a Containers,
    known: [Mutex<FxHashMap<Ptr, Arc<Field>>>; SHARDS],
}

impl<'a> Layout<'a> {
    /// Nothing looked up yet.
    pub fn new(btf: &'a Btf, containers: &'a Containers) -> Layout<'a> {
        Layout {
            btf,
            containers,
            known: std::array::from_fn(|_| Mutex::default()),
        }
    }

    /// The size of a plain type in bytes.
    pub fn size(&self, ty: u32) -> u32 {
        self.btf.size(ty)
    }

    /// The word at `place`.
    pub fn field(&self, place: Ptr) -> Arc<Field> {
        let mut hasher = FxHasher::default();
        place.hash(&mut hasher);
        let shard = &self.known[hasher.finish() as usize % SHARDS];
        // Nothing panics while it holds the lock; what is there is whole.
        let known = || shard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known().get(&place) {
            return known.clone();
        }
        let mut field = Field::default();
        self.find(place.ty, place.delta, MAX_DEPTH, &mut field);
        let field = Arc::new(field.done());
        known().insert(place, field.clone());
        field
    }

    /// The same place in the innermost structure that has a member of type `inner` there; none when there is no `inner`.
    pub fn holder(&self, place: Ptr, inner: u32) -> Option<Ptr> {
        let mut place = place;
        for _ in 0..MAX_DEPTH {
            let next = self.step(place)?;
            if next
                == (Ptr {
                    ty: inner,
                    delta: 0,
                })
            {
                return Some(place);
            }
            place = next;
        }
        None
    }

    /// The same place in the innermost structure that it is in.
    pub fn innermost(&self, place: Ptr) -> Ptr {
        let mut place = place;
        for _ in 0..MAX_DEPTH {
            match self.step(place) {
                Some(inner) => place = inner,
                None => break,
            }
        }
        place
    }

    /// The same place in the member that it is in, if that is a structure.
    fn step(&self, place: Ptr) -> Option<Ptr> {
        self.btf.members_of(place.ty).iter().find_map(|member| {
            let at = place.delta.checked_sub((member.bit / 8) as i32)?;
            let mut ty = self.btf.plain(member.ty);
            let mut at = u32::try_from(at).ok()?;
            if at >= self.btf.size(ty) || member.bitfield {
                return None;
            }
            while let Type::Array(element, _) = self.btf.at(ty) {
                ty = self.btf.plain(element);
                at %= self.btf.size(ty).max(1);
            }
            matches!(self.btf.at(ty), Type::Composite { .. }).then_some(Ptr {
                ty,
                delta: at as i32,
            })
        })
    }

    fn find(&self, ty: u32, delta: i32, depth: u32, field: &mut Field) {
        match self.btf.at(ty) {
            Type::Composite { size, .. } => {
                if delta >= 0 && (delta as u32).saturating_add(8) <= size {
                    self.inside(ty, delta as u32, depth, field);
                } else if let Some(delta) = self.btf.in_last_array(ty, delta) {
                    self.inside(ty, delta as u32, depth, field);
                } else {
                    self.around(ty, delta, depth, field);
                }
            }
            Type::Pointer(to) if delta % 8 == 0 => self.pointer(to, field),
            Type::Array(element, _) => {
                let element = self.btf.plain(element);
                let size = self.btf.size(element) as i32;
                if size > 0 && depth > 0 {
                    self.find(element, delta.rem_euclid(size), depth - 1, field);
                }
            }
            Type::Void | Type::Scalar(_) | Type::Forward => {
                field.found = true;
                field.anything = true;
            }
            _ => {}
        }
    }

    fn pointer(&self, to: u32, field: &mut Field) {
        field.found = true;
        let to = self.btf.plain(to);
        match self.btf.at(to) {
            Type::Void | Type::Scalar(_) | Type::Forward | Type::Tag => field.anything = true,
            _ if to == VOID => field.anything = true,
            _ => field.to.push(to),
        }
    }

    /// The word at `at` of a structure, union members all counted.
    fn inside(&self, ty: u32, at: u32, depth: u32, field: &mut Field) {
        let Some(depth) = depth.checked_sub(1) else {
            field.anything = true;
            return;
        };
        let union = matches!(self.btf.at(ty), Type::Composite { union: true, .. });
        for member in self.btf.members_of(ty) {
            if member.bitfield || !member.bit.is_multiple_of(8) {
                continue;
            }
            let Some(inner) = at.checked_sub(member.bit / 8) else {
                continue;
            };
            let plain = self.btf.plain(member.ty);
            // An address with bits in it that are none, beside a pointer.
            if union && inner == 0 && matches!(self.btf.at(plain), Type::Scalar(8)) {
                field.number = true;
            }
            self.member(plain, inner, depth, field);
        }
    }

    fn member(&self, ty: u32, at: u32, depth: u32, field: &mut Field) {
        match self.btf.at(ty) {
            Type::Pointer(to) if at == 0 => self.pointer(to, field),
            Type::Array(element, count) => {
                let element = self.btf.plain(element);
                let size = self.btf.size(element);
                // A last array may have no length.
                if size > 0 && (count == 0 || at < size.saturating_mul(count)) {
                    self.member(element, at % size, depth, field);
                }
            }
            Type::Composite { size, .. } if at < size => self.inside(ty, at, depth, field),
            _ => {}
        }
    }

    /// The word at `delta` from a structure that does not reach so far: of all structures that it is part of.
    fn around(&self, ty: u32, delta: i32, depth: u32, field: &mut Field) {
        let mut seen: FxHashSet<Ptr> = FxHashSet::default();
        let mut open = vec![Ptr { ty, delta }];
        while let Some(place) = open.pop() {
            for (outer, at) in self
                .containers
                .by_inner
                .get(&place.ty)
                .into_iter()
                .flatten()
            {
                let there = Ptr {
                    ty: *outer,
                    delta: place.delta.saturating_add(*at as i32),
                };
                if !seen.insert(there) {
                    continue;
                }
                let size = self.btf.size(*outer);
                if there.delta >= 0 && (there.delta as u32).saturating_add(8) <= size {
                    let mut one = Field::default();
                    self.inside(*outer, there.delta as u32, depth, &mut one);
                    if std::mem::take(&mut one.anything) {
                        one.loose.push(self.innermost(there));
                    }
                    field.merge(&one);
                } else {
                    open.push(there);
                }
            }
            if seen.len() > MAX_CONTAINERS {
                field.anything = true;
                return;
            }
        }
    }
}
