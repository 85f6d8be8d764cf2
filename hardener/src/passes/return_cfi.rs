//! `return-cfi`: every return checks that its address follows a call; with the policy `function`, a call that can reach the
//! function that returns; with `class`, of indirect calls too only one whose class has the function.

use super::{Analyses, Context, JMP, Pass, PassError, thunk};
use crate::recipe::{Parameter, Recipe, VIOLATION};
use crate::text::Slots;
use crate::thunks::return_cfi::Mode;
use crate::thunks::{CaveContents, return_cfi, return_function};
use penumbra_bundle::{Edit, LinkVa, ModuleEdit, Put, SlotKind};
use std::collections::BTreeMap;

/// The pass's name.
pub const NAME: &str = "return-cfi";

/// Which return addresses are legal: those behind any call, or those behind calls that can reach the function, where all indirect
/// calls count as such a call or only those whose class has the function.
const POLICY: Parameter = Parameter {
    name: "policy",
    values: &["return-sites", "function", "class"],
    takes_list: true,
};

/// Which returns are checked: all, those whose return address something can have changed (see [`crate::text::changeable`]), or
/// those of frames that can be overrun (see [`crate::text::exposed`]).
const SCOPE: Parameter = Parameter {
    name: "scope",
    values: &["all", "changeable", "frames"],
    takes_list: false,
};

/// Whether `recipe` leaves out returns of frames that cannot be overrun.
pub fn is_by_frame(recipe: &Recipe) -> bool {
    recipe.value(NAME, &SCOPE) == "frames"
}

/// Whether `recipe` leaves out returns whose return address nothing can have changed.
pub fn is_by_change(recipe: &Recipe) -> bool {
    recipe.value(NAME, &SCOPE) == "changeable"
}

/// Whether `recipe` asks for each function's own return addresses.
pub fn is_per_function(recipe: &Recipe) -> bool {
    recipe.value(NAME, &POLICY) != "return-sites"
}

/// Whether `recipe` asks for these by the classes of indirect calls.
pub fn is_by_class(recipe: &Recipe) -> bool {
    recipe.value(NAME, &POLICY) == "class"
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
        &[VIOLATION, POLICY, SCOPE]
    }

    fn figures(&self, context: &Context<'_>) -> BTreeMap<String, u64> {
        let Some(sets) = context.analyses.return_sets else {
            return BTreeMap::new();
        };
        let mut figures = sets.figures.clone();
        for (index, check) in sets.of_slot.iter().enumerate() {
            if context.analyses.checks(index) {
                let size = sets.sizes[*check as usize];
                *figures.entry(format!("set-size.{size}")).or_default() += 1;
            }
        }
        figures
    }

    fn module(
        &self,
        slots: &Slots,
        cave: &CaveContents,
        _: &Recipe,
    ) -> Result<Vec<ModuleEdit>, PassError> {
        let plain = thunk(cave, NAME, &return_cfi::name(Mode::Plain))?;
        let saving = thunk(cave, NAME, &return_cfi::name(Mode::Saving))?;
        let edits = slots.returns.iter().map(|slot| ModuleEdit {
            at: slot.at,
            slot: SlotKind::Return,
            put: Put::Branch(vec![JMP], if slot.scratch_free { plain } else { saving }),
        });
        Ok(edits.collect())
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let slots = context.returns().enumerate();
        let edits = slots.filter(|(index, _)| context.analyses.checks(*index));
        let edits = edits.map(|(index, slot)| {
            // Where registers are cleared too, there is one thunk for both.
            let mode = Mode::of(index, slot, &context.analyses);
            Ok(Edit {
                at: slot.at,
                slot: SlotKind::Return,
                bytes: context.branch(slot.at, 0, JMP, thunk_of(context, index, mode)?),
            })
        });
        let edits = edits.collect::<Result<Vec<_>, PassError>>()?;
        let mut left = context.text.slots.returns_left.clone();
        let unchecked = context.returns().count() - edits.len();
        if let Some(reason) = context.analyses.unchecked().filter(|_| unchecked > 0) {
            left.insert(reason.to_owned(), unchecked as u64);
        }
        Ok((edits, left))
    }
}

/// The thunk that checks the return in the R slot of this number.
pub fn thunk_of(context: &Context<'_>, slot: usize, mode: Mode) -> Result<LinkVa, PassError> {
    context.thunk(NAME, &thunk_name(&context.analyses, slot, mode))
}

/// What that thunk is called.
pub fn thunk_name(analyses: &Analyses<'_>, slot: usize, mode: Mode) -> String {
    let own = analyses.return_sets.and_then(|sets| {
        let check = sets.of_slot[slot];
        return_function::name(sets, check, mode)
    });
    own.unwrap_or_else(|| return_cfi::name(mode))
}
