//! `stack-clear`: what a system call left on the kernel's stack is cleared before the return to user mode, so that neither
//! addresses nor data are left for whoever uses the stack next without initialising it. It shares its slots with `return-cfi`
//! and `zero-regs`: the return of the last function that is called before user mode clears, returns with large frames mark
//! theirs (see [`crate::text::stack_use`]), and each goes on to its own check.

use super::return_cfi::thunk_name;
use super::{Context, JMP, Pass, PassError};
use crate::recipe::Recipe;
use crate::thunks::return_cfi::Mode;
use crate::thunks::stack_clear;
use penumbra_bundle::{Edit, SlotKind};
use std::collections::BTreeMap;

const NAME: &str = "stack-clear";

/// Whether `recipe` asks for it.
pub fn is_wanted(recipe: &Recipe) -> bool {
    recipe.names(NAME)
}

/// See the module.
pub struct StackClear;

impl Pass for StackClear {
    fn name(&self) -> &'static str {
        NAME
    }

    fn slot(&self) -> SlotKind {
        SlotKind::Return
    }

    fn does(&self) -> &'static str {
        "clears the used part of the stack before user mode"
    }

    fn is_optional(&self) -> bool {
        true
    }

    fn shares_slots(&self) -> bool {
        true
    }

    fn is_in(&self, thunk: &str) -> bool {
        stack_clear::is_name(thunk)
    }

    fn figures(&self, context: &Context<'_>) -> BTreeMap<String, u64> {
        let Some(stack) = context.analyses.stack else {
            return BTreeMap::new();
        };
        let clearing = stack.clears.iter().filter(|clears| **clears).count();
        let marks = stack.marks.iter().map(|marks| u64::from(*marks)).sum();
        BTreeMap::from([
            ("clearing".to_owned(), clearing as u64),
            ("marks".to_owned(), marks),
        ])
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let Some(stack) = context.analyses.stack else {
            return Ok((Vec::new(), BTreeMap::new()));
        };
        let mut edits = Vec::new();
        for (index, slot) in context.returns().enumerate() {
            let mode = Mode::of(index, slot, &context.analyses);
            let check = thunk_name(&context.analyses, index, mode);
            let Some(name) = stack_clear::name(stack, index, &check) else {
                continue;
            };
            let thunk = context.thunk(NAME, &name)?;
            edits.push(Edit {
                at: slot.at,
                slot: SlotKind::Return,
                bytes: context.branch(slot.at, 0, JMP, thunk),
            });
        }
        Ok((edits, stack.left.clone()))
    }
}
