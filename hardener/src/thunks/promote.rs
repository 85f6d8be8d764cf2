//! `promote_REG_TARGET...`: compares the target in REG with the hottest ones and jumps there directly; any other is reached as
//! `fast` does, by the plain indirect branch.

use super::Violation;
use super::assembler::{Section, imm32};
use super::forward_cfi;
use crate::text::REGISTERS;
use crate::text::promotion::Promotion;
use crate::text::{Indirect, Slots};
use penumbra_bundle::LinkVa;
use std::collections::BTreeSet;

/// How the names of these thunks begin.
pub const PREFIX: &str = "promote_";

/// The thunk for a register and targets.
pub fn name(register: u8, targets: &[LinkVa]) -> String {
    let mut name = format!("{PREFIX}{}", REGISTERS[usize::from(register)]);
    for target in targets {
        // The high half is the same for all of the text.
        name.push_str(&format!("_{:08x}", target.0 as u32));
    }
    name
}

/// Assembles the thunks that the slots need.
pub fn emit(section: &mut Section, promotion: &Promotion, slots: &Slots, violation: &Violation) {
    let needed = slots.indirect.iter().zip(&promotion.of_slot);
    let needed = needed.filter(|(_, targets)| !targets.is_empty());
    let needed: BTreeSet<(u8, &[LinkVa])> = needed
        .map(|(slot, targets): (&Indirect, _)| (slot.register, targets.as_slice()))
        .collect();
    for (register, targets) in needed {
        section.thunk(&name(register, targets), violation, |thunk| {
            let target = forward_cfi::scratch(register, true).target;
            for known in targets {
                thunk.asm.cmp(target, imm32(*known))?;
                thunk.absolute();
                thunk.asm.je(known.0)?;
            }
            thunk.asm.jmp(target)?;
            // Nothing behind it may be executed ahead of time (straight-line speculation).
            thunk.asm.int3()
        });
    }
}
