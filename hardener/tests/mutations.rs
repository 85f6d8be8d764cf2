//! Readers of hostile input, fed with real files in which a few bytes are wrong: none panics, and what is still accepted can be
//! worked with. Seeded, so that a run that fails can be repeated.
#![allow(missing_docs, reason = "a test")]

mod common;

use fastrand::Rng;
use hardener::emit::emit;
use hardener::image::{Image, unpacked};
use hardener::presets;
use hardener::recipe::Recipe;
use hardener::text::{Text, model};
use penumbra_bundle::{Bundle, MANIFEST};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ops::Range;

/// Values that readers of lengths and offsets stumble over.
const AWKWARD: [u32; 8] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
];

/// Changes a few bytes of `bytes` in `range`.
fn spoil(rng: &mut Rng, bytes: &mut [u8], range: Range<usize>) {
    for _ in 0..rng.usize(1..4) {
        let at = rng.usize(range.clone());
        match rng.u8(0..4) {
            0 => bytes[at] ^= 1 << rng.u8(0..8),
            1 => bytes[at] = rng.u8(..),
            _ => {
                let word = AWKWARD[rng.usize(0..AWKWARD.len())].to_le_bytes();
                let end = (at + 4).min(range.end);
                bytes[at..end].copy_from_slice(&word[..end - at]);
            }
        }
    }
}

#[test]
fn a_spoilt_recipe_is_refused_or_says_again_what_it_says() {
    let mut rng = Rng::with_seed(1);
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let preset = &presets::ALL[rng.usize(0..presets::ALL.len())];
        let mut text = preset.text.as_bytes().to_vec();
        let len = text.len();
        spoil(&mut rng, &mut text, 0..len);
        if rng.bool() {
            text.truncate(rng.usize(0..len));
        }
        match Recipe::parse("r", &text) {
            Ok(recipe) => {
                let again = Recipe::parse("r", recipe.to_string().as_bytes()).unwrap();
                assert_eq!(again, recipe);
                taken += 1;
            }
            Err(error) => {
                assert!(error.to_string().starts_with("r:"), "{error}");
                refused += 1;
            }
        }
    }
    assert!(
        taken > 100 && refused > 1000,
        "{taken} taken, {refused} refused"
    );
}

#[test]
fn a_profile_whose_name_has_two_lines_is_named_again() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a\n\"b\".txt"), "a b 1\n").unwrap();
    let text = b"schema = 1\n[pass.promote]\nprofile = \"a\\n\\\"b\\\".txt\"\n";
    let file = folder.path().join("recipe.toml");
    let file = file.to_str().unwrap();
    let recipe = Recipe::parse(file, text).unwrap_or_else(|error| panic!("{error}"));
    let again = Recipe::parse(file, recipe.to_string().as_bytes());
    assert_eq!(again.unwrap_or_else(|error| panic!("{error}")), recipe);
}

#[test]
fn a_spoilt_bundle_is_refused_or_can_be_told_about() {
    let mut bundle = emit(common::cloud(), &Recipe::default(), &mut |_| {}).unwrap();
    let files = bundle.seal();
    assert!(Bundle::from_files(&files).is_ok());
    let names: Vec<String> = files.keys().cloned().collect();
    let hex = |bytes: &[u8]| -> String {
        let digest = Sha256::digest(bytes);
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    let mut rng = Rng::with_seed(2);
    let (mut taken, mut refused) = (0, 0);
    for round in 0..48 {
        let mut files: BTreeMap<String, Vec<u8>> = files.clone();
        // The text is bytes to the reader; every other round spoils the manifest.
        let spoilt = match round % 2 {
            0 => MANIFEST.to_owned(),
            _ => names[rng.usize(0..names.len())].clone(),
        };
        let file = files.get_mut(&spoilt).unwrap();
        let before = hex(file);
        let len = file.len();
        spoil(&mut rng, file, 0..len);
        let after = hex(file);
        let manifest = files.get_mut(MANIFEST).unwrap();
        // As one would do who wants the file to be read.
        let text = String::from_utf8_lossy(manifest).replace(&before, &after);
        *manifest = text.into_bytes();
        match Bundle::from_files(&files) {
            Ok(bundle) => {
                if let Ok(report) = hardener::report::report(&bundle) {
                    assert!(!report.json().is_empty());
                }
                taken += 1;
            }
            Err(_) => refused += 1,
        }
    }
    assert!(
        taken > 0 && refused > 10,
        "{taken} taken, {refused} refused"
    );
}

/// Goes through all that `emit` reads of an image; whether it was taken.
fn read(file: Vec<u8>) -> Result<(), String> {
    let image = Image::parse(file).map_err(|fault| fault.to_string())?;
    let tables = image.tables().map_err(|fault| fault.to_string())?;
    let text = Text::analyse(&image, &tables).map_err(|error| error.to_string())?;
    model::build(&image, &tables, text.span).map_err(|error| error.to_string())?;
    Ok(())
}

#[test]
fn a_spoilt_kernel_is_refused_or_read_whole() {
    let file = std::fs::read(common::cloud()).unwrap();
    let elf = unpacked(file).unwrap();
    let sound = Image::parse(elf.clone()).unwrap();
    let mut rng = Rng::with_seed(3);
    let file_of = |name: &str| sound.section(name).unwrap().file.clone();
    let end = |range: Range<usize>, len: usize| range.end.saturating_sub(len)..range.end;
    let sections = elf.len() - sound.relocs.abs64.len() * 4;
    // What is structure, each with how often: headers, types, symbols, tables, relocations.
    let places = [
        (0..0x200, 4),
        (file_of(".BTF"), 4),
        (file_of(".rodata"), 3),
        (file_of(".altinstructions"), 2),
        (file_of(".parainstructions"), 2),
        (file_of(".return_sites"), 2),
        (file_of(".retpoline_sites"), 2),
        (file_of("__ex_table"), 2),
        (file_of(".notes"), 2),
        (end(sections..elf.len(), 4096), 2),
    ];
    let (mut taken, mut refused) = (0, Vec::new());
    for (range, times) in places {
        for _ in 0..times {
            let mut spoilt = elf.clone();
            spoil(&mut rng, &mut spoilt, range.clone());
            match read(spoilt) {
                Ok(()) => taken += 1,
                Err(why) => refused.push(why),
            }
        }
    }
    println!("{taken} taken, refused: {refused:#?}");
    assert!(
        taken > 0 && refused.len() > 3,
        "{taken} taken, {refused:#?}"
    );
}

#[test]
fn a_spoilt_vmlinuz_is_refused_or_read_whole() {
    let file = std::fs::read(common::cloud()).unwrap();
    let mut rng = Rng::with_seed(4);
    let mut refused = 0;
    for round in 0..12 {
        let mut spoilt = file.clone();
        let len = spoilt.len();
        // The header, then anything: most of it is the packed kernel.
        let range = if round % 2 == 0 { 0x1f0..0x290 } else { 0..len };
        spoil(&mut rng, &mut spoilt, range);
        refused += u32::from(read(spoilt).is_err());
    }
    assert!(refused > 2, "{refused}");
}
