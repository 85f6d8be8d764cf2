//! `return-cfi`: every return checks that its address follows a call.

use super::{Context, JMP, Pass, PassError};
use crate::recipe::ON_VIOLATION;
use crate::thunks::return_cfi;
use penumbra_bundle::{Edit, SlotKind};
use std::collections::BTreeMap;

/// The pass's name.
pub const NAME: &str = "return-cfi";

/// See the module.
pub struct ReturnCfi;

impl Pass for ReturnCfi {
    fn name(&self) -> &'static str {
        NAME
    }

    fn parameters(&self) -> &'static [&'static str] {
        &[ON_VIOLATION]
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
