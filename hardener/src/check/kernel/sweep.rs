//! The text decoded from its first byte to its last, by two decoders that share nothing.
//!
//! A linear sweep is exact for this kernel's text: every address in every table falls on a boundary. Where the two
//! decoders disagree, neither is believed: no boundary is claimed until they meet again.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind};
use penumbra_bundle::LinkVa;
use std::ops::Range;
use yaxpeax_arch::LengthedInstruction;
use yaxpeax_x86::amd64::InstDecoder;

/// INT3.
const FILLER: u8 = 0xcc;

/// What the sweep found.
pub struct Sweep {
    start: LinkVa,
    /// One bit for each byte that starts an instruction.
    boundaries: Vec<u64>,
    /// The address after each call instruction, direct or indirect. Ascending.
    pub after_calls: Vec<LinkVa>,
    /// Direct branches, by place: where each stands and where it goes.
    pub branches: Vec<Branch>,
    /// Branches to an address that only the run knows, by place.
    pub open_branches: Vec<OpenBranch>,
    /// Addresses that RIP-relative operands of other instructions denote: the place and the address.
    pub references: Vec<(LinkVa, LinkVa)>,
    /// Stretches where the decoders disagree or cannot decode.
    pub unknown: Vec<LinkVa>,
}

/// A direct branch.
#[derive(Clone, Copy, Debug)]
pub struct Branch {
    /// Its place.
    pub at: LinkVa,
    /// Its target.
    pub to: LinkVa,
    /// Where a call returns to; none of a jump.
    pub back: Option<LinkVa>,
}

/// An indirect branch.
#[derive(Clone, Copy, Debug)]
pub struct OpenBranch {
    /// Its place.
    pub at: LinkVa,
    /// Where a call returns to; none of a jump.
    pub back: Option<LinkVa>,
}

impl Sweep {
    /// Decodes `bytes`, which stand at `start`: both halves at once. The second one counts only when the first ends where it
    /// starts.
    pub fn new(start: LinkVa, bytes: &[u8]) -> Sweep {
        let middle = middle(bytes);
        let ((mut sweep, end), (behind, _)) = rayon::join(
            || Sweep::part(start, bytes, 0..middle),
            || Sweep::part(start, bytes, middle..bytes.len()),
        );
        let behind = match end == middle {
            true => behind,
            false => Sweep::part(start, bytes, end..bytes.len()).0,
        };
        sweep.add(behind);
        sweep
    }

    /// The same on this thread alone, for whoever holds a lock: a thread that waits for another one may take up work that asks
    /// for it.
    pub fn alone(start: LinkVa, bytes: &[u8]) -> Sweep {
        Sweep::part(start, bytes, 0..bytes.len()).0
    }

    /// Decodes what starts in `part`; where the last of it ends.
    fn part(start: LinkVa, bytes: &[u8], part: Range<usize>) -> (Sweep, usize) {
        let mut sweep = Sweep {
            start,
            boundaries: vec![0; bytes.len() / 64 + 1],
            after_calls: Vec::new(),
            branches: Vec::new(),
            open_branches: Vec::new(),
            references: Vec::new(),
            unknown: Vec::new(),
        };
        let second = InstDecoder::default();
        let mut first = Decoder::with_ip(64, bytes, start.0, DecoderOptions::NONE);
        step(&mut first, start, part.start);
        let mut instruction = Instruction::default();
        while first.can_decode() && first.position() < part.end {
            let at = first.position();
            // Filler is most of the text of some kernels, and one byte that nobody misreads.
            if bytes[at] == FILLER {
                let run = bytes[at..]
                    .iter()
                    .take_while(|byte| **byte == FILLER)
                    .count();
                (at..at + run).for_each(|at| sweep.mark(at));
                step(&mut first, start, at + run);
                continue;
            }
            first.decode_out(&mut instruction);
            let window = &bytes[at..bytes.len().min(at + 15)];
            let agreed = second
                .decode_slice(window)
                .is_ok_and(|other| other.len().to_const() as usize == instruction.len());
            if instruction.is_invalid() || !agreed {
                sweep.unknown.push(LinkVa(start.0 + at as u64));
                if instruction.is_invalid() {
                    step(&mut first, start, at + 1);
                }
                continue;
            }
            sweep.mark(at);
            sweep.record(&instruction);
        }
        (sweep, first.position())
    }

    /// Adds what was found behind it, and gives back what memory is not needed.
    fn add(&mut self, behind: Sweep) {
        let words = self.boundaries.iter_mut().zip(behind.boundaries);
        words.for_each(|(word, more)| *word |= more);
        self.after_calls.extend(behind.after_calls);
        self.branches.extend(behind.branches);
        self.open_branches.extend(behind.open_branches);
        self.references.extend(behind.references);
        self.unknown.extend(behind.unknown);
        self.after_calls.shrink_to_fit();
        self.branches.shrink_to_fit();
        self.references.shrink_to_fit();
    }

    /// Whether an instruction starts at `va`, by both decoders.
    pub fn is_boundary(&self, va: LinkVa) -> bool {
        let Some(at) = va.0.checked_sub(self.start.0) else {
            return false;
        };
        self.boundaries
            .get(at as usize / 64)
            .is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    /// How many boundaries there are, filler included.
    pub fn count(&self) -> u64 {
        self.boundaries
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    fn mark(&mut self, at: usize) {
        self.boundaries[at / 64] |= 1 << (at % 64);
    }

    fn record(&mut self, instruction: &Instruction) {
        let at = LinkVa(instruction.ip());
        let back = is_call(instruction).then(|| LinkVa(instruction.next_ip()));
        self.after_calls.extend(back);
        if instruction.flow_control() == FlowControl::Next && instruction.is_ip_rel_memory_operand()
        {
            let to = LinkVa(instruction.ip_rel_memory_address());
            self.references.push((at, to));
        }
        if instruction.op0_kind() == OpKind::NearBranch64 {
            self.branches.push(Branch {
                at,
                to: LinkVa(instruction.near_branch_target()),
                back,
            });
        } else if back.is_some() || instruction.flow_control() == FlowControl::IndirectBranch {
            self.open_branches.push(OpenBranch { at, back });
        }
    }
}

/// A place near the middle where an instruction starts, most likely: behind filler.
fn middle(bytes: &[u8]) -> usize {
    let half = bytes.len() / 2;
    let behind = bytes[half..].windows(2);
    let behind = behind
        .enumerate()
        .find(|(_, pair)| pair[0] == FILLER && pair[1] != FILLER);
    behind.map_or(half, |(at, _)| half + at + 1)
}

/// Whether `instruction` pushes a return address: near calls, not system or hypervisor calls, whose kind iced shares.
pub fn is_call(instruction: &Instruction) -> bool {
    instruction.is_call_near() || instruction.is_call_near_indirect()
}

fn step(decoder: &mut Decoder<'_>, start: LinkVa, at: usize) {
    decoder
        .set_position(at)
        .expect("a position inside the bytes being decoded");
    decoder.set_ip(start.0 + at as u64);
}
