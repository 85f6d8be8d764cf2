//! The exit codes, in one place. They are the same for all three tools.

use std::process::ExitCode;

/// What a run ends with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// Done, or "yes".
    Done = 0,
    /// A clean "no": a signature does not verify, a text does not explain, a check found violations.
    No = 1,
    /// Usage error, bad input, or something that cannot be done.
    Cannot = 2,
    /// Needs privilege, no Xen here, or a Xen without the interface.
    NoXen = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// An error that knows how the run ends.
pub trait Exits {
    /// The exit code for this error.
    fn exit(&self) -> Exit;
}
