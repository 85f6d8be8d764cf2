//! Flips one live process between all views at random moments.

use super::clear;
use super::pins::Pin;
use crate::exit::{Exit, Exits};
use crate::guest::{Process, ProcessList};
use crate::views::State;
use crate::xen::{Action, Binding, Hypervisor, Root, ViewId, XenError};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;
use thiserror::Error;

/// The longest wait between two flips. One flip in four does not wait at all.
const LONGEST_WAIT_US: u64 = 3_000;

/// Why a storm did not run to its end.
#[derive(Debug, Error)]
pub enum StormError {
    /// Xen refused.
    #[error(transparent)]
    Xen(#[from] XenError),
    /// No such process.
    #[error(
        "process {pid} is not there or has no address space; `installer ps` lists those that can be flipped"
    )]
    NoProcess {
        /// The process id.
        pid: u32,
    },
    /// It cannot be pinned.
    #[error("process {pid} cannot be pinned: {source}")]
    Pin {
        /// The process id.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// It ended or became another.
    #[error(
        "after {flips} flips process {pid} exited or ran another program; its binding was dropped. Choose one that lives longer"
    )]
    Lost {
        /// The process id.
        pid: u32,
        /// Flips done.
        flips: u64,
    },
    /// A signal came.
    #[error("stopped after {flips} flips; the binding was dropped")]
    Stopped {
        /// Flips done.
        flips: u64,
    },
}

impl Exits for StormError {
    fn exit(&self) -> Exit {
        match self {
            StormError::Xen(error) => error.exit(),
            _ => Exit::Cannot,
        }
    }
}

/// What a storm did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Storm {
    /// Flips; each went to another view than the one before.
    pub flips: u64,
    /// Flips into each view, by name.
    pub per_view: BTreeMap<String, u64>,
    /// The seed, to do it again.
    pub seed: u64,
}

/// The process to flip.
pub fn find(list: &ProcessList, pid: u32) -> Result<&Process, StormError> {
    list.processes
        .iter()
        .find(|process| process.identity.pid == pid)
        .ok_or(StormError::NoProcess { pid })
}

/// Flips `process` `flips` times, then drops its binding.
pub fn run(
    hypervisor: &dyn Hypervisor,
    state: &State,
    journal_dir: &Path,
    process: &Process,
    is_still: &dyn Fn() -> bool,
    (flips, seed): (u64, u64),
    stop: &AtomicBool,
) -> Result<Storm, StormError> {
    let (pid, root) = (process.identity.pid, process.identity.root);
    let _pin = Pin::new(journal_dir, root).map_err(|source| StormError::Pin { pid, source })?;
    let result =
        flip(hypervisor, state, root, is_still, (flips, seed), stop).map_err(|interrupted| {
            match interrupted {
                Interrupted::Xen(error) => StormError::Xen(error),
                Interrupted::Lost(flips) => StormError::Lost { pid, flips },
                Interrupted::Stopped(flips) => StormError::Stopped { flips },
            }
        });
    // The root is the watcher's again, or nobody's: it must not keep the last view.
    clear(hypervisor, root)?;
    result
}

enum Interrupted {
    Xen(XenError),
    Lost(u64),
    Stopped(u64),
}

fn flip(
    hypervisor: &dyn Hypervisor,
    state: &State,
    root: Root,
    is_still: &dyn Fn() -> bool,
    (flips, seed): (u64, u64),
    stop: &AtomicBool,
) -> Result<Storm, Interrupted> {
    let views: Vec<(&str, ViewId)> = state
        .views
        .iter()
        .filter_map(|view| Some((view.name.as_str(), view.view?)))
        .collect();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut storm = Storm {
        flips: 0,
        per_view: views
            .iter()
            .map(|(name, _)| ((*name).to_owned(), 0))
            .collect(),
        seed,
    };
    let mut now = views.len();
    while storm.flips < flips {
        if stop.load(Ordering::Relaxed) {
            return Err(Interrupted::Stopped(storm.flips));
        }
        if !is_still() {
            return Err(Interrupted::Lost(storm.flips));
        }
        let next = loop {
            let next = random.usize(..views.len());
            if next != now || views.len() == 1 {
                break next;
            }
        };
        let (name, view) = views[next];
        hypervisor
            .binding(Binding::new(Action::Set).root(root).view(view))
            .map_err(Interrupted::Xen)?;
        now = next;
        storm.flips += 1;
        *storm.per_view.entry(name.to_owned()).or_insert(0) += 1;
        if random.u8(..4) != 0 {
            sleep(Duration::from_micros(random.u64(..LONGEST_WAIT_US)));
        }
    }
    Ok(storm)
}
