//! How thunks ask whether a target is in a set: the bit for its address, and the search in the sorted list for the few that
//! have none.

use super::Targets;
use super::assembler::{Thunk, imm32};
use super::tables::{Dense, GROUP, MASKS};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Looks up `offset` (below [`Targets::dense`], in r11) among the main text's targets; leaves CF set when it is there. Uses
/// r10 and the flags.
pub fn dense(thunk: &mut Thunk, targets: &Targets) -> Result<(), IcedError> {
    let table = i64::from(imm32(targets.bitmap));
    let a = &mut thunk.asm;
    a.mov(r10d, r11d)?;
    match targets.encoding {
        Dense::Bitmap(granule) => {
            // Bits for more than one byte are the entries' own, see `forward_cfi`.
            assert_eq!(granule, 1, "a bit for each return address");
            a.shr(r10d, 5)?;
            a.mov(r10d, dword_ptr(r10 * 4 + table))?;
            thunk.absolute();
            // The register form takes the bit number modulo 32 (SDM volume 2, BT).
            thunk.asm.bt(r10d, r11d)
        }
        Dense::Dictionary => {
            a.shr(r10d, GROUP.trailing_zeros())?;
            a.movzx(r10d, byte_ptr(r10 + table + 2 * MASKS as i64))?;
            thunk.absolute();
            thunk.asm.movzx(r10d, word_ptr(r10 * 2 + table))?;
            thunk.absolute();
            // With 16-bit registers, modulo 16.
            thunk.asm.bt(r10w, r11w)
        }
    }
}

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
