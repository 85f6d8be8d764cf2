//! `return-cfi`: every return checks that its address follows a call; with the policy `function`, a call that can reach the
//! function that returns.

use super::{Context, JMP, Pass, PassError, thunk};
use crate::recipe::{Parameter, Recipe, VIOLATION};
use crate::text::Slots;
use crate::thunks::{CaveContents, return_cfi, return_function};
use penumbra_bundle::{Edit, ModuleEdit, Put, SlotKind};
use std::collections::BTreeMap;

/// The pass's name.
pub const NAME: &str = "return-cfi";

/// Which return addresses are legal: those behind any call, or those behind calls that can reach the function.
const POLICY: Parameter = Parameter {
    name: "policy",
    values: &["return-sites", "function"],
};

/// Whether `recipe` asks for each function's own return addresses.
pub fn is_per_function(recipe: &Recipe) -> bool {
    recipe.value(NAME, &POLICY) == "function"
}

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
        &[VIOLATION, POLICY]
    }

    fn figures(&self, context: &Context<'_>) -> BTreeMap<String, u64> {
        let sets = context.return_sets;
        sets.map(|sets| sets.figures.clone()).unwrap_or_default()
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
        let mut edits = Vec::with_capacity(context.text.slots.returns.len());
        for (index, slot) in context.returns().enumerate() {
            let any = if slot.scratch_free { plain } else { saving };
            let thunk = match context.return_sets {
                Some(sets) => {
                    let check = sets.of_slot[index];
                    match return_function::name(sets, check, !slot.scratch_free) {
                        Some(name) => context.thunk(self.name(), &name)?,
                        None => any,
                    }
                }
                None => any,
            };
            edits.push(Edit {
                at: slot.at,
                slot: SlotKind::Return,
                bytes: context.branch(slot.at, 0, JMP, thunk),
            });
        }
        Ok((edits, context.text.slots.returns_left.clone()))
    }
}
