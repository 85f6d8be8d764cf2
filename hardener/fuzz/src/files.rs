//! The parts of an input of the target `bundle`: it and the seeds take them in one order.

/// A bundle's files, behind the manifest, which comes first.
pub const FILES: [&str; 11] = [
    "text.bin",
    "model.postcard",
    "symbols.postcard",
    "cave.elf",
    "relocations.postcard",
    "stock.edits",
    "fast.edits",
    "hardened.edits",
    "forward.postcard",
    "backward.postcard",
    "modules.postcard",
];
