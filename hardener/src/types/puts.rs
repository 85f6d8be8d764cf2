//! Where functions' addresses are put, and what is declared there: by this a function may be called, whatever BTF says of its
//! name.

use super::btf::Type;
use super::flow::{Flow, Store};
use super::functions::{Function, arity, pointee, registers};
use super::globals::starts_with;
use super::layout::Ptr;
use super::patched;
use super::prototypes::{ProtoId, Prototypes};
use super::resolve::{Known, Pointers, Resolver};
use super::shapes::Shapes;
use super::values::{Op, Value};
use super::votes::Votes;
use crate::image::Image;
use rustc_hash::{FxHashMap, FxHashSet};
use smallvec::smallvec;

/// Prototypes of one function: with more of them nothing is gained.
const MAX_FITTING: usize = 256;

/// Where functions are put; functions are offsets in the text.
#[derive(Default)]
pub struct Puts {
    /// The prototypes that are declared at each place where a function is put.
    declared: FxHashMap<u32, Vec<Vec<ProtoId>>>,
    /// Functions that are put where nothing says as what they are called.
    undeclared: FxHashSet<u32>,
}

impl Puts {
    /// What is declared where `function` is put, place by place.
    pub fn declared(&self, function: u32) -> &[Vec<ProtoId>] {
        self.declared.get(&function).map_or(&[], Vec::as_slice)
    }

    /// Whether all places where `function` is put say what it is called as.
    pub fn is_told(&self, function: u32) -> bool {
        !self.undeclared.contains(&function)
    }

    /// Says that `function` is put somewhere of which nothing is known.
    pub fn lose(&mut self, function: u32) {
        self.undeclared.insert(function);
    }

    /// Adds a place by what is declared there; none where it may be called as anything.
    pub fn add(&mut self, function: u32, declared: Option<Vec<ProtoId>>) {
        let Some(mut declared) = declared else {
            self.lose(function);
            return;
        };
        declared.sort_unstable();
        declared.dedup();
        let places = self.declared.entry(function).or_default();
        if !declared.is_empty() && !places.contains(&declared) {
            places.push(declared);
        }
    }

    /// Takes over what was found elsewhere.
    pub fn merge(&mut self, other: Puts) {
        for (function, places) in other.declared {
            places
                .into_iter()
                .for_each(|place| self.add(function, Some(place)));
        }
        self.undeclared.extend(other.undeclared);
    }
}

/// What a parameter says about a function that is passed for it.
enum Parameter {
    /// Nothing is passed there.
    Absent,
    /// It is called so.
    Function(ProtoId),
    /// It may be put anywhere.
    Other,
}

/// Follows what functions do with the addresses of functions.
pub struct Follower<'a> {
    /// Types of values.
    pub resolver: &'a Resolver<'a>,
    /// Classes of prototypes.
    pub prototypes: &'a Prototypes,
    /// Initial values.
    pub image: &'a Image,
    /// Structures by what they point to.
    pub shapes: &'a Shapes<'a>,
    /// The functions whose addresses are taken, as offsets in the text.
    pub taken: &'a FxHashSet<u32>,
}

impl Follower<'_> {
    /// Whether a function has to do with any of them.
    pub fn concerns(&self, flow: &Flow) -> bool {
        let mut all = flow.values.all_constants();
        !flow.lost.is_empty() || all.any(|at| self.function(at).is_some())
    }

    /// Adds where one function puts others.
    pub fn follow(
        &self,
        function: &Function,
        flow: &Flow,
        votes: &Votes,
        known: &[Known],
        puts: &mut Puts,
    ) {
        for at in flow.lost.iter().filter_map(|at| self.function(*at)) {
            puts.lose(at);
        }
        for store in &flow.stores {
            for to in self.functions(flow, store.value) {
                puts.add(to, self.stored(function, flow, known, store, to));
            }
        }
        let objects = votes.stack_objects(flow);
        for (at, value) in &flow.kept {
            for to in self.functions(flow, *value) {
                puts.add(to, self.kept(&objects, *at));
            }
        }
        for call in &flow.calls {
            let callee = self.resolver.functions.at(call.to);
            // What static calls are given is called by them alone (see `patched.rs`).
            if callee.is_some_and(|callee| callee.name == patched::UPDATE) {
                continue;
            }
            let types = callee.map_or(&[][..], |callee| &callee.prototypes);
            self.passed(flow, types, &call.arguments, call.set, puts);
        }
        for site in &flow.sites {
            let types = self.resolver.prototypes(flow, known, site.target);
            let types = types.unwrap_or_default();
            self.passed(flow, &types, &site.arguments, site.set, puts);
        }
        for value in &flow.returns {
            for to in self.functions(flow, *value) {
                self.returned(function, to, puts);
            }
        }
    }

    /// What is declared in data at `va`, where `to` is put.
    ///
    /// What an object is that nothing else speaks of, is one of all structures that fit; that says nothing of a function of which
    /// BTF is believed. A variable of one word may be none of them: then it is called as what it is known to be, and where it is
    /// known as nothing, no branch that reads it is typed.
    pub fn in_data(&self, va: u64, to: u32) -> Option<Vec<ProtoId>> {
        let globals = self.resolver.globals;
        let object = globals.object(self.resolver.btf, va);
        if let Some(declared) = self.member(&object, 0) {
            return Some(declared);
        }
        let used = globals.used_as(va).iter();
        let used: Vec<ProtoId> = used
            .filter_map(|ptr| self.prototypes.class(ptr.ty))
            .collect();
        let function = self.resolver.functions.at(to);
        if function.is_none_or(|function| function.doubt.is_none()) {
            return None;
        }
        let word = globals.is_word(va);
        if !used.is_empty() && !word {
            return Some(used);
        }
        let shape = globals.shape(self.image, va)?;
        let mut fitting = self.shapes.fitting(&shape, self.resolver.layout);
        let found = word || !fitting.is_empty();
        fitting.extend(used);
        (found && fitting.len() <= MAX_FITTING).then_some(fitting)
    }

    fn function(&self, va: u64) -> Option<u32> {
        let at = self.resolver.globals.text(va)?;
        self.taken.contains(&at).then_some(at)
    }

    /// The functions that a value may be.
    fn functions(&self, flow: &Flow, value: Value) -> Vec<u32> {
        if !matches!(flow.values.op(value), Op::Const(_) | Op::Phi(_)) {
            return Vec::new();
        }
        let all = flow.values.constants(vec![value]).into_iter();
        all.filter_map(|at| self.function(at)).collect()
    }

    fn stored(
        &self,
        function: &Function,
        flow: &Flow,
        known: &[Known],
        store: &Store,
        to: u32,
    ) -> Option<Vec<ProtoId>> {
        match flow.values.op(store.base) {
            Op::Const(at) => self.in_data(at.wrapping_add_signed(i64::from(store.offset)), to),
            Op::PerCpu => {
                let at = u64::try_from(store.offset).ok()?;
                let place = self.resolver.globals.per_cpu_address(at)?;
                self.member(&Known::Pointers(smallvec![place]), 0)
            }
            _ => {
                let base = &known[store.base.0 as usize];
                self.member(base, store.offset).or_else(|| {
                    let made = self.made(function, flow, known, store.base);
                    self.member(&made, store.offset)
                })
            }
        }
    }

    /// What a thing is that a function fills and then returns, or puts where a pointer to it is declared.
    fn made(&self, function: &Function, flow: &Flow, known: &[Known], base: Value) -> Known {
        let btf = self.resolver.btf;
        let mut found = Pointers::new();
        for store in &flow.stores {
            let (of, offset) = flow.values.split(store.value);
            let Known::Pointers(places) = &known[store.base.0 as usize] else {
                continue;
            };
            if of != base {
                continue;
            }
            for place in places {
                let fields = place.delta.checked_add(store.offset);
                let field = fields.map(|delta| {
                    self.resolver.layout.field(Ptr {
                        ty: place.ty,
                        delta,
                    })
                });
                if let Some(field) = field
                    && let ([to], false, true) =
                        (&field.to[..], field.anything, field.loose.is_empty())
                    && let Ok(delta) = i32::try_from(-offset)
                {
                    found.push(Ptr { ty: *to, delta });
                }
            }
        }
        for value in &flow.returns {
            let (of, offset) = flow.values.split(*value);
            if let ([prototype], true) = (&function.prototypes[..], of == base)
                && let Some((returns, ..)) = btf.prototype(*prototype)
                && let Some(ty) = pointee(btf, returns)
                && let Ok(delta) = i32::try_from(-offset)
            {
                found.push(Ptr { ty, delta });
            }
        }
        found.sort_unstable();
        found.dedup();
        match found.is_empty() {
            true => Known::Anything,
            false => Known::Pointers(found),
        }
    }

    /// What is declared at `offset` from a pointer; none, when it may be something else too.
    fn member(&self, base: &Known, offset: i32) -> Option<Vec<ProtoId>> {
        let Known::Pointers(all) = base else {
            return None;
        };
        let btf = self.resolver.btf;
        // What is the start of another one says less than the other does.
        let outer = all.iter().filter(|ptr| {
            let around =
                |other: &&Ptr| other.delta == ptr.delta && starts_with(btf, other.ty, ptr.ty, 8);
            !all.iter().any(|other| around(&other))
        });
        let mut found = Vec::new();
        for ptr in outer {
            let delta = ptr.delta.checked_add(offset)?;
            let field = self.resolver.layout.field(Ptr { ty: ptr.ty, delta });
            if field.anything || !field.loose.is_empty() {
                return None;
            }
            let own = field.to.iter().filter_map(|ty| self.prototypes.class(*ty));
            let before = found.len();
            found.extend(own);
            if found.len() == before {
                return None;
            }
        }
        (!found.is_empty()).then_some(found)
    }

    /// What things on the stack declare at `at`.
    fn kept(&self, objects: &[(i32, Ptr)], at: i32) -> Option<Vec<ProtoId>> {
        let mut found = Vec::new();
        for (start, ptr) in objects {
            let delta = at - start + ptr.delta;
            if delta >= 0 && delta + 8 <= self.resolver.btf.size(ptr.ty) as i32 {
                let place = Known::Pointers(smallvec![Ptr { ty: ptr.ty, delta }]);
                found.extend(self.member(&place, 0).unwrap_or_default());
            }
        }
        (!found.is_empty()).then_some(found)
    }

    fn passed(&self, flow: &Flow, types: &[u32], arguments: &[Value; 6], set: u8, puts: &mut Puts) {
        for (number, value) in (0u8..).zip(arguments) {
            let functions = self.functions(flow, *value);
            if functions.is_empty() {
                continue;
            }
            let is_set = set >> number & 1 == 1;
            let mut lost = types.is_empty() && is_set;
            let mut declared = Vec::new();
            for ty in types {
                match self.parameter(*ty, number) {
                    Parameter::Absent => {}
                    Parameter::Function(class) => declared.push(class),
                    Parameter::Other => lost |= is_set,
                }
            }
            for to in functions {
                if lost {
                    puts.lose(to);
                }
                if !declared.is_empty() {
                    puts.add(to, Some(declared.clone()));
                }
            }
        }
    }

    fn parameter(&self, prototype: u32, number: u8) -> Parameter {
        let btf = self.resolver.btf;
        match registers(btf, prototype)[usize::from(number)].map(|ty| btf.at(ty)) {
            Some(Type::Pointer(to)) => match self.prototypes.class(btf.plain(to)) {
                Some(class) => Parameter::Function(class),
                None => Parameter::Other,
            },
            None if number >= arity(btf, prototype) => Parameter::Absent,
            _ => Parameter::Other,
        }
    }

    fn returned(&self, function: &Function, to: u32, puts: &mut Puts) {
        let btf = self.resolver.btf;
        if function.prototypes.is_empty() {
            puts.lose(to);
        }
        for prototype in &function.prototypes {
            let returns = btf.prototype(*prototype).map_or(0, |(returns, ..)| returns);
            match btf.at(btf.plain(returns)) {
                // What a register happens to hold.
                Type::Void => {}
                Type::Pointer(pointee) => {
                    let class = self.prototypes.class(btf.plain(pointee));
                    puts.add(to, class.map(|class| vec![class]));
                }
                _ => puts.lose(to),
            }
        }
    }
}
