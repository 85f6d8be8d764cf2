//! Structures by the functions that they point to: an object of which nothing else says the type may have one of one structure.

use super::btf::{Btf, Type};
use super::globals::{Shape, starts_with};
use super::layout::{Layout, Ptr};
use super::prototypes::{ProtoId, Prototypes};
use rustc_hash::FxHashMap;

/// Structures by the prototypes of the functions that they point to.
pub struct Shapes<'a> {
    btf: &'a Btf,
    prototypes: &'a Prototypes,
    by_place: FxHashMap<(u32, ProtoId), Vec<u32>>,
    /// Each place where a structure or union, those without names among them, points to a function.
    all: Vec<(u32, ProtoId, u32)>,
}

/// Objects are aligned to 32 or 64 bytes: less than that is left behind one.
const LEFT: u32 = 64;
/// Structures in structures nest no deeper.
const MAX_DEPTH: u32 = 6;

impl<'a> Shapes<'a> {
    /// Of all structures with names.
    pub fn of(btf: &'a Btf, prototypes: &'a Prototypes) -> Shapes<'a> {
        let mut shapes = Shapes {
            btf,
            prototypes,
            by_place: FxHashMap::default(),
            all: Vec::new(),
        };
        for id in btf.ids() {
            if matches!(btf.at(id), Type::Composite { .. }) {
                shapes.add(id, id, 0, MAX_DEPTH);
            }
        }
        shapes.all.sort_unstable();
        shapes.all.dedup();
        for (place, class, ty) in &shapes.all {
            if matches!(btf.at(*ty), Type::Composite { union: false, .. })
                && !btf.name(*ty).is_empty()
            {
                shapes
                    .by_place
                    .entry((*place, *class))
                    .or_default()
                    .push(*ty);
            }
        }
        shapes
    }

    fn add(&mut self, outer: u32, ty: u32, at: u32, depth: u32) {
        let Some(depth) = depth.checked_sub(1) else {
            return;
        };
        let members: Vec<_> = self.btf.members_of(ty).to_vec();
        for member in members {
            if member.bitfield || !member.bit.is_multiple_of(8) {
                continue;
            }
            let place = at + member.bit / 8;
            let inner = self.btf.plain(member.ty);
            match self.btf.at(inner) {
                Type::Pointer(to) => {
                    if let Some(class) = self.prototypes.class(self.btf.plain(to)) {
                        self.all.push((place, class, outer));
                    }
                }
                Type::Composite { .. } => self.add(outer, inner, place, depth),
                _ => {}
            }
        }
    }

    /// The only structure that has such functions in such places and fits into so many bytes.
    pub fn matching(&self, functions: &[(u32, &[u32])], room: u32) -> Option<u32> {
        let mut left: Option<Vec<u32>> = None;
        for (place, prototypes) in functions {
            let mut fitting: Vec<u32> = Vec::new();
            for class in prototypes
                .iter()
                .filter_map(|ty| self.prototypes.class(*ty))
            {
                let all = self.by_place.get(&(*place, class));
                fitting.extend(
                    all.into_iter()
                        .flatten()
                        .filter(|ty| left.as_ref().is_none_or(|left| left.contains(ty))),
                );
            }
            fitting.sort_unstable();
            fitting.dedup();
            left = Some(fitting);
        }
        let mut left = left?;
        left.retain(|ty| {
            let size = self.btf.size(*ty);
            size <= room && (functions.len() > 1 || room - size < LEFT)
        });
        match left[..] {
            [only] => Some(only),
            _ => None,
        }
    }

    /// What is declared at the place that is asked about, in all structures that the object may be one of, or an array of: those
    /// that have such functions where it has them, no function where it has something else, and start with what it is known to
    /// start with.
    pub fn fitting(&self, shape: &Shape<'_>, layout: &Layout<'_>) -> Vec<ProtoId> {
        let fits = |ty: u32, size: u32| {
            let same = |(place, prototypes): &(u32, &[u32])| {
                let mut classes = prototypes
                    .iter()
                    .filter_map(|one| self.prototypes.class(*one));
                let place = place % size;
                // Of what BTF may be wrong about nothing follows.
                prototypes.is_empty()
                    || classes.any(|class| self.all.binary_search(&(place, class, ty)).is_ok())
            };
            let start = |known: &u32| {
                let composite = matches!(self.btf.at(*known), Type::Composite { .. });
                !composite || *known == ty || starts_with(self.btf, ty, *known, MAX_DEPTH)
            };
            let may_hold = |place: &u32| {
                let delta = (place % size) as i32;
                let field = layout.field(Ptr { ty, delta });
                let class = |to: &u32| self.prototypes.class(*to).is_some();
                field.anything || field.to.is_empty() || !field.to.iter().all(class)
            };
            shape.functions.iter().all(same)
                && shape.starts.iter().all(start)
                && shape.others.iter().all(may_hold)
        };
        let fitting = self.all.iter().filter(|(place, _, ty)| {
            let size = self.btf.size(*ty);
            let inside = size > 0 && size <= shape.room && shape.at % size == *place;
            inside && shape.room % size < LEFT && fits(*ty, size)
        });
        let mut found: Vec<ProtoId> = fitting.map(|(_, class, _)| *class).collect();
        found.sort_unstable();
        found.dedup();
        found
    }
}
