//! `forward_cfi_REG`: the target in REG must be an entry whose address is taken, or lie outside the kernel's text.

use super::assembler::{Section, Thunk, imm32};
use super::tables::ENTRY_GRANULE;
use super::{KernelThunks, Targets, Violation, lookup};
use crate::text::{Indirect, REGISTERS};
use iced_x86::IcedError;
use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::*;
use penumbra_bundle::{LinkVa, Offending};

/// The thunk for register number `register`: r11 and the flags are free at calls that the compiler made in functions compiled
/// with `-pg`; everywhere else everything is kept.
pub fn name(register: u8, scratch_free: bool) -> String {
    let form = if scratch_free { "" } else { "saving_" };
    format!("forward_cfi_{form}{}", REGISTERS[usize::from(register)])
}

/// Assembles the thunks that the slots need.
pub fn emit(
    section: &mut Section,
    targets: &Targets,
    kernel: &KernelThunks,
    slots: &[&Indirect],
    violation: &Violation,
) {
    let mut needed: Vec<(u8, bool)> = slots
        .iter()
        .map(|slot| (slot.register, slot.scratch_free))
        .collect();
    needed.sort_unstable();
    needed.dedup();
    for (register, scratch_free) in needed {
        let Some(retpoline) = kernel.indirect.get(&register) else {
            continue;
        };
        section.thunk(&name(register, scratch_free), violation, |thunk| {
            one(
                thunk,
                register,
                scratch_free,
                targets,
                *retpoline,
                violation,
            )
        });
    }
}

/// What a thunk for a target in some register works with.
pub struct Scratch {
    /// The register that holds what is computed.
    pub register: AsmRegister64,
    /// Its low halves.
    pub halves: (AsmRegister32, AsmRegister8),
    /// The target's register.
    pub target: AsmRegister64,
    /// Whether `register` must be saved.
    pub save: bool,
}

/// r11 is never an argument nor the static chain, which is r10 (System V ABI, 3.2.3); a target in r11 is looked at through
/// r10, saved.
pub fn scratch(register: u8, scratch_free: bool) -> Scratch {
    let target = [
        rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
    ][usize::from(register)];
    let (own, halves) = match register {
        11 => (r10, (r10d, r10b)),
        _ => (r11, (r11d, r11b)),
    };
    Scratch {
        register: own,
        halves,
        target,
        save: !scratch_free || register == 11,
    }
}

fn one(
    thunk: &mut Thunk,
    register: u8,
    scratch_free: bool,
    targets: &Targets,
    retpoline: LinkVa,
    violation: &Violation,
) -> Result<(), IcedError> {
    let Scratch {
        register: scratch,
        halves: (scratch32, scratch8),
        target,
        save: save_scratch,
    } = scratch(register, scratch_free);
    let a = &mut thunk.asm;
    let (mut ok, mut sparse, mut sorted) = (a.create_label(), a.create_label(), a.create_label());
    let mut bad = a.create_label();
    if save_scratch {
        a.push(scratch)?;
    }
    if !scratch_free {
        a.pushfq()?;
    }
    a.mov(scratch, target)?;
    a.sub(scratch, imm32(targets.text.start))?;
    thunk.absolute();
    let a = &mut thunk.asm;
    a.cmp(scratch, targets.dense as i32)?;
    a.jae(sparse)?;
    a.test(scratch8, ENTRY_GRANULE as i32 - 1)?;
    a.jne(sorted)?;
    a.shr(scratch, ENTRY_GRANULE.trailing_zeros())?;
    a.bt(qword_ptr(i64::from(imm32(targets.table))), scratch)?;
    thunk.absolute();
    let a = &mut thunk.asm;
    a.jae(bad)?;
    a.set_label(&mut ok)?;
    let restore = |a: &mut CodeAssembler| {
        if !scratch_free {
            a.popfq()?;
        }
        if save_scratch {
            a.pop(scratch)?;
        }
        Ok::<(), IcedError>(())
    };
    restore(a)?;
    a.jmp(retpoline.0)?;
    a.set_label(&mut sparse)?;
    a.cmp(scratch, targets.text.len() as i32)?;
    a.jae(ok)?;
    a.set_label(&mut sorted)?;
    lookup::sorted(thunk, scratch32, targets)?;
    let a = &mut thunk.asm;
    a.je(ok)?;
    a.set_label(&mut bad)?;
    restore(a)?;
    if violation.report(thunk, Offending::Register(register))? {
        thunk.asm.jmp(retpoline.0)?;
    }
    Ok(())
}
