//! The running text of a real kernel explains, and stops explaining when one byte changes.
//!
//! Needs a dump of a booted kernel and the bundle for it, which `tests/run` makes, so a feature of its own asks for it:
//! `PENUMBRA_DUMP=kaslr.json PENUMBRA_BUNDLE=bundle cargo test -p installer --features dump --test explain_dump`.
//! The JSON has the `slide`; beside it `kaslr.full.bin` is the memory from the text's start on.

use installer::guest::explain::{self, ExplainError, ReturnForm};
use installer::guest::{Explained, Slide};
use installer::views::cave::CaveImage;
use installer::views::pages;
use penumbra_bundle::{Bundle, SiteKind};
use std::env;
use std::fs;
use std::path::PathBuf;

struct Dump {
    bundle: Bundle,
    slide: Slide,
    running: Vec<u8>,
}

fn dump() -> Dump {
    let path =
        |name| PathBuf::from(env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")));
    let (path, bundle) = (path("PENUMBRA_DUMP"), path("PENUMBRA_BUNDLE"));
    let text = fs::read_to_string(&path).expect("PENUMBRA_DUMP names a file");
    let json: serde_json::Value = serde_json::from_str(&text).expect("the dump's JSON");
    let slide = json["slide"].as_str().expect("a slide");
    let slide = u64::from_str_radix(slide.trim_start_matches("0x"), 16).expect("a number");
    let bundle = Bundle::read_dir(&bundle).expect("the bundle reads");
    let mut running = fs::read(path.with_extension("full.bin")).expect("the dump");
    running.truncate(bundle.text.len());
    Dump {
        bundle,
        slide: Slide(slide),
        running,
    }
}

fn explain(dump: &Dump) -> Result<Explained, ExplainError> {
    let expected = explain::expected(&dump.bundle, dump.slide);
    explain::explain(&dump.bundle, dump.slide, &expected, &dump.running, None)
}

#[test]
fn every_byte_explains() {
    let dump = dump();
    let explained = explain(&dump).unwrap_or_else(|error| panic!("{error}"));
    println!("{explained:?}");
    let total: u64 = explained.changed.values().sum();
    assert!(
        total > 100_000,
        "a booted kernel has changed its text: {total}"
    );
    assert!(explained.changed[&SiteKind::Fentry] > 0);
    assert!(!explained.cave_in_use);
}

#[test]
fn one_changed_byte_is_found_and_named() {
    let mut dump = dump();
    // A byte that no site covers, in the middle of the text.
    let middle = dump.running.len() / 4;
    let covered = |at: usize| {
        dump.bundle.model.sites.iter().any(|site| {
            let start = site.at.0 as usize;
            (start..start + usize::from(site.len)).contains(&at)
        })
    };
    let at = (middle..)
        .find(|at| !covered(*at))
        .expect("some byte is plain");
    dump.running[at] ^= 0x10;
    let Err(ExplainError::Unexplained(ranges)) = explain(&dump) else {
        panic!("the changed byte at {at:#x} was not found");
    };
    assert_eq!(ranges.len(), 1);
    assert_eq!((ranges[0].len, ranges[0].page), (1, at / 4096));
    assert_eq!(
        ranges[0].symbol,
        explain::symbol(&dump.bundle, penumbra_bundle::TextOff(at as u32))
    );
}

#[test]
fn a_call_to_the_middle_of_a_function_is_found() {
    let mut dump = dump();
    // A NOP of which only the first byte became a call: what a torn text poke looks like.
    let at = dump
        .bundle
        .model
        .sites
        .iter()
        .find(|site| site.kind == SiteKind::StaticCall)
        .expect("static calls")
        .at
        .0 as usize;
    dump.running[at..at + 5].copy_from_slice(&[0xe8, 0x1f, 0x44, 0, 0]);
    assert!(
        explain(&dump).is_err(),
        "a call to text+{:#x}",
        at + 5 + 0x441f
    );
}

#[test]
fn tracing_is_explained() {
    let mut dump = dump();
    // What ftrace writes at a function's entry: a call to its own entry points, which are in the text.
    for name in ["ftrace_caller", "ftrace_regs_caller"] {
        let symbols = &dump.bundle.symbols.0;
        let to = symbols
            .iter()
            .find(|symbol| symbol.name == name)
            .expect(name)
            .at
            .0;
        let site = dump
            .bundle
            .model
            .sites
            .iter()
            .find(|site| site.kind == SiteKind::Fentry);
        let at = site.expect("fentry sites").at.0;
        let rel = to.wrapping_sub(at + 5).to_le_bytes();
        dump.running[at as usize] = 0xe8;
        dump.running[at as usize + 1..at as usize + 5].copy_from_slice(&rel);
        explain(&dump).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn retpolines_off_is_recognised() {
    let mut dump = dump();
    for site in &dump.bundle.model.sites {
        if site.kind == SiteKind::Retpoline {
            let at = site.at.0 as usize;
            dump.running[at..at + 5].copy_from_slice(&[0xff, 0xd0, 0x0f, 0x1f, 0x00]);
        }
    }
    let error = explain(&dump).expect_err("retpolines are off");
    assert!(
        matches!(error, ExplainError::RetpolinesOff { .. }),
        "{error}"
    );
}

#[test]
fn every_view_can_be_built() {
    let dump = dump();
    let returns = explain(&dump).expect("explained").returns;
    assert_eq!(
        returns,
        explain::return_form(&dump.bundle, &dump.running).unwrap()
    );
    let cave = CaveImage::new(&dump.bundle, dump.slide, returns).expect("a cave");
    let mut running = dump.running.clone();
    running[cave.at.0 as usize..][..cave.bytes.len()].copy_from_slice(&cave.bytes);
    let expected = explain::expected(&dump.bundle, dump.slide);
    for (variant, edits) in dump.bundle.manifest.variants.iter().zip(&dump.bundle.edits) {
        let pages = pages::build(&dump.bundle, &variant.name, edits, &running, &expected)
            .unwrap_or_else(|error| panic!("{error}"));
        println!(
            "{}: {} pages, {} edits",
            variant.name,
            pages.len(),
            edits.0.len()
        );
        // Stock differs in the page of `module-free` alone, the others in many.
        assert_eq!(pages.len() == 1, variant.name == "stock");
    }
    // With its own cave in place the text still explains, and says so.
    let again = explain::explain(
        &dump.bundle,
        dump.slide,
        &expected,
        &running,
        Some((cave.at, &cave.bytes)),
    );
    assert!(again.expect("explained").cave_in_use);
    assert!(matches!(returns, ReturnForm::Ret | ReturnForm::Jump(_)));
}
