//! The functions of one kernel that take much of the stack at once, and how much must be left where they are called.

use super::Text;
use super::watched::Watched;
use crate::image::{Fault, Image, Tables};
use memchr::memmem;
use penumbra_bundle::TextOff;
use std::collections::BTreeMap;

/// `sub $imm32,%rsp`, without the immediate. With eight bits no frame is large.
const SUB_RSP: [u8; 3] = [0x48, 0x81, 0xec];
/// No frame counts as larger: it could step over the guard page below the stack, which has this many bytes.
pub const LARGEST: u32 = 4096;

/// What counts as large, and what is to be left.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Functions are looked at that take so many bytes at once.
    pub frame: u32,
    /// So many bytes must be left of the stack below these.
    pub left: u32,
}

/// Functions with large frames, all with an `__fentry__` site.
pub struct LargeFrames {
    /// With their calls.
    pub watched: Watched,
    /// How much stack must be left where each is called, by the number that it has there.
    pub needs: Vec<u32>,
    /// What counts as large.
    pub limits: Limits,
    /// Where the top of its task's stack stands, from a CPU's GS base.
    pub top_of_stack: u32,
    /// Counts, for the manifest.
    pub figures: BTreeMap<String, u64>,
}

impl LargeFrames {
    /// Finds all but those `elsewhere`, whose calls another pass leads through its thunks.
    pub fn find(
        image: &Image,
        tables: &Tables,
        text: &Text,
        limits: Limits,
        elsewhere: impl Fn(TextOff) -> bool,
    ) -> Result<LargeFrames, Fault> {
        let mut frames: BTreeMap<usize, u32> = BTreeMap::new();
        for at in memmem::find_iter(&text.bytes[..text.span.code.len() as usize], &SUB_RSP) {
            let bytes = text.bytes.get(at + SUB_RSP.len()..at + SUB_RSP.len() + 4);
            let size = bytes.and_then(|bytes| bytes.try_into().ok());
            let size = size.map_or(0, u32::from_le_bytes);
            let place = TextOff(at as u32);
            if size >= limits.frame
                && i32::try_from(size).is_ok()
                && text.sweep.is_boundary(place)
                && let Some(number) = text.functions.number(place)
            {
                let frame = frames.entry(number).or_default();
                *frame = size.max(*frame);
            }
        }
        let all = frames.len();
        frames.retain(|number, _| text.functions.calls_fentry(*number));
        let traced = frames.len();
        frames.retain(|number, _| !elsewhere(text.functions.start(*number)));
        let functions: Vec<TextOff> = frames
            .keys()
            .map(|number| text.functions.start(*number))
            .collect();
        let taken = functions
            .iter()
            .filter(|at| text.entries.binary_search(at).is_ok());
        let figures = [
            ("functions", functions.len() as u64),
            ("functions-not-traceable", (all - traced) as u64),
            (
                "functions-of-another-pass",
                (traced - functions.len()) as u64,
            ),
            // What reaches these by their address is not asked.
            ("functions-with-address-taken", taken.count() as u64),
            (
                "largest-frame",
                frames.values().copied().max().unwrap_or(0).into(),
            ),
        ];
        let top = image.per_cpu("cpu_current_top_of_stack", "top_of_stack")?;
        let top_of_stack = u32::try_from(top.0).map_err(|_| {
            Fault::unsupported(
                ".BTF",
                "does not tell where the top of the stack stands".to_owned(),
            )
        })?;
        Ok(LargeFrames {
            watched: Watched::of(image, tables, text, functions)?,
            needs: frames
                .into_values()
                .map(|frame| limits.left + frame.min(LARGEST))
                .collect(),
            limits,
            top_of_stack,
            figures: figures.map(|(name, value)| (name.to_owned(), value)).into(),
        })
    }

    /// How much stack must be left where the function that starts at `at` is called.
    pub fn need(&self, at: TextOff) -> u32 {
        let index = self.watched.functions.binary_search(&at);
        index.map_or(0, |index| self.needs[index])
    }
}
