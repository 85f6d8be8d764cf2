//! Returns behind indirect calls by class: proved, and each fault in claims, table and thunks is caught.

use super::{made, place_in_file, said_of};
use hardener::check::Checker;
use penumbra_bundle::{BackwardSets, Bundle, SlotKind, TableKind, TextOff};
use std::sync::OnceLock;

const BY_CLASS: &str =
    "schema = 1\n[pass.forward-cfi]\npolicy = \"typed\"\n[pass.return-cfi]\npolicy = \"class\"\n";

fn real() -> &'static (Checker, Bundle) {
    static REAL: OnceLock<(Checker, Bundle)> = OnceLock::new();
    REAL.get_or_init(|| made(BY_CLASS))
}

fn said(break_it: impl FnOnce(&mut Bundle)) -> String {
    said_of(real(), break_it)
}

fn claims(bundle: &mut Bundle) -> &mut BackwardSets {
    bundle.backward.as_mut().unwrap()
}

/// A call through a retpoline that reaches only functions which are listed, where it returns to, and one of them.
fn narrow(bundle: &Bundle) -> (TextOff, TextOff) {
    let forward = bundle.forward.as_ref().unwrap();
    let claims = bundle.backward.as_ref().unwrap();
    let edits = &bundle.variant("hardened").unwrap().1.0;
    let calls = edits.iter().filter(|edit| {
        let opcode = edit.bytes[edit.bytes.len() - 5];
        edit.slot == SlotKind::Indirect && opcode == 0xe8
    });
    let found = calls.filter_map(|edit| {
        let behind = TextOff(edit.at.0 + edit.bytes.len() as u32);
        let class = forward.class_at(edit.at)?;
        let known = class.by == "functions" && claims.any.binary_search(&behind).is_err();
        let mut reached = class.entries.iter().filter(|_| known);
        let one = reached.find(|at| claims.class_of(**at).is_some())?;
        Some((behind, *one))
    });
    let found: Vec<_> = found.collect();
    found[found.len() / 2]
}

#[test]
fn they_are_proved_and_functions_return_to_few_places() {
    let (_, bundle) = real();
    assert_eq!(said(|_| {}), "");
    let claims = bundle.backward.as_ref().unwrap();
    // Without classes every function that an indirect call may reach returns to each of 18,107 places.
    assert!(claims.any.len() < 12_500, "{}", claims.any.len());
    assert!(claims.classes.len() > 20, "{}", claims.classes.len());
    assert!(claims.functions.len() > 200, "{}", claims.functions.len());
}

#[test]
fn a_function_returns_behind_what_calls_it_and_few_others_do() {
    let (_, bundle) = real();
    let claims = bundle.backward.as_ref().unwrap();
    let (behind, function) = narrow(bundle);
    let class = claims.class_of(function).unwrap();
    assert!(claims.classes[class as usize].contains(&behind));
    let holds = claims
        .classes
        .iter()
        .filter(|class| class.contains(&behind));
    assert!(holds.count() * 4 < claims.classes.len());
}

#[test]
fn a_class_without_a_place_is_caught() {
    let (_, bundle) = real();
    let (place, function) = narrow(bundle);
    let said = said(|bundle| {
        let claims = claims(bundle);
        let class = claims.class_of(function).unwrap();
        claims.classes[class as usize].retain(|at| *at != place);
    });
    let start = bundle.manifest.text.start.0 + u64::from(function.0);
    let missing = format!(
        "is behind a call that may reach the function at {start:#x}, which is not claimed to return there"
    );
    assert!(said.contains(&missing), "{said}");
    assert!(
        said.contains("is passed, though no call that gets there returns to it"),
        "{said}"
    );
}

#[test]
fn a_call_that_may_reach_anything_and_is_not_claimed_so_is_caught() {
    let said = said(|bundle| _ = claims(bundle).any.pop());
    assert!(
        said.contains("is behind a call that may reach anything, and not everything"),
        "{said}"
    );
}

#[test]
fn a_place_behind_no_indirect_call_is_caught() {
    let said = said(|bundle| {
        let last = claims(bundle).classes[0].last_mut().unwrap();
        last.0 += 1;
    });
    assert!(
        said.contains("is claimed to be behind an indirect call, and is not"),
        "{said}"
    );
}

#[test]
fn a_function_in_another_class_is_caught() {
    let said = said(|bundle| {
        let (_, function) = narrow(bundle);
        let claims = claims(bundle);
        let classes = claims.classes.len() as u32;
        let mut functions = claims.functions.iter_mut();
        let own = functions.find(|one| one.at == function).unwrap();
        own.class = (own.class + 1) % classes;
    });
    assert!(
        said.contains("which is not claimed to return there"),
        "{said}"
    );
}

#[test]
fn a_function_that_no_indirect_call_reaches_is_caught() {
    let said = said(|bundle| {
        let forward = bundle.forward.as_ref().unwrap();
        let symbols = bundle.symbols.0.iter().map(|symbol| symbol.at);
        let claims = bundle.backward.as_ref().unwrap();
        let all = &forward.classes[0].entries;
        let never = symbols.filter(|at| all.binary_search(at).is_err());
        let mut never = never.filter(|at| claims.class_of(*at).is_none());
        let one = never.next().unwrap();
        let functions = &mut bundle.backward.as_mut().unwrap().functions;
        let place = functions.partition_point(|function| function.at < one);
        functions.insert(
            place,
            penumbra_bundle::BackwardFunction { at: one, class: 0 },
        );
    });
    assert!(said.contains("and none reaches it"), "{said}");
}

#[test]
fn claims_that_are_not_there_are_caught() {
    let said = said(|bundle| {
        bundle.backward = None;
        bundle.manifest.backward = None;
    });
    assert!(
        said.contains("it is no thunk for direct calls only, nor one for indirect calls"),
        "{said}"
    );
}

#[test]
fn a_table_that_lost_a_place_is_caught() {
    let (behind, _) = narrow(&real().1);
    let said = said(|bundle| {
        let mut tables = bundle.manifest.cave.tables.iter_mut();
        let table = tables.find(|table| table.name == "indirect_return_classes");
        let table = table.unwrap();
        let TableKind::HashedClasses { offset_bits } = table.kind else {
            panic!("{:?}", table.kind);
        };
        let range = table.range;
        let place = place_in_file(bundle, range.start.0);
        let mut lost = 0;
        for word in bundle.cave[place..place + range.len() as usize].chunks_exact_mut(4) {
            let value = u32::from_le_bytes(word.try_into().unwrap());
            if value & ((1 << offset_bits) - 1) == behind.0 {
                word.fill(0xff);
                lost += 1;
            }
        }
        assert!(lost > 0);
        let mut tables = bundle.manifest.cave.tables.iter_mut();
        let table = tables.find(|table| table.range == range).unwrap();
        table.count -= lost;
    });
    assert!(
        said.contains("is killed, though a call that gets there returns to it"),
        "{said}"
    );
}
