//! One instruction of the text as liveness sees it: what it reads, what it overwrites, and where it goes, in the file and with
//! what the kernel may put over it.

use super::callgraph::{CallGraph, OUT_OF_LINE};
use super::replaced::{Replaced, replaced};
use super::{Bitmap, Span, Text};
use crate::image::{Image, Tables};
use crate::text::REGISTERS;
use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register, RflagsBits,
};
use penumbra_bundle::{LinkVa, TextOff};
use rustc_hash::{FxHashMap, FxHashSet};

/// Filler between functions, of which nothing goes on.
pub const INT3: u8 = 0xcc;

/// A set of registers' parts. Of register n, as x86 numbers them, bit n is the lowest byte, bit 16 + n the next, bit 32 + n the
/// rest: a byte may be set and read (SETcc, MOVZX) while the rest is nobody's.
pub type Set = u64;

/// The status flags: CF, PF, AF, ZF, SF and OF, from bit 48 on in iced's order.
pub const FLAGS: Set = (STATUS as Set) << 48;

/// Every part of the registers of these numbers.
pub const fn whole(numbers: u16) -> Set {
    numbers as u64 * 0x1_0001_0001
}

/// One instruction.
pub struct Step {
    /// What it reads.
    pub reads: Set,
    /// What it overwrites whole.
    pub writes: Set,
    /// Goes on behind itself, to the next step.
    pub falls: bool,
}

/// How far instructions are followed.
#[derive(Clone, Copy)]
pub struct BehindCalls<'a> {
    /// Who calls whom.
    pub graph: &'a CallGraph,
    /// The text of functions with labels to which a jump may go.
    pub labelled: &'a Bitmap,
}

/// Reads instructions one by one.
pub struct Steps<'a> {
    image: &'a Image,
    text: &'a Text,
    /// Registers that are asked about.
    pub wanted: Set,
    behind_calls: Option<BehindCalls<'a>>,
    thunks: FxHashMap<LinkVa, Set>,
    also: FxHashMap<TextOff, Vec<TextOff>>,
    replaced: FxHashMap<TextOff, Replaced>,
    patched: Bitmap,
    traced: FxHashSet<LinkVa>,
    /// Where each function returns to, once somebody has asked.
    returns: FxHashMap<usize, Option<Vec<TextOff>>>,
    factory: InstructionInfoFactory,
}

impl<'a> Steps<'a> {
    /// Reads what the tables say. With `behind_calls`, what calls and returns go on to counts too.
    pub fn new(
        image: &'a Image,
        tables: &Tables,
        text: &'a Text,
        wanted: Set,
        behind_calls: Option<BehindCalls<'a>>,
    ) -> Steps<'a> {
        let span = text.span;
        let mut patched = Bitmap::new(span.code.len() as usize);
        for entry in &tables.alternatives {
            let site = (0..u64::from(entry.site_len)).map(|at| LinkVa(entry.site.0 + at));
            site.filter_map(|va| span.offset(va))
                .for_each(|at| patched.set(at.0 as usize));
        }
        Steps {
            image,
            text,
            wanted,
            behind_calls,
            thunks: thunks(image),
            also: also(span, tables),
            replaced: replaced(image, tables, span, wanted),
            patched,
            traced: tables.fentry.iter().copied().collect(),
            returns: FxHashMap::default(),
            factory: InstructionInfoFactory::new(),
        }
    }

    /// The instruction at `at`; adds where it goes, but for the next one.
    pub fn read(
        &mut self,
        at: TextOff,
        instruction: &Instruction,
        goes: &mut Vec<TextOff>,
    ) -> Step {
        let (text, span, wanted) = (self.text, self.text.span, self.wanted);
        let ends = |va: LinkVa| text.regions.is_x86_thunk(va) || text.regions.is_return_thunk(va);
        let (mut reads, mut writes) = accesses(&mut self.factory, instruction, wanted);
        let patched = self.patched.get(at.0 as usize);
        // Something else may stand there when the kernel runs.
        if patched {
            writes = 0;
        }
        let replaced = self.replaced.get(&at);
        // One jump, which is a NOP where the kernel takes it away (`static_cpu_has`).
        let switched = replaced.and_then(|one| one.switch(instruction));
        if switched.is_none() {
            reads |= replaced.map_or(0, |one| one.reads);
        }
        goes.extend(self.also.get(&at).into_iter().flatten());
        let direct = (instruction.op0_kind() == OpKind::NearBranch64)
            .then(|| LinkVa(instruction.near_branch_target()));
        if let Some(register) = direct.and_then(|to| self.thunks.get(&to)) {
            reads |= register & wanted;
        }
        let flow = instruction.flow_control();
        let mut falls = match flow {
            // A WARN's UD2 is gone on behind.
            FlowControl::Next | FlowControl::Exception | FlowControl::Interrupt => true,
            FlowControl::ConditionalBranch => true,
            _ => false,
        };
        // Compiled code jumps by retpolines; where assembly jumps that does not, nobody knows.
        if flow == FlowControl::IndirectBranch {
            reads |= wanted;
        }
        if let Some(BehindCalls { graph, labelled }) = self.behind_calls {
            let called = matches!(flow, FlowControl::Call | FlowControl::IndirectCall);
            let own = direct.and_then(|to| span.offset(to)).filter(|_| called);
            let own = own.and_then(|to| text.functions.number(to));
            let assembly = own
                .is_some_and(|number| !graph.facts[number].compiled && !direct.is_some_and(ends));
            let returns = flow == FlowControl::Return
                || direct.is_some_and(|to| text.regions.is_return_thunk(to));
            let mut lost = false;
            if returns && !text.functions.has_fentry(at) {
                let number = text.functions.number(at);
                let back = number.and_then(|number| {
                    let of = || graph.returns_to(text, number);
                    self.returns.entry(number).or_insert_with(of).as_ref()
                });
                lost = back.is_none();
                goes.extend(back.into_iter().flatten());
            }
            let open = direct.is_some_and(|to| !called && self.thunks.contains_key(&to));
            if assembly || lost || open && labelled.get(at.0 as usize) {
                reads |= wanted;
            }
            falls |= called;
            // What a tracer puts there leaves none of them alone (`save_mcount_regs` in arch/x86/kernel/ftrace_64.S), and
            // who has just been called waits for nothing in them.
            if self.traced.contains(&span.va(at)) {
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
                None => match out_of_line(self.image, span, to) {
                    Some(to) => goes.extend(to),
                    None => reads |= wanted,
                },
            }
        }
        if let Some(to) = switched {
            goes.extend(to);
            falls = true;
        } else if patched && !comes_next(flow) {
            reads |= wanted;
        }
        Step {
            reads,
            writes,
            falls,
        }
    }
}

/// What an instruction reads and what it overwrites whole.
pub(super) fn accesses(
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
pub(super) fn comes_next(flow: FlowControl) -> bool {
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
pub(super) fn also(span: Span, tables: &Tables) -> FxHashMap<TextOff, Vec<TextOff>> {
    let labels = tables.jump_labels.iter();
    let labels = labels.map(|label| (label.code, label.target));
    let faults = tables.faulting.iter().copied();
    let faults = faults.zip(tables.fixups.iter().copied());
    let mut also: FxHashMap<TextOff, Vec<TextOff>> = FxHashMap::default();
    for (from, to) in labels.chain(faults) {
        if let (Some(from), Some(to)) = (span.offset(from), span.offset(to)) {
            also.entry(from).or_default().push(to);
        }
    }
    also
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
