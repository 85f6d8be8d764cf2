//! Rule 4, what thunks do to the stack below RSP before the return's own check (pass `stack-clear`): marks lie in the frame that
//! has been left, no further down than every way to the return went; what clears, clears all that was written.
//!
//! That a stretch of zeros ends what was written is true when no frame has as much without a word that is not zero: each holds
//! the address to which it returns, and larger ones are marked.

mod clearing;
mod depth;

use super::Subject;
use super::cave::CaveImage;
use super::kernel::Kernel;
use super::owed::has_fentry;
use super::report::Findings;
use super::slots::{Original, Replacement, replacement};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register};
use penumbra_bundle::LinkVa;
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::{BTreeMap, BTreeSet};

/// The pass.
const PASS: &str = "stack-clear";
/// How the symbols of thunks begin that do this.
pub const PREFIX: &str = "stack_";
/// So many bytes of zeros mean that nothing below was written.
const UNUSED: i64 = 128;
/// No more than so many bytes lie between a mark and the next, or the return address: with the word by which an interrupt aligns
/// the stack, less than [`UNUSED`] bytes of zeros.
const SPACING: i64 = 112;
/// What the last function is called that runs before user mode (kernel/entry/common.c; include/linux/entry-common.h from Linux
/// 6.7 on), before what the compiler appends.
const LAST: [&str; 2] = [
    "exit_to_user_mode_prepare",
    "arch_exit_to_user_mode_prepare",
];
/// What functions are called that leave for user mode.
const LEAVING: &str = "exit_to_user_mode";

/// What a thunk does before it goes on to the next.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Does {
    /// Writes words that are not zero, so many bytes below RSP.
    Marks(BTreeSet<i64>),
    /// Clears the stack; whether it keeps r10, r11 and the flags.
    Clears(bool),
}

/// Checks the slots whose thunks do something to the stack.
pub fn check(subject: &Subject<'_>, findings: &mut Findings<'_>) {
    let Ok(image) = subject.cave else {
        return;
    };
    let kernel = subject.kernel;
    let named = |pass: &penumbra_bundle::PassSummary| pass.name == PASS;
    let traced: FxHashSet<LinkVa> = kernel.tables.fentry.iter().copied().collect();
    let traced_here = |start: LinkVa| has_fentry(kernel, &traced, start);
    let mut known: FxHashMap<LinkVa, Result<Does, String>> = FxHashMap::default();
    let mut depths = None;
    let (mut clearing, mut marked, mut unmarked) = (0, 0, 0);
    for (variant, edits) in subject.variants() {
        let pass = variant.passes.iter().find(|pass| named(pass));
        let mut edited = 0;
        let mut left: BTreeSet<LinkVa> = match pass {
            Some(_) => last_before_user(kernel).unwrap_or_default(),
            None => BTreeSet::new(),
        };
        let last: FxHashSet<LinkVa> = left.iter().copied().collect();
        for edit in edits {
            let at = subject.place(edit);
            let Some(Replacement::Jump(to)) = replacement(&edit.bytes, at) else {
                continue;
            };
            let original = subject.thunks.original(kernel, at);
            if !matches!(original, Some((Original::Return, _))) {
                continue;
            }
            let does = match image.fronts(to) {
                true => Some(known.entry(to).or_insert_with(|| {
                    front(subject, image, to).map_err(|(at, what)| {
                        format!(
                            "{} fails at {}, which {what}",
                            image.describe(to),
                            image.describe(at)
                        )
                    })
                })),
                false => None,
            };
            edited += u64::from(does.is_some());
            // Without a return that clears, marks are for nobody.
            if does.is_none() && last.is_empty() {
                continue;
            }
            let function = kernel.symbols.around(at).map(|range| range.start);
            let is_last = function.is_some_and(|start| last.contains(&start));
            if let Some(start) = function.filter(|_| is_last) {
                left.remove(&start);
            }
            let depths = depths.get_or_insert_with(|| depth::surely_used(kernel));
            let depth = depths.get(&at).copied().unwrap_or(0);
            let wrong = match does {
                Some(Err(what)) => Some(what.clone()),
                Some(Ok(Does::Clears(_))) if !is_last => {
                    Some("clears the stack, and does not run last before user mode".to_owned())
                }
                Some(Ok(Does::Clears(false))) if !function.is_some_and(traced_here) => {
                    Some("loses r10, r11 or flags in a function that is not traced".to_owned())
                }
                Some(Ok(Does::Clears(_))) => None,
                _ if is_last => {
                    Some("is a return before user mode that does not clear the stack".to_owned())
                }
                Some(Ok(Does::Marks(marks))) => fits(marks, depth),
                None => fits(&BTreeSet::new(), depth),
            };
            match (wrong, does) {
                (Some(what), _) => findings.broken(Some(&variant.name), Some(at), what),
                (None, Some(Ok(Does::Clears(_)))) => clearing += 1,
                (None, Some(_)) => marked += 1,
                (None, None) => unmarked += 1,
            }
        }
        if let Some(start) = left.first() {
            let what = "runs last before user mode, and none of its returns clears the stack";
            findings.broken(Some(&variant.name), Some(*start), what.to_owned());
        }
        let said = pass.map_or(0, |pass| pass.edited);
        if said != edited {
            let what = format!("pass {PASS} says {said} slots, {edited} clear or mark the stack");
            findings.broken(Some(&variant.name), None, what);
        }
    }
    if clearing + marked > 0 {
        findings.proved("returns before user mode that clear the stack", clearing);
        findings.proved("returns that mark large frames", marked);
        findings.proved("returns with frames too small for a mark", unmarked);
    }
}

/// What is wrong with marks, so many bytes below the return address, in a frame that is so deep at least.
fn fits(marks: &BTreeSet<i64>, depth: u32) -> Option<String> {
    let depth = i64::from(depth);
    let mut last = 0;
    for mark in marks {
        if *mark > depth {
            return Some(format!(
                "marks the stack {mark} bytes below the return address, where not every way has been: {depth} are sure"
            ));
        }
        if mark - last > SPACING {
            return Some(format!(
                "leaves the frame without a mark from {last} to {mark} bytes down"
            ));
        }
        last = *mark;
    }
    (depth - last >= SPACING)
        .then(|| format!("leaves a frame of {depth} bytes without a mark from {last} bytes down"))
}

/// The functions that run last before user mode: called by code between kernel and user mode only, which runs on a task's stack.
fn last_before_user(kernel: &Kernel) -> Option<BTreeSet<LinkVa>> {
    let range = kernel
        .symbols
        .between("__noinstr_text_start", "__noinstr_text_end");
    let between = range.ok()?;
    let leaving = kernel
        .symbols
        .iter()
        .filter(|symbol| symbol.name.contains(LEAVING));
    let leaving: BTreeMap<LinkVa, &str> = leaving
        .map(|symbol| (symbol.at, symbol.name.as_str()))
        .collect();
    let taken = super::sets::entries(kernel).ok()?.required;
    LAST.iter().find_map(|name| {
        let named = leaving.iter();
        let named = named.filter(|(_, full)| full.split('.').next() == Some(*name));
        let last = named.map(|(at, _)| *at).filter(|start| {
            let mut branches = kernel.sweep.branches.iter();
            let mut from = branches
                .by_ref()
                .filter(|branch| branch.to == *start)
                .peekable();
            from.peek().is_some()
                && from.all(|branch| {
                    let around = kernel.symbols.around(branch.at);
                    between.contains(branch.at)
                        || around.is_some_and(|range| leaving.contains_key(&range.start))
                })
                && !taken.contains(start)
        });
        let last: BTreeSet<LinkVa> = last.collect();
        (!last.is_empty()).then_some(last)
    })
}

/// What the thunk at `at` does, and the proof that it does no more; where it fails and how.
fn front(subject: &Subject<'_>, image: &CaveImage, at: LinkVa) -> Result<Does, (LinkVa, String)> {
    let cave = &subject.bundle.manifest.cave;
    let Some(next) = image.behind(cave, at) else {
        return Err((at, "leads to no other thunk".to_owned()));
    };
    let code = clearing::Code::read(image, cave, at);
    let marks = marks(&code, at, next);
    match marks {
        Some(marks) => Ok(Does::Marks(marks)),
        None => clearing::prove(&code, at, next).map(Does::Clears),
    }
}

/// The words that a thunk marks which does nothing else, as bytes below RSP.
fn marks(code: &clearing::Code, at: LinkVa, next: LinkVa) -> Option<BTreeSet<i64>> {
    let mut marks = BTreeSet::new();
    let mut at = at;
    loop {
        let instruction = code.at(at)?;
        at = LinkVa(instruction.next_ip());
        match instruction.code() {
            Code::Mov_rm64_r64
                if instruction.op0_kind() == OpKind::Memory
                    && instruction.op1_register() == Register::RSP
                    && instruction.memory_base() == Register::RSP
                    && instruction.memory_index() == Register::None
                    && instruction.segment_prefix() == Register::None =>
            {
                let below = -(instruction.memory_displacement64() as i64);
                // A word of the stack, below RSP, nowhere near the other end of the guard page.
                if below % 8 != 0 || !(8..=4096).contains(&below) {
                    return None;
                }
                marks.insert(below);
            }
            Code::Jmp_rel32_64 | Code::Jmp_rel8_64
                if instruction.near_branch_target() == next.0 =>
            {
                return Some(marks);
            }
            _ => return None,
        }
    }
}

impl CaveImage {
    /// Whether the thunk at `at` says by its name that it does something to the stack and goes on to another.
    pub fn fronts(&self, at: LinkVa) -> bool {
        self.name(at).is_some_and(|name| name.starts_with(PREFIX))
    }

    /// The thunk to which one goes on that does something to the stack: where its first jump leads. None of any other thunk.
    pub fn behind(&self, cave: &penumbra_bundle::Cave, at: LinkVa) -> Option<LinkVa> {
        if !self.fronts(at) || !self.thunks.contains(at) {
            return None;
        }
        let bytes = self.slice(
            cave,
            penumbra_bundle::VaRange {
                start: at,
                end: self.thunks.end,
            },
        );
        let mut decoder = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            if instruction.is_jmp_short_or_near() {
                let to = LinkVa(instruction.near_branch_target());
                // One behind another would be walked for ever.
                let other = self.name(to).is_some() && !self.fronts(to);
                return other.then_some(to);
            }
            if instruction.is_invalid() {
                return None;
            }
        }
        None
    }
}
