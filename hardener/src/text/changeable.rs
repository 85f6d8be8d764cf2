//! Which returns may go elsewhere than to their call: all but those of functions that call nothing, write nothing but what they
//! push, and are entered by direct calls, or by jumps from functions of the same kind. Whoever overruns a buffer does so elsewhere,
//! before the call or behind the return.
//!
//! Another CPU, or an interrupt, may write to the stack within these few instructions, as it may between a check and its return.

use super::callgraph::CallGraph;
use super::steps::also;
use super::{Bitmap, Text};
use crate::image::Tables;
use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    Register,
};
use penumbra_bundle::{LinkVa, TextOff};
use rustc_hash::FxHashMap;

/// The returns of one kernel by number: whether something can have changed where each goes.
pub struct Changeable(pub Vec<bool>);

impl Changeable {
    /// Asks about every R slot.
    pub fn find(tables: &Tables, text: &Text, graph: &CallGraph) -> Changeable {
        let code = Code {
            text,
            rewritten: rewritten(tables, text),
            fentry: fentry(tables, text),
            also: also(text.span, tables),
        };
        let mut factory = InstructionInfoFactory::new();
        let mut untouched: Vec<bool> = (0..text.functions.count())
            .map(|number| {
                let facts = graph.facts[number];
                let entered =
                    !graph.direct[number].is_empty() || !graph.jumped_from[number].is_empty();
                facts.compiled
                    && !facts.taken
                    && !facts.called_inside
                    && entered
                    && code.is_never_returned_to(number)
                    && code.only_pushes(number, &mut factory)
            })
            .collect();
        // What jumps there hands its own return address on.
        let mut jumps_to: FxHashMap<u32, Vec<u32>> = FxHashMap::default();
        for (to, from) in graph.jumped_from.iter().enumerate() {
            for from in from {
                jumps_to.entry(*from).or_default().push(to as u32);
            }
        }
        let numbers = 0..untouched.len() as u32;
        let mut open: Vec<u32> = numbers
            .filter(|number| !untouched[*number as usize])
            .collect();
        while let Some(number) = open.pop() {
            for to in jumps_to.get(&number).into_iter().flatten() {
                if std::mem::replace(&mut untouched[*to as usize], false) {
                    open.push(*to);
                }
            }
        }
        let slots = text.slots.returns.iter();
        Changeable(
            slots
                .map(|slot| {
                    let number = text.functions.number(slot.at);
                    number.is_none_or(|number| !untouched[number])
                })
                .collect(),
        )
    }
}

/// What may stand there otherwise than in the file, but for jump labels, both ways of which are followed.
fn rewritten(tables: &Tables, text: &Text) -> Bitmap {
    let mut bytes = Bitmap::new(text.bytes.len());
    let mut mark = |va: LinkVa, len: u64| {
        if let Some(at) = text.span.offset(va) {
            (at.0 as usize..at.0 as usize + len as usize).for_each(|at| bytes.set(at));
        }
    };
    for entry in &tables.alternatives {
        mark(entry.site, u64::from(entry.site_len));
    }
    for site in &tables.paravirt {
        mark(site.site, u64::from(site.len));
    }
    for site in &tables.static_calls {
        mark(site.site, 5);
    }
    bytes
}

/// Where calls of `__fentry__` stand, which are NOPs unless somebody traces.
fn fentry(tables: &Tables, text: &Text) -> Bitmap {
    let mut sites = Bitmap::new(text.bytes.len());
    for at in tables.fentry.iter().filter_map(|va| text.span.offset(*va)) {
        sites.set(at.0 as usize);
    }
    sites
}

struct Code<'a> {
    text: &'a Text,
    rewritten: Bitmap,
    fentry: Bitmap,
    /// Where jump labels and instructions that fault may go on.
    also: FxHashMap<TextOff, Vec<TextOff>>,
}

impl Code<'_> {
    /// The function's first byte, and the next one's.
    fn range(&self, number: usize) -> (usize, usize) {
        let whole = self.text.span.code.len() as usize;
        let end = self.text.functions.starts_after(number);
        let start = self.text.functions.start(number).0 as usize;
        (start, end.map_or(whole, |end| end.0 as usize).min(whole))
    }

    /// Whether no return may go into it: not even to its start, behind a call that never comes back. Behind the call of
    /// `__fentry__` one may: that is there for tracers, who have looked at it.
    fn is_never_returned_to(&self, number: usize) -> bool {
        let (start, end) = self.range(number);
        let targets = &self.text.return_targets;
        let first = targets.partition_point(|at| (at.0 as usize) < start);
        let mut inside = targets[first..].iter().map(|at| at.0 as usize);
        inside
            .by_ref()
            .take_while(|at| *at < end)
            .all(|at| at >= start + 5 && self.fentry.get(at - 5))
    }

    /// Whether each way through it keeps RSP at or below the return address, and writes by PUSH only.
    fn only_pushes(&self, number: usize, factory: &mut InstructionInfoFactory) -> bool {
        let (start, end) = self.range(number);
        let mut depths: FxHashMap<usize, i32> = FxHashMap::default();
        let mut open = vec![(start, 0)];
        while let Some((at, depth)) = open.pop() {
            match depths.insert(at, depth) {
                Some(known) if known == depth => continue,
                Some(_) => return false,
                None => {}
            }
            if !(start..end).contains(&at) {
                return false;
            }
            let ip = self.text.va(TextOff(at as u32)).0;
            let decoder = Decoder::with_ip(64, &self.text.bytes[at..end], ip, DecoderOptions::NONE);
            let instruction = decoder.into_iter().next().unwrap_or_default();
            let behind = at + instruction.len();
            if instruction.is_invalid()
                || instruction.is_privileged()
                || self.rewritten.any(at..behind)
            {
                return false;
            }
            let also = self.also.get(&TextOff(at as u32)).into_iter().flatten();
            for to in also.map(|to| to.0 as usize) {
                match (start..end).contains(&to) {
                    true => open.push((to, depth)),
                    false if depth != 0 => return false,
                    false => {}
                }
            }
            match instruction.flow_control() {
                FlowControl::Next => {
                    let Some(depth) = moved(&instruction, depth, factory) else {
                        return false;
                    };
                    open.push((behind, depth));
                }
                // A warning goes on behind it; nothing else does.
                FlowControl::Exception => open.push((behind, depth)),
                FlowControl::Call if self.fentry.get(at) => open.push((behind, depth)),
                FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                    let to = LinkVa(instruction.near_branch_target());
                    let inside = self.text.span.offset(to).map(|to| to.0 as usize);
                    match inside.filter(|to| (start..end).contains(to)) {
                        Some(to) => open.push((to, depth)),
                        // A return, or a jump that hands the return address on.
                        None if depth != 0 => return false,
                        None => {}
                    }
                    if instruction.flow_control() == FlowControl::ConditionalBranch {
                        open.push((behind, depth));
                    }
                }
                _ => return false,
            }
        }
        true
    }
}

/// How far RSP is below the return address behind an instruction; none when it does more to stack or memory than PUSH and POP do.
fn moved(
    instruction: &Instruction,
    depth: i32,
    factory: &mut InstructionInfoFactory,
) -> Option<i32> {
    let step = match instruction.mnemonic() {
        Mnemonic::Push | Mnemonic::Pop => -instruction.stack_pointer_increment(),
        _ => {
            let written = |access| {
                matches!(
                    access,
                    OpAccess::Write
                        | OpAccess::ReadWrite
                        | OpAccess::CondWrite
                        | OpAccess::ReadCondWrite
                )
            };
            let info = factory.info(instruction);
            let mut registers = info.used_registers().iter();
            let stack = registers.any(|used| {
                used.register().full_register() == Register::RSP && written(used.access())
            });
            let memory = info.used_memory().iter().any(|used| written(used.access()));
            if stack || memory {
                return None;
            }
            0
        }
    };
    // Into memory, or into RSP.
    let elsewhere = instruction.mnemonic() == Mnemonic::Pop
        && (instruction.op0_register() == Register::None
            || instruction.op0_register() == Register::RSP);
    let depth = depth + step;
    (depth >= 0 && step % 8 == 0 && !elsewhere).then_some(depth)
}
