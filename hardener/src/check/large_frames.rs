//! Functions with large frames, found by decoding each function that the kernel can trace, for what the pass `stack-depth` claims.

use super::kernel::Kernel;
use super::owed::has_fentry;
use iced_x86::{Decoder, DecoderOptions, Mnemonic, Register};
use penumbra_bundle::{LinkVa, PassSummary, VaRange};
use rustc_hash::FxHashSet;
use std::collections::BTreeMap;

/// The pass.
pub const PASS: &str = "stack-depth";
/// The parameters: from how many bytes on a frame is large, and how many must be left below one.
pub const FRAME: &str = "frame";
pub const LEFT: &str = "left";
/// A frame of more bytes counts as one of so many: what the guard page below a stack has.
const MOST: u32 = 4096;
/// `THREAD_SIZE` (arch/x86/include/asm/page_64_types.h).
pub const STACK: u64 = 16384;

/// What a bundle says that it asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    frame: u32,
    left: u32,
}

impl Limits {
    /// By the pass's parameters; none unless both are numbers, and such as make sense.
    pub fn of(pass: &PassSummary) -> Option<Limits> {
        let number = |key| pass.parameters.get(key)?.parse::<u32>().ok();
        let (frame, left) = (number(FRAME)?, number(LEFT)?);
        let sound = (1..=MOST).contains(&frame) && u64::from(left) < STACK;
        sound.then_some(Limits { frame, left })
    }

    /// How much stack must be left where a function with a frame of `size` bytes is entered.
    pub fn need(self, size: u32) -> u64 {
        u64::from(self.left) + u64::from(size.min(MOST))
    }

    /// How far the sum of what is used and needed may lie above the stack's size to be about a task's stack: all needs are less, and
    /// other stacks are further away, by the guard page.
    pub fn window(self) -> u64 {
        u64::from(self.left) + u64::from(MOST)
    }
}

/// The most that each function takes of the stack at once, of those that the kernel can trace and that take so much.
pub fn frames(kernel: &Kernel, limits: Limits) -> BTreeMap<LinkVa, u32> {
    let traced: FxHashSet<LinkVa> = kernel.tables.fentry.iter().copied().collect();
    let code = kernel.symbols.iter();
    let code = code.filter(|symbol| matches!(symbol.letter, b't' | b'T' | b'w' | b'W'));
    let named: FxHashSet<LinkVa> = code.map(|symbol| symbol.at).collect();
    // Behind a named function's ENDBR64 a site starts no other.
    let own = |site: &LinkVa| {
        let start = LinkVa(site.0.wrapping_sub(4));
        named.contains(&start) && has_fentry(kernel, &traced, start)
    };
    let mut starts: Vec<LinkVa> = traced.iter().copied().filter(|site| !own(site)).collect();
    starts.extend(&named);
    starts.retain(|at| kernel.in_text(*at));
    starts.sort_unstable();
    starts.dedup();
    let ends = starts.iter().skip(1).copied().chain([kernel.text.end]);
    let mut found = BTreeMap::new();
    for (start, end) in starts.iter().copied().zip(ends) {
        if !has_fentry(kernel, &traced, start) {
            continue;
        }
        let Some(bytes) = kernel.bytes(VaRange { start, end }) else {
            continue;
        };
        let all = Decoder::with_ip(64, bytes, start.0, DecoderOptions::NONE);
        let sizes = all.into_iter().filter_map(|one| {
            let takes = one.mnemonic() == Mnemonic::Sub && one.op0_register() == Register::RSP;
            let size = takes.then(|| one.try_immediate(1).ok())?;
            u32::try_from(size? as i64).ok()
        });
        let largest = sizes.max().unwrap_or(0);
        if largest >= limits.frame && i32::try_from(largest).is_ok() {
            found.insert(start, largest);
        }
    }
    found
}
