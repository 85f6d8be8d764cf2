//! `scope = "changeable"` of `return-cfi`: returns whose address something can have changed stay checked.

use crate::scene::{Scene, emitted, real, report, says, vmlinuz};
use hardener::check::{Checker, Rule};
use hardener::image::unpacked;
use penumbra_bundle::{Bundle, LinkVa, SlotKind};
use std::sync::OnceLock;

const UNCHECKED: &str = "is a return that is not checked, and nothing forbids to";
/// Reads a page's flags, and is called directly.
const KEPT: &str = "_compound_head";

fn changeable() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| emitted("schema = 1\n[pass.return-cfi]\nscope = \"changeable\"\n"))
}

/// Whether the first return behind the start of a function is edited in `hardened`.
fn is_edited(scene: &mut Scene, function: &str) -> bool {
    let (from, end) = function_of(scene, function);
    let (from, end) = (scene.off(from), scene.off(end));
    let mut edits = scene.edits("hardened").iter();
    edits.any(|edit| edit.slot == SlotKind::Return && (from..end).contains(&edit.at))
}

fn function_of(scene: &Scene, name: &str) -> (LinkVa, LinkVa) {
    let start = scene.symbol(name);
    let mut symbols = scene.bundle.symbols.0.iter().map(|one| scene.va(one.at));
    (start, symbols.find(|at| *at > start).unwrap())
}

#[test]
fn the_bundle_is_proved_and_some_returns_need_no_check() {
    let bundle = changeable();
    let (checker, _) = real();
    let outcome = checker.check(bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
    let mut passes = bundle.manifest.variants.last().unwrap().passes.iter();
    let pass = passes.find(|pass| pass.name == "return-cfi").unwrap();
    let left = pass.left["cannot-have-changed"];
    assert!(left > 500 && pass.edited > 40_000, "{pass:?}");
    let mut scene = Scene::of(bundle);
    assert!(!is_edited(&mut scene, KEPT));
    // These write through a pointer, call, have their address taken.
    for function in ["__rcu_read_unlock", "vfs_read", "__list_add_valid"] {
        assert!(is_edited(&mut scene, function), "{function}");
    }
}

#[test]
fn a_return_that_may_go_elsewhere_and_is_not_checked_is_caught() {
    for function in ["vfs_read", "__list_add_valid", "__rcu_read_unlock"] {
        let mut scene = Scene::of(changeable());
        let at = scene.leave_return(function);
        let report = report(&scene.bundle, Rule::AllowedSlots);
        assert!(says(&report, Some(at), UNCHECKED), "{function}: {report:?}");
    }
}

#[test]
fn a_manifest_that_claims_all_returns_is_caught() {
    let mut scene = Scene::of(changeable());
    scene.pass("hardened", "return-cfi", |pass| {
        pass.parameters.insert("scope".to_owned(), "all".to_owned())
    });
    let report = report(&scene.bundle, Rule::AllowedSlots);
    assert!(says(&report, None, UNCHECKED), "{report:?}");
}

#[test]
fn a_function_that_can_change_its_return_address_is_caught() {
    // In an image in which it writes where it reads, the emitter's claim does not hold.
    let scene = Scene::of(changeable());
    let (start, end) = function_of(&scene, KEPT);
    let mut whole = unpacked(std::fs::read(vmlinuz()).unwrap()).unwrap();
    let headers = goblin::elf::Elf::parse(&whole).unwrap().program_headers;
    let mut inside = headers.iter();
    let segment = inside.find(|one| one.vm_range().contains(&(start.0 as usize)));
    let segment = segment.expect("a segment");
    let offset = (segment.p_offset + start.0 - segment.p_vaddr) as usize;
    let code = &whole[offset..offset + (end.0 - start.0) as usize];
    // mov 8(%rdi),%rax or another register, and the other way round.
    let loads = |bytes: &[u8]| bytes[0] == 0x48 && bytes[1] == 0x8b && bytes[2] & 0xc7 == 0x47;
    let at = code.windows(4).position(loads).expect("it reads its page");
    whole[offset + at + 1] = 0x89;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vmlinux");
    std::fs::write(&path, whole).unwrap();
    let checker = Checker::open(&path).unwrap();
    let reports = checker.prove(changeable(), &[Rule::AllowedSlots]).unwrap();
    let report = &reports[0];
    let here = report.violations.iter().any(|violation| {
        let at = violation.address.unwrap_or(LinkVa(0));
        violation.what.contains(UNCHECKED) && (start..end).contains(&at)
    });
    assert!(here, "{report:?}");
}
