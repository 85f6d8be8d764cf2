//! Rules 1 and 3: each edit replaces one whole instruction by one of the same length, in a slot that nobody pokes.

use super::Subject;
use super::changeable::Changeable;
use super::exec::machine::{register_name, register_number};
use super::exposed::Exposed;
use super::kernel::symbols::hex;
use super::kernel::{Kernel, KernelError};
use super::report::{Findings, Rule, RuleReport};
use super::self_checks::{self, Gives, SelfCheck};
use super::watched;
use iced_x86::{Code, Decoder, DecoderOptions, Instruction};
use penumbra_bundle::{Edit, LinkVa, Mitigation, SlotKind, VaRange};
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::{BTreeMap, BTreeSet};
use yaxpeax_arch::LengthedInstruction;
use yaxpeax_x86::amd64::InstDecoder;

/// The pass that edits every return that it may.
const RETURN_CFI: &str = "return-cfi";
/// Which returns it edits: its parameter, and the values by which it leaves those out whose frames cannot be overrun, or whose
/// return addresses nothing can have changed.
const SCOPE: &str = "scope";
const BY_FRAME: &str = "frames";
const BY_CHANGE: &str = "changeable";

/// What stands in a slot in the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Original {
    /// `jmp __x86_return_thunk`.
    Return,
    /// `call __x86_indirect_thunk_reg`.
    Call(u8),
    /// `jmp __x86_indirect_thunk_reg`.
    Jump(u8),
    /// `call module_arch_cleanup` in `free_module`.
    ModuleFree(LinkVa),
    /// `call` or `jmp` to a watched function, or to one that only checks.
    Direct {
        /// The function.
        to: LinkVa,
        /// `jmp`.
        jump: bool,
    },
}

/// What an edit puts there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Replacement {
    /// A direct call.
    Call(LinkVa),
    /// A direct jump.
    Jump(LinkVa),
    /// `call *%reg`.
    CallRegister(u8),
    /// `jmp *%reg`.
    JumpRegister(u8),
    /// `ret`, then INT3: what the kernel itself writes into return sites.
    Ret,
    /// What a function gives back that is not called.
    Gives(Gives),
}

/// What slots lead to in the image: the kernel's own thunks, and functions that are called.
pub struct KernelThunks {
    /// `__x86_return_thunk`.
    pub ret: LinkVa,
    /// `__x86_indirect_thunk_*`, and the number of the register.
    pub indirect: FxHashMap<LinkVa, u8>,
    /// `panic`.
    pub panic: LinkVa,
    /// Where `free_module` calls `module_arch_cleanup`, and that. None when it does not do so once.
    pub module_free: Option<(LinkVa, LinkVa)>,
    /// Where the functions start that the bundle claims are watched, and by which pass.
    pub watched: BTreeMap<LinkVa, &'static str>,
    /// Where the functions start that only check.
    pub checks: BTreeMap<LinkVa, SelfCheck>,
}

impl KernelThunks {
    /// Finds them by name.
    pub fn find(
        kernel: &Kernel,
        watched: BTreeMap<LinkVa, &'static str>,
    ) -> Result<KernelThunks, KernelError> {
        let find = |name| {
            kernel.symbols.find(name).ok_or(KernelError::Missing {
                what: "symbol",
                name,
            })
        };
        let indirect = kernel.symbols.iter().filter_map(|symbol| {
            let register = symbol.name.strip_prefix("__x86_indirect_thunk_")?;
            Some((symbol.at, register_number(register)?))
        });
        Ok(KernelThunks {
            ret: find("__x86_return_thunk")?,
            indirect: indirect.collect(),
            panic: find("panic")?,
            module_free: module_free(kernel),
            watched,
            checks: self_checks::find(kernel),
        })
    }

    /// What the image has at `at`, and how long that is.
    pub fn original(&self, kernel: &Kernel, at: LinkVa) -> Option<(Original, usize)> {
        if let Some((_, cleanup)) = self.module_free.filter(|(call, _)| *call == at) {
            return Some((Original::ModuleFree(cleanup), 5));
        }
        self.original_in(kernel.vmlinux.bytes(at, 15)?, at)
    }

    /// What `bytes` are at `at`, and how long that is.
    pub fn original_in(&self, bytes: &[u8], at: LinkVa) -> Option<(Original, usize)> {
        let (instruction, len) = decode(bytes, at)?;
        let to = LinkVa(instruction.near_branch_target());
        let register = self.indirect.get(&to);
        let original = match (instruction.code(), register) {
            (Code::Jmp_rel32_64, None) if to == self.ret => Original::Return,
            (Code::Jmp_rel32_64, Some(register)) => Original::Jump(*register),
            (Code::Call_rel32_64, Some(register)) => Original::Call(*register),
            (code @ (Code::Jmp_rel32_64 | Code::Call_rel32_64), None)
                if len == 5
                    && (self.watched.contains_key(&to) || self.checks.contains_key(&to)) =>
            {
                let jump = code == Code::Jmp_rel32_64;
                Original::Direct { to, jump }
            }
            _ => return None,
        };
        Some((original, len))
    }

    /// Whether the one may stand where the other was.
    pub fn fits(&self, original: Original, replacement: Replacement) -> Result<(), String> {
        let watches = |to| self.watched.contains_key(&to);
        let fits = match (original, replacement) {
            (Original::Return, Replacement::Ret | Replacement::Jump(_))
            | (Original::Call(_) | Original::ModuleFree(_), Replacement::Call(_))
            | (Original::Jump(_), Replacement::Jump(_)) => true,
            (Original::Direct { to, jump: false }, Replacement::Call(_))
            | (Original::Direct { to, jump: true }, Replacement::Jump(_)) => watches(to),
            (Original::Direct { to, jump: false }, Replacement::Gives(gives)) => {
                match self.checks.get(&to) {
                    Some(check) => return check.fits(gives),
                    None => false,
                }
            }
            (Original::Call(old), Replacement::CallRegister(new))
            | (Original::Jump(old), Replacement::JumpRegister(new)) => {
                if old != new {
                    let (old, new) = (register_name(old), register_name(new));
                    return Err(format!("branches through {new} where the slot has {old}"));
                }
                true
            }
            _ => false,
        };
        if !fits {
            return Err(format!("puts {replacement:?} where {original:?} was"));
        }
        Ok(())
    }
}

/// The call before a module's memory is freed (kernel/module/main.c, `free_module`).
fn module_free(kernel: &Kernel) -> Option<(LinkVa, LinkVa)> {
    let cleanup = kernel.symbols.find("module_arch_cleanup")?;
    let function = kernel.symbols.around(kernel.symbols.find("free_module")?)?;
    let branches = kernel.sweep.branches.iter();
    let mut calls = branches.filter(|branch| {
        let call = || {
            let (instruction, len) = decode(kernel.vmlinux.bytes(branch.at, 15)?, branch.at)?;
            Some(instruction.code() == Code::Call_rel32_64 && len == 5)
        };
        function.contains(branch.at) && branch.to == cleanup && call() == Some(true)
    });
    let call = calls.next()?;
    calls.next().is_none().then_some((call.at, cleanup))
}

/// One instruction, when two decoders agree on its length.
fn decode(bytes: &[u8], at: LinkVa) -> Option<(Instruction, usize)> {
    let instruction = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE).decode();
    let other = InstDecoder::default().decode_slice(bytes).ok()?;
    let len = instruction.len();
    let agreed = !instruction.is_invalid() && other.len().to_const() as usize == len;
    agreed.then_some((instruction, len))
}

/// What `bytes` do as one instruction at `at`.
pub fn replacement(bytes: &[u8], at: LinkVa) -> Option<Replacement> {
    if bytes == [0xc3, 0xcc, 0xcc, 0xcc, 0xcc] {
        return Some(Replacement::Ret);
    }
    if let Some(gives) = self_checks::gives(bytes) {
        return Some(Replacement::Gives(gives));
    }
    let (instruction, len) = decode(bytes, at)?;
    if len != bytes.len() {
        return None;
    }
    // Only the CS prefix is free of meaning for near branches in 64-bit mode (SDM volume 2A, 2.1.1); 66 is read
    // differently by Intel and AMD.
    let code = bytes.iter().position(|byte| *byte != 0x2e)?;
    let to = || LinkVa(instruction.near_branch_target());
    let register = || register_number(&format!("{:?}", instruction.op0_register()).to_lowercase());
    match (&bytes[code..], instruction.code()) {
        ([0xe8, ..], Code::Call_rel32_64) => Some(Replacement::Call(to())),
        ([0xe9, ..], Code::Jmp_rel32_64) => Some(Replacement::Jump(to())),
        ([0xff, _] | [0x41, 0xff, _], Code::Call_rm64) => {
            Some(Replacement::CallRegister(register()?))
        }
        ([0xff, _] | [0x41, 0xff, _], Code::Jmp_rm64) => {
            Some(Replacement::JumpRegister(register()?))
        }
        _ => None,
    }
}

/// Proves rule 1.
pub fn boundaries(subject: &Subject<'_>) -> RuleReport {
    let kernel = subject.kernel;
    let mut findings = Findings::new(Rule::SameBoundaries, kernel);
    for (variant, edits) in subject.variants() {
        let (mut end, mut calls, mut whole) = (LinkVa(0), 0, 0);
        let mut drops = BTreeSet::new();
        for edit in edits {
            let at = subject.place(edit);
            if at < end {
                findings.broken(
                    Some(&variant.name),
                    Some(at),
                    "overlaps the edit before".to_owned(),
                );
            }
            end = LinkVa(at.0 + edit.bytes.len() as u64);
            match same_boundary(subject, edit, at, end) {
                Ok(replacement) => {
                    whole += 1;
                    calls += u64::from(matches!(
                        replacement,
                        Replacement::Call(_) | Replacement::CallRegister(_)
                    ));
                    match replacement {
                        Replacement::Ret => drops.insert(Mitigation::ReturnThunk),
                        Replacement::CallRegister(_) | Replacement::JumpRegister(_) => {
                            drops.insert(Mitigation::Retpoline)
                        }
                        Replacement::Call(to) | Replacement::Jump(to)
                            if subject.cave.as_ref().is_ok_and(|image| image.promotes(to)) =>
                        {
                            drops.insert(Mitigation::Retpoline)
                        }
                        _ => false,
                    };
                }
                Err(what) => findings.broken(Some(&variant.name), Some(at), what),
            }
        }
        let declared: BTreeSet<Mitigation> = variant.drops.iter().copied().collect();
        if declared != drops {
            let what = format!("drops {drops:?}, the manifest says {declared:?}");
            findings.broken(Some(&variant.name), None, what);
        }
        findings.proved("edits of one whole instruction", whole);
        findings.proved("calls that keep their return address", calls);
    }
    findings.proved("boundaries by two decoders", kernel.sweep.count());
    findings.done()
}

fn same_boundary(
    subject: &Subject<'_>,
    edit: &Edit,
    at: LinkVa,
    end: LinkVa,
) -> Result<Replacement, String> {
    let kernel = subject.kernel;
    if !kernel.in_text(at) || end > kernel.text.end {
        return Err("is outside the image's .text".to_owned());
    }
    if !kernel.sweep.is_boundary(at) {
        return Err("does not start where an instruction starts".to_owned());
    }
    let Some((original, len)) = subject.thunks.original(kernel, at) else {
        return Err("replaces something other than a return or retpoline site's branch".to_owned());
    };
    if len != edit.bytes.len() || !kernel.sweep.is_boundary(end) {
        let new = edit.bytes.len();
        return Err(format!(
            "replaces an instruction of {len} bytes by {new} bytes"
        ));
    }
    let Some(replacement) = replacement(&edit.bytes, at) else {
        return Err(
            "is not one whole instruction of the slot's length that may stand there".to_owned(),
        );
    };
    subject.thunks.fits(original, replacement)?;
    Ok(replacement)
}

/// A stretch of text that no edit may touch, and why.
struct Forbidden {
    range: VaRange,
    why: &'static str,
}

/// Proves rule 3.
pub fn allowed(subject: &Subject<'_>) -> Result<RuleReport, KernelError> {
    let kernel = subject.kernel;
    let mut findings = Findings::new(Rule::AllowedSlots, kernel);
    let forbidden = forbidden(kernel)?;
    let returns: FxHashSet<LinkVa> = kernel.tables.return_sites.iter().copied().collect();
    let retpolines: FxHashSet<LinkVa> = kernel.tables.retpoline_sites.iter().copied().collect();
    let (mut r, mut i, mut c, mut d) = (0, 0, 0, 0);
    for (variant, edit) in subject.edits() {
        let at = subject.place(edit);
        let end = LinkVa(at.0 + edit.bytes.len() as u64);
        let listed = match edit.slot {
            SlotKind::Return => returns.contains(&at),
            SlotKind::Indirect => retpolines.contains(&at),
            // What they call says it.
            SlotKind::Call => true,
        };
        let original = subject.thunks.original(kernel, at);
        let kind = match original {
            Some((Original::Return, _)) => Some(SlotKind::Return),
            Some((Original::ModuleFree(_) | Original::Direct { .. }, _)) => Some(SlotKind::Call),
            Some(_) => Some(SlotKind::Indirect),
            None => None,
        };
        let mut clean = true;
        if !listed || kind != Some(edit.slot) {
            let what = match edit.slot {
                SlotKind::Return => "is not a slot that .return_sites lists",
                SlotKind::Indirect => "is not a slot that .retpoline_sites lists",
                SlotKind::Call => "calls nothing that a variant keeps from being called",
            };
            let what = what.to_owned();
            findings.broken(Some(variant), Some(at), what);
            clean = false;
        }
        for part in touched(&forbidden, at, end) {
            let what = format!("edits {} at {}", part.why, hex(part.range.start));
            findings.broken(Some(variant), Some(at), what);
            clean = false;
        }
        match edit.slot {
            SlotKind::Return => r += u64::from(clean),
            SlotKind::Indirect => i += u64::from(clean),
            SlotKind::Call if self_checks::gives(&edit.bytes).is_some() => {}
            SlotKind::Call if matches!(original, Some((Original::Direct { .. }, _))) => {
                d += u64::from(clean);
            }
            SlotKind::Call => c += u64::from(clean),
        }
    }
    unchecked(subject, &forbidden, &mut findings)?;
    let forbids = |at, end| !touched(&forbidden, at, end).is_empty();
    watched::all_stopped(subject, forbids, &mut findings);
    self_checks::check(subject, &mut findings);
    findings.proved("return sites", r);
    findings.proved("retpoline sites", i);
    findings.proved("calls before a module is freed", c);
    if d > 0 {
        findings.proved("calls and jumps to watched functions", d);
    }
    findings.proved("forbidden stretches avoided", forbidden.len() as u64);
    Ok(findings.done())
}

/// A variant that checks returns leaves none alone that it could edit, but for those whose frames cannot be overrun, or whose return
/// addresses nothing can have changed, where it says so.
fn unchecked(
    subject: &Subject<'_>,
    forbidden: &[Forbidden],
    findings: &mut Findings<'_>,
) -> Result<(), KernelError> {
    let kernel = subject.kernel;
    let (mut left, mut safe, mut kept) = (0, 0, 0);
    let (mut exposed, mut changeable) = (None, None);
    for (variant, edits) in subject.variants() {
        let pass = variant.passes.iter().find(|pass| pass.name == RETURN_CFI);
        let Some(pass) = pass else {
            continue;
        };
        let scope = pass.parameters.get(SCOPE).map(String::as_str);
        let edited: FxHashSet<LinkVa> = edits.iter().map(|edit| subject.place(edit)).collect();
        let sites = kernel.tables.return_sites.iter();
        for at in sites.filter(|at| kernel.in_text(**at) && !edited.contains(at)) {
            if !touched(forbidden, *at, LinkVa(at.0 + 5)).is_empty() {
                left += 1;
                continue;
            }
            let checked = match scope {
                Some(BY_FRAME) => exposed.get_or_insert_with(|| Exposed::of(kernel)).is(*at),
                Some(BY_CHANGE) => {
                    if changeable.is_none() {
                        changeable = Some(Changeable::of(kernel, subject.parts()?)?);
                    }
                    changeable.as_ref().is_none_or(|known| known.is(*at))
                }
                _ => true,
            };
            match scope {
                _ if checked => {
                    let what = "is a return that is not checked, and nothing forbids to";
                    findings.broken(Some(&variant.name), Some(*at), what.to_owned());
                }
                Some(BY_FRAME) => safe += 1,
                _ => kept += 1,
            }
        }
    }
    findings.proved("returns left alone for a reason", left);
    if safe > 0 {
        findings.proved("returns whose frames cannot be overrun", safe);
    }
    if kept > 0 {
        findings.proved("returns whose addresses nothing can have changed", kept);
    }
    Ok(())
}

/// The stretches that reach into `at..end`.
fn touched(forbidden: &[Forbidden], at: LinkVa, end: LinkVa) -> &[Forbidden] {
    // They are sorted and apart from one another.
    let from = forbidden.partition_point(|part| part.range.end <= at);
    let rest = &forbidden[from..];
    &rest[..rest.partition_point(|part| part.range.start < end)]
}

fn forbidden(kernel: &Kernel) -> Result<Vec<Forbidden>, KernelError> {
    let tables = &kernel.tables;
    let mut list: Vec<Forbidden> = Vec::new();
    let mut add = |range: VaRange, why| {
        if !range.is_empty() && kernel.in_text(range.start) {
            list.push(Forbidden { range, why });
        }
    };
    let instruction = |at: LinkVa| {
        // As far as the instruction there reaches, by the sweep; 15 bytes at most (SDM volume 2A, 2.3.11).
        let end = (1..=15).map(|len| LinkVa(at.0 + len));
        let end = end.into_iter().find(|end| kernel.sweep.is_boundary(*end));
        VaRange {
            start: at,
            end: end.unwrap_or(LinkVa(at.0 + 15)),
        }
    };
    for (places, why) in [
        (&tables.fentry, "an ftrace entry"),
        (&tables.jump_labels, "a jump label"),
        (&tables.static_calls, "a static call"),
        (&tables.smp_locks, "an SMP lock prefix"),
        (&tables.may_fault, "an instruction in the exception table"),
        (&tables.bugs, "an entry of the bug table"),
    ] {
        for at in places {
            add(instruction(*at), why);
        }
    }
    for alternative in &tables.alternatives {
        add(alternative.site, "an alternative");
    }
    for site in &tables.paravirt {
        add(*site, "a paravirt site");
    }
    for constant in &tables.constants {
        add(*constant, "a run-time constant");
    }
    for function in &tables.kprobe_blacklist {
        if let Some(range) = kernel.symbols.around(*function) {
            add(range, "a function on the kprobe blacklist");
        }
    }
    for range in kernel.thunk_text()? {
        add(range, ".text..__x86.*");
    }
    for (start, end, why) in [
        (
            "__static_call_text_start",
            "__static_call_text_end",
            "a static call trampoline",
        ),
        ("__entry_text_start", "__entry_text_end", ".entry.text"),
        (
            "__noinstr_text_start",
            "__noinstr_text_end",
            ".noinstr.text",
        ),
        (
            "__kprobes_text_start",
            "__kprobes_text_end",
            ".kprobes.text",
        ),
    ] {
        add(kernel.symbols.between(start, end)?, why);
    }
    list.sort_by_key(|part| part.range.start);
    // Apart from one another: of overlapping ones each keeps what those before it leave.
    let mut end = LinkVa(0);
    for part in &mut list {
        part.range.start = part.range.start.max(end);
        end = end.max(part.range.end);
    }
    list.retain(|part| !part.range.is_empty());
    Ok(list)
}
