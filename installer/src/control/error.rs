//! Everything that a command can fail with, and which exit code that is.

use crate::exit::{Exit, Exits};
use crate::guest::ReadError;
use crate::guest::explain::ExplainError;
use crate::guest::kernel::FindError;
use crate::views::apply::ApplyError;
use crate::views::cave::CaveError;
use crate::views::fill::FillError;
use crate::views::journal::JournalError;
use crate::views::remove::RemoveError;
use crate::views::verify::VerifyTextError;
use crate::watch::run::WatchError;
use crate::watch::storm::StormError;
use crate::xen::{ResolveError, XenError};
use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// Why a command failed.
#[derive(Debug, Error)]
pub enum CliError {
    /// Standard output or a signal handler.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A file.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Trusted keys.
    #[error(transparent)]
    Trust(#[from] signer::TrustError),
    /// A signature.
    #[error("{0}\nnothing was touched in the guest")]
    Verify(#[from] signer::VerifyError),
    /// A signed bundle that does not read.
    #[error(transparent)]
    Bundle(#[from] penumbra_bundle::ReadError),
    /// A manifest that does not read.
    #[error("{path}: {detail}; emit the bundle again with this version of hardener")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What and where.
        detail: String,
    },
    /// A policy with errors, or whose own tests fail; they are drawn already.
    #[error(
        "{path}: the policy has errors, or its own tests fail; nothing was touched in the guest"
    )]
    Policy {
        /// The file.
        path: PathBuf,
    },
    /// A policy that speaks about other kernels.
    #[error(
        "{path}: the policy is for other kernels: it lists {listed}, the bundle's build-id is {build_id}; add it to kernel.build-id and sign the policy again"
    )]
    PolicyKernel {
        /// The file.
        path: PathBuf,
        /// The bundle's build-id.
        build_id: String,
        /// The policy's.
        listed: String,
    },
    /// A policy that refuses unknown modules, with a bundle that makes all unknown.
    #[error(
        "{path}: the policy refuses modules that stay on their own text, and all would: {why}. Or leave [modules] out of the policy and sign it again"
    )]
    PolicyModules {
        /// The file.
        path: PathBuf,
        /// Why none gets views.
        why: &'static str,
    },
    /// A probe of the guest's is where a view has edited the text.
    #[error(
        "the guest has probes (kprobes, perf, BPF) on returns or calls that a view has edited, {bytes} bytes in all; taken away after the views, they could leave a view's bytes in its text: take them away first (in the guest: /sys/kernel/debug/kprobes/list; `installer verify-text` names the places), or `installer remove --force`"
    )]
    Probed {
        /// How many bytes.
        bytes: u64,
    },
    /// Another bundle is applied.
    #[error("another bundle ({applied}) is applied to this domain; `installer remove` it first")]
    OtherBundle {
        /// Its path.
        applied: PathBuf,
    },
    /// The bundle on disk is no longer the applied one.
    #[error("{path}: its manifest is not the one that was applied; put the applied bundle back")]
    BundleChanged {
        /// The bundle.
        path: PathBuf,
    },
    /// What is applied is damaged.
    #[error(
        "what is applied no longer explains (`installer verify-text` says where); `installer remove` it and apply again"
    )]
    Damaged,
    /// The domain is not found.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// Xen refused.
    #[error(transparent)]
    Xen(#[from] XenError),
    /// The kernel is not found.
    #[error(transparent)]
    Find(#[from] FindError),
    /// Applying.
    #[error(transparent)]
    Apply(Box<ApplyError>),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Watching.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// Removing.
    #[error(transparent)]
    Remove(#[from] RemoveError),
    /// Verifying.
    #[error(transparent)]
    VerifyText(#[from] VerifyTextError),
    /// The host view's text is not explained.
    #[error(transparent)]
    Explain(#[from] ExplainError),
    /// The bundle's cave cannot be made.
    #[error(transparent)]
    Cave(#[from] CaveError),
    /// A storm.
    #[error(transparent)]
    Storm(#[from] StormError),
    /// The views of modules.
    #[error(transparent)]
    Modules(#[from] crate::views::modules::ModuleError),
    /// The audit log.
    #[error(transparent)]
    Audit(#[from] crate::audit::AuditError),
    /// No audit log.
    #[error(
        "{dir}: no audit log of domain {uuid}: nothing was ever applied to it here; `installer apply` starts one"
    )]
    NoLog {
        /// Where logs are.
        dir: PathBuf,
        /// The domain.
        uuid: String,
    },
    /// A dump that does not fill.
    #[error(transparent)]
    Fill(#[from] FillError),
    /// Guest memory.
    #[error("the guest's text cannot be read: {0}")]
    Read(#[from] ReadError),
}

impl From<ApplyError> for CliError {
    fn from(error: ApplyError) -> CliError {
        CliError::Apply(Box::new(error))
    }
}

impl Exits for CliError {
    fn exit(&self) -> Exit {
        match self {
            CliError::Resolve(error) => error.exit(),
            CliError::Xen(error) => error.exit(),
            CliError::Find(error) => error.exit(),
            CliError::Apply(error) => error.exit(),
            CliError::Journal(error) => error.exit(),
            CliError::Watch(error) => error.exit(),
            CliError::Remove(error) => error.exit(),
            CliError::VerifyText(error) => error.exit(),
            CliError::Storm(error) => error.exit(),
            CliError::Fill(error) => error.exit(),
            _ => Exit::Cannot,
        }
    }
}
