//! `forward_cfi_REG_cN`: the target in REG must be an entry of class N, or lie outside the kernel's text.
//!
//! The class is code: its members are compared with one after another when they are few, by halving when they are many. Most
//! classes have a handful, and a table would have to be read.

use super::assembler::{Section, Thunk, imm32};
use super::forward_cfi::{Scratch, scratch};
use super::{KernelThunks, Violation};
use crate::text::{Indirect, REGISTERS};
use crate::types::{Forward, Reach};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use penumbra_bundle::{LinkVa, Offending, TextOff, VaRange};
use std::collections::{BTreeMap, BTreeSet};

/// So many are compared with one after another.
const FEW: usize = 4;

/// The thunk for a slot of class `class`; none when the class is that of all entries, which have a table.
pub fn name(forward: &Forward, slot: &Indirect) -> Option<String> {
    let class = forward.class_number(slot.at)?;
    has_thunk(&forward.classes[class as usize].reach).then(|| {
        let form = if slot.scratch_free { "" } else { "saving_" };
        let register = REGISTERS[usize::from(slot.register)];
        format!("forward_cfi_{form}{register}_c{class}")
    })
}

/// Whether a class is checked by itself: what is not typed is in classes of ten thousands, for which there is the table of
/// all entries.
pub fn has_thunk(reach: &Reach) -> bool {
    matches!(reach, Reach::Functions(_) | Reach::Prototypes(_))
}

/// Assembles the thunks that the text's slots need.
pub fn emit(
    section: &mut Section,
    forward: &Forward,
    text: VaRange,
    kernel: &KernelThunks,
    slots: &[Indirect],
    violation: &Violation,
) {
    let mut needed: BTreeMap<String, (&Indirect, u32)> = BTreeMap::new();
    for slot in slots {
        if let (Some(name), Some(class)) = (name(forward, slot), forward.class_number(slot.at)) {
            needed.insert(name, (slot, class));
        }
    }
    // What is stopped is reported by one thunk for each register.
    let registers: BTreeSet<u8> = needed.values().map(|(slot, _)| slot.register).collect();
    let mut reports = BTreeMap::new();
    for register in registers {
        let Some(retpoline) = kernel.indirect.get(&register) else {
            continue;
        };
        let name = format!("forward_cfi_stop_{}", REGISTERS[usize::from(register)]);
        let at = section.thunk(&name, violation, |thunk| {
            if violation.report(thunk, Offending::Register(register))? {
                thunk.asm.jmp(retpoline.0)?;
            }
            Ok(())
        });
        reports.insert(register, (*retpoline, at));
    }
    for (name, (slot, class)) in needed {
        let Some((retpoline, stop)) = reports.get(&slot.register) else {
            continue;
        };
        let entries = &forward.classes[class as usize].entries;
        section.thunk(&name, violation, |thunk| {
            one(thunk, slot, entries, text, *retpoline, *stop)
        });
    }
}

fn one(
    thunk: &mut Thunk,
    slot: &Indirect,
    entries: &[TextOff],
    text: VaRange,
    retpoline: LinkVa,
    stop: LinkVa,
) -> Result<(), IcedError> {
    let Scratch {
        register: scratch,
        target,
        save,
        ..
    } = scratch(slot.register, slot.scratch_free);
    let a = &mut thunk.asm;
    let (mut ok, mut outside) = (a.create_label(), a.create_label());
    let mut bad = a.create_label();
    if save {
        a.push(scratch)?;
    }
    if !slot.scratch_free {
        a.pushfq()?;
    }
    a.mov(scratch, target)?;
    a.sub(scratch, imm32(text.start))?;
    thunk.absolute();
    let a = &mut thunk.asm;
    among(a, scratch, entries, ok, outside, true)?;
    a.set_label(&mut outside)?;
    a.cmp(scratch, text.len() as i32)?;
    a.jb(bad)?;
    let restore = |a: &mut CodeAssembler| {
        if !slot.scratch_free {
            a.popfq()?;
        }
        if save {
            a.pop(scratch)?;
        }
        Ok::<(), IcedError>(())
    };
    a.set_label(&mut ok)?;
    restore(a)?;
    a.jmp(retpoline.0)?;
    a.set_label(&mut bad)?;
    restore(a)?;
    a.jmp(stop.0)
}

/// Goes to `ok` when `offset` is one of `entries`, which are sorted; else to `outside`, which stands behind the `last` piece.
fn among(
    a: &mut CodeAssembler,
    offset: AsmRegister64,
    entries: &[TextOff],
    ok: CodeLabel,
    outside: CodeLabel,
    last: bool,
) -> Result<(), IcedError> {
    if entries.len() <= FEW {
        for entry in entries {
            a.cmp(offset, entry.0 as i32)?;
            a.je(ok)?;
        }
        if !last {
            a.jmp(outside)?;
        }
        return Ok(());
    }
    let (below, rest) = entries.split_at(entries.len() / 2);
    let mut above = a.create_label();
    a.cmp(offset, rest[0].0 as i32)?;
    a.je(ok)?;
    a.ja(above)?;
    among(a, offset, below, ok, outside, false)?;
    a.set_label(&mut above)?;
    among(a, offset, &rest[1..], ok, outside, last)
}
