//! The watching half of `apply`: what it says, and how a guest that reboots is found again.

use super::CliError;
use super::events::describe;
use crate::audit::{Body, Trail};
use crate::exit::Exit;
use crate::guest::ProcessList;
use crate::views::modules::Modules;
use crate::views::{Journal, State};
use crate::watch::Pass;
use crate::watch::run::Listener;
use crate::xen::{self, DomId, Domain, End, Events, Hypervisor, Life};
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// Each trouble is said once, and no more than so many: a guest that makes them by the second must not fill the disk.
const MOST_SAID: usize = 1000;
/// How long a domain that reboots may stay away.
const REBOOT: Duration = Duration::from_secs(120);
/// The same for one that crashed or was destroyed: the toolstack may be told to start it again.
const RESTART: Duration = Duration::from_secs(15);
/// Time between looks for it.
const LOOK: Duration = Duration::from_millis(200);

/// Says on stderr what happens, and writes it into the audit log.
pub struct Console<'a> {
    said: HashSet<String>,
    trail: Trail<'a>,
    modules: Modules<'a>,
    refuses: bool,
    hypervisor: &'a dyn Hypervisor,
    journal: &'a Journal,
}

impl<'a> Console<'a> {
    /// A console that writes to `trail` and looks after `modules`, which the policy `refuses` if they are unknown, or not.
    pub fn new(
        hypervisor: &'a dyn Hypervisor,
        journal: &'a Journal,
        trail: Trail<'a>,
        modules: Modules<'a>,
        refuses: bool,
    ) -> Console<'a> {
        Console {
            said: HashSet::new(),
            trail,
            modules,
            refuses,
            hypervisor,
            journal,
        }
    }

    /// Writes one event, and says if that fails.
    pub fn write(&mut self, body: Body) {
        self.trail.write(body);
        self.say_trouble();
    }

    fn say_trouble(&mut self) {
        if let Some(error) = self.trail.trouble() {
            self.trouble(&error.to_string());
        }
    }
}

impl Listener for Console<'_> {
    fn passed(&mut self, state: &mut State, pass: &Pass, events: &Events) {
        for trouble in &pass.trouble {
            self.trouble(trouble);
        }
        for body in self.trail.events(state, events, &pass.list) {
            self.trouble(&describe(&body));
        }
        self.trail.changes(&pass.bound, &pass.unbound);
        match self
            .modules
            .look(self.hypervisor, self.journal, state, events)
        {
            Ok(news) => {
                for one in news {
                    let body = Body::from(one);
                    if matches!(body, Body::Stays { .. }) {
                        self.trouble(&describe(&body));
                    }
                    self.trail.write(body);
                }
            }
            // A call that fails now is made again after the next pass.
            Err(error) => self.trouble(&error.to_string()),
        }
        if self.refuses
            && let Some(names) = self.modules.foreign()
            && !names.is_empty()
        {
            self.trouble(&format!(
                "the policy refuses modules that stay on their own text; while {} is loaded nobody has a laxer view than the default",
                names.join(", ")
            ));
        }
        self.say_trouble();
    }

    fn foreign(&self) -> bool {
        self.modules.foreign().is_none_or(|names| !names.is_empty())
    }

    fn ended(&mut self, state: &State, events: &Events) {
        for body in self.trail.events(state, events, &ProcessList::default()) {
            self.trouble(&describe(&body));
        }
        self.say_trouble();
    }

    fn trouble(&mut self, message: &str) {
        if self.said.len() < MOST_SAID && self.said.insert(message.to_owned()) {
            eprintln!("installer: {message}");
        }
    }
}

/// The exit code when a domain ended and did not come back.
pub fn exit(end: End) -> Exit {
    match end {
        End::PoweredOff | End::Destroyed => Exit::Done,
        End::Reboots | End::Crashed => Exit::No,
    }
}

/// The domain that follows one that ended: the same UUID under another id. `None` if none came, or `stop` says so.
pub fn successor(
    uuid: &str,
    old: DomId,
    end: End,
    stop: &dyn Fn() -> bool,
) -> Result<Option<Domain>, CliError> {
    let patience = match end {
        End::PoweredOff => return Ok(None),
        End::Reboots => REBOOT,
        End::Crashed | End::Destroyed => RESTART,
    };
    let started = Instant::now();
    while !stop() {
        // The toolstack is at work: a list that cannot be had now can be had the next time.
        let found = xen::list();
        let domains = found.as_deref().unwrap_or_default();
        let next = domains
            .iter()
            .find(|(domain, _)| domain.uuid == uuid && domain.id != old);
        match next {
            Some((domain, _)) if domain.life == Life::Runs => {
                return Ok(Some(domain.clone()));
            }
            _ => {}
        }
        // One that is still there by now is kept as it is (on_reboot="preserve").
        let kept = domains
            .iter()
            .any(|(domain, _)| domain.uuid == uuid && domain.id == old);
        let waited = started.elapsed();
        if waited > patience || (kept && waited > RESTART) {
            found?;
            return Ok(None);
        }
        std::thread::sleep(LOOK);
    }
    Ok(None)
}
