//! `stack-depth`: proved on real kernels whatever is asked for, and every way to enter a large frame unasked is caught.

use crate::scene::{Scene, emitted, next, real, report, says, target};
use hardener::check::Rule;
use hardener::recipe::Recipe;
use iced_x86::{Instruction, Mnemonic, Register};
use penumbra_bundle::{Bundle, Edit, LinkVa, PassSummary, SlotKind, TextOff};
use std::sync::OnceLock;

fn made() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| emitted("schema = 1\n[pass.stack-depth]\n"))
}

fn pass(bundle: &Bundle) -> &PassSummary {
    let mut passes = bundle.manifest.variants[2].passes.iter();
    passes.find(|pass| pass.name == "stack-depth").unwrap()
}

fn asks(edit: &Edit) -> bool {
    edit.slot == SlotKind::Call
}

fn broken(scene: &Scene, rule: Rule, at: Option<LinkVa>, wanted: &str) {
    let report = report(&scene.bundle, rule);
    assert!(says(&report, at, wanted), "{report:?}");
}

/// Says that the function that starts at `at` has a large frame, or no longer.
fn claim(scene: &mut Scene, at: TextOff) {
    let large = &mut scene.bundle.watched.as_mut().unwrap().large;
    match large.binary_search(&at) {
        Ok(index) => _ = large.remove(index),
        Err(index) => large.insert(index, at),
    }
}

#[test]
fn bundles_are_proved_whatever_is_asked_for() {
    let (checker, _) = real();
    let wide = emitted(
        "schema = 1\n[pass.stack-depth]\nframe = \"512\"\nleft = \"6144\"\non-violation = \"log\"\n",
    );
    let panics = emitted("schema = 1\n[pass.stack-depth]\non-violation = \"panic\"\n");
    for bundle in [made(), &wide, &panics] {
        let outcome = checker.check(bundle, false).unwrap();
        assert!(outcome.clean, "{}", outcome.render());
        let (pass, large) = (pass(bundle), &bundle.watched.as_ref().unwrap().large);
        assert_eq!(pass.figures["functions"], large.len() as u64);
        assert!(pass.edited > large.len() as u64 / 2, "{}", pass.edited);
    }
    let functions = |bundle| pass(bundle).figures["functions"];
    assert!(functions(&wide) > 20 && functions(made()) > 3 * functions(&wide));
}

#[test]
fn the_next_release_is_proved() {
    let recipe = Recipe::parse("recipe", b"schema = 1\n[pass.stack-depth]\n").unwrap();
    let vmlinuz = crate::common::cloud_backports();
    let bundle = hardener::emit::emit(vmlinuz, &recipe, &mut |_| {}).unwrap();
    let outcome = next().0.check(&bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
    assert!(pass(&bundle).edited > 100);
}

#[test]
fn other_passes_keep_the_functions_that_they_watch() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("recipe");
    let recipe = "schema = 1\n[pass.probe]\nfunctions = \"list\"\n[pass.stack-depth]\n";
    std::fs::write(&file, recipe).unwrap();
    let scene = Scene::of(made());
    let large = made().watched.as_ref().unwrap().large.clone();
    let mut symbols = scene.bundle.symbols.0.iter();
    let one = symbols.find(|symbol| symbol.at == large[0]).unwrap();
    std::fs::write(folder.path().join("list"), format!("{}\n", one.name)).unwrap();
    let recipe = Recipe::open(&file).unwrap();
    let bundle = hardener::emit::emit(&crate::scene::vmlinuz(), &recipe, &mut |_| {}).unwrap();
    let outcome = real().0.check(&bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
    let watched = bundle.watched.as_ref().unwrap();
    assert_eq!(watched.probed, large[..1]);
    assert_eq!(watched.large, large[1..]);
    assert_eq!(pass(&bundle).figures["functions-of-another-pass"], 1);
}

#[test]
fn a_call_that_is_not_asked_about_is_caught() {
    let mut scene = Scene::of(made());
    let index = scene.edits("hardened").iter().position(asks).unwrap();
    let gone = scene.edits("hardened").remove(index);
    let at = scene.va(gone.at);
    broken(&scene, Rule::AllowedSlots, Some(at), "past its thunk");
}

#[test]
fn a_large_frame_that_nobody_watches_is_caught() {
    let mut scene = Scene::of(made());
    let one = scene.bundle.watched.as_ref().unwrap().large[7];
    claim(&mut scene, one);
    let (text, start) = (
        scene.bundle.text.clone(),
        scene.bundle.manifest.text.start.0,
    );
    let function = scene.va(one);
    let enters = |edit: &Edit| {
        let from = edit.at.0 as usize;
        asks(edit) && target(&text[from..from + 5], start + from as u64) == function
    };
    scene.edits("hardened").retain(|edit| !enters(edit));
    let wanted = "has a large frame, and no pass watches it";
    broken(&scene, Rule::ExactSets, Some(function), wanted);
}

#[test]
fn a_small_frame_that_is_claimed_is_caught() {
    let mut scene = Scene::of(made());
    let small = scene.symbol("__x64_sys_getppid");
    let at = scene.off(small);
    claim(&mut scene, at);
    let wanted = "is said to have a large frame, and has none";
    broken(&scene, Rule::ExactSets, Some(small), wanted);
}

#[test]
fn a_function_of_two_passes_is_caught() {
    let mut scene = Scene::of(made());
    let watched = scene.bundle.watched.as_mut().unwrap();
    watched.probed = watched.large[..1].to_vec();
    broken(&scene, Rule::ExactSets, None, "watched by two passes");
}

#[test]
fn limits_that_the_thunks_do_not_have_are_caught() {
    let said = |key: &str, value: &str| {
        let mut scene = Scene::of(made());
        let set = |pass: &mut PassSummary| pass.parameters.insert(key.to_owned(), value.to_owned());
        scene.pass("hardened", "stack-depth", set);
        scene
    };
    let scene = said("left", "3072");
    let wanted = "does not say how much stack the function needs";
    broken(&scene, Rule::ThunkContract, None, wanted);
    let wanted = "is said to have a large frame, and has none";
    broken(&said("frame", "512"), Rule::ExactSets, None, wanted);
    for (key, value) in [("left", "all"), ("left", "16384"), ("frame", "0")] {
        let wanted = "does not say what it asks for";
        broken(&said(key, value), Rule::ThunkContract, None, wanted);
    }
}

#[test]
fn a_stub_that_says_less_is_caught() {
    let mut scene = Scene::of(made());
    let stub = scene.thunk(asks);
    scene.patch(stub, |one, bytes| {
        let says = one.mnemonic() == Mnemonic::Mov && one.op0_register() == Register::R10D;
        says.then(|| [&bytes[..2], &256u32.to_le_bytes()].concat())
    });
    let wanted = "does not say how much stack the function needs";
    broken(&scene, Rule::ThunkContract, None, wanted);
}

/// What all thunks share is changed in one instruction, and what is then said.
fn changed(which: impl Fn(&Instruction) -> bool, byte: usize, bits: u8, wanted: &str) {
    let mut scene = Scene::of(made());
    let shared = scene.named("stack_depth");
    scene.patch(shared, |one, bytes| {
        which(one).then(|| {
            let mut bytes = bytes.to_vec();
            bytes[byte] ^= bits;
            bytes
        })
    });
    broken(&scene, Rule::ThunkContract, None, wanted);
}

#[test]
fn a_thunk_that_asks_for_something_else_is_caught() {
    let is = |mnemonic: Mnemonic| move |one: &Instruction| one.mnemonic() == mnemonic;
    let constant = |one: &Instruction| is(Mnemonic::Sub)(one) && one.try_immediate(1).is_ok();
    let otherwise = "does not ask for whom the function is called";
    // What RSP is taken from; another per-CPU variable; a stack of another size; the other way round.
    changed(is(Mnemonic::Sub), 2, 0x08, otherwise);
    changed(is(Mnemonic::Add), 5, 0x08, otherwise);
    changed(constant, 4, 0x40, otherwise);
    changed(is(Mnemonic::Jae), 0, 0x01, otherwise);
    // Too narrow a window.
    let window = "does not ask for stack as the pass says";
    changed(is(Mnemonic::Cmp), 4, 0x10, window);
    let elsewhere = "goes elsewhere where there is stack enough";
    changed(is(Mnemonic::Jae), 1, 0x01, elsewhere);
}
