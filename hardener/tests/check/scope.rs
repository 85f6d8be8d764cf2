//! `scope = "frames"` of `return-cfi`: returns of frames that can be overrun stay checked, and the others are none of these.

use crate::scene::{Scene, emitted, real, report, says};
use hardener::check::{Rule, RuleReport};
use penumbra_bundle::Bundle;
use std::sync::OnceLock;

const UNCHECKED: &str = "is a return that is not checked, and nothing forbids to";

fn by_frame() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| emitted("schema = 1\n[pass.return-cfi]\nscope = \"frames\"\n"))
}

fn allowed(bundle: &Bundle) -> RuleReport {
    report(bundle, Rule::AllowedSlots)
}

#[test]
fn the_bundle_is_proved_and_most_frames_cannot_be_overrun() {
    let bundle = by_frame();
    let (checker, _) = real();
    let outcome = checker.check(bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
    let mut passes = bundle.manifest.variants.last().unwrap().passes.iter();
    let pass = passes.find(|pass| pass.name == "return-cfi").unwrap();
    let left = pass.left["frame-not-exposed"];
    assert!(pass.edited > 5000 && left > pass.edited, "{pass:?}");
}

#[test]
fn a_frame_that_can_be_overrun_and_is_not_checked_is_caught() {
    // Arrays on the stack, and structures whose address is handed on.
    for function in ["vsnprintf", "do_sys_poll", "vfs_statx"] {
        let mut scene = Scene::of(by_frame());
        let at = scene.leave_return(function);
        let report = allowed(&scene.bundle);
        assert!(says(&report, Some(at), UNCHECKED), "{function}: {report:?}");
    }
}

#[test]
fn a_manifest_that_claims_all_returns_is_caught() {
    let mut scene = Scene::of(by_frame());
    for variant in &mut scene.bundle.manifest.variants {
        for pass in &mut variant.passes {
            if let Some(scope) = pass.parameters.get_mut("scope") {
                *scope = "all".to_owned();
            }
        }
    }
    let report = allowed(&scene.bundle);
    assert!(says(&report, None, UNCHECKED), "{report:?}");
}
