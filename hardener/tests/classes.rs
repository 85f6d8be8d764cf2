//! Indirect branches checked by class: what is claimed is what is checked, and each fault in a claim is caught.
#![allow(missing_docs, reason = "a test")]

#[path = "classes/backward.rs"]
mod backward;
mod common;
#[path = "classes/doubts.rs"]
mod doubts;
#[path = "classes/known.rs"]
mod known;

use hardener::check::{Checker, Rule};
use hardener::recipe::Recipe;
use penumbra_bundle::{Bundle, SlotKind, TableKind, TextOff};
use std::collections::HashSet;
use std::sync::OnceLock;

const TYPED: &str = "schema = 1\n[pass.forward-cfi]\npolicy = \"typed\"\n";
const BOTH: &str = "schema = 1\n[pass.forward-cfi]\npolicy = \"typed\"\n[pass.return-cfi]\npolicy = \"function\"\n";

/// The cloud kernel's bundle by a recipe, and who proves it.
fn made(recipe: &str) -> (Checker, Bundle) {
    let recipe = Recipe::parse("recipe", recipe.as_bytes()).unwrap();
    let bundle = hardener::emit::emit(common::cloud(), &recipe, &mut |_| {}).unwrap();
    (Checker::open(common::cloud()).unwrap(), bundle)
}

fn real() -> &'static (Checker, Bundle) {
    static REAL: OnceLock<(Checker, Bundle)> = OnceLock::new();
    REAL.get_or_init(|| made(TYPED))
}

/// What the checker says about a bundle once it is broken.
fn said_of((checker, bundle): &(Checker, Bundle), break_it: impl FnOnce(&mut Bundle)) -> String {
    let mut bundle = bundle.clone();
    break_it(&mut bundle);
    let rules = [Rule::ThunkContract, Rule::ExactSets];
    let reports = checker.prove(&bundle, &rules).unwrap();
    let all = reports.iter().flat_map(|report| &report.violations);
    all.map(|violation| format!("{violation:?}\n")).collect()
}

fn said(break_it: impl FnOnce(&mut Bundle)) -> String {
    said_of(real(), break_it)
}

/// Whether what decides a class is a type, or addresses.
fn is_typed(by: &str) -> bool {
    ["functions", "prototype", "prototypes"].contains(&by)
}

fn prototype_class(bundle: &Bundle, members: usize) -> usize {
    let classes = &bundle.forward.as_ref().unwrap().classes;
    let fits = |class: &penumbra_bundle::ForwardClass| {
        class.by == "prototype" && class.entries.len() == members
    };
    classes.iter().position(fits).unwrap()
}

#[test]
fn typed_branches_are_proved() {
    assert_eq!(said(|_| {}), "");
    let claims = real().1.forward.as_ref().unwrap();
    let typed = claims
        .sites
        .iter()
        .filter(|site| is_typed(&claims.classes[site.class as usize].by));
    // The study of the same kernel typed 5,755 of 7,822; seen are 7,003 of 7,828.
    assert!(typed.count() > 6800);
}

#[test]
fn a_claim_without_one_entry_is_caught() {
    let said = said(|bundle| {
        let class = prototype_class(bundle, 3);
        let claims = bundle.forward.as_mut().unwrap();
        claims.classes[class].entries.pop();
    });
    assert!(
        said.contains("lets through something other than class"),
        "{said}"
    );
}

#[test]
fn a_claim_for_another_class_is_caught() {
    let said = said(|bundle| {
        let (two, three) = (prototype_class(bundle, 2), prototype_class(bundle, 3));
        let claims = bundle.forward.as_mut().unwrap();
        let site = claims
            .sites
            .iter_mut()
            .find(|site| site.class as usize == two)
            .unwrap();
        site.class = three as u32;
    });
    assert!(
        said.contains("lets through something other than class"),
        "{said}"
    );
}

#[test]
fn an_entry_whose_address_is_never_taken_is_caught() {
    let said = said(|bundle| {
        let class = prototype_class(bundle, 3);
        let claims = bundle.forward.as_mut().unwrap();
        let last = claims.classes[class].entries.last_mut().unwrap();
        last.0 += 1;
    });
    assert!(
        said.contains("claims an entry whose address is never taken"),
        "{said}"
    );
}

#[test]
fn a_narrow_class_said_to_be_all_entries_is_caught() {
    let said = said(|bundle| {
        let class = prototype_class(bundle, 3);
        let claims = bundle.forward.as_mut().unwrap();
        claims.classes[class].by = "address-taken".to_owned();
    });
    assert!(
        said.contains("is `address-taken` but claims 3 of"),
        "{said}"
    );
}

#[test]
fn classes_that_the_manifest_does_not_claim_are_caught() {
    let said = said(|bundle| {
        bundle.forward = None;
        bundle.manifest.forward = None;
    });
    assert!(said.contains("the manifest claims no classes"), "{said}");
}

#[test]
fn a_branch_without_a_claim_is_caught() {
    let said = said(|bundle| {
        bundle.forward.as_mut().unwrap().sites.pop();
    });
    assert!(
        said.contains("the manifest claims no class for it"),
        "{said}"
    );
}

#[test]
fn both_policies_fit_into_the_cave_of_each_kernel_and_are_proved() {
    for path in [common::cloud(), common::amd64(), common::cloud_backports()] {
        let recipe = Recipe::parse("recipe", BOTH.as_bytes()).unwrap();
        let bundle = hardener::emit::emit(path, &recipe, &mut |_| {}).unwrap();
        let checker = Checker::open(path).unwrap();
        let outcome = checker.check(&bundle, false).unwrap();
        assert!(outcome.clean, "{}", outcome.render());
        // Where functions share the code that compares, one that names another function is still caught.
        if path == common::cloud_backports() {
            let (broken, at) = named_otherwise(&bundle);
            let reports = checker.prove(&broken, &[Rule::ThunkContract, Rule::ExactSets]);
            let said = format!("{:?}", reports.unwrap());
            assert!(said.contains("is killed, though a call"), "{said}");
            assert!(said.contains("is passed, though no call"), "{said}");
            assert!(
                said.contains(&format!("the return is the one at {at:#x}")),
                "{said}"
            );
        }
    }
}

/// What the text's direct calls name, as offsets, and what looks like one.
fn named_by_calls(text: &[u8]) -> HashSet<i64> {
    let calls = text.windows(5).enumerate();
    let calls = calls.filter(|(_, bytes)| bytes[0] == 0xe8);
    let named = calls.map(|(at, bytes)| {
        let displacement = i32::from_le_bytes(bytes[1..].try_into().unwrap());
        at as i64 + 5 + i64::from(displacement)
    });
    named.collect()
}

/// The bundle with a return's thunk that has another function's address in it, and where that return is.
fn named_otherwise(bundle: &Bundle) -> (Bundle, u64) {
    let mut broken = bundle.clone();
    let start = bundle.manifest.text.start.0;
    let edits = &bundle.edits.last().unwrap().0;
    let mut shared = edits.iter().filter(|edit| edit.slot == SlotKind::Return);
    let found = shared.find_map(|edit| {
        let at = start + u64::from(edit.at.0);
        let rel = i32::from_le_bytes(edit.bytes[1..5].try_into().unwrap());
        let thunk = (at + 5).wrapping_add_signed(rel.into());
        let place = place_in_file(bundle, thunk);
        // lea callee(%rip),%r10; jmp
        let code = &bundle.cave[place..place + 8];
        (code[..3] == [0x4c, 0x8d, 0x15] && code[7] == 0xe9).then_some((at, place))
    });
    let (at, place) = found.expect("a thunk that shares code");
    // The next function that anybody calls.
    let field = &mut broken.cave[place + 3..place + 7];
    let rel = i32::from_le_bytes(field.try_into().unwrap());
    let next = bundle.symbols.0.iter().map(|symbol| i64::from(symbol.at.0));
    let thunk = edits_target(bundle, at);
    let own = thunk as i64 + 7 + i64::from(rel) - start as i64;
    let named = named_by_calls(&bundle.text);
    let called = next
        .filter(|to| *to > own && named.contains(to))
        .min()
        .unwrap();
    field.copy_from_slice(&(rel + (called - own) as i32).to_le_bytes());
    (broken, at)
}

/// Where the edit at `at` leads.
fn edits_target(bundle: &Bundle, at: u64) -> u64 {
    let off = TextOff((at - bundle.manifest.text.start.0) as u32);
    let edits = &bundle.edits.last().unwrap().0;
    let edit = edits.iter().find(|edit| edit.at == off).unwrap();
    let from = edit.bytes.len() - 4;
    let rel = i32::from_le_bytes(edit.bytes[from..].try_into().unwrap());
    (at + edit.bytes.len() as u64).wrapping_add_signed(rel.into())
}

/// Where the cave's file has what stands at `va`.
fn place_in_file(bundle: &Bundle, va: u64) -> usize {
    let elf = goblin::elf::Elf::parse(&bundle.cave).unwrap();
    let mut segments = elf.program_headers.iter();
    let segment = segments
        .find(|segment| (segment.p_vaddr..segment.p_vaddr + segment.p_filesz).contains(&va));
    let segment = segment.expect("a place in a segment");
    (segment.p_offset + va - segment.p_vaddr) as usize
}

/// The table of large classes: its place in the cave's file, its words, how many of their bits are an offset.
fn class_table(bundle: &Bundle) -> (usize, Vec<u32>, u32) {
    let mut tables = bundle.manifest.cave.tables.iter();
    let table = tables.find(|table| table.name == "classes").unwrap();
    let TableKind::HashedClasses { offset_bits } = table.kind else {
        panic!("{:?}", table.kind);
    };
    let place = place_in_file(bundle, table.range.start.0);
    let bytes = &bundle.cave[place..place + table.range.len() as usize];
    let words = bytes.chunks_exact(4);
    let words = words.map(|word| u32::from_le_bytes(word.try_into().unwrap()));
    (place, words.collect(), offset_bits)
}

/// What the checker says once the word at `index` of the table of large classes is another.
fn said_with_word(index: usize, word: u32) -> String {
    said(|bundle| {
        let (place, ..) = class_table(bundle);
        let at = place + 4 * index;
        bundle.cave[at..at + 4].copy_from_slice(&word.to_le_bytes());
    })
}

/// The number that the table has for the class with the most entries.
fn largest(words: &[u32], bits: u32) -> u32 {
    let mut sizes = std::collections::BTreeMap::<u32, usize>::new();
    for word in words.iter().filter(|word| **word != u32::MAX) {
        *sizes.entry(word >> bits).or_default() += 1;
    }
    *sizes.iter().max_by_key(|(_, size)| **size).unwrap().0
}

#[test]
fn large_classes_are_in_a_table_that_holds_exactly_their_entries() {
    let bundle = &real().1;
    let (_, words, bits) = class_table(bundle);
    let number = largest(&words, bits);
    let own = words
        .iter()
        .filter(|word| **word != u32::MAX && *word >> bits == number);
    let mut own: Vec<u32> = own.map(|word| word & ((1 << bits) - 1)).collect();
    own.sort_unstable();
    let claims = bundle.forward.as_ref().unwrap();
    let typed = claims.classes.iter().filter(|class| is_typed(&class.by));
    let class = typed.max_by_key(|class| class.entries.len()).unwrap();
    let entries: Vec<u32> = class.entries.iter().map(|at| at.0).collect();
    assert_eq!(own, entries);
    assert!(own.len() > 500, "{}", own.len());
}

#[test]
fn a_large_class_that_lost_an_entry_is_caught_with_its_branch_named() {
    let bundle = &real().1;
    let (_, words, bits) = class_table(bundle);
    let number = largest(&words, bits);
    let own = |word: &u32| *word != u32::MAX && word >> bits == number;
    let index = words.iter().position(own).unwrap();
    let said = said_with_word(index, u32::MAX);
    assert!(
        said.contains("lets through something other than class"),
        "{said}"
    );
    let claims = bundle.forward.as_ref().unwrap();
    let sizes = claims
        .classes
        .iter()
        .map(|class| match is_typed(&class.by) {
            true => class.entries.len(),
            false => 0,
        });
    let (class, _) = sizes.enumerate().max_by_key(|(_, size)| *size).unwrap();
    let site = claims
        .sites
        .iter()
        .find(|site| site.class as usize == class)
        .unwrap();
    let at = bundle.manifest.text.start.0 + u64::from(site.at.0);
    assert!(said.contains(&format!("{at:#x}")), "{at:#x}: {said}");
}

#[test]
fn a_large_class_with_an_entry_too_many_is_caught() {
    let (_, words, bits) = class_table(&real().1);
    let number = largest(&words, bits);
    let holds = |word: u32| words.contains(&word);
    // Where the first hash looks for an entry of no such class: the first part has a third of the words, or half, or two fifths.
    let part = words.len().ilog2() - 1;
    let other = words.iter().find_map(|word| {
        let key = number << bits | (word & ((1 << bits) - 1));
        let place = key.wrapping_mul(0x6a09_e667) >> (32 - part);
        let free = words[place as usize] == u32::MAX;
        (*word != u32::MAX && free && !holds(key)).then_some((place as usize, key))
    });
    let (place, key) = other.unwrap();
    let said = said_with_word(place, key);
    assert!(
        said.contains("lets through something other than class"),
        "{said}"
    );
}

/// The classes by arity of the real bundle: how many registers, the class's number.
fn arity_classes(bundle: &Bundle) -> Vec<(u8, usize)> {
    let claims = bundle.forward.as_ref().unwrap();
    let classes = claims.classes.iter().enumerate();
    let mut found: Vec<(u8, usize)> = classes
        .filter_map(|(number, class)| {
            let most = class.by.strip_prefix("arity-")?;
            Some((most.parse().unwrap(), number))
        })
        .collect();
    found.sort_unstable();
    found
}

#[test]
fn what_is_not_typed_is_checked_by_the_arguments_that_it_passes() {
    let bundle = &real().1;
    let claims = bundle.forward.as_ref().unwrap();
    let classes = arity_classes(bundle);
    assert!(classes.len() > 3, "{classes:?}");
    let entries = |class: usize| &claims.classes[class].entries;
    for pair in classes.windows(2) {
        let (fewer, more) = (entries(pair[0].1), entries(pair[1].1));
        assert!(fewer.len() < more.len());
        assert!(fewer.iter().all(|at| more.binary_search(at).is_ok()));
    }
    // ssize_t seq_read_iter(struct kiocb *, struct iov_iter *)
    let mut symbols = bundle.symbols.0.iter();
    let two = symbols.find(|symbol| symbol.name == "seq_read_iter");
    let two = two.unwrap().at;
    for (most, class) in &classes {
        assert_eq!(entries(*class).contains(&two), *most >= 2, "{most}");
    }
    let checked = claims.sites.iter();
    let checked = checked.filter(|site| {
        classes
            .iter()
            .any(|(_, class)| *class == site.class as usize)
    });
    assert!(checked.count() > 500);
}

#[test]
fn a_class_by_arity_that_lacks_an_entry_is_caught() {
    let said = said(|bundle| {
        let (_, class) = arity_classes(bundle)[0];
        let claims = bundle.forward.as_mut().unwrap();
        claims.classes[class].entries.pop();
    });
    assert!(said.contains("lacks an entry that reads no more"), "{said}");
    assert!(
        said.contains("lets through something other than class"),
        "{said}"
    );
}

#[test]
fn a_class_by_arity_with_an_entry_that_reads_more_is_caught() {
    let said = said(|bundle| {
        let classes = arity_classes(bundle);
        let (least, most) = (classes[0].1, classes[classes.len() - 1].1);
        let claims = bundle.forward.as_mut().unwrap();
        let more = claims.classes[most].entries.clone();
        claims.classes[least].entries = more;
    });
    assert!(said.contains("claims an entry that reads more"), "{said}");
}

#[test]
fn a_wrong_number_of_arguments_in_the_table_is_caught_with_the_branch_named() {
    let bundle = &real().1;
    let mut tables = bundle.manifest.cave.tables.iter();
    let table = tables.find(|table| table.name == "entry_arities").unwrap();
    assert_eq!(table.kind, TableKind::HashedArities);
    let place = place_in_file(bundle, table.range.start.0);
    let words = bundle.cave[place..place + table.range.len() as usize].chunks_exact(4);
    let words: Vec<u32> = words
        .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
        .collect();
    let classes = arity_classes(bundle);
    let (least, class) = classes[0];
    let claims = bundle.forward.as_ref().unwrap();
    let site = claims
        .sites
        .iter()
        .find(|site| site.class as usize == class);
    let at = bundle.manifest.text.start.0 + u64::from(site.unwrap().at.0);
    // One that reads more than the class passes reads nothing all at once, and the other way round.
    for (index, with) in [
        (
            words
                .iter()
                .position(|word| *word != u32::MAX && word & 7 > least.into()),
            0,
        ),
        (
            words
                .iter()
                .position(|word| *word != u32::MAX && word & 7 <= least.into()),
            6,
        ),
    ] {
        let index = index.unwrap();
        let said = said(|bundle| {
            let word = words[index] & !7 | with;
            bundle.cave[place + 4 * index..][..4].copy_from_slice(&word.to_le_bytes());
        });
        assert!(
            said.contains("lets through something other than class"),
            "{said}"
        );
        assert!(said.contains(&format!("{at:#x}")), "{at:#x}: {said}");
    }
}
