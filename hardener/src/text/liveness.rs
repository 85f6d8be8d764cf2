//! Which caller-saved registers, and flags, the code behind an address reads before it writes them: a backward data flow over
//! the whole text, one instruction at a time. Where the ABI speaks, calls and returns end it (see `zeroing`); where a compiler
//! may have looked at what a callee leaves alone (`-fipa-ra`), it goes on behind calls (see `scratch`).

use super::callgraph::{CallGraph, OUT_OF_LINE};
use super::{Bitmap, Span, Text};
use crate::image::{Image, Tables};
use crate::text::REGISTERS;
use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register, RflagsBits,
};
use penumbra_bundle::{LinkVa, TextOff};
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::{BTreeMap, btree_map};
use std::iter::Peekable;

const INT3: u8 = 0xcc;

/// A set of registers' parts. Of register n, as x86 numbers them, bit n is the lowest byte, bit 16 + n the next, bit 32 + n the
/// rest: a byte may be set and read (SETcc, MOVZX) while the rest is nobody's.
pub type Set = u64;

/// The status flags: CF, PF, AF, ZF, SF and OF, from bit 48 on in iced's order.
pub const FLAGS: Set = (STATUS as Set) << 48;

/// Every part of the registers of these numbers.
pub const fn whole(numbers: u16) -> Set {
    numbers as u64 * 0x1_0001_0001
}

/// What is live before each instruction.
pub struct Liveness {
    places: Vec<u32>,
    live: Vec<Set>,
}

/// One instruction.
struct Step {
    reads: Set,
    writes: Set,
    /// Goes on behind itself, to the next step.
    falls: bool,
}

impl Liveness {
    /// Follows the `wanted` registers through the text, to calls and returns.
    pub fn find(image: &Image, tables: &Tables, text: &Text, wanted: Set) -> Liveness {
        Liveness::follow(image, tables, text, wanted, None)
    }

    /// The same, on behind calls too, and behind returns of functions that are not compiled for tracing. Where assembly is
    /// called, it is not known to whom one returns, or a jump goes to a label in one of the functions `labelled` (by their
    /// text), all of `wanted` is read.
    pub fn behind_calls(
        image: &Image,
        tables: &Tables,
        text: &Text,
        wanted: Set,
        graph: &CallGraph,
        labelled: &Bitmap,
    ) -> Liveness {
        Liveness::follow(image, tables, text, wanted, Some((graph, labelled)))
    }

    fn follow(
        image: &Image,
        tables: &Tables,
        text: &Text,
        wanted: Set,
        behind_calls: Option<(&CallGraph, &Bitmap)>,
    ) -> Liveness {
        let span = text.span;
        let code = &text.bytes[..span.code.len() as usize];
        let thunks = thunks(image);
        let ends = |va: LinkVa| text.regions.is_x86_thunk(va) || text.regions.is_return_thunk(va);
        let mut also = also(span, tables).into_iter().peekable();
        let replaced = replaced(image, tables, span, wanted);
        let mut replaced = replaced.into_iter().peekable();
        let traced: FxHashSet<LinkVa> = tables.fentry.iter().copied().collect();
        let mut patched = Bitmap::new(code.len());
        for entry in &tables.alternatives {
            let site = (0..u64::from(entry.site_len)).map(|at| LinkVa(entry.site.0 + at));
            site.filter_map(|va| span.offset(va))
                .for_each(|at| patched.set(at.0 as usize));
        }
        let mut places = Vec::new();
        let mut steps: Vec<Step> = Vec::new();
        // Where steps may also go, by step.
        let mut targets: Vec<(u32, TextOff)> = Vec::new();
        let mut decoder = Decoder::with_ip(64, code, span.range.start.0, DecoderOptions::NONE);
        let mut factory = InstructionInfoFactory::new();
        let mut instruction = Instruction::default();
        while decoder.can_decode() {
            let at = decoder.position();
            decoder.decode_out(&mut instruction);
            if code[at] == INT3 {
                continue;
            }
            let (mut reads, mut writes) = accesses(&mut factory, &instruction, wanted);
            // Something else may stand there when the kernel runs.
            if patched.get(at) {
                writes = 0;
            }
            let at = TextOff(at as u32);
            let replaced = here(&mut replaced, at);
            // One jump, which is a NOP where the kernel takes it away (`static_cpu_has`).
            let switched = replaced.as_ref().and_then(|one| one.switch(&instruction));
            if switched.is_none() {
                reads |= replaced.as_ref().map_or(0, |one| one.reads);
            }
            let mut goes = here(&mut also, at).unwrap_or_default();
            let direct = (instruction.op0_kind() == OpKind::NearBranch64)
                .then(|| LinkVa(instruction.near_branch_target()));
            if let Some(register) = direct.and_then(|to| thunks.get(&to)) {
                reads |= register & wanted;
            }
            let flow = instruction.flow_control();
            let mut falls = match flow {
                // A WARN's UD2 is gone on behind.
                FlowControl::Next | FlowControl::Exception | FlowControl::Interrupt => true,
                FlowControl::ConditionalBranch => true,
                _ => false,
            };
            if let Some((graph, labelled)) = behind_calls {
                let called = matches!(flow, FlowControl::Call | FlowControl::IndirectCall);
                let own = direct.and_then(|to| span.offset(to)).filter(|_| called);
                let own = own.and_then(|to| text.functions.number(to));
                let assembly = own.is_some_and(|number| {
                    !graph.facts[number].compiled && !direct.is_some_and(ends)
                });
                let returns = flow == FlowControl::Return
                    || direct.is_some_and(|to| text.regions.is_return_thunk(to));
                let mut lost = false;
                if returns && !text.functions.has_fentry(at) {
                    let back = text.functions.number(at);
                    let back = back.and_then(|number| graph.returns_to(text, number));
                    lost = back.is_none();
                    goes.extend(back.unwrap_or_default());
                }
                // Compiled code jumps by retpolines; where assembly jumps that does not, nobody knows.
                let anywhere = flow == FlowControl::IndirectBranch;
                let open = direct.is_some_and(|to| !called && thunks.contains_key(&to));
                if assembly || lost || anywhere || open && labelled.get(at.0 as usize) {
                    reads |= wanted;
                }
                falls |= called;
                // What a tracer puts there leaves none of them alone (`save_mcount_regs` in arch/x86/kernel/ftrace_64.S), and
                // who has just been called waits for nothing in them.
                if traced.contains(&span.va(at)) {
                    (reads, writes) = (0, wanted);
                }
            }
            let jump = matches!(
                flow,
                FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
            );
            if let Some(to) = direct.filter(|to| jump && !ends(*to)) {
                match span.offset(to) {
                    Some(to) => goes.push(to),
                    // A test that the kernel replaces (`static_cpu_has`), or nobody knows what.
                    None => match out_of_line(image, span, to) {
                        Some(to) => goes.extend(to),
                        None => reads |= wanted,
                    },
                }
            }
            if let Some(to) = switched {
                goes.extend(to);
                falls = true;
            } else if patched.get(at.0 as usize) && !comes_next(flow) {
                reads |= wanted;
            }
            let number = steps.len() as u32;
            targets.extend(goes.into_iter().map(|to| (number, to)));
            places.push(at.0);
            steps.push(Step {
                reads,
                writes,
                falls,
            });
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

/// What a table, gone through in the order of the text, has for `at`.
fn here<T>(table: &mut Peekable<btree_map::IntoIter<TextOff, T>>, at: TextOff) -> Option<T> {
    while table.next_if(|(place, _)| *place < at).is_some() {}
    table
        .next_if(|(place, _)| *place == at)
        .map(|(_, found)| found)
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

/// What an instruction reads and what it overwrites whole.
fn accesses(
    factory: &mut InstructionInfoFactory,
    instruction: &Instruction,
    wanted: Set,
) -> (Set, Set) {
    let (mut reads, mut writes) = (0, 0);
    // Only the carry decides what comes of `sbb` of a register and itself.
    let own = instruction.mnemonic() == Mnemonic::Sbb
        && instruction.op1_kind() == OpKind::Register
        && instruction.op0_register() == instruction.op1_register();
    for used in factory.info(instruction).used_registers() {
        let register = used.register();
        if !register.is_gpr() {
            continue;
        }
        let part = part(register) & wanted;
        match used.access() {
            OpAccess::Read | OpAccess::CondRead => reads |= part,
            OpAccess::ReadWrite if own => writes |= part,
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => reads |= part,
            OpAccess::Write => writes |= part,
            _ => {}
        }
    }
    // A shift by a count that may be 0 may leave them all.
    let shifts = instruction.op_count() == 2 && instruction.op1_register() == Register::CL;
    reads |= Set::from(instruction.rflags_read() & STATUS) << 48 & wanted;
    if !shifts {
        writes |= Set::from(instruction.rflags_modified() & STATUS) << 48 & wanted;
    }
    (reads, writes)
}

/// [`FLAGS`] as iced has them.
const STATUS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// Whether what stands behind an instruction comes next, at once or after a call.
fn comes_next(flow: FlowControl) -> bool {
    matches!(
        flow,
        FlowControl::Next | FlowControl::Call | FlowControl::IndirectCall
    )
}

/// The parts that an operand is. A 32-bit result clears the upper half (SDM volume 1, 3.4.1.1), and a 32-bit operand counts as a
/// whole.
fn part(register: Register) -> Set {
    let number = register.full_register().number();
    let high = matches!(
        register,
        Register::AH | Register::BH | Register::CH | Register::DH
    );
    match register.size() {
        1 if high => 1 << (16 + number),
        1 => 1 << number,
        2 => 0x1_0001 << number,
        _ => whole(1 << number),
    }
}

/// Retpolines by address, and the register that each reads.
fn thunks(image: &Image) -> FxHashMap<LinkVa, Set> {
    let named = REGISTERS.iter().enumerate().filter_map(|(number, name)| {
        let va = image.symbol(&format!("__x86_indirect_thunk_{name}"))?;
        Some((va, whole(1 << number)))
    });
    named.collect()
}

/// Where the text goes on though its bytes do not say so: jump labels, and the fixups of what faults.
pub(super) fn also(span: Span, tables: &Tables) -> BTreeMap<TextOff, Vec<TextOff>> {
    let labels = tables.jump_labels.iter();
    let labels = labels.map(|label| (label.code, label.target));
    let faults = tables.faulting.iter().copied();
    let faults = faults.zip(tables.fixups.iter().copied());
    let mut also: BTreeMap<TextOff, Vec<TextOff>> = BTreeMap::new();
    for (from, to) in labels.chain(faults) {
        if let (Some(from), Some(to)) = (span.offset(from), span.offset(to)) {
            also.entry(from).or_default().push(to);
        }
    }
    also
}

/// What the kernel may put over the text at one site.
#[derive(Default)]
struct Replaced {
    /// What it reads.
    reads: Set,
    /// How long the site is.
    len: usize,
    /// Where it goes when it is a jump each time, or nothing.
    jumps: Vec<TextOff>,
    /// Whether it is something else.
    other: bool,
}

impl Replaced {
    /// Where the replacements of a jump go on besides behind it, when they are jumps or nothing.
    fn switch(&self, instruction: &Instruction) -> Option<&[TextOff]> {
        let jump = instruction.is_jmp_short_or_near() && instruction.len() == self.len;
        (jump && !self.other).then_some(&self.jumps)
    }
}

/// What the kernel may put over the text, by the site's start.
fn replaced(
    image: &Image,
    tables: &Tables,
    span: Span,
    wanted: Set,
) -> BTreeMap<TextOff, Replaced> {
    let mut factory = InstructionInfoFactory::new();
    let mut sites: BTreeMap<TextOff, Replaced> = BTreeMap::new();
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

/// Where a test outside the text goes on, which does nothing but read memory and jump (`static_cpu_has`).
fn out_of_line(image: &Image, span: Span, at: LinkVa) -> Option<Vec<TextOff>> {
    let code = image.at(at, OUT_OF_LINE)?;
    let mut found = Vec::new();
    for instruction in Decoder::with_ip(64, code, at.0, DecoderOptions::NONE) {
        let to = LinkVa(instruction.near_branch_target());
        match instruction.flow_control() {
            FlowControl::Next
                if instruction.mnemonic() == Mnemonic::Test
                    && instruction.is_ip_rel_memory_operand()
                    && instruction.op1_kind() == OpKind::Immediate8 => {}
            FlowControl::ConditionalBranch => found.push(span.offset(to)?),
            FlowControl::UnconditionalBranch if instruction.is_jmp_short_or_near() => {
                found.push(span.offset(to)?);
                return Some(found);
            }
            _ => return None,
        }
    }
    None
}
