//! Thunks that look bytes up by hashing: what is told from the bytes is what following every address comes to.

use super::machine::{Code, Contract, Exit, Machine};
use super::term::Arena;
use super::tree::{Lookup, Tree};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use penumbra_bundle::HashedBytes;
use std::collections::BTreeSet;

const CAVE: u64 = 0xffff_ffff_81a1_9000;
const TABLE: u64 = CAVE + 0x1000;
const TAIL: u64 = CAVE + 0x800;
/// What the table covers.
const LOW: u64 = 0xffff_ffff_8100_0000;
const LEN: u32 = 0x3123;
const BITS: u32 = 14;
const PARTS: usize = 3;

/// What a thunk does otherwise than it should.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Places lie a byte further on.
    Start,
    /// Places are made from a bit less.
    Shift,
    /// The multiplier is even.
    Even,
    /// The subject is compared less 1.
    Other,
    /// Its second-lowest byte is compared.
    High,
    /// A part is not asked.
    Part,
    /// What is found is stopped.
    Turned,
}

fn hash() -> HashedBytes {
    HashedBytes::new(BITS).expect("14 bits are enough")
}

fn thunk(fault: Fault) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut pass, mut stop) = (a.create_label(), a.create_label());
    a.mov(r11, qword_ptr(rsp))?;
    a.sub(r11, LOW as i32)?;
    a.cmp(r11, LEN as i32)?;
    a.jae(pass)?;
    for part in 0..PARTS {
        if fault == Fault::Part && part == 1 {
            continue;
        }
        let mut start = i64::from(TABLE as i32) + (part * hash().part_len()) as i64;
        let (mut multiplier, mut shift) = (hash().multiplier(part) as i32, 40 - BITS);
        match fault {
            Fault::Start => start += 1,
            Fault::Shift => shift += 1,
            Fault::Even => multiplier <<= 1,
            _ => {}
        }
        a.imul_3(r10d, r11d, multiplier)?;
        a.shr(r10d, shift)?;
        if fault == Fault::Other {
            a.sub(r11, 1)?;
        }
        if fault == Fault::High {
            a.shr(r11, 8)?;
        }
        a.cmp(r11b, byte_ptr(r10 + start))?;
        a.je(if fault == Fault::Turned && part == 2 {
            stop
        } else {
            pass
        })?;
    }
    a.set_label(&mut stop)?;
    a.out(0xe5, al)?;
    a.ud2()?;
    a.set_label(&mut pass)?;
    a.jmp(TAIL)?;
    a.assemble(CAVE)
}

/// The bytes of a table, and its members.
fn table() -> (Vec<u8>, Vec<u64>) {
    let hash = hash();
    let mut members = BTreeSet::new();
    let mut bytes = Vec::new();
    for at in 0..PARTS * hash.part_len() {
        let said = |byte| hash.offset(at / hash.part_len(), at % hash.part_len(), byte);
        let new = (0..=255).filter(|byte| said(*byte) < LEN && at % 3 > 0);
        let new = new
            .filter(|byte| !members.contains(&said(*byte)))
            .max_by_key(|byte| said(*byte) % 97);
        let nothing = || (0..=255).find(|byte| said(*byte) >= LEN);
        let byte = new.or_else(nothing).expect("some byte says nothing");
        bytes.push(byte);
        members.extend(new.map(said));
    }
    let members = members.into_iter().map(|at| LOW + u64::from(at));
    (bytes, members.collect())
}

fn judged<T>(fault: Fault, judge: impl FnOnce(&Tree, &Code<'_>, &[Lookup<'_>]) -> T) -> T {
    let (table, members) = table();
    let thunk = thunk(fault).expect("the thunk assembles");
    let mut bytes = vec![0xcc; 0x2000];
    bytes[..thunk.len()].copy_from_slice(&thunk);
    bytes[0x1000..0x1000 + table.len()].copy_from_slice(&table);
    let code = Code {
        text: (LOW, &[]),
        start: CAVE,
        bytes: &bytes,
        executable: (CAVE, CAVE + 0x1000),
    };
    let exit = |at| (at == TAIL).then_some(Exit::Return);
    let contract = Contract {
        target: None,
        scratch: 1 << 10 | 1 << 11,
        flags: true,
        cleared: 0,
        plain: false,
    };
    let (tree, _) = Machine::run(&code, &exit, contract, CAVE, &mut Arena::default())
        .expect("the thunk is followed");
    let lookup = Lookup {
        // A byte more, for a fault that reads on.
        place: (TABLE, TABLE + table.len() as u64 + 1),
        covers: (LOW, LOW + u64::from(LEN)),
        members: &members,
    };
    judge(&tree, &code, &[lookup])
}

#[test]
fn a_thunk_that_asks_all_parts_is_proved() {
    let proved = judged(Fault::None, |tree, code, tables| tree.prove(code, tables));
    assert_eq!(proved, Ok(BTreeSet::from([0])));
}

#[test]
fn one_fault_each_is_found() {
    for fault in [
        Fault::Start,
        Fault::Shift,
        Fault::Even,
        Fault::Other,
        Fault::High,
        Fault::Part,
        Fault::Turned,
    ] {
        let proved = judged(fault, |tree, code, tables| tree.prove(code, tables).is_ok());
        assert!(!proved, "fault {}", fault as u8);
    }
}

#[test]
fn what_bytes_tell_is_what_every_address_comes_to() {
    let (mut told, span) = (0, (LOW, LOW + u64::from(LEN) - 1));
    for fault in [
        Fault::None,
        Fault::Start,
        Fault::Shift,
        Fault::Even,
        Fault::Other,
        Fault::High,
        Fault::Part,
        Fault::Turned,
    ] {
        judged(fault, |tree, code, tables| {
            let mut seen = BTreeSet::new();
            let every = tree
                .evaluate(code, tables, span.0, span.1, &mut seen)
                .unwrap();
            if let Some(concerned) = tree.concerned(code, tables, span, false) {
                let concerned = concerned.unwrap();
                assert!(concerned.len() < 1000, "{}", concerned.len());
                let some = tree
                    .evaluate_each(code, tables, &concerned, &mut seen)
                    .unwrap();
                assert_eq!(some.passed, every.passed, "fault {}", fault as u8);
                told += 1;
            }
        });
    }
    assert!(told >= 5, "{told} kinds of thunk are told");
}
