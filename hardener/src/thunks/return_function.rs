//! `return_cfi_N`: the return address must follow a call of one of a function's callers' targets.
//!
//! Every function has a short thunk, which compares what the call before the return address names with a few constants, all of
//! them relative to the instruction pointer. What it does not know it hands over, with the stack as it found it, to one of a few
//! shared thunks: these let through what lies outside the text (modules, BPF, trampolines), what pushes return addresses
//! itself, the returns of indirect calls where the function has such callers, and any return site whose call a kprobe
//! replaces by INT3 (arch/x86/kernel/kprobes/core.c; an optimised kprobe covers no call, `can_boost`).

use super::assembler::{Section, Thunk, imm32};
use super::{Hashed, Targets, Violation, return_cfi};
use crate::text::Slots;
use crate::text::return_sets::{Check, ReturnSets};
use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register};
use penumbra_bundle::{LinkVa, Offending, TextOff};
use std::collections::BTreeSet;

const DIRECT: &str = "return_cfi_direct";
const INDIRECT: &str = "return_cfi_indirect";
/// `call rel32`.
const CALL: i32 = 0xe8;
/// INT3, which a kprobe puts over a call's first byte.
const INT3: i32 = 0xcc;

/// What these thunks need.
pub struct Needs<'a> {
    /// What the returns may go back to.
    pub sets: &'a ReturnSets,
    /// The kernel's slots.
    pub slots: &'a Slots,
    /// All return sites.
    pub sites: Targets,
    /// Where indirect calls return to.
    pub indirect: Hashed,
    /// Code that is returned to though no call stands before it.
    pub special: &'a [TextOff],
    /// `__x86_return_thunk`.
    pub return_thunk: LinkVa,
}

/// The thunk of the check of this number; none when any return site will do.
pub fn name(sets: &ReturnSets, check: u32, saving: bool) -> Option<String> {
    match &sets.checks[check as usize] {
        Check::AnySite => None,
        Check::Callers {
            called, indirect, ..
        } if called.is_empty() => Some(shared(if *indirect { INDIRECT } else { DIRECT }, saving)),
        Check::Callers { .. } if saving => Some(format!("return_cfi_{check}_saving")),
        Check::Callers { .. } => Some(format!("return_cfi_{check}")),
    }
}

fn shared(name: &str, saving: bool) -> String {
    match saving {
        true => format!("{name}_saving"),
        false => name.to_owned(),
    }
}

/// Assembles the thunks of all slots; `any` are those for which any return site will do.
pub fn emit(section: &mut Section, needs: &Needs<'_>, any: [LinkVa; 2], violation: &Violation) {
    // Without and with what they save.
    let mut tails = [LinkVa(0); 2];
    let mut misses = [[LinkVa(0); 2]; 2];
    for saving in [false, true] {
        let at = usize::from(saving);
        tails[at] = section.thunk(&shared("return_cfi_tail", saving), violation, |thunk| {
            if saving {
                return_cfi::restore(thunk)?;
            }
            thunk.return_tail(needs.return_thunk)
        });
        for (kind, name) in [DIRECT, INDIRECT].into_iter().enumerate() {
            misses[at][kind] = section.thunk(&shared(name, saving), violation, |thunk| {
                let indirect = (kind == 1).then_some(&needs.indirect);
                miss(thunk, needs, saving, indirect, any[at], violation)
            });
        }
    }
    let used = needs.slots.returns.iter().zip(&needs.sets.of_slot);
    let used: BTreeSet<(bool, u32)> = used
        .map(|(slot, check)| (!slot.scratch_free, *check))
        .collect();
    for (saving, index) in used {
        let Check::Callers {
            called,
            indirect,
            opcode,
        } = &needs.sets.checks[index as usize]
        else {
            continue;
        };
        let (Some(name), false) = (name(needs.sets, index, saving), called.is_empty()) else {
            continue;
        };
        let text = needs.sites.text.start;
        let called: Vec<LinkVa> = called
            .iter()
            .map(|at| LinkVa(text.0 + u64::from(at.0)))
            .collect();
        let at = usize::from(saving);
        let (tail, miss) = (tails[at], misses[at][usize::from(*indirect)]);
        section.packed(&name, violation, |thunk| {
            compare(thunk, &called, *opcode, saving, tail, miss)
        });
    }
}

/// Compares the call before the return address.
fn compare(
    thunk: &mut Thunk,
    called: &[LinkVa],
    opcode: bool,
    saving: bool,
    tail: LinkVa,
    miss: LinkVa,
) -> Result<(), IcedError> {
    load(thunk, saving)?;
    let a = &mut thunk.asm;
    let mut other = a.create_label();
    if opcode {
        a.cmp(byte_ptr(r11 - 5), CALL)?;
        a.jne(other)?;
    }
    // The displacement is the callee less the return address.
    let callee = MemoryOperand::with_base_displ_size(Register::RIP, called[0].0 as i64, 8);
    a.add_instruction(Instruction::with2(Code::Lea_r64_m, Register::R10, callee)?)?;
    a.sub(r10d, r11d)?;
    a.cmp(dword_ptr(r11 - 4), r10d)?;
    a.je(tail.0)?;
    for pair in called.windows(2) {
        a.add(r10d, pair[1].0.wrapping_sub(pair[0].0) as i32)?;
        a.cmp(dword_ptr(r11 - 4), r10d)?;
        a.je(tail.0)?;
    }
    if opcode {
        a.set_label(&mut other)?;
    }
    if saving {
        return_cfi::restore(thunk)?;
    }
    thunk.asm.jmp(miss.0)
}

/// Puts the return address into r11.
fn load(thunk: &mut Thunk, saving: bool) -> Result<(), IcedError> {
    let a = &mut thunk.asm;
    if saving {
        a.push(r10)?;
        a.push(r11)?;
        a.pushfq()?;
    }
    reload(thunk, saving)
}

fn reload(thunk: &mut Thunk, saving: bool) -> Result<(), IcedError> {
    let saved = if saving { 24 } else { 0 };
    thunk.asm.mov(r11, qword_ptr(rsp + saved))
}

/// What no constant told.
fn miss(
    thunk: &mut Thunk,
    needs: &Needs<'_>,
    saving: bool,
    indirect: Option<&Hashed>,
    any: LinkVa,
    violation: &Violation,
) -> Result<(), IcedError> {
    load(thunk, saving)?;
    let a = &mut thunk.asm;
    let (mut ok, mut probed) = (a.create_label(), a.create_label());
    let mut end = if saving { a.create_label() } else { ok };
    a.sub(r11, imm32(needs.sites.text.start))?;
    thunk.absolute();
    let a = &mut thunk.asm;
    a.cmp(r11, needs.sites.text.len() as i32)?;
    a.jae(ok)?;
    for (part, multiplier) in indirect.iter().flat_map(|table| table.parts()) {
        let a = &mut thunk.asm;
        a.imul_3(r10d, r11d, multiplier as i32)?;
        a.shr(r10d, indirect.map_or(0, |table| table.shift))?;
        a.cmp(r11d, dword_ptr(r10 * 4 + i64::from(imm32(part))))?;
        thunk.absolute();
        thunk.asm.je(ok)?;
    }
    let a = &mut thunk.asm;
    for at in needs.special {
        a.cmp(r11d, at.0 as i32)?;
        a.je(ok)?;
    }
    reload(thunk, saving)?;
    let a = &mut thunk.asm;
    a.cmp(byte_ptr(r11 - 5), INT3)?;
    a.je(probed)?;
    if saving {
        return_cfi::restore(thunk)?;
    }
    if violation.report(thunk, Offending::Stack(0))? {
        thunk.asm.jmp(end)?;
    }
    thunk.asm.set_label(&mut ok)?;
    if saving {
        return_cfi::restore(thunk)?;
        thunk.asm.set_label(&mut end)?;
    }
    thunk.return_tail(needs.return_thunk)?;
    thunk.asm.set_label(&mut probed)?;
    if saving {
        return_cfi::restore(thunk)?;
    }
    thunk.asm.jmp(any.0)
}
