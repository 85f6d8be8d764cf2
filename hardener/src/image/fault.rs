//! What is wrong with an image, and where.

use std::io;
use thiserror::Error;

/// Which remedy fits a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultKind {
    /// The file is something else.
    NotAKernel,
    /// The file contradicts itself.
    Damaged,
    /// A kernel, but not one that Penumbra can take.
    Unsupported,
}

/// A fault in an image: where and what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Which remedy fits.
    pub kind: FaultKind,
    /// A section, table or offset.
    pub place: String,
    /// What is wrong there.
    pub detail: String,
}

impl Fault {
    /// The file is something else.
    pub fn not_a_kernel(place: impl Into<String>, detail: impl Into<String>) -> Fault {
        Fault {
            kind: FaultKind::NotAKernel,
            place: place.into(),
            detail: detail.into(),
        }
    }

    /// The file contradicts itself.
    pub fn damaged(place: impl Into<String>, detail: impl Into<String>) -> Fault {
        Fault {
            kind: FaultKind::Damaged,
            place: place.into(),
            detail: detail.into(),
        }
    }

    /// A kernel, but not one that Penumbra can take.
    pub fn unsupported(place: impl Into<String>, detail: impl Into<String>) -> Fault {
        Fault {
            kind: FaultKind::Unsupported,
            place: place.into(),
            detail: detail.into(),
        }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Fault {
            kind,
            place,
            detail,
        } = self;
        match kind {
            FaultKind::NotAKernel => write!(
                f,
                "{place}: {detail}; give an x86-64 Linux kernel: vmlinuz or vmlinux"
            ),
            FaultKind::Damaged => write!(
                f,
                "{place}: {detail}; the file is damaged or truncated, fetch it again"
            ),
            FaultKind::Unsupported => write!(f, "{place}: {detail}"),
        }
    }
}

/// Why an image cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file system said no.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// What the system said.
        source: io::Error,
    },
    /// The file's contents.
    #[error("{file}: {fault}")]
    Bad {
        /// The file.
        file: String,
        /// Where and what.
        fault: Fault,
    },
}

impl std::error::Error for Fault {}
