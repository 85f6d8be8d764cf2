//! Takes everything out of a live guest. Every step may be repeated, and may find its work already done.

use super::cave;
use super::journal::{CaveState, Journal, JournalError, State, Step};
use crate::exit::{Exit, Exits};
use crate::guest::processes::Reader;
use crate::guest::stacks::Stacks;
use crate::xen::{Action, Binding, Errno, Hypervisor, XenError};
use std::thread::sleep;
use std::time::Duration;
use thiserror::Error;

/// Looks at the guest's stacks before the thunks are left where they are.
const LOOKS: u32 = 50;
/// Time between looks.
const LOOK_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 0 } else { 50 });
/// Looks in a row that must find nothing.
const CLEAN_LOOKS: u32 = 2;

/// Why removing did not finish. Repeating it is always right.
#[derive(Debug, Error)]
pub enum RemoveError {
    /// Xen refused.
    #[error("{0}; run `installer remove` again")]
    Xen(#[from] XenError),
    /// The journal cannot be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl Exits for RemoveError {
    fn exit(&self) -> Exit {
        match self {
            RemoveError::Xen(error) => error.exit(),
            RemoveError::Journal(error) => error.exit(),
        }
    }
}

/// What became of the cave.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CaveFate {
    /// It was never written.
    Untouched,
    /// The filler is back.
    Restored,
    /// The thunks stay: something may still run there. Nothing jumps to them, and the journal keeps where they are: the next
    /// `remove` or `apply` looks again.
    Left(String),
    /// The guest runs another kernel, whose memory is not touched.
    OtherKernel,
}

/// What was removed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Removed {
    /// There was something.
    pub anything: bool,
    /// Views taken out.
    pub views: usize,
    /// Frames given back.
    pub frames: u64,
    /// The cave.
    pub cave: CaveFate,
}

/// Removes what `state` and Xen know of, and drops the journal when nothing is left.
pub fn remove(
    hypervisor: &dyn Hypervisor,
    journal: &Journal,
    state: Option<&State>,
) -> Result<Removed, RemoveError> {
    let mut removed = Removed {
        anything: state.is_some(),
        views: 0,
        frames: 0,
        cave: CaveFate::Untouched,
    };
    let domain = match hypervisor.domain() {
        Ok(domain) => domain,
        Err(error) if error.is(Errno::SRCH) => {
            // The domain is gone, and with it all that was done to it.
            journal.erase()?;
            return Ok(removed);
        }
        Err(error) => return Err(error.into()),
    };
    let state = state.filter(|state| state.uuid == domain.uuid);
    if let Some(state) = state {
        let mut state = state.clone();
        state.step = Step::Remove;
        state.watcher = 0;
        // A full disk must not keep anything in the guest: what is journalled already says enough to do this again.
        let _ = journal.save(&state);
    }
    removed.views = drop_views(hypervisor, state, &mut removed.anything)?;
    if let Some(copies) = state.and_then(|state| state.copies) {
        removed.frames = hypervisor.depopulate(copies.first, copies.count)?;
        // Another limit, set while nobody watched, is the operator's.
        if domain.max_pages == copies.max_pages() {
            hypervisor.set_max_pages(copies.max_pages_before)?;
        }
    }
    if let Some(state) = state
        && let Some(cave) = state.cave
    {
        let kernel = state.reader.kernel();
        removed.cave = if kernel.still_runs(hypervisor, &state.build_id)? {
            restore_cave(hypervisor, &state.reader, cave)
        } else {
            CaveFate::OtherKernel
        };
    }
    match (&removed.cave, state) {
        (CaveFate::Left(_), Some(state)) => {
            // All else is done: only the cave is left to be looked at again.
            let mut left = state.clone();
            left.step = Step::Remove;
            left.watcher = 0;
            left.views.clear();
            left.modules.clear();
            (left.copies, left.spare) = (None, None);
            // On a full disk the journal stays as it was: doing all of it again does nothing more.
            let _ = journal.save(&left);
            journal.erase_beside()?;
        }
        _ => journal.erase()?,
    }
    Ok(removed)
}

/// All vCPUs to the host view, then no views, then no altp2m.
fn drop_views(
    hypervisor: &dyn Hypervisor,
    state: Option<&State>,
    anything: &mut bool,
) -> Result<usize, XenError> {
    // A Xen that does not know the call has nothing to disable.
    match hypervisor.altp2m_on() {
        Ok(true) => *anything = true,
        Ok(false) => return Ok(0),
        Err(error) if absent(&error) => return Ok(0),
        Err(error) => return Err(error),
    }
    match hypervisor.binding(Binding::new(Action::Disable)) {
        Ok(_) => {}
        Err(error) if absent(&error) => {}
        Err(error) => return Err(error),
    }
    // Drops every view, also those that were made but never written down.
    hypervisor.altp2m_set(false)?;
    let made = state.iter().flat_map(|state| &state.views);
    Ok(made.filter(|view| view.view.is_some()).count())
}

fn absent(error: &XenError) -> bool {
    matches!(
        error.errno(),
        Some(Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL | Errno::NODEV)
    )
}

/// Puts the filler back once nothing can be in the cave; nothing jumps there any more.
fn restore_cave(hypervisor: &dyn Hypervisor, reader: &Reader, cave: CaveState) -> CaveFate {
    let range = cave.start.0..cave.start.0.saturating_add(cave.len);
    let stacks = Stacks::new(hypervisor, reader);
    let mut clean = 0;
    let mut last = String::new();
    for _ in 0..LOOKS {
        hypervisor.refresh();
        match stacks.check_free(&range) {
            Ok(()) => clean += 1,
            Err(occupied) => {
                clean = 0;
                last = occupied.to_string();
            }
        }
        if clean == CLEAN_LOOKS {
            return fill_cave(hypervisor, reader, cave);
        }
        sleep(LOOK_PAUSE);
    }
    CaveFate::Left(last)
}

fn fill_cave(hypervisor: &dyn Hypervisor, reader: &Reader, cave: CaveState) -> CaveFate {
    let memory = reader.kernel().memory(hypervisor);
    // The journal is ours, but a damaged one must not ask for the world: a cave has at most a few MiB.
    let Some(len) = usize::try_from(cave.len)
        .ok()
        .filter(|len| *len <= 64 << 20)
    else {
        return CaveFate::Left(format!("the journal says that it has {} bytes", cave.len));
    };
    match cave::write(hypervisor, &memory, cave.start, &vec![cave.filler; len]) {
        Ok(()) => CaveFate::Restored,
        Err(error) => CaveFate::Left(error.to_string()),
    }
}
