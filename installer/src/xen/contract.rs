//! What the installer leans on in Xen, as questions that both the fake and the real one must answer alike.
//!
//! `cargo test` asks the fake; with the feature `lab`, `installer contract DOM` asks Xen about a running guest, which loses
//! nothing by it. Each check begins and ends with altp2m off.

use super::binding::{MAX_PROTECTS, MAX_WITNESSES};
use super::{
    Action, Binding, Errno, Gfn, GuestPa, Hypervisor, Root, Shown, ViewId, Witness, XenError,
};
use std::fmt::Debug;

/// A root that no address space has: the frame of the guest's own first page.
const POKING: Root = Root(0x1000);
/// Where text pokes would be written.
const POKING_ADDRESS: u64 = 0x5555_0000_0000;
/// Roots to bind.
const ROOT: Root = Root(0x4000);
const OTHER: Root = Root(0x6000);

/// A check: its name and how it is made.
pub struct Check {
    /// What Xen must do.
    pub name: &'static str,
    make: fn(&Subject<'_>) -> Verdict,
}

type Verdict = Result<(), String>;

/// A domain with altp2m on and armed (`Check`s that want something else undo that).
struct Subject<'a> {
    xen: &'a dyn Hypervisor,
    /// Two frames above all that the guest has; behind them is room for two more.
    spare: Gfn,
}

/// Makes every check; the name of each with what went wrong.
pub fn run(xen: &dyn Hypervisor) -> Result<Vec<(&'static str, Verdict)>, XenError> {
    let domain = xen.domain()?;
    let spare = Gfn(xen.highest_gfn()?.0 + 16);
    let mut verdicts = Vec::new();
    for check in CHECKS {
        xen.altp2m_set(true)?;
        xen.set_max_pages(domain.max_pages.max(domain.pages + 4))?;
        xen.populate(spare, 2)?;
        let subject = Subject { xen, spare };
        let verdict = subject
            .arm(POKING)
            .map_err(|error| format!("ARM: {error}"))
            .and_then(|()| (check.make)(&subject));
        verdicts.push((check.name, verdict));
        // Frames that a view had are not taken away while views are in use: Xen would stop the domain.
        xen.altp2m_set(false)?;
        xen.depopulate(spare, 4)?;
        xen.set_max_pages(domain.max_pages)?;
    }
    Ok(verdicts)
}

/// Every check.
pub const CHECKS: &[Check] = &[
    Check {
        name: "nothing is done for a domain that is not armed",
        make: not_armed,
    },
    Check {
        name: "arming again is the same or refused",
        make: arms_once,
    },
    Check {
        name: "enabling compares the generation",
        make: generation,
    },
    Check {
        name: "a view in use cannot be destroyed",
        make: views_in_use,
    },
    Check {
        name: "bindings are listed, changed and cleared",
        make: bindings,
    },
    Check {
        name: "bindings that make no sense are refused",
        make: refused_bindings,
    },
    Check {
        name: "a binding is made only if its witnesses hold",
        make: witnesses,
    },
    Check {
        name: "entries are remapped, in order, up to the first that cannot be",
        make: remaps,
    },
    Check {
        name: "entries are protected in views, not in the host's",
        make: protects,
    },
    Check {
        name: "one range is hidden",
        make: hides,
    },
    Check {
        name: "nothing happened, nothing is told",
        make: no_events,
    },
    Check {
        name: "disabling drops all but the views",
        make: disables,
    },
];

impl Subject<'_> {
    fn arm(&self, root: Root) -> Result<(), XenError> {
        let request = Binding::new(Action::Arm).root(root);
        self.xen.binding(request.value(POKING_ADDRESS)).map(drop)
    }

    fn act(&self, request: Binding) -> Result<(), XenError> {
        self.xen.binding(request).map(drop)
    }

    fn view(&self) -> Result<ViewId, String> {
        self.xen.create_view().map_err(|error| error.to_string())
    }

    fn bound(&self) -> Result<Vec<(Root, ViewId)>, String> {
        let found = self.xen.bindings().map_err(|error| error.to_string())?;
        let mut found: Vec<(Root, ViewId)> = found
            .into_iter()
            .map(|bound| (bound.root, bound.view))
            .collect();
        found.sort_unstable();
        Ok(found)
    }

    fn enable(&self, view: ViewId) -> Result<(), XenError> {
        let generation = self.xen.stats()?.generation;
        self.act(Binding::new(Action::Enable).view(view).value(generation))
    }
}

/// It must succeed.
fn works(what: &str, result: Result<(), XenError>) -> Verdict {
    result.map_err(|error| format!("{what}: {error}"))
}

/// It must fail so.
fn fails<T: Debug>(what: &str, errno: Errno, result: Result<T, XenError>) -> Verdict {
    match result {
        Err(error) if error.is(errno) => Ok(()),
        Err(error) => Err(format!("{what}: expected \"{errno}\", got: {error}")),
        Ok(value) => Err(format!("{what}: expected \"{errno}\", it did: {value:?}")),
    }
}

fn is<T: PartialEq + Debug>(what: &str, found: T, expected: T) -> Verdict {
    if found == expected {
        Ok(())
    } else {
        Err(format!("{what}: {found:?}, expected {expected:?}"))
    }
}

fn not_armed(it: &Subject<'_>) -> Verdict {
    let view = it.view()?;
    works("DISABLE", it.act(Binding::new(Action::Disable)))?;
    for request in [
        Binding::new(Action::Enable).view(view),
        Binding::new(Action::Set).root(ROOT).view(view),
        Binding::new(Action::Clear).root(ROOT),
        Binding::new(Action::Get),
        Binding::new(Action::Default).view(view),
        Binding::new(Action::Flags).view(view),
        Binding::new(Action::Sample),
        Binding::new(Action::Protect).view(view).more([1, 0]),
        Binding::new(Action::Hide).value(it.spare.0).more([1, 0]),
    ] {
        fails(
            &format!("{:?}", request.action),
            Errno::NODEV,
            it.act(request),
        )?;
    }
    let page = [(Gfn(4), Some(it.spare))];
    fails("REMAP", Errno::NODEV, it.xen.remap_all(view, &page, true))?;
    fails("EVENTS", Errno::NODEV, it.xen.events())?;
    let stats = it.xen.stats().map_err(|error| error.to_string())?;
    is(
        "armed, enabled",
        (stats.armed, stats.enabled),
        (false, false),
    )
}

fn arms_once(it: &Subject<'_>) -> Verdict {
    works("the same again", it.arm(POKING))?;
    fails("another root", Errno::BUSY, it.arm(Root(0x2000)))?;
    let stats = it.xen.stats().map_err(|error| error.to_string())?;
    is(
        "armed, enabled",
        (stats.armed, stats.enabled),
        (true, false),
    )
}

fn generation(it: &Subject<'_>) -> Verdict {
    let view = it.view()?;
    let stats = it.xen.stats().map_err(|error| error.to_string())?;
    let enable = Binding::new(Action::Enable).view(view);
    let wrong = enable.value(stats.generation + 7);
    fails("another generation", Errno::AGAIN, it.act(wrong))?;
    let none = Binding::new(Action::Enable).view(ViewId(view.0 + 1));
    let none = none.value(stats.generation);
    fails("a view that is not there", Errno::INVAL, it.act(none))?;
    let default = Binding::new(Action::Default).view(view);
    fails("DEFAULT before", Errno::NODEV, it.act(default))?;
    works("ENABLE", it.enable(view))?;
    let stats = it.xen.stats().map_err(|error| error.to_string())?;
    is(
        "enabled, default",
        (stats.enabled, stats.default),
        (true, view),
    )
}

fn views_in_use(it: &Subject<'_>) -> Verdict {
    let (default, bound, free) = (it.view()?, it.view()?, it.view()?);
    let different = default != bound && bound != free && default != ViewId::HOST;
    is("different views, none of them the host's", different, true)?;
    works("ENABLE", it.enable(default))?;
    works("SET", it.xen.set_binding(ROOT, bound, false, &[]))?;
    fails("the default", Errno::BUSY, it.xen.destroy_view(default))?;
    fails("a bound one", Errno::BUSY, it.xen.destroy_view(bound))?;
    works("a free one", it.xen.destroy_view(free))?;
    fails("that again", Errno::BUSY, it.xen.destroy_view(free))?;
    works("CLEAR", it.act(Binding::new(Action::Clear).root(ROOT)))?;
    works("one unbound", it.xen.destroy_view(bound))
}

fn bindings(it: &Subject<'_>) -> Verdict {
    let (one, two) = (it.view()?, it.view()?);
    works("SET", it.xen.set_binding(ROOT, one, false, &[]))?;
    works(
        "SET with its pair",
        it.xen.set_binding(OTHER, two, true, &[]),
    )?;
    is("bound", it.bound()?, vec![(ROOT, one), (OTHER, two)])?;
    let listed = it.xen.bindings().map_err(|error| error.to_string())?;
    let pairs: Vec<Root> = listed
        .iter()
        .filter(|bound| bound.pair)
        .map(|bound| bound.root)
        .collect();
    is("with its pair", pairs, vec![OTHER])?;
    works("SET again", it.xen.set_binding(ROOT, two, false, &[]))?;
    is("bound", it.bound()?, vec![(ROOT, two), (OTHER, two)])?;
    let clear = Binding::new(Action::Clear).root(ROOT);
    works("CLEAR", it.act(clear))?;
    fails("CLEAR again", Errno::NOENT, it.act(clear))?;
    is("bound", it.bound()?, vec![(OTHER, two)])
}

fn refused_bindings(it: &Subject<'_>) -> Verdict {
    let view = it.view()?;
    let set = |root, view, pair| it.xen.set_binding(root, view, pair, &[]);
    fails("low bits", Errno::INVAL, set(Root(0x4005), view, false))?;
    fails("no root", Errno::INVAL, set(Root(0), view, false))?;
    fails("poking_mm's", Errno::INVAL, set(POKING, view, false))?;
    fails(
        "a pair's upper half",
        Errno::INVAL,
        set(Root(0x5000), view, true),
    )?;
    let none = ViewId(view.0 + 1);
    fails("no such view", Errno::INVAL, set(ROOT, none, false))?;
    is("bound", it.bound()?, Vec::new())
}

fn witnesses(it: &Subject<'_>) -> Verdict {
    let view = it.view()?;
    let witness = |gpa, mask, value| Witness {
        gpa: GuestPa(gpa),
        mask,
        value,
    };
    // One bit of a page that a booted guest leaves alone.
    let mut byte = [0];
    let read = it.xen.read(Gfn(4), 8, &mut byte);
    works("reading the guest", read)?;
    let bit = u64::from(byte[0] & 1);
    let (holds, fails_now) = (witness(0x4008, 1, bit), witness(0x4008, 1, bit ^ 1));
    let set = |witnesses: &[Witness]| it.xen.set_binding(ROOT, view, false, witnesses);
    let most = vec![holds; MAX_WITNESSES];
    works("as many as there may be", set(&most))?;
    let listed = it.xen.bindings().map_err(|error| error.to_string())?;
    let count = listed.first().map(|bound| bound.witnesses);
    is("witnesses", count, Some(MAX_WITNESSES as u64))?;
    works("CLEAR", it.act(Binding::new(Action::Clear).root(ROOT)))?;
    fails(
        "one more",
        Errno::INVAL,
        set(&vec![holds; MAX_WITNESSES + 1]),
    )?;
    for (what, wrong) in [
        ("not aligned", witness(0x4004, 1, bit)),
        ("no bit", witness(0x4008, 0, 0)),
        ("a bit that does not count", witness(0x4008, 2, 1)),
    ] {
        fails(what, Errno::INVAL, set(&[wrong]))?;
    }
    let gone = witness(it.spare.base().0 + 0x2000, 1, 0);
    fails("a page that is not there", Errno::STALE, set(&[gone]))?;
    let last = [vec![holds; MAX_WITNESSES - 1], vec![fails_now]].concat();
    fails("one that does not hold", Errno::STALE, set(&last))?;
    is("bound", it.bound()?, Vec::new())
}

fn remaps(it: &Subject<'_>) -> Verdict {
    let view = it.view()?;
    let (first, second) = (it.spare, Gfn(it.spare.0 + 1));
    let pages = [(Gfn(4), Some(first)), (Gfn(5), Some(second))];
    works("two", it.xen.remap_all(view, &pages, true))?;
    works("the same again", it.xen.remap_all(view, &pages, false))?;
    works(
        "back to the host's",
        it.xen.remap_all(view, &[(Gfn(4), None)], true),
    )?;
    let shown = |gfn| it.xen.shown(view, gfn).map_err(|error| error.to_string());
    let expected = |frame, read_only| {
        Some(Shown {
            frame,
            read_only,
            hidden: false,
        })
    };
    is("the first", shown(Gfn(4))?, expected(Gfn(4), true))?;
    is("the second", shown(Gfn(5))?, expected(second, false))?;
    let missing = [(Gfn(4), Some(first)), (Gfn(5), Some(Gfn(it.spare.0 + 2)))];
    let result = it.xen.remap_all(view, &missing, true);
    fails("to a frame that is not there", Errno::SRCH, result)?;
    is("the one before it", shown(Gfn(4))?, expected(first, true))?;
    let none = ViewId(view.0 + 1);
    fails(
        "no such view",
        Errno::INVAL,
        it.xen.remap_all(none, &pages, true),
    )?;
    let host = it.xen.remap_all(ViewId::HOST, &pages, true);
    fails("the host's view", Errno::INVAL, host)
}

fn protects(it: &Subject<'_>) -> Verdict {
    let view = it.view()?;
    let protect = |view, count| {
        let request = Binding::new(Action::Protect).view(view);
        it.act(request.value(4).more([count, 0]))
    };
    works("two", protect(view, 2))?;
    works("again", protect(view, 2))?;
    let shown = it.xen.shown(view, Gfn(5));
    let shown = shown.map_err(|error| error.to_string())?;
    let read_only = shown.map(|shown| (shown.frame, shown.read_only));
    is("the second", read_only, Some((Gfn(5), true)))?;
    fails("none", Errno::INVAL, protect(view, 0))?;
    let missing = Binding::new(Action::Protect).view(view);
    let missing = missing.value(it.spare.0 + 2).more([1, 0]);
    fails("what is not there", Errno::SRCH, it.act(missing))?;
    fails("too many", Errno::INVAL, protect(view, MAX_PROTECTS + 1))?;
    fails("the host's view", Errno::INVAL, protect(ViewId::HOST, 1))
}

fn hides(it: &Subject<'_>) -> Verdict {
    let view = it.view()?;
    // Nothing is there yet, as it should be when frames are hidden.
    let first = Gfn(it.spare.0 + 2);
    works("two frames", it.xen.hide(first, 2))?;
    fails("others", Errno::BUSY, it.xen.hide(first, 1))?;
    works("a page there", it.xen.populate(first, 1))?;
    hidden(it, view, first)?;
    works("none", it.xen.hide(Gfn(0), 0))?;
    works("others after that", it.xen.hide(first, 1))
}

fn hidden(it: &Subject<'_>, view: ViewId, first: Gfn) -> Verdict {
    for view in [ViewId::HOST, view] {
        let shown = it.xen.shown(view, first);
        let shown = shown.map_err(|error| error.to_string())?;
        let hidden = shown.map(|shown| shown.hidden);
        is(&format!("view {view}"), hidden, Some(true))?;
    }
    works(
        "as a copy",
        it.xen.remap_all(view, &[(Gfn(4), Some(first))], true),
    )?;
    works("written by the toolstack", it.xen.write(first, 8, &[0x5a]))?;
    let mut byte = [0];
    works("read by it", it.xen.read(first, 8, &mut byte))?;
    is("what was written", byte[0], 0x5a)?;
    it.xen.refresh();
    works("no copy", it.xen.remap_all(view, &[(Gfn(4), None)], false))
}

fn no_events(it: &Subject<'_>) -> Verdict {
    works("SAMPLE", it.xen.sample(0x1_0000, 0x500, 0x600))?;
    let events = it.xen.events().map_err(|error| error.to_string())?;
    let counters = [
        events.lost,
        events.lapsed,
        events.refused,
        events.violations,
    ];
    is("records", events.records.len(), 0)?;
    is("counters", counters, [0; 4])
}

fn disables(it: &Subject<'_>) -> Verdict {
    let view = it.view()?;
    works("ENABLE", it.enable(view))?;
    works("SET", it.xen.set_binding(ROOT, view, false, &[]))?;
    works("HIDE", it.xen.hide(it.spare, 2))?;
    works("DISABLE", it.act(Binding::new(Action::Disable)))?;
    works("DISABLE again", it.act(Binding::new(Action::Disable)))?;
    works("the view is there", it.xen.destroy_view(view))?;
    works("ARM with other values", it.arm(Root(0x2000)))?;
    is("bound", it.bound()?, Vec::new())?;
    works("HIDE others", it.xen.hide(it.spare, 1))
}

#[cfg(test)]
mod tests {
    use crate::xen::fake::Fake;

    #[test]
    fn the_fake_is_as_xen() {
        let fake = Fake::with_ram(64);
        let before = fake.domain.borrow().clone();
        for (name, verdict) in super::run(&fake).unwrap() {
            assert_eq!(verdict, Ok(()), "{name}");
        }
        assert_eq!(*fake.domain.borrow(), before);
        assert!(!fake.on.get());
    }

    #[test]
    fn another_answer_is_noticed() {
        // A Xen that forgets to look at the generation.
        let fake = Fake::with_ram(64);
        *fake.hook.borrow_mut() = Some(Box::new(|fake, call| {
            if call.starts_with("Enable") {
                fake.table.borrow_mut().generation = 7;
            }
        }));
        let verdicts = super::run(&fake).unwrap();
        let wrong = |verdict: &&(&str, Result<(), String>)| verdict.1.is_err();
        let (name, verdict) = verdicts.iter().find(wrong).unwrap();
        assert_eq!(*name, "enabling compares the generation");
        assert!(
            verdict
                .as_ref()
                .unwrap_err()
                .starts_with("another generation")
        );
    }
}
