//! Which returns may go elsewhere than to their call, derived again. A part of the text keeps its return address when every
//! instruction that its start leads to leaves memory alone, but for what it pushes below that address, and when it is entered
//! with return addresses that a call has just pushed: by direct calls, and by jumps of parts that keep theirs.

use super::callers::Parts;
use super::kernel::{Kernel, KernelError};
use super::sets;
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess,
    OpKind, Register,
};
use penumbra_bundle::{LinkVa, VaRange};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The parts, and those of them that keep their return addresses.
pub struct Changeable {
    parts: Arc<Parts>,
    kept: BTreeSet<u32>,
}

impl Changeable {
    /// Looks at every part.
    pub fn of(kernel: &Kernel, parts: Arc<Parts>) -> Result<Changeable, KernelError> {
        let legal = sets::return_sites(kernel)?;
        let reader = Reader {
            kernel,
            parts: &parts,
            rewritten: rewritten(kernel),
            fentry: kernel.tables.fentry.iter().copied().collect(),
            silent: kernel.tables.silent_jumps.iter().copied().collect(),
            returns: legal.required.union(&legal.optional).copied().collect(),
        };
        let mut factory = InstructionInfoFactory::new();
        let jumped_to: BTreeSet<u32> = parts.jumps.iter().flatten().copied().collect();
        let mut kept: BTreeSet<u32> = (0..parts.count())
            .filter(|part| {
                let at = *part as usize;
                let called = !parts.back[at].is_empty() || !parts.replaced[at].is_empty();
                let known = called || jumped_to.contains(part);
                !parts.taken.contains(part)
                    && !parts.odd.contains(part)
                    && known
                    && reader.keeps(*part, &mut factory)
            })
            .collect();
        // Until none is left that one of the others jumps to.
        loop {
            let others = (0..parts.count()).filter(|part| !kept.contains(part));
            let entered = others.flat_map(|part| &parts.jumps[part as usize]);
            let lost: BTreeSet<u32> = entered.filter(|to| kept.contains(to)).copied().collect();
            if lost.is_empty() {
                return Ok(Changeable { parts, kept });
            }
            kept.retain(|part| !lost.contains(part));
        }
    }

    /// Whether something can have changed where the return at `at` goes; so it is taken to be where no part is.
    pub fn is(&self, at: LinkVa) -> bool {
        let part = self.parts.part(at);
        part.is_none_or(|part| !self.kept.contains(&part))
    }
}

/// Stretches that the kernel writes over by tables, and which are then not what the file has. Jump labels are
/// followed both ways.
fn rewritten(kernel: &Kernel) -> BTreeMap<LinkVa, LinkVa> {
    let tables = &kernel.tables;
    let alternatives = tables.alternatives.iter().map(|one| one.site);
    let calls = tables.static_calls.iter().map(|at| VaRange {
        start: *at,
        end: LinkVa(at.0 + 5),
    });
    let all = alternatives
        .chain(tables.paravirt.iter().copied())
        .chain(calls);
    all.map(|range| (range.start, range.end)).collect()
}

struct Reader<'a> {
    kernel: &'a Kernel,
    parts: &'a Parts,
    rewritten: BTreeMap<LinkVa, LinkVa>,
    fentry: BTreeSet<LinkVa>,
    /// Jump labels, and instructions that may fault: the place and where it may go on.
    silent: BTreeSet<(LinkVa, LinkVa)>,
    /// Where returns may go.
    returns: BTreeSet<LinkVa>,
}

impl Reader<'_> {
    /// Whether a part leaves its return address alone on all ways, and no return comes into it.
    fn keeps(&self, part: u32, factory: &mut InstructionInfoFactory) -> bool {
        let range = self.parts.range(part, self.kernel.text.end);
        // The call of `__fentry__` is answered by tracers.
        let mut inside = self.returns.range(range.start..range.end);
        if inside.any(|at| !self.fentry.contains(&LinkVa(at.0.wrapping_sub(5)))) {
            return false;
        }
        // By address: how many words were pushed on the way there.
        let mut pushed = BTreeMap::from([(range.start, 0u32)]);
        let mut open = BTreeSet::from([range.start]);
        while let Some(at) = open.pop_first() {
            let words = pushed[&at];
            let Some(next) = self.step(at, range, words, factory) else {
                return false;
            };
            for (to, words) in next {
                // ENDBR64 before an `__fentry__` site is a part that runs on into the next, as by a jump.
                if to == range.end && words == 0 && self.is_endbr(range) {
                    continue;
                }
                if *pushed.entry(to).or_insert_with(|| {
                    open.insert(to);
                    words
                }) != words
                {
                    return false;
                }
            }
        }
        true
    }

    /// Whether a part is ENDBR64 and nothing else.
    fn is_endbr(&self, range: VaRange) -> bool {
        let code = self.kernel.vmlinux.bytes(range.start, range.len() as usize);
        code == Some(&[0xf3, 0x0f, 0x1e, 0xfa])
    }

    /// Where an instruction goes inside the part, and how many words are then pushed; none when it does what such a part may not.
    fn step(
        &self,
        at: LinkVa,
        range: VaRange,
        words: u32,
        factory: &mut InstructionInfoFactory,
    ) -> Option<Vec<(LinkVa, u32)>> {
        let rest = range.end.0.checked_sub(at.0)?;
        let bytes = self.kernel.vmlinux.bytes(at, rest.min(15) as usize)?;
        let instruction = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE).decode();
        let behind = LinkVa(instruction.next_ip());
        let before = self.rewritten.range(..behind).next_back();
        let written_over = before.is_some_and(|(_, end)| *end > at);
        if instruction.is_invalid() || written_over || instruction.is_privileged() {
            return None;
        }
        let flow = instruction.flow_control();
        let jumps = matches!(
            flow,
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
        );
        let own = jumps.then(|| LinkVa(instruction.near_branch_target()));
        let silent = self.silent.range((at, LinkVa(0))..=(at, LinkVa(u64::MAX)));
        let mut next = Vec::new();
        for to in own.into_iter().chain(silent.map(|(_, to)| *to)) {
            match range.contains(to) {
                true => next.push((to, words)),
                // With its own return address on top: a return, or a part that returns for it.
                false if words > 0 => return None,
                false => {}
            }
        }
        match flow {
            FlowControl::UnconditionalBranch => return Some(next),
            FlowControl::ConditionalBranch | FlowControl::Exception => {}
            FlowControl::Call if self.fentry.contains(&at) => {}
            FlowControl::Next => {
                let words = pushes(&instruction, words, factory)?;
                next.push((behind, words));
                return Some(next);
            }
            _ => return None,
        }
        next.push((behind, words));
        Some(next)
    }
}

/// The words that are pushed behind an instruction that does not branch, when all that it writes to the stack is one of these.
fn pushes(
    instruction: &Instruction,
    words: u32,
    factory: &mut InstructionInfoFactory,
) -> Option<u32> {
    match instruction.code() {
        Code::Push_r64 | Code::Push_rm64 | Code::Pushq_imm8 | Code::Pushq_imm32 => {
            return Some(words + 1);
        }
        Code::Pop_r64 if instruction.op0_register() != Register::RSP => {
            return words.checked_sub(1);
        }
        _ => {}
    }
    if instruction.is_stack_instruction() || instruction.is_string_instruction() {
        return None;
    }
    let info = factory.info(instruction);
    let reads = |access| {
        matches!(
            access,
            OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess | OpAccess::None
        )
    };
    let operands = 0..instruction.op_count();
    let plain = operands.clone().all(|operand| {
        instruction.op_kind(operand) != OpKind::Memory || reads(info.op_access(operand))
    });
    let memory = info.used_memory().iter().all(|used| reads(used.access()));
    let stack = info
        .used_registers()
        .iter()
        .all(|used| used.register().full_register() != Register::RSP || reads(used.access()));
    (plain && memory && stack).then_some(words)
}
