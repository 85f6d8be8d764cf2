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
#[error(transparent)]
pub enum Error {
    /// `emit`.
    Emit(#[from] EmitError),
    /// `check`: nothing can be said about the bundle.
    Check(#[from] CheckError),
    /// `inspect`, `explain`, `diff`.
    Bundle(#[from] ReadError),
    /// `explain`, `diff`.
    Explain(#[from] ExplainError),
}

impl Error {
    /// The exit code. A violation is not an error here: the check ran and said no.
    pub fn code(&self) -> u8 {
        match self {
            Error::Emit(_) | Error::Check(_) | Error::Bundle(_) | Error::Explain(_) => CANNOT,
        }
    }
}

impl From<&Error> for ExitCode {
    fn from(error: &Error) -> ExitCode {
        ExitCode::from(error.code())
    }
}
