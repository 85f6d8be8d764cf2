//! Why nothing was applied.

use super::TextError;
use super::cave::{CaveError, CaveWriteError};
use super::journal::JournalError;
use super::pages::PageError;
use super::remove::RemoveError;
use crate::exit::{Exit, Exits};
use crate::guest::ReadError;
use crate::guest::explain::ExplainError;
use crate::guest::kernel::FindError;
use crate::guest::layout::MissingName;
use crate::xen::{End, Gfn, XenError};
use thiserror::Error;

/// Why nothing was applied.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// Xen refused.
    #[error(transparent)]
    Xen(#[from] XenError),
    /// Xen lacks the interface.
    #[error(
        "this Xen cannot bind page-table roots to views ({0}); boot Xen with the patches of xen-patches and `altp2m=1` on its command line"
    )]
    NoInterface(XenError),
    /// The domain has no altp2m.
    #[error(
        "altp2m is off for domain `{0}`; set altp2m=\"external\" in its configuration and start it again"
    )]
    Altp2mOff(String),
    /// The guest itself may switch views.
    #[error(
        "domain `{0}` may change its views itself; set altp2m=\"external\" in its configuration and start it again"
    )]
    Altp2mGuest(String),
    /// Somebody else uses altp2m.
    #[error(
        "altp2m is in use for domain `{0}` and no journal says that Penumbra did it; stop the other tool, or `installer remove {0}` if the journal was lost"
    )]
    InUse(String),
    /// Not a PVH or HVM guest.
    #[error(
        "domain `{0}` is not a PVH or HVM guest with hardware-assisted paging; only these have views"
    )]
    NotHvm(String),
    /// The domain ends.
    #[error("domain `{name}` {end}")]
    Ended {
        /// The domain.
        name: String,
        /// How.
        end: End,
    },
    /// The domain is being saved.
    #[error("domain `{0}` is suspended; apply when it runs again")]
    Suspended(String),
    /// The bundle lacks a variant.
    #[error(
        "the policy names view `{view}`, the bundle has {known}; sign a policy for this bundle or emit a bundle with that variant"
    )]
    NoVariant {
        /// What the policy names.
        view: String,
        /// What there is.
        known: String,
    },
    /// The kernel is not the bundle's.
    #[error(transparent)]
    Find(#[from] FindError),
    /// The manifest lacks a name.
    #[error(transparent)]
    Missing(#[from] MissingName),
    /// The kernel still edits its own text without telling.
    #[error("the guest's kernel is still booting: {0}; try again when it is up")]
    Booting(&'static str),
    /// The guest's memory cannot be read.
    #[error("{what}: {source}")]
    Read {
        /// What was being read.
        what: &'static str,
        /// Where and why.
        source: ReadError,
    },
    /// The text is not understood.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The cave cannot be laid out.
    #[error(transparent)]
    Cave(#[from] CaveError),
    /// The cave cannot be written.
    #[error(transparent)]
    CaveWrite(#[from] CaveWriteError),
    /// A slot is not as expected.
    #[error(transparent)]
    Page(#[from] PageError),
    /// The text's slots change while views are built.
    #[error(
        "the guest changes its text's layout while views are built; try again when it is quiet"
    )]
    Restless,
    /// The guest pokes its text all the time.
    #[error(
        "the guest went on changing its text while the views were filled, and after {0} looks still did; try again when no tracing or static key is being switched in it"
    )]
    TooManyPokes(u32),
    /// No room above the guest's memory.
    #[error("no room for {count} page copies at {first}: the guest has {bits} address bits")]
    NoRoom {
        /// First frame.
        first: Gfn,
        /// How many.
        count: u64,
        /// The guest's limit.
        bits: u8,
    },
    /// No memory for the copies.
    #[error(
        "Xen has no memory for {pages} page copies ({mib} MiB): {source}; free memory (see `xl info`) or balloon dom0 down"
    )]
    NoMemory {
        /// How many pages.
        pages: u64,
        /// The same in MiB.
        mib: u64,
        /// What Xen said.
        source: XenError,
    },
    /// The journal cannot be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The apply failed and taking it out failed too.
    #[error(
        "{error}\nand taking out what was done failed: {cleanup}; run `installer remove` again"
    )]
    Uncleaned {
        /// Why it failed.
        error: Box<ApplyError>,
        /// Why the cleaning failed.
        cleanup: Box<RemoveError>,
    },
}

impl ApplyError {
    /// Whether the same may succeed a little later, because the guest is still booting.
    pub fn is_early(&self) -> bool {
        matches!(
            self,
            ApplyError::Booting(_)
                | ApplyError::Find(
                    FindError::NotBooted | FindError::Unmapped(_) | FindError::Read { .. }
                )
        )
    }
}

impl Exits for ApplyError {
    fn exit(&self) -> Exit {
        match self {
            ApplyError::Xen(error) => error.exit(),
            ApplyError::NoInterface(_) | ApplyError::Altp2mOff(_) | ApplyError::Altp2mGuest(_) => {
                Exit::NoXen
            }
            ApplyError::Find(error) => error.exit(),
            ApplyError::Journal(error) => error.exit(),
            ApplyError::Uncleaned { error, .. } => error.exit(),
            _ => Exit::Cannot,
        }
    }
}

impl From<ExplainError> for ApplyError {
    fn from(error: ExplainError) -> ApplyError {
        ApplyError::Text(TextError::Explain(error))
    }
}
