//! How thunks ask whether a target is in a set: its bit or byte, and the search in the sorted list for the few that have none.

use super::Targets;
use super::assembler::{Thunk, imm32};
use super::hashed_bytes;
use super::tables::Encoding;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Goes to `found` when the offset in r11 (below [`Targets::dense`]) is among the main text's targets. Uses r10 and the flags.
pub fn dense(thunk: &mut Thunk, targets: &Targets, found: CodeLabel) -> Result<(), IcedError> {
    match targets.encoding {
        Encoding::Bitmap(granule) => {
            // Bits for more than one byte are the entries' own, see `forward_cfi`.
            assert_eq!(granule, 1, "a bit for each return address");
            let a = &mut thunk.asm;
            a.mov(r10d, r11d)?;
            a.shr(r10d, 5)?;
            a.mov(r10d, dword_ptr(r10 * 4 + i64::from(imm32(targets.table))))?;
            thunk.absolute();
            // The register form takes the bit number modulo 32 (SDM volume 2, BT).
            thunk.asm.bt(r10d, r11d)?;
            thunk.asm.jb(found)
        }
        Encoding::Hashed(parts) => {
            let (offset, index) = ((r11d, r11b), (r10, r10d));
            hashed_bytes::look_up(thunk, parts, targets.table, offset, index, found)
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
