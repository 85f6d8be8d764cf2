//! What `report` says of Debian's cloud kernel.
#![allow(missing_docs, reason = "a test")]

mod common;

use hardener::emit::emit;
use hardener::recipe::Recipe;
use hardener::report::report;
use penumbra_bundle::{Bundle, SlotKind};
use serde_json::Value;
use std::collections::BTreeSet;
use std::sync::OnceLock;

fn bundle() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| emit(common::cloud(), &Recipe::default(), &mut |_| {}).unwrap())
}

fn figures(bundle: &Bundle) -> Value {
    serde_json::from_str(&report(bundle).unwrap().json()).unwrap()
}

fn sum(list: &Value, number: impl Fn(&Value) -> u64) -> u64 {
    list.as_array().unwrap().iter().map(number).sum()
}

#[test]
fn each_slot_stands_once_in_the_sections_and_once_in_the_map() {
    let said = figures(bundle());
    let mut slots = BTreeSet::new();
    for edits in &bundle().edits {
        slots.extend(edits.0.iter().map(|edit| (edit.slot, edit.at)));
    }
    for (kind, name) in [
        (SlotKind::Call, "calls"),
        (SlotKind::Return, "returns"),
        (SlotKind::Indirect, "indirect"),
    ] {
        let there = slots.iter().filter(|(slot, _)| *slot == kind).count() as u64;
        let said = sum(&said["sections"], |one| {
            one["slots"][name].as_u64().unwrap()
        });
        assert_eq!(said, there, "{name}");
    }
    let cells = sum(&said["map"]["cells"], |cell| {
        cell["slots"].as_u64().unwrap()
    });
    assert_eq!(cells, slots.len() as u64);
    let named: Vec<&str> = said["sections"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["name"].as_str().unwrap())
        .collect();
    for name in [
        ".entry.text",
        ".noinstr.text",
        "thunks and tables",
        "functions",
    ] {
        assert!(named.contains(&name), "{named:?}");
    }
}

#[test]
fn where_slots_may_go_is_as_the_tables_say_or_as_the_pass_measured() {
    let of = |said: &Value, pass: &str| -> Value {
        let all = said["targets"].as_array().unwrap();
        all.iter().find(|one| one["pass"] == pass).unwrap().clone()
    };
    let tables = &bundle().manifest.cave.tables;
    let members = |names: [&str; 2]| -> u64 {
        let own = tables
            .iter()
            .filter(|table| names.contains(&table.name.as_str()));
        own.map(|table| table.count).sum()
    };
    let mut other = bundle().clone();
    // What a pass measured counts, wherever it comes from.
    for variant in &mut other.manifest.variants {
        for pass in &mut variant.passes {
            pass.figures
                .retain(|name, _| !name.starts_with("set-size."));
        }
    }
    let said = figures(&other);
    let returns = of(&said, "return-cfi");
    assert_eq!(
        returns["median"],
        members(["return_targets", "return_targets_sorted"])
    );
    let entries = members(["entries", "entries_sorted"]);
    assert_eq!(of(&said, "forward-cfi")["median"], entries);
    let hardened = other
        .manifest
        .variants
        .iter_mut()
        .find(|one| one.name == "hardened");
    let passes = &mut hardened.unwrap().passes;
    let pass = passes
        .iter_mut()
        .find(|pass| pass.name == "forward-cfi")
        .unwrap();
    pass.figures.insert("set-size.2".to_owned(), 600);
    pass.figures.insert("set-size.50".to_owned(), 400);
    let forward = of(&figures(&other), "forward-cfi");
    assert_eq!(
        (&forward["median"], &forward["p90"]),
        (&2.into(), &50.into())
    );
    assert_eq!(forward["mean"], 21.2);
}

#[test]
fn costs_are_those_of_the_thunks_that_slots_reach() {
    let said = figures(bundle());
    let costs = said["costs"].as_array().unwrap();
    let cost = |pass: &str| costs.iter().find(|cost| cost["pass"] == pass).unwrap();
    for pass in ["return-cfi", "forward-cfi"] {
        let cost = cost(pass);
        let number = |name: &str| cost[name].as_f64().unwrap();
        assert!(number("slots") > 1000.0, "{cost}");
        assert!(
            number("least") >= 1.0 && number("least") <= number("usual"),
            "{cost}"
        );
        assert!(number("usual") <= number("most"), "{cost}");
    }
    // `no-rethunk` and `no-retpoline` reach no thunk.
    assert!(
        costs
            .iter()
            .all(|cost| !cost["pass"].as_str().unwrap().starts_with("no-"))
    );
}

#[test]
fn the_page_is_whole_and_fetches_nothing() {
    let made = report(bundle()).unwrap();
    let page = made.html();
    assert_eq!(page, report(bundle()).unwrap().html());
    assert_eq!(page.matches("<svg").count(), 3);
    assert_eq!(page.matches("</svg>").count(), 3);
    assert!(page.contains("6.1.") && page.ends_with("</html>"));
    for outside in [
        "<script", "<link", "<img", "src=", "href=", "@import", "url(",
    ] {
        assert!(!page.contains(outside), "{outside}");
    }
    // Names are text, whatever is in them.
    let mut other = bundle().clone();
    other.manifest.kernel.release = "<b>&".to_owned();
    let page = report(&other).unwrap().html();
    assert!(page.contains("&lt;b&gt;&amp;") && !page.contains("<b>&"));
}
