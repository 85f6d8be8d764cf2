//! `stack-clear`: proved on a real kernel; a stack that is not cleared, or too much of it, is caught.

use crate::scene::{Scene, branch, emitted, real, report, says, target};
use hardener::check::{Rule, RuleReport};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use penumbra_bundle::{Bundle, LinkVa, SlotKind};
use std::sync::OnceLock;

const CLEAR: &str = "stack_clear_return_cfi";
const MARK: &str = "stack_mark_1_return_cfi";
const CHECK: &str = "return_cfi";

fn clearing() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| emitted("schema = 1\n[pass.stack-clear]\n"))
}

fn contracts(bundle: &Bundle) -> RuleReport {
    report(bundle, Rule::ThunkContract)
}

impl Scene {
    /// Sends a return of `hardened` for which `which` holds, by address and thunk, to another thunk; where it is.
    fn send(&mut self, which: impl Fn(LinkVa, LinkVa) -> bool, to: &str) -> LinkVa {
        let (start, to) = (self.bundle.manifest.text.start.0, self.named(to));
        for edit in self.edits("hardened") {
            let at = LinkVa(start + u64::from(edit.at.0));
            if edit.slot == SlotKind::Return && which(at, target(&edit.bytes, at.0)) {
                edit.bytes = branch(&[0xe9], at, to);
                return at;
            }
        }
        panic!("no such return");
    }
}

#[test]
fn the_bundle_is_proved_and_large_frames_are_marked() {
    let bundle = clearing();
    let (checker, _) = real();
    let outcome = checker.check(bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
    let mut passes = bundle.manifest.variants.last().unwrap().passes.iter();
    let pass = passes.find(|pass| pass.name == "stack-clear").unwrap();
    assert!(pass.edited > 1000 && pass.figures["marks"] > pass.edited);
    assert!(pass.figures["clearing"] > 0);
}

#[test]
fn with_each_functions_own_check_and_dead_registers_cleared_it_is_proved() {
    let bundle = emitted(
        "schema = 1\n[pass.return-cfi]\npolicy = \"function\"\n[pass.zero-regs]\n[pass.stack-clear]\n",
    );
    let (checker, _) = real();
    let outcome = checker.check(&bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
}

#[test]
fn without_being_named_the_pass_does_not_run() {
    let passes = real().1.manifest.variants.iter();
    let mut passes = passes.flat_map(|variant| &variant.passes);
    assert!(passes.all(|pass| pass.name != "stack-clear"));
}

#[test]
fn a_return_before_user_mode_that_does_not_clear_is_caught() {
    let mut scene = Scene::of(clearing());
    let clear = scene.named(CLEAR);
    let at = scene.send(|_, thunk| thunk == clear, CHECK);
    let report = contracts(&scene.bundle);
    let wanted = "before user mode that does not clear the stack";
    assert!(says(&report, Some(at), wanted), "{report:?}");
}

#[test]
fn clearing_elsewhere_is_caught() {
    let mut scene = Scene::of(clearing());
    let from = scene.symbol("__x64_sys_getppid");
    let at = scene.send(|at, _| at >= from, CLEAR);
    let report = contracts(&scene.bundle);
    let wanted = "does not run last before user mode";
    assert!(says(&report, Some(at), wanted), "{report:?}");
}

#[test]
fn a_large_frame_without_a_mark_is_caught() {
    let mut scene = Scene::of(clearing());
    let mark = scene.named(MARK);
    let at = scene.send(|_, thunk| thunk == mark, CHECK);
    let report = contracts(&scene.bundle);
    assert!(says(&report, Some(at), "without a mark"), "{report:?}");
}

#[test]
fn a_mark_below_the_frame_is_caught() {
    let mut scene = Scene::of(clearing());
    let from = scene.symbol("__x64_sys_getppid");
    let at = scene.send(|at, _| at >= from, MARK);
    let report = contracts(&scene.bundle);
    let wanted = "where not every way has been";
    assert!(says(&report, Some(at), wanted), "{report:?}");
}

#[test]
fn a_mark_that_is_moved_is_caught() {
    let mut scene = Scene::of(clearing());
    let mark = scene.named(MARK);
    // The displacement of `mov %rsp,-112(%rsp)`: a word of the caller's, and one further down.
    for (displacement, wanted) in [(0x10u8, "fails at"), (0x80, "without a mark")] {
        scene.patch(mark, |instruction, bytes| {
            let marks = instruction.mnemonic() == Mnemonic::Mov;
            let mut bytes = bytes.to_vec();
            *bytes.last_mut().unwrap() = displacement;
            marks.then_some(bytes)
        });
        let report = contracts(&scene.bundle);
        assert!(says(&report, None, wanted), "{displacement}: {report:?}");
    }
}

#[test]
fn a_thunk_that_clears_too_little_or_too_much_is_caught() {
    type Fault = fn(&Instruction, &[u8]) -> Option<Vec<u8>>;
    let faults: [(&str, &str, Fault); 8] = [
        // Of the words below RSP, one is left out.
        ("a store left out", "fails at", |instruction, bytes| {
            let store = instruction.op0_kind() == OpKind::Memory
                && instruction.memory_base() == Register::R10;
            store.then(|| vec![0x90; bytes.len()])
        }),
        (
            "a store elsewhere",
            "uses what is not below RSP",
            |instruction, bytes| {
                // Above what is kept.
                let starts = instruction.mnemonic() == Mnemonic::Lea;
                let above = || [&bytes[..bytes.len() - 4], &[0; 4]].concat();
                starts.then(above)
            },
        ),
        ("a word not looked at", "fails at", |instruction, bytes| {
            let looks = instruction.mnemonic() == Mnemonic::Or;
            looks.then(|| vec![0x90; bytes.len()])
        }),
        (
            "both ways the other way round",
            "fails at",
            |instruction, bytes| {
                // The one near the end, which is a short jump: all was zero.
                let decides = instruction.mnemonic() == Mnemonic::Je && bytes.len() == 2;
                decides.then(|| vec![bytes[0] ^ 1, bytes[1]])
            },
        ),
        (
            "the end of the stack not seen",
            "uses the end of the stack",
            |instruction, bytes| {
                let ends = instruction.mnemonic() == Mnemonic::Test;
                // The mask: all but the last word.
                let opcode = bytes.len() - 4;
                ends.then(|| [&bytes[..opcode], &[0xf8, 0x3f, 0, 0]].concat())
            },
        ),
        (
            "another register",
            "no such thunk needs",
            |instruction, _| {
                let makes_zero = instruction.mnemonic() == Mnemonic::Xorps;
                // xmm1.
                makes_zero.then(|| vec![0x0f, 0x57, 0xc9])
            },
        ),
        (
            "a register that stays zero",
            "goes on with xmm0 changed",
            |instruction, bytes| {
                let takes_back = instruction.mnemonic() == Mnemonic::Movups
                    && instruction.op1_kind() == OpKind::Memory;
                takes_back.then(|| vec![0x90; bytes.len()])
            },
        ),
        (
            "a register that is not kept",
            "keeps something other than xmm0",
            |instruction, bytes| {
                let keeps = instruction.op0_kind() == OpKind::Memory
                    && instruction.memory_base() == Register::RSP;
                keeps.then(|| vec![0x90; bytes.len()])
            },
        ),
    ];
    for (name, wanted, fault) in faults {
        let mut scene = Scene::of(clearing());
        let clear = scene.named(CLEAR);
        scene.patch(clear, fault);
        let report = contracts(&scene.bundle);
        assert!(says(&report, None, wanted), "{name}: {report:?}");
    }
}

#[test]
fn a_manifest_that_counts_other_returns_is_caught() {
    let mut scene = Scene::of(clearing());
    for variant in &mut scene.bundle.manifest.variants {
        for pass in &mut variant.passes {
            if pass.name == "stack-clear" {
                pass.edited += 1;
            }
        }
    }
    let report = contracts(&scene.bundle);
    assert!(says(&report, None, "clear or mark the stack"), "{report:?}");
}
