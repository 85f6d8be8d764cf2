//! `promote`: proved on a real kernel by a small profile, and every way to compare wrongly is caught.

use crate::scene::{Scene, branch, real, report, says, target, vmlinuz};
use hardener::check::Rule;
use hardener::recipe::Recipe;
use iced_x86::{Code, Mnemonic, Register};
use penumbra_bundle::{Bundle, Edit, LinkVa, Mitigation, SlotKind};
use std::fs;
use std::sync::OnceLock;

/// Address-taken functions of the kernel.
const HOT: [&str; 3] = ["__x64_sys_getppid", "__x64_sys_read", "panic"];

fn is_call_rax(scene: &Scene, edit: &Edit, thunk: LinkVa) -> bool {
    edit.slot == SlotKind::Indirect
        && edit.bytes.contains(&0xe8)
        && target(&edit.bytes, scene.va(edit.at).0) == thunk
}

/// Three calls through rax where flags are free.
fn calls() -> Vec<LinkVa> {
    let mut scene = Scene::of(&real().1);
    let thunk = scene.named("forward_cfi_rax");
    let edits = scene.edits("hardened").clone();
    let calls = edits.iter().filter(|edit| is_call_rax(&scene, edit, thunk));
    calls.map(|edit| scene.va(edit.at)).take(3).collect()
}

/// A bundle by a profile of three branches: one that goes to one place, one that goes to three, one that goes anywhere.
fn promoting() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| {
        let [one, three, spread] = calls()[..] else {
            panic!("the kernel has three calls through rax");
        };
        let mut profile = format!("# hot\n{:#x} {} 100\n", one.0, HOT[0]);
        for (name, count) in HOT.into_iter().zip([60, 30, 10]) {
            profile += &format!("{:#x} {name} {count}\n", three.0);
        }
        for line in 0..9u64 {
            // Nothing there is an entry.
            profile += &format!("{:#x} {:#x} 1\n", spread.0, one.0 + 1 + line);
        }
        profile += "no_such_function+0x1 panic 3\n";
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("hot.profile"), profile).unwrap();
        let recipe = "schema = 1\n[pass.promote]\nprofile = \"hot.profile\"\n";
        let file = folder.path().join("recipe.toml");
        fs::write(&file, recipe).unwrap();
        let recipe = Recipe::open(&file).unwrap();
        hardener::emit::emit(&vmlinuz(), &recipe, &mut |_| {}).unwrap()
    })
}

impl Scene {
    /// The thunk that compares with so many targets.
    fn promoting(&self, targets: usize) -> LinkVa {
        let low = |name: &str| format!("_{:08x}", self.symbol(name).0 as u32);
        let names: String = HOT[..targets].iter().map(|name| low(name)).collect();
        self.named(&format!("promote_rax{names}"))
    }
}

#[test]
fn the_bundle_is_proved_and_differs_from_fast_at_two_branches() {
    let bundle = promoting();
    let (checker, plain) = real();
    let outcome = checker.check(bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
    let pass = &bundle.manifest.variants[1].passes;
    let pass = pass.iter().find(|pass| pass.name == "promote").unwrap();
    assert_eq!(pass.edited, 2);
    for (figure, value) in [
        ("compared-targets", 4),
        ("profiled-branches", 209),
        ("profiled-branches-compared", 200),
        ("profile-branches-at-no-slot", 0),
        ("profile-lines-unknown", 1),
    ] {
        assert_eq!(pass.figures[figure], value, "{figure}");
    }
    assert_eq!(
        bundle.manifest.variants[1].drops,
        plain.manifest.variants[1].drops
    );
    // The rest of `fast` is as without it.
    let both = bundle.edits[1].0.iter().zip(&plain.edits[1].0);
    let differs = both.filter(|(a, b)| a != b && a.slot == SlotKind::Indirect);
    assert_eq!(differs.count(), 2);
}

#[test]
fn without_being_named_the_pass_does_not_run() {
    let passes = real().1.manifest.variants.iter();
    let mut passes = passes.flat_map(|variant| &variant.passes);
    assert!(passes.all(|pass| pass.name != "promote"));
}

#[test]
fn a_jump_to_another_function_than_was_compared_with_is_caught() {
    let mut scene = Scene::of(promoting());
    let thunk = scene.promoting(1);
    scene.patch(thunk, |instruction, bytes| {
        let jumps = instruction.code() == Code::Je_rel32_64;
        jumps.then(|| {
            let mut bytes = bytes.to_vec();
            bytes[2] ^= 0x10;
            bytes
        })
    });
    let report = report(&scene.bundle, Rule::ThunkContract);
    assert!(
        says(
            &report,
            None,
            "is reached but is no thunk, return tail or retpoline"
        ),
        "{report:?}"
    );
}

#[test]
fn a_jump_whether_or_not_it_is_the_target_is_caught() {
    let mut scene = Scene::of(promoting());
    let thunk = scene.promoting(1);
    scene.patch(thunk, |instruction, bytes| {
        let jumps = instruction.code() == Code::Je_rel32_64;
        // `jne` to the function: all but the one.
        jumps.then(|| [&[0x0f, 0x85], &bytes[2..]].concat())
    });
    let report = report(&scene.bundle, Rule::ThunkContract);
    assert!(
        says(&report, None, "is reached but is no thunk"),
        "{report:?}"
    );
}

#[test]
fn another_register_at_the_end_is_caught() {
    let mut scene = Scene::of(promoting());
    let thunk = scene.promoting(3);
    scene.patch(thunk, |instruction, _| {
        let plain =
            instruction.mnemonic() == Mnemonic::Jmp && instruction.op0_register() == Register::RAX;
        plain.then(|| vec![0xff, 0xe1])
    });
    let report = report(&scene.bundle, Rule::ThunkContract);
    assert!(
        says(
            &report,
            None,
            "ends a thunk by a jump to *%rcx without retpoline"
        ),
        "{report:?}"
    );
}

#[test]
fn a_comparison_that_is_not_relocated_is_caught() {
    let mut scene = Scene::of(promoting());
    let thunk = scene.promoting(1);
    let mut relocs = scene.bundle.cave_relocs().enumerate();
    let (index, (at, _)) = relocs.find(|(_, (at, _))| *at >= thunk).unwrap();
    drop(relocs);
    scene.bundle.relocs.remove(index);
    let report = report(&scene.bundle, Rule::ThunkContract);
    assert!(
        says(&report, Some(at), "an absolute address without relocation"),
        "{report:?}"
    );
}

#[test]
fn a_checked_branch_that_goes_to_such_a_thunk_is_caught() {
    let mut scene = Scene::of(promoting());
    let thunk = scene.promoting(1);
    let checked = scene.named("forward_cfi_rax");
    let edits = scene.edits("hardened").clone();
    let edit = edits
        .iter()
        .position(|edit| edit.bytes[0] == 0xe8 && is_call_rax(&scene, edit, checked));
    let index = edit.unwrap();
    let at = scene.va(edits[index].at);
    scene.edits("hardened")[index].bytes = branch(&[0xe8], at, thunk);
    let report = report(&scene.bundle, Rule::ThunkContract);
    assert!(
        says(
            &report,
            None,
            "1 indirect branches compare with targets, pass promote says 0"
        ),
        "{report:?}"
    );
    assert!(says(&report, None, "drops the retpoline"), "{report:?}");
}

#[test]
fn a_target_that_is_no_entry_is_caught() {
    let mut scene = Scene::of(promoting());
    let thunk = scene.promoting(1);
    // Compares with the instruction behind the entry's first, and goes there: consistent, and no function.
    for code in [Code::Cmp_RAX_imm32, Code::Je_rel32_64] {
        scene.patch(thunk, |instruction, bytes| {
            (instruction.code() == code).then(|| {
                let word = bytes[2..].try_into().expect("six bytes");
                let moved = u32::from_le_bytes(word).wrapping_add(5);
                [&bytes[..2], &moved.to_le_bytes()].concat()
            })
        });
    }
    let at = LinkVa(scene.symbol(HOT[0]).0 + 5);
    let report = report(&scene.bundle, Rule::ExactSets);
    assert!(says(&report, Some(at), "but it is no entry"), "{report:?}");
}

#[test]
fn a_manifest_that_counts_other_branches_is_caught() {
    let mut scene = Scene::of(promoting());
    for variant in &mut scene.bundle.manifest.variants {
        for pass in &mut variant.passes {
            if pass.name == "promote" {
                pass.edited += 1;
            }
        }
        variant.drops.retain(|drop| *drop != Mitigation::Retpoline);
    }
    let report = report(&scene.bundle, Rule::ThunkContract);
    assert!(says(&report, None, "pass promote says 3"), "{report:?}");
    assert!(
        says(&report, None, "the manifest does not say so"),
        "{report:?}"
    );
}

#[test]
fn the_recipe_needs_a_profile_that_is_one() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("r.toml");
    let said = |recipe: &str| {
        fs::write(&file, recipe).unwrap();
        let said = Recipe::open(&file).unwrap_err().to_string();
        said.replace(&format!("{}/", folder.path().display()), "")
    };
    let head = "schema = 1\n[pass.promote]\n";
    assert_eq!(
        said(head),
        "r.toml:2:1: pass `promote` has no `profile`; name the file that it works by"
    );
    assert!(
        said(&format!("{head}profile = \"gone\"\n")).starts_with("r.toml:3:11: gone: No such file")
    );
    fs::write(folder.path().join("bad"), "a b\n").unwrap();
    assert!(
        said(&format!("{head}profile = \"bad\"\n")).starts_with("r.toml:3:11: bad: line 1 is no")
    );
    assert_eq!(
        said(&format!("{head}profile = 1\n")),
        "r.toml:3:11: expected a string, found an integer"
    );
}
