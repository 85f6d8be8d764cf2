//! Which caller-saved registers, and flags, the code behind an address reads before it writes them: a backward data flow over
//! the whole text, one instruction at a time. The ABI speaks where calls and returns end it (see `zeroing`).

use super::Text;
use super::steps::{INT3, Set, Step, Steps};
use crate::image::{Image, Tables};
use iced_x86::{Decoder, DecoderOptions, Instruction};
use penumbra_bundle::TextOff;

/// What is live before each instruction.
pub struct Liveness {
    places: Vec<u32>,
    live: Vec<Set>,
}

impl Liveness {
    /// Follows the `wanted` registers through the text, to calls and returns.
    pub fn find(image: &Image, tables: &Tables, text: &Text, wanted: Set) -> Liveness {
        let code = &text.bytes[..text.span.code.len() as usize];
        let mut read = Steps::new(image, tables, text, wanted, None);
        let mut places = Vec::new();
        let mut steps: Vec<Step> = Vec::new();
        // Where steps may also go, by step.
        let mut targets: Vec<(u32, TextOff)> = Vec::new();
        let mut decoder = Decoder::with_ip(64, code, text.range.start.0, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        let mut goes = Vec::new();
        while decoder.can_decode() {
            let at = decoder.position();
            decoder.decode_out(&mut instruction);
            if code[at] == INT3 {
                continue;
            }
            let step = read.read(TextOff(at as u32), &instruction, &mut goes);
            let number = steps.len() as u32;
            targets.extend(goes.drain(..).map(|to| (number, to)));
            places.push(at as u32);
            steps.push(step);
        }
        let mut edges = Vec::with_capacity(targets.len());
        for (from, to) in targets {
            match places.binary_search(&to.0) {
                Ok(step) => edges.push((from, step as u32)),
                Err(_) => steps[from as usize].reads |= wanted,
            }
        }
        let live = solve(&steps, &edges);
        Liveness { places, live }
    }

    /// What is read behind `at`; where no instruction starts, as behind a call that a replacement brings, that is not known.
    pub fn at(&self, at: TextOff) -> Set {
        let found = self.places.binary_search(&at.0);
        found.map_or(Set::MAX, |step| self.live[step])
    }
}

/// Goes through the text backwards once, then again before whatever has changed. Edges ascend.
fn solve(steps: &[Step], edges: &[(u32, u32)]) -> Vec<Set> {
    let mut back: Vec<(u32, u32)> = edges.iter().map(|(from, to)| (*to, *from)).collect();
    back.sort_unstable();
    let mut live = vec![0; steps.len()];
    // Steps that were looked at before one that they lead to.
    let mut again = Vec::new();
    let mut ahead = edges.iter().rev().peekable();
    let mut whence = back.iter().rev().peekable();
    for number in (0..steps.len() as u32).rev() {
        let aside = std::iter::from_fn(|| ahead.next_if(|(from, _)| *from == number));
        let before = before(steps, &live, number, aside);
        live[number as usize] = before;
        while let Some((_, from)) = whence.next_if(|(to, _)| *to == number) {
            again.extend(Some(*from).filter(|from| *from >= number && before != 0));
        }
    }
    let of = |pairs: &[(u32, u32)], number: u32| {
        let start = pairs.partition_point(|(step, _)| *step < number);
        let count = pairs[start..].partition_point(|(step, _)| *step == number);
        start..start + count
    };
    while let Some(number) = again.pop() {
        let aside = edges[of(edges, number)].iter();
        let before = before(steps, &live, number, aside);
        if before == live[number as usize] {
            continue;
        }
        live[number as usize] = before;
        again.extend(back[of(&back, number)].iter().map(|(_, from)| *from));
        let last = number.checked_sub(1);
        again.extend(last.filter(|last| steps[*last as usize].falls));
    }
    live
}

/// What is live before a step that also leads where `aside` says, by what is live elsewhere.
fn before<'a>(
    steps: &[Step],
    live: &[Set],
    number: u32,
    aside: impl Iterator<Item = &'a (u32, u32)>,
) -> Set {
    let step = &steps[number as usize];
    let next = live.get(number as usize + 1).copied().unwrap_or(0);
    let behind = if step.falls { next } else { 0 };
    let behind = aside.fold(behind, |behind, (_, to)| behind | live[*to as usize]);
    step.reads | behind & !step.writes
}
