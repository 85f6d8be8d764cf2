//! Calls of functions by which the kernel checks itself (pass `no-self-checks`): each edit stands for such a call, gives back what
//! the function gives back when nothing is wrong, and is in a variant that says so.
//!
//! Which functions these are is told by their names. Of each that an edit stands for it is proved, as far as its own instructions
//! tell, that nothing is lost with it but what it reports: on every way that reports nothing it writes no memory but its own stack,
//! and gives back what the edit does, by its prototype and, where that is a constant, by what RAX holds. What it calls is not
//! followed, and that an object's cache is the one that it is given back to is what that function itself finds out.

use super::Subject;
use super::kernel::Kernel;
use super::kernel::btf::{Btf, GivesBack};
use super::report::Findings;
use super::slots::{Original, Replacement, replacement};
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register,
};
use penumbra_bundle::{LinkVa, PassSummary, VaRange, Variant};
use std::collections::{BTreeMap, BTreeSet};

/// The pass.
pub const PASS: &str = "no-self-checks";
/// The value of its parameters by which calls are left out.
const DROP: &str = "drop";

/// What stands for a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gives {
    /// A NOP.
    Nothing,
    /// `mov $1,%eax`.
    True,
    /// `mov %rdi,%rax`.
    First,
}

/// A function that checks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SelfCheck {
    name: &'static str,
    /// The pass's parameter that says whether it is called.
    about: &'static str,
    gives: Gives,
}

/// By name: the parameter, and what such a function gives back.
const NAMES: [(&str, &str, Gives); 8] = [
    ("__check_object_size", "usercopy", Gives::Nothing),
    ("__list_add_valid", "lists", Gives::True),
    ("__list_add_valid_or_report", "lists", Gives::True),
    ("__list_del_entry_valid", "lists", Gives::True),
    ("__list_del_entry_valid_or_report", "lists", Gives::True),
    ("cache_from_obj", "slab", Gives::First),
    ("fpregs_assert_state_consistent", "fpu", Gives::Nothing),
    ("xfd_validate_state", "fpu", Gives::Nothing),
];

/// These functions of one kernel, by address. One that shares its name is none.
pub fn find(kernel: &Kernel) -> BTreeMap<LinkVa, SelfCheck> {
    let found = NAMES.into_iter().filter_map(|(name, about, gives)| {
        let mut named = kernel.symbols.named(name);
        let at = named.next()?;
        let check = SelfCheck { name, about, gives };
        (named.next().is_none() && kernel.in_text(at)).then_some((at, check))
    });
    found.collect()
}

/// What `bytes` give back as one instruction, if they are one that may stand for a call.
pub fn gives(bytes: &[u8]) -> Option<Gives> {
    match bytes {
        [0x0f, 0x1f, 0x44, 0x00, 0x00] => Some(Gives::Nothing),
        [0xb8, 0x01, 0x00, 0x00, 0x00] => Some(Gives::True),
        [0x2e, 0x2e, 0x48, 0x89, 0xf8] => Some(Gives::First),
        _ => None,
    }
}

impl SelfCheck {
    /// Whether `gives` may stand for a call of it.
    pub fn fits(&self, gives: Gives) -> Result<(), String> {
        match self.gives == gives {
            true => Ok(()),
            false => Err(format!(
                "gives back {gives:?} for a call of {}, which gives back {:?}",
                self.name, self.gives
            )),
        }
    }

    /// Whether this variant says that it is not called.
    pub fn is_dropped(&self, variant: &Variant) -> bool {
        let pass = variant.passes.iter().find(|pass| pass.name == PASS);
        pass.is_some_and(|pass| self.is_said(pass))
    }

    fn is_said(&self, pass: &PassSummary) -> bool {
        let value = pass.parameters.get(self.about);
        value.is_some_and(|value| value == DROP)
    }
}

/// How many direct branches from elsewhere enter the checks that `pass` says it leaves out.
pub fn into(subject: &Subject<'_>, pass: &PassSummary) -> u64 {
    let branches = subject.kernel.sweep.branches.iter();
    let into = branches.filter(|branch| {
        let check = subject.thunks.checks.get(&branch.to);
        check.is_some_and(|check| check.is_said(pass))
    });
    into.count() as u64
}

/// The functions of which some edit of the kernel's text leaves out a call.
pub fn left_out(subject: &Subject<'_>) -> BTreeSet<LinkVa> {
    let functions = subject.edits().filter_map(|(_, edit)| {
        gives(&edit.bytes)?;
        match subject.thunks.original(subject.kernel, subject.place(edit)) {
            Some((Original::Direct { to, .. }, _)) => Some(to),
            _ => None,
        }
    });
    functions.collect()
}

/// Checks all edits of the kernel's text that stand for such calls, and the functions.
pub fn check(subject: &Subject<'_>, findings: &mut Findings<'_>) {
    let kernel = subject.kernel;
    let mut dropped: BTreeSet<LinkVa> = BTreeSet::new();
    let mut proved = 0;
    for (variant, edits) in subject.variants() {
        let mut figures: BTreeMap<&str, u64> = BTreeMap::new();
        for edit in edits {
            let at = subject.place(edit);
            let new = replacement(&edit.bytes, at);
            let (Some(Replacement::Gives(_)), Some((Original::Direct { to, .. }, _))) =
                (new, subject.thunks.original(kernel, at))
            else {
                continue;
            };
            // Rule 1 says what is wrong with others.
            let Some(check) = subject.thunks.checks.get(&to) else {
                continue;
            };
            if !check.is_dropped(variant) {
                let what = format!(
                    "leaves out a call of {}, and no pass of the variant says so",
                    check.name
                );
                findings.broken(Some(&variant.name), Some(at), what);
                continue;
            }
            *figures.entry(check.name).or_default() += 1;
            dropped.insert(to);
            proved += 1;
        }
        let pass = variant.passes.iter().find(|pass| pass.name == PASS);
        let said = pass.map_or(BTreeMap::new(), |pass| {
            let figures = pass.figures.iter().filter(|(_, count)| **count > 0);
            figures
                .map(|(name, count)| (name.as_str(), *count))
                .collect()
        });
        if said != figures {
            let what = format!("pass {PASS} says {said:?}, left out are {figures:?}");
            findings.broken(Some(&variant.name), None, what);
        }
    }
    if dropped.is_empty() {
        return;
    }
    let btf = Btf::read(&kernel.vmlinux).ok();
    for at in dropped {
        let check = subject.thunks.checks[&at];
        let prototype = btf.as_ref().and_then(|btf| btf.result(check.name));
        if let Err(what) = proves(kernel, at, check.gives, prototype) {
            let what = format!("is left out as a check, and {what}");
            findings.broken(None, Some(at), what);
        } else {
            findings.proved("functions that check only", 1);
        }
    }
    findings.proved("calls that only check", proved);
}

/// That a call of the function at `start` may be left out.
fn proves(
    kernel: &Kernel,
    start: LinkVa,
    gives: Gives,
    prototype: Option<GivesBack>,
) -> Result<(), String> {
    let expected = match gives {
        Gives::Nothing => GivesBack::Void,
        Gives::True => GivesBack::Bool,
        Gives::First => GivesBack::FirstArgument,
    };
    if prototype != Some(expected) {
        return Err(format!(
            "by BTF it gives back {prototype:?}, not {expected:?}"
        ));
    }
    let function = Function::read(kernel, start)?;
    let reports = function.reporting();
    let mut factory = InstructionInfoFactory::new();
    for (at, node) in &function.nodes {
        if !reports.contains(at) && writes(&node.instruction, &mut factory) {
            let at = kernel.symbols.name(*at).unwrap_or_default();
            return Err(format!("writes memory at {at} without a report"));
        }
    }
    match gives {
        Gives::True => function.gives_true(&reports),
        Gives::Nothing | Gives::First => Ok(()),
    }
}

/// One instruction, and where it goes.
struct Node {
    instruction: Instruction,
    next: Vec<LinkVa>,
    /// Ends the function by returning.
    returns: bool,
    /// Goes to the part that the compiler has put aside, for what seldom happens: here the report.
    aside: bool,
}

/// The instructions that a function's first one leads to, inside its symbol.
struct Function {
    start: LinkVa,
    nodes: BTreeMap<LinkVa, Node>,
}

impl Function {
    fn read(kernel: &Kernel, start: LinkVa) -> Result<Function, String> {
        let range = kernel.symbols.around(start);
        let range = range.filter(|range| range.start == start && kernel.text.encloses(range));
        let range = range.ok_or("it is no function of the text")?;
        let return_thunk = kernel.symbols.find("__x86_return_thunk");
        let mut function = Function {
            start,
            nodes: BTreeMap::new(),
        };
        let mut open = vec![start];
        while let Some(at) = open.pop() {
            if function.nodes.contains_key(&at) {
                continue;
            }
            let rest = VaRange {
                start: at,
                end: range.end,
            };
            let bytes = kernel.vmlinux.bytes(at, rest.len().min(15) as usize);
            let bytes = bytes.ok_or("it leaves the image")?;
            let instruction = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE).decode();
            if instruction.is_invalid() {
                return Err("it is no code".to_owned());
            }
            let mut node = Node {
                instruction,
                next: Vec::new(),
                returns: false,
                aside: false,
            };
            let flow = instruction.flow_control();
            let behind = LinkVa(instruction.next_ip());
            if matches!(
                flow,
                FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
            ) {
                let to = LinkVa(instruction.near_branch_target());
                if range.contains(to) {
                    node.next.push(to);
                } else if Some(to) == return_thunk {
                    node.returns = true;
                } else if is_cold_part(kernel, start, to) {
                    node.aside = true;
                } else {
                    return Err("it jumps to another function".to_owned());
                }
            }
            match flow {
                FlowControl::UnconditionalBranch => {}
                FlowControl::Next
                | FlowControl::ConditionalBranch
                | FlowControl::Call
                | FlowControl::Exception
                    if !instruction.is_privileged() =>
                {
                    node.next.push(behind);
                }
                FlowControl::Return => node.returns = true,
                _ => return Err("it does what no check needs".to_owned()),
            }
            node.next.retain(|to| range.contains(*to));
            open.extend(&node.next);
            function.nodes.insert(at, node);
        }
        Ok(function)
    }

    /// The instructions from which every way comes to a report: an invalid instruction (`WARN`, `BUG`), or the cold part.
    fn reporting(&self) -> BTreeSet<LinkVa> {
        let mut reporting = BTreeSet::new();
        loop {
            let before = reporting.len();
            for (at, node) in self.nodes.iter().rev() {
                let trap = node.instruction.code() == Code::Ud2;
                let behind = !node.returns
                    && (node.aside || !node.next.is_empty())
                    && node.next.iter().all(|to| reporting.contains(to));
                if trap || behind {
                    reporting.insert(*at);
                }
            }
            if reporting.len() == before {
                return reporting;
            }
        }
    }

    /// Whether RAX is 1 wherever it returns without a report.
    fn gives_true(&self, reports: &BTreeSet<LinkVa>) -> Result<(), String> {
        let mut seen: BTreeSet<(LinkVa, bool)> = BTreeSet::new();
        let mut open = vec![(self.start, false)];
        while let Some((at, one)) = open.pop() {
            if reports.contains(&at) || !seen.insert((at, one)) {
                continue;
            }
            let Some(node) = self.nodes.get(&at) else {
                continue;
            };
            if node.returns && !one {
                return Err("it may give back something other than 1 without a report".to_owned());
            }
            let instruction = &node.instruction;
            let to = instruction.op0_register();
            let is_call = instruction.flow_control() == FlowControl::Call;
            let sets = instruction.op0_kind() == OpKind::Register
                && to.full_register() == Register::RAX
                && !matches!(instruction.mnemonic(), Mnemonic::Cmp | Mnemonic::Test);
            let one = match sets || is_call {
                true => instruction.code() == Code::Mov_r32_imm32 && instruction.immediate(1) == 1,
                false => one,
            };
            open.extend(node.next.iter().map(|to| (*to, one)));
        }
        Ok(())
    }
}

/// Whether `to` lies in the part of the function at `start` that the compiler has put aside (`-freorder-blocks-and-partition`).
fn is_cold_part(kernel: &Kernel, start: LinkVa, to: LinkVa) -> bool {
    let Some(range) = kernel.symbols.around(to) else {
        return false;
    };
    let mut own = kernel.symbols.at(start);
    own.any(|own| {
        let mut there = kernel.symbols.at(range.start);
        there.any(|there| there.name.strip_prefix(own.name.as_str()) == Some(".cold"))
    })
}

/// Whether an instruction writes memory other than the stack.
fn writes(instruction: &Instruction, factory: &mut InstructionInfoFactory) -> bool {
    let used = factory.info(instruction).used_memory();
    used.iter().any(|memory| {
        let written = matches!(
            memory.access(),
            OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite
        );
        written && memory.base() != Register::RSP
    })
}
