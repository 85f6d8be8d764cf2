//! Exit codes: one place says what each error means to a script.

use crate::{KeyError, SignError, TrustError, VerifyError};
use std::process::ExitCode;

/// Done, or yes.
pub const YES: u8 = 0;
/// A clean no: not signed by enough trusted keys, or not what was signed.
pub const NO: u8 = 1;
/// Wrong usage, bad input, or a thing that cannot be done. clap's own code for usage errors is the same.
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

impl Error {
    /// The exit code.
    pub fn code(&self) -> u8 {
        match self {
            Error::Verify(error) if error.is_no() => NO,
            _ => CANNOT,
        }
    }
}

impl From<&Error> for ExitCode {
    fn from(error: &Error) -> ExitCode {
        ExitCode::from(error.code())
    }
}
