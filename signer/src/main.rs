//! The `signer` command.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    signer::cli::main()
}
