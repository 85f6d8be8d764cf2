//! Filler inside the kernel's own executable mapping.
//!
//! `.entry.text` is aligned to 2 MiB on both sides (vmlinux.lds.S, `ALIGN_ENTRY_TEXT_BEGIN`) and the gaps are filled with
//! INT3. Only the gap before it is used: the 2 MiB around the entry code are also mapped into user page tables
//! (`pti_clone_entry_text`), and the SRSO thunks stand there by design.

use super::{PAGE, Regions, Span, TextError};
use penumbra_bundle::{LinkVa, VaRange};

/// INT3, what the linker script fills with (`:text = 0xcccccccc`).
pub const FILLER: u8 = 0xcc;

/// A run of filler.
#[derive(Clone, Copy, Debug)]
pub struct Cave {
    /// The whole run.
    pub run: VaRange,
    /// Its whole pages, without the first bytes: an INT3 behind the last instruction may stop straight-line speculation.
    pub pages: VaRange,
}

/// The largest run of filler before `.entry.text`.
pub fn find(bytes: &[u8], span: Span, regions: &Regions) -> Result<Cave, TextError> {
    let limit = span
        .offset(regions.entry.start)
        .map_or(0, |at| at.0 as usize);
    let (mut best, mut at) = (0..0, 0);
    while at < limit {
        let len = bytes[at..limit]
            .iter()
            .take_while(|byte| **byte == FILLER)
            .count();
        if len > best.len() {
            best = at..at + len;
        }
        at += len.max(1);
    }
    let va = |at: usize| LinkVa(span.range.start.0 + at as u64);
    let run = VaRange {
        start: va(best.start),
        end: va(best.end),
    };
    let pages = VaRange {
        start: LinkVa((run.start.0 + 16).next_multiple_of(PAGE)),
        end: LinkVa(run.end.0 - run.end.0 % PAGE),
    };
    if pages.is_empty() {
        return Err(TextError::Cave {
            needed: PAGE,
            found: run.len(),
        });
    }
    Ok(Cave { run, pages })
}
