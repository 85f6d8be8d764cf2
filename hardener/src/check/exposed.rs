//! Which functions' frames can be overrun, derived again: those that use RSP for more than to reach a word of their own at a
//! place that is fixed, and all to which one of them jumps.

use super::kernel::Kernel;
use iced_x86::{
    Decoder, DecoderOptions, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register,
};
use penumbra_bundle::LinkVa;
use std::collections::{BTreeMap, BTreeSet};

/// The functions, by where each starts; whether its frame can be overrun.
pub struct Exposed(BTreeMap<LinkVa, bool>);

impl Exposed {
    /// Looks at every instruction of the text, and at all jumps from function to function.
    pub fn of(kernel: &Kernel) -> Exposed {
        let code = kernel.symbols.iter();
        let code = code.filter(|symbol| symbol.is_code());
        let starts = code
            .map(|symbol| symbol.at)
            .chain(kernel.tables.fentry.iter().copied());
        let starts = starts.filter(|at| kernel.in_text(*at));
        let mut functions: BTreeMap<LinkVa, bool> = starts.map(|start| (start, false)).collect();
        let bytes = kernel.bytes(kernel.text).unwrap_or_default();
        let mut factory = InstructionInfoFactory::new();
        let decoder = Decoder::with_ip(64, bytes, kernel.text.start.0, DecoderOptions::NONE);
        for instruction in decoder {
            if gives_away(&instruction, &mut factory)
                && let Some((_, exposed)) =
                    functions.range_mut(..=LinkVa(instruction.ip())).next_back()
            {
                *exposed = true;
            }
        }
        let mut exposed = Exposed(functions);
        exposed.spread(kernel);
        exposed
    }

    /// A function that is jumped to returns in the frame of the one that jumps.
    fn spread(&mut self, kernel: &Kernel) {
        let branches = kernel.sweep.branches.iter();
        let jumps = branches.filter(|branch| branch.back.is_none());
        let jumps = jumps.map(|branch| (branch.at, branch.to));
        let silent = kernel.tables.silent_jumps.iter().copied();
        let mut leads: BTreeMap<LinkVa, BTreeSet<LinkVa>> = BTreeMap::new();
        for (at, to) in jumps.chain(silent) {
            let inside = kernel.in_text(to);
            if let (Some(from), Some(to), true) = (self.around(at), self.around(to), inside)
                && from != to
            {
                leads.entry(from).or_default().insert(to);
            }
        }
        let exposed = self.0.iter().filter(|(_, exposed)| **exposed);
        let mut open: Vec<LinkVa> = exposed.map(|(start, _)| *start).collect();
        while let Some(from) = open.pop() {
            for to in leads.get(&from).into_iter().flatten() {
                let known = self.0.entry(*to).or_default();
                if !std::mem::replace(known, true) {
                    open.push(*to);
                }
            }
        }
    }

    fn around(&self, at: LinkVa) -> Option<LinkVa> {
        self.0.range(..=at).next_back().map(|(start, _)| *start)
    }

    /// Whether the frame can be overrun in which the return at `at` stands; so it is taken to be where no function is.
    pub fn is(&self, at: LinkVa) -> bool {
        let function = self.0.range(..=at).next_back();
        function.is_none_or(|(_, exposed)| *exposed)
    }
}

/// Whether an instruction makes RSP a number among others, or reaches the stack at a place that is not fixed.
fn gives_away(instruction: &Instruction, factory: &mut InstructionInfoFactory) -> bool {
    let memory =
        (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory);
    if memory && instruction.memory_base() == Register::RSP {
        if instruction.memory_index() != Register::None {
            return true;
        }
        let lea = instruction.mnemonic() == iced_x86::Mnemonic::Lea;
        if lea && instruction.op0_register() != Register::RSP {
            return true;
        }
    }
    // As an operand that is read and is not also where the result goes.
    let info = factory.info(instruction);
    (0..instruction.op_count()).any(|operand| {
        instruction.op_kind(operand) == OpKind::Register
            && instruction.op_register(operand) == Register::RSP
            && info.op_access(operand) == OpAccess::Read
    })
}
