//! How a thunk may end: as its slot would have gone on, or by a report to the hypervisor and what follows it.

use super::machine::{Exit, FLAG_NAMES, Machine, State, Step, fault, register_name, unknown};
use super::term::Op;
use super::tree::Leaf;
use iced_x86::{Code, Instruction, Register};
use penumbra_bundle::ViolationAction;
use std::collections::BTreeMap;

/// `out %al,$0xe4`: reported, and gone on with.
const PORT_LOG: u64 = 0xe4;
/// `out %al,$0xe5`: reported, and not gone on with.
const PORT_FATAL: u64 = 0xe5;
/// The first argument of a function (System V psABI, 3.2.3).
const RDI: usize = 7;
/// Its low byte counts vector registers among variable arguments (System V psABI, 3.5.7).
const RAX: usize = 0;

/// What follows each report of a thunk, by the address of its `out`.
pub type Reports = BTreeMap<u64, Report>;

/// What follows a report.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Report {
    /// What happens.
    pub action: ViolationAction,
    /// What `panic` is told, if it is called.
    pub message: Option<u64>,
}

/// A report that has been made on the way.
#[derive(Clone, Copy)]
pub struct Made {
    at: u64,
    fatal: bool,
}

impl Machine<'_> {
    /// `out`: everything that the slot's own code needs must be there again, and nothing may have been reported before.
    pub(super) fn report(&mut self, state: &mut State, instruction: &Instruction) -> Step<()> {
        let at = instruction.ip();
        let port = instruction.try_immediate(0).ok();
        let fatal = match (instruction.code(), port, instruction.op1_register()) {
            (Code::Out_imm8_AL, Some(PORT_LOG), Register::AL) => false,
            (Code::Out_imm8_AL, Some(PORT_FATAL), Register::AL) => true,
            _ => return Err(unknown(at)),
        };
        if state.report.is_some() {
            return Err(fault(at, "reports a second time"));
        }
        self.restored(state, at)?;
        state.report = Some(Made { at, fatal });
        Ok(())
    }

    /// UD2: the end of the task, with its state as it was reported.
    pub(super) fn kill(&mut self, state: &State, at: u64) -> Step<Leaf> {
        match state.report {
            None => Err(fault(at, "ends the task without a report")),
            Some(Made { fatal: false, .. }) => Err(fault(
                at,
                "ends the task after a report that says it goes on",
            )),
            Some(made) => {
                self.restored(state, at)?;
                self.made(made, ViolationAction::Kill, None)
            }
        }
    }

    /// Leaving the cave.
    pub(super) fn leave(&mut self, state: &State, exit: Exit) -> Step<Leaf> {
        let at = state.ip;
        if exit == Exit::Panic {
            return self.panic(state, at);
        }
        if let Some(made) = state.report.filter(|made| made.fatal) {
            return Err(fault(
                made.at,
                "reports that it does not go on, and goes on",
            ));
        }
        let wanted = match self.contract.target {
            Some(register) if self.contract.plain => Exit::Plain(register),
            Some(register) => Exit::Indirect(register),
            None => Exit::Return,
        };
        // Only a contract without the retpoline lets the machine find such an end.
        if exit != wanted && exit != Exit::Direct {
            let name = |exit| match exit {
                Exit::Return => "a return".to_owned(),
                Exit::Indirect(register) => format!("a jump to *%{}", register_name(register)),
                Exit::Plain(register) => {
                    format!("a jump to *%{} without retpoline", register_name(register))
                }
                Exit::Direct => "a direct jump".to_owned(),
                Exit::Panic => "panic".to_owned(),
                Exit::Thunk => "another thunk".to_owned(),
            };
            let (exit, wanted) = (name(exit), name(wanted));
            let what = format!("ends a thunk by {exit}; its slots do {wanted}");
            return Err(fault(at, &what));
        }
        let cleared = match exit {
            Exit::Return => self.contract.cleared,
            _ => 0,
        };
        let kept = (0u8..16).find(|number| {
            let value = state.registers[usize::from(*number)];
            cleared >> number & 1 == 1 && self.arena.value(value) != Some(0)
        });
        if let Some(number) = kept {
            let name = register_name(number);
            return Err(fault(at, &format!("is reached with {name} not cleared")));
        }
        self.restored_but(state, at, cleared)?;
        match state.report {
            None => Ok(Leaf::Pass),
            Some(made) => self.made(made, ViolationAction::Log, None),
        }
    }

    /// `panic(message)`, tail-called: the word at RSP stays where a call would have put a return address.
    fn panic(&mut self, state: &State, at: u64) -> Step<Leaf> {
        let Some(made) = state.report.filter(|made| made.fatal) else {
            return Err(fault(at, "is reached without a report that says so"));
        };
        if let Some(depth) = self.depth(state).filter(|depth| *depth != 0) {
            return Err(fault(at, &format!("is reached with rsp off by {depth}")));
        }
        let vectors = self.arena.truncate(state.registers[RAX], 8);
        if self.arena.value(vectors) != Some(0) {
            return Err(fault(at, "is called with vector registers"));
        }
        let Some(message) = self.arena.value(state.registers[RDI]) else {
            return Err(fault(at, "is called without a fixed message"));
        };
        self.made(made, ViolationAction::Panic, Some(message))
    }

    fn made(&mut self, made: Made, action: ViolationAction, message: Option<u64>) -> Step<Leaf> {
        let report = Report { action, message };
        if *self.reports.entry(made.at).or_insert(report) != report {
            return Err(fault(made.at, "is followed by one thing or by another"));
        }
        Ok(Leaf::Trap)
    }

    /// Whether the state is what a thunk finds that a slot jumps to.
    pub(super) fn is_entry(&self, state: &State) -> bool {
        state.report.is_none() && self.restored(state, state.ip).is_ok()
    }

    /// The state must be the slot's own again.
    fn restored(&self, state: &State, at: u64) -> Step<()> {
        self.restored_but(state, at, 0)
    }

    /// The same but for some registers, by number.
    fn restored_but(&self, state: &State, at: u64, but: u16) -> Step<()> {
        if let Some(depth) = self.depth(state).filter(|depth| *depth != 0) {
            return Err(fault(at, &format!("is reached with rsp off by {depth}")));
        }
        for (number, value) in (0u8..).zip(&state.registers) {
            let entry = match self.contract.target {
                Some(target) if target == number => Op::Subject,
                _ => Op::Reg(number),
            };
            if self.arena.op(*value) != entry && (self.contract.scratch | but) >> number & 1 == 0 {
                let name = register_name(number);
                return Err(fault(at, &format!("is reached with {name} changed")));
            }
        }
        for (number, value) in (0u8..).zip(&state.flags) {
            if self.arena.op(*value) != Op::Flag(number) && !self.contract.flags {
                let name = FLAG_NAMES[usize::from(number)];
                return Err(fault(at, &format!("is reached with {name} changed")));
            }
        }
        Ok(())
    }
}
