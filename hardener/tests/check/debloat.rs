//! `debloat` and `probe`: proved on a real kernel by a small profile, and every way to let a function outside be entered, or a
//! probed one unseen, is caught.

use crate::scene::{Scene, branch, real, report, says, target, vmlinuz};
use hardener::check::Rule;
use hardener::recipe::Recipe;
use iced_x86::{Instruction, Mnemonic, Register};
use penumbra_bundle::{Bundle, Edit, LinkVa, Offending, PassSummary, SlotKind, TextOff};
use std::fs;
use std::sync::OnceLock;

/// A system call, and what calls it.
const PROFILE: &str = "# small\ndo_syscall_64\n__x64_sys_getppid\nno_such_function\n";

fn by(parameters: &str) -> Bundle {
    emitted(
        PROFILE,
        &format!("[pass.debloat]\nprofile = \"list\"\n{parameters}"),
    )
}

/// A bundle by a recipe that names a file `list`.
fn emitted(list: &str, recipe: &str) -> Bundle {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("list"), list).unwrap();
    fs::write(folder.path().join("small"), PROFILE).unwrap();
    let recipe = format!("schema = 1\n{recipe}");
    let file = folder.path().join("recipe.toml");
    fs::write(&file, recipe).unwrap();
    let recipe = Recipe::open(&file).unwrap();
    hardener::emit::emit(&vmlinuz(), &recipe, &mut |_| {}).unwrap()
}

fn killing() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| by("targets = \"profile\"\n"))
}

fn logging() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| by("on-violation = \"log\"\nwiden = \"calls\"\n"))
}

fn pass(bundle: &Bundle) -> &PassSummary {
    let mut passes = bundle.manifest.variants[2].passes.iter();
    passes.find(|pass| pass.name == "debloat").unwrap()
}

/// A call or jump out of the profile.
fn leaves(edit: &Edit) -> bool {
    edit.slot == SlotKind::Call
}

/// What the first check that fails says.
fn broken(scene: &Scene, rule: Rule, at: Option<LinkVa>, wanted: &str) {
    let report = report(&scene.bundle, rule);
    assert!(says(&report, at, wanted), "{report:?}");
}

#[test]
fn bundles_are_proved_whatever_is_done_about_who_leaves_the_profile() {
    let (checker, plain) = real();
    for bundle in [killing(), logging(), &by("on-violation = \"panic\"\n")] {
        let outcome = checker.check(bundle, false).unwrap();
        assert!(outcome.clean, "{}", outcome.render());
        let pass = pass(bundle);
        assert!(pass.edited > 10_000, "{}", pass.edited);
        assert_eq!(pass.figures["functions-in-profile"], 2);
        assert_eq!(pass.figures["profile-lines-unknown"], 1);
        let outside = &bundle.watched.as_ref().unwrap().outside;
        assert_eq!(pass.figures["functions-outside"], outside.len() as u64);
        // What is not of this pass is as without it, but for the cave's addresses.
        let calls = |bundle: &Bundle| {
            bundle.edits[2]
                .0
                .iter()
                .filter(|edit| !leaves(edit))
                .count()
        };
        assert_eq!(calls(bundle), calls(plain));
    }
    // Without `targets` they are what they are without the pass.
    let entries = |bundle: &Bundle| {
        bundle
            .manifest
            .cave
            .tables
            .iter()
            .map(|table| table.count)
            .sum::<u64>()
    };
    assert_eq!(entries(logging()), entries(plain));
    assert!(entries(killing()) < entries(plain) - 10_000);
    let inside = |bundle| pass(bundle).figures["functions-inside"];
    assert!(inside(killing()) < inside(logging()));
}

#[test]
fn a_call_that_is_not_stopped_is_caught() {
    let mut scene = Scene::of(killing());
    let mut gone = None;
    scene.edits("hardened").retain(|edit| {
        let first = gone.is_none() && leaves(edit);
        if first {
            gone = Some(edit.at);
        }
        !first
    });
    let at = gone.map(|at| scene.va(at));
    broken(&scene, Rule::AllowedSlots, at, "past its thunk");
    broken(&scene, Rule::TrueToImage, None, "edits; the manifest says");
}

#[test]
fn a_function_that_is_claimed_and_still_called_is_caught() {
    let mut scene = Scene::of(killing());
    let inside = scene.off(scene.symbol("do_exit"));
    let outside = &mut scene.bundle.watched.as_mut().unwrap().outside;
    let index = outside
        .binary_search(&inside)
        .expect_err("do_exit is needed");
    outside.insert(index, inside);
    broken(
        &scene,
        Rule::AllowedSlots,
        None,
        "which is watched, past its thunk",
    );
}

#[test]
fn an_entry_outside_that_indirect_branches_may_reach_is_caught() {
    let mut scene = Scene::of(killing());
    let entry = scene.symbol("__x64_sys_getppid");
    let outside = &mut scene.bundle.watched.as_mut().unwrap().outside;
    let start = scene.bundle.manifest.text.start.0;
    let at = TextOff((entry.0 - start) as u32);
    outside.insert(outside.binary_search(&at).unwrap_err(), at);
    broken(&scene, Rule::ExactSets, Some(entry), "too many in entries");
}

#[test]
fn a_stopped_function_that_is_not_claimed_is_caught() {
    let mut scene = Scene::of(killing());
    let edits = scene.edits("hardened").clone();
    let edit = edits.iter().find(|edit| leaves(edit)).unwrap();
    let at = scene.va(edit.at);
    let text = scene.bundle.text.clone();
    let start = edit.at.0 as usize;
    let function = scene.off(target(&text[start..start + 5], at.0));
    let outside = &mut scene.bundle.watched.as_mut().unwrap().outside;
    outside.retain(|at| *at != function);
    broken(
        &scene,
        Rule::AllowedSlots,
        Some(at),
        "calls nothing that a variant keeps from being called",
    );
}

#[test]
fn a_claim_about_what_no_recorder_sees_is_caught() {
    let mut scene = Scene::of(killing());
    let entry = scene.symbol("entry_SYSCALL_64");
    let start = scene.bundle.manifest.text.start.0;
    let at = TextOff((entry.0 - start) as u32);
    let outside = &mut scene.bundle.watched.as_mut().unwrap().outside;
    outside.insert(outside.binary_search(&at).unwrap_err(), at);
    broken(
        &scene,
        Rule::ExactSets,
        Some(entry),
        "no function that the kernel can trace",
    );
}

#[test]
fn a_claim_without_its_pass_is_caught() {
    let mut scene = Scene::of(killing());
    let watched = scene.bundle.watched.as_mut().unwrap();
    watched.probed = watched.outside[..1].to_vec();
    broken(
        &scene,
        Rule::ExactSets,
        None,
        "for pass probe, which no variant has",
    );
    broken(&scene, Rule::ExactSets, None, "is watched by two passes");
}

#[test]
fn the_thunk_of_another_function_is_caught() {
    let mut scene = Scene::of(killing());
    let other = scene.thunk(leaves);
    let start = scene.bundle.manifest.text.start.0;
    let place = |edit: &Edit| LinkVa(start + u64::from(edit.at.0));
    let at = scene.change(
        "hardened",
        |edit| leaves(edit) && target(&edit.bytes, place(edit).0) != other,
        |edit| edit.bytes = branch(&edit.bytes[..1], place(edit), other),
    );
    broken(
        &scene,
        Rule::ThunkContract,
        Some(at),
        "does not stand for the function that was called",
    );
}

/// What all thunks share is changed in one instruction, and what is then said.
fn changed(bundle: &Bundle, with: impl Fn(&Instruction, &[u8]) -> Option<Vec<u8>>, wanted: &str) {
    let mut scene = Scene::of(bundle);
    let shared = scene.named("debloat");
    scene.patch(shared, with);
    broken(&scene, Rule::ThunkContract, None, wanted);
}

/// The bytes with one of them changed, if that is wanted.
fn flipped(wanted: bool, bytes: &[u8], index: usize) -> Option<Vec<u8>> {
    wanted.then(|| {
        let mut bytes = bytes.to_vec();
        bytes[index] ^= 0x10;
        bytes
    })
}

const FOR_WHOM: &str = "does not ask for whom the function is called";

#[test]
fn a_thunk_that_lets_other_contexts_through_is_caught() {
    let is = |mnemonic: Mnemonic| move |one: &Instruction| one.mnemonic() == mnemonic;
    let test = is(Mnemonic::Test);
    // The mask of the preemption count: SOFTIRQ_MASK, by which whoever disables softirqs counts as one.
    changed(
        killing(),
        |one, bytes| flipped(test(one), bytes, 9),
        FOR_WHOM,
    );
    // Another per-CPU variable.
    changed(
        killing(),
        |one, bytes| flipped(test(one), bytes, 4),
        FOR_WHOM,
    );
    let task = is(Mnemonic::Mov);
    changed(
        killing(),
        |one, bytes| flipped(task(one), bytes, 5),
        FOR_WHOM,
    );
    // Another flag of the task: 0x30.
    changed(
        killing(),
        |one, bytes| {
            let flag = test(one) && one.memory_base() == Register::R10;
            flipped(flag, bytes, bytes.len() - 1)
        },
        FOR_WHOM,
    );
    // All but interrupts.
    changed(
        killing(),
        |one, bytes| {
            let branch = one.mnemonic() == Mnemonic::Jne;
            branch.then(|| [&[bytes[0] ^ 1], &bytes[1..]].concat())
        },
        FOR_WHOM,
    );
}

#[test]
fn a_thunk_that_goes_on_though_it_says_that_it_does_not_is_caught() {
    changed(
        killing(),
        |one, _| (one.mnemonic() == Mnemonic::Ud2).then(|| vec![0x66, 0x90]),
        "reports that it does not go on, and goes on",
    );
}

#[test]
fn a_thunk_that_does_not_report_is_caught() {
    for bundle in [killing(), logging()] {
        changed(
            bundle,
            |one, _| (one.mnemonic() == Mnemonic::Out).then(|| vec![0x66, 0x90]),
            "which does not report",
        );
    }
}

#[test]
fn a_thunk_that_goes_on_elsewhere_is_caught() {
    changed(
        logging(),
        |one, bytes| flipped(one.mnemonic() == Mnemonic::Jmp, bytes, 1),
        "does not go on into the function",
    );
}

#[test]
fn a_trap_that_says_another_register_is_caught() {
    let mut scene = Scene::of(killing());
    scene.trap("debloat").offending = Offending::Register(10);
    broken(
        &scene,
        Rule::ThunkContract,
        None,
        "the manifest's trap is about",
    );
}

/// Three that are called, one that cannot be traced, one that is not there.
const PROBED: &str = "vfs_read\nvfs_write\n__x64_sys_openat\nentry_SYSCALL_64\nno_such_function\n";

fn probing() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| emitted(PROBED, "[pass.probe]\nfunctions = \"list\"\n"))
}

#[test]
fn probes_are_proved() {
    let (checker, _) = real();
    let bundle = probing();
    let outcome = checker.check(bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
    let mut passes = bundle.manifest.variants[2].passes.iter();
    let pass = passes.find(|pass| pass.name == "probe").unwrap();
    assert!(pass.edited > 3);
    for (figure, value) in [
        ("functions", 3),
        ("functions-not-traceable", 1),
        ("functions-outside-the-profile", 0),
        ("list-lines-unknown", 1),
    ] {
        assert_eq!(pass.figures[figure], value, "{figure}");
    }
}

#[test]
fn what_is_outside_the_profile_is_not_probed_too() {
    let (checker, _) = real();
    let bundle = emitted(
        PROBED,
        "[pass.debloat]\nprofile = \"small\"\n[pass.probe]\nfunctions = \"list\"\n",
    );
    let outcome = checker.check(&bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
    let mut passes = bundle.manifest.variants[2].passes.iter();
    let pass = passes.find(|pass| pass.name == "probe").unwrap();
    let outside = pass.figures["functions-outside-the-profile"];
    assert!(outside > 0);
    assert_eq!(bundle.watched.unwrap().probed.len() as u64, 3 - outside);
}

#[test]
fn a_probe_that_ends_the_task_is_caught() {
    let mut scene = Scene::of(probing());
    let shared = scene.named("probe");
    // `out %al,$0xe5; ud2` where five bytes go on.
    scene.patch(shared, |one, _| {
        (one.mnemonic() == Mnemonic::Out).then(|| vec![0xe6, 0xe5])
    });
    scene.patch(shared, |one, _| {
        (one.mnemonic() == Mnemonic::Jmp).then(|| vec![0x0f, 0x0b, 0xcc, 0xcc, 0xcc])
    });
    broken(
        &scene,
        Rule::ThunkContract,
        None,
        "reports that it does not go on, and goes on",
    );
}

#[test]
fn a_probe_that_is_missed_is_caught() {
    let mut scene = Scene::of(probing());
    let function = scene.symbol("vfs_read");
    let text = scene.bundle.text.clone();
    let start = scene.bundle.manifest.text.start.0;
    let calls = |edit: &Edit| {
        let from = edit.at.0 as usize;
        target(&text[from..from + 5], start + from as u64) == function
    };
    scene.edits("hardened").retain(|edit| !calls(edit));
    broken(
        &scene,
        Rule::AllowedSlots,
        None,
        "which is watched, past its thunk",
    );
}
