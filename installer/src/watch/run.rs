//! The watching itself: passes, and between them whether the guest still is what was applied to.

use super::{Pass, Watcher, drop_bindings};
use crate::exit::{Exit, Exits};
use crate::views::journal::{Journal, JournalError, State};
use crate::views::{RemoveError, remove};
use crate::xen::{Domain, End, Errno, EventKind, Events, Hypervisor, Life, XenError};
use penumbra_policy::Policy;
use std::time::Duration;
use thiserror::Error;

/// Rounds in a row that may fail before the watcher gives up.
const GIVE_UP: u32 = 50;
/// Time to the next round after one that failed, or that saw what must be seen twice.
const AGAIN: Duration = Duration::from_millis(100);
/// Time between two looks at which kernel runs: with the second look, less than a second from kexec to knowing.
const KERNEL: Duration = Duration::from_millis(500);
/// How long a guest frame stays mapped: a guest that gives frames back makes its own processes' data stale no longer than
/// this.
const REFRESH: Duration = Duration::from_secs(1);
/// Most calls in a round that take records of what happened; one takes 64, Xen keeps 256.
const DRAINS: usize = 4;

/// Why watching ended without having been asked to, and with the guest still there.
#[derive(Debug, Error)]
pub enum WatchError {
    /// Xen does not answer.
    #[error(
        "gave up watching after {GIVE_UP} failures in a row: {0}. Bindings hold only while their processes are what they were, everything else runs on the default view; run `installer apply` again"
    )]
    Xen(XenError),
    /// The journal cannot be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Taking the views out of another kernel failed.
    #[error(transparent)]
    Remove(#[from] RemoveError),
}

impl Exits for WatchError {
    fn exit(&self) -> Exit {
        match self {
            WatchError::Xen(error) => error.exit(),
            WatchError::Journal(error) => error.exit(),
            WatchError::Remove(error) => error.exit(),
        }
    }
}

/// How watching ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// As asked. So many bindings were dropped.
    Stopped(usize),
    /// The domain ended, and everything with it; the journal is dropped.
    Ended(End),
    /// The guest runs another kernel; views and journal are dropped.
    OtherKernel,
}

/// Who hears what happens, and looks after what else comes and goes in the guest.
pub trait Listener {
    /// After each pass.
    fn passed(&mut self, state: &mut State, pass: &Pass, events: &Events);
    /// The domain has ended; these records came last.
    fn ended(&mut self, state: &State, events: &Events);
    /// Whether the guest's kernel has text that nobody has explained; not known yet counts as yes.
    fn foreign(&self) -> bool;
    /// A call failed and is tried again, or a view lost a page.
    fn trouble(&mut self, message: &str);
}

/// What is watched, and how.
pub struct Watch<'a> {
    /// Xen.
    pub hypervisor: &'a dyn Hypervisor,
    /// The domain's journal.
    pub journal: &'a Journal,
    /// The verified policy.
    pub policy: &'a Policy,
    /// Time between looks at the guest's processes.
    pub poll: Duration,
}

/// What a round leaves for the next.
#[derive(Default)]
struct Since {
    kernel: Duration,
    refresh: Duration,
    /// The last look saw another kernel.
    suspect: bool,
}

impl Watch<'_> {
    /// Watches until asked to stop or the guest is no longer there. `sleep` is what it waits with.
    ///
    /// A failing call of Xen proves nothing about the guest: it is tried again, and the journal stays whatever happens.
    pub fn run(
        &self,
        state: &mut State,
        mut watcher: Watcher,
        listener: &mut dyn Listener,
        stop: &dyn Fn() -> bool,
        sleep: &dyn Fn(Duration),
    ) -> Result<Outcome, WatchError> {
        let mut failures = 0;
        let mut since = Since::default();
        while !stop() && !self.journal.asked_to_stop() {
            let wait = match self.round(state, &mut watcher, listener, &mut since) {
                Ok(Some(Outcome::OtherKernel)) => {
                    remove(self.hypervisor, self.journal, Some(state))?;
                    return Ok(Outcome::OtherKernel);
                }
                Ok(Some(outcome)) => {
                    self.journal.erase()?;
                    return Ok(outcome);
                }
                Ok(None) => {
                    failures = 0;
                    if since.suspect { AGAIN } else { self.poll }
                }
                Err(error) => {
                    failures += 1;
                    if failures == GIVE_UP {
                        return Err(WatchError::Xen(error));
                    }
                    listener.trouble(&format!("{error}; trying again"));
                    AGAIN
                }
            };
            sleep(wait);
            since.kernel += wait;
            since.refresh += wait;
        }
        let dropped = drop_bindings(self.hypervisor, state, self.journal.dir());
        state.watcher = 0;
        self.journal.save(state)?;
        Ok(Outcome::Stopped(dropped.map_err(WatchError::Xen)?))
    }

    fn round(
        &self,
        state: &mut State,
        watcher: &mut Watcher,
        listener: &mut dyn Listener,
        since: &mut Since,
    ) -> Result<Option<Outcome>, XenError> {
        let xen = self.hypervisor;
        let Some(domain) = own_domain(xen, state)? else {
            return Ok(Some(Outcome::Ended(End::Destroyed)));
        };
        match domain.life {
            Life::Runs => {}
            Life::Suspended => return Ok(None),
            // The best moment to take the views out: neither kernel runs, and the new one may come to lie on the old text.
            Life::SoftReset => return Ok(Some(Outcome::OtherKernel)),
            Life::Ended(end) => {
                // A check whose recipe is `panic` reports right before the end. A domain that is torn down has nothing to say.
                if let Ok(events) = drain(xen) {
                    listener.ended(state, &events);
                }
                return Ok(Some(Outcome::Ended(end)));
            }
        }
        self.follow_limit(state, domain.max_pages)?;
        if since.refresh >= REFRESH {
            since.refresh = Duration::ZERO;
            xen.refresh();
        }
        if since.kernel >= KERNEL || since.suspect {
            since.kernel = Duration::ZERO;
            let other = !state.reader.kernel().still_runs(xen, &state.build_id)?;
            if other && since.suspect {
                return Ok(Some(Outcome::OtherKernel));
            }
            since.suspect = other;
        }
        let events = drain(xen)?;
        for event in &events.records {
            if event.kind == EventKind::Lost {
                listener.trouble(&format!(
                    "view `{}` lost its page at frame {:#x}, which the guest gave away; `installer verify-text` says what is left",
                    state.view_name(event.view),
                    event.addr
                ));
            }
        }
        let foreign = listener.foreign();
        let pass = watcher.pass(xen, state, self.policy, foreign, self.journal.dir())?;
        listener.passed(state, &pass, &events);
        Ok(None)
    }

    /// Gives another memory limit of the domain, in pages, room for the copies. Whoever sets one (`xl mem-set`) does not know
    /// of them: without as much more the guest would not get what it is to have.
    fn follow_limit(&self, state: &mut State, limit: u64) -> Result<(), XenError> {
        let Some(copies) = &mut state.copies else {
            return Ok(());
        };
        if limit == copies.max_pages() {
            return Ok(());
        }
        copies.max_pages_before = limit;
        let with_copies = copies.max_pages();
        // Journalled first, so that an end in between is followed once more, not twice. A full disk must not end the watching.
        let _ = self.journal.save(state);
        self.hypervisor.set_max_pages(with_copies)
    }
}

/// The domain of `state`. Gone, also if another one has its id now, is destroyed.
fn own_domain(hypervisor: &dyn Hypervisor, state: &State) -> Result<Option<Domain>, XenError> {
    match hypervisor.domain() {
        Ok(domain) => Ok(Some(domain).filter(|domain| domain.uuid == state.uuid)),
        Err(error) if error.is(Errno::SRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Everything that Xen has kept.
fn drain(hypervisor: &dyn Hypervisor) -> Result<Events, XenError> {
    let mut all = hypervisor.events()?;
    let mut last = all.records.len();
    for _ in 1..DRAINS {
        if last < crate::xen::MAX_EVENTS {
            break;
        }
        let more = hypervisor.events()?;
        last = more.records.len();
        all.records.extend(more.records.iter().cloned());
        all = Events {
            records: all.records,
            ..more
        };
    }
    Ok(all)
}
