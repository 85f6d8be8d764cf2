//! From the image to what each indirect branch may reach.

use super::around::Around;
use super::btf::{Btf, Type};
use super::facts::{self, Facts};
use super::flow::{self, Code64, Flow, Room};
use super::functions::{self, Doubt, Function, FunctionIndex, Places, TRACE_ITERATOR};
use super::globals::Globals;
use super::hooks::Hooks;
use super::layout::{Containers, Layout};
use super::patched;
use super::prototypes::{ProtoId, Prototypes};
use super::puts::{Follower, Puts};
use super::resolve::{Known, Pointers, Resolver, unite};
use super::shapes::Shapes;
use super::sites::{Entries, Forward, Reach};
use super::values::{Op, Value};
use super::votes::Votes;
use crate::image::{Fault, Image, Tables};
use crate::text::{REGISTERS, Text, taken_in};
use penumbra_bundle::{LinkVa, TextOff};
use rayon::prelude::*;
use rustc_hash::{FxHashMap, FxHashSet};

/// Data is typed by what functions do with it, and that by the types of data: each round knows more than the one before.
const ROUNDS: usize = 2;
/// Functions that one thread looks at one after another.
const CHUNK: usize = 512;

/// A function that was followed: its number, its values and what its calls say about them.
struct Followed {
    function: u32,
    flow: Flow,
    votes: Votes,
}

/// An indirect branch with what was found about it.
struct Found {
    at: u32,
    /// By types, if these say anything.
    typed: Option<Reach>,
    /// By the number of arguments.
    untyped: Reach,
}

/// Finds what each indirect branch of the text may reach.
///
/// What BTF says of a function may be another one's. What is put where something else is declared shows it; then the function
/// is not believed, and what was concluded from it is concluded again.
///
/// # Errors
/// When BTF does not decode or the image lacks the kernel's own thunks.
pub fn analyse(image: &Image, btf: &Btf, tables: &Tables, text: &Text) -> Result<Forward, Fault> {
    let places = Places::of(image, text.range.start.0);
    let mut index = FunctionIndex::find(image, tables, &places, btf);
    let prototypes = Prototypes::of(btf);
    let sources = Sources::of(image, tables, &places)?;
    let numbers: Vec<u32> = (0..index.all.len() as u32).collect();
    let mut followed = sources.follow(&index, btf, &numbers);
    let mut wrong: Vec<(u32, Doubt)> = followed
        .iter()
        .filter(|one| contradicts(btf, &index.all[one.function as usize], &one.flow))
        .map(|one| (one.function, Doubt::Code))
        .collect();
    let containers = Containers::of(btf);
    let layout = Layout::new(btf, &containers);
    let around = Around::new(btf, &containers, &layout);
    let shapes = Shapes::of(btf, &prototypes);
    let taken: FxHashSet<u32> = text.entries.iter().map(|at| at.0).collect();
    loop {
        sources.doubt(&mut index, btf, &wrong, &mut followed);
        let known = Knowledge {
            image,
            btf,
            index: &index,
            prototypes: &prototypes,
            layout: &layout,
            around: &around,
            shapes: &shapes,
            followed: &followed,
            taken: &taken,
        };
        let mut globals = Globals::new(image, &places, btf, &index);
        let hooks = Hooks::find(image, &globals);
        let given = known.learn(&mut globals);
        let (found, mut puts) = known.sites(&globals, &given, &hooks);
        known.elsewhere(tables, text, &globals, &given, &mut puts);
        wrong = contradicted(&index, &prototypes, &text.entries, &puts);
        if !wrong.is_empty() {
            continue;
        }
        let entries = Entries::of(&text.entries, btf, &index, &prototypes, &puts);
        let mut forward = Forward::new(&entries);
        for one in found {
            let typed = one.typed.filter(|reach| entries.are_few(reach));
            let reach = typed.unwrap_or(one.untyped);
            forward.add(TextOff(one.at), reach, &entries);
        }
        forward.finish(&text.slots.indirect);
        let known = patched::Known {
            image,
            text,
            btf,
            index: &index,
            prototypes: &prototypes,
            layout: &layout,
        };
        patched::add(&known, tables, &entries, &mut forward);
        return Ok(forward);
    }
}

/// What following functions needs from the image.
struct Sources<'a> {
    places: &'a Places<'a>,
    retpolines: FxHashMap<u64, u8>,
    return_thunk: u64,
    jump_labels: FxHashMap<u32, u32>,
    faults: FxHashMap<u32, u32>,
    warnings: FxHashSet<u32>,
    fentry: u64,
}

impl<'a> Sources<'a> {
    fn of(image: &Image, tables: &Tables, places: &'a Places<'a>) -> Result<Sources<'a>, Fault> {
        let offset = |va: &LinkVa| places.offset(va.0);
        let mut retpolines: FxHashMap<u64, u8> = FxHashMap::default();
        for (number, name) in (0u8..).zip(REGISTERS) {
            if let Some(va) = image.symbol(&format!("__x86_indirect_thunk_{name}")) {
                retpolines.insert(va.0, number);
            }
        }
        let jump_labels = tables
            .jump_labels
            .iter()
            .filter_map(|entry| Some((offset(&entry.code)?, offset(&entry.target)?)));
        let faults = tables.faulting.iter().zip(&tables.fixups);
        let faults = faults.filter_map(|(at, to)| Some((offset(at)?, offset(to)?)));
        Ok(Sources {
            places,
            retpolines,
            return_thunk: image.need_symbol("__x86_return_thunk")?.0,
            jump_labels: jump_labels.collect(),
            faults: faults.collect(),
            warnings: tables.warnings.iter().filter_map(offset).collect(),
            fentry: image.symbol("__fentry__").map_or(0, |va| va.0),
        })
    }

    /// Follows the functions of these numbers.
    fn follow(&self, index: &FunctionIndex, btf: &Btf, numbers: &[u32]) -> Vec<Followed> {
        let declared = index
            .all
            .iter()
            .filter_map(|function| match function.prototypes[..] {
                [prototype] if !function.clone => Some((function.start(), reach(btf, prototype))),
                _ => None,
            });
        let reaches: FxHashMap<u32, [u32; 6]> = declared.collect();
        let code = Code64 {
            places: self.places,
            start: self.places.start,
            retpolines: &self.retpolines,
            return_thunk: self.return_thunk,
            jump_labels: &self.jump_labels,
            faults: &self.faults,
            warnings: &self.warnings,
            no_return: &index.no_return(),
            keeping: &index.assembly(),
            reaches: &reaches,
            fentry: self.fentry,
        };
        let followed = numbers
            .par_iter()
            .filter(|number| !index.all[**number as usize].cold)
            .map_init(Room::default, |room, number| {
                let function = &index.all[*number as usize];
                let arities = function
                    .prototypes
                    .iter()
                    .map(|one| functions::arity(btf, *one));
                let parameters = match function.clone {
                    true => 6,
                    false => arities.max().unwrap_or(6),
                };
                let flow = flow::follow(&code, &function.ranges, parameters, room);
                Followed {
                    function: *number,
                    votes: Votes::of(btf, index, &flow),
                    flow,
                }
            });
        followed.collect()
    }

    /// Believes what is declared of some functions no longer, and follows them and their callers again.
    fn doubt(
        &self,
        index: &mut FunctionIndex,
        btf: &Btf,
        wrong: &[(u32, Doubt)],
        followed: &mut [Followed],
    ) {
        let mut starts: FxHashSet<u32> = FxHashSet::default();
        for (number, why) in wrong {
            if index.disbelieve(*number, *why) {
                starts.insert(index.all[*number as usize].start());
            }
        }
        if starts.is_empty() {
            return;
        }
        let concerned = followed.iter().filter(|one| {
            starts.contains(&index.all[one.function as usize].start())
                || one.flow.calls.iter().any(|call| starts.contains(&call.to))
        });
        let numbers: Vec<u32> = concerned.map(|one| one.function).collect();
        for one in self.follow(index, btf, &numbers) {
            let place = followed.binary_search_by_key(&one.function, |known| known.function);
            if let Ok(place) = place {
                followed[place] = one;
            }
        }
    }
}

/// Whether a function reads memory by what is no pointer as it is declared: an argument that it is not given, or one of less
/// than 8 bytes.
fn contradicts(btf: &Btf, function: &Function, flow: &Flow) -> bool {
    let ([prototype], false) = (&function.prototypes[..], function.clone) else {
        return false;
    };
    let given = functions::arity(btf, *prototype);
    let registers = functions::registers(btf, *prototype);
    flow.values.read_through().any(|number| {
        let small = registers[usize::from(number)]
            .is_some_and(|ty| matches!(btf.at(ty), Type::Scalar(1..=4)));
        number >= given || small
    })
}

/// The entries that are put where something else is declared than BTF says of them, and never where the same is.
fn contradicted(
    index: &FunctionIndex,
    prototypes: &Prototypes,
    entries: &[TextOff],
    puts: &Puts,
) -> Vec<(u32, Doubt)> {
    let wrong = entries.iter().filter_map(|at| {
        let number = index.number(at.0)?;
        let function = &index.all[number as usize];
        let own: Vec<ProtoId> = function
            .prototypes
            .iter()
            .filter_map(|ty| prototypes.class(*ty))
            .collect();
        let places = puts.declared(at.0);
        let other = |place: &Vec<ProtoId>| !place.iter().any(|class| own.contains(class));
        let same = |place: &Vec<ProtoId>| place.iter().all(|class| own.contains(class));
        let doubted = !own.is_empty() && places.iter().any(other) && !places.iter().any(same);
        doubted.then_some((number, Doubt::Place))
    });
    wrong.collect()
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
    image: &'a Image,
    btf: &'a Btf,
    index: &'a FunctionIndex,
    prototypes: &'a Prototypes,
    layout: &'a Layout<'a>,
    around: &'a Around<'a>,
    shapes: &'a Shapes<'a>,
    followed: &'a [Followed],
    /// The functions whose addresses are taken.
    taken: &'a FxHashSet<u32>,
}

type Given = FxHashMap<(u32, u8), Pointers>;

impl Knowledge<'_> {
    /// Types data, and the arguments of functions that are called directly only.
    fn learn(&self, globals: &mut Globals) -> Given {
        globals.match_shapes(self.shapes);
        globals.spread(self.btf);
        let mut given = Given::default();
        for _ in 0..ROUNDS {
            let facts: Vec<Facts> = self.each(globals, &given, |resolver, chunk| {
                let mut found = Facts::default();
                for one in chunk {
                    let function = &self.index.all[one.function as usize];
                    let (flow, votes) = (&one.flow, &one.votes);
                    facts::of(resolver, function, flow, votes, self.taken, &mut found);
                }
                found
            });
            globals.forget_fields();
            globals.lists.forget();
            let mut passed: FxHashMap<(u32, u8), Known> = FxHashMap::default();
            for fact in facts {
                for (va, ty) in fact.objects {
                    globals.vote_object(va, ty);
                }
                for (va, ptr) in fact.words {
                    globals.vote_word(va, ptr);
                }
                for (va, ptr) in fact.tables {
                    globals.vote_table(va, ptr);
                }
                for (place, used) in fact.fields {
                    globals.vote_field(place, used);
                }
                for place in fact.functions {
                    globals.put_function(place);
                }
                for added in fact.added {
                    globals.lists.add(self.layout, added);
                }
                for (to, known) in fact.passed {
                    unite(passed.entry(to).or_insert(Known::Nothing), &known);
                }
            }
            globals.spread(self.btf);
            globals.find_functions(self.layout);
            globals.settle(self.around, self.layout);
            let all = passed.into_iter().filter_map(|(to, known)| match known {
                Known::Pointers(all) => Some((to, all)),
                _ => None,
            });
            given = all.collect();
        }
        given
    }

    /// What was found about each indirect branch, and where functions are put.
    fn sites(&self, globals: &Globals, given: &Given, hooks: &Hooks) -> (Vec<Found>, Puts) {
        let by_shape: FxHashMap<&str, ProtoId> = (0u32..)
            .zip(&self.prototypes.shown)
            .map(|(id, shown)| (shown.as_str(), ProtoId(id)))
            .collect();
        let found: Vec<(Vec<Found>, Puts)> = self.each(globals, given, |resolver, chunk| {
            let (mut found, mut puts) = (Vec::new(), Puts::default());
            let follower = self.follower(resolver);
            for one in chunk {
                let concerns = follower.concerns(&one.flow);
                if one.flow.sites.is_empty() && !concerns {
                    continue;
                }
                let function = &self.index.all[one.function as usize];
                let targets = one.flow.sites.iter().map(|site| site.target);
                let mut wanted: Vec<Value> = targets.collect();
                if concerns {
                    wanted.extend(one.flow.stores.iter().map(|store| store.base));
                }
                let known = resolver.find(&one.flow, function, &one.votes, wanted);
                if concerns {
                    follower.follow(function, &one.flow, &one.votes, &known, &mut puts);
                }
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
                            // What takes more arguments than the site has was not meant. Where callees may leave registers alone,
                            // that says nothing about the others.
                            let traced = one.flow.traced;
                            let most = if traced { site.most } else { site.arity };
                            let takes = |id: &ProtoId| self.prototypes.arity[id.0 as usize];
                            let (fitting, others): (Vec<_>, Vec<_>) =
                                all.into_iter().partition(|id| takes(id) <= most);
                            (others.is_empty() || traced && !fitting.is_empty())
                                .then(|| Reach::prototypes(fitting))
                        }),
                    };
                    // What is not typed still passes only so many arguments.
                    let few = one.flow.traced && site.most < 6;
                    found.push(Found {
                        at: site.at,
                        typed: reach,
                        untyped: if few {
                            Reach::Arity(site.most)
                        } else {
                            Reach::Any
                        },
                    });
                }
            }
            (found, puts)
        });
        let (mut all, mut puts) = (Vec::new(), Puts::default());
        for (found, more) in found {
            all.extend(found);
            puts.merge(more);
        }
        (all, puts)
    }

    fn follower<'b>(&'b self, resolver: &'b Resolver<'b>) -> Follower<'b> {
        Follower {
            resolver,
            prototypes: self.prototypes,
            image: self.image,
            shapes: self.shapes,
            taken: self.taken,
        }
    }

    /// Adds where functions are put by data, and by what is not followed.
    fn elsewhere(
        &self,
        tables: &Tables,
        text: &Text,
        globals: &Globals,
        given: &Given,
        puts: &mut Puts,
    ) {
        let image = self.image;
        let resolver = self.resolver(globals, given);
        let follower = self.follower(&resolver);
        let function = |va: LinkVa| {
            let at = globals.text(va.0)?;
            self.taken.contains(&at).then_some(at)
        };
        let described =
            |place: &LinkVa| tables.not_taken.iter().any(|range| range.contains(*place));
        // What a static call holds is called there alone (see `patched.rs`).
        let keys: FxHashSet<LinkVa> = tables.static_calls.iter().map(|site| site.key).collect();
        let is_key = |place: &LinkVa| keys.contains(place);
        let places = image.relocs.abs64.iter();
        for place in places.filter(|place| !described(place) && !is_key(place)) {
            let value = image.u64_at(*place).map(LinkVa);
            if let Some(to) = value.and_then(function) {
                puts.add(to, follower.in_data(place.0, to));
            }
        }
        // Relative addresses in tables, names that are looked up, and code that is not followed.
        let mut lost: Vec<LinkVa> = Vec::new();
        for table in [&tables.exports, &tables.pci_hooks, &tables.initcalls] {
            lost.extend(table);
        }
        let landings = text.landings.iter();
        lost.extend(landings.map(|at| LinkVa(text.range.start.0 + u64::from(at.0))));
        for place in &image.relocs.abs32 {
            if globals.text(place.0).is_none_or(|at| !self.index.holds(at)) {
                let word = image.u32_at(*place);
                lost.extend(word.map(|word| LinkVa(i64::from(word as i32) as u64)));
            }
        }
        for section in image.sections().iter().filter(|section| section.exec) {
            let at = globals.text(section.range.start.0);
            if at.is_none_or(|at| !self.index.holds(at)) {
                let code = image.section_bytes(&section.name).unwrap_or_default();
                lost.extend(taken_in(code, section.range.start));
            }
        }
        lost.into_iter()
            .filter_map(function)
            .for_each(|to| puts.lose(to));
    }

    fn resolver<'b>(&'b self, globals: &'b Globals, given: &'b Given) -> Resolver<'b> {
        Resolver {
            btf: self.btf,
            layout: self.layout,
            around: self.around,
            functions: self.index,
            globals,
            given,
        }
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
        let done = chunks.map(|chunk| work(&self.resolver(globals, given), chunk));
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
            Op::Phi(index) => open.extend(flow.values.operands(index)),
            _ => return None,
        }
    }
    (!found.is_empty()).then_some(found)
}
