//! `stack_clear_*` and `stack_mark_N_*`: each does its part below the stack pointer and goes on to the thunk that it is named
//! after, which checks the return.
//!
//! Nothing below the stack pointer is anybody's: an interrupt that comes in between writes there and comes back before it is
//! looked at again. Before the return to user mode interrupts are off.

use super::Violation;
use super::assembler::{Section, Thunk};
use super::return_cfi::Mode;
use crate::passes::{Analyses, return_check};
use crate::text::Slots;
use crate::text::stack_use::{SPACING, StackUse, UNUSED};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use penumbra_bundle::LinkVa;
use std::collections::{BTreeMap, BTreeSet};

/// How thunks that clear are called.
const CLEAR: &str = "stack_clear";
/// How thunks that mark are called.
const MARK: &str = "stack_mark";
/// Bytes that are cleared together, and then looked at.
const BLOCK: i32 = UNUSED as i32;
/// Bytes that one instruction clears.
const VECTOR: i32 = 16;
/// So many blocks are cleared before it is asked where the stack ends.
const UNROLLED: i32 = 2;
/// After so many words it is asked whether they are zero, besides at a block's end: of a frame, few words are.
const EARLY: [i32; 2] = [2, 8];
/// The stack's size, to a multiple of which it is aligned (arch/x86/include/asm/page_64_types.h, `THREAD_SIZE`; `THREAD_ALIGN`).
const STACK: i32 = 0x4000;
/// The stack's lowest bytes are left alone: at its end stands `STACK_END_MAGIC`. From here on down there is room for what is saved,
/// for the blocks that are cleared and one that is looked at.
const END: i32 = 4 * BLOCK;

/// The thunk of the R slot of this number in front of the check `check`; none where there is nothing to do.
pub fn name(stack: &StackUse, slot: usize, check: &str) -> Option<String> {
    match (stack.clears[slot], stack.marks[slot]) {
        (true, _) => Some(format!("{CLEAR}_{check}")),
        (false, 0) => None,
        (false, marks) => Some(format!("{MARK}_{marks}_{check}")),
    }
}

/// Whether a thunk of this name clears or marks the stack.
pub fn is_name(thunk: &str) -> bool {
    thunk.starts_with(CLEAR) || thunk.starts_with(MARK)
}

/// Assembles the thunks of all slots behind those of the checks.
pub fn emit(
    section: &mut Section,
    slots: &Slots,
    stack: &StackUse,
    analyses: &Analyses<'_>,
    violation: &Violation,
) {
    let named = section.named().iter();
    let checks: BTreeMap<String, LinkVa> = named
        .map(|named| (named.name.clone(), named.range.start))
        .collect();
    let mut made = BTreeSet::new();
    for (index, slot) in slots.returns.iter().enumerate() {
        let check = return_check(analyses, index, Mode::of(index, slot, analyses));
        let Some(name) = name(stack, index, &check) else {
            continue;
        };
        let Some(next) = checks.get(&check).copied() else {
            continue;
        };
        if !made.insert(name.clone()) {
            continue;
        }
        match stack.clears[index] {
            true => {
                let mode = match slot.scratch_free {
                    true => Mode::Plain,
                    false => Mode::Saving,
                };
                section.thunk(&name, violation, |thunk| clear(thunk, mode, next))
            }
            false => section.packed(&name, violation, |thunk| {
                mark(thunk, stack.marks[index], next)
            }),
        };
    }
}

/// Leaves words that are not zero in the frame that has just been left: whatever address the stack has is one.
fn mark(thunk: &mut Thunk, marks: u16, next: LinkVa) -> Result<(), IcedError> {
    for number in 1..=i32::from(marks) {
        let below = number * SPACING as i32;
        thunk.asm.mov(qword_ptr(rsp - below), rsp)?;
    }
    thunk.asm.jmp(next.0)
}

/// Goes down block by block, r10 at the end of the one that is cleared, until one of zeros follows, or the stack ends. The first is
/// cleared without a look: what was called last left its return address there. A block that is looked at and is not zero is the
/// next to be cleared. What was saved to do so is cleared last.
///
/// Zeros come from xmm0, 16 bytes at a time: the kernel is compiled without vector registers, and what they hold here is the
/// process's again (arch/x86/kernel/fpu/context.h, `switch_fpu_return`), or waits to be loaded. Either way xmm0 is kept; it lies
/// above RSP meanwhile.
fn clear(thunk: &mut Thunk, mode: Mode, next: LinkVa) -> Result<(), IcedError> {
    mode.save(thunk)?;
    let a = &mut thunk.asm;
    let (mut dirty, mut done, mut full) = (a.create_label(), a.create_label(), a.create_label());
    a.test(esp, STACK - END)?;
    a.je(full)?;
    a.lea(r10, qword_ptr(rsp - (VECTOR + BLOCK)))?;
    a.sub(rsp, VECTOR)?;
    a.movups(xmmword_ptr(rsp), xmm0)?;
    a.xorps(xmm0, xmm0)?;
    a.set_label(&mut dirty)?;
    for block in 0..UNROLLED {
        let at = r10 - block * BLOCK;
        for vector in 1..=BLOCK / VECTOR {
            a.movups(xmmword_ptr(at + (BLOCK - vector * VECTOR)), xmm0)?;
        }
        let mut deeper = a.create_label();
        a.mov(r11, qword_ptr(at - 8))?;
        for word in 2..=BLOCK / 8 {
            a.or(r11, qword_ptr(at - word * 8))?;
            if EARLY.contains(&word) {
                a.jne(deeper)?;
            }
        }
        a.je(done)?;
        a.set_label(&mut deeper)?;
    }
    a.sub(r10, UNROLLED * BLOCK)?;
    a.test(r10d, STACK - END)?;
    a.jne(dirty)?;
    a.set_label(&mut done)?;
    a.movups(xmm0, xmmword_ptr(rsp))?;
    a.add(rsp, VECTOR)?;
    a.set_label(&mut full)?;
    mode.restore(thunk)?;
    for word in 1..=(VECTOR + mode.saved()) / 8 {
        thunk.asm.mov(qword_ptr(rsp - word * 8), 0)?;
    }
    thunk.asm.jmp(next.0)
}
