//! A variant's text over a dump of running text, as its view would show it: the same explanation, cave and pages as for a guest.

use super::cave::CaveError;
use super::pages::{self, PageError};
use super::{TextError, explain_once};
use crate::exit::{Exit, Exits};
use crate::guest::Slide;
use crate::guest::explain::{self, ExplainError};
use crate::xen::PAGE;
use penumbra_bundle::Bundle;
use thiserror::Error;

/// Why a dump cannot be filled.
#[derive(Debug, Error)]
pub enum FillError {
    /// The bundle has no such variant.
    #[error("the bundle has no variant `{wanted}`; it has {known}")]
    Variant {
        /// What was asked for.
        wanted: String,
        /// What there is.
        known: String,
    },
    /// The dump has another length.
    #[error(
        "the dump has {found} bytes, the bundle's text {expected}; dump that many from the start of the text (`Kernel code` in /proc/iomem)"
    )]
    Length {
        /// Bytes of the dump.
        found: usize,
        /// Bytes of the text.
        expected: usize,
    },
    /// The dump is not the running text of the bundle's kernel at this slide.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A slot holds something else.
    #[error(transparent)]
    Page(#[from] PageError),
}

impl Exits for FillError {
    fn exit(&self) -> Exit {
        match self {
            FillError::Text(TextError::Explain(ExplainError::Unexplained(_))) => Exit::No,
            _ => Exit::Cannot,
        }
    }
}

impl From<CaveError> for FillError {
    fn from(error: CaveError) -> FillError {
        FillError::Text(TextError::Cave(error))
    }
}

/// A text as a view shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Filled {
    /// All of the text, cave included.
    pub text: Vec<u8>,
    /// Pages that the view has of its own: those with an edit that differs from the running bytes.
    pub pages: usize,
}

/// The text of `variant` over `running`, the text of a guest whose kernel KASLR moved by `slide`. Every byte of `running` is
/// explained first, as before an apply; a cave that holds this bundle's thunks already is explained too.
pub fn fill(
    bundle: &Bundle,
    variant: &str,
    slide: Slide,
    running: &[u8],
) -> Result<Filled, FillError> {
    let variants = &bundle.manifest.variants;
    let Some(index) = variants.iter().position(|known| known.name == variant) else {
        let names: Vec<&str> = variants.iter().map(|known| known.name.as_str()).collect();
        return Err(FillError::Variant {
            wanted: variant.to_owned(),
            known: names.join(", "),
        });
    };
    if running.len() != bundle.text.len() {
        return Err(FillError::Length {
            found: running.len(),
            expected: bundle.text.len(),
        });
    }
    let expected = explain::expected(bundle, slide);
    let (_, cave) = explain_once(bundle, slide, &expected, running)?;
    let mut text = running.to_vec();
    text[cave.at.0 as usize..][..cave.bytes.len()].copy_from_slice(&cave.bytes);
    let pages = pages::build(bundle, variant, &bundle.edits[index], &text, &expected)?;
    for (page, bytes) in &pages {
        text[*page as usize * PAGE..][..PAGE].copy_from_slice(bytes);
    }
    Ok(Filled {
        text,
        pages: pages.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::{FillError, fill};
    use crate::exit::{Exit, Exits};
    use crate::guest::Slide;
    use crate::views::testkit::{self, SLIDE};
    use crate::views::{apply, journal};

    #[test]
    fn a_filled_dump_is_what_the_view_shows() {
        let bundle = testkit::bundle();
        let running = testkit::running(&bundle);
        let fake = testkit::guest(&bundle);
        let dir = tempfile::tempdir().unwrap();
        let journal: journal::Journal = testkit::journal(&dir);
        let applied = apply(&fake, &journal, &testkit::request(&bundle)).unwrap();
        for name in ["stock", "fast", "hardened"] {
            let filled = fill(&bundle, name, Slide(SLIDE), &running).unwrap();
            let view = applied.state.view(name).unwrap();
            assert_eq!(filled.text, testkit::text_of(&fake, view), "{name}");
            assert_eq!(filled.text == running, filled.pages == 0 && name != "stock");
        }
    }

    #[test]
    fn what_is_not_the_kernels_text_is_refused() {
        let bundle = testkit::bundle();
        let mut running = testkit::running(&bundle);
        let missing = fill(&bundle, "quick", Slide(SLIDE), &running).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "the bundle has no variant `quick`; it has stock, fast, hardened"
        );
        let short = fill(&bundle, "fast", Slide(SLIDE), &running[1..]).unwrap_err();
        assert!(matches!(short, FillError::Length { .. }), "{short}");
        // A byte that no site covers.
        running[0x45] ^= 0x10;
        let changed = fill(&bundle, "fast", Slide(SLIDE), &running).unwrap_err();
        assert_eq!(changed.exit(), Exit::No, "{changed}");
    }
}
