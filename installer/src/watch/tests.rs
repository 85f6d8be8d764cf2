//! From processes and policy to bindings, against the fake.

use super::{Watcher, decide, wanted};
use crate::guest::{Process, ProcessList};
use crate::views::State;
use crate::views::testkit::{self, root};
use crate::views::{apply, journal::Journal};
use crate::xen::fake::Fake;
use crate::xen::{GuestPa, Hypervisor, Root, ViewId};
use penumbra_bundle::Bundle;
use penumbra_policy::Policy;
use std::cell::Cell;
use std::collections::BTreeMap;

pub const POLICY: &str = r#"
schema = 1
name = "test"
version = 1

[default]
view = "hardened"

[[rule]]
id = "payroll-fast"
reason = "a test"
view = "fast"
match = { exe = "/usr/bin/payroll" }

[[rule]]
id = "users-stock"
reason = "a test"
view = "stock"
match = { exe = "/usr/bin/payroll", uid = 2000 }
"#;

/// Process numbers in the testkit's guest.
const INIT: u64 = 1;
const PAYROLL: u64 = 2;
const SH: u64 = 3;
const IMPOSTOR: u64 = 4;

struct World {
    fake: Fake,
    state: State,
    policy: Policy,
    watcher: Watcher,
    foreign: bool,
    journal: Journal,
    _dir: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        let bundle: Bundle = testkit::bundle();
        let fake = testkit::guest(&bundle);
        let dir = tempfile::tempdir().unwrap();
        let journal = testkit::journal(&dir);
        let state = apply(&fake, &journal, &testkit::request(&bundle))
            .unwrap()
            .state;
        World {
            fake,
            state,
            policy: Policy::parse("test.toml", POLICY).unwrap(),
            watcher: Watcher::default(),
            foreign: false,
            journal,
            _dir: dir,
        }
    }

    fn list(&self) -> ProcessList {
        let memory = self.state.reader.kernel().memory(&self.fake);
        self.state.reader.list(&memory)
    }

    /// What a pass did.
    fn pass(&mut self) -> super::Pass {
        let pass = self
            .watcher
            .pass(
                &self.fake,
                &self.state,
                &self.policy,
                self.foreign,
                self.journal.dir(),
            )
            .unwrap();
        super::Pass {
            list: ProcessList::default(),
            ..pass
        }
    }

    fn bound(&self) -> BTreeMap<Root, ViewId> {
        let table = self.fake.table.borrow();
        let views = table.bound.iter().map(|(root, bound)| (*root, bound.view));
        views.collect()
    }

    /// What somebody else left bound.
    fn leave(&self, root: Root, view: ViewId) {
        self.fake.set_binding(root, view, false, &[]).unwrap();
    }

    fn fast(&self) -> ViewId {
        self.state.view("fast").unwrap()
    }

    fn set32(&self, at: u64, value: u32) {
        self.fake.poke(GuestPa(at), &value.to_le_bytes());
    }
}

#[test]
fn foreign_text_keeps_everybody_on_the_default_if_the_policy_refuses_it() {
    let mut world = World::new();
    world.foreign = true;
    world.pass();
    assert_eq!(world.bound()[&root(PAYROLL)], world.fast());
    world.policy.refuses_unknown_modules = true;
    let pass = world.pass();
    assert_eq!(pass.unbound.len(), 1);
    assert!(!world.bound().contains_key(&root(PAYROLL)));
    world.foreign = false;
    world.pass();
    assert_eq!(world.bound()[&root(PAYROLL)], world.fast());
}

#[test]
fn processes_are_read_with_path_uid_and_root() {
    let world = World::new();
    let list = world.list();
    assert!(list.trouble.is_empty(), "{:?}", list.trouble);
    assert_eq!(list.kernel_threads, 1);
    let seen: Vec<_> = list
        .processes
        .iter()
        .map(|process| {
            let identity = &process.identity;
            (
                identity.pid,
                process.comm.as_str(),
                identity.exe.as_deref(),
                identity.root,
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            (1, "init", Some("/sbin/init"), root(INIT)),
            (100, "payroll", Some("/usr/bin/payroll"), root(PAYROLL)),
            (101, "sh", Some("/bin/sh"), root(SH)),
            // The same path in a mount namespace that is not process 1's means nothing.
            (102, "payroll", None, root(IMPOSTOR)),
        ]
    );
    assert_eq!(
        list.processes[3].shown_exe.as_deref(),
        Some("/usr/bin/payroll")
    );
    assert_eq!(list.processes[1].identity.uid, Some((1000, 1000)));
}

#[test]
fn only_what_the_policy_trusts_is_bound() {
    let mut world = World::new();
    let pass = world.pass();
    assert_eq!((pass.bound.len(), pass.unbound.len()), (1, 0), "{pass:?}");
    let change = &pass.bound[0];
    assert_eq!(
        (change.pid, change.root, change.view.as_str()),
        (100, root(PAYROLL), "fast")
    );
    assert_eq!(change.rule.as_deref(), Some("payroll-fast"));
    assert_eq!(
        world.bound(),
        BTreeMap::from([(root(PAYROLL), world.fast())])
    );
    let list = world.list();
    let rules: Vec<String> = list
        .processes
        .iter()
        .map(|process| decide(&world.policy, process).rule)
        .collect();
    assert_eq!(rules, ["default", "payroll-fast", "default", "default"]);
    // A second look changes nothing.
    let calls = world.fake.log.borrow().len();
    assert_eq!(world.pass(), super::Pass::default());
    assert_eq!(world.fake.log.borrow().len(), calls);
}

#[test]
fn a_process_that_becomes_another_loses_its_binding_before_others_get_one() {
    for change in ["exec", "exit", "reused pid", "other mm"] {
        let mut world = World::new();
        world.pass();
        let at = testkit::task(PAYROLL);
        match change {
            "exec" => testkit::set_exe(&world.fake, PAYROLL, "/bin/sh"),
            "exit" => world.fake.poke(GuestPa(at + 0x10), &[0; 8]),
            "reused pid" => world.fake.poke(GuestPa(at + 0x38), &[9; 8]),
            // The same page-table root in another mm_struct: here, one that moved by eight bytes.
            _ => {
                let mm = world.fake.peek(ViewId::HOST, GuestPa(at + 0x180), 0x20);
                world.fake.poke(GuestPa(at + 0x1a0), &mm[8..0x18]);
                world.fake.poke(
                    GuestPa(at + 0x10),
                    &(0xffff_8880_0000_0000 + at + 0x198).to_le_bytes(),
                );
            }
        }
        // Meanwhile the shell ran payroll.
        testkit::set_exe(&world.fake, SH, "/usr/bin/payroll");
        let start = world.fake.log.borrow().len();
        world.pass();
        let log = world.fake.log.borrow()[start..].to_vec();
        assert!(log[0].starts_with("Clear"), "{change}: {log:?}");
        assert!(
            log[0].ends_with(&root(PAYROLL).to_string()),
            "{change}: {log:?}"
        );
        assert_eq!(
            world.bound().get(&root(SH)),
            Some(&world.fast()),
            "{change}"
        );
        // Whoever still is payroll is bound anew, whoever is not is not.
        let again = matches!(change, "reused pid" | "other mm");
        assert_eq!(
            world.bound().contains_key(&root(PAYROLL)),
            again,
            "{change}"
        );
    }
}

#[test]
fn a_process_that_changes_while_it_is_bound_is_unbound_at_once() {
    let mut world = World::new();
    // It runs another program between the reading and the binding.
    *world.fake.hook.borrow_mut() = Some(Box::new(|fake, call| {
        if call.starts_with("Set") {
            testkit::set_exe(fake, PAYROLL, "/bin/sh");
        }
    }));
    let pass = world.pass();
    assert_eq!(pass, super::Pass::default());
    assert!(world.bound().is_empty());
}

#[test]
fn a_root_that_processes_share_gets_the_strictest_view_and_none_laxer_than_the_default() {
    let mut world = World::new();
    world.pass();
    // The shell is payroll's vfork child: one mm, another program in no rule.
    let mm = world
        .fake
        .peek(ViewId::HOST, GuestPa(testkit::task(PAYROLL) + 0x10), 8);
    world.fake.poke(GuestPa(testkit::task(SH) + 0x10), &mm);
    let want = |default: &str| {
        let mut wanted = wanted(&world.policy, &world.list(), default);
        let want = wanted.remove(&root(PAYROLL)).unwrap();
        assert_eq!(want.who.len(), 2);
        want.view
    };
    // Both may have `fast`, but which of them would the witnesses be of?
    assert_eq!(want("hardened"), "hardened");
    assert_eq!(want("fast"), "fast");
    // As another user the shell has a stricter view, and so has the one whose memory it shares.
    world.set32(testkit::task(SH) + 0x104, 2000);
    let want = |default: &str| {
        wanted(&world.policy, &world.list(), default)[&root(PAYROLL)]
            .view
            .clone()
    };
    assert_eq!(
        (want("fast"), want("hardened")),
        ("stock".into(), "hardened".into())
    );
    let pass = world.pass();
    assert_eq!(pass.unbound.len(), 1);
    assert!(world.bound().is_empty());
}

#[test]
fn a_binding_lapses_with_whatever_made_it_right() {
    let task = testkit::task(PAYROLL);
    type Change = fn(&Fake, u64);
    let changes: [(&str, Change); 6] = [
        ("exit: mm", |fake, at| {
            fake.poke(GuestPa(at + 0x10), &[0; 8])
        }),
        ("exec: exe_file", |fake, _| {
            testkit::set_exe(fake, PAYROLL, "/bin/sh")
        }),
        ("reused task: start", |fake, at| {
            fake.poke(GuestPa(at + 0x38), &[9; 8])
        }),
        ("setuid: cred", |fake, at| {
            fake.poke(GuestPa(at + 0x30), &[8; 8])
        }),
        ("uid in place", |fake, at| {
            fake.poke(GuestPa(at + 0x104), &[1])
        }),
        ("reused mm: pgd", |fake, at| {
            fake.poke(GuestPa(at + 0x188), &[0; 8])
        }),
    ];
    for (what, change) in changes {
        let mut world = World::new();
        world.pass();
        let (fast, default) = (world.fast(), world.state.view("hardened").unwrap());
        let cr3 = root(PAYROLL).0 | 0x5;
        assert_eq!(world.fake.load_cr3(cr3), fast, "{what}");
        change(&world.fake, task);
        // Before any pass: Xen alone.
        assert_eq!(world.fake.load_cr3(cr3), default, "{what}");
        assert!(world.bound().is_empty(), "{what}");
        assert_eq!(world.fake.events().unwrap().lapsed, 1, "{what}");
        let pass = world.pass();
        assert_eq!(pass.lapsed.len(), 1, "{what}: {pass:?}");
        assert_eq!(pass.lapsed[0].pid, 100, "{what}");
    }
    // A write next to the uid is nobody's business.
    let mut world = World::new();
    world.pass();
    world.set32(task + 0x100, 77);
    assert_eq!(world.fake.load_cr3(root(PAYROLL).0), world.fast());
}

#[test]
fn a_stricter_view_than_the_default_has_no_witness_to_lose_it_by() {
    let mut world = World::new();
    world.state.default = "fast".to_owned();
    let policy = POLICY
        .replace("\"fast\"", "\"stock\"")
        .replace("\"hardened\"", "\"fast\"\nallow-fast-default = true");
    world.policy = Policy::parse("test.toml", &policy).unwrap();
    world.pass();
    let stock = world.state.view("stock").unwrap();
    // The impostor, whose path cannot be known, gets the stricter view as well.
    let bound = BTreeMap::from([(root(PAYROLL), stock), (root(IMPOSTOR), stock)]);
    assert_eq!(world.bound(), bound);
    testkit::set_exe(&world.fake, PAYROLL, "/bin/sh");
    assert_eq!(world.fake.load_cr3(root(PAYROLL).0), stock);
    world.pass();
    assert!(!world.bound().contains_key(&root(PAYROLL)));
}

#[test]
fn a_process_whose_first_thread_ended_is_bound_by_another() {
    let mut world = World::new();
    let (leader, thread) = (testkit::task(PAYROLL), testkit::THREAD);
    testkit::add_thread(&world.fake, PAYROLL);
    world.fake.poke(GuestPa(leader + 0x10), &[0; 8]);
    let pass = world.pass();
    assert_eq!(pass.bound.len(), 1, "{pass:?}");
    assert_eq!(pass.bound[0].pid, 100);
    assert_eq!(world.fake.load_cr3(root(PAYROLL).0), world.fast());
    // A second pass finds it right, and the thread's end is the binding's.
    assert_eq!(world.pass(), super::Pass::default());
    world.fake.poke(GuestPa(thread + 0x10), &[0; 8]);
    assert_ne!(world.fake.load_cr3(root(PAYROLL).0), world.fast());
    assert!(world.pass().bound.is_empty());
    assert!(world.bound().is_empty());
}

#[test]
fn with_page_table_isolation_both_halves_are_bound() {
    let mut world = World::new();
    let user_half = root(PAYROLL).0 | 0x1000;
    world.pass();
    assert_ne!(
        world.fake.load_cr3(user_half),
        world.fast(),
        "another process's root"
    );
    for (kernel, user, pair) in [
        // As __pti_set_user_pgtbl leaves it; the processor has used the user's.
        (0x8000_0000_0007_7007_u64, 0x7_7027_u64, true),
        // Not isolated: an entry that user mode may execute.
        (0x7_7007, 0x7_7007, false),
        // No-execute, but the next page is no such table.
        (0x8000_0000_0007_7007, 0x7_8007, false),
        (0x8000_0000_0007_7007, 0, false),
    ] {
        let mut world = World::new();
        for (at, entry) in [(root(PAYROLL).0, kernel), (user_half, user)] {
            world.fake.poke(GuestPa(at + 0x88), &entry.to_le_bytes());
        }
        world.pass();
        let bound = world.fake.table.borrow().bound[&root(PAYROLL)].clone();
        assert_eq!(bound.pair, pair, "{kernel:#x} {user:#x}");
        let half = world.fake.load_cr3(user_half);
        assert_eq!(half == world.fast(), pair);
    }
}

#[test]
fn unreadable_processes_and_circular_lists_are_hardened() {
    let mut world = World::new();
    world.pass();
    // payroll's page tables vanish from its mm.
    world
        .fake
        .poke(GuestPa(testkit::task(PAYROLL) + 0x188), &[0; 8]);
    let pass = world.pass();
    assert!(world.bound().is_empty());
    assert!(
        pass.trouble[0].contains("cannot be read"),
        "{:?}",
        pass.trouble
    );
    // The shell's list entry points back to init: nobody behind it is seen, and the walk ends.
    let init = world.fake.peek(ViewId::HOST, GuestPa(testkit::task(0)), 8);
    world.fake.poke(GuestPa(testkit::task(SH)), &init);
    let list = world.list();
    assert!(
        list.trouble
            .iter()
            .any(|trouble| trouble.contains("circle")),
        "{:?}",
        list.trouble
    );
    assert!(list.processes.len() < 4);
}

#[test]
fn bindings_of_a_dead_watcher_are_taken_back() {
    let mut world = World::new();
    let (fast, stale) = (world.fast(), Root(0x7_7000));
    world.leave(stale, fast);
    world.leave(root(SH), fast);
    world.pass();
    assert_eq!(world.bound(), BTreeMap::from([(root(PAYROLL), fast)]));
    let dropped = super::drop_bindings(&world.fake, &world.state, world.journal.dir()).unwrap();
    assert_eq!(dropped, 1);
    assert!(world.bound().is_empty());
}

#[test]
fn a_binding_that_hides_behind_one_that_lapses_is_seen() {
    let mut world = World::new();
    world.pass();
    let (fast, stale) = (world.fast(), Root(0x7_7000));
    world.leave(stale, fast);
    // The list is being read when its first entry lapses and all others change their index.
    *world.fake.asked.borrow_mut() = Some(Box::new(|fake, call| {
        if call == "Get" {
            fake.table.borrow_mut().bound.remove(&root(PAYROLL));
        }
    }));
    let pass = world.pass();
    assert_eq!(pass.lapsed.len(), 1, "{pass:?}");
    assert_eq!(world.bound(), BTreeMap::from([(root(PAYROLL), fast)]));
}

#[test]
fn a_pinned_root_is_left_alone() {
    let mut world = World::new();
    let fast = world.fast();
    let pin = super::pins::Pin::new(world.journal.dir(), root(SH)).unwrap();
    world.leave(root(SH), fast);
    world.pass();
    assert_eq!(world.bound().get(&root(SH)), Some(&fast));
    drop(pin);
    world.pass();
    assert_eq!(world.bound().get(&root(SH)), None);
}

#[test]
fn a_full_table_leaves_processes_on_the_default() {
    let mut world = World::new();
    world.fake.room.set(0);
    let pass = world.pass();
    assert!(world.bound().is_empty());
    assert!(
        pass.trouble[0].contains("payroll (100) stays on the default view"),
        "{:?}",
        pass.trouble
    );
}

mod storm {
    use super::*;
    use crate::watch::storm;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    fn plan(seed: u64) -> storm::Plan {
        storm::Plan {
            flips: 60,
            seed,
            longest_wait: Duration::from_micros(10),
        }
    }

    #[test]
    fn a_storm_goes_to_every_view_and_leaves_none() {
        let world = World::new();
        let list = world.list();
        let stop = AtomicBool::new(false);
        let run = |pids: &[u32], seed| {
            let processes: Vec<&Process> = pids
                .iter()
                .map(|pid| storm::find(&list, *pid).unwrap())
                .collect();
            storm::run(
                &world.fake,
                &world.state,
                world.journal.dir(),
                &processes,
                plan(seed),
                &stop,
            )
            .unwrap()
        };
        let storm = run(&[100], 7);
        assert_eq!(storm.flips, 60);
        assert_eq!(storm.per_process, [60]);
        assert_eq!(storm.per_view.values().sum::<u64>(), 60);
        assert!(
            storm.per_view.values().all(|count| *count > 5),
            "{:?}",
            storm.per_view
        );
        assert!(world.bound().is_empty());
        // Each flip goes to another view, and the seed makes it the same storm again.
        let sets = |log: &[String]| -> Vec<String> {
            log.iter()
                .filter(|call| call.starts_with("Set"))
                .cloned()
                .collect()
        };
        let first = sets(&world.fake.log.borrow());
        assert!(first.windows(2).all(|two| two[0] != two[1]));
        run(&[100], 7);
        assert_eq!(sets(&world.fake.log.borrow())[60..], first[..]);
        // Two processes share the flips, and neither keeps a view.
        let storm = run(&[100, 101], 7);
        assert_eq!(storm.per_process.iter().sum::<u64>(), 60);
        assert!(
            storm.per_process.iter().all(|count| *count > 5),
            "{:?}",
            storm.per_process
        );
        assert!(world.bound().is_empty());
    }

    #[test]
    fn a_storm_ends_with_its_process() {
        let world = World::new();
        let list = world.list();
        let process = storm::find(&list, 100).unwrap();
        // It runs another program before the tenth flip.
        let flips = Cell::new(0);
        *world.fake.hook.borrow_mut() = Some(Box::new(move |fake, call| {
            flips.set(flips.get() + u32::from(call.starts_with("Set")));
            if flips.get() == 10 {
                testkit::set_exe(fake, PAYROLL, "/bin/sh");
            }
        }));
        let stop = AtomicBool::new(false);
        let dir = world.journal.dir();
        let error =
            storm::run(&world.fake, &world.state, dir, &[process], plan(1), &stop).unwrap_err();
        assert!(
            matches!(error, storm::StormError::Lost { pid: 100, flips: 9 }),
            "{error}"
        );
        assert!(world.bound().is_empty());
        assert!(!crate::watch::pins::is_pinned(dir, root(PAYROLL)));
        assert!(matches!(
            storm::find(&list, 7),
            Err(storm::StormError::NoProcess { pid: 7 })
        ));
    }
}
