//! Where functions start, and which have an `__fentry__` site.

use super::{Span, Sweep};
use crate::image::{Image, Tables};
use penumbra_bundle::TextOff;

/// The length of ENDBR64.
const ENDBR64: u32 = 4;

/// Starts of functions, by address.
pub struct Functions {
    starts: Vec<Start>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Start {
    at: TextOff,
    /// Has a symbol.
    named: bool,
    /// Calls `__fentry__`.
    traced: bool,
}

impl Functions {
    /// Collects starts from symbols and from `__mcount_loc`: a weak function that another overrode keeps its code and
    /// its `__fentry__` site but loses its symbol.
    pub fn find(image: &Image, tables: &Tables, span: Span, sweep: &Sweep) -> Functions {
        let mut sites: Vec<TextOff> = tables
            .fentry
            .iter()
            .filter_map(|va| span.offset(*va))
            .collect();
        sites.sort_unstable();
        // With CONFIG_X86_KERNEL_IBT the call stands behind ENDBR64.
        let behind = |at: TextOff| {
            let endbr = sweep.endbr.binary_search(&at).is_ok();
            endbr.then_some(TextOff(at.0 + ENDBR64))
        };
        let code = image.symbols.iter().filter(|symbol| symbol.is_code());
        let mut starts: Vec<Start> = code
            .filter_map(|symbol| span.offset(symbol.va))
            .map(|at| {
                let mut places = [Some(at), behind(at)].into_iter().flatten();
                let traced = places.any(|at| sites.binary_search(&at).is_ok());
                Start {
                    at,
                    named: true,
                    traced,
                }
            })
            .collect();
        // The site behind a named function's ENDBR64 starts no other function.
        starts.sort_unstable();
        let own = |site: &TextOff| {
            let start = site.0.checked_sub(ENDBR64).map(TextOff);
            let start = start.filter(|at| behind(*at).is_some());
            start.is_some_and(|at| starts.binary_search_by_key(&at, |start| start.at).is_ok())
        };
        let unnamed: Vec<TextOff> = sites.into_iter().filter(|site| !own(site)).collect();
        let unnamed = unnamed.into_iter().map(|at| Start {
            at,
            named: false,
            traced: true,
        });
        starts.extend(unnamed);
        starts.sort_unstable();
        // Of a symbol and its own site, the symbol stays (it sorts last).
        starts.reverse();
        starts.dedup_by_key(|start| start.at);
        starts.reverse();
        Functions { starts }
    }

    /// Whether the function around `at` was compiled with `-pg`: GCC then drops `-fipa-ra` (gcc/opts.cc), so a caller
    /// assumes that r10, r11 and the flags are lost (System V ABI, 3.2.3). Split-off `.cold` parts count as not.
    pub fn has_fentry(&self, at: TextOff) -> bool {
        let after = self.starts.partition_point(|start| start.at <= at);
        self.starts[..after]
            .last()
            .is_some_and(|start| start.named && start.traced)
    }

    /// Whether a function starts at `at`.
    pub fn is_start(&self, at: TextOff) -> bool {
        self.starts
            .binary_search_by_key(&at, |start| start.at)
            .is_ok()
    }

    /// Whether a function with a symbol starts at `at`.
    pub fn is_named(&self, at: TextOff) -> bool {
        let found = self.starts.binary_search_by_key(&at, |start| start.at);
        found.is_ok_and(|index| self.starts[index].named)
    }

    /// How many starts there are.
    pub fn count(&self) -> usize {
        self.starts.len()
    }

    /// Where the function of this number starts, by address.
    pub fn start(&self, number: usize) -> TextOff {
        self.starts[number].at
    }

    /// Where the function behind the one of this number starts.
    pub fn starts_after(&self, number: usize) -> Option<TextOff> {
        self.starts.get(number + 1).map(|start| start.at)
    }

    /// Whether the function of this number has an `__fentry__` site.
    pub fn calls_fentry(&self, number: usize) -> bool {
        self.starts[number].traced
    }

    /// The number of the function around `at`; none before the first.
    pub fn number(&self, at: TextOff) -> Option<usize> {
        let after = self.starts.partition_point(|start| start.at <= at);
        after.checked_sub(1)
    }

    /// The function around `at`: its first offset, and the next function's.
    pub fn around(&self, at: TextOff) -> std::ops::Range<TextOff> {
        let after = self.starts.partition_point(|start| start.at <= at);
        let start = after
            .checked_sub(1)
            .map_or(TextOff(0), |n| self.starts[n].at);
        let end = self
            .starts
            .get(after)
            .map_or(TextOff(u32::MAX), |next| next.at);
        start..end
    }
}
