//! Ranges of the text that hold special code, which no pass may edit (design, invariant 3).

use super::{Bitmap, Span};
use crate::image::{Fault, Image, Tables};
use penumbra_bundle::{LinkVa, TextOff, VaRange};

/// `.text..__x86.*`: retpolines and return thunks.
const X86_THUNK: &str = "x86-thunk";

/// Special ranges by name.
pub struct Regions {
    /// Where `.entry.text` starts: interrupts, system calls.
    pub entry: VaRange,
    /// `__SCT__` trampolines.
    pub static_calls: VaRange,
    return_thunk: Option<LinkVa>,
    list: Vec<(&'static str, VaRange)>,
    faulting: Bitmap,
}

impl Regions {
    /// Finds the ranges by the symbols that the linker script sets (arch/x86/kernel/vmlinux.lds.S).
    pub fn find(image: &Image, tables: &Tables, span: Span) -> Result<Regions, Fault> {
        let entry = image.between("__entry_text_start", "__entry_text_end")?;
        let x86_thunks = thunks(image)?;
        let static_calls = image.between("__static_call_text_start", "__static_call_text_end")?;
        let mut list = vec![
            ("entry-text", entry),
            (X86_THUNK, x86_thunks),
            ("static-call-text", static_calls),
            (
                "noinstr",
                image.between("__noinstr_text_start", "__noinstr_text_end")?,
            ),
        ];
        for name in [
            "srso_alias_untrain_ret",
            "srso_alias_safe_ret",
            "srso_untrain_ret_alias",
            "srso_safe_ret_alias",
        ] {
            // Placed apart for the way they alias in the branch predictor.
            if let Some(start) = image.symbol(name).filter(|va| span.code.contains(*va)) {
                list.push((
                    X86_THUNK,
                    VaRange {
                        start,
                        end: LinkVa(start.0 + 16),
                    },
                ));
            }
        }
        if let (Some(start), Some(end)) = (
            image.symbol("__kprobes_text_start"),
            image.symbol("__kprobes_text_end"),
        ) {
            list.push(("no-kprobes", VaRange { start, end }));
        }
        // ftrace copies its callers from here into trampolines (create_trampoline, arch/x86/kernel/ftrace.c).
        for (start, end) in [
            ("ftrace_caller", "ftrace_caller_end"),
            ("ftrace_regs_caller", "ftrace_regs_caller_end"),
        ] {
            if let (Some(start), Some(end)) = (image.symbol(start), image.symbol(end)) {
                list.push(("copied", VaRange { start, end }));
            }
        }
        for start in &tables.no_kprobes {
            if let Some(end) = next_symbol(image, *start).filter(|_| span.code.contains(*start)) {
                list.push(("no-kprobes", VaRange { start: *start, end }));
            }
        }
        let mut faulting = Bitmap::new(span.code.len() as usize);
        for at in tables.faulting.iter().filter_map(|va| span.offset(*va)) {
            faulting.set(at.0 as usize);
        }
        Ok(Regions {
            entry,
            static_calls,
            return_thunk: image.symbol("__x86_return_thunk"),
            list,
            faulting,
        })
    }

    /// Finds them in a module, by its sections.
    pub fn of_module(image: &Image, tables: &Tables, span: Span) -> Regions {
        let mut list: Vec<(&'static str, VaRange)> = Vec::new();
        for section in image.sections() {
            let why = match section.name.as_str() {
                ".noinstr.text" => "noinstr",
                ".static_call.text" => "static-call-text",
                ".kprobes.text" => "no-kprobes",
                // Never executed where it stands, or only before the kernel is patched.
                ".altinstr_replacement" | ".altinstr_aux" => "alternative",
                _ => continue,
            };
            list.push((why, section.range));
        }
        for start in &tables.no_kprobes {
            if let Some(end) = next_symbol(image, *start) {
                list.push(("no-kprobes", VaRange { start: *start, end }));
            }
        }
        let mut faulting = Bitmap::new(span.code.len() as usize);
        for at in tables.faulting.iter().filter_map(|va| span.offset(*va)) {
            faulting.set(at.0 as usize);
        }
        let nowhere = VaRange {
            start: span.code.start,
            end: span.code.start,
        };
        Regions {
            entry: nowhere,
            static_calls: nowhere,
            return_thunk: None,
            list,
            faulting,
        }
    }

    /// Why the instruction at `at` must not be edited, if so.
    pub fn forbids(&self, span: Span, at: TextOff) -> Option<&'static str> {
        let va = span.va(at);
        if self.faulting.get(at.0 as usize) {
            return Some("may-fault");
        }
        self.list
            .iter()
            .find(|(_, range)| range.contains(va))
            .map(|(name, _)| *name)
    }

    /// Whether `va` lies in a retpoline or a return thunk.
    pub fn is_x86_thunk(&self, va: LinkVa) -> bool {
        self.list
            .iter()
            .any(|(name, range)| range.contains(va) && *name == X86_THUNK)
    }

    /// Whether a jump to `va` is a return.
    pub fn is_return_thunk(&self, va: LinkVa) -> bool {
        self.return_thunk == Some(va)
    }

    /// Whether no indirect branch may reach `va`: entry code, thunks and static-call trampolines are entered by
    /// hardware and by direct branches only.
    pub fn never_called_indirectly(&self, va: LinkVa) -> bool {
        self.entry.contains(va) || self.static_calls.contains(va) || self.is_x86_thunk(va)
    }
}

/// Retpolines and return thunks lie in one run, bounded by symbols since Linux 5.16.
fn thunks(image: &Image) -> Result<VaRange, Fault> {
    let start = image
        .symbol("__indirect_thunk_start")
        .map_or_else(|| image.need_symbol("__x86_indirect_thunk_array"), Ok)?;
    let end = image.symbol("__indirect_thunk_end").map_or_else(
        || {
            image
                .need_symbol("__x86_return_thunk")
                .map(|va| LinkVa(va.0 + 16))
        },
        Ok,
    )?;
    Ok(VaRange { start, end })
}

/// The first address above `va` that a code symbol names.
fn next_symbol(image: &Image, va: LinkVa) -> Option<LinkVa> {
    let above = image.symbols.partition_point(|symbol| symbol.va <= va);
    image.symbols[above..]
        .iter()
        .find(|symbol| symbol.is_code())
        .map(|symbol| symbol.va)
}
