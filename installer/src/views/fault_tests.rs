//! Apply and remove when calls fail, the program dies, or the disk is full: the guest is on its own text or on complete
//! views, and what is left can always be taken out.
//!
//! [`Fake::fail`] fails a call that changes something, with half of its work done; [`Faulty`] fails any call, before it.

use super::apply::ApplyError;
use super::journal::{Journal, JournalError};
use super::testkit::{self, assert_complete, assert_nothing, snapshot};
use super::{CaveFate, apply, remove};
use crate::xen::faults::{Fault, Faulty};
use crate::xen::{Errno, ViewId};
use penumbra_bundle::Bundle;
use std::fs;

/// How many calls a whole apply makes that change something.
fn calls(bundle: &Bundle) -> usize {
    let fake = testkit::guest(bundle);
    let dir = tempfile::tempdir().unwrap();
    apply(&fake, &testkit::journal(&dir), &testkit::request(bundle)).unwrap();
    fake.log.borrow().len()
}

#[test]
fn a_failure_at_any_call_leaves_nothing() {
    let bundle = testkit::bundle();
    let calls = calls(&bundle);
    assert!(calls > 15, "the sequence is there");
    for at in 0..calls {
        let fake = testkit::guest(&bundle);
        let dir = tempfile::tempdir().unwrap();
        let journal = testkit::journal(&dir);
        let before = snapshot(&fake);
        // EIO: nothing that is handled as a case of its own.
        fake.fail.set(Some((at, Errno(5))));
        let error = apply(&fake, &journal, &testkit::request(&bundle)).unwrap_err();
        let call = fake.log.borrow()[at].clone();
        let when = format!("call {at} ({call}) failed");
        assert!(
            !matches!(error, ApplyError::Uncleaned { .. }),
            "{when}: {error}"
        );
        assert_nothing(&fake, &before, &when);
        assert!(
            journal.load().unwrap().is_none(),
            "{when}: the journal is gone"
        );
    }
}

#[test]
fn remove_cleans_up_after_a_kill_at_any_call() {
    let bundle = testkit::bundle();
    for at in 0..calls(&bundle) {
        let fake = testkit::guest(&bundle);
        let dir = tempfile::tempdir().unwrap();
        let before = snapshot(&fake);
        // From this call on nothing reaches Xen any more, nor does the cleaning: the installer is dead.
        fake.fail.set(Some((at, Errno(5))));
        fake.for_good.set(true);
        let journal = testkit::journal(&dir);
        apply(&fake, &journal, &testkit::request(&bundle)).unwrap_err();
        drop(journal);
        fake.fail.set(None);
        let journal = testkit::journal(&dir);
        let state = journal.load().unwrap();
        remove(&fake, &journal, state.as_ref()).unwrap();
        assert_nothing(&fake, &before, &format!("killed at call {at}"));
        // And again: it succeeds when nothing is there.
        let removed = remove(&fake, &journal, None).unwrap();
        assert!(!removed.anything);
    }
}

#[test]
fn a_remove_that_is_killed_is_finished_by_the_next() {
    let bundle = testkit::bundle();
    let start = calls(&bundle);
    // Until a remove makes no call that could be the last one.
    for at in start.. {
        let fake = testkit::guest(&bundle);
        let dir = tempfile::tempdir().unwrap();
        let journal = testkit::journal(&dir);
        let before = snapshot(&fake);
        apply(&fake, &journal, &testkit::request(&bundle)).unwrap();
        fake.fail.set(Some((at, Errno(5))));
        fake.for_good.set(true);
        let state = journal.load().unwrap();
        let first = remove(&fake, &journal, state.as_ref());
        let reached = fake.log.borrow().len() > at;
        fake.fail.set(None);
        if !reached {
            assert!(first.is_ok());
            assert!(at > start + 4, "a remove makes several calls");
            return;
        }
        match first {
            // Writing the filler is the one step that may fail and be reported instead.
            Ok(removed) => assert!(matches!(removed.cave, CaveFate::Left(_))),
            Err(_) => {
                let state = journal.load().unwrap();
                assert!(state.is_some(), "the journal stays until all is done");
                remove(&fake, &journal, state.as_ref()).unwrap();
                assert_nothing(&fake, &before, &format!("remove killed at call {at}"));
            }
        }
    }
}

#[test]
fn any_call_may_fail_in_any_way() {
    let bundle = testkit::bundle();
    let errors = [
        Errno::IO,
        Errno::NOMEM,
        Errno::INVAL,
        Errno::AGAIN,
        Errno::SRCH,
    ];
    for errno in errors {
        let (mut refused, mut survived) = (0, 0);
        for at in 1.. {
            let fake = testkit::guest(&bundle);
            let dir = tempfile::tempdir().unwrap();
            let journal = testkit::journal(&dir);
            let before = snapshot(&fake);
            let faulty = Faulty::new(&fake, Fault::FailAny(at, errno));
            let result = apply(&faulty, &journal, &testkit::request(&bundle));
            let when = format!("call {at}: {errno}");
            match &result {
                Ok(_) => {
                    survived += 1;
                    assert!(fake.table.borrow().enabled, "{when}");
                    assert_complete(&fake, &bundle);
                }
                Err(error) => {
                    refused += 1;
                    let cleaned = !matches!(error, ApplyError::Uncleaned { .. });
                    assert!(cleaned, "{when}: {error}");
                    assert_nothing(&fake, &before, &format!("{when}: {error}"));
                    assert!(journal.load().unwrap().is_none(), "{when}");
                }
            }
            if faulty.calls.get().0 < at {
                assert!(result.is_ok());
                break;
            }
        }
        // What may fail and is done without: processes other than the first, a second try at ENABLE.
        assert!(
            refused > survived && refused > 80,
            "{errno}: {refused} refused, {survived} survived"
        );
    }
}

#[test]
fn any_call_of_a_remove_may_fail_once() {
    let bundle = testkit::bundle();
    for at in 1.. {
        let fake = testkit::guest(&bundle);
        let dir = tempfile::tempdir().unwrap();
        let journal = testkit::journal(&dir);
        let before = snapshot(&fake);
        apply(&fake, &journal, &testkit::request(&bundle)).unwrap();
        let faulty = Faulty::new(&fake, Fault::FailAny(at, Errno::IO));
        let state = journal.load().unwrap();
        let first = remove(&faulty, &journal, state.as_ref());
        assert_complete(&fake, &bundle);
        match first {
            // Looks at the stacks may fail and are made again; the filler's writing is reported.
            Ok(removed) if removed.cave == CaveFate::Restored => {
                assert_nothing(&fake, &before, &format!("call {at}"));
            }
            Ok(removed) => assert!(matches!(removed.cave, CaveFate::Left(_)), "call {at}"),
            Err(_) => {
                let state = journal.load().unwrap();
                assert!(
                    state.is_some(),
                    "call {at}: the journal stays until all is done"
                );
                remove(&fake, &journal, state.as_ref()).unwrap();
                assert_nothing(&fake, &before, &format!("call {at}, and again"));
            }
        }
        if faulty.calls.get().0 < at {
            return;
        }
    }
}

/// From here on the journal cannot be written: where the new one would go there is a directory.
fn fill_disk(journal_dir: &std::path::Path) {
    let _ = fs::create_dir(journal_dir.join("state.json.new"));
}

#[test]
fn a_disk_that_fills_up_at_any_call_leaves_nothing() {
    let bundle = testkit::bundle();
    let mut refused = 0;
    for at in 0..calls(&bundle) {
        let fake = testkit::guest(&bundle);
        let dir = tempfile::tempdir().unwrap();
        let journal = testkit::journal(&dir);
        let before = snapshot(&fake);
        let path = journal.dir().to_owned();
        *fake.hook.borrow_mut() = Some(Box::new(move |fake, _| {
            if fake.log.borrow().len() == at {
                fill_disk(&path);
            }
        }));
        let error = apply(&fake, &journal, &testkit::request(&bundle)).unwrap_err();
        assert!(
            matches!(error, ApplyError::Journal(JournalError::Io { .. })),
            "call {at}: {error}"
        );
        refused += 1;
        assert_nothing(&fake, &before, &format!("no disk from call {at} on"));
        assert!(journal.load().unwrap().is_none());
    }
    assert!(refused > 15);
}

#[test]
fn a_full_disk_keeps_nothing_in_the_guest() {
    let bundle = testkit::bundle();
    let fake = testkit::guest(&bundle);
    let dir = tempfile::tempdir().unwrap();
    let before = snapshot(&fake);
    // Before the first step: nothing is done at all.
    let journal = testkit::journal(&dir);
    fill_disk(journal.dir());
    let error = apply(&fake, &journal, &testkit::request(&bundle)).unwrap_err();
    assert!(error.to_string().contains("must be writable"), "{error}");
    assert!(fake.log.borrow().is_empty());
    // After the last: what is there can be taken out.
    fs::remove_dir(journal.dir().join("state.json.new")).unwrap();
    let state = apply(&fake, &journal, &testkit::request(&bundle))
        .unwrap()
        .state;
    fill_disk(journal.dir());
    remove(&fake, &journal, Some(&state)).unwrap();
    assert_nothing(&fake, &before, "removed with a full disk");
    assert!(Journal::load(&journal).unwrap().is_none());
}

#[test]
fn a_text_page_that_goes_away_is_an_error_and_undone() {
    let bundle = testkit::bundle();
    let fake = testkit::guest(&bundle);
    let dir = tempfile::tempdir().unwrap();
    let journal = testkit::journal(&dir);
    *fake.hook.borrow_mut() = Some(Box::new(|fake, call| {
        if call.starts_with("Remap") {
            fake.memory.borrow_mut().remove(&testkit::TEXT.gfn());
        }
    }));
    let error = apply(&fake, &journal, &testkit::request(&bundle)).unwrap_err();
    assert!(
        matches!(error, ApplyError::Uncleaned { .. } | ApplyError::Xen(_)),
        "{error}"
    );
    assert!(!fake.on.get() && fake.views.borrow().is_empty());
    assert!(
        fake.memory.borrow().keys().all(|gfn| gfn.0 < 64),
        "no copy is left"
    );
    assert_eq!(fake.load_cr3(testkit::root(2).0), ViewId::HOST);
}
