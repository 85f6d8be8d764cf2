//! The `hardener` command.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    hardener::cli::main()
}
