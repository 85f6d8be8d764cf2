//! `module_free`: says whose memory is about to be freed (the argument of the call that is hooked), then does the call.

use super::Violation;
use super::assembler::Section;
use iced_x86::code_asm::al;
use penumbra_bundle::LinkVa;

/// The thunk's symbol.
pub const NAME: &str = "module_free";
/// A module's memory is about to be freed: RDI is its `struct module`.
const PORT_FREE: i32 = 0xe6;

/// Assembles it. It changes no register and no flag, and makes no report of a violation.
pub fn emit(section: &mut Section, cleanup: LinkVa, violation: &Violation) {
    section.thunk(NAME, violation, |thunk| {
        thunk.asm.out(PORT_FREE, al)?;
        thunk.asm.jmp(cleanup.0)
    });
}
