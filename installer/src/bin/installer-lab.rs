//! `installer` with what the lab's tests need besides: see the feature `lab`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    installer::control::main()
}
