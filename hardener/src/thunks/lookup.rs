//! The search in the sorted list of targets, for the few that no bitmap holds.

use super::Targets;
use super::assembler::{Thunk, imm32};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Looks up `offset` (32 bits, from the text's start) in the sorted list; leaves ZF set when it is there. Changes the flags
/// only: two registers are saved around.
///
/// The list's length is a power of two: each step halves the distance that may still be added.
pub fn sorted(
    thunk: &mut Thunk,
    offset: AsmRegister32,
    targets: &Targets,
) -> Result<(), IcedError> {
    let list = i64::from(imm32(targets.sorted));
    let a = &mut thunk.asm;
    let (mut again, mut skip) = (a.create_label(), a.create_label());
    a.push(rax)?;
    a.push(rcx)?;
    a.xor(eax, eax)?;
    if targets.sorted_len > 1 {
        a.mov(ecx, targets.sorted_len * 4 / 2)?;
        a.set_label(&mut again)?;
        a.cmp(offset, dword_ptr(rax + rcx + list))?;
        thunk.absolute();
        let a = &mut thunk.asm;
        a.jb(skip)?;
        a.add(eax, ecx)?;
        a.set_label(&mut skip)?;
        a.shr(ecx, 1)?;
        a.test(cl, 4i32 - 1)?;
        a.je(again)?;
    }
    thunk.asm.cmp(offset, dword_ptr(rax + list))?;
    thunk.absolute();
    let a = &mut thunk.asm;
    // `pop` leaves the flags alone.
    a.pop(rcx)?;
    a.pop(rax)
}
