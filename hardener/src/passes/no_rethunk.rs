//! `no-rethunk`: a plain return; what follows traps on a straight-line speculation, as the kernel's own form does.

use super::{Context, Pass, PassError};
use crate::recipe::Recipe;
use crate::text::Slots;
use crate::thunks::CaveContents;
use penumbra_bundle::{Edit, Mitigation, ModuleEdit, Put, SlotKind};
use std::collections::BTreeMap;

/// The bytes behind the return are never reached: it counts as one instruction.
const RETURN: [u8; 5] = [0xc3, 0xcc, 0xcc, 0xcc, 0xcc];

/// See the module.
pub struct NoRethunk;

impl Pass for NoRethunk {
    fn name(&self) -> &'static str {
        "no-rethunk"
    }

    fn slot(&self) -> SlotKind {
        SlotKind::Return
    }

    fn does(&self) -> &'static str {
        "returns without the return thunk"
    }

    fn drops(&self) -> Option<Mitigation> {
        Some(Mitigation::ReturnThunk)
    }

    fn module(
        &self,
        slots: &Slots,
        _: &CaveContents,
        _: &Recipe,
    ) -> Result<Vec<ModuleEdit>, PassError> {
        let edits = slots.returns.iter().map(|slot| ModuleEdit {
            at: slot.at,
            slot: SlotKind::Return,
            put: Put::Bytes(RETURN.to_vec()),
        });
        Ok(edits.collect())
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let edits = context.returns().map(|slot| Edit {
            at: slot.at,
            slot: SlotKind::Return,
            bytes: RETURN.to_vec(),
        });
        Ok((edits.collect(), context.text.slots.returns_left.clone()))
    }
}
