//! `no-rethunk`: a plain return; what follows traps on a straight-line speculation, as the kernel's own form does.

use super::{Context, Pass, PassError};
use penumbra_bundle::{Edit, Mitigation, SlotKind};
use std::collections::BTreeMap;

/// See the module.
pub struct NoRethunk;

impl Pass for NoRethunk {
    fn name(&self) -> &'static str {
        "no-rethunk"
    }

    fn drops(&self) -> Option<Mitigation> {
        Some(Mitigation::ReturnThunk)
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let edits = context.returns().map(|slot| Edit {
            at: slot.at,
            slot: SlotKind::Return,
            // The bytes behind the return are never reached: it counts as one instruction.
            bytes: vec![0xc3, 0xcc, 0xcc, 0xcc, 0xcc],
        });
        Ok((edits.collect(), context.text.slots.returns_left.clone()))
    }
}
