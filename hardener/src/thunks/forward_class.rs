//! `forward_cfi_REG_cN`: the target in REG must be an entry of class N, or lie outside the kernel's text.
//!
//! A small class is code: its members are compared with one after another when they are few, by halving when they are more.
//! The large ones are in one table, whose words are a class's number and a member's offset; their thunks say which class is
//! meant, and go on to code that they share. Of a class by arity a table says how many argument registers each entry reads.

use super::assembler::{Section, Thunk, imm32};
use super::forward_cfi::{Scratch, scratch};
use super::hashed::{ARITY_BITS, class_numbers};
use super::{Hashed, HashedTable, KernelThunks, Violation};
use crate::text::{Indirect, REGISTERS};
use crate::types::{Forward, Reach};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use penumbra_bundle::{LinkVa, Offending, TextOff, VaRange};
use std::collections::{BTreeMap, BTreeSet};

/// So many are compared with one after another.
const FEW: usize = 4;
/// A larger class is in the table: its code would be as large as that, and not faster.
const MAX_COMPARED: usize = 16;

/// The table of large classes, placed.
pub struct ClassTable {
    /// The table.
    pub table: HashedTable,
    /// How many bits of a word are an offset.
    offset_bits: u32,
    /// The numbers in the table, by class.
    numbers: BTreeMap<u32, u32>,
}

impl ClassTable {
    /// Encodes the large classes of `forward` that some branch in `slots` is in, and places the table at `at`. None when there
    /// is none.
    pub fn build(
        forward: &Forward,
        slots: &[Indirect],
        text: VaRange,
        at: LinkVa,
    ) -> Option<ClassTable> {
        let used: BTreeSet<u32> = slots
            .iter()
            .filter_map(|slot| forward.class_number(slot.at))
            .collect();
        let class = |number: &u32| &forward.classes[*number as usize];
        let mut large: Vec<u32> = used.into_iter().collect();
        large.retain(|number| {
            let class = class(number);
            is_listed(&class.reach) && class.entries.len() > MAX_COMPARED
        });
        // The largest classes gain most.
        let (offset_bits, free) = class_numbers(text);
        large.sort_by_key(|number| (std::cmp::Reverse(class(number).entries.len()), *number));
        let numbers: BTreeMap<u32, u32> = large.into_iter().zip(free).collect();
        if numbers.is_empty() {
            return None;
        }
        let members: Vec<(u32, &[TextOff])> = numbers
            .iter()
            .map(|(class, number)| (*number, &forward.classes[*class as usize].entries[..]))
            .collect();
        Some(ClassTable {
            table: HashedTable::of_classes("classes", &members, offset_bits, text, at),
            offset_bits,
            numbers,
        })
    }
}

/// The tables that thunks of classes read, and how large these may be.
pub struct Tables<'a> {
    /// That of large classes.
    pub large: Option<&'a ClassTable>,
    /// That of all entries with the number of argument registers that they read.
    pub arities: Option<Hashed>,
    /// Whether room counts more than speed.
    pub compact: bool,
}

/// The thunk for a slot of class `class`; none when the class is that of all entries, which have a table.
pub fn name(forward: &Forward, slot: &Indirect) -> Option<String> {
    let class = forward.class_number(slot.at)?;
    has_thunk(&forward.classes[class as usize].reach).then(|| {
        let form = if slot.scratch_free { "" } else { "saving_" };
        let register = REGISTERS[usize::from(slot.register)];
        format!("forward_cfi_{form}{register}_c{class}")
    })
}

/// Whether a class is checked by itself: for that of all entries there is a table.
pub fn has_thunk(reach: &Reach) -> bool {
    !matches!(reach, Reach::Any)
}

/// Whether a class is a list of entries that thunks hold, and no question that a table answers for all entries.
fn is_listed(reach: &Reach) -> bool {
    matches!(reach, Reach::Functions(_) | Reach::Prototypes(_))
}

/// Assembles the thunks that the text's slots need.
pub fn emit(
    section: &mut Section,
    forward: &Forward,
    tables: &Tables<'_>,
    text: VaRange,
    kernel: &KernelThunks,
    slots: &[Indirect],
    violation: &Violation,
) {
    let mut needed: BTreeMap<String, (&Indirect, u32)> = BTreeMap::new();
    for slot in slots {
        if let (Some(name), Some(class)) = (name(forward, slot), forward.class_number(slot.at)) {
            needed.insert(name, (slot, class));
        }
    }
    // What is stopped is reported by one thunk for each register.
    let registers: BTreeSet<u8> = needed.values().map(|(slot, _)| slot.register).collect();
    let mut reports = BTreeMap::new();
    for register in registers {
        let Some(retpoline) = kernel.indirect.get(&register) else {
            continue;
        };
        let name = format!("forward_cfi_stop_{}", REGISTERS[usize::from(register)]);
        let at = section.thunk(&name, violation, |thunk| {
            if violation.report(thunk, Offending::Register(register))? {
                thunk.asm.jmp(retpoline.0)?;
            }
            Ok(())
        });
        reports.insert(register, (*retpoline, at));
    }
    let rest = untold(section, forward, &reports, text, &needed, violation);
    let mut shared: BTreeMap<(u8, bool, bool), LinkVa> = BTreeMap::new();
    for (name, (slot, class)) in needed {
        let Some((retpoline, stop)) = reports.get(&slot.register) else {
            continue;
        };
        let by_prototype = forward.classes[class as usize].reach.is_by_prototype();
        let rest = rest.get(&slot.register).filter(|_| by_prototype);
        let stop = rest.unwrap_or(stop);
        if let (Reach::Arity(most), Some(arities)) =
            (&forward.classes[class as usize].reach, &tables.arities)
        {
            let reads = Reads {
                arities,
                most: *most,
            };
            section.packed(&name, violation, |thunk| {
                by_arity(thunk, slot, &reads, text, *retpoline, *stop)
            });
            continue;
        }
        let known = tables
            .large
            .and_then(|large| Some((large, large.numbers.get(&class)?)));
        let Some((large, number)) = known else {
            let entries = &forward.classes[class as usize].entries;
            section.packed(&name, violation, |thunk| {
                let exits = Exits {
                    retpoline: *retpoline,
                    stop: *stop,
                    compact: tables.compact,
                };
                one(thunk, slot, entries, text, exits)
            });
            continue;
        };
        let key = (slot.register, slot.scratch_free, by_prototype);
        let lookup = *shared.entry(key).or_insert_with(|| {
            let hashed = large.table.hashed();
            section.thunk_or_piece(None, violation, |thunk| {
                look_up(thunk, slot, &hashed, text, *retpoline, *stop)
            })
        });
        section.packed(&name, violation, |thunk| {
            let Scratch {
                register,
                halves,
                save,
                ..
            } = scratch(slot.register, slot.scratch_free);
            if save {
                thunk.asm.push(register)?;
            }
            thunk
                .asm
                .mov(halves.0, (number << large.offset_bits) as i32)?;
            thunk.asm.jmp(lookup.0)
        });
    }
}

/// Where targets in each register go that are not in a class by prototype: entries of which nothing is known go on, the others
/// are stopped.
fn untold(
    section: &mut Section,
    forward: &Forward,
    reports: &BTreeMap<u8, (LinkVa, LinkVa)>,
    text: VaRange,
    needed: &BTreeMap<String, (&Indirect, u32)>,
    violation: &Violation,
) -> BTreeMap<u8, LinkVa> {
    let entries = forward.untold();
    let mut made = BTreeMap::new();
    if entries.is_empty() {
        return made;
    }
    for (slot, class) in needed.values() {
        let by_prototype = forward.classes[*class as usize].reach.is_by_prototype();
        if !by_prototype || made.contains_key(&slot.register) {
            continue;
        }
        if let Some((retpoline, stop)) = reports.get(&slot.register) {
            let name = format!(
                "forward_cfi_untold_{}",
                REGISTERS[usize::from(slot.register)]
            );
            // It is seldom asked, so one form serves all.
            let saving = Indirect {
                scratch_free: false,
                ..**slot
            };
            let at = section.thunk(&name, violation, |thunk| {
                let exits = Exits {
                    retpoline: *retpoline,
                    stop: *stop,
                    compact: true,
                };
                one(thunk, &saving, &entries, text, exits)
            });
            made.insert(slot.register, at);
        }
    }
    made
}

/// A class by arity.
struct Reads<'a> {
    arities: &'a Hashed,
    /// As many argument registers as are read at most.
    most: u8,
}

fn by_arity(
    thunk: &mut Thunk,
    slot: &Indirect,
    reads: &Reads<'_>,
    text: VaRange,
    retpoline: LinkVa,
    stop: LinkVa,
) -> Result<(), IcedError> {
    let Scratch {
        register: scratch,
        halves: (key, _),
        target,
        save,
    } = scratch(slot.register, slot.scratch_free);
    let (other, index) = other(scratch);
    let a = &mut thunk.asm;
    let mut ok = a.create_label();
    if save {
        a.push(scratch)?;
    }
    if !slot.scratch_free {
        a.pushfq()?;
    }
    a.push(other)?;
    a.mov(scratch, target)?;
    a.sub(scratch, imm32(text.start))?;
    thunk.absolute();
    let a = &mut thunk.asm;
    a.cmp(scratch, text.len() as i32)?;
    a.jae(ok)?;
    a.shl(key, ARITY_BITS)?;
    for part in reads.arities.parts() {
        part.index(&mut thunk.asm, index, key)?;
        part.compare_arity(thunk, key, (other, index), reads.most, ok)?;
    }
    let restore = |a: &mut CodeAssembler| {
        a.pop(other)?;
        if !slot.scratch_free {
            a.popfq()?;
        }
        if save {
            a.pop(scratch)?;
        }
        Ok::<(), IcedError>(())
    };
    let a = &mut thunk.asm;
    restore(a)?;
    a.jmp(stop.0)?;
    a.set_label(&mut ok)?;
    restore(a)?;
    a.jmp(retpoline.0)
}

/// The other one of r10 and r11.
fn other(scratch: AsmRegister64) -> (AsmRegister64, AsmRegister32) {
    if scratch == r11 {
        (r10, r10d)
    } else {
        (r11, r11d)
    }
}

/// What the thunks of large classes share: the class, moved up as words have it, is in the scratch register, which is saved
/// where it must be.
fn look_up(
    thunk: &mut Thunk,
    slot: &Indirect,
    classes: &Hashed,
    text: VaRange,
    retpoline: LinkVa,
    stop: LinkVa,
) -> Result<(), IcedError> {
    let Scratch {
        register: scratch,
        halves: (word, _),
        target,
        save,
    } = scratch(slot.register, slot.scratch_free);
    // The other one of r10 and r11.
    let (other, index) = if scratch == r11 {
        (r10, r10d)
    } else {
        (r11, r11d)
    };
    let a = &mut thunk.asm;
    let mut ok = a.create_label();
    if !slot.scratch_free {
        a.pushfq()?;
    }
    a.push(other)?;
    if other != target {
        a.mov(other, target)?;
    }
    a.sub(other, imm32(text.start))?;
    thunk.absolute();
    let a = &mut thunk.asm;
    a.cmp(other, text.len() as i32)?;
    a.jae(ok)?;
    a.add(word, index)?;
    for part in classes.parts() {
        part.index(&mut thunk.asm, index, word)?;
        part.compare(thunk, word, other)?;
        thunk.asm.je(ok)?;
    }
    let restore = |a: &mut CodeAssembler| {
        a.pop(other)?;
        if !slot.scratch_free {
            a.popfq()?;
        }
        if save {
            a.pop(scratch)?;
        }
        Ok::<(), IcedError>(())
    };
    let a = &mut thunk.asm;
    restore(a)?;
    a.jmp(stop.0)?;
    a.set_label(&mut ok)?;
    restore(a)?;
    a.jmp(retpoline.0)
}

/// Compares the target itself with the addresses of entries; only one that is none of them is moved to where it can be asked
/// whether it lies in the text.
fn one(
    thunk: &mut Thunk,
    slot: &Indirect,
    entries: &[TextOff],
    text: VaRange,
    exits: Exits,
) -> Result<(), IcedError> {
    let Scratch {
        register: scratch,
        target,
        save,
        ..
    } = scratch(slot.register, slot.scratch_free);
    let keeps = save || !slot.scratch_free;
    let a = &mut thunk.asm;
    let (mut ok, mut outside) = (a.create_label(), a.create_label());
    let mut bad = a.create_label();
    if save {
        a.push(scratch)?;
    }
    if !slot.scratch_free {
        a.pushfq()?;
    }
    let found = match keeps || exits.compact {
        true => Found::Here(ok),
        false => Found::There(exits.retpoline),
    };
    let among = Among {
        target,
        text,
        found,
        outside,
    };
    among.compare(thunk, entries, true)?;
    let a = &mut thunk.asm;
    a.set_label(&mut outside)?;
    a.mov(scratch, target)?;
    a.sub(scratch, imm32(text.start))?;
    thunk.absolute();
    let a = &mut thunk.asm;
    a.cmp(scratch, text.len() as i32)?;
    match keeps {
        true => a.jb(bad)?,
        false => a.jb(exits.stop.0)?,
    }
    let restore = |a: &mut CodeAssembler| {
        if !slot.scratch_free {
            a.popfq()?;
        }
        if save {
            a.pop(scratch)?;
        }
        Ok::<(), IcedError>(())
    };
    if matches!(found, Found::Here(_)) {
        a.set_label(&mut ok)?;
    }
    restore(a)?;
    a.jmp(exits.retpoline.0)?;
    if keeps {
        a.set_label(&mut bad)?;
        restore(a)?;
        a.jmp(exits.stop.0)?;
    }
    Ok(())
}

/// Where a thunk goes.
#[derive(Clone, Copy)]
struct Exits {
    retpoline: LinkVa,
    stop: LinkVa,
    /// Whether room counts: the jump to the retpoline stands once.
    compact: bool,
}

/// Where a target goes that is found.
#[derive(Clone, Copy)]
enum Found {
    Here(CodeLabel),
    There(LinkVa),
}

/// Comparisons of a target with entries.
struct Among {
    target: AsmRegister64,
    text: VaRange,
    found: Found,
    outside: CodeLabel,
}

impl Among {
    /// Finds the target when it is one of `entries`, which are sorted; else goes to `outside`, which stands behind the `last` piece.
    fn compare(&self, thunk: &mut Thunk, entries: &[TextOff], last: bool) -> Result<(), IcedError> {
        if entries.len() <= FEW {
            for entry in entries {
                self.with(thunk, *entry)?;
            }
            if !last {
                thunk.asm.jmp(self.outside)?;
            }
            return Ok(());
        }
        let (below, rest) = entries.split_at(entries.len() / 2);
        let mut above = thunk.asm.create_label();
        self.with(thunk, rest[0])?;
        thunk.asm.ja(above)?;
        self.compare(thunk, below, false)?;
        thunk.asm.set_label(&mut above)?;
        self.compare(thunk, &rest[1..], last)
    }

    fn with(&self, thunk: &mut Thunk, entry: TextOff) -> Result<(), IcedError> {
        let entry = LinkVa(self.text.start.0 + u64::from(entry.0));
        thunk.asm.cmp(self.target, imm32(entry))?;
        thunk.absolute();
        match self.found {
            Found::Here(label) => thunk.asm.je(label),
            Found::There(at) => thunk.asm.je(at.0),
        }
    }
}
