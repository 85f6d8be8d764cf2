//! A view's pages: the running bytes plus a variant's edits.

use crate::exit::{Exit, Exits};
use crate::guest::explain::{self, RET};
use crate::guest::forms::{self, JMP};
use crate::xen::PAGE;
use penumbra_bundle::{Bundle, Edit, Edits, SlotKind};
use std::collections::BTreeMap;
use thiserror::Error;

/// Why a view cannot be built.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum PageError {
    /// A slot does not hold what the edit replaces.
    #[error(
        "variant `{variant}` edits the {slot:?} slot at {symbol}, but the guest has {found} there; nothing was mapped. Emit the bundle again, and if it stays so report this kernel"
    )]
    Slot {
        /// The variant.
        variant: String,
        /// What kind of slot.
        slot: SlotKind,
        /// Where.
        symbol: String,
        /// The running bytes.
        found: String,
    },
}

impl Exits for PageError {
    fn exit(&self) -> Exit {
        Exit::Cannot
    }
}

/// The pages of one view that differ from the host's, by page number in the text.
pub type Pages = BTreeMap<u32, Vec<u8>>;

/// Builds the pages of `variant`. `running` is the text as it runs (with the cave as it will be), `expected` the relocated
/// file: a slot whose running bytes are not what the edit was made for is a refusal.
pub fn build(
    bundle: &Bundle,
    variant: &str,
    edits: &Edits,
    running: &[u8],
    expected: &[u8],
) -> Result<Pages, PageError> {
    let mut pages = Pages::new();
    for edit in &edits.0 {
        let start = edit.at.0 as usize;
        let slot = start..start + edit.bytes.len();
        if !slot_is_as_expected(
            bundle,
            edit,
            &running[slot.clone()],
            &expected[slot.clone()],
        ) {
            return Err(PageError::Slot {
                variant: variant.to_owned(),
                slot: edit.slot,
                symbol: explain::symbol(bundle, edit.at),
                found: explain::hex(&running[slot]),
            });
        }
        if running[slot.clone()] == edit.bytes[..] {
            // `fast` on a kernel that returns plainly anyway: no page for that.
            continue;
        }
        for (at, byte) in slot.zip(&edit.bytes) {
            let page = pages
                .entry((at / PAGE) as u32)
                .or_insert_with(|| running[at / PAGE * PAGE..][..PAGE].to_vec());
            page[at % PAGE] = *byte;
        }
    }
    Ok(pages)
}

fn slot_is_as_expected(bundle: &Bundle, edit: &Edit, running: &[u8], expected: &[u8]) -> bool {
    running == expected
        || (edit.slot == SlotKind::Return
            && (running == RET
                || forms::branch_target(JMP, edit.at, running)
                    .and_then(|target| u32::try_from(target).ok())
                    .is_some_and(|target| {
                        let thunks = &bundle.model.return_thunks;
                        thunks.iter().any(|thunk| thunk.0 == target)
                    })))
}
