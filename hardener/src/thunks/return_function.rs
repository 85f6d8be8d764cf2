//! `return_cfi_N`: the return address must follow a call of one of a function's callers' targets.
//!
//! Every function has a short thunk, which compares the return address, or what the call before it names, with a few constants:
//! three instructions more than a plain return in the best case, five or six in the usual one. What it does not know it hands over,
//! with the stack as it found it, to one of a few shared thunks: these let through what lies outside the text (modules, BPF,
//! trampolines), what pushes return addresses itself, the returns of indirect calls where the function has such callers (by a thunk
//! of its class first, when there are classes), and any return site whose call a kprobe replaces by INT3 (arch/x86/kernel/kprobes/core.c; an optimised kprobe covers no call,
//! `can_boost`).

use super::assembler::{Section, Thunk, imm32};
use super::hashed::class_numbers;
use super::return_cfi::Mode;
use super::{Hashed, HashedTable, Targets, Violation};
use crate::passes::Analyses;
use crate::text::Slots;
use crate::text::return_sets::{Behind, Check, Opcode, ReturnSets};
use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register};
use penumbra_bundle::{LinkVa, Offending, TextOff, VaRange};
use std::collections::{BTreeMap, BTreeSet};

const DIRECT: &str = "return_cfi_direct";
const INDIRECT: &str = "return_cfi_indirect";
/// `call rel32`.
const CALL: i32 = 0xe8;
/// `jmp rel32`, the next.
const JMP: i32 = 0xe9;
/// INT3, which a kprobe puts over a call's first byte.
const INT3: i32 = 0xcc;

/// What these thunks need.
pub struct Needs<'a> {
    /// What the returns may go back to.
    pub sets: &'a ReturnSets,
    /// The kernel's slots.
    pub slots: &'a Slots,
    /// What was found out about them.
    pub analyses: &'a Analyses<'a>,
    /// All return sites.
    pub sites: Targets,
    /// Where indirect calls return to, or those of no class.
    pub indirect: Hashed,
    /// Where the others do.
    pub classes: Option<Classes>,
    /// Code that is returned to though no call stands before it.
    pub special: &'a [TextOff],
    /// `__x86_return_thunk`.
    pub return_thunk: LinkVa,
    /// Whether thunks that compare with one function share the code that does: a jump more for each return, half the size.
    pub shared: bool,
}

/// The table of classes of return sites.
#[derive(Clone, Copy, Debug)]
pub struct Classes {
    /// Its parts.
    pub table: Hashed,
    /// How many bits of a word are an offset.
    pub offset_bits: u32,
}

/// Encodes the classes of `sets`, if it has any, for places in `text`, and places the table at `at`.
pub fn class_table(sets: &ReturnSets, text: VaRange, at: LinkVa) -> Option<(HashedTable, u32)> {
    let classes = sets.classes.as_ref().filter(|all| !all.is_empty())?;
    let (offset_bits, numbers) = class_numbers(text);
    let members = numbers.into_iter().zip(classes.iter().map(Vec::as_slice));
    let members: Vec<(u32, &[TextOff])> = members.collect();
    let name = "indirect_return_classes";
    let table = HashedTable::of_classes(name, &members, offset_bits, text, at);
    Some((table, offset_bits))
}

/// What a thunk saves that compares: no more than it uses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Saves {
    /// Nothing, or all, as its mode has it.
    AsMode(Mode),
    /// The flags: a return address is compared where it is.
    Flags,
    /// r11 and the flags.
    Callee,
}

impl Saves {
    /// For comparisons with return addresses.
    fn for_sites(mode: Mode) -> Saves {
        match mode {
            Mode::Saving => Saves::Flags,
            Mode::Plain | Mode::Zeroing => Saves::AsMode(mode),
        }
    }

    /// For comparisons with what a call names.
    fn for_callees(mode: Mode) -> Saves {
        match mode {
            Mode::Saving => Saves::Callee,
            Mode::Plain | Mode::Zeroing => Saves::AsMode(mode),
        }
    }

    /// What the code is called that takes it back and returns, without its mode; where it clears registers it is no thunk of its own.
    fn tail(self) -> Option<&'static str> {
        match self {
            Saves::AsMode(Mode::Zeroing) => None,
            Saves::AsMode(_) => Some("return_cfi_tail"),
            Saves::Flags => Some("return_cfi_tail_flags"),
            Saves::Callee => Some("return_cfi_tail_r11"),
        }
    }

    /// How many bytes of the stack hold it.
    fn bytes(self) -> i32 {
        match self {
            Saves::AsMode(mode) => mode.saved(),
            Saves::Flags => 8,
            Saves::Callee => 16,
        }
    }

    fn save(self, thunk: &mut Thunk) -> Result<(), IcedError> {
        match self {
            Saves::AsMode(mode) => return mode.save(thunk),
            Saves::Flags => {}
            Saves::Callee => thunk.asm.push(r11)?,
        }
        thunk.asm.pushfq()
    }

    fn restore(self, thunk: &mut Thunk) -> Result<(), IcedError> {
        match self {
            Saves::AsMode(mode) => mode.restore(thunk),
            Saves::Flags => thunk.asm.popfq(),
            Saves::Callee => {
                thunk.asm.popfq()?;
                thunk.asm.pop(r11)
            }
        }
    }
}

/// The thunk of the check of this number; none when any return site will do.
pub fn name(sets: &ReturnSets, check: u32, mode: Mode) -> Option<String> {
    match &sets.checks[check as usize] {
        Check::AnySite { own: None } => None,
        Check::Callers {
            called, indirect, ..
        } if called.is_empty() => Some(mode.named(&rest(*indirect))),
        Check::Callers { .. } | Check::AnySite { own: Some(_) } => {
            Some(mode.named(&format!("return_cfi_{check}")))
        }
    }
}

/// What the thunk is called, without its mode, for what no constant tells.
fn rest(behind: Behind) -> String {
    match behind {
        Behind::None => DIRECT.to_owned(),
        Behind::Any => INDIRECT.to_owned(),
        Behind::Class(class) => format!("{INDIRECT}_c{class}"),
    }
}

/// Assembles the thunks of all slots; `any` are those for which any return site will do.
pub fn emit(
    section: &mut Section,
    needs: &Needs<'_>,
    any: &BTreeMap<Mode, LinkVa>,
    violation: &Violation,
) {
    let slots = needs.slots.returns.iter().enumerate();
    let used: BTreeSet<(Mode, u32)> = slots
        .filter(|(index, _)| needs.analyses.checks(*index))
        .map(|(index, slot)| {
            let mode = Mode::of(index, slot, needs.analyses);
            (mode, needs.sets.of_slot[index])
        })
        .collect();
    // A thunk that nothing leads to is none that could be proved.
    let mut missing: BTreeSet<(Mode, Behind)> = BTreeSet::new();
    for (mode, index) in &used {
        if let Check::Callers { indirect, .. } = &needs.sets.checks[*index as usize] {
            missing.insert((*mode, *indirect));
            if let Behind::Class(_) = indirect {
                missing.insert((*mode, Behind::Any));
            }
        }
    }
    let mut tails: BTreeMap<(Mode, Saves), LinkVa> = BTreeMap::new();
    let mut misses = BTreeMap::new();
    for (mode, behind) in missing {
        let name = mode.named(&rest(behind));
        let at = match (behind, &needs.classes) {
            (Behind::Class(class), Some(classes)) => {
                let tail = tail(
                    section,
                    &mut tails,
                    needs,
                    (mode, Saves::AsMode(mode)),
                    violation,
                );
                let others = misses[&(mode, Behind::Any)];
                section.packed(&name, violation, |thunk| {
                    compare_class(thunk, needs, mode, classes, class, tail, others)
                })
            }
            _ => section.thunk(&name, violation, |thunk| {
                let table = (behind != Behind::None).then_some(&needs.indirect);
                miss(thunk, needs, mode, table, any[&mode], violation)
            }),
        };
        misses.insert((mode, behind), at);
    }
    let mut shared = BTreeMap::new();
    for (mode, index) in used {
        let Some(name) = name(needs.sets, index, mode) else {
            continue;
        };
        let (called, sites, opcode, miss) = match &needs.sets.checks[index as usize] {
            Check::AnySite { own: Some(own) } => (&vec![own.at], &None, own.opcode, any[&mode]),
            Check::Callers {
                called,
                sites,
                indirect,
                opcode,
            } if !called.is_empty() => (called, sites, *opcode, misses[&(mode, *indirect)]),
            _ => continue,
        };
        let text = needs.sites.text.start;
        let absolute = |list: &[TextOff]| -> Vec<LinkVa> {
            let list = list.iter();
            list.map(|at| LinkVa(text.0 + u64::from(at.0))).collect()
        };
        let called = absolute(called);
        let by_sites = sites.as_ref().filter(|_| !needs.shared);
        let is_shared = called.len() == 1 && needs.shared;
        let saves = match (by_sites, is_shared) {
            (Some(_), _) => Saves::for_sites(mode),
            (None, true) => Saves::AsMode(mode),
            (None, false) => Saves::for_callees(mode),
        };
        let tail = tail(section, &mut tails, needs, (mode, saves), violation);
        if let Some(sites) = by_sites {
            section.packed(&name, violation, |thunk| {
                compare_sites(thunk, &absolute(sites), saves, tail, miss)
            });
        } else if let ([only], true) = (&called[..], is_shared) {
            let key = (mode, miss, opcode);
            let rest = *shared.entry(key).or_insert_with(|| {
                section.thunk_or_piece(None, violation, |thunk| {
                    compare_shared(thunk, opcode, mode, tail, miss)
                })
            });
            section.packed(&name, violation, |thunk| {
                pass_callee(thunk, named(*only, opcode), mode)?;
                thunk.asm.jmp(rest.0)
            });
        } else {
            section.packed(&name, violation, |thunk| {
                compare_callees(thunk, &called, opcode, saves, tail, miss)
            });
        }
    }
}

/// The code that takes back what was saved and returns. What jumps there has looked at the return address.
fn tail(
    section: &mut Section,
    tails: &mut BTreeMap<(Mode, Saves), LinkVa>,
    needs: &Needs<'_>,
    (mode, saves): (Mode, Saves),
    violation: &Violation,
) -> LinkVa {
    *tails.entry((mode, saves)).or_insert_with(|| {
        let name = saves.tail().map(|name| mode.named(name));
        section.thunk_or_piece(name, violation, |thunk| {
            saves.restore(thunk)?;
            mode.finish(thunk, needs.return_thunk)
        })
    })
}

/// Looks whether the return address is in a class; leaves it to `others` where not.
fn compare_class(
    thunk: &mut Thunk,
    needs: &Needs<'_>,
    mode: Mode,
    classes: &Classes,
    class: u32,
    tail: LinkVa,
    others: LinkVa,
) -> Result<(), IcedError> {
    load(thunk, mode)?;
    thunk.asm.sub(r11, imm32(needs.sites.text.start))?;
    thunk.absolute();
    // Of what lies outside the text this may make a word, too: it passes here or there.
    let (_, numbers) = class_numbers(needs.sites.text);
    let number = numbers[class as usize] << classes.offset_bits;
    if number != 0 {
        thunk.asm.add(r11d, number as i32)?;
    }
    for part in classes.table.parts() {
        part.index(&mut thunk.asm, r10d, r11d)?;
        part.compare(thunk, r11d, r10)?;
        thunk.asm.je(tail.0)?;
    }
    mode.restore(thunk)?;
    thunk.asm.jmp(others.0)
}

/// Compares the return address with `sites`: there are fewer than comparisons with callees would take.
fn compare_sites(
    thunk: &mut Thunk,
    sites: &[LinkVa],
    saves: Saves,
    tail: LinkVa,
    miss: LinkVa,
) -> Result<(), IcedError> {
    saves.save(thunk)?;
    for site in sites {
        thunk
            .asm
            .cmp(qword_ptr(rsp + saves.bytes()), imm32(*site))?;
        thunk.absolute();
        thunk.asm.je(tail.0)?;
    }
    saves.restore(thunk)?;
    thunk.asm.jmp(miss.0)
}

/// Compares what the call before the return address names with the functions `called`.
fn compare_callees(
    thunk: &mut Thunk,
    called: &[LinkVa],
    opcode: Opcode,
    saves: Saves,
    tail: LinkVa,
    miss: LinkVa,
) -> Result<(), IcedError> {
    saves.save(thunk)?;
    reload(thunk, saves)?;
    let mut other = thunk.asm.create_label();
    name_callee(thunk, opcode, other)?;
    for callee in called {
        thunk.asm.cmp(r11d, imm32(named(*callee, opcode)))?;
        thunk.absolute();
        thunk.asm.je(tail.0)?;
    }
    if opcode == Opcode::Call {
        thunk.asm.set_label(&mut other)?;
    }
    saves.restore(thunk)?;
    thunk.asm.jmp(miss.0)
}

/// Puts the one callee's address into r10, which is saved first where it must be; [`compare_shared`] does the rest.
fn pass_callee(thunk: &mut Thunk, callee: LinkVa, mode: Mode) -> Result<(), IcedError> {
    if mode.saved() > 0 {
        thunk.asm.push(r10)?;
    }
    let callee = MemoryOperand::with_base_displ_size(Register::RIP, callee.0 as i64, 8);
    let lea = Instruction::with2(Code::Lea_r64_m, Register::R10, callee)?;
    thunk.asm.add_instruction(lea)
}

/// Compares what the call before the return address names with the function in r10.
fn compare_shared(
    thunk: &mut Thunk,
    opcode: Opcode,
    mode: Mode,
    tail: LinkVa,
    miss: LinkVa,
) -> Result<(), IcedError> {
    if mode.saved() > 0 {
        thunk.asm.push(r11)?;
        thunk.asm.pushfq()?;
    }
    reload(thunk, Saves::AsMode(mode))?;
    let mut other = thunk.asm.create_label();
    name_callee(thunk, opcode, other)?;
    thunk.asm.cmp(r11d, r10d)?;
    thunk.asm.je(tail.0)?;
    if opcode == Opcode::Call {
        thunk.asm.set_label(&mut other)?;
    }
    mode.restore(thunk)?;
    thunk.asm.jmp(miss.0)
}

/// From the return address in r11, what [`named`] is of the callee that the call before it names, in r11d; to `other` when it is no
/// direct call, if that is asked.
fn name_callee(thunk: &mut Thunk, opcode: Opcode, other: CodeLabel) -> Result<(), IcedError> {
    let a = &mut thunk.asm;
    // The displacement is the callee less the return address; modulo 2^32, as the processor adds it too (SDM volume 2, CALL).
    let displacement = dword_ptr(r11 - 4);
    match opcode {
        Opcode::Any => a.add(r11d, displacement),
        Opcode::NoJump => {
            // CF: it is less than a jump's.
            a.cmp(byte_ptr(r11 - 5), JMP)?;
            a.adc(r11d, displacement)
        }
        Opcode::Call => {
            a.cmp(byte_ptr(r11 - 5), CALL)?;
            a.jne(other)?;
            a.add(r11d, displacement)
        }
    }
}

/// What [`name_callee`] makes of a call of `callee`.
fn named(callee: LinkVa, opcode: Opcode) -> LinkVa {
    LinkVa(callee.0 + u64::from(opcode == Opcode::NoJump))
}

/// Puts the return address into r11.
fn load(thunk: &mut Thunk, mode: Mode) -> Result<(), IcedError> {
    mode.save(thunk)?;
    reload(thunk, Saves::AsMode(mode))
}

fn reload(thunk: &mut Thunk, saves: Saves) -> Result<(), IcedError> {
    thunk.asm.mov(r11, qword_ptr(rsp + saves.bytes()))
}

/// What no constant told.
fn miss(
    thunk: &mut Thunk,
    needs: &Needs<'_>,
    mode: Mode,
    indirect: Option<&Hashed>,
    any: LinkVa,
    violation: &Violation,
) -> Result<(), IcedError> {
    load(thunk, mode)?;
    let a = &mut thunk.asm;
    let (mut ok, mut probed) = (a.create_label(), a.create_label());
    let saving = mode == Mode::Saving;
    let mut end = if saving { a.create_label() } else { ok };
    a.sub(r11, imm32(needs.sites.text.start))?;
    thunk.absolute();
    let a = &mut thunk.asm;
    a.cmp(r11, needs.sites.text.len() as i32)?;
    a.jae(ok)?;
    for part in indirect.iter().flat_map(|table| table.parts()) {
        part.index(&mut thunk.asm, r10d, r11d)?;
        part.compare(thunk, r11d, r10)?;
        thunk.asm.je(ok)?;
    }
    let a = &mut thunk.asm;
    for at in needs.special {
        a.cmp(r11d, at.0 as i32)?;
        a.je(ok)?;
    }
    reload(thunk, Saves::AsMode(mode))?;
    let a = &mut thunk.asm;
    a.cmp(byte_ptr(r11 - 5), INT3)?;
    a.je(probed)?;
    mode.restore(thunk)?;
    if violation.report(thunk, Offending::Stack(0))? {
        thunk.asm.jmp(end)?;
    }
    thunk.asm.set_label(&mut ok)?;
    mode.restore(thunk)?;
    if saving {
        thunk.asm.set_label(&mut end)?;
    }
    mode.finish(thunk, needs.return_thunk)?;
    thunk.asm.set_label(&mut probed)?;
    mode.restore(thunk)?;
    thunk.asm.jmp(any.0)
}
