//! A real bundle in small: the first pages of its text, and a cave of one page.

use crate::elf::{self, Part};
use crate::files::FILES;
use goblin::elf::Elf;
use penumbra_bundle::{Bundle, LinkVa, MANIFEST, TextOff, VaRange};

const PAGE: u64 = 4096;
/// Pages of text before the cave's.
const PAGES: u64 = 3;

/// Cuts `bundle` and writes it as one input of the target.
pub fn cut(mut bundle: Bundle) -> Vec<u8> {
    let start = bundle.manifest.text.start.0;
    let len = PAGES * PAGE;
    let range = VaRange {
        start: LinkVa(start + len),
        end: LinkVa(start + len + PAGE),
    };
    let inside = |at: &TextOff| u64::from(at.0) + 32 < len;
    let covered = |covers: VaRange| VaRange {
        start: covers.start,
        end: covers.end.min(range.end),
    };
    let manifest = &mut bundle.manifest;
    bundle.text.truncate(len as usize);
    bundle
        .text
        .resize((len + PAGE) as usize, manifest.cave.filler);
    manifest.text.end = range.end;
    let model = &mut bundle.model;
    for list in [
        &mut model.abs32,
        &mut model.inverse32,
        &mut model.abs64,
        &mut model.functions,
        &mut model.return_thunks,
    ] {
        list.retain(inside);
    }
    model.sites.retain(|site| inside(&site.at));
    bundle.symbols.0.retain(|symbol| inside(&symbol.at));
    for edits in &mut bundle.edits {
        edits.0.retain(|edit| inside(&edit.at));
    }
    if let Some(forward) = &mut bundle.forward {
        forward.sites.retain(|site| inside(&site.at));
        forward.patched.retain(|site| inside(&site.at));
        forward
            .classes
            .iter_mut()
            .for_each(|class| class.entries.retain(inside));
        let last = forward
            .sites
            .iter()
            .chain(&forward.patched)
            .map(|site| site.class as usize + 1)
            .max()
            .unwrap_or(0);
        forward.classes.truncate(last);
        forward.doubts.retain(|doubt| inside(&doubt.at));
    }
    if let Some(backward) = &mut bundle.backward {
        backward.any.retain(inside);
        backward.functions.retain(|function| inside(&function.at));
        let classes = backward.classes.iter_mut();
        classes.for_each(|class| class.retain(inside));
    }
    let cave = &mut manifest.cave;
    bundle.cave = small_cave(&bundle.cave, range);
    cave.return_tails.truncate(2);
    cave.tables.truncate(6);
    cave.traps.truncate(6);
    let place = |n: usize| LinkVa(range.start.0 + 64 * n as u64);
    bundle.relocs.truncate(4);
    for (n, reloc) in bundle.relocs.iter_mut().enumerate() {
        reloc.at = TextOff((place(n).0 - manifest.text.start.0) as u32);
    }
    for (n, tail) in cave.return_tails.iter_mut().enumerate() {
        *tail = place(n);
    }
    for (n, trap) in cave.traps.iter_mut().enumerate() {
        trap.at = place(n);
    }
    for (n, table) in cave.tables.iter_mut().enumerate() {
        let len = table.range.len().min(64);
        table.range = VaRange {
            start: place(n + 8),
            end: LinkVa(place(n + 8).0 + len),
        };
        table.covers = covered(table.covers);
        table.count = table.count.min(len);
    }
    cave.range = range;
    let files = bundle.seal();
    Bundle::from_files(&files).expect("what is cut is a bundle");
    let mut manifest = String::from_utf8(files[MANIFEST].clone()).expect("JSON");
    let mut parts = Vec::new();
    for name in FILES {
        let bytes = files.get(name).cloned().unwrap_or_default();
        let key = format!("\"name\": \"{name}\",");
        // The target puts the digest of what it is given there.
        if let Some(at) = manifest.find(&key) {
            let from = at
                + manifest[at..]
                    .find("\"sha256\": \"")
                    .expect("the digest follows")
                + 11;
            manifest.replace_range(from..from + 64, &format!("<{name}>"));
        }
        parts.push(bytes);
    }
    parts.insert(0, manifest.into_bytes());
    crate::join(&parts)
}

/// The first thunks of a cave, at the start of `range`.
fn small_cave(cave: &[u8], range: VaRange) -> Vec<u8> {
    let elf = Elf::parse(cave).expect("a bundle's cave");
    let code = elf
        .program_headers
        .iter()
        .rfind(|header| header.is_executable())
        .expect("it has code");
    let bytes = cave[code.file_range()]
        .iter()
        .take(PAGE as usize)
        .copied()
        .collect();
    let names = elf
        .syms
        .iter()
        .filter(|symbol| symbol.is_function() && symbol.st_size > 0)
        .filter_map(|symbol| {
            let at = symbol.st_value.checked_sub(code.p_vaddr)?;
            let name = elf.strtab.get_at(symbol.st_name)?.to_owned();
            (at + symbol.st_size < PAGE).then_some((range.start.0 + at, symbol.st_size, name))
        });
    let part = Part {
        name: ".thunks".to_owned(),
        at: range.start.0,
        bytes,
        size: PAGE,
        exec: true,
    };
    elf::write(&[part], &names.collect::<Vec<_>>())
}
