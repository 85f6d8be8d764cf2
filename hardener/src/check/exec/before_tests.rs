//! Thunks that ask no table: what constants tell is what following every address comes to.

use super::machine::{Code, Contract, Exit, Machine};
use super::term::Arena;
use super::tree::Tree;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::collections::BTreeSet;

const CAVE: u64 = 0xffff_ffff_81a1_9000;
const TAIL: u64 = CAVE + 0x800;
/// The thunk to which subjects are left.
const OTHER: u64 = CAVE + 0x900;
const LOW: u64 = 0xffff_ffff_8100_0000;
const LEN: u64 = 0x3123;
/// The one subject that a constant lets through.
const SPECIAL: u64 = 0x123;

/// What it does with subjects before which a call's first byte stands.
#[derive(Clone, Copy, PartialEq)]
enum Calls {
    Stop,
    Pass,
    LeaveToOther,
}

fn thunk(calls: Calls) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut pass, mut other) = (a.create_label(), a.create_label());
    a.mov(r11, qword_ptr(rsp))?;
    a.sub(r11, LOW as i32)?;
    a.cmp(r11, LEN as i32)?;
    a.jae(pass)?;
    a.cmp(r11d, SPECIAL as i32)?;
    a.je(pass)?;
    a.mov(r11, qword_ptr(rsp))?;
    a.cmp(byte_ptr(r11 - 5), 0xcc)?;
    a.je(other)?;
    a.cmp(byte_ptr(r11 - 5), 0xe8)?;
    match calls {
        Calls::Stop => {}
        Calls::Pass => a.je(pass)?,
        Calls::LeaveToOther => a.je(other)?,
    }
    a.out(0xe5, al)?;
    a.ud2()?;
    a.set_label(&mut pass)?;
    a.jmp(TAIL)?;
    a.set_label(&mut other)?;
    a.jmp(OTHER)?;
    a.assemble(CAVE)
}

fn judged(calls: Calls, judge: impl FnOnce(&Tree, &Code<'_>)) {
    let thunk = thunk(calls).expect("the thunk assembles");
    let mut bytes = vec![0xcc; 0x1000];
    bytes[..thunk.len()].copy_from_slice(&thunk);
    let text = (0..LEN).map(|at| match (at % 7, at % 11) {
        (0, _) => 0xcc,
        (_, 0) => 0xe8,
        _ => 0x90,
    });
    let text: Vec<u8> = text.collect();
    let code = Code {
        text: (LOW, &text),
        start: CAVE,
        bytes: &bytes,
        executable: (CAVE, CAVE + 0x1000),
    };
    let exit = |at| match at {
        TAIL => Some(Exit::Return),
        OTHER => Some(Exit::Thunk),
        _ => None,
    };
    let contract = Contract {
        target: None,
        scratch: 1 << 10 | 1 << 11,
        flags: true,
        cleared: 0,
        plain: false,
    };
    let (tree, _) = Machine::run(&code, &exit, contract, CAVE, &mut Arena::default())
        .expect("the thunk is followed");
    judge(&tree, &code);
}

#[test]
fn what_constants_tell_is_what_every_address_comes_to() {
    let (low, high) = (LOW, LOW + LEN - 1);
    for calls in [Calls::Stop, Calls::Pass, Calls::LeaveToOther] {
        judged(calls, |tree, code| {
            let mut seen = BTreeSet::new();
            let every = tree.evaluate(code, &[], low, high, &mut seen).unwrap();
            let told = tree.concerned(code, &[], (low, high), true);
            let told = told.expect("it asks by constants").unwrap();
            let some = tree.evaluate_each(code, &[], &told, &mut seen).unwrap();
            assert_eq!(some.passed, every.passed, "kind {}", calls as u8);
            match calls {
                Calls::Pass => assert!(every.passed.len() > 900, "{}", every.passed.len()),
                _ => assert_eq!((every.passed, told.len()), (vec![LOW + SPECIAL], 1)),
            }
            assert!(every.handed_over.len() > 1000);
            let alone = tree.concerned(code, &[], (low, high), false);
            assert!(alone.is_none(), "it leaves subjects to another");
        });
    }
}
