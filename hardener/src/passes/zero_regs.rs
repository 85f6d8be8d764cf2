//! `zero-regs`: a return clears the caller-saved registers in which nothing comes back, so that neither addresses nor what the
//! function worked on are left for whoever runs next. It shares its slots with `return-cfi`: the check comes first, its own
//! scratch registers are cleared too. A module's returns are left alone: who calls them is not known.

use super::return_cfi::thunk_of;
use super::{Context, JMP, Pass, PassError};
use crate::recipe::Recipe;
use crate::thunks::return_cfi::Mode;
use penumbra_bundle::{Edit, SlotKind};
use std::collections::BTreeMap;

const NAME: &str = "zero-regs";

/// Whether `recipe` asks for it.
pub fn is_wanted(recipe: &Recipe) -> bool {
    recipe.names(NAME)
}

/// See the module.
pub struct ZeroRegs;

impl Pass for ZeroRegs {
    fn name(&self) -> &'static str {
        NAME
    }

    fn slot(&self) -> SlotKind {
        SlotKind::Return
    }

    fn does(&self) -> &'static str {
        "clears the registers in which nothing comes back"
    }

    fn is_optional(&self) -> bool {
        true
    }

    fn shares_slots(&self) -> bool {
        true
    }

    fn is_in(&self, thunk: &str) -> bool {
        thunk.ends_with(&Mode::Zeroing.named(""))
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let Some(zeroing) = context.analyses.zeroing else {
            return Ok((Vec::new(), BTreeMap::new()));
        };
        let slots = context.returns().enumerate();
        let slots = slots.filter(|(index, _)| zeroing.of_slot[*index]);
        let edits = slots.map(|(index, slot)| {
            let thunk = thunk_of(context, index, Mode::Zeroing)?;
            Ok(Edit {
                at: slot.at,
                slot: SlotKind::Return,
                bytes: context.branch(slot.at, 0, JMP, thunk),
            })
        });
        Ok((
            edits.collect::<Result<_, PassError>>()?,
            zeroing.left.clone(),
        ))
    }
}
