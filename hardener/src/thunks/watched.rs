//! `debloat_FUNCTION`, `probe_FUNCTION` and `stack_depth_FUNCTION`: a direct call or jump to a function that is outside the profile,
//! probed, or has a large frame, goes here instead.
//!
//! Each says which function it stands for, and how much stack it needs if that is asked, and goes on to code that all of a pass
//! share. Where enough stack is left nothing more is asked. Interrupts and kernel threads use the text of whatever process they find,
//! and do nothing for it: they go on into the function. Of a task that is at work for itself it is reported.
//!
//! Those functions have an `__fentry__` site, so r10, r11 and the flags are free where they are called (design, invariant 4);
//! none of these is an argument.

use super::Violation;
use super::assembler::{Section, Thunk};
use crate::text::Text;
use crate::text::large_frames::{LARGEST, LargeFrames};
use crate::text::watched::Watched;
use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register};
use penumbra_bundle::{LinkVa, Offending, TextOff};
use std::collections::BTreeSet;

/// r11, in which the function's address is.
pub const FUNCTION: u8 = 11;

/// In an NMI, a hardware interrupt, or a softirq (include/linux/preempt.h: `NMI_MASK`, `HARDIRQ_MASK`, `SOFTIRQ_OFFSET`).
const INTERRUPT: u32 = 0x00f0_0000 | 0x000f_0000 | 0x0000_0100;
/// `PF_KTHREAD` of `task_struct.flags` (include/linux/sched.h): the bit in the byte of this offset.
const KTHREAD: (i32, i32) = (2, 0x20);

/// `lea FUNCTION(%rip),%r11; jmp ISLAND`: a short jump, to a longer one that some before and some behind it share.
const STUB: u64 = 9;
/// `mov $NEED,%r10d` between them.
const NEED: u64 = 6;
/// How far a short jump gets, from its end.
const SHORT: u64 = 127;
/// The long jump.
const ISLAND: u64 = 5;

/// The stack of a task, in bytes (arch/x86/include/asm/page_64_types.h, `THREAD_SIZE`).
const STACK: i32 = 0x4000;

/// The thunk of `pass` that stands for the function at `to`, one of those watched.
pub fn name(pass: &str, watched: &Watched, to: TextOff) -> String {
    format!("{}_{}", stem(pass), watched.name(to).unwrap_or_default())
}

/// Whether a thunk of this name is one of `pass`.
pub fn is_name(pass: &str, name: &str) -> bool {
    let rest = name.strip_prefix(&stem(pass));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
}

/// How the thunk is called that all of a pass share.
fn stem(pass: &str) -> String {
    pass.replace('-', "_")
}

/// Goes on to `enough` where so much stack is left as r10 says, and on every stack but a task's: these lie further away than the
/// page below its own that nothing is mapped in.
fn ask_for_stack(
    thunk: &mut Thunk,
    large: &LargeFrames,
    enough: CodeLabel,
) -> Result<(), IcedError> {
    let a = &mut thunk.asm;
    a.sub(r10, rsp)?;
    a.add(r10, qword_ptr(u64::from(large.top_of_stack)).gs())?;
    a.sub(r10, STACK + 1)?;
    a.cmp(r10, (large.limits.left + LARGEST) as i32)?;
    a.jae(enough)
}

/// Assembles a thunk for each function that some slot enters, and what they share, which is called as the pass; `large` are the same
/// functions, where it is asked for stack; `go_on` is the kernel's retpoline for r11.
pub fn emit(
    section: &mut Section,
    text: &Text,
    watched: &Watched,
    large: Option<&LargeFrames>,
    go_on: LinkVa,
    violation: &Violation,
) {
    let entered: BTreeSet<TextOff> = watched.slots.iter().map(|slot| slot.to).collect();
    if entered.is_empty() {
        return;
    }
    let task = watched.task;
    let shared = section.thunk(&stem(violation.pass), violation, |thunk| {
        let mut other = thunk.asm.create_label();
        if let Some(large) = large {
            ask_for_stack(thunk, large, other)?;
        }
        let a = &mut thunk.asm;
        a.test(
            dword_ptr(u64::from(task.preempt_count)).gs(),
            INTERRUPT as i32,
        )?;
        a.jne(other)?;
        a.mov(r10, qword_ptr(u64::from(task.current)).gs())?;
        a.test(byte_ptr(r10 + task.flags as i32 + KTHREAD.0), KTHREAD.1)?;
        a.jne(other)?;
        violation.report(thunk, Offending::Register(FUNCTION))?;
        thunk.asm.set_label(&mut other)?;
        thunk.asm.jmp(go_on.0)
    });
    let entered: Vec<TextOff> = entered.into_iter().collect();
    let size = STUB + large.map_or(0, |_| NEED);
    // So many reach it from either side.
    let reach = ((SHORT - ISLAND) / size) as usize;
    for group in entered.chunks(2 * reach) {
        let (before, after) = group.split_at(group.len().min(reach));
        let island = LinkVa(section.end().0 + before.len() as u64 * size);
        let stub = |section: &mut Section, to: TextOff| {
            let function = text.va(to);
            section.packed(&name(violation.pass, watched, to), violation, |thunk| {
                // Relative to the instruction pointer, so that nothing is to be relocated.
                let place = MemoryOperand::with_base_displ(Register::RIP, function.0 as i64);
                let names = Instruction::with2(Code::Lea_r64_m, Register::R11, place)?;
                thunk.asm.add_instruction(names)?;
                if let Some(large) = large {
                    thunk.asm.mov(r10d, large.need(to))?;
                }
                thunk.asm.jmp(island.0)
            });
        };
        for to in before {
            stub(section, *to);
        }
        let placed = section.packed_jump(shared, violation);
        assert_eq!(placed, island, "a stub has {size} bytes");
        for to in after {
            stub(section, *to);
        }
    }
}
