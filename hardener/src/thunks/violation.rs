//! What a thunk does about a value that it does not accept: it reports by a trap to the hypervisor, then acts as the recipe says.
//!
//! The trap is an `out` to a port that no device of a PC uses. Outside Penumbra's Xen it does nothing; inside, Xen sees the
//! registers and the stack as the slot left them, so nothing has to be said about them here.

use super::assembler::{Thunk, imm32};
use iced_x86::code_asm::{al, eax};
use iced_x86::{Code, IcedError, Instruction, Register};
use penumbra_bundle::{LinkVa, Offending, ViolationAction};

/// Report and go on.
const PORT_LOG: i32 = 0xe4;
/// Report; what follows is the end.
const PORT_FATAL: i32 = 0xe5;

/// What the thunks of one pass do.
#[derive(Clone, Copy)]
pub struct Violation {
    /// The pass.
    pub pass: &'static str,
    /// The recipe's choice.
    pub action: ViolationAction,
    /// The kernel's `panic`.
    pub panic: LinkVa,
    /// What it is told.
    pub message: LinkVa,
}

impl Violation {
    /// What `panic` prints, NUL included; it is a format (kernel/panic.c), so no `%` may be in it.
    pub fn message_text(&self) -> Vec<u8> {
        format!("Penumbra: {} violation\0", self.pass).into_bytes()
    }

    /// Assembles the report and what follows. True when the thunk has to go on as its slot would have.
    ///
    /// The stack, and all registers that the thunk must keep, are restored by now.
    pub fn report(&self, thunk: &mut Thunk, offending: Offending) -> Result<bool, IcedError> {
        thunk.trap(offending);
        match self.action {
            ViolationAction::Log => {
                thunk.asm.out(PORT_LOG, al)?;
                return Ok(true);
            }
            ViolationAction::Kill => {
                thunk.asm.out(PORT_FATAL, al)?;
                // In no bug table, so the kernel ends the task (arch/x86/kernel/traps.c, handle_invalid_op).
                thunk.asm.ud2()?;
            }
            ViolationAction::Panic => {
                thunk.asm.out(PORT_FATAL, al)?;
                let message = imm32(self.message);
                let told = Instruction::with2(Code::Mov_rm64_imm32, Register::RDI, message)?;
                thunk.asm.add_instruction(told)?;
                thunk.absolute();
                // No vector registers among the variable arguments (System V psABI, 3.5.7).
                thunk.asm.xor(eax, eax)?;
                thunk.asm.jmp(self.panic.0)?;
            }
        }
        Ok(false)
    }
}
