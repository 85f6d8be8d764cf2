//! Flips live processes between all views at random moments.

use super::clear;
use super::pins::Pin;
use crate::exit::{Exit, Exits};
use crate::guest::processes::Identity;
use crate::guest::{Process, ProcessList, ReadError, witness};
use crate::views::State;
use crate::xen::{Errno, Hypervisor, ViewId, Witness, XenError};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;
use thiserror::Error;

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
    /// It cannot be read.
    #[error("process {pid} cannot be read: {source}")]
    Read {
        /// The process id.
        pid: u32,
        /// Where and why.
        source: ReadError,
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
        "after {flips} flips process {pid} exited or ran another program; all bindings of the storm were dropped. Choose one that lives longer"
    )]
    Lost {
        /// The process id.
        pid: u32,
        /// Flips done.
        flips: u64,
    },
    /// A signal came.
    #[error("stopped after {flips} flips; the bindings of the storm were dropped")]
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
    /// Flips; each took its process to another view than the one before.
    pub flips: u64,
    /// Flips into each view, by name.
    pub per_view: BTreeMap<String, u64>,
    /// Flips of each process, in the order given.
    pub per_process: Vec<u64>,
    /// The seed, to do it again.
    pub seed: u64,
}

/// How a storm is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// How many flips, spread over all processes.
    pub flips: u64,
    /// Seed of everything random.
    pub seed: u64,
    /// The longest wait between two flips. One flip in four does not wait at all.
    pub longest_wait: Duration,
}

/// The process to flip.
pub fn find(list: &ProcessList, pid: u32) -> Result<&Process, StormError> {
    list.processes
        .iter()
        .find(|process| process.identity.pid == pid)
        .ok_or(StormError::NoProcess { pid })
}

/// Flips the processes, one at a time and in random order, then drops their bindings.
pub fn run(
    hypervisor: &dyn Hypervisor,
    state: &State,
    journal_dir: &Path,
    processes: &[&Process],
    plan: Plan,
    stop: &AtomicBool,
) -> Result<Storm, StormError> {
    let _pins = processes
        .iter()
        .map(|process| {
            let Identity { pid, root, .. } = process.identity;
            Pin::new(journal_dir, root).map_err(|source| StormError::Pin { pid, source })
        })
        .collect::<Result<Vec<Pin>, StormError>>()?;
    let result = flip(hypervisor, state, processes, plan, stop);
    // The roots are the watcher's again, or nobody's: they must not keep the last view.
    for process in processes {
        clear(hypervisor, process.identity.root)?;
    }
    result
}

fn flip(
    hypervisor: &dyn Hypervisor,
    state: &State,
    processes: &[&Process],
    plan: Plan,
    stop: &AtomicBool,
) -> Result<Storm, StormError> {
    let views: Vec<(&str, ViewId)> = state
        .views
        .iter()
        .filter_map(|view| Some((view.name.as_str(), view.view?)))
        .collect();
    // What must hold of each process while it is bound.
    let memory = state.reader.kernel().memory(hypervisor);
    let held = processes
        .iter()
        .map(|process| {
            let Identity { pid, root, .. } = process.identity;
            let witnesses = witness::witnesses(&state.reader, &memory, process)
                .map_err(|source| StormError::Read { pid, source })?;
            Ok((witnesses, witness::has_user_half(&memory, root)))
        })
        .collect::<Result<Vec<(Vec<Witness>, bool)>, StormError>>()?;
    let mut random = fastrand::Rng::with_seed(plan.seed);
    let mut storm = Storm {
        flips: 0,
        per_view: views
            .iter()
            .map(|(name, _)| ((*name).to_owned(), 0))
            .collect(),
        per_process: vec![0; processes.len()],
        seed: plan.seed,
    };
    // The view that each process has now; none yet.
    let mut now = vec![views.len(); processes.len()];
    let longest_wait = u64::try_from(plan.longest_wait.as_micros()).unwrap_or(u64::MAX);
    while storm.flips < plan.flips && !processes.is_empty() {
        let flips = storm.flips;
        if stop.load(Ordering::Relaxed) {
            return Err(StormError::Stopped { flips });
        }
        let which = random.usize(..processes.len());
        let Identity { pid, root, .. } = processes[which].identity;
        let next = loop {
            let next = random.usize(..views.len());
            if next != now[which] || views.len() == 1 {
                break next;
            }
        };
        let (name, view) = views[next];
        let (witnesses, pair) = &held[which];
        match hypervisor.set_binding(root, view, *pair, witnesses) {
            Err(error) if error.is(Errno::STALE) => return Err(StormError::Lost { pid, flips }),
            result => result?,
        }
        now[which] = next;
        storm.flips += 1;
        storm.per_process[which] += 1;
        *storm.per_view.entry(name.to_owned()).or_insert(0) += 1;
        if longest_wait > 0 && random.u8(..4) != 0 {
            sleep(Duration::from_micros(random.u64(..longest_wait)));
        }
    }
    Ok(storm)
}
