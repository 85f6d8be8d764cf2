//! `return_cfi_N`: the return address must follow a call of one of a function's callers' targets.
//!
//! Every function has a short thunk, which compares what the call before the return address names with a few constants, all of
//! them relative to the instruction pointer. What it does not know it hands over, with the stack as it found it, to one of a few
//! shared thunks: these let through what lies outside the text (modules, BPF, trampolines), what pushes return addresses
//! itself, the returns of indirect calls where the function has such callers, and any return site whose call a kprobe
//! replaces by INT3 (arch/x86/kernel/kprobes/core.c; an optimised kprobe covers no call, `can_boost`).

use super::assembler::{Section, Thunk, imm32};
use super::return_cfi::Mode;
use super::{Hashed, Targets, Violation};
use crate::text::Slots;
use crate::text::return_sets::{Check, ReturnSets};
use crate::text::zeroing::Zeroing;
use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register};
use penumbra_bundle::{LinkVa, Offending, TextOff};
use std::collections::{BTreeMap, BTreeSet};

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
    /// Which returns clear registers, if any do.
    pub zeroing: Option<&'a Zeroing>,
    /// All return sites.
    pub sites: Targets,
    /// Where indirect calls return to.
    pub indirect: Hashed,
    /// Code that is returned to though no call stands before it.
    pub special: &'a [TextOff],
    /// `__x86_return_thunk`.
    pub return_thunk: LinkVa,
    /// Whether thunks that compare with one function share the code that does: a jump more for each return, half the size.
    pub shared: bool,
}

/// The thunk of the check of this number; none when any return site will do.
pub fn name(sets: &ReturnSets, check: u32, mode: Mode) -> Option<String> {
    match &sets.checks[check as usize] {
        Check::AnySite => None,
        Check::Callers {
            called, indirect, ..
        } if called.is_empty() => Some(mode.named(if *indirect { INDIRECT } else { DIRECT })),
        Check::Callers { .. } => Some(mode.named(&format!("return_cfi_{check}"))),
    }
}

/// Assembles the thunks of all slots; `any` are those for which any return site will do.
pub fn emit(
    section: &mut Section,
    needs: &Needs<'_>,
    any: &BTreeMap<Mode, LinkVa>,
    violation: &Violation,
) {
    let slots = needs.slots.returns.iter().enumerate();
    let used: BTreeSet<(Mode, u32)> = slots
        .map(|(index, slot)| {
            let zeroing = needs.zeroing.is_some_and(|zeroing| zeroing.of_slot[index]);
            let mode = if zeroing {
                Mode::Zeroing
            } else {
                Mode::of(slot)
            };
            (mode, needs.sets.of_slot[index])
        })
        .collect();
    // A thunk that nothing leads to is none that could be proved.
    let missing: BTreeSet<(Mode, bool)> = used
        .iter()
        .filter_map(|(mode, index)| match &needs.sets.checks[*index as usize] {
            Check::Callers { indirect, .. } => Some((*mode, *indirect)),
            Check::AnySite => None,
        })
        .collect();
    let mut tails = BTreeMap::new();
    let mut misses = BTreeMap::new();
    for (mode, any) in any {
        // Clearing is no thunk of its own: what jumps there has looked at the return address.
        let tail = section.thunk_or_piece(
            (*mode != Mode::Zeroing).then(|| mode.named("return_cfi_tail")),
            violation,
            |thunk| {
                mode.restore(thunk)?;
                mode.finish(thunk, needs.return_thunk)
            },
        );
        tails.insert(*mode, tail);
        for (name, indirect) in [(DIRECT, false), (INDIRECT, true)] {
            if missing.contains(&(*mode, indirect)) {
                let table = indirect.then_some(&needs.indirect);
                let miss = section.thunk(&mode.named(name), violation, |thunk| {
                    miss(thunk, needs, *mode, table, *any, violation)
                });
                misses.insert((*mode, indirect), miss);
            }
        }
    }
    let mut shared = BTreeMap::new();
    for (mode, index) in used {
        let Check::Callers {
            called,
            indirect,
            opcode,
        } = &needs.sets.checks[index as usize]
        else {
            continue;
        };
        let (Some(name), false) = (name(needs.sets, index, mode), called.is_empty()) else {
            continue;
        };
        let text = needs.sites.text.start;
        let called: Vec<LinkVa> = called
            .iter()
            .map(|at| LinkVa(text.0 + u64::from(at.0)))
            .collect();
        let (tail, miss) = (tails[&mode], misses[&(mode, *indirect)]);
        if let ([only], true) = (&called[..], needs.shared) {
            let key = (mode, *indirect, *opcode);
            let rest = *shared.entry(key).or_insert_with(|| {
                section.thunk_or_piece(None, violation, |thunk| {
                    compare_rest(thunk, &[*only], *opcode, mode, tail, miss)
                })
            });
            section.packed(&name, violation, |thunk| {
                name_callee(thunk, *only, mode)?;
                thunk.asm.jmp(rest.0)
            });
            continue;
        }
        section.packed(&name, violation, |thunk| {
            name_callee(thunk, called[0], mode)?;
            compare_rest(thunk, &called, *opcode, mode, tail, miss)
        });
    }
}

/// Puts a callee's address into r10, which is saved first where it must be.
fn name_callee(thunk: &mut Thunk, callee: LinkVa, mode: Mode) -> Result<(), IcedError> {
    if mode.saved() > 0 {
        thunk.asm.push(r10)?;
    }
    let callee = MemoryOperand::with_base_displ_size(Register::RIP, callee.0 as i64, 8);
    let lea = Instruction::with2(Code::Lea_r64_m, Register::R10, callee)?;
    thunk.asm.add_instruction(lea)
}

/// Compares the call before the return address with the functions `called`, of which the first is in r10.
fn compare_rest(
    thunk: &mut Thunk,
    called: &[LinkVa],
    opcode: bool,
    mode: Mode,
    tail: LinkVa,
    miss: LinkVa,
) -> Result<(), IcedError> {
    if mode.saved() > 0 {
        thunk.asm.push(r11)?;
        thunk.asm.pushfq()?;
    }
    reload(thunk, mode)?;
    let a = &mut thunk.asm;
    let mut other = a.create_label();
    if opcode {
        a.cmp(byte_ptr(r11 - 5), CALL)?;
        a.jne(other)?;
    }
    // The displacement is the callee less the return address.
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
    mode.restore(thunk)?;
    thunk.asm.jmp(miss.0)
}

/// Puts the return address into r11.
fn load(thunk: &mut Thunk, mode: Mode) -> Result<(), IcedError> {
    mode.save(thunk)?;
    reload(thunk, mode)
}

fn reload(thunk: &mut Thunk, mode: Mode) -> Result<(), IcedError> {
    thunk.asm.mov(r11, qword_ptr(rsp + mode.saved()))
}

/// What no constant told.
fn miss(
    thunk: &mut Thunk,
    needs: &Needs<'_>,
    mode: Mode,
    indirect: Option<&Hashed>,
    any: LinkVa,
    violation: &Violation,
) -> Result<(), IcedError> {
    load(thunk, mode)?;
    let a = &mut thunk.asm;
    let (mut ok, mut probed) = (a.create_label(), a.create_label());
    let saving = mode == Mode::Saving;
    let mut end = if saving { a.create_label() } else { ok };
    a.sub(r11, imm32(needs.sites.text.start))?;
    thunk.absolute();
    let a = &mut thunk.asm;
    a.cmp(r11, needs.sites.text.len() as i32)?;
    a.jae(ok)?;
    for part in indirect.iter().flat_map(|table| table.parts()) {
        part.index(&mut thunk.asm, r10d, r11d)?;
        part.compare(thunk, r11d, r10, ok)?;
    }
    let a = &mut thunk.asm;
    for at in needs.special {
        a.cmp(r11d, at.0 as i32)?;
        a.je(ok)?;
    }
    reload(thunk, mode)?;
    let a = &mut thunk.asm;
    a.cmp(byte_ptr(r11 - 5), INT3)?;
    a.je(probed)?;
    mode.restore(thunk)?;
    if violation.report(thunk, Offending::Stack(0))? {
        thunk.asm.jmp(end)?;
    }
    thunk.asm.set_label(&mut ok)?;
    mode.restore(thunk)?;
    if saving {
        thunk.asm.set_label(&mut end)?;
    }
    mode.finish(thunk, needs.return_thunk)?;
    thunk.asm.set_label(&mut probed)?;
    mode.restore(thunk)?;
    thunk.asm.jmp(any.0)
}
