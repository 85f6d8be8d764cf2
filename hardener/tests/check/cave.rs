//! Faults of the cave and of its tables.

use crate::cases::{Case, case};
use crate::scene::Scene;
use hardener::check::Rule;
use penumbra_bundle::{LinkVa, SlotKind, TableKind};

/// The cave: invariant 2.
pub const CAVE: &[Case] = &[
    case(
        Rule::OneSharedCave,
        "the cave begins in code",
        "the cave holds ",
        |scene| {
            let range = &mut scene.bundle.manifest.cave.range;
            range.start = LinkVa(range.start.0 - 0x2000);
            Some(range.start)
        },
    ),
    case(
        Rule::OneSharedCave,
        "a symbol in the cave",
        "lies in the cave",
        |scene| {
            let start = scene.symbol("__lock_text_end");
            scene.bundle.manifest.cave.range.start = LinkVa(start.0 - 1);
            Some(start)
        },
    ),
    case(
        Rule::OneSharedCave,
        "a table over another",
        "overlaps `return_targets`",
        |scene| {
            let tables = &mut scene.bundle.manifest.cave.tables;
            tables[1].range.start = tables[0].range.start;
            Some(tables[0].range.start)
        },
    ),
    case(
        Rule::OneSharedCave,
        "thunks behind the cave's end",
        "leaves the cave",
        |scene| {
            let thunks = scene.named("return_cfi");
            let range = &mut scene.bundle.manifest.cave.range;
            range.end = thunks;
            Some(range.start)
        },
    ),
    case(
        Rule::OneSharedCave,
        "an edit in the cave",
        "edits the cave",
        |scene| {
            let start = scene.bundle.manifest.cave.range.start;
            Some(scene.add(start, SlotKind::Return))
        },
    ),
];

/// Tables: exactly the legal sets.
pub const TABLES: &[Case] = &[
    case(
        Rule::ExactSets,
        "a return site taken out of the bitmap",
        "missing from return_targets",
        |scene| Some(drop_bit(scene, "return_targets")),
    ),
    case(
        Rule::ExactSets,
        "an address that follows no call added to the bitmap",
        "too many in return_targets",
        |scene| Some(set_bit(scene, "return_targets")),
    ),
    case(
        Rule::ExactSets,
        "an entry taken out of the bitmap",
        "missing from entries",
        |scene| Some(drop_bit(scene, "entries")),
    ),
    case(
        Rule::ExactSets,
        "an address that is no entry added to the bitmap",
        "too many in entries",
        |scene| Some(set_bit(scene, "entries")),
    ),
    case(
        Rule::ExactSets,
        "a sorted return site moved by one byte",
        "missing from return_targets",
        |scene| Some(move_offset(scene, "return_targets_sorted")),
    ),
    case(
        Rule::ExactSets,
        "a sorted entry moved by one byte",
        "missing from entries",
        |scene| Some(move_offset(scene, "entries_sorted")),
    ),
    case(
        Rule::ExactSets,
        "a table that claims more than it holds",
        "the manifest says ",
        |scene| {
            let table = &mut scene.bundle.manifest.cave.tables[0];
            table.count += 1;
            Some(table.range.start)
        },
    ),
];

/// Takes a member out of a bitmap, and counts one fewer.
fn drop_bit(scene: &mut Scene, name: &str) -> LinkVa {
    change_bit(scene, name, |byte| byte != 0, u8::trailing_zeros, -1)
}

/// Adds a member to a bitmap, and counts one more.
fn set_bit(scene: &mut Scene, name: &str) -> LinkVa {
    change_bit(scene, name, |byte| byte != 0xff, u8::trailing_ones, 1)
}

fn change_bit(
    scene: &mut Scene,
    name: &str,
    which: fn(u8) -> bool,
    bit: fn(u8) -> u32,
    count: i64,
) -> LinkVa {
    let tables = &mut scene.bundle.manifest.cave.tables;
    let table = tables
        .iter_mut()
        .find(|table| table.name == name)
        .expect("a table");
    table.count = table.count.checked_add_signed(count).unwrap();
    let (range, covers, kind) = (table.range, table.covers, table.kind);
    let TableKind::Bitmap { granule } = kind else {
        panic!("`{name}` is no bitmap");
    };
    // From the middle, which is far from filler.
    let middle = LinkVa(range.start.0 + range.len() / 2);
    let bytes = scene.cave(middle, 4096);
    let index = bytes
        .iter()
        .position(|byte| which(*byte))
        .expect("such a byte");
    let bit = bit(bytes[index]);
    bytes[index] ^= 1 << bit;
    let number = (range.len() / 2 + index as u64) * 8 + u64::from(bit);
    LinkVa(covers.start.0 + number * u64::from(granule))
}

/// Moves a sorted offset by one byte; the address that is missing now.
fn move_offset(scene: &mut Scene, name: &str) -> LinkVa {
    let tables = &scene.bundle.manifest.cave.tables;
    let table = tables
        .iter()
        .find(|table| table.name == name)
        .expect("a table");
    let (start, covers) = (table.range.start, table.covers);
    let bytes = scene.cave(LinkVa(start.0 + 4 * 7), 4);
    let offset = u32::from_le_bytes((&*bytes).try_into().unwrap());
    bytes.copy_from_slice(&(offset + 1).to_le_bytes());
    LinkVa(covers.start.0 + u64::from(offset))
}
