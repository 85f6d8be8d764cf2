//! Exit codes: one place says what each error means to a script.

use crate::check::CheckError;
use crate::emit::EmitError;
use crate::report::ExplainError;
use penumbra_bundle::ReadError;
use std::process::ExitCode;

/// Done, or yes.
pub const YES: u8 = 0;
/// A clean no: the check found violations, the bundles differ.
pub const NO: u8 = 1;
/// Wrong usage, bad input, or a thing that cannot be done. clap's own code for usage errors is the same.
pub const CANNOT: u8 = 2;

/// Everything that the commands can fail with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `emit`.
    #[error(transparent)]
    Emit(#[from] EmitError),
    /// `check`: nothing can be said about the bundle.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// `inspect`, `explain`, `diff`, `report`.
    #[error(transparent)]
    Bundle(#[from] ReadError),
    /// `explain`, `diff`, `report`.
    #[error(transparent)]
    Explain(#[from] ExplainError),
    /// `report`: the page cannot be written.
    #[error("{path}: {source}")]
    Page {
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// The exit code. A violation is not an error here: the check ran and said no.
    pub fn code(&self) -> u8 {
        match self {
            Error::Emit(_)
            | Error::Check(_)
            | Error::Bundle(_)
            | Error::Explain(_)
            | Error::Page { .. } => CANNOT,
        }
    }
}

impl From<&Error> for ExitCode {
    fn from(error: &Error) -> ExitCode {
        ExitCode::from(error.code())
    }
}
