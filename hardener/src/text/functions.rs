//! Where functions start, and which have an `__fentry__` site.

use super::Span;
use crate::image::{Image, Tables};
use penumbra_bundle::TextOff;

/// Starts of functions, by address.
pub struct Functions {
    /// Start, and whether the function calls `__fentry__` there.
    starts: Vec<(TextOff, bool)>,
}

impl Functions {
    /// Collects starts from symbols and from `__mcount_loc`: a weak function that another overrode keeps its code and
    /// its `__fentry__` site but loses its symbol.
    pub fn find(image: &Image, tables: &Tables, span: Span) -> Functions {
        let symbols = image.symbols.iter().filter(|symbol| symbol.is_code());
        let mut starts: Vec<(TextOff, bool)> = symbols
            .filter_map(|symbol| Some((span.offset(symbol.va)?, false)))
            .collect();
        for at in tables.fentry.iter().filter_map(|va| span.offset(*va)) {
            starts.push((at, true));
            // With CONFIG_X86_KERNEL_IBT the call stands behind ENDBR64, four bytes into the function.
            if at.0 >= 4 {
                starts.push((TextOff(at.0 - 4), false));
            }
        }
        // The last entry for a start is the one with its site.
        starts.sort_unstable();
        Functions { starts }
    }

    /// Whether the function around `at` was compiled with `-pg`: GCC then drops `-fipa-ra` (gcc/opts.cc), so a caller
    /// assumes that r10, r11 and the flags are lost (System V ABI, 3.2.3). Split-off `.cold` parts count as not.
    pub fn has_fentry(&self, at: TextOff) -> bool {
        let after = self.starts.partition_point(|(start, _)| *start <= at);
        self.starts[..after].last().is_some_and(|(_, fentry)| *fentry)
    }
}
