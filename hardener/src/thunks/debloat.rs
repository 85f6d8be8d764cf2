//! `debloat_FUNCTION`: a direct call or jump to a function outside the profile goes here instead. It reports, and where it goes
//! on it does so into the function, with everything as the caller left it.

use super::Violation;
use super::assembler::Section;
use crate::text::Text;
use crate::text::outside::Outside;
use penumbra_bundle::{LinkVa, Offending, TextOff};
use std::collections::BTreeSet;

/// How the thunks' names begin; the function's own follows.
const PREFIX: &str = "debloat_";

/// The thunk that stands for the function at `to`, which is one of those outside.
pub fn name(outside: &Outside, to: TextOff) -> String {
    format!("{PREFIX}{}", outside.name(to).unwrap_or_default())
}

/// Whether a thunk of this name is one.
pub fn is_name(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// Assembles a thunk for each function that some slot enters.
pub fn emit(section: &mut Section, text: &Text, outside: &Outside, violation: &Violation) {
    let entered: BTreeSet<TextOff> = outside.slots.iter().map(|slot| slot.to).collect();
    for to in entered {
        let LinkVa(va) = text.va(to);
        section.packed(&name(outside, to), violation, |thunk| {
            if violation.report(thunk, Offending::Address(LinkVa(va)))? {
                thunk.asm.jmp(va)?;
            }
            Ok(())
        });
    }
}
