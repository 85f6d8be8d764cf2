//! Apply, verify and remove against the fake: what is built, what is refused, and that nothing ever stays half-mapped.

use super::apply::ApplyError;
use super::journal::Step;
use super::testkit::{self, RET, TEXT, assert_nothing, snapshot};
use super::{CaveFate, TextError, apply, remove, verify};
use crate::guest::explain::ExplainError;
use crate::guest::kernel::FindError;
use crate::xen::fake::Fake;
use crate::xen::{Altp2mMode, GuestPa, Hypervisor, Vcpu, ViewId};
use std::cell::Cell;
use std::rc::Rc;

#[test]
fn every_view_is_the_running_text_plus_its_edits() {
    let bundle = testkit::bundle();
    let fake = testkit::guest(&bundle);
    let dir = tempfile::tempdir().unwrap();
    let journal = testkit::journal(&dir);
    // The jump label is on: views must have it, not the file's bytes.
    fake.poke(GuestPa(TEXT.0 + 0x40), &[0xe9, 0x1b, 0, 0, 0]);
    let applied = apply(&fake, &journal, &testkit::request(&bundle)).unwrap();
    assert_eq!(applied.fills, 1);
    assert_eq!(applied.state.step, Step::Applied);
    assert_eq!(journal.load().unwrap().unwrap(), applied.state);
    let [stock, fast, hardened] =
        ["stock", "fast", "hardened"].map(|name| applied.state.view(name).unwrap());
    for (name, view) in [("stock", stock), ("fast", fast), ("hardened", hardened)] {
        assert_ne!(view, ViewId::HOST, "{name} is a view of its own");
        assert_eq!(
            testkit::text_of(&fake, view),
            testkit::with_edits(&bundle, &fake, name),
            "{name}"
        );
        // Nobody writes text through it, cave included; the page behind is the guest's own.
        for page in 0..4 {
            assert!(!fake.store(view, GuestPa(TEXT.0 + page * 0x1000 + 0x45), &[0xcc]));
        }
        assert!(fake.store(view, GuestPa(TEXT.0 + 0x4800), &[1]));
    }
    // The copies are in no view's sight.
    let copies = applied.state.copies.unwrap();
    assert_eq!(
        fake.table.borrow().hidden,
        Some((copies.first, copies.count))
    );
    assert!(!fake.store(ViewId::HOST, copies.first.base(), &[0xcc]));
    let table = fake.table.borrow();
    assert!(table.enabled);
    assert_eq!(table.default, hardened);
    assert_eq!(table.flagged.iter().copied().collect::<Vec<_>>(), [fast]);
    assert_eq!(
        table.armed,
        Some((crate::xen::Root(testkit::POKING), 0x5555_0000))
    );
    // The cave is in the guest's own frames, tail as the kernel returns, address moved by the slide.
    let cave = fake.peek(ViewId::HOST, GuestPa(TEXT.0 + 0x2000), 0x80);
    assert_eq!(cave[0x20..0x25], RET);
    assert_eq!(
        cave[0x60..0x68],
        (testkit::LINK + testkit::SLIDE + 0x900).to_le_bytes()
    );
    // Copies lie above everything the guest has.
    let first = applied.state.copies.unwrap().first;
    assert!(first.0 >= 64);
    drop(table);
    let report = verify::verify(&fake, &bundle, &applied.state).unwrap();
    assert!(report.explained, "{report:?}");
}

#[test]
fn a_poke_while_the_copies_are_filled_is_not_lost() {
    let bundle = testkit::bundle();
    let fake = testkit::guest(&bundle);
    let dir = tempfile::tempdir().unwrap();
    let journal = testkit::journal(&dir);
    let pokes = Rc::new(Cell::new(0));
    let count = Rc::clone(&pokes);
    // Three times the guest switches its jump label right before ENABLE. The copies, already filled, are torn: what the
    // fake mirrors is nothing, which is the worst case.
    *fake.hook.borrow_mut() = Some(Box::new(move |fake, call| {
        if call.starts_with("Enable") && count.get() < 3 {
            count.set(count.get() + 1);
            let on = count.get() % 2 == 1;
            let bytes: [u8; 5] = if on {
                [0xe9, 0x1b, 0, 0, 0]
            } else {
                [0x0f, 0x1f, 0x44, 0, 0]
            };
            fake.poke(GuestPa(TEXT.0 + 0x40), &bytes);
            fake.table.borrow_mut().generation += 1;
        }
    }));
    let applied = apply(&fake, &journal, &testkit::request(&bundle)).unwrap();
    assert_eq!((applied.fills, applied.looks), (1, 3));
    for view in &applied.state.views {
        assert_eq!(
            testkit::text_of(&fake, view.view.unwrap()),
            testkit::with_edits(&bundle, &fake, &view.name)
        );
    }
}

#[test]
fn a_guest_that_pokes_without_pause_is_left_alone() {
    let bundle = testkit::bundle();
    let fake = testkit::guest(&bundle);
    let dir = tempfile::tempdir().unwrap();
    let before = snapshot(&fake);
    *fake.hook.borrow_mut() = Some(Box::new(|fake, call| {
        if call.starts_with("Enable") {
            fake.table.borrow_mut().generation += 1;
        }
    }));
    let error = apply(&fake, &testkit::journal(&dir), &testkit::request(&bundle)).unwrap_err();
    assert!(matches!(error, ApplyError::TooManyPokes(1000)), "{error}");
    assert_nothing(&fake, &before, "after giving up");
}

#[test]
fn the_cave_stays_while_something_may_run_in_it() {
    let bundle = testkit::bundle();
    let inside = testkit::LINK + testkit::SLIDE + 0x2012;
    let stack_word = testkit::stack(3) + 0xf80;
    let below_sp = testkit::stack(3) + 0x80;
    let stack_pointer = GuestPa(testkit::task(3) + 0x40);
    let cases = [
        ("rip", true),
        ("stack", true),
        ("below", false),
        ("hole", false),
        ("return address", true),
        ("no stack", true),
    ];
    for (what, left) in cases {
        let fake = testkit::guest(&bundle);
        let dir = tempfile::tempdir().unwrap();
        let journal = testkit::journal(&dir);
        let before = snapshot(&fake);
        let state = apply(&fake, &journal, &testkit::request(&bundle))
            .unwrap()
            .state;
        match what {
            "rip" => {
                let vcpu = fake.vcpus.borrow()[0];
                fake.vcpus.borrow_mut()[0] = Vcpu {
                    rip: inside,
                    user: false,
                    ..vcpu
                };
            }
            "stack" => fake.poke(GuestPa(stack_word), &inside.to_le_bytes()),
            "no stack" => fake.poke(stack_pointer, &(u64::MAX << 12).to_le_bytes()),
            // A frame of the text's: what lies in it, and where it returns.
            "hole" | "return address" => {
                let text = testkit::LINK + testkit::SLIDE + 0x300;
                fake.poke(GuestPa(testkit::stack(3) + 0xf30), &text.to_le_bytes());
                let at = if what == "hole" { 0xf40 } else { 0xf50 };
                fake.poke(GuestPa(testkit::stack(3) + at), &inside.to_le_bytes());
            }
            // What lies below a sleeping thread's stack pointer is dead.
            _ => fake.poke(GuestPa(below_sp), &inside.to_le_bytes()),
        }
        let removed = remove(&fake, &journal, Some(&state)).unwrap();
        assert_eq!(
            matches!(removed.cave, CaveFate::Left(_)),
            left,
            "{what}: {:?}",
            removed.cave
        );
        if left {
            assert!(!fake.on.get() && fake.views.borrow().is_empty());
            let kept = journal.load().unwrap().unwrap();
            assert_eq!((kept.step, kept.cave), (Step::Remove, state.cave), "{what}");
            assert!(kept.is_cave_only() && kept.copies.is_none(), "{what}");
            // The next apply of the same bundle finds its own thunks and takes them for what they are.
            let again = apply(&fake, &journal, &testkit::request(&bundle)).unwrap();
            assert!(
                verify::verify(&fake, &bundle, &again.state)
                    .unwrap()
                    .explained
            );
            // Once nothing is in there any more, `remove` ends it.
            remove(&fake, &journal, Some(&again.state)).unwrap();
            let vcpu = fake.vcpus.borrow()[0];
            fake.vcpus.borrow_mut()[0] = Vcpu {
                user: true,
                rip: 0x40_1000,
                ..vcpu
            };
            let stack = 0xffff_8880_0000_0000_u64 + testkit::stack(3);
            fake.poke(stack_pointer, &stack.to_le_bytes());
            for at in (0xf00..0x1000).step_by(8) {
                fake.poke(GuestPa(testkit::stack(3) + at), &[0; 8]);
            }
            let kept = journal.load().unwrap();
            let removed = remove(&fake, &journal, kept.as_ref()).unwrap();
            assert_eq!(removed.cave, CaveFate::Restored, "{what}");
            assert!(journal.load().unwrap().is_none());
            // What the test itself wrote is not the guest's.
            assert!(testkit::text_of(&fake, ViewId::HOST) == testkit::running(&bundle));
        } else {
            assert_nothing(&fake, &before, what);
        }
    }
}

#[test]
fn a_running_vcpus_stacks_are_searched_through_the_interrupt_stack() {
    let bundle = testkit::bundle();
    let fake = testkit::guest(&bundle);
    let dir = tempfile::tempdir().unwrap();
    let journal = testkit::journal(&dir);
    let state = apply(&fake, &journal, &testkit::request(&bundle))
        .unwrap()
        .state;
    let direct = 0xffff_8880_0000_0000_u64;
    let inside = testkit::LINK + testkit::SLIDE + 0x2042;
    // The vCPU is on a stack of its own (frame 0x3e000); its word points to process 3's stack, deeper than that thread's
    // saved pointer, where the interrupted instruction pointer is.
    fake.poke(
        GuestPa(0x3_eff0),
        &(direct + testkit::stack(3) + 0x800).to_le_bytes(),
    );
    fake.poke(GuestPa(testkit::stack(3) + 0x840), &inside.to_le_bytes());
    let vcpu = fake.vcpus.borrow()[0];
    fake.vcpus.borrow_mut()[0] = Vcpu {
        rip: testkit::LINK + testkit::SLIDE + 0x300,
        rsp: direct + 0x3_ef00,
        user: false,
        ..vcpu
    };
    let removed = remove(&fake, &journal, Some(&state)).unwrap();
    assert!(
        matches!(removed.cave, CaveFate::Left(_)),
        "{:?}",
        removed.cave
    );
}

#[test]
fn verify_finds_one_wrong_byte_and_names_it() {
    let bundle = testkit::bundle();
    let fake = testkit::guest(&bundle);
    let dir = tempfile::tempdir().unwrap();
    let state = apply(&fake, &testkit::journal(&dir), &testkit::request(&bundle))
        .unwrap()
        .state;
    let fast = state.views.iter().find(|view| view.name == "fast").unwrap();
    // Its second page is text page 1.
    fake.poke(GuestPa(fast.first_copy.base().0 + 0x1000 + 0x345), &[0x42]);
    let report = verify::verify(&fake, &bundle, &state).unwrap();
    assert!(!report.explained);
    let fast = report
        .views
        .iter()
        .find(|view| view.name == "fast")
        .unwrap();
    assert_eq!(fast.differing, 1);
    assert_eq!(fast.places, ["second+0x345: 42 where 90 was expected"]);
    assert!(
        report
            .views
            .iter()
            .all(|view| view.name == "fast" || view.differing == 0)
    );
    // Xen shows the host's page in place of a copy, and lets the guest write.
    let (view, page) = (state.view("stock").unwrap(), TEXT.gfn());
    let tampered = [(page, Some(crate::xen::Gfn(page.0 + 1)))];
    fake.remap_all(view, &tampered, false).unwrap();
    let mapped = verify::verify(&fake, &bundle, &state).unwrap();
    let stock = &mapped.views[0];
    assert_eq!((stock.name.as_str(), stock.misplaced), ("stock", 1));
    assert!(stock.places[0].contains("writable"), "{:?}", stock.places);
    fake.remap_all(view, &[(page, None)], true).unwrap();
    // A cave that is not the bundle's is not explained either.
    fake.poke(GuestPa(fast_copy(&state) + 0x1000 + 0x345), &[0x90]);
    assert!(verify::verify(&fake, &bundle, &state).unwrap().explained);
    fake.poke(GuestPa(TEXT.0 + 0x2015), &[0x90]);
    assert!(!verify::verify(&fake, &bundle, &state).unwrap().explained);
}

fn fast_copy(state: &super::State) -> u64 {
    let fast = state.views.iter().find(|view| view.name == "fast");
    fast.unwrap().first_copy.base().0
}

fn refused(change: impl Fn(&Fake)) -> ApplyError {
    let bundle = testkit::bundle();
    let fake = testkit::guest(&bundle);
    change(&fake);
    let before = snapshot(&fake);
    let on = fake.on.get();
    let dir = tempfile::tempdir().unwrap();
    let journal = testkit::journal(&dir);
    let error = apply(&fake, &journal, &testkit::request(&bundle)).unwrap_err();
    assert!(snapshot(&fake) == before, "{error}: nothing was touched");
    assert_eq!(fake.on.get(), on, "{error}");
    assert!(journal.load().unwrap().is_none());
    error
}

#[test]
fn refusals_say_why() {
    let error = refused(|fake| fake.poke(GuestPa(TEXT.0 + 0x500), &[0xcc]));
    let ApplyError::Text(TextError::Explain(ExplainError::Unexplained(ranges))) = &error else {
        panic!("{error}");
    };
    assert_eq!(ranges.len(), 1);
    assert_eq!(ranges[0].symbol, "first+0x500");
    assert!(error.to_string().contains("kprobe"), "{error}");

    let error = refused(|fake| {
        for at in [0x20, 0x1020] {
            fake.poke(GuestPa(TEXT.0 + at), &[0xff, 0xd0, 0x0f, 0x1f, 0]);
        }
    });
    assert!(
        error.to_string().contains("spectre_v2=retpoline"),
        "{error}"
    );

    // A jump to a place that is no return thunk.
    let error = refused(|fake| fake.poke(GuestPa(TEXT.0 + 0x10), &[0xe9, 0, 0, 0, 0]));
    assert!(matches!(error, ApplyError::Text(_)), "{error}");

    let error = refused(|fake| fake.vcpus.borrow_mut()[0].lstar += 0x1000);
    assert!(
        matches!(error, ApplyError::Find(FindError::OtherEntry { .. })),
        "{error}"
    );
    let error = refused(|fake| fake.poke(GuestPa(0x1_5110), &[0xff]));
    assert!(
        matches!(error, ApplyError::Find(FindError::OtherBuild { .. })),
        "{error}"
    );
    let error = refused(|fake| fake.vcpus.borrow_mut()[0].lstar = 0);
    assert!(
        matches!(error, ApplyError::Find(FindError::NotBooted)),
        "{error}"
    );

    // Process 1 is still a thread of the kernel.
    let error = refused(|fake| fake.poke(GuestPa(testkit::task(1) + 0x10), &[0; 8]));
    assert!(error.is_early(), "{error}");

    let error = refused(|fake| fake.mode.set(Altp2mMode::Off));
    assert!(error.to_string().contains("altp2m=\"external\""), "{error}");
    let error = refused(|fake| fake.mode.set(Altp2mMode::Guest));
    assert!(matches!(error, ApplyError::Altp2mGuest(_)), "{error}");
    let error = refused(|fake| fake.on.set(true));
    assert!(matches!(error, ApplyError::InUse(_)), "{error}");
    let error = refused(|fake| fake.patched.set(false));
    assert!(matches!(error, ApplyError::NoInterface(_)), "{error}");
    let error = refused(|fake| fake.domain.borrow_mut().hvm = false);
    assert!(matches!(error, ApplyError::NotHvm(_)), "{error}");
    // 64 pages and a 1 GiB step do not fit 20 address bits.
    let error = refused(|fake| fake.domain.borrow_mut().address_bits = 20);
    assert!(matches!(error, ApplyError::NoRoom { .. }), "{error}");
}

#[test]
fn the_wrong_domain_of_the_same_id_is_not_cleaned_with_an_old_journal() {
    let bundle = testkit::bundle();
    let fake = testkit::guest(&bundle);
    let dir = tempfile::tempdir().unwrap();
    let journal = testkit::journal(&dir);
    let state = apply(&fake, &journal, &testkit::request(&bundle))
        .unwrap()
        .state;
    // The guest was destroyed and another got its id.
    let other = testkit::guest(&bundle);
    other.domain.borrow_mut().uuid = "0ther".to_owned();
    let before = snapshot(&other);
    remove(&other, &journal, Some(&state)).unwrap();
    assert!(other.log.borrow().is_empty(), "{:?}", other.log.borrow());
    assert_nothing(&other, &before, "the other domain");
}
