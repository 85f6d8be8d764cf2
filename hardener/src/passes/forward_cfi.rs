//! `forward-cfi`: every indirect call and jump checks that its target is an entry whose address is taken; with the policy
//! `typed`, where the target's prototype is known, an entry of that prototype. All let targets outside the kernel's text
//! through.

use super::{CALL, CS, Context, JMP, Pass, PassError, thunk};
use crate::recipe::{Parameter, Recipe, VIOLATION};
use crate::text::Slots;
use crate::thunks::{CaveContents, forward_cfi, forward_class};
use penumbra_bundle::{Edit, ModuleEdit, Put, SlotKind};
use std::collections::BTreeMap;

/// The pass's name.
pub const NAME: &str = "forward-cfi";

/// Which entries a branch may reach: all whose addresses are taken, or those of its own class.
const POLICY: Parameter = Parameter {
    name: "policy",
    values: &["address-taken", "typed"],
    takes_list: true,
};

/// Whether `recipe` asks for types.
pub fn is_typed(recipe: &Recipe) -> bool {
    recipe.value(NAME, &POLICY) == "typed"
}

/// See the module.
pub struct ForwardCfi;

impl Pass for ForwardCfi {
    fn name(&self) -> &'static str {
        NAME
    }

    fn slot(&self) -> SlotKind {
        SlotKind::Indirect
    }

    fn does(&self) -> &'static str {
        "goes on only to an entry that an indirect branch may reach"
    }

    fn parameters(&self) -> &'static [Parameter] {
        &[VIOLATION, POLICY]
    }

    fn figures(&self, context: &Context<'_>) -> BTreeMap<String, u64> {
        let forward = context.analyses.forward;
        forward.map(|forward| forward.figures()).unwrap_or_default()
    }

    fn module(
        &self,
        slots: &Slots,
        cave: &CaveContents,
        _: &Recipe,
    ) -> Result<Vec<ModuleEdit>, PassError> {
        let edits = slots.indirect.iter().map(|slot| {
            let name = forward_cfi::name(slot.register, slot.scratch_free);
            let mut before = vec![CS; usize::from(slot.len) - 5];
            before.push(if slot.jump { JMP } else { CALL });
            Ok(ModuleEdit {
                at: slot.at,
                slot: SlotKind::Indirect,
                put: Put::Branch(before, thunk(cave, NAME, &name)?),
            })
        });
        edits.collect()
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let edits = context.indirect().map(|slot| {
            let own = context
                .analyses
                .forward
                .and_then(|forward| forward_class::name(forward, slot));
            let name = own.unwrap_or_else(|| forward_cfi::name(slot.register, slot.scratch_free));
            let thunk = context.thunk(self.name(), &name)?;
            let opcode = if slot.jump { JMP } else { CALL };
            // The prefix stays: the return address does too.
            Ok(Edit {
                at: slot.at,
                slot: SlotKind::Indirect,
                bytes: context.branch(slot.at, usize::from(slot.len) - 5, opcode, thunk),
            })
        });
        Ok((
            edits.collect::<Result<_, PassError>>()?,
            context.text.slots.indirect_left.clone(),
        ))
    }
}
