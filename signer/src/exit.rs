//! Exit codes: one place says what each error means to a script.

use crate::{KeyError, SignError, TrustError, VerifyError};
use std::process::ExitCode;

/// Done, or yes.
pub const YES: u8 = 0;
/// Wrong usage, bad input (what is not verified counts as such), or a thing that cannot be done. clap's own code for
/// usage errors is the same.
pub const CANNOT: u8 = 2;

/// Everything that the commands can fail with.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub enum Error {
    /// `key`.
    Key(#[from] KeyError),
    /// `sign`.
    Sign(#[from] SignError),
    /// `--trust` and `--threshold`.
    Trust(#[from] TrustError),
    /// `verify`.
    Verify(#[from] VerifyError),
    /// `--emit-pae`.
    File(#[from] crate::FileError),
}

impl From<&Error> for ExitCode {
    fn from(_: &Error) -> ExitCode {
        ExitCode::from(CANNOT)
    }
}
