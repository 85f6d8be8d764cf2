//! `return_cfi`: the return address must follow a call, or lie outside the kernel's text (modules, BPF, trampolines).

use super::assembler::{Section, Thunk, imm32};
use super::tables::Dense;
use super::{Targets, Violation, lookup};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use penumbra_bundle::{LinkVa, Offending};

/// For functions compiled with `-pg`: r10, r11 and the flags are free at their return.
pub const PLAIN: &str = "return_cfi";
/// For all other functions: everything is kept.
pub const SAVING: &str = "return_cfi_saving";

/// Assembles both; where they are.
pub fn emit(
    section: &mut Section,
    targets: &Targets,
    return_thunk: LinkVa,
    violation: &Violation,
) -> [LinkVa; 2] {
    [(PLAIN, false), (SAVING, true)].map(|(name, saving)| {
        section.thunk(name, violation, |thunk| {
            one(thunk, saving, targets, return_thunk, violation)
        })
    })
}

fn one(
    thunk: &mut Thunk,
    saving: bool,
    targets: &Targets,
    return_thunk: LinkVa,
    violation: &Violation,
) -> Result<(), IcedError> {
    let a = &mut thunk.asm;
    let (mut ok, mut end, mut bad) = (a.create_label(), a.create_label(), a.create_label());
    if saving {
        a.push(r10)?;
        a.push(r11)?;
        a.pushfq()?;
        a.mov(r11, qword_ptr(rsp + 24))?;
    } else {
        a.mov(r11, qword_ptr(rsp))?;
    }
    check(thunk, targets, ok, bad)?;
    thunk.asm.set_label(&mut ok)?;
    if saving {
        restore(thunk)?;
        thunk.asm.set_label(&mut end)?;
    } else {
        end = ok;
    }
    thunk.return_tail(return_thunk)?;
    // Behind the tail, away from the code that runs.
    thunk.asm.set_label(&mut bad)?;
    if saving {
        restore(thunk)?;
    }
    if violation.report(thunk, Offending::Stack(0))? {
        thunk.asm.jmp(end)?;
    }
    Ok(())
}

/// Takes back what a saving thunk has saved.
pub fn restore(thunk: &mut Thunk) -> Result<(), IcedError> {
    let a = &mut thunk.asm;
    a.popfq()?;
    a.pop(r11)?;
    a.pop(r10)
}

/// Checks the address in r11; falls through, or goes to `ok`, when it is legal. Uses r10, r11 and the flags.
fn check(
    thunk: &mut Thunk,
    targets: &Targets,
    ok: CodeLabel,
    bad: CodeLabel,
) -> Result<(), IcedError> {
    let (mut sparse, mut sorted) = (thunk.asm.create_label(), thunk.asm.create_label());
    thunk.asm.sub(r11, imm32(targets.text.start))?;
    thunk.absolute();
    let a = &mut thunk.asm;
    a.cmp(r11, targets.dense as i32)?;
    a.jae(sparse)?;
    lookup::dense(thunk, targets)?;
    let a = &mut thunk.asm;
    a.jb(ok)?;
    let listed = targets.encoding == Dense::Dictionary;
    a.jmp(if listed { sorted } else { bad })?;
    a.set_label(&mut sparse)?;
    a.cmp(r11, targets.text.len() as i32)?;
    a.jae(ok)?;
    if listed {
        a.set_label(&mut sorted)?;
    }
    lookup::sorted(thunk, r11d, targets)?;
    thunk.asm.jne(bad)
}
