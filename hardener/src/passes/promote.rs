//! `promote`: an indirect branch compares its target with those that a profile calls hot, and goes there directly; to any other
//! as `no-retpoline` does, with which it shares its slots. A module's branches are left to `no-retpoline`.

use super::{CALL, Context, FileParameter, JMP, Pass, PassError};
use crate::profile::Branches;
use crate::recipe::Recipe;
use crate::thunks::promote;
use penumbra_bundle::{Edit, Mitigation, SlotKind};
use std::collections::BTreeMap;

const NAME: &str = "promote";

/// Where indirect branches went.
const PROFILE: FileParameter = FileParameter {
    name: "profile",
    check: |text| Branches::parse(text).map(|_| ()),
};

/// The profile that `recipe` gives, if it asks for this pass.
pub fn profile(recipe: &Recipe) -> Option<Branches> {
    Branches::parse(recipe.file(NAME)?).ok()
}

/// See the module.
pub struct Promote;

impl Pass for Promote {
    fn name(&self) -> &'static str {
        NAME
    }

    fn slot(&self) -> SlotKind {
        SlotKind::Indirect
    }

    fn does(&self) -> &'static str {
        "compares with the profile's hottest targets, then branches without the retpoline"
    }

    fn is_optional(&self) -> bool {
        true
    }

    fn is_in(&self, thunk: &str) -> bool {
        thunk.starts_with(promote::PREFIX)
    }

    fn shares_slots(&self) -> bool {
        true
    }

    fn drops(&self) -> Option<Mitigation> {
        Some(Mitigation::Retpoline)
    }

    fn file(&self) -> Option<FileParameter> {
        Some(PROFILE)
    }

    fn figures(&self, context: &Context<'_>) -> BTreeMap<String, u64> {
        let promotion = context.analyses.promotion;
        promotion
            .map(|promotion| promotion.figures.clone())
            .unwrap_or_default()
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let Some(promotion) = context.analyses.promotion else {
            return Ok((Vec::new(), BTreeMap::new()));
        };
        let slots = context.indirect().zip(&promotion.of_slot);
        let slots = slots.filter(|(_, targets)| !targets.is_empty());
        let edits = slots.map(|(slot, targets)| {
            let thunk = context.thunk(NAME, &promote::name(slot.register, targets))?;
            let opcode = if slot.jump { JMP } else { CALL };
            Ok(Edit {
                at: slot.at,
                slot: SlotKind::Indirect,
                bytes: context.branch(slot.at, usize::from(slot.len) - 5, opcode, thunk),
            })
        });
        Ok((
            edits.collect::<Result<_, PassError>>()?,
            promotion.left.clone(),
        ))
    }
}
