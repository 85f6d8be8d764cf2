//! The views: built from the explained text, enabled at one moment, verified, removed.
//!
//! Safety rule of this folder: whatever happens, at any call, the guest either runs on its own text in the host view or on
//! complete views that were proven equal to it up to the edits; and the journal knows enough to take everything out.

pub mod apply;
mod build;
pub mod cave;
pub mod digest;
#[cfg(test)]
mod fault_tests;
pub mod fill;
mod follow;
pub mod journal;
pub mod modules;
pub mod pages;
pub mod refusal;
pub mod remove;
#[cfg(test)]
pub(crate) mod testkit;
#[cfg(test)]
mod tests;
pub mod verify;
mod verify_modules;

pub use apply::{Applied, ApplyError, Request, apply};
pub use journal::{Journal, JournalError, State};
pub use remove::{CaveFate, RemoveError, Removed, remove};

use crate::guest::explain::{self, ExplainError, Explained, ReturnForm};
use crate::guest::text::RunningText;
use crate::guest::{Kernel, ReadError, Slide};
use crate::xen::Hypervisor;
use cave::{CaveError, CaveImage};
use penumbra_bundle::Bundle;
use std::thread::sleep;
use std::time::Duration;
use thiserror::Error;

/// Times that pages with something unexplained are read again: a poke under way shows as an int3 for some microseconds.
const REREADS: u32 = 20;
/// Time between two of these.
const REREAD_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 0 } else { 5 });

/// Why the running text cannot be read and explained.
#[derive(Debug, Error)]
pub enum TextError {
    /// Memory cannot be read.
    #[error("the guest's text cannot be read: {0}")]
    Read(#[from] ReadError),
    /// Something is not explained.
    #[error(transparent)]
    Explain(#[from] ExplainError),
    /// The cave cannot be made.
    #[error(transparent)]
    Cave(#[from] CaveError),
}

/// The running text, explained, with the cave as this guest gets it.
#[derive(Clone, Debug)]
pub struct Understood {
    /// The text as it runs.
    pub text: RunningText,
    /// What was learned of it.
    pub explained: Explained,
    /// The cave for this guest.
    pub cave: CaveImage,
}

/// Reads the text and explains it against `expected`, looking again at what a poke under way may have torn.
pub fn understand(
    hypervisor: &dyn Hypervisor,
    kernel: &Kernel,
    bundle: &Bundle,
    expected: &[u8],
) -> Result<Understood, TextError> {
    let text = RunningText::read(hypervisor, kernel, &bundle.manifest)?;
    explain_text(hypervisor, kernel, bundle, expected, text)
}

/// The same for a text that was read before: reads it again, into the same memory (a kernel's text is large).
pub fn understand_again(
    hypervisor: &dyn Hypervisor,
    kernel: &Kernel,
    bundle: &Bundle,
    expected: &[u8],
    mut text: RunningText,
) -> Result<Understood, TextError> {
    text.reread_all(hypervisor)?;
    explain_text(hypervisor, kernel, bundle, expected, text)
}

fn explain_text(
    hypervisor: &dyn Hypervisor,
    kernel: &Kernel,
    bundle: &Bundle,
    expected: &[u8],
    mut text: RunningText,
) -> Result<Understood, TextError> {
    let mut tries = 0;
    loop {
        let result = explain_once(bundle, kernel.slide, expected, &text.bytes);
        match result {
            Ok((explained, cave)) => {
                return Ok(Understood {
                    text,
                    explained,
                    cave,
                });
            }
            Err(TextError::Explain(ExplainError::Unexplained(ranges))) if tries < REREADS => {
                tries += 1;
                sleep(REREAD_PAUSE);
                for range in ranges {
                    for page in [range.page, range.page + 1] {
                        if page < text.frames.len() {
                            text.reread(hypervisor, page)?;
                        }
                    }
                }
            }
            Err(error) => return Err(error),
        }
    }
}

fn explain_once(
    bundle: &Bundle,
    slide: Slide,
    expected: &[u8],
    running: &[u8],
) -> Result<(Explained, CaveImage), TextError> {
    // Retpolines off, or a text that is wholly unlike the file's, is the better message than a mixed return form.
    let returns = explain::return_form(bundle, running).unwrap_or(ReturnForm::Ret);
    let cave = CaveImage::new(bundle, slide, returns)?;
    let explained = explain::explain(
        bundle,
        slide,
        expected,
        running,
        Some((cave.at, &cave.bytes)),
    )?;
    Ok((explained, cave))
}
