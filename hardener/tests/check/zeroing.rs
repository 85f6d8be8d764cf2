//! `zero-regs`: proved on a real kernel, and clearing what lives is caught.

use crate::scene::{Scene, branch, emitted, next, real, report, says, target, vmlinuz};
use hardener::check::{Rule, RuleReport};
use hardener::recipe::Recipe;
use iced_x86::{Mnemonic, Register};
use penumbra_bundle::{Bundle, LinkVa, SlotKind, TextOff};
use std::sync::OnceLock;

const RECIPE: &str = "schema = 1\n[pass.return-cfi]\non-violation = \"log\"\n[pass.zero-regs]\n";

fn clearing() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| emitted(RECIPE))
}

fn contracts(bundle: &Bundle) -> RuleReport {
    report(bundle, Rule::ThunkContract)
}

impl Scene {
    /// Sends the first return of a function through the thunk that clears; where it is.
    fn clear_in(&mut self, function: &str) -> LinkVa {
        let (at, thunk) = (self.symbol(function), self.named("return_cfi_zeroing"));
        let from = self.off(at);
        let edits = self.edits("hardened");
        let mut edits = edits.iter_mut().filter(|edit| edit.at >= from);
        let edit = edits.find(|edit| edit.slot == SlotKind::Return).unwrap();
        let at = LinkVa(at.0 + u64::from(edit.at.0 - from.0));
        assert_ne!(target(&edit.bytes, at.0), thunk, "{function}");
        edit.bytes = branch(&[0xe9], at, thunk);
        at
    }
}

#[test]
fn the_bundle_is_proved_and_a_third_of_the_returns_clear() {
    let bundle = clearing();
    let (checker, _) = real();
    let outcome = checker.check(bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
    let passes = &bundle.manifest.variants.last().unwrap().passes;
    let edited = |name| {
        let pass = passes.iter().find(|pass| pass.name == name);
        pass.expect("the variant has the pass").edited
    };
    assert!(edited("zero-regs") * 4 > edited("return-cfi"));
}

#[test]
fn the_bundle_with_each_functions_own_check_is_proved() {
    let bundle =
        emitted("schema = 1\n[pass.return-cfi]\npolicy = \"function\"\n[pass.zero-regs]\n");
    let (checker, _) = real();
    let outcome = checker.check(&bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
}

/// What another pass edits is checked as well, whatever the scope; assembly that jumps anywhere may read it all.
#[test]
fn with_returns_that_are_left_out_for_their_frames_it_is_proved_on_both_releases() {
    for (checker, vmlinuz) in [
        (&real().0, vmlinuz()),
        (&next().0, crate::common::cloud_backports().to_owned()),
    ] {
        for scope in ["frames", "changeable"] {
            let recipe = format!(
                "schema = 1\n[pass.return-cfi]\npolicy = \"function\"\nscope = \"{scope}\"\n\
                 [pass.zero-regs]\n[pass.stack-clear]\n"
            );
            let recipe = Recipe::parse("recipe", recipe.as_bytes()).unwrap();
            let bundle = hardener::emit::emit(&*vmlinuz, &recipe, &mut |_| {}).unwrap();
            let outcome = checker.check(&bundle, false).unwrap();
            assert!(outcome.clean, "{scope}: {}", outcome.render());
        }
    }
}

#[test]
fn without_being_named_the_pass_does_not_run() {
    let passes = real().1.manifest.variants.iter();
    let mut passes = passes.flat_map(|variant| &variant.passes);
    assert!(passes.all(|pass| pass.name != "zero-regs"));
}

#[test]
fn clearing_what_somebody_may_read_is_caught() {
    for (function, wanted) in [
        // A system call's table has its address.
        ("__x64_sys_getppid", "indirect calls may reach it"),
        // Its callers look at what GCC leaves undefined.
        ("ebitmap_get_bit", "which is read at"),
    ] {
        let mut scene = Scene::of(clearing());
        let at = scene.clear_in(function);
        let report = contracts(&scene.bundle);
        assert!(says(&report, Some(at), wanted), "{function}: {report:?}");
    }
}

#[test]
fn clearing_in_a_function_that_keeps_its_registers_is_caught() {
    let mut scene = Scene::of(clearing());
    let (saving, thunk) = (
        scene.named("return_cfi_saving"),
        scene.named("return_cfi_zeroing"),
    );
    let start = scene.bundle.manifest.text.start.0;
    let place = |at: TextOff| LinkVa(start + u64::from(at.0));
    let mut edits = scene.edits("hardened").iter_mut();
    let edit = edits
        .find(|edit| {
            edit.slot == SlotKind::Return && target(&edit.bytes, place(edit.at).0) == saving
        })
        .unwrap();
    let at = place(edit.at);
    edit.bytes = branch(&[0xe9], at, thunk);
    let report = contracts(&scene.bundle);
    assert!(says(&report, Some(at), "is not traced"), "{report:?}");
}

#[test]
fn a_thunk_that_forgets_a_register_is_caught() {
    let mut scene = Scene::of(clearing());
    let thunk = scene.named("return_cfi_zeroing");
    scene.patch(thunk, |instruction, bytes| {
        // `nop` for the first register that is cleared.
        let clears =
            instruction.mnemonic() == Mnemonic::Xor && instruction.op0_register() == Register::ECX;
        clears.then(|| vec![0x90; bytes.len()])
    });
    let report = contracts(&scene.bundle);
    assert!(
        says(&report, None, "is reached with rcx not cleared"),
        "{report:?}"
    );
}

#[test]
fn a_manifest_that_counts_other_returns_is_caught() {
    let mut scene = Scene::of(clearing());
    for variant in &mut scene.bundle.manifest.variants {
        for pass in &mut variant.passes {
            if pass.name == "zero-regs" {
                pass.edited += 1;
            }
        }
    }
    let report = contracts(&scene.bundle);
    assert!(says(&report, None, "clear registers"), "{report:?}");
}
