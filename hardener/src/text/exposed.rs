//! Which functions' frames can be overrun: those whose address, or that of something in them, gets into a register. It is what
//! `-fstack-protector-strong` looks for in the source (GCC manual, "Instrumentation Options"): arrays, and locals whose address
//! is taken. A jump to another function hands the frame's return address on, so that one counts as well.

use super::Text;
use super::callgraph::CallGraph;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use penumbra_bundle::TextOff;

/// The returns of one kernel by number: whether each leaves a frame that can be overrun.
pub struct Exposed(pub Vec<bool>);

impl Exposed {
    /// Asks about every R slot.
    pub fn find(text: &Text, graph: &CallGraph) -> Exposed {
        let count = text.functions.count();
        let mut exposed: Vec<bool> = (0..count)
            // What assembly does to its stack is not looked into.
            .map(|number| !graph.facts[number].compiled || gives_away(text, number))
            .collect();
        let mut jumps_to: Vec<Vec<u32>> = vec![Vec::new(); count];
        for (to, from) in graph.jumped_from.iter().enumerate() {
            for from in from {
                jumps_to[*from as usize].push(to as u32);
            }
        }
        let mut open: Vec<usize> = (0..count).filter(|number| exposed[*number]).collect();
        while let Some(number) = open.pop() {
            for to in &jumps_to[number] {
                let to = *to as usize;
                if !std::mem::replace(&mut exposed[to], true) {
                    open.push(to);
                }
            }
        }
        let slots = text.slots.returns.iter();
        Exposed(
            slots
                .map(|slot| {
                    let number = text.functions.number(slot.at);
                    number.is_none_or(|number| exposed[number])
                })
                .collect(),
        )
    }
}

/// Whether the function of this number puts an address in its stack somewhere.
fn gives_away(text: &Text, number: usize) -> bool {
    let code = text.span.code.len() as usize;
    let start = text.functions.start(number).0 as usize;
    let end = text.functions.starts_after(number);
    let end = end.map_or(code, |end| end.0 as usize).min(code);
    let Some(bytes) = text.bytes.get(start..end) else {
        return true;
    };
    let ip = text.va(TextOff(start as u32)).0;
    let decoder = Decoder::with_ip(64, bytes, ip, DecoderOptions::NONE);
    decoder
        .into_iter()
        .any(|instruction| takes_stack(&instruction))
}

/// Whether RSP is used as a number, or together with one.
fn takes_stack(instruction: &Instruction) -> bool {
    let to_itself =
        instruction.op0_kind() == OpKind::Register && instruction.op0_register() == Register::RSP;
    let through = instruction.memory_base() == Register::RSP;
    let mnemonic = instruction.mnemonic();
    let source = (1..instruction.op_count()).any(|operand| {
        instruction.op_kind(operand) == OpKind::Register
            && instruction.op_register(operand) == Register::RSP
    });
    source
        || to_itself && matches!(mnemonic, Mnemonic::Push | Mnemonic::Cmp | Mnemonic::Test)
        || through && mnemonic == Mnemonic::Lea && !to_itself
        || through && instruction.memory_index() != Register::None
}
