//! `return_cfi`: the return address must follow a call, or lie outside the kernel's text (modules, BPF, trampolines).

use super::assembler::{Section, Thunk, imm32};
use super::{Targets, lookup};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use penumbra_bundle::LinkVa;

/// For functions compiled with `-pg`: r10, r11 and the flags are free at their return.
pub const PLAIN: &str = "return_cfi";
/// For all other functions: everything is kept.
pub const SAVING: &str = "return_cfi_saving";
/// Where an illegal return ends: an invalid instruction that is in no bug table, so the kernel kills the task.
pub const VIOLATION: &str = "return_cfi_violation";

/// Assembles all three.
pub fn emit(section: &mut Section, targets: &Targets, return_thunk: LinkVa) {
    let violation = section.thunk(VIOLATION, |thunk| thunk.asm.ud2());
    section.thunk(PLAIN, |thunk| {
        thunk.asm.mov(r11, qword_ptr(rsp))?;
        let mut ok = check(thunk, targets, violation)?;
        thunk.asm.set_label(&mut ok)?;
        thunk.return_tail(return_thunk)
    });
    section.thunk(SAVING, |thunk| {
        let a = &mut thunk.asm;
        a.push(r10)?;
        a.push(r11)?;
        a.pushfq()?;
        a.mov(r11, qword_ptr(rsp + 24))?;
        let mut ok = check(thunk, targets, violation)?;
        let a = &mut thunk.asm;
        a.set_label(&mut ok)?;
        a.popfq()?;
        a.pop(r11)?;
        a.pop(r10)?;
        thunk.return_tail(return_thunk)
    });
}

/// Checks the address in r11 and goes on at the label that is returned; uses r10, r11 and the flags.
fn check(thunk: &mut Thunk, targets: &Targets, violation: LinkVa) -> Result<CodeLabel, IcedError> {
    let ok = thunk.asm.create_label();
    let mut sparse = thunk.asm.create_label();
    thunk.asm.sub(r11, imm32(targets.text.start))?;
    thunk.absolute();
    let a = &mut thunk.asm;
    a.cmp(r11, targets.dense as i32)?;
    a.jae(sparse)?;
    a.mov(r10d, r11d)?;
    a.shr(r10d, 5)?;
    a.mov(r10d, dword_ptr(r10 * 4 + i64::from(imm32(targets.bitmap))))?;
    thunk.absolute();
    let a = &mut thunk.asm;
    // The register form takes the bit number modulo 32 (SDM volume 2, BT).
    a.bt(r10d, r11d)?;
    a.jb(ok)?;
    a.jmp(violation.0)?;
    a.set_label(&mut sparse)?;
    a.cmp(r11, targets.text.len() as i32)?;
    a.jae(ok)?;
    lookup::sorted(thunk, r11d, targets)?;
    thunk.asm.jne(violation.0)?;
    Ok(ok)
}
