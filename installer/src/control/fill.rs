//! `fill`.

use super::{CliError, cli, print};
use crate::exit::Exit;
use crate::guest::Slide;
use crate::views::fill;
use penumbra_bundle::Bundle;
use std::fs;
use std::io::Read as _;
use std::path::Path;

/// Runs `fill`.
pub fn fill(args: &cli::Fill) -> Result<Exit, CliError> {
    let bundle = Bundle::read_dir(&args.bundle)?;
    let running = dump(&args.text, bundle.text.len())?;
    let filled = fill::fill(&bundle, &args.variant, Slide(args.slide), &running)?;
    fs::write(&args.output, &filled.text).map_err(|source| CliError::File {
        path: args.output.clone(),
        source,
    })?;
    print(&format!(
        "{}: {} pages of its own\n",
        args.variant, filled.pages
    ))?;
    Ok(Exit::Done)
}

/// At most one byte more than the text has: a dump of the wrong length is told by its length, not read whole.
fn dump(path: &Path, len: usize) -> Result<Vec<u8>, CliError> {
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(len as u64 + 1).read_to_end(&mut bytes))
        .map_err(|source| CliError::File {
            path: path.to_owned(),
            source,
        })?;
    Ok(bytes)
}
