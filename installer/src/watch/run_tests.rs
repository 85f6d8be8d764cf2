//! The watching around the passes: what ends it, what does not, and what is left.

use super::Watcher;
use super::run::{Listener, Outcome, Watch, WatchError};
use crate::views::testkit::{self, Snapshot, assert_complete, assert_nothing, root, snapshot};
use crate::views::{Journal, State, apply, remove};
use crate::watch::Pass;
use crate::xen::fake::Fake;
use crate::xen::faults::{Fault, Faulty};
use crate::xen::{End, Errno, Events, Hypervisor, Life, ViewId};
use penumbra_policy::Policy;
use std::cell::{Cell, RefCell};
use std::time::Duration;

const PAYROLL: u64 = 2;
const POLL: Duration = Duration::from_millis(50);

/// Keeps what it hears.
#[derive(Default)]
struct Ear {
    said: Vec<String>,
    passes: usize,
    last_words: usize,
}

impl Listener for Ear {
    fn passed(&mut self, _: &mut State, _: &Pass, _: &Events) {
        self.passes += 1;
    }

    fn ended(&mut self, _: &State, events: &Events) {
        self.last_words += events.records.len();
    }

    fn foreign(&self) -> bool {
        false
    }

    fn trouble(&mut self, message: &str) {
        self.said.push(message.to_owned());
    }
}

struct World {
    fake: Fake,
    before: Snapshot,
    state: RefCell<State>,
    journal: Journal,
    _dir: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        let bundle = testkit::bundle();
        let fake = testkit::guest(&bundle);
        let before = snapshot(&fake);
        let dir = tempfile::tempdir().unwrap();
        let journal = testkit::journal(&dir);
        let applied = apply(&fake, &journal, &testkit::request(&bundle)).unwrap();
        World {
            fake,
            before,
            state: RefCell::new(applied.state),
            journal,
            _dir: dir,
        }
    }

    /// Watches; `tick` gets the number of each sleep, from 1, and says whether to stop.
    fn watch(
        &self,
        hypervisor: &dyn Hypervisor,
        tick: &dyn Fn(usize) -> bool,
    ) -> (Result<Outcome, WatchError>, Ear, Duration) {
        let policy = Policy::parse("test.toml", super::tests::POLICY).unwrap();
        let mut ear = Ear::default();
        let (ticks, slept, stop) = (Cell::new(0), Cell::new(Duration::ZERO), Cell::new(false));
        let sleep = |time| {
            ticks.set(ticks.get() + 1);
            slept.set(slept.get() + time);
            stop.set(tick(ticks.get()));
            assert!(ticks.get() < 10_000, "the watching does not end");
        };
        let watch = Watch {
            hypervisor,
            journal: &self.journal,
            policy: &policy,
            poll: POLL,
        };
        let state = &mut *self.state.borrow_mut();
        let stop = || stop.get();
        let outcome = watch.run(state, Watcher::default(), &mut ear, &stop, &sleep);
        (outcome, ear, slept.get())
    }

    fn bound(&self) -> bool {
        self.fake.table.borrow().bound.contains_key(&root(PAYROLL))
    }
}

#[test]
fn it_stops_when_asked_and_leaves_the_views_without_bindings() {
    let world = World::new();
    let (outcome, ear, _) = world.watch(&world.fake, &|tick| {
        assert!(world.bound());
        tick == 3
    });
    assert_eq!(outcome.unwrap(), Outcome::Stopped(1));
    assert_eq!((ear.passes, ear.said), (3, Vec::new()));
    assert!(!world.bound() && world.fake.table.borrow().enabled);
    assert_eq!(world.journal.load().unwrap().unwrap().watcher, 0);
    // `installer remove` asks through a file.
    world.journal.ask_to_stop().unwrap();
    let (outcome, _, slept) = world.watch(&world.fake, &|_| false);
    assert_eq!(
        (outcome.unwrap(), slept),
        (Outcome::Stopped(0), Duration::ZERO)
    );
}

#[test]
fn each_way_to_end_is_told_from_the_others() {
    for end in [End::PoweredOff, End::Reboots, End::Crashed, End::Destroyed] {
        let world = World::new();
        let (outcome, ear, _) = world.watch(&world.fake, &|_| {
            // A crashed domain may be kept for its dump: it is in the list and will not run again.
            world.fake.domain.borrow_mut().life = Life::Ended(end);
            // What a check whose recipe is `panic` says right before the end.
            world.fake.trap(true, 0x1234);
            false
        });
        assert_eq!(outcome.unwrap(), Outcome::Ended(end));
        assert_eq!((ear.passes, ear.last_words), (1, 1));
        assert!(world.journal.load().unwrap().is_none());
    }
    // Another domain has the id.
    let world = World::new();
    let (outcome, _, _) = world.watch(&world.fake, &|_| {
        world.fake.domain.borrow_mut().uuid = "0ther".to_owned();
        false
    });
    assert_eq!(outcome.unwrap(), Outcome::Ended(End::Destroyed));
    // Xen knows no such domain.
    let world = World::new();
    let faulty = Faulty::new(&world.fake, Fault::FailAny(1, Errno::SRCH));
    let (outcome, _, _) = world.watch(&faulty, &|_| false);
    assert_eq!(outcome.unwrap(), Outcome::Ended(End::Destroyed));
}

#[test]
fn a_suspended_or_paused_guest_is_waited_for() {
    let world = World::new();
    let life = |tick| match tick {
        1..5 => Life::Suspended,
        _ => Life::Runs,
    };
    let (outcome, ear, slept) = world.watch(&world.fake, &|tick| {
        world.fake.domain.borrow_mut().life = life(tick);
        tick == 8
    });
    assert_eq!(outcome.unwrap(), Outcome::Stopped(1));
    // No pass while it is suspended, and no busy loop.
    assert_eq!((ear.passes, slept), (4, POLL * 8));
}

#[test]
fn another_memory_limit_gets_room_for_the_copies() {
    let world = World::new();
    let copies = world.state.borrow().copies.unwrap();
    let (outcome, ear, _) = world.watch(&world.fake, &|tick| {
        if tick == 2 {
            // `xl mem-set`
            world.fake.domain.borrow_mut().max_pages = 1000;
        }
        tick == 5
    });
    assert!(outcome.is_ok() && ear.said.is_empty(), "{:?}", ear.said);
    assert_eq!(world.fake.domain.borrow().max_pages, 1000 + copies.count);
    let journalled = world.journal.load().unwrap().unwrap();
    assert_eq!(journalled.copies.unwrap().max_pages_before, 1000);
}

#[test]
fn a_memory_limit_from_before_the_watching_is_followed_and_given_back() {
    let world = World::new();
    let copies = world.state.borrow().copies.unwrap();
    world.fake.domain.borrow_mut().max_pages = 1000;
    let (outcome, _, _) = world.watch(&world.fake, &|tick| tick == 2);
    assert!(outcome.is_ok());
    assert_eq!(world.fake.domain.borrow().max_pages, 1000 + copies.count);
    let state = world.journal.load().unwrap();
    remove(&world.fake, &world.journal, state.as_ref()).unwrap();
    assert_eq!(world.fake.domain.borrow().max_pages, 1000);
}

#[test]
fn a_memory_limit_that_nobody_followed_stays() {
    let world = World::new();
    world.fake.domain.borrow_mut().max_pages = 1000;
    let state = world.journal.load().unwrap();
    remove(&world.fake, &world.journal, state.as_ref()).unwrap();
    assert_eq!(world.fake.domain.borrow().max_pages, 1000);
}

#[test]
fn any_call_may_fail_once_and_nothing_is_lost() {
    // Most calls are reads of the guest's memory, one like the other: not each of them.
    for at in (1..).step_by(5) {
        let world = World::new();
        let faulty = Faulty::new(&world.fake, Fault::FailAny(at, Errno::IO));
        let (outcome, ear, _) = world.watch(&faulty, &|tick| tick == 3);
        assert_complete(&world.fake, &testkit::bundle());
        assert!(world.journal.load().unwrap().is_some(), "call {at}");
        match outcome {
            Ok(outcome) => assert!(matches!(outcome, Outcome::Stopped(_)), "call {at}"),
            // Dropping the bindings at the end is not tried again: it is said.
            Err(error) => assert!(matches!(error, WatchError::Xen(_)), "call {at}: {error}"),
        }
        assert!(ear.passes >= 2, "call {at}");
        if faulty.calls.get().0 < at {
            assert_eq!(ear.said, Vec::<String>::new());
            return;
        }
    }
}

#[test]
fn a_xen_that_stops_answering_is_given_up_and_the_journal_stays() {
    for at in [1, 30, 60] {
        let world = World::new();
        let faulty = Faulty::new(&world.fake, Fault::Dead(at));
        let (outcome, ear, slept) = world.watch(&faulty, &|_| false);
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains("50 failures"), "{error}");
        assert!(slept >= Duration::from_secs(4), "it tries for a while");
        assert!(!ear.said.is_empty());
        assert!(world.journal.load().unwrap().is_some());
        assert_complete(&world.fake, &testkit::bundle());
        // What the dead watcher had bound lapses by itself.
        testkit::set_exe(&world.fake, PAYROLL, "/bin/sh");
        let default = world.state.borrow().view("hardened").unwrap();
        assert_eq!(world.fake.load_cr3(root(PAYROLL).0), default);
    }
}

#[test]
fn another_kernel_is_seen_within_a_second_and_not_touched() {
    let world = World::new();
    let at = Cell::new(Duration::ZERO);
    let text = RefCell::new(Vec::new());
    let (outcome, _, slept) = world.watch(&world.fake, &|tick| {
        if tick == 1 {
            testkit::kexec(&world.fake);
            *text.borrow_mut() = testkit::text_of(&world.fake, ViewId::HOST);
            at.set(POLL);
        }
        false
    });
    assert_eq!(outcome.unwrap(), Outcome::OtherKernel);
    assert!(slept - at.get() < Duration::from_secs(1), "{slept:?}");
    assert!(!world.fake.on.get() && world.fake.views.borrow().is_empty());
    assert!(world.journal.load().unwrap().is_none());
    // The cave is the new kernel's memory now.
    assert!(testkit::text_of(&world.fake, ViewId::HOST) == *text.borrow());
    assert_eq!(snapshot(&world.fake).0, world.before.0);
}

#[test]
fn a_soft_reset_is_another_kernel_at_once() {
    let world = World::new();
    let (outcome, ear, slept) = world.watch(&world.fake, &|_| {
        world.fake.domain.borrow_mut().life = Life::SoftReset;
        false
    });
    assert_eq!(outcome.unwrap(), Outcome::OtherKernel);
    assert_eq!((ear.passes, slept), (1, POLL));
    assert_nothing(&world.fake, &world.before, "before the new kernel runs");
}

#[test]
fn a_vcpu_that_comes_up_is_no_other_kernel() {
    let world = World::new();
    let (outcome, _, _) = world.watch(&world.fake, &|tick| {
        let mut vcpus = world.fake.vcpus.borrow_mut();
        vcpus.truncate(1);
        let vcpu = crate::xen::Vcpu {
            lstar: 0,
            ..vcpus[0]
        };
        vcpus.push(vcpu);
        tick == 40
    });
    assert_eq!(outcome.unwrap(), Outcome::Stopped(1));
    let world_state = world.journal.load().unwrap();
    crate::views::remove(&world.fake, &world.journal, world_state.as_ref()).unwrap();
    assert_nothing(&world.fake, &world.before, "removed");
}
