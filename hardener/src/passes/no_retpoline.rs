//! `no-retpoline`: the indirect branch itself, filled with CS prefixes to the slot's length, so the return address stays.

use super::{CS, Context, Pass, PassError};
use crate::recipe::Recipe;
use crate::text::{Indirect, Slots};
use crate::thunks::CaveContents;
use penumbra_bundle::{Edit, Mitigation, ModuleEdit, Put, SlotKind};
use std::collections::BTreeMap;

/// See the module.
pub struct NoRetpoline;

impl Pass for NoRetpoline {
    fn name(&self) -> &'static str {
        "no-retpoline"
    }

    fn slot(&self) -> SlotKind {
        SlotKind::Indirect
    }

    fn does(&self) -> &'static str {
        "branches without the retpoline"
    }

    fn drops(&self) -> Option<Mitigation> {
        Some(Mitigation::Retpoline)
    }

    fn module(
        &self,
        slots: &Slots,
        _: &CaveContents,
        _: &Recipe,
    ) -> Result<Vec<ModuleEdit>, PassError> {
        let edits = slots.indirect.iter().map(|slot| ModuleEdit {
            at: slot.at,
            slot: SlotKind::Indirect,
            put: Put::Bytes(branch(slot)),
        });
        Ok(edits.collect())
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let edits = context.indirect().map(|slot| Edit {
            at: slot.at,
            slot: SlotKind::Indirect,
            bytes: branch(slot),
        });
        Ok((edits.collect(), context.text.slots.indirect_left.clone()))
    }
}

/// `call/jmp *%reg`: FF /2 or FF /4 (SDM volume 2, CALL and JMP); legacy prefixes stand before REX.
fn branch(slot: &Indirect) -> Vec<u8> {
    let operation = if slot.jump { 0xe0 } else { 0xd0 };
    let mut branch = Vec::with_capacity(6);
    if slot.register >= 8 {
        branch.push(0x41);
    }
    branch.extend([0xff, operation | slot.register & 7]);
    let mut bytes = vec![CS; usize::from(slot.len) - branch.len()];
    bytes.extend(branch);
    bytes
}

#[cfg(test)]
mod tests {
    use super::branch;
    use crate::text::Indirect;
    use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};
    use penumbra_bundle::TextOff;

    #[test]
    fn each_slot_is_one_instruction_of_the_same_length_on_the_same_register() {
        for register in 0..16u8 {
            for (len, jump) in [(5, false), (6, false), (5, true), (6, true)] {
                let slot = Indirect {
                    at: TextOff(0),
                    len,
                    register,
                    jump,
                    scratch_free: true,
                };
                let bytes = branch(&slot);
                let decoded = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
                assert_eq!(decoded.len(), usize::from(len), "{bytes:02x?}");
                let mut text = String::new();
                GasFormatter::new().format(&decoded, &mut text);
                let name = crate::text::REGISTERS[usize::from(register)];
                let operation = if jump { "jmp" } else { "call" };
                assert!(
                    text.contains(operation) && text.ends_with(&format!("*%{name}")),
                    "{text}"
                );
            }
        }
    }
}
