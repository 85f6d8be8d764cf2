//! The checker against a real kernel: the emitter's bundle is proved, and each of many single faults is caught.
#![allow(missing_docs, reason = "a test")]

#[path = "check/cases.rs"]
mod cases;
#[path = "check/cave.rs"]
mod cave;
#[path = "check/changeable.rs"]
mod changeable;
mod common;
#[path = "check/debloat.rs"]
mod debloat;
#[path = "check/edits.rs"]
mod edits;
#[path = "check/functions.rs"]
mod functions;
#[path = "check/kernel.rs"]
mod kernel;
#[path = "check/modules.rs"]
mod modules;
#[path = "check/promotion.rs"]
mod promotion;
#[path = "check/scene.rs"]
mod scene;
#[path = "check/scope.rs"]
mod scope;
#[path = "check/self_checks.rs"]
mod self_checks;
#[path = "check/stack.rs"]
mod stack;
#[path = "check/stack_depth.rs"]
mod stack_depth;
#[path = "check/thunks.rs"]
mod thunks;
#[path = "check/violations.rs"]
mod violations;
#[path = "check/zeroing.rs"]
mod zeroing;

use cases::Case;
use hardener::check::{Checker, Rule};
use penumbra_bundle::{Bundle, LinkVa, VaRange};
use scene::{Scene, emitted, logging, next, real, vmlinuz};
use std::process::{Command, Output};

#[test]
fn the_emitted_bundle_is_proved() {
    let (checker, bundle) = real();
    let outcome = checker.check(bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
    // A proof about nothing would be clean too.
    for rule in &outcome.rules {
        assert!(rule.proved.iter().any(|(_, count)| *count > 10), "{rule:?}");
    }
}

#[test]
fn a_bundle_with_stock_only_is_proved() {
    let (checker, bundle) = real();
    let outcome = checker.check(&null(bundle), false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
}

/// The same kernel without any change to it.
fn null(bundle: &Bundle) -> Bundle {
    let mut null = bundle.clone();
    null.manifest.modules = None;
    null.modules.clear();
    null.manifest.variants.truncate(1);
    null.edits.truncate(1);
    null.edits[0].0.clear();
    let stock = &mut null.manifest.variants[0];
    stock.passes.clear();
    stock.edit_count = 0;
    let cave = &mut null.manifest.cave;
    cave.tables.clear();
    null.relocs.clear();
    cave.return_tails.clear();
    cave.traps.clear();
    let nothing = object::write::Object::new(
        object::BinaryFormat::Elf,
        object::Architecture::X86_64,
        object::Endianness::Little,
    );
    null.cave = nothing.write().unwrap();
    // ET_EXEC; `object` writes relocatable files (System V gABI, e_type).
    null.cave[16] = 2;
    null
}

#[test]
fn a_null_bundle_may_have_no_cave_at_all() {
    let (checker, bundle) = real();
    let mut null = null(bundle);
    let start = null.manifest.text.start;
    null.manifest.cave.range = VaRange { start, end: start };
    let outcome = checker.check(&null, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
}

#[test]
fn every_action_is_proved() {
    let (checker, _) = real();
    let turned = emitted(
        "schema = 1\n[pass.return-cfi]\non-violation = \"panic\"\n[pass.forward-cfi]\non-violation = \"log\"\n",
    );
    for bundle in [logging(), &turned] {
        let reports = checker.prove(bundle, &[Rule::OneSharedCave, Rule::ThunkContract]);
        for report in reports.unwrap() {
            let lines: Vec<String> = report.violations.iter().map(|one| one.line()).collect();
            assert!(lines.is_empty(), "{lines:?}");
        }
    }
}

fn caught(cases: &[Case]) {
    caught_in(&real().1, cases);
}

fn caught_in(bundle: &Bundle, cases: &[Case]) {
    caught_by(&real().0, bundle, cases);
}

fn caught_by(checker: &Checker, bundle: &Bundle, cases: &[Case]) {
    let mut wrong = Vec::new();
    for case in cases {
        let mut scene = Scene::of(bundle);
        let site = (case.fault)(&mut scene);
        let reports = checker.prove(&scene.bundle, &[case.rule]).unwrap();
        let violations: Vec<_> = reports
            .iter()
            .flat_map(|report| &report.violations)
            .collect();
        let named = |at: Option<LinkVa>| site.is_none() || at == site;
        let found = violations
            .iter()
            .any(|found| found.what.contains(case.says) && named(found.address));
        if !found {
            let said: Vec<String> = violations.iter().map(|found| found.line()).collect();
            wrong.push(format!(
                "{}: not caught at {site:?} by {:?} saying `{}`; it said:\n  {}",
                case.name,
                case.rule,
                case.says,
                said.join("\n  ")
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}

#[test]
fn faults_in_edits_are_caught() {
    caught(edits::EDITS);
}

#[test]
fn faults_in_calls_that_are_left_out_are_caught() {
    caught(self_checks::EDITS);
}

#[test]
fn faults_in_the_cave_are_caught() {
    caught(cave::CAVE);
}

#[test]
fn faults_in_thunks_are_caught() {
    caught(thunks::THUNKS);
}

#[test]
fn faults_in_what_follows_a_violation_are_caught() {
    caught(violations::KILL);
    caught(violations::MODULE_FREE);
    caught_in(logging(), violations::LOG_AND_PANIC);
}

#[test]
fn faults_in_modules_are_caught() {
    caught(modules::MODULES);
}

#[test]
fn faults_in_modules_whose_code_and_data_are_apart_are_caught() {
    let (checker, bundle) = next();
    caught_by(checker, bundle, modules::MODULES);
    caught_by(checker, bundle, modules::APART);
}

#[test]
fn a_module_without_its_file_is_not_proved() {
    let checker = Checker::open(&vmlinuz()).unwrap();
    let [report] = &checker.prove(&real().1, &[Rule::Modules]).unwrap()[..] else {
        panic!("one rule, one report");
    };
    assert_eq!(report.violation_count, 3);
    let said = report.violations[0].line();
    assert!(said.contains("say --module FILE or FOLDER"), "{said}");
}

#[test]
fn faults_in_tables_are_caught() {
    caught(cave::TABLES);
}

#[test]
fn faults_about_the_image_are_caught() {
    caught(kernel::IMAGE);
}

#[test]
fn every_rule_has_a_fault() {
    let all = [
        edits::EDITS,
        cave::CAVE,
        thunks::THUNKS,
        cave::TABLES,
        kernel::IMAGE,
        modules::MODULES,
    ];
    for rule in Rule::ALL {
        assert!(
            all.iter()
                .any(|cases| cases.iter().any(|case| case.rule == rule)),
            "{rule:?}"
        );
    }
}

fn hardener(arguments: &[&std::ffi::OsStr]) -> Output {
    let program = env!("CARGO_BIN_EXE_hardener");
    Command::new(program).args(arguments).output().unwrap()
}

#[test]
fn exit_codes_and_json() {
    let folder = tempfile::tempdir().unwrap();
    let (good, bad, image) = (
        folder.path().join("good"),
        folder.path().join("bad"),
        vmlinuz(),
    );
    real().1.clone().write_dir(&good, false).unwrap();
    let mut scene = Scene::new();
    scene.bundle.text[0x2000] ^= 0xff;
    scene.bundle.write_dir(&bad, false).unwrap();
    let check = |bundle: &std::path::Path, image: &std::path::Path, more: &[&str]| {
        let mut arguments = vec!["check".as_ref(), bundle.as_os_str()];
        arguments.extend(["--image".as_ref(), image.as_os_str()]);
        arguments.extend(["--module".as_ref(), common::modules().as_os_str()]);
        arguments.extend(more.iter().map(|word| std::ffi::OsStr::new(*word)));
        hardener(&arguments)
    };

    let output = check(&good, &image, &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(
        text.contains("ok     thunk-contract") && text.contains("proved: bundle for 6."),
        "{text}"
    );

    let output = check(&bad, &image, &["--json"]);
    assert_eq!(output.status.code(), Some(1));
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["schema"], "penumbra.check/v1");
    assert_eq!(value["clean"], false);
    let broken: Vec<_> = value["rules"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|rule| rule["violation_count"] != 0)
        .collect();
    assert_eq!(broken.len(), 1, "{broken:?}");
    assert_eq!(broken[0]["rule"], "true-to-image");
    assert_eq!(broken[0]["violations"][0]["address"], "0xffffffff81002000");

    let garbage = folder.path().join("garbage");
    std::fs::write(&garbage, [0x55; 4096]).unwrap();
    for (bundle, image) in [
        (&good, &garbage),
        (&garbage, &image),
        (&good, &folder.path().join("none")),
    ] {
        let output = check(bundle, image, &[]);
        assert_eq!(output.status.code(), Some(2), "{bundle:?} {image:?}");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(message.trim_end().lines().count(), 1, "{message}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_bundle_for_another_kernel_is_bad_input() {
    let (checker, bundle) = real();
    let mut other = bundle.clone();
    other.manifest.kernel.build_id = "00".repeat(20);
    let error = checker.check(&other, false).unwrap_err().to_string();
    assert!(error.contains("the bundle is for 0000"), "{error}");
}

#[test]
fn an_image_cut_short_is_bad_input() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vmlinuz");
    let whole = std::fs::read(vmlinuz()).unwrap();
    for part in [0, 100, 0x300, whole.len() / 2, whole.len() * 3 / 4] {
        std::fs::write(&path, &whole[..part]).unwrap();
        let error = Checker::open(&path).err().map(|error| error.to_string());
        assert!(
            error.is_some_and(|error| error.contains("vmlinuz")),
            "{part} bytes"
        );
    }
}

/// What is in memory only may claim any size: a table of 2^60 bytes is not asked memory for.
#[test]
fn a_table_of_any_size_that_the_file_does_not_hold_is_bad_input() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vmlinux");
    let mut whole = hardener::image::unpacked(std::fs::read(vmlinuz()).unwrap()).unwrap();
    let elf = goblin::elf::Elf::parse(&whole).unwrap();
    let name = |header: &goblin::elf::SectionHeader| elf.shdr_strtab.get_at(header.sh_name);
    let mut headers = elf.section_headers.iter();
    let index = headers.position(|header| name(header) == Some(".smp_locks"));
    let at = elf.header.e_shoff as usize + 64 * index.unwrap();
    // sh_type: SHT_NOBITS; sh_addr and sh_size (System V gABI, section header).
    whole[at + 4..at + 8].copy_from_slice(&8u32.to_le_bytes());
    whole[at + 16..at + 24].copy_from_slice(&0x10_0000u64.to_le_bytes());
    whole[at + 32..at + 40].copy_from_slice(&(1u64 << 60).to_le_bytes());
    std::fs::write(&path, whole).unwrap();
    let error = Checker::open(&path).err().map(|error| error.to_string());
    assert!(error.is_some_and(|error| error.contains("truncated")));
}
