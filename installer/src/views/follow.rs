//! Has filled copies follow a text that is being poked, until there is a moment to enable them.
//!
//! Reading, explaining and filling take long; a guest that switches jump labels or probes all the time (which needs no
//! privilege: a socket option switches one) would never leave the time for it. So the copies are filled once, and what has
//! been written since is carried over byte by byte, as Xen does once views are enabled. That takes about as long as
//! copying the text.

use super::TextError;
use super::build::PlannedView;
use super::journal::State;
use super::refusal::ApplyError;
use crate::guest::text::RunningText;
use crate::xen::{Gfn, Hypervisor};

/// Brings what the guest has written since `text` was read to the copies. False if a byte that a view has of its own was
/// written: only planning that view anew tells what is to be there.
pub fn follow(
    hypervisor: &dyn Hypervisor,
    state: &State,
    text: &mut RunningText,
    views: &mut [PlannedView],
) -> Result<bool, ApplyError> {
    let before = text.reread_changed(hypervisor).map_err(TextError::from)?;
    for (page, before) in before {
        let now = text.page(page);
        for (view, entry) in views.iter_mut().zip(&state.views) {
            let number = u32::try_from(page).unwrap_or(u32::MAX);
            let Ok(offset) = entry.pages.binary_search(&number) else {
                continue;
            };
            let Some(copy) = view.pages.get_mut(&number) else {
                return Err(ApplyError::Restless);
            };
            if !carry(copy, &before, now) {
                return Ok(false);
            }
            let frame = Gfn(entry.first_copy.0 + offset as u64);
            hypervisor.write(frame, 0, copy)?;
        }
    }
    Ok(true)
}

/// Changes `copy` wherever `now` differs from `before`; false if it had another byte than `before` there.
fn carry(copy: &mut [u8], before: &[u8], now: &[u8]) -> bool {
    let mut all = true;
    for ((byte, was), is) in copy.iter_mut().zip(before).zip(now) {
        if was != is {
            all &= byte == was;
            *byte = *is;
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::carry;

    #[test]
    fn carries_what_changed_and_tells_of_own_bytes() {
        let mut copy = [1, 9, 3, 4];
        assert!(carry(&mut copy, &[1, 2, 3, 4], &[5, 2, 3, 6]));
        assert_eq!(copy, [5, 9, 3, 6]);
        assert!(!carry(&mut copy, &[5, 2, 3, 6], &[5, 7, 3, 6]));
    }
}
