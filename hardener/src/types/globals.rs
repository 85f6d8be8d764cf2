//! What is known about data: what its words point to, and of which types its objects are.

use super::around::Around;
use super::btf::{Btf, Type, VOID};
use super::functions::{FunctionIndex, Places};
use super::layout::{Layout, Ptr};
use super::lists::Lists;
use super::resolve::{Known, Pointers, Resolver};
use super::shapes::Shapes;
use crate::image::Image;
use penumbra_bundle::LinkVa;
use rustc_hash::{FxHashMap, FxHashSet};
use smallvec::smallvec;

/// Structures of one name in several votes: more than so many are no evidence.
const MAX_VOTES: usize = 8;

/// Pointers in a table of functions; more are no table of a few prototypes.
const MAX_TABLE: usize = 512;
/// Of larger objects only the start is looked at.
const MAX_SHAPE: u32 = 4096;
/// So many uses of a word that all agree are its type.
const ENOUGH_USES: u32 = 3;

/// An object by what it points to.
pub struct Shape<'a> {
    /// The place that is asked about.
    pub at: u32,
    /// Where it points to functions, and their prototypes as far as they may be believed.
    pub functions: Vec<(u32, &'a [u32])>,
    /// Where it holds something else: other pointers, or numbers.
    pub others: Vec<u32>,
    /// Types that are known to start where it does.
    pub starts: &'a [u32],
    /// Bytes up to the next symbol.
    pub room: u32,
}

/// What is known about data.
#[derive(Default)]
pub struct Globals {
    /// Code, as ranges of addresses.
    code: Vec<(u64, u64)>,
    text: u64,
    /// Starts of objects, by symbol, ascending.
    starts: Vec<u64>,
    /// Types voted for things that start at an address.
    objects: FxHashMap<u64, Vec<u32>>,
    /// Addresses of `objects`, ascending.
    object_starts: Vec<u64>,
    /// What words point to.
    words: FxHashMap<u64, Vec<Ptr>>,
    /// What the file has in words that are relocated.
    pub initial: FxHashMap<u64, u64>,
    /// Where those are, ascending.
    initial_starts: Vec<u64>,
    /// Prototypes of functions by where they start.
    prototypes: FxHashMap<u64, Vec<u32>>,
    /// Per-cpu variables by address.
    per_cpu: Vec<(u32, u32)>,
    per_cpu_end: u64,
    /// What words of structures are used as, where their declarations do not say: types, and how often.
    fields: FxHashMap<Ptr, Vec<(Ptr, u32)>>,
    /// Pointers to anything into which functions are put.
    functions: FxHashSet<Ptr>,
    /// What tables are seen to be given, by where they start.
    tables: FxHashMap<u64, Vec<Ptr>>,
    /// What lists hold.
    pub lists: Lists,
    /// What words of structures are that all their uses agree about.
    settled: FxHashMap<Ptr, Ptr>,
}

impl Globals {
    /// From symbols, relocations and BTF alone.
    pub fn new(
        image: &Image,
        places: &Places<'_>,
        btf: &Btf,
        functions: &FunctionIndex,
    ) -> Globals {
        let mut globals = Globals {
            text: places.start,
            lists: Lists::of(btf),
            ..Globals::default()
        };
        for section in image.sections().iter().filter(|section| section.exec) {
            globals
                .code
                .push((section.range.start.0, section.range.end.0));
        }
        globals.starts = image.symbols.iter().map(|symbol| symbol.va.0).collect();
        globals.starts.sort_unstable();
        globals.starts.dedup();
        for place in &image.relocs.abs64 {
            if let Some(value) = image.u64_at(*place) {
                globals.initial.insert(place.0, value);
            }
        }
        globals.initial_starts = globals.initial.keys().copied().collect();
        globals.initial_starts.sort_unstable();
        for function in &functions.all {
            let va = places.start + u64::from(function.start());
            globals.prototypes.insert(va, function.prototypes.clone());
        }
        for variable in &btf.variables {
            let ty = btf.plain(variable.ty);
            globals.per_cpu.push((variable.offset, ty));
        }
        globals.per_cpu.sort_unstable();
        globals.per_cpu_end = globals.per_cpu.last().map_or(0, |(at, ty)| {
            u64::from(*at) + u64::from(btf.size(*ty).max(8))
        });
        globals
    }

    /// The offset of an address in code from the text's start.
    pub fn text(&self, va: u64) -> Option<u32> {
        let inside = self.code.iter().any(|code| (code.0..code.1).contains(&va));
        u32::try_from(va.checked_sub(self.text)?)
            .ok()
            .filter(|_| inside)
    }

    /// Whether `va` is the address of data.
    pub fn is_data(&self, va: u64) -> bool {
        (0xffff_ffff_8000_0000..0xffff_ffff_c000_0000).contains(&va) && self.text(va).is_none()
    }

    /// The symbol's range around `va`.
    fn symbol(&self, va: u64) -> Option<(u64, u64)> {
        let after = self.starts.partition_point(|start| *start <= va);
        let start = *self.starts.get(after.checked_sub(1)?)?;
        let end = self.starts.get(after).copied().unwrap_or(u64::MAX);
        Some((start, end))
    }

    /// Adds a vote: a thing of type `ty` starts at `va`. Whether it is new.
    pub fn vote_object(&mut self, va: u64, ty: u32) -> bool {
        if !self.is_data(va) {
            return false;
        }
        let votes = self.objects.entry(va).or_default();
        let new = !votes.contains(&ty);
        if new {
            votes.push(ty);
        }
        new
    }

    /// Adds a vote: the word at `va` holds such a pointer.
    pub fn vote_word(&mut self, va: u64, ptr: Ptr) {
        let votes = self.words.entry(va).or_default();
        if !votes.contains(&ptr) {
            votes.push(ptr);
        }
    }

    /// Counts a use of the word at `place` as a pointer.
    pub fn vote_field(&mut self, place: Ptr, used: Ptr) {
        let votes = self.fields.entry(place).or_default();
        match votes.iter_mut().find(|vote| vote.0 == used) {
            Some(vote) => vote.1 += 1,
            None => votes.push((used, 1)),
        }
    }

    /// Forgets the uses, to count them again.
    pub fn forget_fields(&mut self) {
        self.fields.clear();
    }

    /// Finds what words of structures are that are used as something: what most uses say, if there is for each other use one
    /// thing that is both.
    pub fn settle(&mut self, around: &Around<'_>, layout: &Layout<'_>) {
        let settled = self.fields.iter().filter_map(|(place, uses)| {
            let declared = &layout.field(*place).to;
            let uses = uses.iter().filter(|(used, _)| !declared.contains(&used.ty));
            let most = uses.clone().max_by_key(|(used, count)| (*count, *used))?.0;
            let all: u32 = uses.clone().map(|(_, count)| count).sum();
            let agrees = |used: &Ptr| *used == most || around.are_one(*used, most);
            let agreed = uses.clone().all(|(used, _)| agrees(used));
            (agreed && all >= ENOUGH_USES).then_some((*place, most))
        });
        self.settled = settled.collect();
    }

    /// What the word at `place` is used as, when all uses agree.
    pub fn field(&self, place: Ptr) -> Option<Ptr> {
        self.settled.get(&place).copied()
    }

    /// Says that a function is put at `place`, innermost.
    pub fn put_function(&mut self, place: Ptr) {
        self.functions.insert(place);
    }

    /// Whether a function is ever put at `place`, innermost.
    pub fn holds_functions(&self, place: &Ptr) -> bool {
        self.functions.contains(place)
    }

    /// Functions that initialised objects have where their types declare a pointer to anything.
    pub fn find_functions(&mut self, layout: &Layout<'_>) {
        let mut found = Vec::new();
        for (va, types) in &self.objects {
            for ty in types {
                let end = va + u64::from(layout.size(*ty));
                let from = self.initial_starts.partition_point(|at| at < va);
                for at in self.initial_starts[from..]
                    .iter()
                    .take_while(|at| **at < end)
                {
                    if self.text(self.initial[at]).is_some() {
                        found.push(layout.innermost(Ptr {
                            ty: *ty,
                            delta: (at - va) as i32,
                        }));
                    }
                }
            }
        }
        self.functions.extend(found);
    }

    /// Votes for objects of which nothing else says the type: one structure only has such functions in such places.
    pub fn match_shapes(&mut self, shapes: &Shapes<'_>) {
        let mut found = Vec::new();
        let mut at = 0;
        while at < self.initial_starts.len() {
            let Some((start, end)) = self.symbol(self.initial_starts[at]) else {
                at += 1;
                continue;
            };
            let mut places = Vec::new();
            while at < self.initial_starts.len() && self.initial_starts[at] < end {
                let place = self.initial_starts[at];
                places.push((place, self.initial[&place]));
                at += 1;
            }
            if self.is_data(start) && !self.objects.contains_key(&start) {
                let functions = places.iter().filter_map(|(place, to)| {
                    let prototypes = self.prototypes.get(to)?;
                    // Of what BTF may be wrong about nothing follows.
                    let known = !prototypes.is_empty();
                    known.then_some(((place - start) as u32, prototypes.as_slice()))
                });
                let functions: Vec<(u32, &[u32])> = functions.collect();
                if let Some(ty) = shapes.matching(&functions, (end - start) as u32) {
                    found.push((start, ty));
                }
            }
        }
        for (va, ty) in found {
            self.vote_object(va, ty);
        }
    }

    /// Follows pointers in typed objects to further objects, until there is no more.
    pub fn spread(&mut self, btf: &Btf) {
        let mut open: Vec<(u64, u32)> = Vec::new();
        for (va, types) in &self.objects {
            open.extend(types.iter().map(|ty| (*va, *ty)));
        }
        for (va, ptrs) in &self.words {
            if let Some(to) = self.initial.get(va) {
                open.extend(
                    ptrs.iter()
                        .filter(|ptr| ptr.delta == 0)
                        .map(|ptr| (*to, ptr.ty)),
                );
            }
        }
        // A table of pointers is one to what its first word points to, if it may be one.
        let mut tables = Vec::new();
        for (va, ptrs) in &self.words {
            if let [only] = ptrs[..]
                && only.delta == 0
                && !self.objects.contains_key(va)
                && let Some(pointer) = btf.pointer_to(only.ty)
                && self.is_table(btf, *va, only.ty)
            {
                tables.push((*va, pointer));
            }
        }
        for (va, to) in &self.initial {
            if !self.objects.contains_key(va)
                && let Some([ty]) = self.objects.get(to).map(Vec::as_slice)
                && let Some(pointer) = btf.pointer_to(*ty)
                && self.is_table(btf, *va, *ty)
            {
                tables.push((*va, pointer));
            }
        }
        open.extend(tables);
        open.sort_unstable();
        let mut seen: FxHashSet<(u64, u32)> = FxHashSet::default();
        while let Some((va, ty)) = open.pop() {
            if !seen.insert((va, ty)) {
                continue;
            }
            self.vote_object(va, ty);
            let size = u64::from(btf.size(ty)).max(8);
            let Some((start, end)) = self.symbol(va) else {
                continue;
            };
            // Pointers go on as long as there are some.
            let end = match btf.at(ty) {
                Type::Pointer(_) if start == va => end.min(va + self.pointers(va, end)),
                _ => end.min(va.saturating_add(size)),
            };
            let from = self.initial_starts.partition_point(|at| *at < va);
            for at in self.initial_starts[from..]
                .iter()
                .take_while(|at| **at < end)
            {
                let to = self.initial[at];
                if let Some(pointee) = exact_pointer(btf, ty, (at - va) as u32, 12)
                    && self.is_data(to)
                {
                    open.push((to, pointee));
                }
            }
        }
        self.object_starts = self.objects.keys().copied().collect();
        self.object_starts.sort_unstable();
    }

    /// How many bytes of pointers stand one after another from `va` to `end`.
    fn pointers(&self, va: u64, end: u64) -> u64 {
        let from = self.initial_starts.partition_point(|at| *at < va);
        let all = self.initial_starts[from..].iter().zip((va..end).step_by(8));
        8 * all.take_while(|(at, expected)| **at == *expected).count() as u64
    }

    /// Whether the symbol at `va` may be a table of pointers to `ty`: nothing in it points to anything else, and it is no
    /// structure that merely starts with one.
    fn is_table(&self, btf: &Btf, va: u64, ty: u32) -> bool {
        let Some((start, end)) = self.symbol(va) else {
            return false;
        };
        let from = self.initial_starts.partition_point(|at| *at < va);
        let inside = self.initial_starts[from..].iter();
        let inside: Vec<u64> = inside.take_while(|at| **at < end).copied().collect();
        // Without initial values there is nothing to see but one word.
        let whole = end - va == 8
            || self.pointers(va, end) == 8 * inside.len() as u64 && !inside.is_empty();
        let same = |at: &u64| {
            let to = self.initial[at];
            match self.prototypes.get(&to) {
                Some(prototypes) => prototypes.contains(&ty),
                None => self.objects.get(&to).is_none_or(|votes| {
                    votes.iter().all(|vote| {
                        *vote == ty
                            || starts_with(btf, ty, *vote, 8)
                            || starts_with(btf, *vote, ty, 8)
                    })
                }),
            }
        };
        start == va && whole && inside.iter().all(same)
    }

    /// Whether `va` is a variable of one word of which no more is known than what its words are.
    pub fn is_word(&self, va: u64) -> bool {
        self.symbol(va).is_some_and(|symbol| symbol == (va, va + 8))
            && !self.objects.contains_key(&va)
    }

    /// The functions in the initial value of the symbol around `va`, by offset, with what BTF says of them, and the types that
    /// are known to start there; none where another object is known in it.
    pub fn shape(&self, image: &Image, va: u64) -> Option<Shape<'_>> {
        let (start, end) = self.symbol(va).filter(|_| self.is_data(va))?;
        let inside = self.object_starts.partition_point(|at| *at <= start);
        let other = self.object_starts.get(inside).is_some_and(|at| *at <= va);
        let room = u32::try_from(end - start).ok().filter(|_| !other)?;
        let from = self.initial_starts.partition_point(|at| *at < start);
        let words = self.initial_starts[from..].iter();
        let words = words.take_while(|at| **at < end);
        let functions = words.filter_map(|at| {
            let prototypes = self.prototypes.get(&self.initial[at])?;
            Some(((at - start) as u32, prototypes.as_slice()))
        });
        let functions: Vec<(u32, &[u32])> = functions.collect();
        let others = (0..room.min(MAX_SHAPE)).step_by(8).filter(|at| {
            let value = image.u64_at(LinkVa(start + u64::from(*at)));
            let other = value.is_some_and(|value| value != 0);
            other && functions.binary_search_by_key(at, |one| one.0).is_err()
        });
        Some(Shape {
            at: (va - start) as u32,
            others: others.collect(),
            functions,
            starts: self.objects.get(&start).map_or(&[], Vec::as_slice),
            room,
        })
    }

    /// What a pointer to `va` points to.
    pub fn object(&self, btf: &Btf, va: u64) -> Known {
        let Some((start, end)) = self.symbol(va) else {
            return Known::Anything;
        };
        let after = self.object_starts.partition_point(|at| *at <= va);
        for at in self.object_starts[..after].iter().rev() {
            if *at < start {
                break;
            }
            let votes = &self.objects[at];
            if votes.len() > MAX_VOTES {
                return Known::Anything;
            }
            let delta = va - at;
            let mut fitting: Vec<u32> = votes.clone();
            // What is the start of another's object says less than the other does.
            fitting.retain(|ty| {
                !votes
                    .iter()
                    .any(|other| other != ty && starts_with(btf, *other, *ty, 8))
            });
            let largest = fitting.iter().map(|ty| btf.size(*ty)).max().unwrap_or(0);
            if delta >= u64::from(largest.max(1)) {
                // An array of one type, as far as the symbol goes.
                let [only] = fitting[..] else {
                    continue;
                };
                let size = u64::from(btf.size(only));
                if size == 0 || va >= end || *at != start {
                    continue;
                }
                return Known::Pointers(smallvec![Ptr {
                    ty: only,
                    delta: (delta % size) as i32,
                }]);
            }
            let ptrs = fitting.iter().map(|ty| Ptr {
                ty: *ty,
                delta: delta as i32,
            });
            return Known::Pointers(ptrs.collect());
        }
        Known::Anything
    }

    /// What the word at `va` holds.
    pub fn word(&self, resolver: &Resolver<'_>, va: u64) -> Known {
        if let Known::Pointers(all) = self.object(resolver.btf, va) {
            let mut found = Pointers::new();
            for ptr in all {
                let field = resolver.layout.field(ptr);
                if field.anything {
                    found.clear();
                    break;
                }
                found.extend(field.to.iter().map(|ty| Ptr { ty: *ty, delta: 0 }));
            }
            if !found.is_empty() {
                found.sort_unstable();
                found.dedup();
                return Known::Pointers(found);
            }
        }
        let mut found = Pointers::from_slice(self.used_as(va));
        if let Some(to) = self.initial.get(&va) {
            match self.prototypes.get(to) {
                Some(prototypes) => {
                    found.extend(prototypes.iter().map(|ty| Ptr { ty: *ty, delta: 0 }));
                }
                None if found.is_empty() => {
                    if let Known::Pointers(all) = self.object(resolver.btf, *to) {
                        found.extend(all);
                    }
                }
                None => {}
            }
        }
        found.sort_unstable();
        found.dedup();
        match found.is_empty() {
            true => Known::Anything,
            false => Known::Pointers(found),
        }
    }

    /// As what the word at `va` was seen used, where no object says what it is.
    pub fn used_as(&self, va: u64) -> &[Ptr] {
        self.words.get(&va).map_or(&[], Vec::as_slice)
    }

    /// What any word of the table around `va` holds: functions, or pointers to things of known types, or what is put into it.
    pub fn table(&self, btf: &Btf, va: u64) -> Known {
        let Some((start, end)) = self.symbol(va).filter(|_| self.is_data(va)) else {
            return Known::Anything;
        };
        let from = self.initial_starts.partition_point(|at| *at < start);
        let to = self.initial_starts.partition_point(|at| *at < end);
        if to - from > MAX_TABLE {
            return Known::Anything;
        }
        let words = self.initial_starts[from..to].iter();
        let words = words.map(|at| self.initial[at]);
        let mut found = Pointers::new();
        for to in words.clone() {
            let Some(prototypes) = self.prototypes.get(&to) else {
                continue;
            };
            if prototypes.is_empty() {
                return Known::Anything;
            }
            found.extend(prototypes.iter().map(|ty| Ptr { ty: *ty, delta: 0 }));
        }
        if found.is_empty() {
            found.extend_from_slice(self.tables.get(&va).map_or(&[], Vec::as_slice));
            for to in words {
                match self.object(btf, to) {
                    Known::Pointers(all) => found.extend(all),
                    _ => return Known::Anything,
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        match found.is_empty() || found.len() > 16 {
            true => Known::Anything,
            false => Known::Pointers(found),
        }
    }

    /// Adds a vote: each word of the table at `va`, in steps of any size, holds such a pointer.
    pub fn vote_table(&mut self, va: u64, ptr: Ptr) {
        let votes = self.tables.entry(va).or_default();
        if !votes.contains(&ptr) {
            votes.push(ptr);
        }
    }

    /// The per-cpu variable at `at`, which code addresses from GS or adds a CPU's offset to.
    pub fn per_cpu_address(&self, at: u64) -> Option<Ptr> {
        if at == 0 || at >= self.per_cpu_end {
            return None;
        }
        let after = self
            .per_cpu
            .partition_point(|(start, _)| u64::from(*start) <= at);
        let (start, ty) = *self.per_cpu.get(after.checked_sub(1)?)?;
        Some(Ptr {
            ty,
            delta: (at - u64::from(start)) as i32,
        })
    }

    /// What the word at `at` of the per-cpu area holds.
    pub fn per_cpu(&self, resolver: &Resolver<'_>, at: i64) -> Known {
        let place = u64::try_from(at)
            .ok()
            .and_then(|at| self.per_cpu_address(at));
        let Some(place) = place else {
            return Known::Anything;
        };
        let field = resolver.layout.field(place);
        if field.anything || field.to.is_empty() {
            return Known::Anything;
        }
        Known::Pointers(
            field
                .to
                .iter()
                .map(|ty| Ptr { ty: *ty, delta: 0 })
                .collect(),
        )
    }
}

/// What the pointer at exactly `at` of a type points to, when it is one kind of pointer only.
fn exact_pointer(btf: &Btf, ty: u32, at: u32, depth: u32) -> Option<u32> {
    let depth = depth.checked_sub(1)?;
    let mut found = None;
    match btf.at(ty) {
        Type::Pointer(to) if at.is_multiple_of(8) => {
            let to = btf.plain(to);
            return match btf.at(to) {
                Type::Void | Type::Scalar(_) | Type::Forward | Type::Prototype { .. } => None,
                _ if to == VOID => None,
                _ => Some(to),
            };
        }
        Type::Array(element, _) => {
            let element = btf.plain(element);
            let size = btf.size(element);
            return match size {
                0 => None,
                _ => exact_pointer(btf, element, at % size, depth),
            };
        }
        _ => {}
    }
    for member in btf.members_of(ty) {
        if member.bitfield || !member.bit.is_multiple_of(8) {
            continue;
        }
        let inner = btf.plain(member.ty);
        let Some(inside) = at.checked_sub(member.bit / 8) else {
            continue;
        };
        let fits = match btf.at(inner) {
            Type::Pointer(_) => inside == 0,
            Type::Composite { size, .. } => inside < size,
            Type::Array(..) => inside < btf.size(inner),
            _ => false,
        };
        if !fits {
            continue;
        }
        let one = exact_pointer(btf, inner, inside, depth);
        match (found, one) {
            (_, None) => return None,
            (Some(known), Some(one)) if known != one => return None,
            _ => found = one,
        }
    }
    found
}

/// Whether a thing of type `outer` starts with one of type `inner`.
pub fn starts_with(btf: &Btf, outer: u32, inner: u32, depth: u32) -> bool {
    let Some(depth) = depth.checked_sub(1) else {
        return false;
    };
    btf.members_of(outer)
        .iter()
        .filter(|member| member.bit == 0 && !member.bitfield)
        .any(|member| {
            let ty = btf.plain(member.ty);
            ty == inner || starts_with(btf, ty, inner, depth)
        })
}
