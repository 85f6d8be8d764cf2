//! What the kernel may put over the text, as liveness sees it.

use super::Span;
use super::steps::{Set, accesses, comes_next};
use crate::image::{Image, Tables};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory};
use penumbra_bundle::{LinkVa, TextOff};
use rustc_hash::FxHashMap;

/// What the kernel may put over the text at one site.
#[derive(Default)]
pub struct Replaced {
    /// What it reads.
    pub reads: Set,
    /// How long the site is.
    len: usize,
    /// Where it goes when it is a jump each time, or nothing.
    jumps: Vec<TextOff>,
    /// Whether it is something else.
    other: bool,
}

impl Replaced {
    /// Where the replacements of a jump go on besides behind it, when they are jumps or nothing.
    pub fn switch(&self, instruction: &Instruction) -> Option<&[TextOff]> {
        let jump = instruction.is_jmp_short_or_near() && instruction.len() == self.len;
        (jump && !self.other).then_some(&self.jumps)
    }
}

/// What the kernel may put over the text, by the site's start.
pub fn replaced(
    image: &Image,
    tables: &Tables,
    span: Span,
    wanted: Set,
) -> FxHashMap<TextOff, Replaced> {
    let mut factory = InstructionInfoFactory::new();
    let mut sites: FxHashMap<TextOff, Replaced> = FxHashMap::default();
    for entry in &tables.alternatives {
        let Some(at) = span.offset(entry.site) else {
            continue;
        };
        let len = usize::from(entry.replacement_len);
        let code = image.at(entry.replacement, len);
        let decoder = Decoder::with_ip(
            64,
            code.unwrap_or_default(),
            entry.replacement.0,
            DecoderOptions::NONE,
        );
        let site = sites.entry(at).or_default();
        site.len = site.len.max(usize::from(entry.site_len));
        let mut written = 0;
        for instruction in decoder {
            let (reads, writes) = accesses(&mut factory, &instruction, wanted);
            site.reads |= match comes_next(instruction.flow_control()) {
                true => reads & !written,
                false => wanted,
            };
            // Behind a branch, what was written may not have been.
            if instruction.flow_control() == FlowControl::Next {
                written |= writes;
            }
            let jump = instruction.is_jmp_short_or_near() && instruction.len() == len;
            let to = jump.then(|| LinkVa(instruction.near_branch_target()));
            match to.and_then(|to| span.offset(to)) {
                Some(to) => site.jumps.push(to),
                None => site.other = true,
            }
        }
    }
    sites
}
