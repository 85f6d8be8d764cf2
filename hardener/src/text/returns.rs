//! Every address that a return may reach: exact, so that `return-cfi` needs no guess.

use super::sweep::call_ends;
use super::{Regions, Span, Sweep, TextError};
use crate::image::{Fault, Image, Tables};
use penumbra_bundle::TextOff;

/// Code that is returned to though no call stands before it.
///
/// `ret_from_fork`: put on a new task's stack (`copy_thread`). The others replace a return address on the stack:
/// kretprobes and rethook, function graph tracing.
const SPECIAL: [&str; 6] = [
    "ret_from_fork",
    "ret_from_fork_asm",
    "arch_rethook_trampoline",
    "__kretprobe_trampoline",
    "kretprobe_trampoline",
    "return_to_handler",
];

/// Where that code is; sorted.
pub fn specials(span: Span, image: &Image) -> Vec<TextOff> {
    let special = image
        .symbols
        .iter()
        .filter(|symbol| SPECIAL.contains(&symbol.name.as_str()));
    let mut found: Vec<TextOff> = special
        .filter_map(|symbol| span.offset(symbol.va))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Collects the addresses; sorted.
pub fn find(
    span: Span,
    image: &Image,
    tables: &Tables,
    sweep: &Sweep,
    regions: &Regions,
) -> Result<Vec<TextOff>, TextError> {
    // Calls as the file has them: direct, retpoline (the slot's end), fentry, static, paravirt unpatched; a call of a
    // function that does not return counts, its return address is what a backtrace and ftrace see.
    // Calls inside retpolines and return thunks are never returned to but by speculation.
    let calls = sweep
        .calls
        .iter()
        .filter(|call| !regions.is_x86_thunk(span.va(call.at)));
    let mut found: Vec<TextOff> = calls.map(|call| call.end).collect();
    // Static calls: the kernel pokes a 5-byte call there, whatever the file has.
    let calls = tables.static_calls.iter().filter(|site| !site.tail);
    found.extend(
        calls
            .filter_map(|site| span.offset(site.site))
            .map(|at| TextOff(at.0 + 5)),
    );
    // Paravirt: `call *pv_ops+x(%rip)`, 6 bytes, becomes a 5-byte call and a NOP.
    found.extend(
        tables
            .paravirt
            .iter()
            .filter_map(|site| span.offset(site.site))
            .map(|at| TextOff(at.0 + 5)),
    );
    for entry in &tables.alternatives {
        let Some(at) = span.offset(entry.site) else {
            continue;
        };
        let replacement = image
            .at(entry.replacement, usize::from(entry.replacement_len))
            .ok_or_else(|| {
                Fault::damaged(
                    ".altinstructions",
                    format!(
                        "the replacement {} of {} is not in the file",
                        entry.replacement, entry.site
                    ),
                )
            })?;
        found.extend(
            call_ends(replacement)
                .into_iter()
                .map(|end| TextOff(at.0 + u32::from(end))),
        );
    }
    found.extend(specials(span, image));
    found.retain(|at| span.offset(span.va(*at)).is_some());
    found.sort_unstable();
    found.dedup();
    Ok(found)
}
