//! What `explain` and `diff` say of Debian's cloud kernel.
#![allow(missing_docs, reason = "a test")]

mod common;

use hardener::emit::emit;
use hardener::recipe::Recipe;
use hardener::report::{diff, explain};
use penumbra_bundle::{Bundle, LinkVa, SlotKind};
use serde_json::Value;
use std::sync::OnceLock;

fn emitted(recipe: &str) -> Bundle {
    let recipe = Recipe::parse("recipe", recipe.as_bytes()).unwrap();
    emit(common::cloud(), &recipe, &mut |_| {}).unwrap()
}

fn bundle() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| emitted("schema = 1\n"))
}

fn said(what: &str) -> Value {
    let explanation = explain(bundle(), what).unwrap_or_else(|error| panic!("{what}: {error}"));
    serde_json::from_str(&explanation.json()).unwrap()
}

fn refused(what: &str) -> String {
    match explain(bundle(), what) {
        Ok(_) => panic!("{what} is explained"),
        Err(error) => error.to_string(),
    }
}

/// The first slot of a kind in `hardened`, as an address.
fn first(kind: SlotKind) -> LinkVa {
    let (_, edits) = bundle().variant("hardened").unwrap();
    let edit = edits.0.iter().find(|edit| edit.slot == kind).unwrap();
    LinkVa(bundle().manifest.text.start.0 + u64::from(edit.at.0))
}

/// The row of an explanation at an address.
fn row(said: &Value, at: LinkVa) -> &Value {
    let mut rows = said["instructions"].as_array().unwrap().iter();
    rows.find(|row| row["at"] == at.to_string().as_str())
        .unwrap()
}

#[test]
fn a_slot_has_its_pass_its_thunk_and_what_each_variant_has_there() {
    for (kind, slot, fast, hardened, passes) in [
        (
            SlotKind::Return,
            "return",
            "ret",
            "return_cfi",
            ["no-rethunk", "return-cfi"],
        ),
        (
            SlotKind::Indirect,
            "indirect",
            "*%",
            "forward_cfi",
            ["no-retpoline", "forward-cfi"],
        ),
    ] {
        let at = first(kind);
        let said = said(&at.to_string());
        let row = row(&said, at);
        assert!(row["text"].as_str().unwrap().contains("__x86_"), "{row}");
        let edits = row["edits"].as_array().unwrap();
        assert_eq!(edits.len(), 2, "{row}");
        for ((edit, variant), pass) in edits.iter().zip(["fast", "hardened"]).zip(passes) {
            assert_eq!(edit["variant"], variant);
            assert_eq!(edit["pass"], pass);
            assert_eq!(edit["slot"], slot);
            assert!(!edit["does"].as_str().unwrap().is_empty());
        }
        assert!(edits[0]["text"].as_str().unwrap().contains(fast), "{row}");
        assert!(edits[0]["thunk"].is_null());
        assert!(
            edits[1]["thunk"].as_str().unwrap().starts_with(hardened),
            "{row}"
        );
        assert_eq!(edits[1]["parameters"]["on-violation"], "kill");
    }
}

#[test]
fn a_call_that_is_left_out_has_its_pass_and_what_stands_for_it() {
    let (_, edits) = bundle().variant("fast").unwrap();
    let mut calls = edits.0.iter().filter(|edit| edit.slot == SlotKind::Call);
    let edit = calls.find(|edit| edit.bytes[0] == 0xb8).unwrap();
    let at = LinkVa(bundle().manifest.text.start.0 + u64::from(edit.at.0));
    let said = said(&at.to_string());
    let row = row(&said, at);
    assert!(row["text"].as_str().unwrap().contains("__list_"), "{row}");
    let [edit] = &row["edits"].as_array().unwrap()[..] else {
        panic!("{row}");
    };
    assert_eq!(edit["pass"], "no-self-checks");
    assert!(
        edit["text"].as_str().unwrap().contains("$0x1,%eax"),
        "{row}"
    );
    assert_eq!(edit["parameters"]["lists"], "drop");
}

#[test]
fn of_the_passes_that_share_a_slot_those_are_named_whose_part_its_thunk_does() {
    let bundle = emitted("schema = 1\n[pass.zero-regs]\n[pass.stack-clear]\n");
    let start = bundle.manifest.text.start.0;
    let (_, edits) = bundle.variant("hardened").unwrap();
    for (function, clears_stack) in [
        ("exit_to_user_mode_prepare", true),
        ("__x64_sys_getppid", false),
    ] {
        let symbols = bundle.symbols.0.iter();
        let from = symbols.clone().find(|one| one.name == function).unwrap().at;
        let mut edits = edits.0.iter();
        let edit = edits.find(|edit| edit.at >= from && edit.slot == SlotKind::Return);
        let at = LinkVa(start + u64::from(edit.unwrap().at.0));
        let said = explain(&bundle, &at.to_string()).unwrap().json();
        let said = serde_json::from_str(&said).unwrap();
        let edit = row(&said, at)["edits"].as_array().unwrap().last().unwrap();
        let (thunk, does) = (
            edit["thunk"].as_str().unwrap(),
            edit["does"].as_str().unwrap(),
        );
        assert_eq!(does.contains("stack-clear: "), clears_stack, "{edit}");
        let clears_registers = thunk.ends_with("_zeroing");
        assert_eq!(does.contains("zero-regs: "), clears_registers, "{edit}");
    }
}

#[test]
fn a_function_is_listed_whole_and_found_by_name_offset_and_address() {
    let whole = said("vfs_fsync");
    let rows = whole["instructions"].as_array().unwrap();
    let len = |row: &Value| row["bytes"].as_str().unwrap().split(' ').count() as u64;
    let bytes: u64 = rows.iter().map(len).sum();
    let end = |name: &str| {
        let text = whole["range"][name]
            .as_str()
            .unwrap()
            .strip_prefix("0x")
            .unwrap();
        u64::from_str_radix(text, 16).unwrap()
    };
    assert_eq!(bytes, end("end") - end("start"));
    assert_eq!(rows[0]["poked"][0], "fentry");
    // Its address is in tables of operations, and no call ends where it begins.
    assert_eq!(whole["tables"]["entries"], true);
    assert_eq!(whole["tables"]["return_targets"], false);
    let by_offset = said("vfs_fsync+0x4");
    assert_eq!(
        by_offset["at"],
        LinkVa(end("start") + 4).to_string().as_str()
    );
    for same in [
        "vfs_fsync+4".to_owned(),
        "vfs_fsync+0x4/0x80".to_owned(),
        format!("{:#x}", end("start") + 4),
        format!("{:x}", end("start") + 4),
    ] {
        assert_eq!(said(&same), by_offset, "{same}");
    }
    let text = explain(bundle(), "vfs_fsync+0x4").unwrap().text();
    assert!(text.contains("\n >  0x"), "{text}");
}

#[test]
fn a_thunk_says_who_comes_and_what_it_reports() {
    let said = said("return_cfi");
    assert_eq!(said["kind"], "thunk");
    assert!(said["slots"]["hardened"].as_u64().unwrap() > 10_000);
    assert!(said["slots"]["fast"].is_null());
    let rows = said["instructions"].as_array().unwrap();
    let reports = rows.iter().filter(|row| !row["reports"].is_null());
    assert_eq!(reports.count(), 1);
    assert!(
        rows.iter()
            .any(|row| row["text"].as_str().unwrap().contains("return_targets"))
    );
}

#[test]
fn a_return_that_is_no_slot_says_so() {
    // In code that must not be instrumented.
    let said = said("do_syscall_64");
    let rows = said["instructions"].as_array().unwrap();
    let left = rows.iter().filter_map(|row| row["left"].as_str());
    let left: Vec<&str> = left.collect();
    assert!(!left.is_empty());
    assert!(left.iter().all(|why| why.contains("noinstr")), "{left:?}");
}

#[test]
fn what_is_nowhere_is_refused_with_a_hint() {
    for (what, hint) in [
        ("vfs_raed", "did you mean `vfs_read`?"),
        ("0xzz", "is no address"),
        ("+0x4", "is no address"),
        ("vfs_fsync+0x9999", "lies behind it"),
        ("0xffffffffc0000000", "outside the kernel's text"),
        (
            "no_such_thing_as_this_at_all_in_any_kernel",
            "hardener inspect",
        ),
    ] {
        let message = refused(what);
        assert!(message.contains(hint), "{what}: {message}");
    }
    let table = &bundle().manifest.cave.tables[0];
    let message = refused(&table.range.start.to_string());
    assert!(
        message.contains(&format!("table `{}`", table.name)),
        "{message}"
    );
    // Several static functions have one name: each can be asked for by its address.
    let mut last = None;
    let symbols = &bundle().symbols.0;
    let mut names: Vec<&str> = symbols.iter().map(|symbol| symbol.name.as_str()).collect();
    names.sort_unstable();
    let twice = names
        .into_iter()
        .find(|name| last.replace(*name) == Some(*name))
        .unwrap();
    let message = refused(twice);
    let at = message.rsplit(' ').next().unwrap();
    let names = said(at);
    let aliases = names["aliases"].as_array();
    let known = aliases.is_some_and(|all| all.iter().any(|name| name == twice));
    assert!(names["name"] == twice || known, "{names}");
}

#[test]
fn a_bundle_is_itself_and_a_recipe_changes_what_it_says() {
    let same = diff(bundle(), bundle()).unwrap();
    assert!(same.same());
    assert_eq!(same.text(), "the bundles are the same\n");
    let other = emitted("schema = 1\n[pass.return-cfi]\non-violation = \"log\"\n");
    let difference = diff(bundle(), &other).unwrap();
    assert!(!difference.same());
    let json: Value = serde_json::from_str(&difference.json()).unwrap();
    let action = &json["facts"]["hardened.return-cfi.on-violation"];
    assert_eq!((&action[0], &action[1]), (&"kill".into(), &"log".into()));
    // Both return thunks differ; that the others and all slots moved is no difference.
    assert_eq!(json["thunks"]["changed"], 2);
    assert_eq!(json["sites"]["hardened"]["changed"], 0);
    assert!(json["sites"]["hardened"]["same"].as_u64().unwrap() > 50_000);
    assert_eq!(json["tables"]["return_targets"]["only_a"], 0);
}

#[test]
fn a_slot_and_a_table_that_lack_something_are_named() {
    let mut other = bundle().clone();
    let hardened = other
        .manifest
        .variants
        .iter()
        .position(|one| one.name == "hardened");
    let dropped = other.edits[hardened.unwrap()].0.remove(7);
    let at = LinkVa(other.manifest.text.start.0 + u64::from(dropped.at.0));
    let difference = diff(bundle(), &other).unwrap();
    let json: Value = serde_json::from_str(&difference.json()).unwrap();
    let sites = &json["sites"]["hardened"];
    assert_eq!((&sites["only_a"], &sites["only_b"]), (&1.into(), &0.into()));
    let what = sites["first"][0]["what"].as_str().unwrap();
    assert!(what.starts_with(&at.to_string()), "{what}");
    assert!(difference.text().contains(what));
}

#[test]
fn two_kernels_are_compared_by_their_functions() {
    let path = common::cloud_backports();
    let other = emit(path, &Recipe::default(), &mut |_| {}).unwrap();
    let json = diff(bundle(), &other).unwrap().json();
    let json: Value = serde_json::from_str(&json).unwrap();
    assert!(
        json["facts"]["kernel.release"][1]
            .as_str()
            .unwrap()
            .starts_with("6.12.")
    );
    let functions = &json["functions"];
    // Some code has not changed in between, wherever it lies now.
    assert!(functions["same"].as_u64().unwrap() > 1000, "{functions}");
    assert!(functions["only_b"].as_u64().unwrap() > 1000, "{functions}");
    assert_eq!(json["sites"].as_object().unwrap().len(), 0);
}
