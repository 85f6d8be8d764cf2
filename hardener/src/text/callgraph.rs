//! Which calls reach which functions: what a return of each function may go back to.
//!
//! A function here is what stands between two starts: a compiler's function, its split-off `.cold` part, or a piece of assembly.
//! A jump from one to another passes the frame on, so the other returns to where the one's callers are.

use super::return_sets::MAX_COMPARED;
use super::sweep::{Branch, branches};
use super::{Bitmap, Functions, Regions, Span, Text};
use crate::image::{Image, Tables};
use crate::thunks::MODULE_CLEANUP;
use penumbra_bundle::{LinkVa, TextOff};
use rustc_hash::FxHashSet;

/// What GCC appends to the names of the functions that it makes of others (gcc/cgraphclones.cc); no assembly is called so.
const CLONES: [&str; 4] = [".cold", ".constprop.", ".isra.", ".part."];
/// More bytes than the test and its jumps take (see [`out_of_line`]).
pub(super) const OUT_OF_LINE: usize = 24;

/// Code that is gone by the time that a check runs.
const INITIALISING: [&str; 2] = [".init.text", ".exit.text"];

/// The length of `call rel32`.
const DIRECT_CALL: u32 = 5;

/// The length of ENDBR64.
const ENDBR64: u32 = 4;

/// Calls and jumps between functions, by the functions' numbers.
pub struct CallGraph {
    /// Return addresses of the direct calls of each function's entry. Sorted.
    pub direct: Vec<Vec<TextOff>>,
    /// The functions that jump to each function. Sorted.
    pub jumped_from: Vec<Vec<u32>>,
    /// What else is known of each function.
    pub facts: Vec<Facts>,
    /// Indirect calls, and calls by pointers that the kernel makes direct ones.
    pub indirect_calls: Vec<IndirectCall>,
    /// Indirect jumps out of functions, and those by pointers that the kernel makes direct ones: the functions, and where the
    /// jumps stand unless a replacement brings them.
    pub indirect_jumps: Vec<(u32, Option<TextOff>)>,
    /// Where indirect calls return to, and calls of functions from which an indirect jump can be reached. Sorted.
    pub indirect: Vec<TextOff>,
}

/// A call whose callee only the run knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndirectCall {
    /// Where it stands, unless a replacement brings it.
    pub at: Option<TextOff>,
    /// Where it returns to.
    pub end: TextOff,
}

/// What is known of a function.
#[derive(Clone, Copy, Default, Debug)]
pub struct Facts {
    /// Its address is taken, so that an indirect call may reach it.
    pub taken: bool,
    /// A compiler made it: it returns with the stack that it was called with. Assembly may change stacks.
    pub compiled: bool,
    /// Jumps to an address that only the run knows.
    pub jumps_anywhere: bool,
    /// Is called, but not where it starts, or by a call that some variant redirects or leaves out.
    pub called_inside: bool,
    /// Code that initialises the kernel calls it. Nothing goes back there any more.
    pub called_at_boot: bool,
}

/// What the return addresses of a function may be, apart from those outside the text.
#[derive(Clone, Debug)]
pub struct Callers {
    /// Functions whose direct calls end up here, by number: itself and those that jump to it. Sorted.
    pub called: Vec<u32>,
    /// Whether an indirect call may end up here.
    pub indirect: bool,
    /// The functions whose addresses are taken that those calls reach: itself and those that jump to it.
    pub taken: Vec<u32>,
    /// Whether it cannot be told from where it is reached.
    pub unknown: bool,
}

/// What the graph is drawn from.
struct Drawn<'a> {
    image: &'a Image,
    tables: &'a Tables,
    text: &'a Text,
    span: Span,
    functions: &'a Functions,
    regions: &'a Regions,
}

impl Drawn<'_> {
    fn number(&self, va: LinkVa) -> Option<usize> {
        let at = self.span.offset(va)?;
        self.functions.number(at)
    }
}

impl CallGraph {
    /// Draws the graph.
    pub fn build(image: &Image, tables: &Tables, text: &Text) -> CallGraph {
        let from = &Drawn {
            image,
            tables,
            text,
            span: text.span,
            functions: &text.functions,
            regions: &text.regions,
        };
        let count = from.functions.count();
        let mut graph = CallGraph {
            direct: vec![Vec::new(); count],
            jumped_from: vec![Vec::new(); count],
            facts: vec![Facts::default(); count],
            indirect_calls: Vec::new(),
            indirect_jumps: Vec::new(),
            indirect: Vec::new(),
        };
        graph.add_facts(from);
        graph.add_branches(from);
        graph.add_boot(from);
        for list in &mut graph.jumped_from {
            list.sort_unstable();
            list.dedup();
        }
        for list in &mut graph.direct {
            list.sort_unstable();
            list.dedup();
        }
        graph.reach_indirect_jumps();
        graph
    }

    fn add_facts(&mut self, from: &Drawn<'_>) {
        for (number, facts) in self.facts.iter_mut().enumerate() {
            let start = from.functions.start(number);
            // Trampolines of static calls jump and do nothing else.
            let trampoline = from.regions.static_calls.contains(from.span.va(start));
            facts.compiled = from.functions.calls_fentry(number) || trampoline;
        }
        for symbol in from.image.symbols.iter().filter(|symbol| symbol.is_code()) {
            if let Some(number) = from.number(symbol.va)
                && !self.facts[number].compiled
                && from.span.offset(symbol.va) == Some(from.functions.start(number))
            {
                let clone = CLONES.iter().any(|suffix| symbol.name.contains(suffix));
                self.facts[number].compiled = clone || from.image.btf.is_function(&symbol.name);
            }
        }
        for at in &from.text.entries {
            if let Some(number) = from.functions.number(*at) {
                self.facts[number].taken = true;
            }
        }
        // Its one call goes through a thunk (pass `module-free`).
        let redirected = from.image.symbol(MODULE_CLEANUP);
        if let Some(number) = redirected.and_then(|va| from.number(va)) {
            self.facts[number].called_inside = true;
        }
    }

    fn add_branches(&mut self, from: &Drawn<'_>) {
        let (span, regions) = (from.span, from.regions);
        // Sites that the kernel pokes by tables which say how: what they hold in the file does not count.
        let mut paravirt = Bitmap::new(span.code.len() as usize + 1);
        for site in &from.tables.paravirt {
            if let Some(at) = span.offset(site.site) {
                paravirt.set(at.0 as usize);
                self.patched_call(at);
            }
        }
        for site in from.tables.static_calls.iter().filter(|site| !site.tail) {
            if let Some(at) = span.offset(site.site) {
                self.patched_call(at);
            }
        }
        for call in &from.text.sweep.calls {
            if !paravirt.get(call.at.0 as usize) && !regions.is_x86_thunk(span.va(call.at)) {
                self.call(from, Some(call.at), call.end, call.to);
            }
        }
        // With IBT a function's `__fentry__` site stands behind its ENDBR64, and may count as a start of its own.
        for number in 1..from.functions.count() {
            let start = from.functions.start(number - 1);
            let endbr = from.text.sweep.endbr.binary_search(&start).is_ok();
            if endbr && from.functions.start(number).0 == start.0 + ENDBR64 {
                self.pass_on(number - 1, Some(number));
            }
        }
        // Jumps come by address, so that most stay inside the function of the one before.
        let mut source = 0;
        for jump in &from.text.sweep.jumps {
            while source + 1 < from.functions.count() && from.functions.start(source + 1) <= jump.at
            {
                source += 1;
            }
            self.jump(from, source, Some(jump.at), jump.to);
        }
        for entry in &from.tables.alternatives {
            let Some(at) = span.offset(entry.site) else {
                continue;
            };
            let code = from
                .image
                .at(entry.replacement, usize::from(entry.replacement_len));
            for branch in branches(code.unwrap_or_default(), entry.replacement) {
                if branch.call {
                    self.call(from, None, TextOff(at.0 + u32::from(branch.end)), branch.to);
                } else if let Some(source) = from.functions.number(at) {
                    self.jump(from, source, None, branch.to);
                }
            }
        }
        for (at, fixup) in from.tables.faulting.iter().zip(&from.tables.fixups) {
            if let Some(source) = from.number(*at) {
                self.jump(from, source, None, Some(*fixup));
            }
        }
        for label in &from.tables.jump_labels {
            if let Some(source) = from.number(label.code) {
                self.jump(from, source, None, Some(label.target));
            }
        }
    }

    fn add_boot(&mut self, from: &Drawn<'_>) {
        let parts = INITIALISING.iter().filter_map(|name| {
            let start = from.image.section(name)?.range.start;
            Some((from.image.section_bytes(name)?, start))
        });
        for branch in parts.flat_map(|(code, start)| branches(code, start)) {
            let to = branch.to.and_then(|to| from.span.offset(to));
            let callee = to.and_then(|to| from.functions.number(to));
            if let Some(callee) = callee.filter(|at| Some(from.functions.start(*at)) == to) {
                self.facts[callee].called_at_boot = true;
            }
        }
    }

    /// Says that a variant redirects or leaves out calls of the functions that start at these places: what stands before a
    /// return address does not name them in every view, and a return's thunk reads it in the view that is on by then.
    pub fn redirect(&mut self, text: &Text, functions: &[TextOff]) {
        for number in functions.iter().filter_map(|at| text.functions.number(*at)) {
            self.facts[number].called_inside = true;
        }
    }

    /// A call at `at` that is direct once the kernel has patched it.
    fn patched_call(&mut self, at: TextOff) {
        self.indirect_calls.push(IndirectCall {
            at: Some(at),
            end: TextOff(at.0 + DIRECT_CALL),
        });
    }

    fn call(&mut self, from: &Drawn<'_>, at: Option<TextOff>, end: TextOff, to: Option<LinkVa>) {
        let callee = to.filter(|to| !from.regions.is_x86_thunk(*to));
        let Some(to) = callee else {
            return self.indirect_calls.push(IndirectCall { at, end });
        };
        if let Some(callee) = from.number(to) {
            match from.span.offset(to) == Some(from.functions.start(callee)) {
                true => self.direct[callee].push(end),
                false => self.facts[callee].called_inside = true,
            }
        }
    }

    fn jump(&mut self, from: &Drawn<'_>, source: usize, jump: Option<TextOff>, to: Option<LinkVa>) {
        let Some(to) = to else {
            return self.jumps_anywhere(source, jump);
        };
        let Some(at) = from.span.offset(to) else {
            for to in out_of_line(from.image, to) {
                self.pass_on(source, from.number(to));
            }
            return;
        };
        let start = from.functions.start(source);
        if start <= at
            && from
                .functions
                .starts_after(source)
                .is_none_or(|end| at < end)
        {
            return;
        }
        if from.regions.is_return_thunk(to) {
            return;
        }
        if from.regions.is_x86_thunk(to) || from.regions.static_calls.contains(to) {
            self.jumps_anywhere(source, jump);
        }
        self.pass_on(source, from.functions.number(at));
    }

    fn jumps_anywhere(&mut self, source: usize, at: Option<TextOff>) {
        self.facts[source].jumps_anywhere = true;
        self.indirect_jumps.push((source as u32, at));
    }

    fn pass_on(&mut self, source: usize, to: Option<usize>) {
        if let Some(to) = to.filter(|to| *to != source) {
            self.jumped_from[to].push(source as u32);
        }
    }

    /// Calls of functions that hand their frame to an indirect jump return to from wherever that goes.
    fn reach_indirect_jumps(&mut self) {
        let calls = self.indirect_calls.iter().map(|call| call.end);
        self.indirect.extend(calls);
        let mut seen: Vec<bool> = self
            .facts
            .iter()
            .map(|facts| facts.jumps_anywhere)
            .collect();
        let mut open: Vec<usize> = (0..seen.len()).filter(|number| seen[*number]).collect();
        while let Some(number) = open.pop() {
            self.indirect.extend(&self.direct[number]);
            for source in &self.jumped_from[number] {
                if !std::mem::replace(&mut seen[*source as usize], true) {
                    open.push(*source as usize);
                }
            }
        }
        self.indirect.sort_unstable();
        self.indirect.dedup();
    }

    /// Where the calls come from that may end up in the function `number`.
    pub fn callers(&self, number: usize) -> Callers {
        let mut callers = Callers {
            called: Vec::new(),
            indirect: false,
            taken: Vec::new(),
            unknown: false,
        };
        let mut seen = FxHashSet::from_iter([number as u32]);
        let mut open = vec![number as u32];
        while let Some(at) = open.pop() {
            let facts = self.facts[at as usize];
            let (direct, sources) = (&self.direct[at as usize], &self.jumped_from[at as usize]);
            let called = !direct.is_empty() || facts.taken || facts.called_at_boot;
            if !direct.is_empty() {
                callers.called.push(at);
            }
            // Nobody is seen to call it, so somebody does who is not seen: by its address, or never.
            let nobody = !called && sources.is_empty();
            callers.indirect |= facts.taken || nobody;
            callers.taken.extend(facts.taken.then_some(at));
            callers.unknown |= facts.called_inside || !facts.compiled;
            open.extend(sources.iter().filter(|source| seen.insert(**source)));
        }
        let reached = |number: &u32| {
            let facts = self.facts[*number as usize];
            facts.taken || facts.called_at_boot
        };
        callers.unknown |= callers.called.is_empty() && !seen.iter().any(reached);
        callers.called.sort_unstable();
        callers
    }

    /// Where the function `number` returns to, but for calls of functions that are compiled for tracing: those who call these
    /// expect nothing of the registers that a call may change. None unless the others' callers are all known and compiled.
    pub fn returns_to(&self, text: &Text, number: usize) -> Option<Vec<TextOff>> {
        // The proof follows no more callees than a thunk compares with.
        let callers = self.callers(number);
        if callers.unknown || callers.called.len() > MAX_COMPARED {
            return None;
        }
        let mut seen = FxHashSet::from_iter([number as u32]);
        let mut open = vec![number as u32];
        let mut places = Vec::new();
        while let Some(at) = open.pop() {
            let facts = self.facts[at as usize];
            let (direct, sources) = (&self.direct[at as usize], &self.jumped_from[at as usize]);
            if facts.called_inside || !facts.compiled {
                return None;
            }
            if !text.functions.calls_fentry(at as usize) {
                if facts.taken || direct.is_empty() && sources.is_empty() {
                    return None;
                }
                places.extend(direct);
            }
            open.extend(sources.iter().filter(|source| seen.insert(**source)));
        }
        let compiled = |at: &TextOff| {
            let caller = text.functions.number(TextOff(at.0 - 1));
            caller.is_some_and(|caller| self.facts[caller].compiled)
        };
        places.iter().all(compiled).then_some(places)
    }
}

/// Where the code goes on that a jump out of `.text` reaches: `.altinstr_aux` holds one test and two jumps for each use of
/// `static_cpu_has` (arch/x86/include/asm/cpufeature.h).
fn out_of_line(image: &Image, at: LinkVa) -> Vec<LinkVa> {
    let code = image.at(at, OUT_OF_LINE).unwrap_or_default();
    let mut found = Vec::new();
    for branch in branches(code, at) {
        let Branch {
            call: false,
            to: Some(to),
            ..
        } = branch
        else {
            break;
        };
        found.push(to);
        if !branch.conditional {
            break;
        }
    }
    found
}
