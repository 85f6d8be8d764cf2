//! Whether the code behind an address reads some of a few registers before it writes them, on behind calls and returns: a
//! compiler may have looked at what a callee leaves alone (`-fipa-ra`). Asked of few addresses, and answered after a few
//! instructions each, where [`super::liveness`] goes through the whole text.

use super::Text;
use super::steps::{BehindCalls, INT3, Set, Steps};
use crate::image::{Image, Tables};
use iced_x86::{Decoder, DecoderOptions};
use penumbra_bundle::TextOff;
use rustc_hash::FxHashMap;

/// Follows ways through the text.
pub struct Behind<'a> {
    text: &'a Text,
    code: &'a [u8],
    decoder: Decoder<'a>,
    steps: Steps<'a>,
    /// What has been said of an address.
    known: FxHashMap<TextOff, bool>,
    /// Where the ways of one question have been, and what nothing on some of them had written.
    seen: FxHashMap<TextOff, Set>,
    open: Vec<(TextOff, Set)>,
    goes: Vec<TextOff>,
}

impl<'a> Behind<'a> {
    /// Asks about the `wanted` registers. Where assembly is called, it is not known to whom one returns, or a jump goes to a
    /// label in one of the functions `labelled` (by their text), all of them are read.
    pub fn new(
        image: &'a Image,
        tables: &Tables,
        text: &'a Text,
        wanted: Set,
        behind_calls: BehindCalls<'a>,
    ) -> Behind<'a> {
        let code = &text.bytes[..text.span.code.len() as usize];
        Behind {
            text,
            code,
            decoder: Decoder::new(64, code, DecoderOptions::NONE),
            steps: Steps::new(image, tables, text, wanted, Some(behind_calls)),
            known: FxHashMap::default(),
            seen: FxHashMap::default(),
            open: Vec::new(),
            goes: Vec::new(),
        }
    }

    /// Whether any of them is read behind `at`; where no instruction starts, as behind a call that a replacement brings, that
    /// is not known, and counts.
    pub fn reads(&mut self, at: TextOff) -> bool {
        if let Some(known) = self.known.get(&at) {
            return *known;
        }
        let reads = self.walk(at);
        self.known.insert(at, reads);
        reads
    }

    fn walk(&mut self, at: TextOff) -> bool {
        self.seen.clear();
        self.open.clear();
        self.open.push((at, self.steps.wanted));
        while let Some((at, unwritten)) = self.open.pop() {
            let place = at.0 as usize;
            if !self.is_step(at) {
                return true;
            }
            let known = self.seen.entry(at).or_default();
            if *known & unwritten == unwritten {
                continue;
            }
            *known |= unwritten;
            if self.decoder.set_position(place).is_err() {
                return true;
            }
            self.decoder.set_ip(self.text.va(at).0);
            let instruction = self.decoder.decode();
            let step = self.steps.read(at, &instruction, &mut self.goes);
            if step.reads & unwritten != 0 {
                self.goes.clear();
                return true;
            }
            let left = unwritten & !step.writes;
            if left == 0 {
                // Where it goes must be an instruction all the same.
                let lost = self.goes.iter().any(|to| !self.is_step(*to));
                self.goes.clear();
                if lost {
                    return true;
                }
                continue;
            }
            self.open.extend(self.goes.drain(..).map(|to| (to, left)));
            if step.falls {
                let next = place + instruction.len();
                let filler = self.code[next..].iter().take_while(|byte| **byte == INT3);
                let next = next + filler.count();
                if next < self.code.len() {
                    self.open.push((TextOff(next as u32), left));
                }
            }
        }
        false
    }

    /// Whether an instruction starts at `at` that is no filler.
    fn is_step(&self, at: TextOff) -> bool {
        let byte = self.code.get(at.0 as usize);
        self.text.sweep.is_boundary(at) && byte.is_some_and(|byte| *byte != INT3)
    }
}
