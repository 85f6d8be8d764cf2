//! Why a kernel's text cannot be taken.

use crate::image::Fault;
use penumbra_bundle::{LinkVa, VaRange};
use thiserror::Error;

/// Why a kernel's text cannot be taken.
#[derive(Debug, Error)]
pub enum TextError {
    /// A section or symbol is not there.
    #[error("{what} is missing; give an x86-64 Linux kernel as a distribution ships it")]
    Missing {
        /// What.
        what: &'static str,
    },
    /// `.text` is not where a kernel has it.
    #[error(".text: {} to {} does not start on a page, is empty or is too large", range.start, range.end)]
    Placement {
        /// Where it is.
        range: VaRange,
    },
    /// The sweep and the tables disagree about where instructions start.
    #[error(
        "{table}: {count} addresses lie inside an instruction, the first at {at}; the image is damaged or is decoded wrongly, report it"
    )]
    Boundary {
        /// The table.
        table: &'static str,
        /// How many.
        count: usize,
        /// The first of them.
        at: LinkVa,
    },
    /// Too few filler bytes.
    #[error(
        "{needed} bytes are needed for thunks and tables, the largest cave before .entry.text has {found}"
    )]
    Cave {
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that were found.
        found: u64,
    },
    /// A table or symbol of the image.
    #[error(transparent)]
    Image(#[from] Fault),
}
