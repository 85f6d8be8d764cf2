//! From the image to what each indirect branch may reach.

use super::btf::{Btf, Type};
use super::facts::{self, Facts};
use super::flow::{self, Code64, Flow};
use super::functions::{self, FunctionIndex, Places, TRACE_ITERATOR};
use super::globals::Globals;
use super::hooks::Hooks;
use super::layout::{Containers, Layout};
use super::prototypes::{ProtoId, Prototypes};
use super::resolve::{Known, Resolver, unite};
use super::shapes::Shapes;
use super::sites::{Entries, Forward, Reach};
use super::values::{Op, Value};
use crate::image::{Fault, Image, Tables};
use crate::text::{REGISTERS, Text};
use penumbra_bundle::{LinkVa, TextOff};
use rayon::prelude::*;
use rustc_hash::{FxHashMap, FxHashSet};

/// Data is typed by what functions do with it, and that by the types of data: each round knows more than the one before.
const ROUNDS: usize = 2;
/// Functions that share what was looked up.
const CHUNK: usize = 4096;

/// A function that was followed: its number and its values.
struct Followed {
    function: u32,
    flow: Flow,
}

/// An indirect branch with what was found about it.
struct Found {
    at: u32,
    reach: Option<Reach>,
}

/// Finds what each indirect branch of the text may reach.
///
/// # Errors
/// When BTF does not decode or the image lacks the kernel's own thunks.
pub fn analyse(image: &Image, btf: &Btf, tables: &Tables, text: &Text) -> Result<Forward, Fault> {
    let start = text.range.start.0;
    let places = Places::of(image, start);
    let index = FunctionIndex::find(image, tables, &places, btf);
    let prototypes = Prototypes::of(btf);
    let followed = follow(image, tables, &places, &index, btf)?;
    let containers = Containers::of(btf);
    let known = Knowledge {
        btf,
        index: &index,
        prototypes: &prototypes,
        layout: Layout::new(btf, &containers),
        followed: &followed,
    };
    let mut globals = Globals::new(image, &places, btf, &index);
    let hooks = Hooks::find(image, &globals);
    let taken: FxHashSet<u32> = text.entries.iter().map(|at| at.0).collect();
    let given = known.learn(&mut globals, &taken);
    let found = known.sites(&globals, &given, &hooks);
    let entries = Entries::of(&text.entries, btf, &index, &prototypes);
    let mut forward = Forward::new(&entries);
    for one in found {
        let reach = one.reach.unwrap_or(Reach::Any);
        forward.add(TextOff(one.at), reach, &entries);
    }
    forward.finish(&text.slots.indirect);
    Ok(forward)
}

/// Follows every function.
fn follow(
    image: &Image,
    tables: &Tables,
    places: &Places<'_>,
    index: &FunctionIndex,
    btf: &Btf,
) -> Result<Vec<Followed>, Fault> {
    let offset = |va: &LinkVa| places.offset(va.0);
    let mut retpolines: FxHashMap<u64, u8> = FxHashMap::default();
    for (number, name) in (0u8..).zip(REGISTERS) {
        if let Some(va) = image.symbol(&format!("__x86_indirect_thunk_{name}")) {
            retpolines.insert(va.0, number);
        }
    }
    let jump_labels: FxHashMap<u32, u32> = tables
        .jump_labels
        .iter()
        .filter_map(|entry| Some((offset(&entry.code)?, offset(&entry.target)?)))
        .collect();
    let faults: FxHashMap<u32, u32> = tables
        .faulting
        .iter()
        .zip(&tables.fixups)
        .filter_map(|(at, to)| Some((offset(at)?, offset(to)?)))
        .collect();
    let warnings: FxHashSet<u32> = tables.warnings.iter().filter_map(offset).collect();
    let declared = index
        .all
        .iter()
        .filter_map(|function| match function.prototypes[..] {
            [prototype] if !function.clone => Some((function.start(), reach(btf, prototype))),
            _ => None,
        });
    let reaches: FxHashMap<u32, [u32; 6]> = declared.collect();
    let code = Code64 {
        places,
        start: places.start,
        retpolines: &retpolines,
        return_thunk: image.need_symbol("__x86_return_thunk")?.0,
        jump_labels: &jump_labels,
        faults: &faults,
        warnings: &warnings,
        no_return: &index.no_return(),
        keeping: &index.assembly(),
        reaches: &reaches,
        fentry: image.symbol("__fentry__").map_or(0, |va| va.0),
    };
    let numbers: Vec<u32> = (0..index.all.len() as u32).collect();
    let followed = numbers
        .par_iter()
        .filter(|number| !index.all[**number as usize].cold)
        .map(|number| {
            let function = &index.all[*number as usize];
            let arities = function
                .prototypes
                .iter()
                .map(|one| functions::arity(btf, *one));
            let parameters = match function.clone {
                true => 6,
                false => arities.max().unwrap_or(6),
            };
            Followed {
                function: *number,
                flow: flow::follow(&code, &function.ranges, parameters),
            }
        });
    Ok(followed.collect())
}

/// How many bytes a function may write behind each of its arguments.
fn reach(btf: &Btf, prototype: u32) -> [u32; 6] {
    functions::registers(btf, prototype).map(|ty| match ty.map(|ty| btf.at(ty)) {
        Some(Type::Pointer(to)) => match btf.size(btf.plain(to)) {
            0 | 1 => flow::UNKNOWN_REACH as u32,
            size => size,
        },
        _ => 0,
    })
}

/// What does not change from round to round.
struct Knowledge<'a> {
    btf: &'a Btf,
    index: &'a FunctionIndex,
    prototypes: &'a Prototypes,
    layout: Layout<'a>,
    followed: &'a [Followed],
}

type Given = FxHashMap<(u32, u8), Vec<super::layout::Ptr>>;

impl Knowledge<'_> {
    /// Types data, and the arguments of functions that are called directly only; `taken` are the others.
    fn learn(&self, globals: &mut Globals, taken: &FxHashSet<u32>) -> Given {
        globals.match_shapes(&Shapes::of(self.btf, self.prototypes));
        globals.spread(self.btf);
        let mut given = Given::default();
        for _ in 0..ROUNDS {
            let facts: Vec<Facts> = self.each(globals, &given, |resolver, chunk| {
                let mut found = Facts::default();
                for one in chunk {
                    let function = &self.index.all[one.function as usize];
                    facts::of(resolver, function, &one.flow, taken, &mut found);
                }
                found
            });
            globals.forget_fields();
            let mut passed: FxHashMap<(u32, u8), Known> = FxHashMap::default();
            for fact in facts {
                for (va, ty) in fact.objects {
                    globals.vote_object(va, ty);
                }
                for (va, ptr) in fact.words {
                    globals.vote_word(va, ptr);
                }
                for (place, used) in fact.fields {
                    globals.vote_field(place, used);
                }
                for place in fact.functions {
                    globals.put_function(place);
                }
                for (to, known) in fact.passed {
                    unite(passed.entry(to).or_insert(Known::Nothing), &known);
                }
            }
            globals.spread(self.btf);
            globals.find_functions(&self.layout);
            let all = passed.into_iter().filter_map(|(to, known)| match known {
                Known::Pointers(all) => Some((to, all)),
                _ => None,
            });
            given = all.collect();
        }
        given
    }

    /// What was found about each indirect branch.
    fn sites(&self, globals: &Globals, given: &Given, hooks: &Hooks) -> Vec<Found> {
        let by_shape: FxHashMap<&str, ProtoId> = (0u32..)
            .zip(&self.prototypes.shown)
            .map(|(id, shown)| (shown.as_str(), ProtoId(id)))
            .collect();
        let found: Vec<Vec<Found>> = self.each(globals, given, |resolver, chunk| {
            let mut found = Vec::new();
            for one in chunk.iter().filter(|one| !one.flow.sites.is_empty()) {
                let function = &self.index.all[one.function as usize];
                let votes = resolver.votes(&one.flow);
                let known = resolver.all(&one.flow, function, &votes);
                for site in &one.flow.sites {
                    let listed = constants(&one.flow, globals, site.target)
                        .or_else(|| hooks.functions(&one.flow, site.target));
                    let classes = || {
                        if function.name.starts_with(TRACE_ITERATOR) {
                            return self.traced(&function.prototypes, &by_shape);
                        }
                        let types = resolver.prototypes(&one.flow, &known, site.target)?;
                        Some(
                            types
                                .iter()
                                .filter_map(|ty| self.prototypes.class(*ty))
                                .collect(),
                        )
                    };
                    let reach = match listed {
                        Some(all) => {
                            let all = all.iter().filter_map(|va| globals.text(*va));
                            Some(Reach::functions(all.map(TextOff).collect()))
                        }
                        None => classes().and_then(|all: Vec<ProtoId>| {
                            // What takes more arguments than the site has was not meant.
                            let fits =
                                |id: &ProtoId| self.prototypes.arity[id.0 as usize] <= site.arity;
                            all.iter().all(fits).then(|| Reach::prototypes(all))
                        }),
                    };
                    // What is not typed still passes only so many arguments.
                    let few = one.flow.traced && site.most < 6;
                    let reach = reach.or(few.then_some(Reach::Arity(site.most)));
                    found.push(Found { at: site.at, reach });
                }
            }
            found
        });
        found.into_iter().flatten().collect()
    }

    /// The callees of a tracepoint's iterator: its own parameters, and nothing returned.
    fn traced(&self, own: &[u32], by_shape: &FxHashMap<&str, ProtoId>) -> Option<Vec<ProtoId>> {
        let [own] = own else {
            return None;
        };
        let own = &self.prototypes.shown[self.prototypes.class(*own)?.0 as usize];
        let at = own.find('(')?;
        let shown = format!("void{}", &own[at..]);
        // No such prototype: no function of the kernel.
        Some(by_shape.get(shown.as_str()).copied().into_iter().collect())
    }

    fn each<T: Send>(
        &self,
        globals: &Globals,
        given: &Given,
        work: impl Fn(&Resolver<'_>, &[Followed]) -> T + Sync,
    ) -> Vec<T> {
        let chunks = self.followed.par_chunks(CHUNK);
        let done = chunks.map(|chunk| {
            let resolver = Resolver {
                btf: self.btf,
                layout: &self.layout,
                functions: self.index,
                globals,
                given,
            };
            work(&resolver, chunk)
        });
        done.collect()
    }
}

/// The functions that a value is made from, when it is made from constants only.
fn constants(flow: &Flow, globals: &Globals, value: Value) -> Option<Vec<u64>> {
    let mut seen = FxHashSet::default();
    let mut open = vec![value];
    let mut found = Vec::new();
    while let Some(value) = open.pop() {
        if !seen.insert(value) {
            continue;
        }
        match flow.values.op(value) {
            Op::Const(0) => {}
            Op::Const(at) if globals.text(at).is_some() => found.push(at),
            Op::Phi(index) => open.extend(&flow.values.phis[index as usize]),
            _ => return None,
        }
    }
    (!found.is_empty()).then_some(found)
}
