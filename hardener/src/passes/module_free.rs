//! `module-free`: tells the hypervisor that a module's memory is about to be freed, before it is. In every variant, `stock` too:
//! views of a module's text must be gone before its frames are used for something else.

use super::{CALL, Context, Pass, PassError};
use crate::thunks::module_free;
use penumbra_bundle::{Edit, SlotKind};
use std::collections::BTreeMap;

/// See the module.
pub struct ModuleFree;

impl Pass for ModuleFree {
    fn name(&self) -> &'static str {
        "module-free"
    }

    fn slot(&self) -> SlotKind {
        SlotKind::Call
    }

    fn does(&self) -> &'static str {
        "tells the hypervisor before a module's memory is freed"
    }

    fn is_in(&self, thunk: &str) -> bool {
        thunk == module_free::NAME
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let Some(at) = context.text.slots.module_free else {
            return Ok((Vec::new(), BTreeMap::from([("no-such-call".to_owned(), 1)])));
        };
        let thunk = context.thunk(self.name(), module_free::NAME)?;
        let edit = Edit {
            at,
            slot: SlotKind::Call,
            bytes: context.branch(at, 0, CALL, thunk),
        };
        Ok((vec![edit], BTreeMap::new()))
    }
}
