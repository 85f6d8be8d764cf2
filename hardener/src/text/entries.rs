//! Every address in the text that an indirect branch may reach: those that are taken anywhere in the image.

use super::sweep::taken_in;
use super::{Functions, Regions, Span, Sweep};
use crate::image::{Image, Tables};
use penumbra_bundle::{LinkVa, TextOff};

/// What indirect branches may reach; both lists are sorted.
pub struct Entries {
    /// All of it.
    pub all: Vec<TextOff>,
    /// What nothing in the image refers to, but an unsealed ENDBR64 names.
    pub landings: Vec<TextOff>,
}

/// Collects the addresses.
///
/// Labels inside functions are no entries: `_THIS_IP_` takes their addresses but jumps to none, and a slot whose function
/// has a table of labels (a computed goto) is no slot.
pub fn find(
    span: Span,
    image: &Image,
    tables: &Tables,
    sweep: &Sweep,
    regions: &Regions,
    functions: &Functions,
) -> Entries {
    // Absolute addresses: function pointers in data and immediates in code.
    let mut taken = pointers(image, tables);
    let sign_extended = |word: u32| LinkVa(i64::from(word as i32) as u64);
    taken.extend(
        image
            .relocs
            .abs32
            .iter()
            .filter_map(|va| image.u32_at(*va).map(sign_extended)),
    );
    // Addresses relative to the instruction pointer, in the text and in code that runs at boot.
    taken.extend(&sweep.taken);
    for section in image.sections() {
        if section.exec
            && section.name != ".text"
            && let Some(code) = image.section_bytes(&section.name)
        {
            taken.extend(taken_in(code, section.range.start));
        }
    }
    // Tables of relative addresses.
    taken.extend(&tables.exports);
    taken.extend(&tables.pci_hooks);
    taken.extend(&tables.initcalls);
    let mut found: Vec<TextOff> = taken
        .into_iter()
        .filter(|va| !regions.never_called_indirectly(*va))
        .filter_map(|va| span.offset(va))
        .filter(|at| functions.is_start(*at))
        .collect();
    found.sort_unstable();
    found.dedup();
    let mut landings = Vec::new();
    // With IBT the compiler and objtool say it: ENDBR64 that is not sealed. Weak functions that others overrode keep theirs
    // though nothing refers to them any more, but they have lost their names. What is left are functions that the kernel looks
    // up by name (BPF's destructors) and a few that it has lost its references to.
    if !tables.sealed_endbr.is_empty() {
        let mut sealed: Vec<TextOff> = tables
            .sealed_endbr
            .iter()
            .filter_map(|va| span.offset(*va))
            .collect();
        sealed.sort_unstable();
        let open = sweep
            .endbr
            .iter()
            .filter(|at| sealed.binary_search(at).is_err());
        let named = open.filter(|at| functions.is_named(**at));
        let reachable = named.filter(|at| !regions.never_called_indirectly(span.va(**at)));
        landings.extend(reachable.filter(|at| found.binary_search(at).is_err()));
        found.extend(&landings);
        found.sort_unstable();
    }
    Entries {
        all: found,
        landings,
    }
}

/// What the 64-bit absolute addresses in the image point to, without tables that only describe code.
pub fn pointers(image: &Image, tables: &Tables) -> Vec<LinkVa> {
    let silent = |va: LinkVa| tables.not_taken.iter().any(|range| range.contains(va));
    let places = image.relocs.abs64.iter().filter(|va| !silent(**va));
    places
        .filter_map(|va| image.u64_at(*va).map(LinkVa))
        .collect()
}
