//! A function's instructions as blocks, with the ways between them.

use super::flow::Code64;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind};
use smallvec::SmallVec;

/// Instructions that are executed one after another.
pub struct Block {
    /// Index of its first instruction.
    pub first: usize,
    /// Index behind its last.
    pub end: usize,
    /// Where it goes.
    pub next: SmallVec<[usize; 2]>,
    /// Whence it is reached.
    pub before: SmallVec<[usize; 2]>,
}

/// Puts the instructions of a function into `instructions`, in place of what is there.
pub fn decode(code: &Code64<'_>, ranges: &[(u32, u32)], instructions: &mut Vec<Instruction>) {
    instructions.clear();
    let mut instruction = Instruction::default();
    for (from, to) in ranges {
        let bytes = code.places.bytes(*from, *to);
        let ip = code.start + u64::from(*from);
        let mut decoder = Decoder::with_ip(64, bytes, ip, DecoderOptions::NONE);
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            if instruction.mnemonic() != Mnemonic::Int3 {
                instructions.push(instruction);
            }
        }
    }
}

/// Where a direct branch goes.
pub fn branch_target(instruction: &Instruction) -> Option<u64> {
    let direct = instruction.op_count() == 1 && instruction.op0_kind() == OpKind::NearBranch64;
    direct.then(|| instruction.near_branch_target())
}

/// Cuts the instructions into blocks; block 0 is the entry.
pub fn blocks(
    code: &Code64<'_>,
    instructions: &[Instruction],
    inside: &impl Fn(u64) -> Option<u32>,
) -> Vec<Block> {
    let offset = |instruction: &Instruction| (instruction.ip() - code.start) as u32;
    let mut indices: Vec<(u32, usize)> = instructions.iter().map(offset).zip(0..).collect();
    // Parts of a function may lie before it.
    indices.sort_unstable();
    let index_of = |at: u32| {
        let found = indices.binary_search_by_key(&at, |(at, _)| *at);
        found.ok().map(|found| indices[found].1)
    };
    // Where each instruction may go besides the next one, and whether to the next one.
    let mut aside: Vec<(usize, usize)> = Vec::new();
    let mut ends = vec![false; instructions.len()];
    let mut leads = vec![false; instructions.len() + 1];
    if let Some(first) = leads.first_mut() {
        *first = true;
    }
    let mut falls = vec![true; instructions.len()];
    for (index, instruction) in instructions.iter().enumerate() {
        let at = offset(instruction);
        let mut go = |to: u32| {
            if let Some(to) = index_of(to) {
                aside.push((index, to));
                leads[to] = true;
                ends[index] = true;
            }
        };
        if let Some(to) = code.jump_labels.get(&at) {
            go(*to);
        }
        if let Some(to) = code.faults.get(&at) {
            go(*to);
        }
        match instruction.flow_control() {
            FlowControl::ConditionalBranch => {
                if let Some(to) = branch_target(instruction).and_then(inside) {
                    go(to);
                }
            }
            FlowControl::UnconditionalBranch => {
                if let Some(to) = branch_target(instruction).and_then(inside) {
                    go(to);
                }
                ends[index] = true;
                // A jump that a jump label may take out goes on as well.
                falls[index] = code.jump_labels.contains_key(&at);
            }
            FlowControl::Return | FlowControl::IndirectBranch => {
                ends[index] = true;
                falls[index] = false;
            }
            FlowControl::Exception => {
                ends[index] = true;
                falls[index] = code.warnings.contains(&at);
            }
            FlowControl::Call => {
                let to = branch_target(instruction).and_then(|va| va.checked_sub(code.start));
                if to.is_some_and(|to| code.no_return.contains(&(to as u32))) {
                    ends[index] = true;
                    falls[index] = false;
                }
            }
            _ => {}
        }
        if ends[index] {
            leads[index + 1] = true;
        }
    }
    let mut blocks: Vec<Block> = Vec::new();
    let mut block_of = vec![0usize; instructions.len()];
    for index in 0..instructions.len() {
        if leads[index] {
            blocks.push(Block {
                first: index,
                end: index,
                next: SmallVec::new(),
                before: SmallVec::new(),
            });
        }
        let number = blocks.len() - 1;
        block_of[index] = number;
        blocks[number].end = index + 1;
    }
    let mut edges: Vec<(usize, usize)> = Vec::new();
    for (number, block) in blocks.iter().enumerate() {
        let last = block.end - 1;
        let contiguous = instructions
            .get(block.end)
            .is_some_and(|next| next.ip() >= instructions[last].next_ip());
        if falls[last] && contiguous && number + 1 < blocks.len() {
            edges.push((number, number + 1));
        }
    }
    edges.extend(
        aside
            .into_iter()
            .map(|(from, to)| (block_of[from], block_of[to])),
    );
    edges.sort_unstable();
    edges.dedup();
    for (from, to) in edges {
        blocks[from].next.push(to);
        blocks[to].before.push(from);
    }
    blocks
}

/// Blocks that can be reached, each before those that it goes to where no loop forbids it.
pub fn order(blocks: &[Block]) -> Vec<usize> {
    let mut seen = vec![false; blocks.len()];
    let mut order = Vec::with_capacity(blocks.len());
    if blocks.is_empty() {
        return order;
    }
    let mut stack = vec![(0, 0)];
    seen[0] = true;
    while let Some((block, next)) = stack.pop() {
        match blocks[block].next.get(next) {
            Some(to) => {
                stack.push((block, next + 1));
                if !std::mem::replace(&mut seen[*to], true) {
                    stack.push((*to, 0));
                }
            }
            None => order.push(block),
        }
    }
    order.reverse();
    order
}
