//! What one function says about data and about the functions that it calls.

use super::btf::Type;
use super::flow::{Call, Flow};
use super::functions::Function;
use super::layout::Ptr;
use super::lists::{Added, Lists};
use super::resolve::{Known, Resolver, unite};
use super::values::{Op, UNKNOWN, Value};
use super::votes::Votes;
use rustc_hash::{FxHashMap, FxHashSet};

/// What was found.
#[derive(Default)]
pub struct Facts {
    /// A thing of a type starts at an address.
    pub objects: Vec<(u64, u32)>,
    /// The word at an address holds such a pointer.
    pub words: Vec<(u64, Ptr)>,
    /// The words of the table at an address hold such a pointer.
    pub tables: Vec<(u64, Ptr)>,
    /// A word of a structure is used as such a pointer.
    pub fields: Vec<(Ptr, Ptr)>,
    /// A function is put there.
    pub functions: Vec<Ptr>,
    /// What is added to lists.
    pub added: Vec<Added>,
    /// What a function is given in an argument register: its start, the register.
    pub passed: FxHashMap<(u32, u8), Known>,
}

/// What a function's calls and stores say about data.
pub fn of(
    resolver: &Resolver<'_>,
    function: &Function,
    flow: &Flow,
    votes: &Votes,
    taken: &FxHashSet<u32>,
    facts: &mut Facts,
) {
    let mut wanted: Vec<Value> = Vec::new();
    wanted.extend(
        votes
            .all()
            .iter()
            .filter_map(|(value, _)| match flow.values.op(*value) {
                Op::Load(base, _, 8) => Some(base),
                _ => None,
            }),
    );
    wanted.extend(
        flow.stores
            .iter()
            .flat_map(|store| [store.base, store.value]),
    );
    // What is passed where the declaration does not say what it is.
    let untold = |call: &Call| match taken.contains(&call.to) {
        true => 0,
        false => resolver
            .functions
            .at(call.to)
            .map_or(0, |callee| callee.untold),
    };
    let passed = flow.calls.iter().flat_map(|call| {
        let untold = untold(call);
        let numbers = (0u8..6).filter(move |number| untold >> number & 1 == 1);
        numbers.map(|number| (call.to, number, call.arguments[usize::from(number)]))
    });
    wanted.extend(passed.clone().map(|(.., value)| value));
    let adds = |call: &&Call| {
        let callee = resolver.functions.at(call.to);
        callee.is_some_and(|callee| Lists::adds(&callee.name))
    };
    let added = flow.calls.iter().filter(adds);
    let added = added.filter_map(|call| Some((call.arguments[0], Lists::head(flow, call)?)));
    let added: Vec<(Value, Value)> = added.collect();
    wanted.extend(added.iter().flat_map(|(entry, head)| [*entry, *head]));
    let known = resolver.find(flow, function, votes, wanted);
    let of = |value: Value| &known[value.0 as usize];
    for (value, ptr) in votes.all() {
        match flow.values.op(*value) {
            Op::Const(at) => {
                let at = at.wrapping_add_signed(i64::from(ptr.delta).wrapping_neg());
                facts.objects.push((at, ptr.ty));
            }
            Op::Load(base, offset, 8) => {
                if let Op::Const(at) = flow.values.op(base) {
                    let at = at.wrapping_add_signed(i64::from(offset));
                    facts.words.push((at, *ptr));
                } else if let Known::Pointers(all) = of(base)
                    && let [only] = all[..]
                    && let Some(delta) = only.delta.checked_add(offset)
                {
                    let place = Ptr { ty: only.ty, delta };
                    let field = resolver.layout.field(place);
                    if field.anything
                        || field.number
                        || !field.loose.is_empty()
                        || field.to.is_empty()
                    {
                        facts.fields.push((place, *ptr));
                    }
                }
            }
            _ => {}
        }
    }
    for store in &flow.stores {
        let value = flow.values.op(store.value);
        if let Op::Const(at) = flow.values.op(store.base) {
            // A variable: what is stored has its type.
            let at = at.wrapping_add_signed(i64::from(store.offset));
            if resolver.globals.is_data(at)
                && let Known::Pointers(all) = of(store.value)
            {
                facts.words.extend(all.iter().map(|ptr| (at, *ptr)));
            }
            if let (Op::Const(to), Known::Pointers(all)) =
                (value, resolver.globals.object(resolver.btf, at))
                && let [only] = all[..]
                && resolver.globals.is_data(to)
            {
                // A member of one: what it points to has the declared type.
                let field = resolver.layout.field(only);
                if let ([ty], false, true) = (&field.to[..], field.anything, field.loose.is_empty())
                {
                    facts.objects.push((to, *ty));
                }
            }
            continue;
        }
        if let Op::Sum(UNKNOWN, table) | Op::Sum(table, UNKNOWN) = flow.values.op(store.base)
            && let Op::Const(at) = flow.values.op(table)
            && let Known::Pointers(all) = of(store.value)
        {
            let at = at.wrapping_add_signed(i64::from(store.offset));
            facts.tables.extend(all.iter().map(|ptr| (at, *ptr)));
        }
        let Known::Pointers(all) = of(store.base) else {
            continue;
        };
        let function = match of(store.value) {
            Known::Pointers(all) => all
                .iter()
                .any(|ptr| matches!(resolver.btf.at(ptr.ty), Type::Prototype { .. })),
            _ => matches!(value, Op::Const(at) if resolver.globals.text(at).is_some()),
        };
        if function {
            for ptr in all {
                if let Some(delta) = ptr.delta.checked_add(store.offset) {
                    let place = Ptr { ty: ptr.ty, delta };
                    facts.functions.push(resolver.layout.innermost(place));
                }
            }
        }
        if let (Op::Const(at), [only]) = (value, &all[..])
            && resolver.globals.is_data(at)
            && let Some(delta) = only.delta.checked_add(store.offset)
        {
            // A member: what it points to has the declared type.
            let field = resolver.layout.field(Ptr { ty: only.ty, delta });
            if let ([to], false, true) = (&field.to[..], field.anything, field.loose.is_empty()) {
                facts.objects.push((at, *to));
            }
        }
    }
    let lists = &resolver.globals.lists;
    for (entry, head) in added {
        let head = lists.at(resolver.layout, flow, head, of(head));
        let entry = lists.entry(resolver.layout, of(entry));
        facts.added.extend(head.zip(entry));
    }
    for (to, number, value) in passed {
        let known = facts.passed.entry((to, number)).or_insert(Known::Nothing);
        unite(known, of(value));
    }
}
