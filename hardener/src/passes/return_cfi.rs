//! `return-cfi`: every return checks that its address follows a call.

use super::{Context, JMP, Pass, PassError, thunk};
use crate::recipe::{Parameter, VIOLATION};
use crate::text::Slots;
use crate::thunks::{CaveContents, return_cfi};
use penumbra_bundle::{Edit, ModuleEdit, Put, SlotKind};
use std::collections::BTreeMap;

/// The pass's name.
pub const NAME: &str = "return-cfi";

/// See the module.
pub struct ReturnCfi;

impl Pass for ReturnCfi {
    fn name(&self) -> &'static str {
        NAME
    }

    fn slot(&self) -> SlotKind {
        SlotKind::Return
    }

    fn does(&self) -> &'static str {
        "goes back only to where a call returns to"
    }

    fn parameters(&self) -> &'static [Parameter] {
        &[VIOLATION]
    }

    fn module(&self, slots: &Slots, cave: &CaveContents) -> Result<Vec<ModuleEdit>, PassError> {
        let plain = thunk(cave, NAME, return_cfi::PLAIN)?;
        let saving = thunk(cave, NAME, return_cfi::SAVING)?;
        let edits = slots.returns.iter().map(|slot| ModuleEdit {
            at: slot.at,
            slot: SlotKind::Return,
            put: Put::Branch(vec![JMP], if slot.scratch_free { plain } else { saving }),
        });
        Ok(edits.collect())
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let plain = context.thunk(self.name(), return_cfi::PLAIN)?;
        let saving = context.thunk(self.name(), return_cfi::SAVING)?;
        let edits = context.returns().map(|slot| Edit {
            at: slot.at,
            slot: SlotKind::Return,
            bytes: context.branch(
                slot.at,
                0,
                JMP,
                if slot.scratch_free { plain } else { saving },
            ),
        });
        Ok((edits.collect(), context.text.slots.returns_left.clone()))
    }
}
