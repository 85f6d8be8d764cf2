//! The types of values: from parameters through members to where they are called.

use super::around::Around;
use super::btf::{Btf, Type};
use super::flow::Flow;
use super::functions::{Function, FunctionIndex, pointee, registers};
use super::globals::Globals;
use super::layout::{Layout, Ptr};
use super::values::{Op, Value};
use super::votes::Votes;
use rustc_hash::FxHashMap;
use smallvec::{SmallVec, smallvec};

/// One or two of them, mostly.
pub type Pointers = SmallVec<[Ptr; 2]>;

/// What is known about a value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Known {
    /// No way gives it one yet: NULL, or a loop without a start.
    Nothing,
    /// It points to one of these.
    Pointers(Pointers),
    /// It may be anything.
    Anything,
}

/// More candidates than this are as good as none.
const MAX_POINTERS: usize = 64;
/// Rounds until types settle; loops settle in two or three.
const MAX_ROUNDS: usize = 12;
/// Error pointers are no addresses (include/linux/err.h, `MAX_ERRNO`); neither is the first page.
const NO_ADDRESS: std::ops::RangeInclusive<i64> = -4096..=4095;

/// Resolves the values of one function.
pub struct Resolver<'a> {
    /// The types.
    pub btf: &'a Btf,
    /// Members.
    pub layout: &'a Layout<'a>,
    /// Structures around structures.
    pub around: &'a Around<'a>,
    /// The functions.
    pub functions: &'a FunctionIndex,
    /// What is known about data.
    pub globals: &'a Globals,
    /// By argument register: what all callers give a function whose declaration says too little.
    pub given: &'a FxHashMap<(u32, u8), Pointers>,
}

/// What is either.
pub fn unite(into: &mut Known, other: &Known) {
    match (&mut *into, other) {
        (Known::Anything, _) | (_, Known::Nothing) => {}
        (_, Known::Anything) => *into = Known::Anything,
        (Known::Nothing, Known::Pointers(_)) => *into = other.clone(),
        (Known::Pointers(all), Known::Pointers(more)) => {
            if all.len() == 1 && all == more {
                return;
            }
            all.extend_from_slice(more);
            all.sort_unstable();
            all.dedup();
            if all.len() > MAX_POINTERS {
                *into = Known::Anything;
            }
        }
    }
}

fn pointers(mut all: Pointers) -> Known {
    all.sort_unstable();
    all.dedup();
    match all.len() {
        0 => Known::Anything,
        len if len > MAX_POINTERS => Known::Anything,
        _ => Known::Pointers(all),
    }
}

/// The values that one is made from.
fn operands(flow: &Flow, value: Value) -> impl Iterator<Item = Value> {
    let (own, phi) = match flow.values.op(value) {
        Op::Load(one, ..) | Op::Add(one, _) | Op::IndirectResult(one) => ([Some(one), None], None),
        Op::Sum(one, other) => ([Some(one), Some(other)], None),
        Op::Phi(index) => ([None, None], Some(flow.values.operands(index))),
        Op::Unknown | Op::Arg(_) | Op::Const(_) | Op::Stack(_) | Op::PerCpu | Op::Result(_) => {
            ([None, None], None)
        }
    };
    let own = own.into_iter().flatten();
    own.chain(phi.into_iter().flatten().copied())
}

/// The `wanted` values and all that they are made from, ascending.
fn needed(flow: &Flow, wanted: Vec<Value>) -> Vec<Value> {
    let mut is_needed = vec![false; flow.values.count()];
    let mut open = wanted;
    while let Some(value) = open.pop() {
        if !std::mem::replace(&mut is_needed[value.0 as usize], true) {
            open.extend(operands(flow, value));
        }
    }
    let all = (0..).map(Value).zip(is_needed);
    all.filter_map(|(value, needed)| needed.then_some(value))
        .collect()
}

impl Resolver<'_> {
    /// What the `wanted` values of a function are. Of those that they are not made from nothing is found.
    pub fn find(
        &self,
        flow: &Flow,
        function: &Function,
        votes: &Votes,
        wanted: Vec<Value>,
    ) -> Vec<Known> {
        let mut known = vec![Known::Nothing; flow.values.count()];
        let needed = needed(flow, wanted);
        let slots = votes.stack_objects(flow);
        let rounds = match flow.values.phis() {
            0 => 1,
            _ => MAX_ROUNDS,
        };
        // When each value was last looked at, and when it last became another: one whose operands have not stays as it is.
        let (mut looked, mut became) = (vec![0u32; known.len()], vec![0u32; known.len()]);
        let mut now_is = 0;
        for round in 0..rounds {
            let mut changed = false;
            for value in &needed {
                let index = value.0 as usize;
                let newer = |one: Value| became[one.0 as usize] >= looked[index];
                if round > 0 && !operands(flow, *value).any(newer) {
                    continue;
                }
                now_is += 1;
                looked[index] = now_is;
                let mut now = self.own(flow, function, &slots, *value, &known);
                now = self.narrowed(now, votes, *value);
                if round + 1 == rounds && rounds > 1 && now != known[index] {
                    // It does not settle.
                    now = Known::Anything;
                }
                if known[index] != now {
                    known[index] = now;
                    became[index] = now_is;
                    changed = true;
                }
            }
            if !changed {
                break;
            }
        }
        known
    }

    /// What `value` is that is `known` for itself.
    fn narrowed(&self, known: Known, votes: &Votes, value: Value) -> Known {
        let (around, uses) = (self.around, &votes.uses);
        match &known {
            Known::Nothing => known,
            Known::Anything => {
                let used = votes.about(value);
                let found = around.narrow(&used, value, uses);
                pointers(found.unwrap_or(used))
            }
            Known::Pointers(all) => {
                // What is declared has all that is used of it.
                if let [only] = all[..]
                    && around.allows(only, value, uses)
                {
                    return known;
                }
                let used = votes.about(value);
                // Of several, as the members of a union are: what fits as it is declared is no part of something larger.
                let plain = all.iter().filter(|ptr| {
                    (used.is_empty() || used.contains(*ptr))
                        && around.allows(**ptr, value, uses)
                        && around.leads(**ptr, value, uses)
                });
                let mut found: Pointers = plain.copied().collect();
                if found.is_empty() {
                    for ptr in all {
                        let mut both = used.clone();
                        both.push(*ptr);
                        let narrow = around.narrow(&both, value, uses);
                        let narrow = narrow.or_else(|| around.narrow(&[*ptr], value, uses));
                        found.extend(narrow.into_iter().flatten());
                    }
                }
                match found.is_empty() {
                    true => known,
                    false => pointers(found),
                }
            }
        }
    }

    fn own(
        &self,
        flow: &Flow,
        function: &Function,
        slots: &[(i32, Ptr)],
        value: Value,
        known: &[Known],
    ) -> Known {
        let of = |value: &Value| &known[value.0 as usize];
        match flow.values.op(value) {
            Op::Unknown | Op::Stack(_) | Op::PerCpu => Known::Anything,
            Op::Arg(number) => self.argument(function, number),
            Op::Const(at) if NO_ADDRESS.contains(&(at as i64)) => Known::Nothing,
            Op::Const(at) => self.constant(at),
            Op::Load(_, _, bytes) if bytes != 8 => Known::Anything,
            Op::Load(base, offset, _) => match flow.values.op(base) {
                Op::PerCpu => self.globals.per_cpu(self, i64::from(offset)),
                Op::Stack(at) => self.slot(slots, at.saturating_add(offset)),
                Op::Const(at) => {
                    let at = at.wrapping_add_signed(i64::from(offset));
                    if let Some(held) = self.globals.lists.data(at) {
                        return Known::Pointers(held.clone());
                    }
                    match self.globals.word(self, at) {
                        Known::Anything => self.member(of(&base), offset),
                        known => known,
                    }
                }
                Op::Sum(a, b) => {
                    let table = [a, b]
                        .into_iter()
                        .find_map(|one| flow.values.as_constant(one));
                    match self.member(of(&base), offset) {
                        Known::Anything => table.map_or(Known::Anything, |at| {
                            let at = at.wrapping_add_signed(i64::from(offset));
                            self.globals.table(self.btf, at)
                        }),
                        known => known,
                    }
                }
                _ => self.member(of(&base), offset),
            },
            Op::Add(base, by) => match of(&base) {
                Known::Pointers(all) => {
                    let moved = all.iter().map(|ptr| {
                        let delta = i64::from(ptr.delta) + by;
                        let delta = i32::try_from(delta).ok()?;
                        let size = self.btf.size(ptr.ty) as i32;
                        if let Some(delta) = self.btf.in_last_array(ptr.ty, delta) {
                            return Some(Ptr { ty: ptr.ty, delta });
                        }
                        // The next element, in a loop over an array.
                        let around = matches!(flow.values.op(base), Op::Phi(_))
                            && size > 0
                            && delta % size == 0;
                        Some(Ptr {
                            ty: ptr.ty,
                            delta: if around { 0 } else { delta },
                        })
                    });
                    moved
                        .collect::<Option<Pointers>>()
                        .map_or(Known::Anything, pointers)
                }
                other => other.clone(),
            },
            Op::Sum(a, b) => {
                let side = |one: Value| match flow.values.op(one) {
                    Op::Const(at) => self
                        .globals
                        .per_cpu_address(at)
                        .map_or_else(|| self.constant(at), |ptr| Known::Pointers(smallvec![ptr])),
                    _ => of(&one).clone(),
                };
                match (side(a), side(b)) {
                    (Known::Pointers(one), Known::Anything | Known::Nothing)
                    | (Known::Anything | Known::Nothing, Known::Pointers(one)) => {
                        Known::Pointers(one)
                    }
                    (Known::Nothing, Known::Nothing) => Known::Nothing,
                    _ => Known::Anything,
                }
            }
            Op::Phi(index) => {
                let mut all = Known::Nothing;
                for operand in flow.values.operands(index) {
                    unite(&mut all, of(operand));
                }
                all
            }
            Op::Result(callee) => match self.functions.at(callee) {
                Some(callee) => self.returned(&callee.prototypes),
                None => Known::Anything,
            },
            Op::IndirectResult(target) => match of(&target) {
                Known::Pointers(all) => {
                    let prototypes: Vec<u32> = all.iter().map(|ptr| ptr.ty).collect();
                    self.returned(&prototypes)
                }
                other => other.clone(),
            },
        }
    }

    /// A word of a thing on the stack whose address was passed on as a pointer to it.
    fn slot(&self, slots: &[(i32, Ptr)], at: i32) -> Known {
        for (start, ptr) in slots.iter().rev() {
            let delta = at - start + ptr.delta;
            if delta >= 0 && delta + 8 <= self.btf.size(ptr.ty) as i32 {
                let base = Known::Pointers(smallvec![Ptr { ty: ptr.ty, delta }]);
                return self.member(&base, 0);
            }
        }
        Known::Anything
    }

    fn argument(&self, function: &Function, number: u8) -> Known {
        if !function.clone {
            let mut all = Pointers::new();
            for prototype in &function.prototypes {
                let register = registers(self.btf, *prototype)[usize::from(number)];
                match register.and_then(|ty| pointee(self.btf, ty)) {
                    Some(ty) => all.push(Ptr { ty, delta: 0 }),
                    None => {
                        all.clear();
                        break;
                    }
                }
            }
            if !all.is_empty() {
                return pointers(all);
            }
        }
        match self.given.get(&(function.start(), number)) {
            Some(given) => pointers(given.clone()),
            None => Known::Anything,
        }
    }

    fn returned(&self, prototypes: &[u32]) -> Known {
        let mut all = Pointers::new();
        for prototype in prototypes {
            let Some((returns, ..)) = self.btf.prototype(*prototype) else {
                return Known::Anything;
            };
            match pointee(self.btf, returns) {
                Some(ty) => all.push(Ptr { ty, delta: 0 }),
                None => return Known::Anything,
            }
        }
        pointers(all)
    }

    fn constant(&self, at: u64) -> Known {
        if let Some(function) = self.globals.text(at).and_then(|at| self.functions.at(at)) {
            return pointers(
                function
                    .prototypes
                    .iter()
                    .map(|ty| Ptr { ty: *ty, delta: 0 })
                    .collect(),
            );
        }
        self.globals.object(self.btf, at)
    }

    /// The word at `offset` from a pointer.
    fn member(&self, base: &Known, offset: i32) -> Known {
        let all = match base {
            Known::Pointers(all) => all,
            other => return other.clone(),
        };
        let mut found = Pointers::new();
        for ptr in all {
            let Some(delta) = ptr.delta.checked_add(offset) else {
                return Known::Anything;
            };
            let place = Ptr { ty: ptr.ty, delta };
            let field = self.layout.field(place);
            if let Some(held) = self.globals.lists.word(self.layout, place, &field) {
                found.extend_from_slice(held);
                continue;
            }
            if field.number
                && let ([_], Some(used)) = (&all[..], self.globals.field(place))
            {
                found.push(used);
                continue;
            }
            if field.anything || !field.loose.is_empty() || field.to.is_empty() {
                // Declared as a pointer to anything, or as an integer: what it is used as everywhere.
                match (&all[..], self.globals.field(place)) {
                    ([_], Some(used)) => found.push(used),
                    _ if field.anything || !field.loose.is_empty() => return Known::Anything,
                    _ => {}
                }
                continue;
            }
            found.extend(field.to.iter().map(|ty| Ptr { ty: *ty, delta: 0 }));
        }
        pointers(found)
    }

    /// The prototypes that the called `value` may have; none when nothing is known.
    pub fn prototypes(&self, flow: &Flow, known: &[Known], value: Value) -> Option<Vec<u32>> {
        let mut found = Vec::new();
        let prototype = |ty: &u32| matches!(self.btf.at(*ty), Type::Prototype { .. });
        match &known[value.0 as usize] {
            Known::Pointers(all) => {
                let called = all.iter().filter(|ptr| ptr.delta == 0);
                found.extend(called.map(|ptr| ptr.ty).filter(prototype));
            }
            Known::Nothing => {}
            Known::Anything => {
                // A structure around a known one is meant, and in some of them a pointer to anything stands there. It is none
                // that is called, unless somebody has put a function there.
                if let Op::Load(base, offset, 8) = flow.values.op(value)
                    && let Known::Pointers(all) = &known[base.0 as usize]
                {
                    for ptr in all {
                        let delta = ptr.delta.checked_add(offset)?;
                        let field = self.layout.field(Ptr { ty: ptr.ty, delta });
                        let called = |place: &Ptr| self.globals.holds_functions(place);
                        let one = all.len() == 1;
                        let own = self.layout.innermost(Ptr { ty: ptr.ty, delta });
                        let open = field.anything && (one || called(&own));
                        if open || field.loose.iter().any(called) {
                            return None;
                        }
                        found.extend(field.to.iter().copied().filter(prototype));
                    }
                }
            }
        }
        (!found.is_empty()).then_some(found)
    }
}
