//! What other tools have written into Debian's 6.12 kernels, against what is found without it: objtool's list of functions
//! that nobody calls indirectly (`.ibt_endbr_seal`), and its list of direct calls (`.call_sites`).
#![allow(missing_docs, reason = "a test")]

mod common;

use hardener::image::Image;
use hardener::text::Text;
use penumbra_bundle::{LinkVa, TextOff};
use std::collections::BTreeSet;
use std::path::Path;

const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];

fn read(path: &Path) -> (Image, Text) {
    let image = Image::open(path).unwrap_or_else(|error| panic!("{error}"));
    let text = Text::analyse(&image, &image.tables().unwrap()).unwrap();
    (image, text)
}

/// The places in the text to which a section of 32-bit distances points.
fn pointed_to(image: &Image, text: &Text, section: &str) -> BTreeSet<TextOff> {
    let start = image.section(section).expect("the section").range.start;
    let words = image.section_bytes(section).unwrap().chunks_exact(4);
    let places = words.enumerate().map(|(n, word)| {
        let distance = i32::from_le_bytes(word.try_into().unwrap());
        LinkVa((start.0 + 4 * n as u64).wrapping_add_signed(i64::from(distance)))
    });
    places.filter_map(|va| text.span.offset(va)).collect()
}

/// Per mille of `of` that `part` is.
fn share(part: usize, of: usize) -> usize {
    part * 1000 / of.max(1)
}

fn address_taken(path: &Path) {
    let (image, text) = read(path);
    let sealed = pointed_to(&image, &text, ".ibt_endbr_seal");
    let code = image.symbols.iter().filter(|symbol| symbol.is_code());
    let named: BTreeSet<TextOff> = code
        .filter_map(|symbol| text.span.offset(symbol.va))
        .collect();
    let has_endbr =
        |at: &&TextOff| text.bytes.get(at.0 as usize..at.0 as usize + 4) == Some(&ENDBR64);
    let callable = |at: &&TextOff| !text.regions.never_called_indirectly(text.va(**at));
    let open: BTreeSet<TextOff> = named
        .iter()
        .filter(has_endbr)
        .filter(callable)
        .filter(|at| !sealed.contains(at))
        .copied()
        .collect();
    let landings: BTreeSet<TextOff> = text.landings.iter().copied().collect();
    let taken: BTreeSet<TextOff> = text.entries.iter().copied().collect();
    let taken: BTreeSet<TextOff> = taken.difference(&landings).copied().collect();
    let both = open.intersection(&taken).count();
    // A function without ENDBR64 cannot be called indirectly with IBT on; objtool says nothing about it.
    let without = taken.iter().filter(|at| !has_endbr(at)).count();
    let wrongly: Vec<&TextOff> = taken.iter().filter(|at| sealed.contains(at)).collect();
    println!(
        "{}: {} named functions with an open ENDBR64, {} with their address taken; {both} in both, {} only open, {} only taken \
         ({without} without ENDBR64, {} sealed)",
        path.display(),
        open.len(),
        taken.len(),
        open.len() - both,
        taken.len() - both,
        wrongly.len(),
    );
    assert!(open.len() > 20_000, "{}", open.len());
    assert!(share(both, open.len()) >= 999, "{both} of {}", open.len());
    assert_eq!(landings.len(), open.len() - both);
    assert_eq!(both + without + wrongly.len(), taken.len());
}

fn return_sites(path: &Path) {
    let (image, text) = read(path);
    let after = |at: &TextOff| TextOff(at.0 + 5);
    let listed = pointed_to(&image, &text, ".call_sites");
    // Nothing returns into the kernel's own thunks but by speculation.
    let real = listed
        .iter()
        .filter(|at| !text.regions.is_x86_thunk(text.va(**at)));
    let listed: BTreeSet<TextOff> = real.map(after).collect();
    let found: BTreeSet<TextOff> = text.return_targets.iter().copied().collect();
    let both = listed.intersection(&found).count();
    // Behind direct calls of 5 bytes, without a prefix.
    let direct = text
        .sweep
        .calls
        .iter()
        .filter(|call| text.bytes[call.at.0 as usize] == 0xe8 && found.contains(&call.end));
    let direct: BTreeSet<TextOff> = direct.map(|call| call.end).collect();
    let unlisted = direct.difference(&listed).count();
    println!(
        "{}: .call_sites has {} calls, {both} of whose return sites are found; {} direct calls found, {unlisted} of which are \
         not in .call_sites",
        path.display(),
        listed.len(),
        direct.len(),
    );
    assert!(listed.len() > 200_000, "{}", listed.len());
    assert_eq!(both, listed.len());
    assert!(share(unlisted, direct.len()) <= 60, "{unlisted}");
}

#[test]
fn functions_with_their_address_taken_are_those_that_objtool_leaves_unsealed() {
    address_taken(common::cloud_backports());
    address_taken(common::amd64_backports());
}

#[test]
fn every_call_that_objtool_lists_has_its_return_site() {
    return_sites(common::cloud_backports());
    return_sites(common::amd64_backports());
}
