//! Where each function may return to, derived from the image alone.
//!
//! Text from one symbol or `__fentry__` site to the next is a part. A part that jumps into another gives it its frame; so a
//! part may be entered with the frames of all parts from which it can be reached by jumps. Parts are walked here from those
//! that are called down to those that get their frames.

use super::kernel::btf::Btf;
use super::kernel::sweep::Sweep;
use super::kernel::{Kernel, KernelError};
use super::owed::has_fentry;
use super::sets;
use iced_x86::{Decoder, DecoderOptions, FlowControl, OpKind};
use penumbra_bundle::{LinkVa, VaRange};
use rustc_hash::FxHashSet;
use std::collections::{BTreeMap, BTreeSet};

/// A thunk need not compare with more callees than this: then any return site is legal.
const MOST_CALLEES: usize = 32;
/// Sections of code that the kernel frees when it has booted.
const FREED: [&str; 2] = [".init.text", ".exit.text"];
/// The longest stretch that is followed outside `.text`: a test and two jumps of `static_cpu_has`.
const OUTSIDE: usize = 24;

/// Where a part's returns may go, apart from what lies outside the text.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Goes {
    /// To any return site.
    Anywhere,
    /// Behind the calls of these parts, by number, and of indirect calls where so said.
    Behind {
        /// Parts that are called.
        callees: BTreeSet<u32>,
        /// Whether indirect calls get here.
        indirect: bool,
    },
}

/// The parts of the text and how frames get to them.
pub struct Parts {
    starts: Vec<LinkVa>,
    /// What direct calls of each part's start return to.
    pub back: Vec<BTreeSet<LinkVa>>,
    /// The same of calls that stand there only once the kernel has put a replacement over what the file has.
    pub replaced: Vec<BTreeSet<LinkVa>>,
    /// Where each part's returns may go.
    pub goes: Vec<Goes>,
    /// Where a return may go whose part an indirect call reaches.
    pub indirect: BTreeSet<LinkVa>,
    /// Calls whose callee only the run knows, where they stand in the file, and what they return to.
    pub open_calls: Vec<(Option<LinkVa>, LinkVa)>,
    /// Parts that jump to where only the run knows, and where such jumps stand in the file.
    pub open_jumps: BTreeMap<u32, BTreeSet<Option<LinkVa>>>,
    /// The parts that each jumps to.
    pub jumps: Vec<BTreeSet<u32>>,
    /// Parts whose address is taken.
    pub taken: BTreeSet<u32>,
    /// Parts that are entered in a way that no analysis of calls explains.
    pub odd: BTreeSet<u32>,
    /// Parts that no compiler made.
    pub assembly: BTreeSet<u32>,
    /// Parts with an `__fentry__` site.
    pub traced: BTreeSet<u32>,
    /// Whether each part may be left with the frame of a part that is not traced, and whose callers are not all known.
    pub open: Vec<bool>,
    /// Parts that start behind the ENDBR64 of their function.
    behind_endbr: BTreeSet<u32>,
}

/// What is gathered about the parts before frames are followed.
struct Gathered {
    /// The end of `.text`.
    end: LinkVa,
    starts: Vec<LinkVa>,
    back: Vec<BTreeSet<LinkVa>>,
    replaced: Vec<BTreeSet<LinkVa>>,
    /// Jumps from part to part.
    jumps: Vec<BTreeSet<u32>>,
    /// Calls whose callee only the run knows, where they stand in the file, and what they return to.
    open_calls: Vec<(Option<LinkVa>, LinkVa)>,
    /// Parts that jump to where only the run knows, and where such jumps stand in the file.
    open_jumps: BTreeMap<u32, BTreeSet<Option<LinkVa>>>,
    /// Parts that are entered in a way that no analysis of calls explains.
    odd: BTreeSet<u32>,
    /// Parts that code calls which is freed after boot.
    early: BTreeSet<u32>,
}

impl Gathered {
    fn part(&self, at: LinkVa) -> Option<u32> {
        let after = self.starts.partition_point(|start| *start <= at);
        after.checked_sub(1).map(|part| part as u32)
    }

    /// A call in the file, or in a replacement.
    fn call(&mut self, kernel: &Kernel, to: LinkVa, back: LinkVa, replaced: bool) {
        let list = match replaced {
            true => &mut self.replaced,
            false => &mut self.back,
        };
        let after = self.starts.partition_point(|start| *start <= to);
        let part = after.checked_sub(1).map(|part| part as u32);
        let Some(part) = part.filter(|_| kernel.in_text(to)) else {
            return;
        };
        match self.starts[part as usize] == to {
            true => _ = list[part as usize].insert(back),
            false => _ = self.odd.insert(part),
        }
    }

    /// A jump in this part, to where only the run knows.
    fn open_jump(&mut self, from: u32, at: Option<LinkVa>) {
        self.open_jumps.entry(from).or_default().insert(at);
    }

    fn jump(&mut self, from: u32, to: LinkVa) {
        // What initialises is gone by the time that anything is checked.
        if to >= self.end {
            return;
        }
        if let Some(to) = self.part(to).filter(|to| *to != from) {
            self.jumps[from as usize].insert(to);
        }
    }
}

impl Parts {
    /// Derives all of it; `redirected` are the functions of which some variant leads calls elsewhere, or leaves them out: what stands
    /// before a return address does not name them in every view.
    pub fn of(kernel: &Kernel, redirected: &BTreeSet<LinkVa>) -> Result<Parts, KernelError> {
        let mut starts: Vec<LinkVa> = kernel.tables.fentry.clone();
        let code = kernel.symbols.iter();
        let code = code.filter(|symbol| symbol.is_code());
        starts.extend(code.map(|symbol| symbol.at));
        starts.retain(|at| kernel.in_text(*at));
        starts.sort_unstable();
        starts.dedup();
        let count = starts.len();
        let mut gathered = Gathered {
            end: kernel.text.end,
            starts,
            back: vec![BTreeSet::new(); count],
            replaced: vec![BTreeSet::new(); count],
            jumps: vec![BTreeSet::new(); count],
            open_calls: Vec::new(),
            open_jumps: BTreeMap::new(),
            odd: BTreeSet::new(),
            early: BTreeSet::new(),
        };
        let mut behind_endbr = BTreeSet::new();
        // ENDBR64 before an `__fentry__` site is a part that runs on into the next.
        for part in 1..count {
            let (before, start) = (gathered.starts[part - 1], gathered.starts[part]);
            if start.0 == before.0 + 4
                && kernel.vmlinux.bytes(before, 4) == Some(&[0xf3, 0x0f, 0x1e, 0xfa])
            {
                gathered.jump(part as u32 - 1, start);
                behind_endbr.insert(part as u32);
            }
        }
        branches(kernel, &mut gathered)?;
        tables(kernel, &mut gathered)?;
        gathered.early = early(kernel, &gathered);
        let taken = sets::entries(kernel)?.required;
        let taken = taken.into_iter().filter_map(|at| gathered.part(at));
        let taken: BTreeSet<u32> = taken.collect();
        let assembly = assembly(kernel, &gathered)?;
        gathered.odd.extend(&assembly);
        // The one call whose thunk stands between it and the callee (pass `module-free`).
        let between = kernel.symbols.find("module_arch_cleanup");
        let between = between.and_then(|at| gathered.part(at));
        gathered.odd.extend(between);
        let redirected = redirected.iter().filter_map(|at| gathered.part(*at));
        let redirected: Vec<u32> = redirected.collect();
        gathered.odd.extend(redirected);
        let traced: FxHashSet<LinkVa> = kernel.tables.fentry.iter().copied().collect();
        let starts = gathered.starts.iter().zip(0..);
        let starts = starts.filter(|(start, _)| has_fentry(kernel, &traced, **start));
        let traced = starts.map(|(_, part)| part).collect();
        let mut parts = follow(gathered, &taken, assembly, traced);
        parts.behind_endbr = behind_endbr;
        Ok(parts)
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.starts.len() as u32
    }

    /// From where a part starts to where the next one does; `end` is that of the text.
    pub fn range(&self, part: u32, end: LinkVa) -> VaRange {
        VaRange {
            start: self.start(part),
            end: self.starts.get(part as usize + 1).copied().unwrap_or(end),
        }
    }

    /// Where a part starts.
    pub fn start(&self, part: u32) -> LinkVa {
        self.starts[part as usize]
    }

    /// Where the function of a part starts that begins behind its ENDBR64; else where the part does.
    pub fn entry(&self, part: u32) -> LinkVa {
        let before = u32::from(self.behind_endbr.contains(&part));
        self.start(part - before)
    }

    /// The part around `at`.
    pub fn part(&self, at: LinkVa) -> Option<u32> {
        let after = self.starts.partition_point(|start| *start <= at);
        after.checked_sub(1).map(|part| part as u32)
    }
}

/// What the text says.
fn branches(kernel: &Kernel, gathered: &mut Gathered) -> Result<(), KernelError> {
    let thunks = kernel.thunk_text()?;
    let is_thunk = |at: LinkVa| thunks.iter().any(|range| range.contains(at));
    let ret = kernel.symbols.find("__x86_return_thunk");
    let trampolines = kernel
        .symbols
        .between("__static_call_text_start", "__static_call_text_end")?;
    let paravirt: FxHashSet<LinkVa> = kernel
        .tables
        .paravirt
        .iter()
        .map(|site| site.start)
        .collect();
    for branch in &kernel.sweep.branches {
        if is_thunk(branch.at) || paravirt.contains(&branch.at) {
            continue;
        }
        match branch.back {
            Some(back) if is_thunk(branch.to) => {
                gathered.open_calls.push((Some(branch.at), back));
            }
            Some(back) => gathered.call(kernel, branch.to, back, false),
            None => {
                let Some(from) = gathered.part(branch.at) else {
                    continue;
                };
                if !kernel.in_text(branch.to) {
                    for to in outside(kernel, branch.to) {
                        gathered.jump(from, to);
                    }
                } else if Some(branch.to) != ret {
                    let own = gathered.part(branch.to) == Some(from);
                    if !own && (is_thunk(branch.to) || trampolines.contains(branch.to)) {
                        gathered.open_jump(from, Some(branch.at));
                    }
                    gathered.jump(from, branch.to);
                }
            }
        }
    }
    for branch in &kernel.sweep.open_branches {
        match branch.back {
            Some(_) if is_thunk(branch.at) || paravirt.contains(&branch.at) => {}
            Some(back) => gathered.open_calls.push((Some(branch.at), back)),
            None => {
                if let Some(from) = gathered.part(branch.at) {
                    gathered.open_jump(from, Some(branch.at));
                }
            }
        }
    }
    Ok(())
}

/// What the tables say about places that are rewritten or jumped from without a branch.
fn tables(kernel: &Kernel, gathered: &mut Gathered) -> Result<(), KernelError> {
    let tables = &kernel.tables;
    for site in tables
        .paravirt
        .iter()
        .filter(|site| kernel.in_text(site.start))
    {
        let back = LinkVa(site.start.0 + 5);
        gathered.open_calls.push((Some(site.start), back));
    }
    for at in tables.static_calls.iter().filter(|at| kernel.in_text(**at)) {
        // A jump there is a tail call, of the trampoline as the file has it.
        if kernel.vmlinux.bytes(*at, 1) == Some(&[0xe8]) {
            gathered.open_calls.push((Some(*at), LinkVa(at.0 + 5)));
        }
    }
    let thunks = kernel.thunk_text()?;
    for alternative in &tables.alternatives {
        let site = alternative.site.start;
        let (Some(code), true) = (kernel.bytes(alternative.replacement), kernel.in_text(site))
        else {
            continue;
        };
        let start = alternative.replacement.start.0;
        for instruction in Decoder::with_ip(64, code, start, DecoderOptions::NONE) {
            let direct = instruction.op0_kind() == OpKind::NearBranch64;
            let to = direct.then(|| LinkVa(instruction.near_branch_target()));
            let jumps = matches!(
                instruction.flow_control(),
                FlowControl::UnconditionalBranch
                    | FlowControl::ConditionalBranch
                    | FlowControl::IndirectBranch
            );
            let back = LinkVa(site.0 + (instruction.next_ip() - start));
            match to {
                _ if super::kernel::sweep::is_call(&instruction) => match to {
                    Some(to) if !thunks.iter().any(|range| range.contains(to)) => {
                        gathered.call(kernel, to, back, true);
                    }
                    _ => gathered.open_calls.push((None, back)),
                },
                _ if !jumps => {}
                Some(to) if kernel.in_text(to) => {
                    if let Some(from) = gathered.part(site) {
                        let ret = kernel.symbols.find("__x86_return_thunk") == Some(to);
                        if !ret && thunks.iter().any(|range| range.contains(to)) {
                            gathered.open_jump(from, None);
                        }
                        gathered.jump(from, to);
                    }
                }
                Some(to) => {
                    for to in outside(kernel, to) {
                        if let Some(from) = gathered.part(site) {
                            gathered.jump(from, to);
                        }
                    }
                }
                None => {
                    if let Some(from) = gathered.part(site) {
                        gathered.open_jump(from, None);
                    }
                }
            }
        }
    }
    for (at, to) in &tables.silent_jumps {
        let inside = kernel.in_text(*at) && kernel.in_text(*to);
        if let Some(from) = gathered.part(*at).filter(|_| inside) {
            gathered.jump(from, *to);
        }
    }
    Ok(())
}

/// Parts whose start code branches to that is freed after boot.
fn early(kernel: &Kernel, gathered: &Gathered) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    for name in FREED {
        let Ok(section) = kernel.vmlinux.section(name) else {
            continue;
        };
        let code = Sweep::alone(section.range.start, kernel.vmlinux.section_bytes(section));
        let starts = code.branches.iter().filter_map(|branch| {
            let part = gathered.part(branch.to)?;
            (gathered.starts[part as usize] == branch.to).then_some(part)
        });
        found.extend(starts);
    }
    found
}

/// Parts that no compiler made: these may switch stacks.
fn assembly(kernel: &Kernel, gathered: &Gathered) -> Result<BTreeSet<u32>, KernelError> {
    let btf = Btf::read(&kernel.vmlinux)?;
    let types: FxHashSet<&[u8]> = btf.functions().collect();
    let trampolines = kernel
        .symbols
        .between("__static_call_text_start", "__static_call_text_end")?;
    let mut made: BTreeSet<u32> = BTreeSet::new();
    let fentry = &kernel.tables.fentry;
    made.extend(fentry.iter().filter_map(|at| gathered.part(*at)));
    for symbol in kernel.symbols.iter() {
        // GCC's clones (gcc/cgraphclones.cc); trampolines do nothing but jump.
        let clone = [".cold", ".constprop.", ".isra.", ".part."];
        let clone = clone.iter().any(|suffix| symbol.name.contains(suffix));
        if clone || trampolines.contains(symbol.at) || types.contains(symbol.name.as_bytes()) {
            let part = gathered.part(symbol.at);
            let part = part.filter(|part| gathered.starts[*part as usize] == symbol.at);
            made.extend(part);
        }
    }
    let all = 0..gathered.starts.len() as u32;
    Ok(all.filter(|part| !made.contains(part)).collect())
}

/// Where a few instructions outside `.text` go on.
fn outside(kernel: &Kernel, at: LinkVa) -> Vec<LinkVa> {
    let Some(code) = kernel.vmlinux.bytes(at, OUTSIDE) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for instruction in Decoder::with_ip(64, code, at.0, DecoderOptions::NONE) {
        match instruction.flow_control() {
            FlowControl::Next => {}
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                found.push(LinkVa(instruction.near_branch_target()));
                if instruction.flow_control() == FlowControl::UnconditionalBranch {
                    break;
                }
            }
            _ => break,
        }
    }
    found
}

/// Follows the frames of every part that is called to where they can get by jumps.
fn follow(
    gathered: Gathered,
    taken: &BTreeSet<u32>,
    assembly: BTreeSet<u32>,
    traced: BTreeSet<u32>,
) -> Parts {
    let count = gathered.starts.len();
    let mut entered = vec![false; count];
    for to in gathered.jumps.iter().flatten() {
        entered[*to as usize] = true;
    }
    let mut callees: Vec<BTreeSet<u32>> = vec![BTreeSet::new(); count];
    let mut open = vec![false; count];
    let mut untraced = vec![false; count];
    let mut odd = vec![false; count];
    // Of parts that nobody is seen to call, their own frames are as good as any.
    let mut known = vec![false; count];
    let back = gathered.open_calls.iter().map(|(_, back)| *back);
    let mut indirect: BTreeSet<LinkVa> = back.collect();
    for part in 0..count as u32 {
        let at = part as usize;
        let called = !gathered.back[at].is_empty() || !gathered.replaced[at].is_empty();
        let is_taken = taken.contains(&part);
        // Its frames lie outside the text, and are gone.
        let early = gathered.early.contains(&part);
        let alone = !called && !is_taken && !early && !entered[at];
        let is_odd = gathered.odd.contains(&part);
        if !(called || is_taken || early || alone || is_odd) {
            continue;
        }
        let mut seen = BTreeSet::from([part]);
        let mut next = vec![part];
        let mut escapes = false;
        while let Some(reached) = next.pop() {
            let to = reached as usize;
            if called {
                callees[to].insert(part);
            }
            known[to] |= called || is_taken || early;
            open[to] |= is_taken || alone;
            untraced[to] |= (is_taken || alone) && !traced.contains(&part);
            odd[to] |= is_odd;
            escapes |= gathered.open_jumps.contains_key(&reached);
            next.extend(gathered.jumps[to].iter().filter(|to| seen.insert(**to)));
        }
        if escapes {
            indirect.extend(&gathered.back[at]);
            indirect.extend(&gathered.replaced[at]);
        }
    }
    let goes = (0..count).map(|at| {
        if odd[at] || !known[at] || callees[at].len() > MOST_CALLEES {
            return Goes::Anywhere;
        }
        Goes::Behind {
            callees: std::mem::take(&mut callees[at]),
            indirect: open[at],
        }
    });
    Parts {
        goes: goes.collect(),
        starts: gathered.starts,
        back: gathered.back,
        replaced: gathered.replaced,
        indirect,
        open_calls: gathered.open_calls,
        open_jumps: gathered.open_jumps,
        jumps: gathered.jumps,
        taken: taken.clone(),
        odd: gathered.odd,
        assembly,
        traced,
        open: untraced,
        behind_endbr: BTreeSet::new(),
    }
}

/// The return addresses that need no call: the code that is pushed as one, and what a kprobe's INT3 stands before.
pub fn without_call(kernel: &Kernel, sites: &BTreeSet<LinkVa>) -> BTreeSet<LinkVa> {
    let probed = sites.iter().copied().filter(|at| {
        let before = LinkVa(at.0.wrapping_sub(5));
        kernel.in_text(before) && kernel.vmlinux.bytes(before, 1) == Some(&[0xcc])
    });
    let mut found: BTreeSet<LinkVa> = probed.collect();
    found.extend(sets::pushed(kernel));
    found
}

/// How many calls return to each part, for messages.
pub fn counted(parts: &Parts) -> BTreeMap<&'static str, u64> {
    let behind = |wanted: bool| {
        let of = move |goes: &&Goes| matches!(goes, Goes::Behind { indirect, .. } if *indirect == wanted);
        parts.goes.iter().filter(of).count() as u64
    };
    BTreeMap::from([
        ("parts behind direct calls only", behind(false)),
        ("parts behind indirect calls too", behind(true)),
    ])
}
