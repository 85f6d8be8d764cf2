//! The slots that passes may edit: whole instructions that nobody pokes after boot (design, invariant 3).

use super::self_checks::{self, CheckCall, SelfChecks};
use super::{Bitmap, Functions, Regions, Span, Sweep, Text, TextError, entries};
use crate::image::{Image, Tables};
use crate::thunks::MODULE_CLEANUP;
use penumbra_bundle::{LinkVa, TextOff};
use std::collections::BTreeMap;

/// R: a return site, 5 bytes, `jmp __x86_return_thunk` in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Return {
    /// Where it starts.
    pub at: TextOff,
    /// Whether r10, r11 and flags are free there (design, invariant 4).
    pub scratch_free: bool,
}

/// I: a retpoline site, `[cs] call/jmp __x86_indirect_thunk_REG`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Indirect {
    /// Where it starts.
    pub at: TextOff,
    /// 5, or 6 with the prefix.
    pub len: u8,
    /// The register, as x86 numbers them (rax 0 to r15 15).
    pub register: u8,
    /// `jmp`, not `call`.
    pub jump: bool,
    /// Whether r11 and flags are free there.
    pub scratch_free: bool,
}

/// C: a direct call or unconditional jump to where another function starts, 5 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Direct {
    /// Where it starts.
    pub at: TextOff,
    /// The function's first byte.
    pub to: TextOff,
    /// `jmp`, not `call`.
    pub jump: bool,
}

/// All slots, by address, and how many were left out for which reason.
#[derive(Clone, Default)]
pub struct Slots {
    /// R slots.
    pub returns: Vec<Return>,
    /// I slots.
    pub indirect: Vec<Indirect>,
    /// C: where `free_module` calls [`MODULE_CLEANUP`], when it does so once.
    pub module_free: Option<TextOff>,
    /// C: direct branches to functions that only check, slots or not.
    pub check_calls: Vec<CheckCall>,
    /// R sites left alone.
    pub returns_left: BTreeMap<String, u64>,
    /// I sites left alone.
    pub indirect_left: BTreeMap<String, u64>,
}

/// The register names in the order in which x86 numbers them.
pub const REGISTERS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// Sites in initialisation code: they are gone when views exist, and are not counted.
const ELSEWHERE: &str = "elsewhere";
/// `call rel32`, `jmp rel32`.
const CALL: u8 = 0xe8;
const JMP: u8 = 0xe9;

/// Where a pass may edit.
pub struct Editable<'a> {
    span: Span,
    regions: &'a Regions,
    poked: Bitmap,
}

impl<'a> Editable<'a> {
    fn of(span: Span, tables: &Tables, regions: &'a Regions) -> Editable<'a> {
        Editable {
            span,
            regions,
            poked: poked(span, tables),
        }
    }

    /// Whether the `len` bytes at `at` are in a region that must stay as it is, or written by the kernel.
    pub fn why_not(&self, at: TextOff, len: usize) -> Option<&'static str> {
        let start = at.0 as usize;
        let poked = || self.poked.any(start..start + len);
        let forbids = self.regions.forbids(self.span, at);
        forbids.or_else(|| poked().then_some("poked-by-kernel"))
    }

    /// The offset of `va`, where a pass may edit `len` bytes.
    fn slot(&self, va: LinkVa, len: usize) -> Result<TextOff, &'static str> {
        let at = self.span.offset(va).ok_or(ELSEWHERE)?;
        self.why_not(at, len).map_or(Ok(at), Err)
    }
}

/// Finds all direct calls and jumps to where another function starts that a pass may edit, by address, and how many others go
/// to functions for which `wanted` is said, by reason.
pub fn find_direct(
    text: &Text,
    tables: &Tables,
    wanted: impl Fn(TextOff) -> bool,
) -> (Vec<Direct>, BTreeMap<String, u64>) {
    let editable = Editable::of(text.span, tables, &text.regions);
    let (mut slots, mut left) = (Vec::new(), BTreeMap::new());
    let calls = text.sweep.calls.iter().map(|call| (call.at, call.to, CALL));
    let jumps = text.sweep.jumps.iter().map(|jump| (jump.at, jump.to, JMP));
    for (at, to, opcode) in calls.chain(jumps) {
        let to = to.and_then(|to| text.span.offset(to));
        let Some(to) = to.filter(|to| text.functions.is_start(*to) && wanted(*to)) else {
            continue;
        };
        let jump = opcode == JMP;
        if jump && text.functions.around(at).contains(&to) || text.slots.module_free == Some(at) {
            continue;
        }
        let whole =
            text.bytes[at.0 as usize] == opcode && text.sweep.is_boundary(TextOff(at.0 + 5));
        let reason = editable.why_not(at, 5);
        match reason.or_else(|| (!whole).then_some("conditional-or-short")) {
            None => slots.push(Direct { at, to, jump }),
            Some(reason) => *left.entry(reason.to_owned()).or_default() += 1,
        }
    }
    slots.sort_by_key(|slot| slot.at);
    (slots, left)
}

/// Finds all slots.
#[allow(
    clippy::too_many_arguments,
    reason = "each is another thing that is known about the text"
)]
pub fn find(
    bytes: &[u8],
    span: Span,
    image: &Image,
    tables: &Tables,
    sweep: &Sweep,
    regions: &Regions,
    functions: &Functions,
    checks: &SelfChecks,
    inline_asm_plain: bool,
) -> Result<Slots, TextError> {
    let return_thunk = image.need_symbol("__x86_return_thunk")?;
    let mut thunks = BTreeMap::new();
    for (number, name) in (0u8..).zip(REGISTERS) {
        if let Some(va) = image.symbol(&format!("__x86_indirect_thunk_{name}")) {
            thunks.insert(va, number);
        }
    }
    let editable = Editable::of(span, tables, regions);
    let mut slots = Slots {
        check_calls: self_checks::calls(checks, bytes, sweep, &editable),
        ..Slots::default()
    };
    let target = |at: TextOff, opcode_at: usize| {
        let start = at.0 as usize + opcode_at;
        let displacement = bytes.get(start + 1..start + 5)?;
        let displacement = i32::from_le_bytes(displacement.try_into().ok()?);
        Some(LinkVa(
            (span.va(at).0 + opcode_at as u64 + 5).wrapping_add_signed(i64::from(displacement)),
        ))
    };
    for va in &tables.returns {
        let slot = editable.slot(*va, 5).and_then(|at| {
            let expected = bytes[at.0 as usize] == 0xe9
                && target(at, 0) == Some(return_thunk)
                && sweep.is_boundary(TextOff(at.0 + 5));
            expected
                .then(|| Return {
                    at,
                    scratch_free: functions.has_fentry(at),
                })
                .ok_or("unexpected-bytes")
        });
        match slot {
            Ok(slot) => slots.returns.push(slot),
            Err(ELSEWHERE) => {}
            Err(reason) => *slots.returns_left.entry(reason.to_owned()).or_default() += 1,
        }
    }
    let mut labels: Vec<TextOff> = entries::pointers(image, tables)
        .into_iter()
        .filter_map(|va| span.offset(va))
        .filter(|at| !functions.is_start(*at))
        .collect();
    labels.sort_unstable();
    let has_labels = |at: TextOff| {
        let function = functions.around(at);
        let first = labels.partition_point(|label| *label < function.start);
        labels.get(first).is_some_and(|label| *label < function.end)
    };
    for va in &tables.retpolines {
        let slot = editable
            .slot(*va, 6)
            .or_else(|_| editable.slot(*va, 5))
            .and_then(|at| {
                let start = at.0 as usize;
                let prefix = usize::from(bytes[start] == 0x2e);
                let opcode = bytes.get(start + prefix).copied();
                let register = target(at, prefix).and_then(|va| thunks.get(&va));
                match (opcode, register) {
                    (Some(opcode @ (0xe8 | 0xe9)), Some(register))
                        if sweep.is_boundary(TextOff(at.0 + prefix as u32 + 5)) =>
                    {
                        let jump = opcode == 0xe9;
                        if jump && has_labels(at) {
                            // It may go to a label, with any register live.
                            return Err("computed-goto");
                        }
                        Ok(Indirect {
                            at,
                            len: 5 + prefix as u8,
                            register: *register,
                            jump,
                            // Around inline assembly no register is lost for sure.
                            scratch_free: !inline_asm_plain && functions.has_fentry(at),
                        })
                    }
                    _ => Err("unexpected-bytes"),
                }
            });
        match slot {
            Ok(slot) => slots.indirect.push(slot),
            Err(ELSEWHERE) => {}
            Err(reason) => *slots.indirect_left.entry(reason.to_owned()).or_default() += 1,
        }
    }
    if let (Some(free), Some(cleanup)) = (image.symbol("free_module"), image.symbol(MODULE_CLEANUP))
        && let Some(free) = span.offset(free)
    {
        let function = functions.around(free);
        let calls = sweep.calls.iter().filter(|call| {
            let direct = bytes[call.at.0 as usize] == 0xe8 && call.end.0 == call.at.0 + 5;
            function.contains(&call.at) && direct && target(call.at, 0) == Some(cleanup)
        });
        let mut calls = calls.filter_map(|call| editable.slot(span.va(call.at), 5).ok());
        let first = calls.next();
        slots.module_free = first.filter(|_| calls.next().is_none());
    }
    slots.returns.sort_by_key(|slot| slot.at);
    slots.returns.dedup();
    slots.indirect.sort_by_key(|slot| slot.at);
    slots.indirect.dedup();
    Ok(slots)
}

/// Whether `CALL_NOSPEC` in inline assembly is a retpoline site like those that the compiler makes. To Linux 6.13 it is an
/// alternative (arch/x86/include/asm/nospec-branch.h), which is no slot.
pub fn inline_asm_is_plain(image: &Image) -> bool {
    let banner = image.banner().unwrap_or_default();
    let release = banner.split(' ').nth(2).unwrap_or_default();
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) => (major, minor) > (6, 13),
        _ => true,
    }
}

/// Bytes that the kernel writes by tables other than the slots' own.
fn poked(span: Span, tables: &Tables) -> Bitmap {
    let mut poked = Bitmap::new(span.code.len() as usize);
    let mut mark = |va: LinkVa, len: u64| {
        for at in (va.0..va.0 + len).filter_map(|va| span.offset(LinkVa(va))) {
            poked.set(at.0 as usize);
        }
    };
    for entry in &tables.alternatives {
        mark(entry.site, u64::from(entry.site_len));
    }
    for site in &tables.paravirt {
        mark(site.site, u64::from(site.len));
    }
    for one in &tables.runtime_constants {
        mark(one.at, u64::from(one.value.width()));
    }
    for entry in &tables.jump_labels {
        mark(entry.code, 2);
    }
    for site in &tables.static_calls {
        mark(site.site, 5);
    }
    for va in &tables.fentry {
        mark(*va, 5);
    }
    for va in &tables.smp_locks {
        mark(*va, 1);
    }
    for va in &tables.sealed_endbr {
        mark(*va, 4);
    }
    poked
}
