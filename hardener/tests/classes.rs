//! Indirect branches checked by class: what is claimed is what is checked, and each fault in a claim is caught.
#![allow(missing_docs, reason = "a test")]

mod common;

use hardener::check::{Checker, Rule};
use hardener::recipe::Recipe;
use penumbra_bundle::Bundle;
use std::sync::OnceLock;

const TYPED: &str = "schema = 1\n[pass.forward-cfi]\npolicy = \"typed\"\n";

fn real() -> &'static (Checker, Bundle) {
    static REAL: OnceLock<(Checker, Bundle)> = OnceLock::new();
    REAL.get_or_init(|| {
        let recipe = Recipe::parse("recipe", TYPED.as_bytes()).unwrap();
        let bundle = hardener::emit::emit(common::cloud(), &recipe, &mut |_| {}).unwrap();
        (Checker::open(common::cloud()).unwrap(), bundle)
    })
}

/// What the checker says about the bundle once it is broken.
fn said(break_it: impl FnOnce(&mut Bundle)) -> String {
    let (checker, bundle) = real();
    let mut bundle = bundle.clone();
    break_it(&mut bundle);
    let rules = [Rule::ThunkContract, Rule::ExactSets];
    let reports = checker.prove(&bundle, &rules).unwrap();
    let all = reports.iter().flat_map(|report| &report.violations);
    all.map(|violation| format!("{violation:?}\n")).collect()
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
        .filter(|site| claims.classes[site.class as usize].by != "address-taken");
    // More than the study of the same kernel typed (5,755 of 7,822).
    assert!(typed.count() > 5755);
}

/// `file_operations.read_iter` is what `vfs_read` calls: one class, in which are functions that the kernel is known to put
/// there, and none of another prototype.
#[test]
fn a_well_known_branch_reaches_what_it_should() {
    let bundle = &real().1;
    let claims = bundle.forward.as_ref().unwrap();
    let symbols = &bundle.symbols.0;
    let at = |name: &str| {
        let mut named = symbols.iter().filter(|symbol| symbol.name == name);
        named.next().unwrap().at
    };
    let from = at("vfs_read");
    let later = symbols.iter().map(|symbol| symbol.at);
    let next = later.filter(|at| *at > from).min().unwrap();
    let sites = claims.sites.iter();
    let sites = sites.filter(|site| (from..next).contains(&site.at));
    let classes = sites.map(|site| &claims.classes[site.class as usize]);
    let members = [at("seq_read_iter"), at("pipe_read")];
    let reads: Vec<_> = classes
        .filter(|class| members.iter().all(|at| class.entries.contains(at)))
        .collect();
    assert!(!reads.is_empty());
    let connect = at("inet_stream_connect");
    for class in reads {
        assert_eq!(class.by, "prototype");
        assert!(!class.entries.contains(&connect));
    }
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
