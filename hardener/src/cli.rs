//! The command line. Data goes to stdout, messages to stderr; `--json` changes stdout only.

use crate::exit::{self, Error};
use crate::image::KernelFiles;
use crate::report::{self, Progress, Summary};
use crate::{check, emit, presets, recipe::Recipe};
use clap::builder::PossibleValuesParser;
use clap::{CommandFactory, Parser, Subcommand};
use penumbra_bundle::{Bundle, WriteError};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Rewrites a distribution kernel's text into variants: stock, fast and hardened.
#[derive(Parser)]
#[command(
    version,
    after_help = "Recipes: `hardener emit --recipe FILE` says in TOML what the passes do; `hardener recipe list` names those that come along.\n\
                  Exit codes: 0 done, proved or the same; 1 the check found violations or the bundles differ; 2 wrong usage, bad\n\
                  input or cannot be done.\n\
                  No command needs root, Xen or the network."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a bundle of variants for a kernel
    #[command(after_help = "Examples:\n  \
        hardener emit /boot/vmlinuz-6.1.0-56-cloud-amd64 -o bundle\n  \
        hardener check bundle --image /boot/vmlinuz-6.1.0-56-cloud-amd64\n  \
        signer sign bundle --key alice.pem\n  \
        hardener emit vmlinuz -o bundle --module /lib/modules/6.1.0-56-cloud-amd64/kernel\n\n\
        A recipe says what a thunk does, once it has reported it, about a value that it does not accept: `kill` the\n\
        task (the default), `log` it and go on, or `panic`:\n\n  \
        schema = 1\n\n  \
        [pass.return-cfi]\n  \
        on-violation = \"log\"\n\n  \
        [pass.forward-cfi]\n  \
        on-violation = \"kill\"\n\n\
        The same image and recipe always make the same bytes. Look at the thunks with: objdump -d bundle/cave.elf")]
    Emit {
        /// The kernel: a vmlinuz (gzip, xz, lz4 or zstd), or the vmlinux inside it
        #[arg(value_name = "VMLINUZ")]
        image: PathBuf,
        /// The kernel's System.map: its symbols if the image has none (neither .symtab nor kallsyms), else it must agree
        #[arg(long, value_name = "FILE")]
        system_map: Option<PathBuf>,
        /// The directory to write
        #[arg(short, long, value_name = "BUNDLE")]
        output: PathBuf,
        /// What the passes do, in TOML; without it, their defaults
        #[arg(long, value_name = "FILE")]
        recipe: Option<PathBuf>,
        /// What the passes do, by a recipe that comes with the hardener (see `hardener recipe`)
        #[arg(long, value_name = "NAME", conflicts_with = "recipe", value_parser = preset_names())]
        preset: Option<String>,
        /// A module (.ko, .ko.gz, .ko.xz, .ko.zst) or a folder of them, whose text gets views too; again for more
        #[arg(long = "module", value_name = "FILE")]
        modules: Vec<PathBuf>,
        /// Replace the bundle that is there
        #[arg(long)]
        force: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Prove a bundle against its kernel, by an analysis apart from the one that made it
    #[command(after_help = "Example:\n  \
        hardener check bundle --image /boot/vmlinuz-6.1.0-56-cloud-amd64\n\n\
        Proves that every edit is one whole instruction of the same length in a slot that the kernel never\n\
        writes, that thunks keep every register they must, and that the tables hold exactly the legal targets.")]
    Check {
        /// The bundle
        bundle: PathBuf,
        /// The kernel that it was made from
        #[arg(long, value_name = "VMLINUZ")]
        image: PathBuf,
        /// The kernel's System.map: its symbols if the image has none (neither .symtab nor kallsyms), else it must agree
        #[arg(long, value_name = "FILE")]
        system_map: Option<PathBuf>,
        /// A module that is in the bundle, or a folder of them; again for more
        #[arg(long = "module", value_name = "FILE")]
        modules: Vec<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what is in a bundle
    #[command(
        after_help = "Examples:\n  hardener inspect bundle\n  hardener inspect bundle --json | jq .variants"
    )]
    Inspect {
        /// The bundle
        bundle: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a bundle in figures, or write them as a page with pictures
    #[command(after_help = "Examples:\n  \
        hardener report bundle\n  \
        hardener report bundle --html report.html\n  \
        hardener report bundle --json | jq .targets\n\n\
        The page is one file that fetches nothing: where slots may go before and after, the text with its slots,\n\
        what thunks cost.")]
    Report {
        /// The bundle
        bundle: PathBuf,
        /// Write a page to this file, in place of the figures on the terminal
        #[arg(long, value_name = "FILE", conflicts_with = "json")]
        html: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what stands at an address or in a function in each variant, and why
    #[command(after_help = "Examples:\n  \
        hardener explain vfs_read --bundle bundle\n  \
        hardener explain vfs_read+0x82/0x2f0 --bundle bundle\n  \
        hardener explain 0xffffffff81345678 --bundle bundle --json | jq .instructions\n  \
        hardener explain return_cfi --bundle bundle\n\n\
        Addresses are as linked: take KASLR's slide off one that a running kernel printed.")]
    Explain {
        /// An address, a function or thunk, or one of them and an offset
        #[arg(value_name = "ADDR|SYMBOL")]
        what: String,
        /// The bundle
        #[arg(long)]
        bundle: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show how two bundles differ; exits with 1 if they do
    #[command(after_help = "Example:\n  \
        hardener diff old new\n\n\
        Compares the kernels, passes and their parameters, thunks, tables, and slots; of two different texts the functions.")]
    Diff {
        /// A bundle
        #[arg(value_name = "A")]
        a: PathBuf,
        /// Another
        #[arg(value_name = "B")]
        b: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the recipes that come with the hardener
    #[command(after_help = "Example:\n  \
        hardener recipe show hardened > my.toml\n  \
        hardener emit vmlinuz -o bundle --recipe my.toml")]
    Recipe {
        #[command(subcommand)]
        command: RecipeCommand,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Subcommand)]
enum RecipeCommand {
    /// Name them, and what they are for
    List,
    /// Print one as TOML
    Show {
        /// Its name
        #[arg(value_parser = preset_names())]
        name: String,
    },
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Emit {
            image,
            system_map,
            output,
            recipe,
            preset,
            modules,
            force,
            json,
        } => {
            let recipe = chosen(recipe.as_deref(), preset.as_deref());
            let kernel = files(&image, system_map.as_deref());
            recipe.and_then(|recipe| emit_bundle(kernel, &output, &recipe, &modules, force, json))
        }
        Command::Check {
            bundle,
            image,
            system_map,
            modules,
            json,
        } => {
            let kernel = files(&image, system_map.as_deref());
            return check_bundle(&bundle, kernel, &modules, json);
        }
        Command::Inspect { bundle, json } => inspect_bundle(&bundle, json),
        Command::Report { bundle, html, json } => report_bundle(&bundle, html.as_deref(), json),
        Command::Explain { what, bundle, json } => explain_place(&bundle, &what, json),
        Command::Diff { a, b, json } => match diff_bundles(&a, &b, json) {
            Ok((text, same)) => {
                print(&text);
                return ExitCode::from(if same { exit::YES } else { exit::NO });
            }
            Err(error) => Err(error),
        },
        Command::Recipe { command } => Ok(recipes(&command)),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "hardener", &mut script);
            Ok(String::from_utf8_lossy(&script).into_owned())
        }
    };
    match result {
        Ok(text) => {
            print(&text);
            ExitCode::from(exit::YES)
        }
        Err(error) => fail(&error),
    }
}

fn fail(error: &Error) -> ExitCode {
    eprintln!("hardener: {error}");
    ExitCode::from(error)
}

/// A reader that has gone away (`hardener inspect bundle | head -1`) is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// The recipe in a file or the preset of a name, else the passes' defaults.
fn chosen(file: Option<&Path>, preset: Option<&str>) -> Result<Recipe, Error> {
    let recipe = match (file, preset.and_then(presets::find)) {
        (Some(file), _) => Recipe::open(file),
        (None, Some(preset)) => preset.recipe(),
        (None, None) => Ok(Recipe::default()),
    };
    Ok(recipe.map_err(emit::EmitError::from)?)
}

fn preset_names() -> PossibleValuesParser {
    PossibleValuesParser::new(presets::ALL.map(|preset| preset.name))
}

fn recipes(command: &RecipeCommand) -> String {
    match command {
        RecipeCommand::List => {
            let lines =
                presets::ALL.map(|preset| format!("{:<9} {}\n", preset.name, preset.about()));
            lines.concat()
        }
        RecipeCommand::Show { name } => {
            presets::find(name).map_or(String::new(), |preset| preset.text.to_owned())
        }
    }
}

fn files<'a>(image: &'a Path, system_map: Option<&'a Path>) -> KernelFiles<'a> {
    KernelFiles { image, system_map }
}

fn emit_bundle(
    kernel: KernelFiles<'_>,
    output: &Path,
    recipe: &Recipe,
    modules: &[PathBuf],
    force: bool,
    json: bool,
) -> Result<String, Error> {
    // Said before the work is done; writing looks again.
    if output.exists() && !force {
        return Err(emit::EmitError::from(WriteError::Exists(output.to_owned())).into());
    }
    let progress = Progress::start();
    let emitted = emit::emit_with(kernel, recipe, modules, &mut |stage| {
        progress.stage(stage.label())
    })?;
    let mut bundle = emitted.bundle;
    progress.stage(emit::Stage::Write.label());
    bundle
        .write_dir(output, force)
        .map_err(emit::EmitError::from)?;
    drop(progress);
    for less in &emitted.given_up {
        eprintln!("hardener: this kernel cannot have all that the recipe lists first; {less}");
    }
    if emitted.lacks_oops {
        eprintln!(
            "hardener: the profile of debloat has no oops in it (`oops_end`): a task that is stopped may take the kernel with it; \
             add a recorded one, as tests/record does, or say on-violation = \"log\""
        );
    }
    for refused in &emitted.refused {
        eprintln!("hardener: left out: {refused}");
    }
    let summary = Summary::of(&bundle);
    Ok(if json {
        summary.json("penumbra.emit/v1")
    } else {
        let modules = summary.modules_line();
        let table = summary.variants_table();
        format!("wrote {}\n{table}{modules}", output.display())
    })
}

fn inspect_bundle(dir: &Path, json: bool) -> Result<String, Error> {
    let bundle = Bundle::read_dir(dir)?;
    let summary = Summary::of(&bundle);
    Ok(if json {
        summary.json("penumbra.inspect/v1")
    } else {
        summary.text()
    })
}

fn report_bundle(dir: &Path, html: Option<&Path>, json: bool) -> Result<String, Error> {
    let bundle = Bundle::read_dir(dir)?;
    let report = report::report(&bundle)?;
    let Some(path) = html else {
        return Ok(if json { report.json() } else { report.text() });
    };
    std::fs::write(path, report.html()).map_err(|source| Error::Page {
        path: path.to_owned(),
        source,
    })?;
    Ok(format!("wrote {}\n", path.display()))
}

fn explain_place(dir: &Path, what: &str, json: bool) -> Result<String, Error> {
    let bundle = Bundle::read_dir(dir)?;
    let explanation = report::explain(&bundle, what)?;
    Ok(if json {
        explanation.json()
    } else {
        explanation.text()
    })
}

fn diff_bundles(a: &Path, b: &Path, json: bool) -> Result<(String, bool), Error> {
    let (a, b) = (Bundle::read_dir(a)?, Bundle::read_dir(b)?);
    let difference = report::diff(&a, &b)?;
    let text = if json {
        difference.json()
    } else {
        difference.text()
    };
    Ok((text, difference.same()))
}

fn check_bundle(
    bundle: &Path,
    kernel: KernelFiles<'_>,
    modules: &[PathBuf],
    json: bool,
) -> ExitCode {
    match check::run(bundle, kernel, modules, json) {
        Ok(outcome) => {
            print(&outcome.render());
            ExitCode::from(if outcome.clean { exit::YES } else { exit::NO })
        }
        Err(error) => fail(&error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::Cli;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
