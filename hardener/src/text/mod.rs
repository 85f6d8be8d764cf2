//! The kernel's text: swept, its slots, caves and legal targets found, and how it may differ at run time.

mod behind;
mod bitmap;
pub mod callgraph;
mod caves;
pub mod changeable;
mod entries;
mod error;
pub mod exposed;
mod frames;
mod functions;
pub mod large_frames;
mod liveness;
pub mod model;
pub mod module;
pub mod outside;
pub mod probed;
pub mod promotion;
mod regions;
mod replaced;
pub mod return_classes;
pub mod return_sets;
mod returns;
mod scratch;
pub mod self_checks;
mod slots;
pub mod stack_use;
mod steps;
mod sweep;
pub mod watched;
pub mod zeroing;

pub use bitmap::Bitmap;
pub use caves::{Cave, FILLER};
pub use error::TextError;
pub use functions::Functions;
pub use regions::Regions;
pub use slots::{Direct, Indirect, REGISTERS, Return, Slots, inline_asm_is_plain};
pub use sweep::{Call, Sweep, taken_in};

use crate::image::{Image, Tables};
use penumbra_bundle::{LinkVa, TextOff, VaRange};

/// A page of the guest.
pub const PAGE: u64 = 4096;

/// The text of one kernel and all that is known about it.
pub struct Text {
    /// Whole pages from `_stext` to `_etext`.
    pub range: VaRange,
    /// The same, with the section's own end.
    pub span: Span,
    /// The bytes of [`Text::range`] in the file.
    pub bytes: Vec<u8>,
    /// Instruction boundaries and what the instructions say about control flow.
    pub sweep: Sweep,
    /// Where functions start, and which are compiled for tracing.
    pub functions: Functions,
    /// Ranges that hold special code.
    pub regions: Regions,
    /// Filler that thunks may use.
    pub cave: Cave,
    /// What passes may edit.
    pub slots: Slots,
    /// Every address that a return may reach. Sorted.
    pub return_targets: Vec<TextOff>,
    /// Those of them that no call precedes: code that is put on stacks as a return address. Sorted.
    pub return_specials: Vec<TextOff>,
    /// Every address in the text that an indirect branch may reach. Sorted.
    pub entries: Vec<TextOff>,
    /// Those of them that nothing in the image refers to, but an unsealed ENDBR64 names. Sorted.
    pub landings: Vec<TextOff>,
}

impl Text {
    /// Analyses the text of `image`.
    pub fn analyse(image: &Image, tables: &Tables) -> Result<Text, TextError> {
        let span = Span::of(image)?;
        let Span { range, code } = span;
        let start = range.start;
        // The last page's rest lies in the same segment; what the file does not have is zero when the kernel runs.
        let section = image
            .at(start, code.len() as usize)
            .ok_or(TextError::Missing {
                what: "the bytes of .text",
            })?;
        let mut bytes = image
            .at(start, range.len() as usize)
            .unwrap_or(section)
            .to_vec();
        bytes.resize(range.len() as usize, 0);
        let sweep = Sweep::run(&bytes[..code.len() as usize], span);
        sweep::gate(&sweep, image, tables, span)?;
        let regions = Regions::find(image, tables, span)?;
        let functions = Functions::find(image, tables, span, &sweep);
        let cave = caves::find(&bytes, span, &regions)?;
        let plain = inline_asm_is_plain(image);
        let checks = self_checks::find(image);
        let (slots, (return_targets, entries)) = rayon::join(
            || {
                slots::find(
                    &bytes, span, image, tables, &sweep, &regions, &functions, &checks, plain,
                )
            },
            || {
                rayon::join(
                    || returns::find(span, image, tables, &sweep, &regions),
                    || entries::find(span, image, tables, &sweep, &regions, &functions),
                )
            },
        );
        let (slots, return_targets) = (slots?, return_targets?);
        Ok(Text {
            range,
            span,
            bytes,
            sweep,
            functions,
            regions,
            cave,
            slots,
            return_targets,
            entries: entries.all,
            landings: entries.landings,
            return_specials: returns::specials(span, image),
        })
    }

    /// The address of an offset.
    pub fn va(&self, at: TextOff) -> LinkVa {
        LinkVa(self.range.start.0 + u64::from(at.0))
    }
}

/// The text as a range of pages and as the section's own range, and offsets in it.
#[derive(Clone, Copy)]
pub struct Span {
    /// Whole pages.
    pub range: VaRange,
    /// The section.
    pub code: VaRange,
}

impl Span {
    /// That of `image`.
    pub fn of(image: &Image) -> Result<Span, TextError> {
        let section = image
            .section(".text")
            .ok_or(TextError::Missing { what: ".text" })?;
        let code = section.range;
        let start = LinkVa(code.start.0 - code.start.0 % PAGE);
        let range = VaRange {
            start,
            end: LinkVa(code.end.0.next_multiple_of(PAGE)),
        };
        if code.start != start || code.is_empty() || range.len() > u64::from(u32::MAX) / 2 {
            return Err(TextError::Placement { range: code });
        }
        Ok(Span { range, code })
    }

    /// The offset of `va`, when it lies inside the section.
    pub fn offset(&self, va: LinkVa) -> Option<TextOff> {
        self.code
            .contains(va)
            .then(|| TextOff((va.0 - self.range.start.0) as u32))
    }

    /// The address of an offset.
    pub fn va(&self, at: TextOff) -> LinkVa {
        LinkVa(self.range.start.0 + u64::from(at.0))
    }
}
