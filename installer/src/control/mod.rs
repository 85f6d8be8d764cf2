//! Command lines, messages, tables and JSON. Data goes to stdout, messages to stderr.

mod apply;
pub mod cli;
mod counts;
mod error;
mod events;
mod fill;
mod ps;
mod resume;
mod status;
mod text;
mod watch;

use crate::exit::{Exit, Exits};
use crate::views::Journal;
use crate::views::journal::{self, JournalError, State};
use crate::xen::{self, Hypervisor};
use clap::{CommandFactory, Parser};
use cli::{Cli, Command};
pub use error::CliError;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("installer: {error}");
            error.exit().into()
        }
    }
}

fn run(cli: Cli) -> Result<Exit, CliError> {
    match cli.command {
        Command::Apply(args) => apply::apply(&args),
        Command::Ps(args) => ps::ps(&args),
        Command::Status { domain, json } => status::status(domain.as_deref(), json),
        Command::Remove(args) => status::remove(&args),
        Command::Digest {
            domain,
            bundle,
            explain,
            json,
        } => text::digest(&domain, &bundle, explain, json),
        Command::Fill(args) => fill::fill(&args),
        Command::VerifyText(args) => text::verify_text(&args),
        Command::Storm(args) => text::storm(&args),
        Command::Events(args) => events::events(&args),
        Command::Policy(cli::Policy::Check { file }) => {
            let mut out = io::stdout().lock();
            match penumbra_policy::check_file(&file, &mut out)? {
                0 => Ok(Exit::Done),
                1 => Ok(Exit::No),
                _ => Ok(Exit::Cannot),
            }
        }
        #[cfg(feature = "lab")]
        Command::Contract { domain } => contract(&domain),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "installer", &mut script);
            print(&String::from_utf8_lossy(&script))?;
            Ok(Exit::Done)
        }
    }
}

#[cfg(feature = "lab")]
use crate::views::apply::ApplyError;

/// Asks Xen what `cargo test` asks the fake. Prints each check.
#[cfg(feature = "lab")]
fn contract(wanted: &str) -> Result<Exit, CliError> {
    let (domain, _) = xen::resolve(wanted)?;
    let xen = xen::open(domain.id)?;
    if xen.altp2m_on()? {
        return Err(ApplyError::InUse(wanted.to_owned()).into());
    }
    let mut exit = Exit::Done;
    for (name, verdict) in xen::contract::run(xen.as_ref())? {
        match verdict {
            Ok(()) => print(&format!("ok: {name}\n"))?,
            Err(error) => {
                exit = Exit::No;
                print(&format!("WRONG: {name}: {error}\n"))?;
            }
        }
    }
    Ok(exit)
}

/// A running guest to which something is applied.
struct Target {
    xen: Box<dyn Hypervisor>,
    journal: Journal,
    state: State,
}

impl Target {
    /// Opens the domain and reads its journal.
    fn open(wanted: &str) -> Result<Target, CliError> {
        let (domain, _) = xen::resolve(wanted)?;
        let journal = Journal::reader(&journal::run_dir(), domain.id);
        let state = journal
            .load()?
            .filter(|state| state.uuid == domain.uuid && !state.is_cave_only())
            .ok_or(JournalError::NotApplied)?;
        Ok(Target {
            xen: xen::open(domain.id)?,
            journal,
            state,
        })
    }
}

/// A flag that SIGINT and SIGTERM set: the step under way is finished first.
fn stop_flag() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

/// Prints to stdout at once. A reader that has gone away (`installer ps web1 | head -1`) is no error.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Prints a value as one JSON document.
fn print_json(value: &serde_json::Value) -> Result<(), CliError> {
    let mut text = serde_json::to_string_pretty(value).map_err(io::Error::from)?;
    text.push('\n');
    Ok(print(&text)?)
}

/// A table without lines, as `ps` and `xl list` have it.
fn table(header: &[&str]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(header.iter().copied());
    table
}
