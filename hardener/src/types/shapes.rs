//! Structures by the functions that they point to: an object of which nothing else says the type may have one of one structure.

use super::btf::{Btf, Type};
use super::prototypes::{ProtoId, Prototypes};
use rustc_hash::FxHashMap;

/// Structures by the prototypes of the functions that they point to.
pub struct Shapes<'a> {
    btf: &'a Btf,
    prototypes: &'a Prototypes,
    by_place: FxHashMap<(u32, ProtoId), Vec<u32>>,
}

impl<'a> Shapes<'a> {
    /// Of all structures with names.
    pub fn of(btf: &'a Btf, prototypes: &'a Prototypes) -> Shapes<'a> {
        let mut shapes = Shapes {
            btf,
            prototypes,
            by_place: FxHashMap::default(),
        };
        for id in btf.ids() {
            if matches!(btf.at(id), Type::Composite { union: false, .. })
                && !btf.name(id).is_empty()
            {
                shapes.add(id, id, 0, 6);
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
                        let all = self.by_place.entry((place, class)).or_default();
                        if all.last() != Some(&outer) {
                            all.push(outer);
                        }
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
        // Objects are aligned to 32 or 64 bytes: no more than that is left behind one.
        left.retain(|ty| {
            let size = self.btf.size(*ty);
            size <= room && (functions.len() > 1 || room - size < 64)
        });
        match left[..] {
            [only] => Some(only),
            _ => None,
        }
    }
}
