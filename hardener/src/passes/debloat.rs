//! `debloat`: what a recorded profile does not run cannot be entered: direct calls and jumps to functions outside it are
//! stopped, and with `targets = "profile"` `forward-cfi` lets no indirect branch reach one. The functions themselves stay as they
//! are.

use super::{Context, FileParameter, Pass, PassError, to_thunks};
use crate::profile::Functions;
use crate::recipe::{Parameter, Recipe, VIOLATION};
use crate::thunks::watched;
use penumbra_bundle::{Edit, SlotKind};
use std::collections::BTreeMap;

/// The pass's name.
pub const NAME: &str = "debloat";

/// What the kernel runs.
const PROFILE: FileParameter = FileParameter {
    name: "profile",
    check: |text| Functions::parse(text).map(drop),
};

/// What counts as inside beside the profile: nothing more, or all that its functions call or jump to directly, and so on.
const WIDEN: Parameter = Parameter {
    name: "widen",
    values: &["no", "calls"],
    takes_list: false,
};

/// Which functions indirect branches may reach: all that they may by `forward-cfi`, or those of them that are inside. Unlike calls,
/// such branches are stopped in interrupts and kernel threads too, whose functions the profile then must have.
const TARGETS: Parameter = Parameter {
    name: "targets",
    values: &["all", "profile"],
    takes_list: false,
};

/// Whether `recipe` keeps indirect branches inside the profile.
pub fn narrows_targets(recipe: &Recipe) -> bool {
    recipe.value(NAME, &TARGETS) == "profile"
}

/// The profile that `recipe` gives, if it asks for this pass, and whether to widen it by direct calls.
pub fn profile(recipe: &Recipe) -> Option<(Functions, bool)> {
    let profile = Functions::parse(recipe.file(NAME)?).ok()?;
    Some((profile, recipe.value(NAME, &WIDEN) == "calls"))
}

/// See the module.
pub struct Debloat;

impl Pass for Debloat {
    fn name(&self) -> &'static str {
        NAME
    }

    fn slot(&self) -> SlotKind {
        SlotKind::Call
    }

    fn does(&self) -> &'static str {
        "stops before functions that are outside the profile"
    }

    fn is_optional(&self) -> bool {
        true
    }

    fn is_in(&self, thunk: &str) -> bool {
        watched::is_name(NAME, thunk)
    }

    fn parameters(&self) -> &'static [Parameter] {
        &[VIOLATION, WIDEN, TARGETS]
    }

    fn file(&self) -> Option<FileParameter> {
        Some(PROFILE)
    }

    fn figures(&self, context: &Context<'_>) -> BTreeMap<String, u64> {
        let outside = context.analyses.outside;
        outside
            .map(|outside| outside.figures.clone())
            .unwrap_or_default()
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let outside = context.analyses.outside;
        to_thunks(context, NAME, outside.map(|outside| &outside.watched))
    }
}
