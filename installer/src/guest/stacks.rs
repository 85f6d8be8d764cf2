//! Whether any saved instruction pointer lies in a range of the kernel's text: needed before cave code may vanish.
//!
//! Call it only when nothing jumps into the range any more: then what is in there only gets less, and a clean answer
//! twice in a row stays true.
//!
//! A word that points into the range may lie on a stack for nothing (see `orc`): where there is one, the thread's frames
//! are followed as far as they are known, and only what is above counts for what it may be.

use super::kernel::vcpus;
use super::memory::{GuestMemory, ReadError};
use super::orc::{Orc, Words};
use super::processes::Reader;
use crate::xen::{GuestVa, Hypervisor, XenError};
use std::cell::OnceCell;
use std::collections::HashSet;
use std::ops::Range;
use thiserror::Error;

/// More threads than this are not scanned; the answer is then "do not know".
const MAX_THREADS: usize = 1 << 17;
/// Stacks followed from one vCPU (process, interrupt, exception, NMI).
const MAX_NESTED: usize = 32;

/// Why the range cannot be called free.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Occupied {
    /// A vCPU runs in it.
    #[error("vCPU {0} runs in it")]
    Running(usize),
    /// A word on a kernel stack points into it.
    #[error("the kernel stack word at {0} points into it")]
    Stack(GuestVa),
    /// Memory cannot be read, so nothing is known.
    #[error("a kernel stack cannot be read: {0}")]
    Unread(#[from] ReadError),
    /// Xen refused.
    #[error(transparent)]
    Xen(#[from] XenError),
    /// Too many threads, or lists that do not end.
    #[error("the guest's thread lists do not end")]
    Endless,
}

/// Looks at the kernel stacks of one guest.
pub struct Stacks<'a> {
    hypervisor: &'a dyn Hypervisor,
    reader: &'a Reader,
    /// Read when it is first needed.
    orc: OnceCell<Option<Orc>>,
}

impl<'a> Stacks<'a> {
    /// Nothing is read yet.
    pub fn new(hypervisor: &'a dyn Hypervisor, reader: &'a Reader) -> Self {
        Stacks {
            hypervisor,
            reader,
            orc: OnceCell::new(),
        }
    }

    /// Looks at every vCPU and every thread's kernel stack for an address in `range` (guest addresses).
    pub fn check_free(&self, range: &Range<u64>) -> Result<(), Occupied> {
        let memory = self.reader.kernel().memory(self.hypervisor);
        let size = self.reader.layout().thread_size;
        check_vcpus(self.hypervisor, &memory, size, range)?;
        for task in threads(&memory, self.reader)? {
            self.check_thread(&memory, task, range)?;
        }
        // A thread that was asleep in the first look may run now.
        check_vcpus(self.hypervisor, &memory, size, range)
    }

    fn check_thread(
        &self,
        memory: &GuestMemory<'_>,
        task: GuestVa,
        range: &Range<u64>,
    ) -> Result<(), Occupied> {
        let layout = self.reader.layout();
        let stack = memory.pointer(task.offset(layout.task_stack))?;
        if stack == GuestVa(0) {
            // A dead thread's stack is gone.
            return Ok(());
        }
        // A sleeping thread's stack is in use from its saved pointer on.
        let saved = task.offset(layout.task_saved_sp);
        let end = GuestVa(stack.0.saturating_add(layout.thread_size));
        let read = || -> Result<(GuestVa, Vec<u8>), ReadError> {
            let from = GuestVa(memory.pointer(saved)?.0 & !7).clamp(stack, end);
            Ok((from, memory.bytes(from, (end.0 - from.0) as usize)?))
        };
        let (from, bytes) = read()?;
        let words = Words {
            from,
            bytes: &bytes,
        };
        let found = search(words, range);
        if found.is_ok() {
            return Ok(());
        }
        let Some(orc) = self.orc(memory) else {
            return found;
        };
        let (frames, known) = orc.follow(words);
        // Frames of a thread that ran meanwhile are not those of any moment.
        let (from_now, bytes_now) = read()?;
        let still = from_now == from && bytes_now == bytes;
        if !still || frames.iter().any(|ip| range.contains(&ip.0)) {
            return found;
        }
        search(words.above(known), range)
    }

    fn orc(&self, memory: &GuestMemory<'_>) -> Option<&Orc> {
        let read = || Orc::read(memory, self.reader.orc()?).ok();
        self.orc.get_or_init(read).as_ref()
    }
}

/// An error if a word points into `range`.
fn search(words: Words<'_>, range: &Range<u64>) -> Result<(), Occupied> {
    match words.iter().find(|(_, word)| range.contains(word)) {
        Some((at, _)) => Err(Occupied::Stack(at)),
        None => Ok(()),
    }
}

fn check_vcpus(
    hypervisor: &dyn Hypervisor,
    memory: &GuestMemory<'_>,
    size: u64,
    range: &Range<u64>,
) -> Result<(), Occupied> {
    for (index, vcpu) in vcpus(hypervisor)?.iter().enumerate() {
        if range.contains(&vcpu.rip) {
            return Err(Occupied::Running(index));
        }
        // In user mode, and in the first instructions of an entry, no kernel stack is in use.
        if vcpu.user || vcpu.rsp >> 63 == 0 {
            continue;
        }
        // From the stack in use, follow words that point into other stacks: an interrupt's stack keeps the pointer of
        // the stack it interrupted (arch/x86/include/asm/irq_stack.h).
        let mut open = vec![GuestVa(vcpu.rsp & !7)];
        let mut seen = HashSet::new();
        while let Some(from) = open.pop() {
            let end = GuestVa((from.0 | (size - 1)).wrapping_add(1));
            if seen.len() >= MAX_NESTED || !seen.insert(end) {
                continue;
            }
            let words = match scan(memory, from, end, range) {
                // A word that only looked like a stack pointer; the stack in use itself must be readable.
                Err(Occupied::Unread(_)) if !seen.is_empty() && from.0 != vcpu.rsp & !7 => continue,
                words => words?,
            };
            for word in words {
                let near_stack = word.0 % 8 == 0
                    && (word.0 ^ vcpu.rsp) >> 36 == 0
                    && (word.0 | (size - 1)).wrapping_add(1) != end.0;
                if near_stack {
                    open.push(word);
                }
            }
        }
    }
    Ok(())
}

/// The words in `[from, end)`; an error if one lies in `range`.
fn scan(
    memory: &GuestMemory<'_>,
    from: GuestVa,
    end: GuestVa,
    range: &Range<u64>,
) -> Result<Vec<GuestVa>, Occupied> {
    let len = usize::try_from(end.0.saturating_sub(from.0)).unwrap_or(0) & !7;
    let bytes = memory.bytes(from, len)?;
    let words = Words {
        from,
        bytes: &bytes,
    };
    search(words, range)?;
    Ok(words.iter().map(|(_, word)| GuestVa(word)).collect())
}

/// Every thread of every process, kernel threads too.
fn threads(memory: &GuestMemory<'_>, reader: &Reader) -> Result<HashSet<GuestVa>, Occupied> {
    let layout = reader.layout();
    let (leaders, trouble) = reader.leaders(memory);
    if trouble.is_some() {
        return Err(Occupied::Endless);
    }
    let mut threads: HashSet<GuestVa> = leaders.iter().copied().collect();
    for leader in leaders {
        if leader == reader.init_task() {
            // init_task's own thread list is not linked like others' (init/init_task.c).
            continue;
        }
        let signal = memory.pointer(leader.offset(layout.task_signal))?;
        let head = signal.offset(layout.signal_thread_head);
        let mut at = memory.pointer(head)?;
        while at != head {
            let task = GuestVa(at.0.wrapping_sub(layout.task_thread_node));
            threads.insert(task);
            if threads.len() > MAX_THREADS {
                return Err(Occupied::Endless);
            }
            let next = memory.pointer(at)?;
            if next == at {
                return Err(Occupied::Endless);
            }
            at = next;
        }
    }
    Ok(threads)
}
