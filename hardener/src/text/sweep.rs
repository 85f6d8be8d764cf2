//! A linear sweep over the text with iced-x86. It is exact for kernels: objtool and the assembler leave no data between
//! instructions (measured; see the boundary gate, which refuses an image for which that does not hold).

use super::{Bitmap, Span, TextError};
use crate::image::{Image, Tables};
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};
use penumbra_bundle::{LinkVa, TextOff};
use std::ops::Range;

/// Filler between functions.
const INT3: u8 = 0xcc;

/// A call instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Call {
    /// Where it starts.
    pub at: TextOff,
    /// The return address.
    pub end: TextOff,
    /// Where a direct one goes.
    pub to: Option<LinkVa>,
}

/// A jump, conditional or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Jump {
    /// Where it starts.
    pub at: TextOff,
    /// Where a direct one goes.
    pub to: Option<LinkVa>,
}

/// What the sweep found.
pub struct Sweep {
    /// Where instructions start.
    pub boundaries: Bitmap,
    /// Every call, direct or not, by address.
    pub calls: Vec<Call>,
    /// Every jump, direct or not, by address.
    pub jumps: Vec<Jump>,
    /// Addresses that a `lea` relative to the instruction pointer takes.
    pub taken: Vec<LinkVa>,
    /// Where ENDBR64 stands.
    pub endbr: Vec<TextOff>,
    /// How many instructions there are.
    pub instructions: u64,
    /// Bytes that are no instruction.
    pub invalid: u64,
}

impl Sweep {
    /// Sweeps the section's bytes: both halves at once. The second one counts only when the first ends where it starts.
    pub fn run(code: &[u8], span: Span) -> Sweep {
        let middle = middle(code);
        let ((mut sweep, end), (second, _)) = rayon::join(
            || Sweep::part(code, span, 0..middle),
            || Sweep::part(code, span, middle..code.len()),
        );
        let second = match end == middle {
            true => second,
            false => Sweep::part(code, span, end..code.len()).0,
        };
        sweep.add(second);
        sweep.boundaries.set(code.len());
        sweep
    }

    /// What starts in `part`, and where the last instruction of it ends.
    fn part(code: &[u8], span: Span, part: Range<usize>) -> (Sweep, usize) {
        let mut sweep = Sweep {
            boundaries: Bitmap::new(code.len() + 1),
            calls: Vec::with_capacity(part.len() / 50),
            jumps: Vec::with_capacity(part.len() / 25),
            taken: Vec::new(),
            endbr: Vec::new(),
            instructions: 0,
            invalid: 0,
        };
        let start = span.range.start.0;
        let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
        if decoder.set_position(part.start).is_err() {
            return (sweep, part.start);
        }
        decoder.set_ip(start + part.start as u64);
        let mut instruction = Instruction::default();
        while decoder.can_decode() && decoder.position() < part.end {
            decoder.decode_out(&mut instruction);
            let at = (instruction.ip() - start) as u32;
            sweep.boundaries.set(at as usize);
            sweep.instructions += 1;
            if instruction.is_invalid() {
                sweep.invalid += 1;
                continue;
            }
            match instruction.flow_control() {
                FlowControl::Call | FlowControl::IndirectCall if is_call(&instruction) => {
                    sweep.calls.push(Call {
                        at: TextOff(at),
                        end: TextOff(at + instruction.len() as u32),
                        to: direct(&instruction),
                    });
                }
                FlowControl::UnconditionalBranch
                | FlowControl::ConditionalBranch
                | FlowControl::IndirectBranch => sweep.jumps.push(Jump {
                    at: TextOff(at),
                    to: direct(&instruction),
                }),
                _ => {}
            }
            if instruction.code() == Code::Endbr64 {
                sweep.endbr.push(TextOff(at));
            }
            sweep.taken.extend(taken(&instruction));
        }
        (sweep, decoder.position())
    }

    /// Adds what was found behind it.
    fn add(&mut self, behind: Sweep) {
        self.boundaries.add(&behind.boundaries);
        self.calls.extend(behind.calls);
        self.jumps.extend(behind.jumps);
        self.taken.extend(behind.taken);
        self.endbr.extend(behind.endbr);
        self.instructions += behind.instructions;
        self.invalid += behind.invalid;
    }

    /// Whether an instruction starts at `at`.
    pub fn is_boundary(&self, at: TextOff) -> bool {
        self.boundaries.get(at.0 as usize)
    }
}

/// A place near the middle where an instruction starts, most likely: behind filler.
fn middle(code: &[u8]) -> usize {
    let half = code.len() / 2;
    let filler = code[half..].windows(2);
    let behind = filler
        .enumerate()
        .find(|(_, pair)| pair[0] == INT3 && pair[1] != INT3);
    behind.map_or(half, |(at, _)| half + at + 1)
}

/// Calls that push a near return address; `syscall` and `int n` are "calls" to iced too.
fn is_call(instruction: &Instruction) -> bool {
    matches!(
        instruction.code(),
        Code::Call_rel32_64 | Code::Call_rm64 | Code::Call_rel16 | Code::Call_rm16
    )
}

/// Where a direct branch goes.
fn direct(instruction: &Instruction) -> Option<LinkVa> {
    let direct = instruction.op0_kind() == OpKind::NearBranch64;
    direct.then(|| LinkVa(instruction.near_branch_target()))
}

/// The address that a RIP-relative `lea` takes.
fn taken(instruction: &Instruction) -> Option<LinkVa> {
    let lea = matches!(instruction.code(), Code::Lea_r64_m | Code::Lea_r32_m)
        && instruction.op1_kind() == OpKind::Memory
        && instruction.memory_base() == Register::RIP;
    lea.then(|| LinkVa(instruction.ip_rel_memory_address()))
}

/// All addresses that RIP-relative `lea`s in other code (initialisation, replacements) take.
pub fn taken_in(code: &[u8], start: LinkVa) -> Vec<LinkVa> {
    let decoder = Decoder::with_ip(64, code, start.0, DecoderOptions::NONE);
    decoder
        .into_iter()
        .filter_map(|instruction| taken(&instruction))
        .collect()
}

/// A branch in a replacement.
pub struct Branch {
    /// Whether it is a call.
    pub call: bool,
    /// Whether it may go on behind itself.
    pub conditional: bool,
    /// Its end, from the replacement's start.
    pub end: u8,
    /// Where a direct one goes once it stands at the site. The kernel adjusts the displacement of a replacement's first
    /// instruction, Linux 6.10 and later that of all (arch/x86/kernel/alternative.c): either way it goes where it goes here.
    pub to: Option<LinkVa>,
}

/// The branches of the replacement `code`, which stands at `start`.
pub fn branches(code: &[u8], start: LinkVa) -> Vec<Branch> {
    let decoder = Decoder::with_ip(64, code, start.0, DecoderOptions::NONE);
    let branches = decoder.into_iter().filter_map(|instruction| {
        let call = is_call(&instruction);
        let jump = matches!(
            instruction.flow_control(),
            FlowControl::UnconditionalBranch
                | FlowControl::ConditionalBranch
                | FlowControl::IndirectBranch
        );
        (call || jump).then(|| Branch {
            call,
            conditional: instruction.flow_control() == FlowControl::ConditionalBranch,
            end: (instruction.next_ip() - start.0) as u8,
            to: direct(&instruction),
        })
    });
    branches.collect()
}

/// Where the calls of a replacement return to, as offsets from its start.
pub fn call_ends(code: &[u8]) -> Vec<u8> {
    let decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    decoder
        .into_iter()
        .filter(is_call)
        .map(|instruction| instruction.next_ip() as u8)
        .collect()
}

/// Refuses an image whose tables point inside instructions: then the sweep is not to be trusted.
pub fn gate(sweep: &Sweep, image: &Image, tables: &Tables, span: Span) -> Result<(), TextError> {
    let alternatives = tables.alternatives.iter().flat_map(|entry| {
        let end = LinkVa(entry.site.0 + u64::from(entry.site_len));
        [entry.site, end]
    });
    let jumps = tables
        .jump_labels
        .iter()
        .flat_map(|entry| [entry.code, entry.target]);
    let functions = image.symbols.iter().filter(|symbol| symbol.is_code());
    let lists: [(&'static str, Vec<LinkVa>); 13] = [
        (".retpoline_sites", tables.retpolines.clone()),
        (".return_sites", tables.returns.clone()),
        (".ibt_endbr_seal", tables.sealed_endbr.clone()),
        (".altinstructions", alternatives.collect()),
        (
            ".parainstructions",
            tables.paravirt.iter().map(|site| site.site).collect(),
        ),
        (".smp_locks", tables.smp_locks.clone()),
        ("__ex_table (instructions)", tables.faulting.clone()),
        ("__ex_table (fixups)", tables.fixups.clone()),
        ("__bug_table", tables.bugs.clone()),
        ("__mcount_loc", tables.fentry.clone()),
        ("__jump_table", jumps.collect()),
        (
            ".static_call_sites",
            tables.static_calls.iter().map(|site| site.site).collect(),
        ),
        ("symbols", functions.map(|symbol| symbol.va).collect()),
    ];
    for (table, addresses) in lists {
        let mut missed = addresses
            .into_iter()
            .filter(|va| span.offset(*va).is_some_and(|at| !sweep.is_boundary(at)))
            .peekable();
        if let Some(at) = missed.peek().copied() {
            // Overlapping code of the retbleed and SRSO thunks has symbols inside instructions on purpose.
            if table == "symbols" {
                continue;
            }
            return Err(TextError::Boundary {
                table,
                count: missed.count(),
                at,
            });
        }
    }
    Ok(())
}
