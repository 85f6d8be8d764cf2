//! What clearing the stack before a return to user mode needs to know: where the kernel goes back there, and which returns leave
//! so much stack behind that the words in it may all be zero.
//!
//! What a system call wrote below the stack pointer is cleared downwards until [`UNUSED`] bytes of zeros follow each other. A
//! frame has a return address, which is none; so a stretch of zeros between two of them is shorter, but for large frames. Their
//! returns leave marks, one each [`SPACING`] bytes.

use super::{Text, frames};
use crate::image::{Image, Tables};
use penumbra_bundle::TextOff;
use std::collections::BTreeMap;

/// So many bytes of zeros, from a multiple of it on: nothing below was written.
pub const UNUSED: u32 = 128;
/// The distance of marks: less than [`UNUSED`] by a word for an interrupt's alignment of the stack, and one to spare.
pub const SPACING: u32 = 112;

/// What the last function that is called before user mode is called, without what the compiler appends: to Linux 6.6, and
/// from then on, where the first is inline (kernel/entry/common.c, include/linux/entry-common.h).
const LAST: [&str; 2] = [
    "exit_to_user_mode_prepare",
    "arch_exit_to_user_mode_prepare",
];

/// What the kernel calls the functions that leave for user mode.
const LEAVING: &str = "exit_to_user_mode";

/// The returns of one kernel, by number.
pub struct StackUse {
    /// How many marks each leaves.
    pub marks: Vec<u16>,
    /// Whether it goes on to user mode: it clears the stack.
    pub clears: Vec<bool>,
    /// Returns left alone, by reason.
    pub left: BTreeMap<String, u64>,
}

impl StackUse {
    /// Asks about every R slot.
    pub fn find(image: &Image, tables: &Tables, text: &Text) -> StackUse {
        let returns = &text.slots.returns;
        let depths = frames::depths(text, tables);
        let mut left = text.slots.returns_left.clone();
        let last = last_before_user(image, text);
        let clears = returns.iter().map(|slot| {
            let function = text.functions.around(slot.at);
            last.contains(&function.start)
        });
        let clears: Vec<bool> = clears.collect();
        let all = returns.len() as u64;
        if !clears.contains(&true) {
            left.insert("no-return-before-user-mode".to_owned(), all);
            return StackUse {
                marks: vec![0; returns.len()],
                clears,
                left,
            };
        }
        let unknown = depths.iter().zip(&clears);
        let unknown = unknown.filter(|(depth, clears)| depth.is_none() && !**clears);
        let unknown = unknown.count() as u64;
        let marks: Vec<u16> = depths.into_iter().map(marks).collect();
        let used = marks.iter().zip(&clears);
        let used = used
            .filter(|(marks, clears)| **marks > 0 || **clears)
            .count() as u64;
        for (reason, count) in [
            ("frame-unknown", unknown),
            ("small-frame", all.saturating_sub(unknown + used)),
        ] {
            if count > 0 {
                left.insert(reason.to_owned(), count);
            }
        }
        StackUse {
            marks,
            clears,
            left,
        }
    }
}

impl StackUse {
    /// Whether the return of this number clears or marks anything.
    pub fn is_used(&self, index: usize) -> bool {
        self.clears[index] || self.marks[index] > 0
    }
}

/// How many marks a return leaves below which so many bytes were in use.
fn marks(depth: Option<u32>) -> u16 {
    (depth.unwrap_or(0) / SPACING) as u16
}

/// The functions that run last: code between kernel and user mode calls them, which runs on a task's stack and which nothing may
/// instrument, and nobody else does.
fn last_before_user(image: &Image, text: &Text) -> Vec<TextOff> {
    let symbols = image.symbols.iter().filter(|symbol| symbol.is_code());
    let symbols = symbols.filter(|symbol| symbol.name.contains(LEAVING));
    let leaving: Vec<(&str, TextOff)> = symbols
        .filter_map(|symbol| Some((symbol.name.as_str(), text.span.offset(symbol.va)?)))
        .collect();
    let is_last = |start: TextOff| {
        let mut from = branches_to(text, start).peekable();
        from.peek().is_some()
            && from.all(|at| {
                let function = text.functions.around(at).start;
                text.regions.forbids(text.span, at) == Some("noinstr")
                    || leaving.iter().any(|(_, start)| *start == function)
            })
            && text.entries.binary_search(&start).is_err()
    };
    for name in LAST {
        let named = leaving.iter();
        let named = named.filter(|(full, _)| full.split('.').next() == Some(name));
        let starts = named.map(|(_, start)| *start);
        let found: Vec<TextOff> = starts.filter(|start| is_last(*start)).collect();
        if !found.is_empty() {
            return found;
        }
    }
    Vec::new()
}

/// Whence direct branches go to `start`.
fn branches_to(text: &Text, start: TextOff) -> impl Iterator<Item = TextOff> {
    let va = Some(text.va(start));
    let calls = text.sweep.calls.iter();
    let calls = calls.filter(move |call| call.to == va).map(|call| call.at);
    let jumps = text.sweep.jumps.iter();
    calls.chain(jumps.filter(move |jump| jump.to == va).map(|jump| jump.at))
}
