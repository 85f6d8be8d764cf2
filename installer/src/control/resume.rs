//! What an earlier `apply` left: taken over if it is whole, cleaned up if not.

use super::CliError;
use crate::views::journal::{Journal, State, Step};
use crate::views::{CaveFate, Request, modules, remove, verify};
use crate::watch;
use crate::xen::{Action, Binding, Hypervisor};

/// Takes over what an earlier `apply` left, if it is whole; cleans up what one left half-done.
pub fn resume(
    xen: &dyn Hypervisor,
    journal: &Journal,
    request: &Request<'_>,
) -> Result<Option<State>, CliError> {
    let Some(mut state) = journal.load()? else {
        return Ok(None);
    };
    let whole = state.uuid == xen.domain()?.uuid
        && state.step == Step::Applied
        && state.reader.kernel().still_runs(xen, &state.build_id)?;
    if !whole || !xen.altp2m_on()? || !xen.stats()?.enabled {
        if state.is_cave_only() {
            eprintln!("installer: an earlier remove had to leave the hook code; looking again");
        } else {
            eprintln!("installer: an earlier apply did not finish; cleaning up after it");
        }
        report_cave(&remove(xen, journal, Some(&state))?.cave);
        return Ok(None);
    }
    if state.manifest_sha256 != request.manifest_sha256 {
        return Err(CliError::OtherBundle {
            applied: state.bundle,
        });
    }
    // Bindings of a watcher that was killed: nobody vouches for them any more.
    watch::drop_bindings(xen, &state, journal.dir())?;
    modules::reset(xen, journal, &mut state)?;
    if !verify::verify(xen, request.bundle, &state)?.explained {
        return Err(CliError::Damaged);
    }
    state.default.clone_from(&request.default);
    state.bundle.clone_from(&request.bundle_path);
    state.policy.clone_from(&request.policy_path);
    if let Some(view) = state.view(&state.default)
        && xen.stats()?.default != view
    {
        xen.binding(Binding::new(Action::Default).view(view))?;
    }
    journal.save(&state)?;
    Ok(Some(state))
}

/// Says what became of the cave, if that needs saying.
pub fn report_cave(cave: &CaveFate) {
    if *cave == CaveFate::OtherKernel {
        eprintln!(
            "installer: the guest runs another kernel than the one with the hook code; its memory was left alone"
        );
    }
    if let CaveFate::Left(why) = cave {
        eprintln!(
            "installer: the hook code stays in the guest's cave, where nothing jumps to it any more: {why}; it is harmless; `installer remove` looks again, and so does the next `apply`"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::resume;
    use crate::control::CliError;
    use crate::views::testkit::{self, assert_complete, assert_nothing, snapshot};
    use crate::views::{apply, remove};
    use crate::xen::ViewId;
    use crate::xen::faults::{Fault, Faulty};

    /// An apply that was killed at each of its calls in turn, and the apply that comes after it.
    #[test]
    fn the_next_apply_reconciles_whatever_a_killed_one_left() {
        let bundle = testkit::bundle();
        let request = testkit::request(&bundle);
        let (mut clean, mut taken_over) = (0, 0);
        for at in 1.. {
            let fake = testkit::guest(&bundle);
            let before = snapshot(&fake);
            let dir = tempfile::tempdir().unwrap();
            let faulty = Faulty::new(&fake, Fault::Dead(at));
            let first = apply(&faulty, &testkit::journal(&dir), &request);
            // Never on half a view, dead or alive.
            assert_complete(&fake, &bundle);
            let journal = testkit::journal(&dir);
            match resume(&fake, &journal, &request).unwrap() {
                Some(_) => taken_over += 1,
                None => {
                    clean += 1;
                    assert_nothing(&fake, &before, &format!("killed at call {at}"));
                    apply(&fake, &journal, &request).unwrap();
                }
            }
            assert!(fake.table.borrow().enabled);
            assert_complete(&fake, &bundle);
            if first.is_ok() {
                break;
            }
        }
        assert!(clean > 80, "{clean}");
        assert_eq!(taken_over, 1, "only the one that was not killed");
    }

    #[test]
    fn what_is_taken_over_has_no_binding_of_the_dead_and_the_default_asked_for() {
        let bundle = testkit::bundle();
        let fake = testkit::guest(&bundle);
        let dir = tempfile::tempdir().unwrap();
        let journal = testkit::journal(&dir);
        let mut request = testkit::request(&bundle);
        let state = apply(&fake, &journal, &request).unwrap().state;
        let fast = state.view("fast").unwrap();
        testkit::bind(&fake, testkit::root(2), fast);
        request.default = "stock".to_owned();
        let state = resume(&fake, &journal, &request).unwrap().unwrap();
        assert!(fake.table.borrow().bound.is_empty());
        assert_eq!(
            fake.load_cr3(testkit::root(2).0),
            state.view("stock").unwrap()
        );
        // Another bundle is not laid over it.
        request.manifest_sha256 = "another".to_owned();
        let error = resume(&fake, &journal, &request).unwrap_err();
        assert!(matches!(error, CliError::OtherBundle { .. }), "{error}");
    }

    #[test]
    fn views_of_a_kernel_that_no_longer_runs_are_taken_out_and_its_memory_left_alone() {
        let bundle = testkit::bundle();
        let fake = testkit::guest(&bundle);
        let dir = tempfile::tempdir().unwrap();
        let journal = testkit::journal(&dir);
        let request = testkit::request(&bundle);
        apply(&fake, &journal, &request).unwrap();
        testkit::kexec(&fake);
        let memory = testkit::text_of(&fake, ViewId::HOST);
        assert!(resume(&fake, &journal, &request).unwrap().is_none());
        assert!(!fake.on.get() && fake.views.borrow().is_empty());
        assert!(testkit::text_of(&fake, ViewId::HOST) == memory);
        assert!(journal.load().unwrap().is_none());
        assert!(!remove(&fake, &journal, None).unwrap().anything);
    }
}
