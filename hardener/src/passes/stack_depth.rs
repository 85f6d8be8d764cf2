//! `stack-depth`: a function that takes much of the stack at once is entered only where enough is left below it, so that neither
//! recursion nor a chain of large frames gets to the stack's end.
//!
//! A frame's size is the largest constant that its function takes from RSP. Asked are direct calls and jumps, on a task's own stack:
//! interrupts have stacks of their own, and what they and kernel threads do there is not stopped.

use super::{Context, Pass, PassError, to_thunks};
use crate::recipe::{Parameter, Recipe, VIOLATION};
use crate::text::large_frames::Limits;
use crate::thunks::watched;
use penumbra_bundle::{Edit, SlotKind};
use std::collections::BTreeMap;

/// The pass's name.
pub const NAME: &str = "stack-depth";

/// From how many bytes on a frame is large.
const FRAME: Parameter = Parameter {
    name: "frame",
    values: &["256", "384", "512"],
    takes_list: false,
};

/// How many bytes must be left below it. An oops, which ends a task, takes some 3,000.
const LEFT: Parameter = Parameter {
    name: "left",
    values: &["4096", "3072", "6144"],
    takes_list: false,
};

/// What `recipe` asks for, if it names this pass.
pub fn limits(recipe: &Recipe) -> Option<Limits> {
    let value = |parameter| recipe.value(NAME, parameter).parse().ok();
    let limits = Limits {
        frame: value(&FRAME)?,
        left: value(&LEFT)?,
    };
    recipe.names(NAME).then_some(limits)
}

/// See the module.
pub struct StackDepth;

impl Pass for StackDepth {
    fn name(&self) -> &'static str {
        NAME
    }

    fn slot(&self) -> SlotKind {
        SlotKind::Call
    }

    fn does(&self) -> &'static str {
        "asks whether enough of the stack is left for a large frame"
    }

    fn is_optional(&self) -> bool {
        true
    }

    fn is_in(&self, thunk: &str) -> bool {
        watched::is_name(NAME, thunk)
    }

    fn parameters(&self) -> &'static [Parameter] {
        &[VIOLATION, FRAME, LEFT]
    }

    fn figures(&self, context: &Context<'_>) -> BTreeMap<String, u64> {
        let large = context.analyses.large_frames;
        large.map(|large| large.figures.clone()).unwrap_or_default()
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let large = context.analyses.large_frames;
        to_thunks(context, NAME, large.map(|large| &large.watched))
    }
}
