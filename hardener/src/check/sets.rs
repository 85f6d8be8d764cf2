//! The sets that the tables in the cave must hold, derived from the image alone.

use super::kernel::sweep::is_call;
use super::kernel::tables::Alternative;
use super::kernel::{Kernel, KernelError};
use iced_x86::{Decoder, DecoderOptions};
use penumbra_bundle::LinkVa;
use rustc_hash::FxHashSet;
use std::collections::BTreeSet;

/// Return addresses that no call precedes: code that pushes them itself.
///
/// A new task starts at `ret_from_fork` (`copy_thread`); kretprobes and the function graph tracer replace a return
/// address on the stack by their own (`arch_rethook_prepare`, `prepare_ftrace_return`).
const PUSHED: [&str; 4] = [
    "ret_from_fork",
    "ret_from_fork_asm",
    "arch_rethook_trampoline",
    "return_to_handler",
];

const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];

/// The addresses that a table must hold, and those that make no difference.
#[derive(Debug, Default)]
pub struct Legal {
    /// Correct code goes there.
    pub required: BTreeSet<LinkVa>,
    /// Nothing goes there, and who does gains nothing: they follow a call in the file that the kernel replaces at boot by
    /// one that ends before, or INT3 that only catches speculation.
    pub optional: BTreeSet<LinkVa>,
}

/// Every address in the text that a checked return may go to.
pub fn return_sites(kernel: &Kernel) -> Result<Legal, KernelError> {
    let thunks = kernel.thunk_text()?;
    let mut legal = Legal::default();
    for after in &kernel.sweep.after_calls {
        // What follows a call inside a retpoline or an untraining thunk only catches speculation.
        if !thunks.iter().any(|thunk| thunk.contains(*after)) {
            legal.required.insert(*after);
        }
    }
    for alternative in &kernel.tables.alternatives {
        if kernel.in_text(alternative.site.start) {
            for (after, stuffing) in calls_in_replacement(kernel, alternative) {
                if stuffing {
                    legal.optional.insert(after);
                } else {
                    legal.required.insert(after);
                }
            }
        }
    }
    // `call *pv_ops(%rip)` is 6 bytes in the file and `call rel32`, 5 bytes, once patched.
    for site in &kernel.tables.paravirt {
        if kernel.in_text(site.start) {
            legal.required.insert(LinkVa(site.start.0 + 5));
            if legal.required.remove(&site.end) {
                legal.optional.insert(site.end);
            }
        }
    }
    legal.required.extend(pushed(kernel));
    Ok(legal)
}

/// Where code stands that is put on stacks as a return address.
pub fn pushed(kernel: &Kernel) -> impl Iterator<Item = LinkVa> {
    PUSHED.iter().filter_map(|name| kernel.symbols.find(name))
}

/// Where calls in a replacement return to once it is copied over the site, and whether they only stuff the return stack
/// buffer: a call over an INT3 (`__FILL_RETURN_BUFFER`, arch/x86/include/asm/nospec-branch.h).
fn calls_in_replacement(kernel: &Kernel, alternative: &Alternative) -> Vec<(LinkVa, bool)> {
    let Some(code) = kernel.bytes(alternative.replacement) else {
        return Vec::new();
    };
    let start = alternative.site.start.0;
    Decoder::with_ip(64, code, start, DecoderOptions::NONE)
        .into_iter()
        .filter(is_call)
        .map(|instruction| {
            let after = instruction.next_ip();
            let stuffing = instruction.near_branch_target() == after + 1
                && code.get((after - start) as usize) == Some(&0xcc);
            (LinkVa(after), stuffing)
        })
        .collect()
}

/// Every entry in the text that a checked indirect branch may go to.
///
/// An entry is the address of a symbol or of a traced function. It counts when something may have stored its address: a
/// relocation anywhere but in tables that only describe code, a RIP-relative operand, an export, a relative pointer. A kernel
/// built with IBT names further ones, which it finds by their names (BPF's destructors): ENDBR64 at a symbol, not sealed.
pub fn entries(kernel: &Kernel) -> Result<Legal, KernelError> {
    let mut known: FxHashSet<LinkVa> = kernel.symbols.iter().map(|symbol| symbol.at).collect();
    known.extend(&kernel.tables.fentry);
    // Reached by direct branches, by the CPU or from stubs only; no checked branch goes there.
    let mut never = kernel.thunk_text()?;
    for (start, end) in [
        ("__static_call_text_start", "__static_call_text_end"),
        ("__entry_text_start", "__entry_text_end"),
    ] {
        never.push(kernel.symbols.between(start, end)?);
    }
    let mut legal = Legal::default();
    let mut landings = Vec::new();
    if let Some(sealed) = &kernel.tables.sealed {
        let sealed: FxHashSet<&LinkVa> = sealed.iter().collect();
        let symbols = kernel.symbols.iter().map(|symbol| symbol.at);
        let open = symbols.filter(|at| kernel.vmlinux.bytes(*at, 4) == Some(&ENDBR64));
        landings.extend(open.filter(|at| !sealed.contains(at)));
    }
    for to in pointers(kernel).chain(landings) {
        let barred = never.iter().any(|range| range.contains(to));
        if kernel.in_text(to) && known.contains(&to) && !barred {
            legal.required.insert(to);
        }
    }
    Ok(legal)
}

/// Every address that the image stores or computes, without the tables that only describe code.
pub fn pointers(kernel: &Kernel) -> impl Iterator<Item = LinkVa> {
    let describes = |place: &LinkVa| {
        let tables = &kernel.tables.descriptive;
        tables.iter().any(|table| table.contains(*place))
    };
    let relocs = &kernel.vmlinux.relocs;
    let wide = relocs
        .abs64
        .iter()
        .filter(move |place| !describes(place))
        .filter_map(|place| kernel.vmlinux.u64(*place).map(LinkVa));
    let narrow = relocs.abs32.iter().filter_map(|place| {
        let word = kernel.vmlinux.u32(*place)?;
        Some(LinkVa(i64::from(word as i32) as u64))
    });
    let relative = kernel.sweep.references.iter().map(|(_, to)| *to);
    wide.chain(narrow)
        .chain(relative)
        .chain(kernel.tables.exports.iter().copied())
        .chain(kernel.tables.relative_pointers.iter().copied())
}
