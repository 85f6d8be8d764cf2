//! `return_cfi`: the return address must follow a call, or lie outside the kernel's text (modules, BPF, trampolines).

use super::assembler::{Section, Thunk, imm32};
use super::{Targets, Violation, lookup};
use crate::passes::Analyses;
use crate::text::Return;
use crate::text::return_sets::ReturnSets;
use crate::text::zeroing::Zeroing;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use penumbra_bundle::{LinkVa, Offending};
use std::collections::BTreeMap;

/// What a return's thunk does with the registers beside its check.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Mode {
    /// For functions compiled with `-pg`, and those of whose callers it is proved: r10, r11 and the flags are free at their return.
    Plain,
    /// For all other functions: everything is kept.
    Saving,
    /// For functions of which no caller-saved register but rax and rdx is read when they have returned: all those are cleared.
    Zeroing,
}

impl Mode {
    /// The mode of the R slot of this number: what was found out may say more than the slot does.
    pub fn of(index: usize, slot: &Return, analyses: &Analyses<'_>) -> Mode {
        let clears = |zeroing: &Zeroing| zeroing.of_slot[index];
        let free = |sets: &ReturnSets| sets.scratch_free[index];
        if analyses.zeroing.is_some_and(clears) {
            Mode::Zeroing
        } else if slot.scratch_free || analyses.return_sets.is_some_and(free) {
            Mode::Plain
        } else {
            Mode::Saving
        }
    }

    /// The name of the thunk that is called `name` in the plain mode.
    pub fn named(self, name: &str) -> String {
        match self {
            Mode::Plain => name.to_owned(),
            Mode::Saving => format!("{name}_saving"),
            Mode::Zeroing => format!("{name}_zeroing"),
        }
    }

    /// How many bytes of the stack hold what is saved.
    pub fn saved(self) -> i32 {
        if self == Mode::Saving { 24 } else { 0 }
    }

    /// Saves what has to be kept.
    pub fn save(self, thunk: &mut Thunk) -> Result<(), IcedError> {
        if self == Mode::Saving {
            thunk.asm.push(r10)?;
            thunk.asm.push(r11)?;
            thunk.asm.pushfq()?;
        }
        Ok(())
    }

    /// Takes back what was saved.
    pub fn restore(self, thunk: &mut Thunk) -> Result<(), IcedError> {
        if self == Mode::Saving {
            thunk.asm.popfq()?;
            thunk.asm.pop(r11)?;
            thunk.asm.pop(r10)?;
        }
        Ok(())
    }

    /// Clears what is to be cleared, and returns.
    pub fn finish(self, thunk: &mut Thunk, return_thunk: LinkVa) -> Result<(), IcedError> {
        if self == Mode::Zeroing {
            // A 32-bit result clears the upper half (SDM volume 1, 3.4.1.1). The flags are as dead as the registers.
            for register in [ecx, esi, edi, r8d, r9d, r10d, r11d] {
                thunk.asm.xor(register, register)?;
            }
        }
        thunk.return_tail(return_thunk)
    }
}

/// The thunk of a mode.
pub fn name(mode: Mode) -> String {
    mode.named("return_cfi")
}

/// Assembles the thunks of these modes; where they are.
pub fn emit(
    section: &mut Section,
    modes: &[Mode],
    targets: &Targets,
    return_thunk: LinkVa,
    violation: &Violation,
) -> BTreeMap<Mode, LinkVa> {
    let thunks = modes.iter().map(|mode| {
        let at = section.thunk(&name(*mode), violation, |thunk| {
            one(thunk, *mode, targets, return_thunk, violation)
        });
        (*mode, at)
    });
    thunks.collect()
}

fn one(
    thunk: &mut Thunk,
    mode: Mode,
    targets: &Targets,
    return_thunk: LinkVa,
    violation: &Violation,
) -> Result<(), IcedError> {
    let a = &mut thunk.asm;
    let (mut ok, mut end, mut bad) = (a.create_label(), a.create_label(), a.create_label());
    mode.save(thunk)?;
    thunk.asm.mov(r11, qword_ptr(rsp + mode.saved()))?;
    check(thunk, targets, ok, bad)?;
    thunk.asm.set_label(&mut ok)?;
    if mode == Mode::Saving {
        mode.restore(thunk)?;
        thunk.asm.set_label(&mut end)?;
    } else {
        end = ok;
    }
    mode.finish(thunk, return_thunk)?;
    // Behind the tail, away from the code that runs.
    thunk.asm.set_label(&mut bad)?;
    mode.restore(thunk)?;
    if violation.report(thunk, Offending::Stack(0))? {
        thunk.asm.jmp(end)?;
    }
    Ok(())
}

/// Checks the address in r11; falls through, or goes to `ok`, when it is legal. Uses r10, r11 and the flags.
fn check(
    thunk: &mut Thunk,
    targets: &Targets,
    ok: CodeLabel,
    bad: CodeLabel,
) -> Result<(), IcedError> {
    let mut sparse = thunk.asm.create_label();
    thunk.asm.sub(r11, imm32(targets.text.start))?;
    thunk.absolute();
    let a = &mut thunk.asm;
    a.cmp(r11, targets.dense as i32)?;
    a.jae(sparse)?;
    lookup::dense(thunk, targets, ok)?;
    let a = &mut thunk.asm;
    a.jmp(bad)?;
    a.set_label(&mut sparse)?;
    a.cmp(r11, targets.text.len() as i32)?;
    a.jae(ok)?;
    lookup::sorted(thunk, r11d, targets)?;
    thunk.asm.jne(bad)
}
