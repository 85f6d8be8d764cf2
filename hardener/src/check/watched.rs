//! Functions outside a profile, which are not entered, probed ones, of which it is reported, and those with large frames, which are
//! entered where there is room for them. Which these are is a claim of the manifest's; proved is:
//!
//! - rule 3: every direct call and jump to one is edited, but for those that nobody may edit;
//! - rule 4: each edit goes to a thunk that names that function, and says how much stack it needs if it is about that; the one behind
//!   it goes on where there is so much, and for interrupts and kernel threads; for tasks it reports, and does what the pass says;
//! - rule 5: each is the first byte of a function that the kernel can trace; where the pass says so, no table of entries and no class
//!   has one; and those with large frames are all that there are.

use super::Subject;
use super::cave::CaveImage;
use super::exec::exits::Report;
use super::kernel::Kernel;
use super::kernel::btf::Btf;
use super::kernel::sweep::Branch;
use super::kernel::symbols::hex;
use super::large_frames::{self, Limits, STACK};
use super::owed::has_fentry;
use super::report::Findings;
use super::slots::{Original, Replacement};
use super::violations::Reported;
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Register};
use penumbra_bundle::{Bundle, LinkVa, Offending, TextOff, VaRange, ViolationAction};
use rustc_hash::FxHashSet;
use std::collections::{BTreeMap, BTreeSet};

/// The passes.
pub const DEBLOAT: &str = "debloat";
pub const PROBE: &str = "probe";
pub const STACK_DEPTH: &str = large_frames::PASS;
pub const PASSES: [&str; 3] = [DEBLOAT, PROBE, STACK_DEPTH];
/// The parameter by which it counts more as inside than the profile has: part of the claim.
pub const WIDEN: &str = "widen";
/// The parameter by which indirect branches may not reach what is outside either.
pub const TARGETS: &str = "targets";
const NARROWED: &str = "profile";

/// How far behind a function's start its `__fentry__` site may stand.
const ENDBR64: u64 = 4;
/// `out %al,$PORT`, by what follows: the report is gone on with, or not.
const LOG: u64 = 0xe4;
const FATAL: u64 = 0xe5;
/// More bytes than any of these thunks has.
const LONGEST: u64 = 128;
/// The register that holds the function's address: r11. Like r10 and the flags it is lost to whoever calls a function that was
/// compiled for tracing (`has_fentry`).
const FUNCTION: u8 = 11;
/// `NMI_MASK`, `HARDIRQ_MASK` and `SOFTIRQ_OFFSET` of the preemption count (include/linux/preempt.h).
const INTERRUPT: u64 = 0xff_0100;
/// `PF_KTHREAD` (include/linux/sched.h): which byte of a task's flags, and which bit of it.
const KTHREAD: (u64, u64) = (2, 0x20);

/// Where the functions start that the bundle says are watched, and by which pass. One in several lists counts for the last of them here.
pub fn claimed(bundle: &Bundle) -> BTreeMap<LinkVa, &'static str> {
    let text = bundle.manifest.text.start.0;
    let Some(watched) = &bundle.watched else {
        return BTreeMap::new();
    };
    let lists = [
        (&watched.large, STACK_DEPTH),
        (&watched.probed, PROBE),
        (&watched.outside, DEBLOAT),
    ];
    let all = lists.into_iter().flat_map(|(list, pass)| {
        let places = list
            .iter()
            .map(move |at| text.wrapping_add(u64::from(at.0)));
        places.map(move |at| (LinkVa(at), pass))
    });
    all.collect()
}

/// Where indirect branches may not go, though they could without the pass.
pub fn unreachable<'a>(subject: &'a Subject<'_>) -> impl Iterator<Item = &'a LinkVa> {
    let mut passes = subject.variants().flat_map(|(variant, _)| &variant.passes);
    let narrowed = passes.any(|pass| {
        let targets = pass.parameters.get(TARGETS);
        pass.name == DEBLOAT && targets.is_some_and(|targets| targets == NARROWED)
    });
    let outside = subject.thunks.watched.iter();
    let outside = outside.filter(move |(_, pass)| narrowed && **pass == DEBLOAT);
    outside.map(|(at, _)| at)
}

/// Direct branches that enter a function of `pass`, but for the one that another pass edits.
pub fn into<'a>(subject: &'a Subject<'_>, pass: &'a str) -> impl Iterator<Item = &'a Branch> {
    let kernel = subject.kernel;
    let free = subject.thunks.module_free.map(|(call, _)| call);
    let mut traced = kernel.tables.fentry.clone();
    traced.sort_unstable();
    kernel.sweep.branches.iter().filter(move |branch| {
        // A jump back to where its own function starts. One that lost its name to another still has its site.
        let own = || {
            let after = traced.partition_point(|site| *site <= branch.at);
            let site = traced[..after].last().copied().unwrap_or(branch.to);
            let around = kernel.symbols.around(branch.at);
            branch.back.is_none()
                && around.is_some_and(|range| range.start == branch.to)
                && site.0 <= branch.to.0 + ENDBR64
        };
        let watched = subject.thunks.watched.get(&branch.to);
        watched == Some(&pass) && Some(branch.at) != free && !own()
    })
}

/// Rule 3: no direct branch to such a function is left alone that could be edited; `forbids` says of which it is not so.
pub fn all_stopped(
    subject: &Subject<'_>,
    forbids: impl Fn(LinkVa, LinkVa) -> bool,
    findings: &mut Findings<'_>,
) {
    let kernel = subject.kernel;
    let mut left = 0;
    for (variant, edits) in subject.variants() {
        let passes = variant.passes.iter().map(|pass| pass.name.as_str());
        let passes = passes.filter(|pass| PASSES.contains(pass));
        let into: Vec<&Branch> = passes.flat_map(|pass| into(subject, pass)).collect();
        if into.is_empty() {
            continue;
        }
        let edited: FxHashSet<LinkVa> = edits.iter().map(|edit| subject.place(edit)).collect();
        for branch in into.iter().filter(|branch| !edited.contains(&branch.at)) {
            let slot = matches!(
                subject.thunks.original(kernel, branch.at),
                Some((Original::Direct { .. }, _))
            );
            if slot && !forbids(branch.at, LinkVa(branch.at.0 + 5)) {
                let to = hex(branch.to);
                let what = format!("enters {to}, which is watched, past its thunk");
                findings.broken(Some(&variant.name), Some(branch.at), what);
            } else {
                left += 1;
            }
        }
    }
    if left > 0 {
        findings.proved("branches to watched functions left for a reason", left);
    }
}

/// Rule 4: the thunks of all edited calls and jumps, and what they report.
pub fn thunks(subject: &Subject<'_>, findings: &mut Findings<'_>) -> Vec<Reported> {
    let mut entered: BTreeMap<(LinkVa, LinkVa), Result<Stub, String>> = BTreeMap::new();
    let mut shared: BTreeMap<LinkVa, Result<Stops, String>> = BTreeMap::new();
    let mut slots = 0;
    let limits = limits(subject);
    if limits.is_none() && said_limits(subject).next().is_some() {
        let what = format!("pass {STACK_DEPTH} does not say what it asks for");
        findings.broken(None, None, what);
    }
    let frames = limits.map_or_else(BTreeMap::new, |limits| {
        large_frames::frames(subject.kernel, limits)
    });
    let needs = |function: LinkVa| Some(limits?.need(*frames.get(&function)?));
    for (variant, edit) in subject.edits() {
        let at = subject.place(edit);
        let original = subject.thunks.original(subject.kernel, at);
        let Some((Original::Direct { to: function, .. }, _)) = original else {
            continue;
        };
        let thunk = subject.check_of(edit);
        let (Some(Replacement::Call(thunk) | Replacement::Jump(thunk)), Ok(image)) =
            (thunk, subject.cave)
        else {
            continue;
        };
        let code = Thunk { subject, image };
        let first = entered
            .entry((thunk, function))
            .or_insert_with(|| code.stands_for(thunk, function));
        let proved = first.clone().and_then(|stub| {
            let behind = stub.behind;
            let report = shared.entry(behind).or_insert_with(|| code.stops(behind));
            let report = report.as_mut().map_err(|what| what.clone())?;
            let pass = subject.thunks.watched.get(&function).copied();
            let pass = pass.unwrap_or(DEBLOAT);
            if *report.pass.get_or_insert(pass) != pass {
                return Err("goes to what another pass's functions share".to_owned());
            }
            let deep = pass == STACK_DEPTH;
            if stub.need != needs(function).filter(|_| deep) {
                return code.wrong(thunk, "does not say how much stack the function needs");
            }
            let window = limits.filter(|_| deep).map(Limits::window);
            if report.window != window {
                return code.wrong(behind, "does not ask for stack as the pass says");
            }
            Ok(())
        });
        match proved {
            Ok(()) => slots += 1,
            Err(what) => findings.broken(Some(variant), Some(at), what),
        }
    }
    if slots > 0 {
        findings.proved("calls and jumps to watched functions", slots);
        findings.proved("thunks that stand for a function", entered.len() as u64);
    }
    let shared = shared.into_values().flatten();
    let reported = shared.map(|stops| Reported {
        at: stops.at,
        report: stops.report,
        pass: stops.pass.unwrap_or(DEBLOAT),
        offending: Offending::Register(FUNCTION),
    });
    reported.collect()
}

/// How much is asked for of the stack, where anything is: the same in all variants.
fn limits(subject: &Subject<'_>) -> Option<Limits> {
    let mut all = said_limits(subject);
    let first = all.next()??;
    all.all(|other| other == Some(first)).then_some(first)
}

/// What each variant that has the pass says of it.
fn said_limits<'a>(subject: &'a Subject<'_>) -> impl Iterator<Item = Option<Limits>> + 'a {
    let passes = subject.variants().flat_map(|(variant, _)| &variant.passes);
    let passes = passes.filter(|pass| pass.name == STACK_DEPTH);
    passes.map(Limits::of)
}

/// A thunk that stands for a function.
#[derive(Clone, Copy)]
struct Stub {
    /// How much stack the function needs, if it says so.
    need: Option<u64>,
    /// Where it goes on.
    behind: LinkVa,
}

/// What the thunks of a pass share.
struct Stops {
    /// Where it reports.
    at: LinkVa,
    report: Report,
    /// How far above the size of a stack the sum of what is used and needed may lie for it to report; none where it does not ask.
    window: Option<u64>,
    /// The pass, once it is known by a function that leads here.
    pass: Option<&'static str>,
}

/// Thunks as instructions.
struct Thunk<'a> {
    subject: &'a Subject<'a>,
    image: &'a CaveImage,
}

impl Thunk<'_> {
    fn wrong<T>(&self, at: LinkVa, what: &str) -> Result<T, String> {
        let name = self.image.describe(at);
        Err(format!("goes to {name}, which {what}"))
    }

    /// The instructions from `at` on.
    fn code(&self, at: LinkVa) -> Vec<Instruction> {
        let end = at.0.saturating_add(LONGEST).min(self.image.thunks.end.0);
        let range = VaRange {
            start: at,
            end: LinkVa(end),
        };
        if range.is_empty() || !self.image.thunks.encloses(&range) {
            return Vec::new();
        }
        let bytes = self.image.slice(&self.subject.bundle.manifest.cave, range);
        let decoder = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE);
        decoder.into_iter().collect()
    }

    /// `lea FUNCTION(%rip),%r11; jmp BEHIND`, perhaps by another jump, and perhaps `mov $NEED,%r10d` before it.
    fn stands_for(&self, at: LinkVa, function: LinkVa) -> Result<Stub, String> {
        let mut code = self.code(at);
        let names = code.first().is_some_and(|first| {
            first.code() == Code::Lea_r64_m
                && first.op0_register() == Register::R11
                && first.is_ip_rel_memory_operand()
                && first.ip_rel_memory_address() == function.0
        });
        let need = code.get(1).filter(|second| {
            second.code() == Code::Mov_r32_imm32 && second.op0_register() == Register::R10D
        });
        let need = need.map(|second| second.immediate(1));
        if need.is_some() {
            code.remove(1);
        }
        match code.get(1).and_then(jumps_to) {
            Some(to) if names => {
                let island = self.code(to);
                let behind = island.first().and_then(jumps_to).unwrap_or(to);
                Ok(Stub { need, behind })
            }
            _ => self.wrong(at, "does not stand for the function that was called"),
        }
    }

    /// Goes on to r11 where there is stack enough, if it asks, and in interrupts and kernel threads; what it reports in other tasks,
    /// and does then. Registers but r10 and the flags are not touched, nor is the stack.
    fn stops(&self, at: LinkVa) -> Result<Stops, String> {
        let mut code = self.code(at);
        let asked = self.asks_for_stack(&code);
        if asked.is_some() {
            code.drain(..STACK_ASKED);
        }
        let Some(task) = Task::of(self.subject.kernel) else {
            return self.wrong(at, "asks for a task that this kernel does not describe");
        };
        let [count, busy, current, flags, thread, out, ..] = &code[..] else {
            return self.wrong(at, "is no thunk");
        };
        let asks = count.code() == Code::Test_rm32_imm32
            && is_per_cpu(count, task.preempt_count)
            && count.immediate(1) == INTERRUPT
            && current.code() == Code::Mov_r64_rm64
            && current.op0_register() == Register::R10
            && is_per_cpu(current, task.current)
            && flags.code() == Code::Test_rm8_imm8
            && flags.memory_base() == Register::R10
            && flags.memory_index() == Register::None
            && flags.segment_prefix() == Register::None
            && flags.memory_displacement64() == task.flags + KTHREAD.0
            && flags.immediate(1) == KTHREAD.1;
        let branches = [busy, thread];
        let branches = branches.map(|branch| {
            let jne = matches!(branch.code(), Code::Jne_rel8_64 | Code::Jne_rel32_64);
            jne.then(|| branch.near_branch_target())
        });
        let (Some(on), true) = (branches[0], branches[0] == branches[1] && asks) else {
            return self.wrong(at, "does not ask for whom the function is called");
        };
        if asked.is_some_and(|(_, enough)| enough != on) {
            return self.wrong(at, "goes elsewhere where there is stack enough");
        }
        let jumps = |index: usize, to: Option<LinkVa>| {
            code.get(index).is_some_and(|jump| {
                jump.code() == Code::Jmp_rel32_64
                    && to.is_some_and(|to| jump.near_branch_target() == to.0)
            })
        };
        let goes_on = |index: usize| {
            let indirect = self.subject.thunks.indirect.iter();
            let mut r11 = indirect.filter(|(_, register)| **register == FUNCTION);
            code.get(index).is_some_and(|one| one.ip() == on)
                && jumps(index, r11.next().map(|(at, _)| *at))
        };
        let port = out
            .try_immediate(0)
            .ok()
            .filter(|_| out.code() == Code::Out_imm8_AL && out.op1_register() == Register::AL);
        let is =
            |index: usize, wanted: Code| code.get(index).map(Instruction::code) == Some(wanted);
        let (action, message) = match port {
            Some(LOG) if goes_on(6) => (ViolationAction::Log, None),
            Some(FATAL) if is(6, Code::Ud2) && goes_on(7) => (ViolationAction::Kill, None),
            Some(FATAL) if is(6, Code::Mov_rm64_imm32) && goes_on(9) => {
                let none = matches!(code[7].code(), Code::Xor_rm32_r32 | Code::Xor_r32_rm32)
                    && code[7].op0_register() == Register::EAX
                    && code[7].op1_register() == Register::EAX;
                if code[6].op0_register() != Register::RDI
                    || !none
                    || !jumps(8, Some(self.subject.thunks.panic))
                {
                    return self.wrong(at, "does not call panic as it is called");
                }
                (ViolationAction::Panic, Some(code[6].immediate(1)))
            }
            Some(LOG) => return self.wrong(at, "does not go on into the function"),
            Some(FATAL) => return self.wrong(at, "reports that it does not go on, and goes on"),
            _ => return self.wrong(at, "does not report"),
        };
        Ok(Stops {
            at: LinkVa(out.ip()),
            report: Report { action, message },
            window: asked.map(|(window, _)| window),
            pass: None,
        })
    }

    /// `sub %rsp,%r10; add %gs:TOP,%r10; sub $(STACK+1),%r10; cmp $WINDOW,%r10; jae ENOUGH`: the window, and where that is. By what it
    /// is given in r10, it goes on unless what is needed is more than what is left between RSP and the end of the task's stack, if
    /// that is the stack.
    fn asks_for_stack(&self, code: &[Instruction]) -> Option<(u64, u64)> {
        let kernel = self.subject.kernel;
        let [from, top, over, compare, branch] = code.first_chunk::<STACK_ASKED>()?;
        let btf = Btf::read(&kernel.vmlinux).ok()?;
        let own = kernel.symbols.find("cpu_current_top_of_stack");
        let stands = own.or_else(|| kernel.in_pcpu_hot(&btf, "top_of_stack"))?;
        let r10 = |one: &Instruction| one.op0_register() == Register::R10;
        let asks = matches!(from.code(), Code::Sub_rm64_r64 | Code::Sub_r64_rm64)
            && r10(from)
            && from.op1_register() == Register::RSP
            && top.code() == Code::Add_r64_rm64
            && r10(top)
            && is_per_cpu(top, stands.0)
            && over.code() == Code::Sub_rm64_imm32
            && r10(over)
            && over.immediate(1) == STACK + 1
            && compare.code() == Code::Cmp_rm64_imm32
            && r10(compare)
            && matches!(branch.code(), Code::Jae_rel8_64 | Code::Jae_rel32_64);
        asks.then(|| (compare.immediate(1), branch.near_branch_target()))
    }
}

/// How many instructions ask for stack.
const STACK_ASKED: usize = 5;

/// Whether a memory operand is the per-CPU variable at `at`.
fn is_per_cpu(instruction: &Instruction, at: u64) -> bool {
    instruction.memory_segment() == Register::GS
        && instruction.memory_base() == Register::None
        && instruction.memory_index() == Register::None
        && instruction.memory_displacement64() == at
}

/// Where an unconditional direct jump goes.
fn jumps_to(instruction: &Instruction) -> Option<LinkVa> {
    let jump = matches!(instruction.code(), Code::Jmp_rel8_64 | Code::Jmp_rel32_64);
    jump.then(|| LinkVa(instruction.near_branch_target()))
}

/// What tells for whom a function is called.
struct Task {
    preempt_count: u64,
    current: u64,
    flags: u64,
}

impl Task {
    fn of(kernel: &Kernel) -> Option<Task> {
        let btf = Btf::read(&kernel.vmlinux).ok()?;
        let per_cpu = |symbol: &str, member: &str| {
            let own = kernel.symbols.find(symbol);
            let found = own.or_else(|| kernel.in_pcpu_hot(&btf, member));
            found.map(|at| at.0)
        };
        Some(Task {
            preempt_count: per_cpu("__preempt_count", "preempt_count")?,
            current: per_cpu("current_task", "current_task")?,
            flags: btf.offset("task_struct", "flags")?.into(),
        })
    }
}

/// Rule 5: what has a large frame is claimed, unless another pass watches it, and nothing else is.
fn large(subject: &Subject<'_>, findings: &mut Findings<'_>) {
    let Some(limits) = limits(subject) else {
        return;
    };
    let watched = &subject.thunks.watched;
    let frames = large_frames::frames(subject.kernel, limits);
    let claimed = watched.iter().filter(|(_, pass)| **pass == STACK_DEPTH);
    if let Some((at, _)) = claimed.into_iter().find(|(at, _)| !frames.contains_key(at)) {
        let what = "is said to have a large frame, and has none".to_owned();
        findings.broken(None, Some(*at), what);
    }
    if let Some(at) = frames.keys().find(|at| !watched.contains_key(at)) {
        let what = "has a large frame, and no pass watches it".to_owned();
        findings.broken(None, Some(*at), what);
    }
    findings.proved("functions with large frames", frames.len() as u64);
}

/// Rule 5: the claim itself.
pub fn claims(subject: &Subject<'_>, findings: &mut Findings<'_>) {
    let kernel = subject.kernel;
    let passes = subject.variants().flat_map(|(variant, _)| &variant.passes);
    let names: BTreeSet<&str> = passes.map(|pass| pass.name.as_str()).collect();
    let nothing = Vec::new();
    let watched = subject.bundle.watched.as_ref();
    let lists = [
        watched.map_or(&nothing, |watched| &watched.outside),
        watched.map_or(&nothing, |watched| &watched.probed),
        watched.map_or(&nothing, |watched| &watched.large),
    ];
    for (pass, list) in PASSES.into_iter().zip(lists) {
        if !list.is_empty() && !names.contains(pass) {
            let what = format!("functions are watched for pass {pass}, which no variant has");
            findings.broken(None, None, what);
        }
    }
    let text = subject.bundle.manifest.text.start.0;
    let mut all: Vec<TextOff> = lists.into_iter().flatten().copied().collect();
    all.sort_unstable();
    if let Some(twice) = all.windows(2).find(|two| two[0] == two[1]) {
        let what = "is watched by two passes, which is one too many".to_owned();
        findings.broken(None, Some(LinkVa(text + u64::from(twice[0].0))), what);
    }
    large(subject, findings);
    let traced: FxHashSet<LinkVa> = kernel.tables.fentry.iter().copied().collect();
    let mut proved = 0;
    for at in subject.thunks.watched.keys() {
        if kernel.in_text(*at) && has_fentry(kernel, &traced, *at) {
            proved += 1;
            continue;
        }
        let what = "is watched, and is no function that the kernel can trace";
        findings.broken(None, Some(*at), what.to_owned());
    }
    if proved > 0 {
        findings.proved("watched functions", proved);
    }
}
