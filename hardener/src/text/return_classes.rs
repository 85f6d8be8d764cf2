//! Behind which indirect calls a function may return, when it is known what these may reach.
//!
//! An indirect call returns to where what it reaches returns, and what that jumps to with the same frame, be it by name or by
//! another pointer. A module's function may jump to any function that is exported to it, or whose address it is given, so that what
//! calls modules may return from everywhere, whatever its prototype. Those calls are one list, which every function has that an
//! indirect call may reach. Calls that reach the kernel's own functions only, as paravirt and most static calls do, are in the classes
//! of the functions that may return to them. There are fewer classes than functions with different lists, so the small ones share some.

use super::Text;
use super::callgraph::CallGraph;
use super::return_sets::{Behind, Check, ReturnSets, Sizes};
use crate::image::Image;
use crate::types::{Forward, Reach};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};
use penumbra_bundle::{BackwardFunction, BackwardSets, TextOff};
use rustc_hash::{FxHashMap, FxHashSet};
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};

/// Lists of more places say little, and would fill the table: these are one class.
const MANY: usize = 4096;
/// Code of fewer bytes may be alike by chance.
const SHORT: usize = 16;

/// Where a frame may get by indirect jumps.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
struct Reaches {
    /// To anything that an indirect jump may reach.
    anything: bool,
    /// To the entries of these classes of branches.
    classes: BTreeSet<u32>,
}

impl Reaches {
    /// Adds what is in `other`; whether that was more.
    fn add(&mut self, other: &Reaches) -> bool {
        let (before, many) = (self.anything, self.classes.len());
        self.anything |= other.anything;
        self.classes.extend(&other.classes);
        self.anything != before || self.classes.len() != many
    }
}

/// What calls and branches by class say of returns.
struct Drawn<'a> {
    graph: &'a CallGraph,
    forward: &'a Forward,
    /// Entries of which nothing is known: every branch by prototype may reach them.
    untold: Vec<TextOff>,
    /// Those of them that are one of several copies of a function.
    copies: FxHashSet<TextOff>,
    /// By function: where it takes its frame. Most have none.
    jumps: FxHashMap<u32, Reaches>,
    /// By class of branches: where what they reach takes its frame.
    beyond: Vec<Reaches>,
}

/// Whether what a branch of this kind reaches tells too little to list it.
fn is_wide(reach: &Reach) -> bool {
    matches!(reach, Reach::Any | Reach::Arity(_))
}

impl<'a> Drawn<'a> {
    fn of(image: &Image, text: &'a Text, graph: &'a CallGraph, forward: &'a Forward) -> Drawn<'a> {
        let untold = forward.untold();
        let copies = untold.iter().copied();
        let mut drawn = Drawn {
            graph,
            forward,
            copies: copies.filter(|at| is_copied(image, text, *at)).collect(),
            untold,
            jumps: FxHashMap::default(),
            beyond: Vec::new(),
        };
        for (function, at) in &graph.indirect_jumps {
            // Assembly that jumps by a pointer starts or resumes a processor, and gives no caller's frame on; or it is a retpoline's
            // thunk, and who jumps there says himself where to.
            if !graph.facts[*function as usize].compiled {
                continue;
            }
            let reaches = drawn.branch(*at);
            drawn.jumps.entry(*function).or_default().add(&reaches);
        }
        let mut open: Vec<u32> = drawn.jumps.keys().copied().collect();
        while let Some(function) = open.pop() {
            let reaches = drawn.jumps[&function].clone();
            for source in &graph.jumped_from[function as usize] {
                if drawn.jumps.entry(*source).or_default().add(&reaches) {
                    open.push(*source);
                }
            }
        }
        let classes = forward.classes.iter();
        drawn.beyond = classes
            .map(|class| {
                let mut beyond = Reaches::default();
                if is_wide(&class.reach) {
                    beyond.anything = true;
                    return beyond;
                }
                let untold = drawn.untold.iter().filter(|at| !drawn.copies.contains(at));
                let more = untold.filter(|_| class.reach.is_by_prototype());
                for at in class.entries.iter().chain(more) {
                    let function = text.functions.number(*at);
                    if let Some(own) = function.and_then(|one| drawn.jumps.get(&(one as u32))) {
                        beyond.add(own);
                    }
                }
                beyond
            })
            .collect();
        drawn
    }

    /// What the indirect branch at `at` may reach.
    fn branch(&self, at: Option<TextOff>) -> Reaches {
        let class = at.and_then(|at| self.forward.closed_class(at));
        Reaches {
            anything: class.is_none(),
            classes: class.into_iter().collect(),
        }
    }

    /// The same with all indirect jumps that follow. None when that is anything.
    fn closure(&self, mut reaches: Reaches) -> Option<BTreeSet<u32>> {
        let mut open: Vec<u32> = reaches.classes.iter().copied().collect();
        while let Some(class) = open.pop() {
            let beyond = &self.beyond[class as usize];
            reaches.anything |= beyond.anything;
            let more = beyond.classes.iter();
            open.extend(more.filter(|class| reaches.classes.insert(**class)));
            if reaches.anything {
                return None;
            }
        }
        (!reaches.anything).then_some(reaches.classes)
    }

    /// Where calls return to that may have reached anything, and by class where those do that may have reached its entries.
    fn sites(&self) -> (Vec<TextOff>, Vec<Vec<TextOff>>) {
        let (mut any, mut of_class) = (Vec::new(), vec![Vec::new(); self.forward.classes.len()]);
        let mut known: HashMap<Option<u32>, Option<BTreeSet<u32>>> = HashMap::new();
        let mut add = |ends: &[TextOff], classes: Option<&BTreeSet<u32>>| match classes {
            None => any.extend(ends),
            Some(classes) => {
                for class in classes {
                    of_class[*class as usize].extend(ends);
                }
            }
        };
        for call in &self.graph.indirect_calls {
            let class = call.at.and_then(|at| self.forward.closed_class(at));
            let closure = known.entry(class);
            let closure = closure.or_insert_with(|| self.closure(self.branch(call.at)));
            add(&[call.end], closure.as_ref());
        }
        for (function, reaches) in &self.jumps {
            let direct = &self.graph.direct[*function as usize];
            if !direct.is_empty() {
                add(direct, self.closure(reaches.clone()).as_ref());
            }
        }
        any.sort_unstable();
        any.dedup();
        for list in &mut of_class {
            list.sort_unstable();
            list.dedup();
            list.retain(|at| any.binary_search(at).is_err());
        }
        (any, of_class)
    }

    /// By entry: the classes of branches that it is in.
    fn classes_of_entries(&self) -> FxHashMap<TextOff, Vec<u32>> {
        let mut of: FxHashMap<TextOff, Vec<u32>> = FxHashMap::default();
        for (number, class) in (0u32..).zip(&self.forward.classes) {
            if is_wide(&class.reach) {
                continue;
            }
            let more = self.untold.iter().filter(|_| class.reach.is_by_prototype());
            for at in class.entries.iter().chain(more) {
                of.entry(*at).or_default().push(number);
            }
        }
        of
    }
}

impl ReturnSets {
    /// The same by the classes of `forward`, with `most` classes at most.
    pub fn by_class(
        &self,
        image: &Image,
        text: &Text,
        graph: &CallGraph,
        forward: &Forward,
        most: usize,
    ) -> ReturnSets {
        let drawn = Drawn::of(image, text, graph, forward);
        let (any, of_class) = drawn.sites();
        let of_entries = drawn.classes_of_entries();
        // Lists by the classes of branches that they come from; those classes are all that tells functions apart.
        let mut lists: HashMap<BTreeSet<u32>, u32> = HashMap::new();
        let mut listed: Vec<Vec<TextOff>> = Vec::new();
        let mut of_function: FxHashMap<usize, u32> = FxHashMap::default();
        let mut looked_at = FxHashSet::default();
        for (slot, check) in text.slots.returns.iter().zip(&self.of_slot) {
            let Check::Callers {
                indirect: Behind::Any,
                ..
            } = &self.checks[*check as usize]
            else {
                continue;
            };
            let Some(function) = text.functions.number(slot.at) else {
                continue;
            };
            if !looked_at.insert(function) {
                continue;
            }
            let callers = graph.callers(function);
            let entries = callers.taken.iter();
            let starts = entries.map(|entry| text.functions.start(*entry as usize));
            let from = starts.filter_map(|at| of_entries.get(&at));
            let from: BTreeSet<u32> = from.flatten().copied().collect();
            let number = *lists.entry(from).or_insert_with_key(|from| {
                listed.push(united(from.iter().map(|class| &of_class[*class as usize])));
                listed.len() as u32 - 1
            });
            of_function.insert(function, number);
        }
        let (classes, class_of_list) = shared(&listed, most);
        let mut sets = ReturnSets {
            of_slot: Vec::with_capacity(self.of_slot.len()),
            scratch_free: self.scratch_free.clone(),
            checks: Vec::new(),
            indirect: any,
            classes: Some(classes),
            sizes: Vec::new(),
            figures: Default::default(),
        };
        let mut known: HashMap<Check, u32> = HashMap::new();
        let mut functions = Sizes::default();
        let mut last = None;
        for (slot, check) in text.slots.returns.iter().zip(&self.of_slot) {
            let function = text.functions.number(slot.at);
            let mut check = self.checks[*check as usize].clone();
            let list = function.and_then(|function| of_function.get(&function));
            if let (Check::Callers { indirect, .. }, Some(list)) = (&mut check, list)
                && let Some(class) = class_of_list[*list as usize]
            {
                *indirect = Behind::Class(class);
            }
            let index = *known
                .entry(check)
                .or_insert_with_key(|check| sets.add(graph, text, check));
            if let Some(function) = function.filter(|function| last != Some(*function)) {
                functions.add(&sets, index, graph.facts[function].taken);
            }
            last = function;
            sets.of_slot.push(index);
        }
        sets.figures = functions.figures();
        sets
    }

    /// What a manifest claims of the classes, if there are any.
    pub fn claims(&self, text: &Text) -> Option<BackwardSets> {
        let classes = self.classes.as_ref()?;
        let slots = text.slots.returns.iter().zip(&self.of_slot);
        let functions = slots.filter_map(|(slot, check)| match &self.checks[*check as usize] {
            Check::Callers {
                indirect: Behind::Class(class),
                ..
            } => Some(BackwardFunction {
                at: text.functions.start(text.functions.number(slot.at)?),
                class: *class,
            }),
            _ => None,
        });
        let mut functions: Vec<BackwardFunction> = functions.collect();
        functions.dedup();
        Some(BackwardSets {
            any: self.indirect.clone(),
            classes: classes.clone(),
            functions,
        })
    }
}

/// Whether all functions of the name of the one at `at` are the same code: a header's function, of which several files have a copy.
/// Then BTF cannot have another one's prototype. Of a few bytes that says nothing.
fn is_copied(image: &Image, text: &Text, at: TextOff) -> bool {
    let va = text.span.va(at);
    let code = || image.symbols.iter().filter(|symbol| symbol.is_code());
    let names: FxHashSet<&str> = code()
        .filter(|symbol| symbol.va == va)
        .map(|symbol| symbol.name.as_str())
        .collect();
    let places = code().filter(|symbol| names.contains(symbol.name.as_str()));
    let copies = places.map(|symbol| copy(text, text.span.offset(symbol.va)?));
    let copies: Option<Vec<Vec<Instruction>>> = copies.collect();
    copies.is_some_and(|copies| {
        let bytes = |copy: &Vec<Instruction>| copy.iter().map(Instruction::len).sum::<usize>();
        let long = copies.first().is_some_and(|copy| bytes(copy) >= SHORT);
        long && copies.windows(2).all(|pair| pair[0] == pair[1])
    })
}

/// The instructions of the function at `at`, wherever it lies.
fn copy(text: &Text, at: TextOff) -> Option<Vec<Instruction>> {
    let number = text.functions.number(at)?;
    let end = text.functions.starts_after(number);
    let range = at.0 as usize..end.map_or(text.bytes.len(), |end| end.0 as usize);
    let start = text.span.va(at).0;
    let decoder = Decoder::with_ip(64, &text.bytes[range.clone()], start, DecoderOptions::NONE);
    let inside = start..start + range.len() as u64;
    let mut all: Vec<Instruction> = decoder.into_iter().collect();
    // What fills up to the next function.
    while all
        .pop_if(|last| matches!(last.mnemonic(), Mnemonic::Nop | Mnemonic::Int3))
        .is_some()
    {}
    for one in &mut all {
        if one.op0_kind() == OpKind::NearBranch64 && inside.contains(&one.near_branch64()) {
            one.set_near_branch64(one.near_branch64() - start);
        }
    }
    Some(all)
}

fn united<'a>(lists: impl Iterator<Item = &'a Vec<TextOff>>) -> Vec<TextOff> {
    let mut all: Vec<TextOff> = lists.flatten().copied().collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// At most `most` classes (one at least), each of one list or of several, and the class of each list that is not empty: the largest
/// are together, the large ones have their own, and each of the others goes to the class that is smallest then.
fn shared(lists: &[Vec<TextOff>], most: usize) -> (Vec<Vec<TextOff>>, Vec<Option<u32>>) {
    let mut order: Vec<usize> = (0..lists.len()).collect();
    order.retain(|number| !lists[*number].is_empty());
    order.sort_by_key(|number| (Reverse(lists[*number].len()), &lists[*number]));
    let mut classes: Vec<BTreeSet<TextOff>> = Vec::new();
    let mut of_list = vec![None; lists.len()];
    let mut smallest: BinaryHeap<Reverse<(usize, usize)>> = BinaryHeap::new();
    let mut before: Option<usize> = None;
    let largest = order.partition_point(|number| lists[*number].len() > MANY);
    if largest > 0 {
        let all = united(order[..largest].iter().map(|number| &lists[*number]));
        classes.push(all.into_iter().collect());
        for number in order.drain(..largest) {
            of_list[number] = Some(0);
        }
    }
    for number in order {
        // Functions of different classes of branches may return to the same.
        let same = before.filter(|before| lists[*before] == lists[number]);
        before = Some(number);
        if let Some(same) = same {
            of_list[number] = of_list[same];
            continue;
        }
        let full = (classes.len() >= most).then(|| smallest.pop()).flatten();
        let class = full.map_or(classes.len(), |Reverse((_, class))| class);
        if class >= classes.len() {
            classes.push(BTreeSet::new());
        }
        classes[class].extend(&lists[number]);
        smallest.push(Reverse((classes[class].len(), class)));
        of_list[number] = Some(class as u32);
    }
    let classes = classes.into_iter().map(|class| class.into_iter().collect());
    (classes.collect(), of_list)
}

#[cfg(test)]
mod tests {
    use super::shared;
    use penumbra_bundle::TextOff;

    fn list(of: &[u32]) -> Vec<TextOff> {
        of.iter().copied().map(TextOff).collect()
    }

    #[test]
    fn each_list_is_in_its_class_and_large_ones_have_their_own() {
        let lists = [
            list(&[1, 2, 3]),
            list(&[]),
            list(&[9]),
            list(&[7]),
            list(&[1, 2, 3]),
            list(&[8]),
        ];
        let (classes, of) = shared(&lists, 3);
        assert_eq!(classes, [list(&[1, 2, 3]), list(&[7, 9]), list(&[8])]);
        assert_eq!(of, [Some(0), None, Some(1), Some(1), Some(0), Some(2)]);
    }

    #[test]
    fn no_list_is_left_out_for_want_of_room() {
        let (classes, of) = shared(&[list(&[1]), list(&[2])], 0);
        assert_eq!(classes, [list(&[1, 2])]);
        assert_eq!(of, [Some(0), Some(0)]);
    }
}
