//! `probe`: direct calls and jumps to chosen functions are reported, and go on. Only processes on the variant's view are seen.

use super::{Context, FileParameter, Pass, PassError, to_thunks};
use crate::profile::Functions;
use crate::recipe::Recipe;
use crate::thunks::watched;
use penumbra_bundle::{Edit, SlotKind};
use std::collections::BTreeMap;

/// The pass's name.
pub const NAME: &str = "probe";

/// Which functions.
const FUNCTIONS: FileParameter = FileParameter {
    name: "functions",
    check: |text| Functions::parse(text).map(drop),
};

/// The functions that `recipe` asks to probe.
pub fn functions(recipe: &Recipe) -> Option<Functions> {
    Functions::parse(recipe.file(NAME)?).ok()
}

/// See the module.
pub struct Probe;

impl Pass for Probe {
    fn name(&self) -> &'static str {
        NAME
    }

    fn slot(&self) -> SlotKind {
        SlotKind::Call
    }

    fn does(&self) -> &'static str {
        "reports that a chosen function is called"
    }

    fn is_optional(&self) -> bool {
        true
    }

    fn is_in(&self, thunk: &str) -> bool {
        watched::is_name(NAME, thunk)
    }

    fn file(&self) -> Option<FileParameter> {
        Some(FUNCTIONS)
    }

    fn figures(&self, context: &Context<'_>) -> BTreeMap<String, u64> {
        let probed = context.analyses.probed;
        probed
            .map(|probed| probed.figures.clone())
            .unwrap_or_default()
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let probed = context.analyses.probed;
        to_thunks(context, NAME, probed.map(|probed| &probed.watched))
    }
}
