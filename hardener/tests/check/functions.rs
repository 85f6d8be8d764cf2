//! `return-cfi` by function: proved on a real kernel, and each way to weaken or to break it is caught.

use crate::scene::{Scene, branch, emitted, real, report, says, target, vmlinuz};
use hardener::check::{Checker, Rule, RuleReport};
use hardener::image::unpacked;
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use penumbra_bundle::{Bundle, LinkVa, SlotKind};
use std::sync::OnceLock;

const RECIPE: &str =
    "schema = 1\n[pass.return-cfi]\non-violation = \"log\"\npolicy = \"function\"\n";

fn by_function() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| emitted(RECIPE))
}

fn sets(bundle: &Bundle) -> RuleReport {
    report(bundle, Rule::ExactSets)
}

/// Two thunks of functions that only direct calls reach.
fn two_thunks(scene: &mut Scene) -> (LinkVa, LinkVa) {
    let direct = scene.named("return_cfi_direct");
    let own = scene.hands_over(direct, direct);
    (own, scene.hands_over(direct, own))
}

impl Scene {
    /// Lets all returns of `hardened` that go through the thunk at `from` go through the one at `to`; the first such return.
    fn redirect(&mut self, from: LinkVa, to: LinkVa) -> LinkVa {
        let start = self.va(penumbra_bundle::TextOff(0));
        let mut first = None;
        for edit in self.edits("hardened") {
            let at = LinkVa(start.0 + u64::from(edit.at.0));
            if edit.slot == SlotKind::Return && target(&edit.bytes, at.0) == from {
                edit.bytes = branch(&[0xe9], at, to);
                first.get_or_insert(at);
            }
        }
        first.expect("a return goes through it")
    }
}

#[test]
fn the_bundle_is_proved_and_its_figures_are_small() {
    let bundle = by_function();
    let (checker, _) = real();
    let outcome = checker.check(bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
    let hardened = bundle.manifest.variants.last().unwrap();
    let pass = hardened
        .passes
        .iter()
        .find(|pass| pass.name == "return-cfi");
    let figures = &pass.unwrap().figures;
    assert!(figures["median_direct"] <= 2, "{figures:?}");
    assert!(figures["functions_any_site"] * 10 < figures["functions_direct"]);
}

#[test]
fn a_return_through_another_functions_thunk_is_caught() {
    let mut scene = Scene::of(by_function());
    let (own, other) = two_thunks(&mut scene);
    let at = scene.redirect(own, other);
    let report = sets(&scene.bundle);
    assert!(says(&report, None, &format!("{:#x}", at.0)), "{report:?}");
    assert!(
        says(&report, None, "is passed, though no call"),
        "{report:?}"
    );
    assert!(
        says(&report, None, "is killed, though a call"),
        "{report:?}"
    );
}

#[test]
fn a_return_that_may_go_to_any_site_again_is_caught() {
    let mut scene = Scene::of(by_function());
    let (own, _) = two_thunks(&mut scene);
    let any = scene.named("return_cfi");
    scene.redirect(own, any);
    let report = sets(&scene.bundle);
    assert!(says(&report, None, "the check is weakened"), "{report:?}");
}

/// A thunk is shared by all views and reads text in whichever is on by then: a process that goes from `hardened` to `fast`
/// between a return and that read would be stopped at a legal place.
#[test]
fn a_return_that_asks_for_a_call_that_another_view_leaves_out_is_caught() {
    let kept = emitted(&format!(
        "{RECIPE}[pass.no-self-checks]\nlists = \"keep\"\n"
    ));
    assert_eq!(sets(&kept).violation_count, 0);
    let fast = |bundle: &Bundle| bundle.variant("fast").unwrap().1.clone();
    let mut scene = Scene::of(&kept);
    *scene.edits("fast") = fast(by_function()).0;
    let report = sets(&scene.bundle);
    let wanted = "may return to any site, and its thunk does not let it";
    assert!(says(&report, None, wanted), "{report:?}");
}

#[test]
fn what_only_boot_calls_goes_back_to_no_site() {
    let mut scene = Scene::of(by_function());
    // Its returns compare with nothing: what calls it is gone.
    let direct = scene.named("return_cfi_direct");
    let indirect = scene.named("return_cfi_indirect");
    let at = scene.redirect(direct, indirect);
    let report = sets(&scene.bundle);
    assert!(
        says(&report, None, "which is not what its thunk is for"),
        "{at:?}: {report:?}"
    );
    let any = scene.named("return_cfi");
    scene.redirect(indirect, any);
    let report = sets(&scene.bundle);
    assert!(says(&report, None, "the check is weakened"), "{report:?}");
}

#[test]
fn a_return_of_direct_calls_that_lets_indirect_ones_through_is_caught() {
    let mut scene = Scene::of(by_function());
    let (direct, indirect) = (
        scene.named("return_cfi_direct"),
        scene.named("return_cfi_indirect"),
    );
    let hands_over = scene.hands_over(direct, direct);
    scene.redirect(hands_over, indirect);
    let report = sets(&scene.bundle);
    assert!(
        says(&report, None, "which is not what its thunk is for"),
        "{report:?}"
    );
}

impl Scene {
    /// The thunks of all returns of `hardened`, in the returns' order.
    fn return_thunks(&mut self) -> Vec<LinkVa> {
        let start = self.va(penumbra_bundle::TextOff(0));
        let edits = self.edits("hardened").iter();
        let edits = edits.filter(|edit| edit.slot == SlotKind::Return);
        edits
            .map(|edit| target(&edit.bytes, start.0 + u64::from(edit.at.0)))
            .collect()
    }

    /// A thunk that some return goes through and that leaves the rest to the thunk at `to`, another one than `not`.
    fn hands_over(&mut self, to: LinkVa, not: LinkVa) -> LinkVa {
        let found = self.return_thunks().into_iter().find(|thunk| {
            // Until its first unconditional jump.
            let code = self.cave(*thunk, 64).to_vec();
            let decoder =
                iced_x86::Decoder::with_ip(64, &code, thunk.0, iced_x86::DecoderOptions::NONE);
            let mut jumps = decoder.into_iter().filter(|one| one.is_jmp_short_or_near());
            let leaves = jumps
                .next()
                .is_some_and(|jump| jump.near_branch_target() == to.0);
            leaves && ![to, not].contains(thunk)
        });
        found.expect("some thunk leaves the rest to it")
    }
}

#[test]
fn a_manifest_that_claims_the_other_policy_is_caught() {
    for (bundle, said) in [(by_function(), "return-sites"), (&real().1, "function")] {
        let mut scene = Scene::of(bundle);
        for variant in &mut scene.bundle.manifest.variants {
            for pass in &mut variant.passes {
                if let Some(policy) = pass.parameters.get_mut("policy") {
                    *policy = said.to_owned();
                }
            }
        }
        let report = sets(&scene.bundle);
        assert!(
            says(&report, None, &format!("says policy `{said}`")),
            "{report:?}"
        );
    }
}

/// `cmp $imm32,(%rsp)`, 64 bits: a thunk that compares the return address itself.
const COMPARES_SITE: [u8; 4] = [0x48, 0x81, 0x3c, 0x24];

#[test]
fn a_return_address_that_is_compared_with_another_site_is_caught() {
    let mut scene = Scene::of(by_function());
    let direct = scene.named("return_cfi_direct");
    let mut compares = scene
        .return_thunks()
        .into_iter()
        .filter(|thunk| scene.cave(*thunk, 8)[..4] == COMPARES_SITE);
    let (one, other) = (compares.next().unwrap(), compares.next_back().unwrap());
    assert_ne!([one, other], [direct, direct]);
    let site: [u8; 4] = scene.cave(other, 8)[4..].try_into().unwrap();
    scene.cave(one, 8)[4..].copy_from_slice(&site);
    let report = sets(&scene.bundle);
    let site = i64::from(i32::from_le_bytes(site)) as u64;
    let passed = report.violations.iter().any(|violation| {
        violation.what.contains("is passed, though no call")
            && violation.address == Some(LinkVa(site))
    });
    assert!(passed, "{report:?}");
    assert!(
        says(&report, None, "is killed, though a call"),
        "{report:?}"
    );
}

/// `mov (%rsp),%r11`, `cmpb $0xe9,-5(%r11)`: a thunk that asks whether a call or a jump names the function.
const ASKS_FOR_JUMP: [u8; 9] = [0x4c, 0x8b, 0x1c, 0x24, 0x41, 0x80, 0x7b, 0xfb, 0xe9];

#[test]
fn a_jump_that_is_taken_for_a_call_is_caught_and_a_call_for_a_jump() {
    for (limit, wanted) in [
        (0xea, "is passed, though no call"),
        (0xe8, "is killed, though a call"),
    ] {
        let mut scene = Scene::of(by_function());
        let thunks = scene.return_thunks().into_iter();
        let mut asks = thunks.filter(|thunk| scene.cave(*thunk, 9) == ASKS_FOR_JUMP);
        let thunk = asks.next().expect("some function is jumped to");
        *scene.cave(thunk, 9).last_mut().unwrap() = limit;
        let report = sets(&scene.bundle);
        assert!(says(&report, None, wanted), "{limit:#x}: {report:?}");
    }
}

#[test]
fn a_return_behind_which_registers_may_live_has_to_save_them() {
    let (checker, _) = real();
    let mut scene = Scene::of(by_function());
    // Not compiled for tracing, and exported: who calls it is not known.
    let from = scene.off(scene.symbol("__list_add_valid"));
    let plain = scene.named("return_cfi_indirect");
    let start = scene.va(penumbra_bundle::TextOff(0));
    let edits = scene.edits("hardened").iter_mut();
    let mut returns = edits.filter(|edit| edit.at >= from && edit.slot == SlotKind::Return);
    let edit = returns.next().unwrap();
    let at = LinkVa(start.0 + u64::from(edit.at.0));
    edit.bytes = branch(&[0xe9], at, plain);
    let mut rules = checker
        .prove(&scene.bundle, &[Rule::ThunkContract])
        .unwrap();
    let report = rules.pop().unwrap();
    assert!(says(&report, None, "changed"), "{report:?}");
    let first = format!("the first is {:#x}", at.0);
    assert!(says(&report, None, &first), "{report:?}");
}

#[test]
fn a_register_that_is_read_behind_a_replaced_test_is_not_lost() {
    // A function of `inline` functions: a call of one that is not traced, and behind it `static_cpu_has`, a jump that is replaced.
    let scene = Scene::of(by_function());
    let start = scene.symbol("free_pgd_range");
    let whole = unpacked(std::fs::read(vmlinuz()).unwrap()).unwrap();
    let headers = goblin::elf::Elf::parse(&whole).unwrap().program_headers;
    let offset = |at: u64| {
        let mut segments = headers.iter();
        let segment = segments.find(|one| one.vm_range().contains(&(at as usize)));
        let segment = segment.expect("a segment");
        (segment.p_offset + at - segment.p_vaddr) as usize
    };
    let decoded = |at: u64, len: usize| {
        let code = &whole[offset(at)..][..len];
        Decoder::with_ip(64, code, at, DecoderOptions::NONE)
    };
    let end = scene.bundle.manifest.text.end.0;
    let leaves = |to: u64| to >= end;
    let jump = decoded(start.0, 4096).into_iter().find(|one| {
        one.flow_control() == FlowControl::UnconditionalBranch && leaves(one.near_branch_target())
    });
    let jump = jump.expect("a test outside the text");
    let test = decoded(jump.near_branch_target(), 24).into_iter();
    let branches = test.filter(|one| one.flow_control() != FlowControl::Next);
    let mut ways: Vec<u64> = branches
        .take(2)
        .map(|one| one.near_branch_target())
        .collect();
    ways.push(jump.next_ip());
    ways.sort_unstable();
    ways.dedup();
    assert!(ways.len() >= 2, "{ways:x?}");
    for way in ways {
        let mut image = whole.clone();
        // mov %r11,%rax
        image[offset(way)..][..3].copy_from_slice(&[0x4c, 0x89, 0xd8]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmlinux");
        std::fs::write(&path, image).unwrap();
        let checker = Checker::open(&path).unwrap();
        let reports = checker
            .prove(by_function(), &[Rule::ThunkContract])
            .unwrap();
        assert!(
            says(&reports[0], None, "changed"),
            "{way:#x}: {:?}",
            reports[0]
        );
    }
}
