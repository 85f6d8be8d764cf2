//! Where in the text the slots are.

use penumbra_bundle::{Bundle, Edit, LinkVa, SlotKind, VaRange};
use serde::Serialize;
use std::collections::BTreeMap;

/// Bytes of text for each cell of the map.
const CELL: u64 = 8 << 10;

/// Less than so many bytes between two parts is alignment.
const GAP: u64 = 64;

/// A part of the text.
#[derive(Serialize)]
pub struct Section {
    /// As the linker script calls it.
    pub name: String,
    /// Where it is.
    pub range: VaRange,
    /// Slots in it that some variant edits.
    pub slots: Slots,
}

/// Slots by kind.
#[derive(Serialize, Default, Clone, Copy)]
pub struct Slots {
    /// Direct calls.
    pub calls: u64,
    /// Returns.
    pub returns: u64,
    /// Indirect branches.
    pub indirect: u64,
}

impl Slots {
    fn count(&mut self, edit: &Edit) {
        *match edit.slot {
            SlotKind::Call => &mut self.calls,
            SlotKind::Return => &mut self.returns,
            SlotKind::Indirect => &mut self.indirect,
        } += 1;
    }

    /// All of them.
    pub fn all(&self) -> u64 {
        self.calls + self.returns + self.indirect
    }
}

/// The text, cell by cell.
#[derive(Serialize)]
pub struct Map {
    /// Bytes of text for each cell.
    pub cell_bytes: u64,
    /// Cells by address.
    pub cells: Vec<Cell>,
}

/// Some of the text.
#[derive(Serialize)]
pub struct Cell {
    /// Slots that some variant edits.
    pub slots: u64,
    /// What most of it is: code, thunks and tables, or filler.
    pub what: What,
}

/// What a cell is.
#[derive(Serialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// The kernel's code.
    Code,
    /// Thunks and tables.
    Cave,
    /// Filler.
    Filler,
}

/// Each slot once, whichever variants edit it, by address.
fn slots(bundle: &Bundle) -> Vec<&Edit> {
    let all = bundle.edits.iter().flat_map(|edits| &edits.0);
    let all: BTreeMap<_, _> = all.map(|edit| (edit.at, edit)).collect();
    all.into_values().collect()
}

/// The parts that the linker script bounds by symbols `NAME_text_start` and `NAME_text_end`, the cave, and all between.
pub fn of(bundle: &Bundle) -> Vec<Section> {
    let text = bundle.manifest.text.range();
    let va = |at: u32| LinkVa(text.start.0 + u64::from(at));
    let symbols = &bundle.symbols.0;
    let mut named: Vec<(String, VaRange)> =
        vec![("thunks and tables".to_owned(), bundle.manifest.cave.range)];
    for symbol in symbols {
        let Some(own) = symbol.name.strip_suffix("_start") else {
            continue;
        };
        let end = format!("{own}_end");
        let Some(end) = symbols.iter().find(|symbol| symbol.name == end) else {
            continue;
        };
        let name = own.trim_start_matches('_');
        if name.ends_with("text") || name.ends_with("thunk") {
            let range = VaRange {
                start: va(symbol.at.0),
                end: va(end.at.0),
            };
            named.push((format!(".{}", name.replace('_', ".")), range));
        }
    }
    named.retain(|(_, range)| !range.is_empty() && text.encloses(range));
    // What lies in another part is counted there.
    let ranges: Vec<VaRange> = named.iter().map(|(_, range)| *range).collect();
    named.retain(|(_, range)| {
        let around = |other: &VaRange| other != range && other.encloses(range);
        !ranges.iter().any(around)
    });
    named.sort_by_key(|(_, range)| range.start);
    let mut all = Vec::new();
    let mut at = text.start;
    for (name, range) in named {
        if at.0 + GAP <= range.start.0 {
            let range = VaRange {
                start: at,
                end: range.start,
            };
            all.push((filling(bundle, range).to_owned(), range));
        }
        at = at.max(range.end);
        all.push((name, range));
    }
    if at < text.end {
        let range = VaRange {
            start: at,
            end: text.end,
        };
        all.push((filling(bundle, range).to_owned(), range));
    }
    let mut sections: Vec<Section> = all
        .into_iter()
        .map(|(name, range)| Section {
            name,
            range,
            slots: Slots::default(),
        })
        .collect();
    for edit in slots(bundle) {
        let at = va(edit.at.0);
        let after = sections.partition_point(|section| section.range.start <= at);
        if let Some(section) = after.checked_sub(1).and_then(|n| sections.get_mut(n)) {
            section.slots.count(edit);
        }
    }
    sections
}

/// What a part without a name is.
fn filling(bundle: &Bundle, range: VaRange) -> &'static str {
    match code_share(bundle, range) > 10 {
        true => "functions",
        false => "filler",
    }
}

/// Per cent of `range` that is no filler.
fn code_share(bundle: &Bundle, range: VaRange) -> u64 {
    let start = (range.start.0 - bundle.manifest.text.start.0) as usize;
    let bytes = bundle.text.get(start..start + range.len() as usize);
    let bytes = bytes.unwrap_or_default();
    let filler = bundle.manifest.cave.filler;
    let code = bytes.iter().filter(|byte| **byte != filler && **byte != 0);
    code.count() as u64 * 100 / (bytes.len() as u64).max(1)
}

/// Slots for each part of the text.
pub fn map(bundle: &Bundle) -> Map {
    let text = bundle.manifest.text.range();
    let cave = bundle.manifest.cave.range;
    let starts = (text.start.0..text.end.0).step_by(CELL as usize);
    let mut cells: Vec<Cell> = starts
        .map(|start| {
            let range = VaRange {
                start: LinkVa(start),
                end: LinkVa((start + CELL).min(text.end.0)),
            };
            let what = if cave.contains(LinkVa(start + range.len() / 2)) {
                What::Cave
            } else if code_share(bundle, range) > 10 {
                What::Code
            } else {
                What::Filler
            };
            Cell { slots: 0, what }
        })
        .collect();
    for edit in slots(bundle) {
        if let Some(cell) = cells.get_mut((u64::from(edit.at.0) / CELL) as usize) {
            cell.slots += 1;
        }
    }
    Map {
        cell_bytes: CELL,
        cells,
    }
}
