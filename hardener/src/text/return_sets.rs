//! What each return may go back to, and how its thunk tells.
//!
//! A direct call names its callee in the four bytes before the return address. So the thunk of a function compares these with
//! the function's own address, and with those of the functions that jump to it; or, where calls are few, the return address
//! with theirs. No table is read. Where indirect calls return to is one set for all, unless it is known what they may reach: see
//! `return_classes.rs`.

use super::callgraph::{CallGraph, Callers};
use super::{Bitmap, Text, scratch};
use crate::image::{Image, Tables};
use penumbra_bundle::TextOff;
use std::collections::{BTreeMap, HashMap};

/// More comparisons than these are worse than any return site: a few functions to which dozens jump.
pub const MAX_COMPARED: usize = 32;
/// The first byte of `call rel32`.
const CALL: u8 = 0xe8;
/// The first byte of `jmp rel32`.
const JMP: u8 = 0xe9;

/// How a thunk tells a legal return address.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Check {
    /// Any return site will do.
    AnySite {
        /// The function's own entry, when it is called: most return addresses follow such a call, and need no table.
        own: Option<Called>,
    },
    /// It follows a call of one of these functions, or an indirect call.
    Callers {
        /// Entries, most called first.
        called: Vec<TextOff>,
        /// Where their direct calls return to, when it is shorter to compare with that. Sorted.
        sites: Option<Vec<TextOff>>,
        /// Which indirect calls will do.
        indirect: Behind,
        /// What has to be known of the call's first byte.
        opcode: Opcode,
    },
}

/// Behind which indirect calls a function may return.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Behind {
    /// None: no such call reaches it.
    None,
    /// Those of [`ReturnSets::indirect`].
    Any,
    /// Those, and the class of this number.
    Class(u32),
}

/// A function that a call names.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Called {
    /// Its entry.
    pub at: TextOff,
    /// As in [`Check::Callers`].
    pub opcode: Opcode,
}

/// What has to be known of the byte before the four that name a function.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Opcode {
    /// Nothing: no other address has the function's name before it.
    Any,
    /// That it is less than a jump's: jumps alone name the function where no call does.
    NoJump,
    /// That it is a call's.
    Call,
}

/// What the returns of one kernel may go back to.
pub struct ReturnSets {
    /// The check of each R slot, in the order of the slots.
    pub of_slot: Vec<u32>,
    /// Whether r10, r11 and the flags are free at each.
    pub scratch_free: Vec<bool>,
    /// The checks.
    pub checks: Vec<Check>,
    /// Where indirect calls return to: all of them, or those that are in no class. Sorted.
    pub indirect: Vec<TextOff>,
    /// Where some functions return to besides, when branches are known by class. Each sorted.
    pub classes: Option<Vec<Vec<TextOff>>>,
    /// To how many places each lets return.
    pub sizes: Vec<u64>,
    /// Sizes of the sets and the like, by name.
    pub figures: BTreeMap<String, u64>,
}

impl ReturnSets {
    /// Finds the callers of every function that has an R slot.
    pub fn find(image: &Image, tables: &Tables, text: &Text, graph: &CallGraph) -> ReturnSets {
        let named = named_elsewhere(text);
        let mut sets = ReturnSets {
            of_slot: Vec::with_capacity(text.slots.returns.len()),
            scratch_free: scratch::find(image, tables, text, graph),
            checks: Vec::new(),
            indirect: graph.indirect.clone(),
            classes: None,
            sizes: Vec::new(),
            figures: BTreeMap::new(),
        };
        let mut known: HashMap<Check, u32> = HashMap::new();
        let mut functions = Sizes::default();
        let mut last = None;
        for slot in &text.slots.returns {
            let number = text.functions.number(slot.at);
            if let Some((_, check)) = last.filter(|(other, _)| *other == number) {
                sets.of_slot.push(check);
                continue;
            }
            let check = number.map_or(Check::AnySite { own: None }, |number| {
                let callers = graph.callers(number);
                check(graph, text, &named, number, &callers)
            });
            let index = *known
                .entry(check)
                .or_insert_with_key(|check| sets.add(graph, text, check));
            if let Some(number) = number {
                functions.add(&sets, index, graph.facts[number].taken);
            }
            sets.of_slot.push(index);
            last = Some((number, index));
        }
        sets.figures = functions.figures();
        sets
    }

    /// Adds a check; its number.
    pub(super) fn add(&mut self, graph: &CallGraph, text: &Text, check: &Check) -> u32 {
        self.sizes.push(self.size(graph, text, check) as u64);
        self.checks.push(check.clone());
        self.checks.len() as u32 - 1
    }

    /// To how many places a check lets return.
    fn size(&self, graph: &CallGraph, text: &Text, check: &Check) -> usize {
        let Check::Callers {
            called, indirect, ..
        } = check
        else {
            return text.return_targets.len();
        };
        let class = match (indirect, &self.classes) {
            (Behind::Class(class), Some(classes)) => &classes[*class as usize][..],
            _ => &[],
        };
        let any = match indirect {
            Behind::None => &[],
            Behind::Any | Behind::Class(_) => &self.indirect[..],
        };
        let called = called.iter().filter_map(|at| text.functions.number(*at));
        let direct = called.flat_map(|number| &graph.direct[number]);
        // A call of a function that jumps anywhere is in both.
        let beside = |at: &&TextOff| {
            [any, class]
                .iter()
                .all(|list| list.binary_search(at).is_err())
        };
        direct.filter(beside).count() + any.len() + class.len()
    }
}

fn check(graph: &CallGraph, text: &Text, named: &Named, number: usize, callers: &Callers) -> Check {
    if callers.unknown || callers.called.len() > MAX_COMPARED {
        let at = text.functions.start(number);
        let opcode = named.opcode(at);
        let own = (!graph.direct[number].is_empty()).then_some(Called { at, opcode });
        return Check::AnySite { own };
    }
    let mut called = callers.called.clone();
    called.sort_by_key(|number| {
        let calls = graph.direct[*number as usize].len();
        (std::cmp::Reverse(calls), *number)
    });
    let sites = called.iter().map(|number| &graph.direct[*number as usize]);
    let callees = called
        .iter()
        .map(|number| text.functions.start(*number as usize));
    let opcode = callees.clone().map(|at| named.opcode(at)).max();
    let opcode = opcode.unwrap_or(Opcode::Any);
    // One more comparison than with callees costs what finding out the callee does; more than that, what looking at the opcode does,
    // when any of the sites is as likely as the next.
    let more = match opcode {
        Opcode::Any => 1,
        Opcode::NoJump => 2,
        Opcode::Call => 3,
    };
    let few = sites.clone().map(Vec::len).sum::<usize>() <= called.len() + more;
    let sites = (few && !called.is_empty()).then(|| {
        let mut sites: Vec<TextOff> = sites.flatten().copied().collect();
        sites.sort_unstable();
        sites
    });
    Check::Callers {
        indirect: match callers.indirect {
            true => Behind::Any,
            false => Behind::None,
        },
        opcode,
        sites,
        called: callees.collect(),
    }
}

/// What the four bytes before addresses name as a call would, without a call's first byte before them.
struct Named {
    /// Offsets that are named.
    any: Bitmap,
    /// Those of them that a look for something less than a jump would take for called: behind less than that, or one byte further on
    /// behind no less.
    less: Bitmap,
}

impl Named {
    fn opcode(&self, at: TextOff) -> Opcode {
        let at = at.0 as usize;
        match (self.any.get(at), self.less.get(at)) {
            (_, true) => Opcode::Call,
            (true, false) => Opcode::NoJump,
            (false, false) => Opcode::Any,
        }
    }
}

fn named_elsewhere(text: &Text) -> Named {
    let code = &text.bytes[..text.span.code.len() as usize];
    let mut named = Named {
        any: Bitmap::new(code.len()),
        less: Bitmap::new(code.len()),
    };
    for (at, bytes) in code.windows(5).enumerate() {
        let displacement = i32::from_le_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
        let to = (at as u32 + 5).wrapping_add_signed(displacement) as usize;
        if bytes[0] == CALL || to >= code.len() {
            continue;
        }
        named.any.set(to);
        if bytes[0] < JMP {
            named.less.set(to);
        } else if to > 0 {
            named.less.set(to - 1);
        }
    }
    named
}

/// Sizes of sets, a function each.
#[derive(Default)]
pub(super) struct Sizes {
    never_taken: Vec<u64>,
    taken: Vec<u64>,
    any_site: u64,
}

impl Sizes {
    /// Counts a function by its check, one of `sets`, and by whether its address is taken.
    pub(super) fn add(&mut self, sets: &ReturnSets, check: u32, taken: bool) {
        let size = sets.sizes[check as usize];
        if let Check::AnySite { .. } = sets.checks[check as usize] {
            self.any_site += 1;
        }
        match taken {
            true => self.taken.push(size),
            false => self.never_taken.push(size),
        }
    }

    pub(super) fn figures(mut self) -> BTreeMap<String, u64> {
        self.never_taken.sort_unstable();
        self.taken.sort_unstable();
        let quantile = |list: &[u64], percent: usize| {
            let at = list.len().saturating_sub(1) * percent / 100;
            list.get(at).copied().unwrap_or(0)
        };
        let figures = [
            ("functions_direct", self.never_taken.len() as u64),
            ("median_direct", quantile(&self.never_taken, 50)),
            ("p90_direct", quantile(&self.never_taken, 90)),
            ("functions_taken", self.taken.len() as u64),
            ("median_taken", quantile(&self.taken, 50)),
            ("functions_any_site", self.any_site),
        ];
        figures.map(|(name, value)| (name.to_owned(), value)).into()
    }
}
