//! Thunks that are right, and thunks that are wrong in one way each.

use super::machine::{Code, Contract, Exit, Machine};
use super::term::Arena;
use super::tree::{Lookup, Wrong};
use iced_x86::code_asm::*;

/// Where the cave of these tests stands: thunks, then a page of table.
const CAVE: u64 = 0xffff_ffff_81a1_9000;
const TABLE: u64 = CAVE + 0x1000;
/// What the table covers: one bit a byte.
const LOW: u64 = 0xffff_ffff_8100_0000;
const SIZE: u64 = 0x4000;
const RETPOLINE_RAX: u64 = 0xffff_ffff_81e0_1740;
const RETPOLINE_RCX: u64 = RETPOLINE_RAX + 0x20;
/// The only return tail.
const TAIL: u64 = CAVE + 0x800;

const FREE: Contract = Contract {
    target: None,
    scratch: 1 << 10 | 1 << 11,
    flags: true,
    cleared: 0,
    plain: false,
};
const STRICT: Contract = Contract {
    target: None,
    scratch: 0,
    flags: false,
    cleared: 0,
    plain: false,
};
const RAX: Contract = Contract {
    target: Some(0),
    scratch: 1 << 11,
    flags: true,
    cleared: 0,
    plain: false,
};

/// Nothing was saved.
const NOTHING: Write = |_| Ok(());
/// Flags, r10 and r11 were saved, in that order.
const RESTORE: Write = |a| {
    a.pop(r11)?;
    a.pop(r10)?;
    a.popfq()
};
/// The kernel's panic, and a message in the cave.
const PANIC: u64 = RETPOLINE_RAX + 0x1000;
const MESSAGE: u64 = CAVE + 0x1f00;

const MEMBERS: [u64; 4] = [LOW, LOW + 5, LOW + 0x1007, LOW + SIZE - 1];

/// What the checker says about a thunk.
fn judge(
    contract: Contract,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> String {
    let mut assembler = CodeAssembler::new(64).expect("64 is a bitness");
    write(&mut assembler).expect("the thunk assembles");
    let thunk = assembler.assemble(CAVE).expect("the thunk assembles");
    let mut bytes = vec![0xcc; 0x2000];
    bytes[..thunk.len()].copy_from_slice(&thunk);
    bytes[0x1000..0x1000 + SIZE as usize / 8].fill(0);
    for member in MEMBERS {
        let bit = (member - LOW) as usize;
        bytes[0x1000 + bit / 8] |= 1 << (bit % 8);
    }
    let code = Code {
        text: (0, &[]),
        start: CAVE,
        bytes: &bytes,
        executable: (CAVE, CAVE + 0x1000),
    };
    let exit = |at| match at {
        TAIL => Some(Exit::Return),
        RETPOLINE_RAX => Some(Exit::Indirect(0)),
        RETPOLINE_RCX => Some(Exit::Indirect(1)),
        PANIC => Some(Exit::Panic),
        _ => None,
    };
    let table = Lookup {
        place: (TABLE, TABLE + SIZE / 8),
        covers: (LOW, LOW + SIZE),
        members: &MEMBERS,
    };
    match Machine::run(&code, &exit, contract, CAVE, &mut Arena::default()) {
        Err(fault) => fault.what,
        Ok((tree, reports)) => match tree.prove(&code, &[table]) {
            Ok(_) => {
                let actions: Vec<&str> = reports.values().map(|one| one.action.name()).collect();
                match actions[..] {
                    ["kill"] => "proved".to_owned(),
                    _ => format!("proved, {}", actions.join(" ")),
                }
            }
            Err(Wrong::Passes(at)) => format!("passes +{:#x}", at.wrapping_sub(LOW)),
            Err(Wrong::Traps(at)) => format!("traps +{:#x}", at.wrapping_sub(LOW)),
            Err(Wrong::Outside(at)) => format!("outside +{:#x}", at.wrapping_sub(LOW)),
            Err(Wrong::NotATable(at, _)) => {
                format!("reads past the table for +{:#x}", at.wrapping_sub(LOW))
            }
            Err(wrong) => format!("{wrong:?}"),
        },
    }
}

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// The check of a return address, in r10 and r11; `limit` is the first offset that passes unseen, `undo` restores what was
/// saved before a report.
fn check(
    a: &mut CodeAssembler,
    depth: i32,
    limit: i32,
    undo: Write,
) -> Result<CodeLabel, IcedError> {
    let mut pass = a.create_label();
    let mut trap = a.create_label();
    a.mov(r10, qword_ptr(rsp + depth))?;
    a.sub(r10, LOW as i32)?;
    a.cmp(r10, limit)?;
    a.jae(pass)?;
    a.mov(r11d, r10d)?;
    a.shr(r11d, 3)?;
    a.movzx(r11d, byte_ptr(r11 + TABLE as i32))?;
    a.and(r10d, 7)?;
    a.bt(r11d, r10d)?;
    a.jnc(trap)?;
    let mut skip = a.create_label();
    a.jmp(skip)?;
    a.set_label(&mut trap)?;
    undo(a)?;
    a.out(0xe5, al)?;
    a.ud2()?;
    a.set_label(&mut pass)?;
    a.nop()?;
    a.set_label(&mut skip)?;
    a.nop()?;
    Ok(skip)
}

#[test]
fn a_return_thunk_with_free_registers_is_proved() {
    let verdict = judge(FREE, |a| {
        check(a, 0, SIZE as i32, NOTHING)?;
        a.jmp(TAIL)
    });
    assert_eq!(verdict, "proved");
}

#[test]
fn a_bit_string_test_is_proved() {
    let verdict = judge(FREE, |a| {
        let mut trap = a.create_label();
        a.mov(r11, qword_ptr(rsp))?;
        a.lea(r10, qword_ptr(TABLE))?;
        a.sub(r11, LOW as i32)?;
        a.cmp(r11, SIZE as i32 - 1)?;
        a.ja(TAIL)?;
        a.bt(qword_ptr(r10), r11)?;
        a.jae(trap)?;
        a.jmp(TAIL)?;
        a.set_label(&mut trap)?;
        a.out(0xe5, al)?;
        a.ud2()
    });
    assert_eq!(verdict, "proved");
}

#[test]
fn a_thunk_that_saves_everything_is_proved() {
    let verdict = judge(STRICT, |a| {
        a.pushfq()?;
        a.push(r10)?;
        a.push(r11)?;
        check(a, 24, SIZE as i32, RESTORE)?;
        a.pop(r11)?;
        a.pop(r10)?;
        a.popfq()?;
        a.jmp(TAIL)
    });
    assert_eq!(verdict, "proved");
}

/// The ways of getting the saving thunk wrong.
#[test]
fn saving_thunks_with_one_fault() {
    let cases: [(&str, Write, &str); 9] = [
        (
            "forgets to restore r11",
            |a| {
                a.pushfq()?;
                a.push(r10)?;
                check(a, 16, SIZE as i32, |a| {
                    a.pop(r10)?;
                    a.popfq()
                })?;
                a.pop(r10)?;
                a.popfq()?;
                a.jmp(TAIL)
            },
            "is reached with r11 changed",
        ),
        (
            "forgets the flags",
            |a| {
                a.push(r10)?;
                a.push(r11)?;
                check(a, 16, SIZE as i32, |a| {
                    a.pop(r11)?;
                    a.pop(r10)
                })?;
                a.pop(r11)?;
                a.pop(r10)?;
                a.jmp(TAIL)
            },
            "is reached with CF changed",
        ),
        (
            "swaps what it restores",
            |a| {
                a.pushfq()?;
                a.push(r10)?;
                a.push(r11)?;
                check(a, 24, SIZE as i32, RESTORE)?;
                a.pop(r10)?;
                a.pop(r11)?;
                a.popfq()?;
                a.jmp(TAIL)
            },
            "is reached with r10 changed",
        ),
        (
            "forgets a pop",
            |a| {
                a.pushfq()?;
                a.push(r10)?;
                a.push(r11)?;
                check(a, 24, SIZE as i32, RESTORE)?;
                a.pop(r11)?;
                a.pop(r10)?;
                a.jmp(TAIL)
            },
            "is reached with rsp off by -8",
        ),
        (
            "clobbers rbx",
            |a| {
                a.xor(ebx, ebx)?;
                a.jmp(TAIL)
            },
            "is reached with rbx changed",
        ),
        (
            "saves below rsp",
            |a| {
                a.mov(qword_ptr(rsp - 8), r10)?;
                a.jmp(TAIL)
            },
            "writes below rsp, where an interrupt overwrites it",
        ),
        (
            "overwrites the return address",
            |a| {
                a.mov(qword_ptr(rsp), r10)?;
                a.jmp(TAIL)
            },
            "writes memory that is not its own",
        ),
        (
            "decides by a register",
            |a| {
                a.test(rax, rax)?;
                a.je(TAIL)?;
                a.out(0xe5, al)?;
                a.ud2()
            },
            "decides by something other than the checked address",
        ),
        (
            "runs for ever",
            |a| {
                let mut top = a.create_label();
                a.set_label(&mut top)?;
                a.nop()?;
                a.jmp(top)
            },
            "is reached by a path without end",
        ),
    ];
    for (name, write, verdict) in cases {
        assert_eq!(judge(STRICT, write), verdict, "a thunk that {name}");
    }
}

/// The ways of getting the check wrong.
#[test]
fn checks_with_one_fault() {
    let cases: [(&str, Write, &str); 7] = [
        (
            "compares with one byte too few",
            |a| {
                check(a, 0, SIZE as i32 - 8, NOTHING)?;
                a.jmp(TAIL)
            },
            "passes +0x3ff8",
        ),
        (
            "compares with one byte too many",
            |a| {
                check(a, 0, SIZE as i32 + 8, NOTHING)?;
                a.jmp(TAIL)
            },
            "reads past the table for +0x4000",
        ),
        ("looks nowhere", |a| a.jmp(TAIL), "NoTable"),
        (
            "compares 32 bits only",
            |a| {
                a.mov(r10, qword_ptr(rsp))?;
                a.sub(r10d, LOW as i32)?;
                a.cmp(r10d, SIZE as i32)?;
                a.jae(TAIL)?;
                a.mov(r11d, r10d)?;
                a.shr(r11d, 3)?;
                a.movzx(r11d, byte_ptr(r11 + TABLE as i32))?;
                a.and(r10d, 7)?;
                a.bt(r11d, r10d)?;
                a.jc(TAIL)?;
                a.out(0xe5, al)?;
                a.ud2()
            },
            "Unbounded(0)",
        ),
        (
            "turns the bit around",
            |a| {
                a.mov(r10, qword_ptr(rsp))?;
                a.sub(r10, LOW as i32)?;
                a.cmp(r10, SIZE as i32)?;
                a.jae(TAIL)?;
                a.bt(qword_ptr(TABLE), r10)?;
                a.jnc(TAIL)?;
                a.out(0xe5, al)?;
                a.ud2()
            },
            "traps +0x0",
        ),
        (
            "turns the comparison around",
            |a| {
                a.mov(r10, qword_ptr(rsp))?;
                a.sub(r10, LOW as i32)?;
                a.cmp(r10, SIZE as i32)?;
                a.jb(TAIL)?;
                a.bt(qword_ptr(TABLE), r10)?;
                a.jc(TAIL)?;
                a.out(0xe5, al)?;
                a.ud2()
            },
            "Unbounded(0)",
        ),
        (
            "forgets the low bits",
            |a| {
                a.mov(r10, qword_ptr(rsp))?;
                a.sub(r10, LOW as i32)?;
                a.cmp(r10, SIZE as i32)?;
                a.jae(TAIL)?;
                a.and(r10, -16)?;
                a.bt(qword_ptr(TABLE), r10)?;
                a.jc(TAIL)?;
                a.out(0xe5, al)?;
                a.ud2()
            },
            "passes +0x1",
        ),
    ];
    for (name, write, verdict) in cases {
        assert_eq!(judge(FREE, write), verdict, "a thunk that {name}");
    }
}

fn forward(a: &mut CodeAssembler, to: u64) -> Result<(), IcedError> {
    a.mov(r11, rax)?;
    a.sub(r11, LOW as i32)?;
    a.cmp(r11, SIZE as i32)?;
    a.jae(to)?;
    a.bt(qword_ptr(TABLE), r11)?;
    a.jc(to)?;
    a.out(0xe5, al)?;
    a.ud2()
}

#[test]
fn a_forward_thunk_leaves_through_its_own_register() {
    assert_eq!(judge(RAX, |a| forward(a, RETPOLINE_RAX)), "proved");
    assert_eq!(
        judge(RAX, |a| forward(a, RETPOLINE_RCX)),
        "ends a thunk by a jump to *%rcx; its slots do a jump to *%rax"
    );
    assert_eq!(
        judge(RAX, |a| forward(a, TAIL)),
        "ends a thunk by a return; its slots do a jump to *%rax"
    );
}

#[test]
fn a_forward_thunk_must_not_change_its_target() {
    let verdict = judge(RAX, |a| {
        a.mov(r11, rax)?;
        a.add(rax, 1)?;
        a.jmp(RETPOLINE_RAX)
    });
    assert_eq!(verdict, "is reached with rax changed");
}

/// A return that clears rcx and rsi.
const CLEARING: Contract = Contract {
    target: None,
    scratch: 1 << 10 | 1 << 11,
    flags: true,
    cleared: 1 << 1 | 1 << 6,
    plain: false,
};

#[test]
fn a_return_clears_all_that_it_has_to_and_no_more() {
    let clear = |registers: &'static [AsmRegister32]| {
        judge(CLEARING, move |a| {
            check(a, 0, SIZE as i32, NOTHING)?;
            for register in registers {
                a.xor(*register, *register)?;
            }
            a.jmp(TAIL)
        })
    };
    assert_eq!(clear(&[ecx]), "is reached with rsi not cleared");
    assert_eq!(clear(&[ecx, esi, eax]), "is reached with rax changed");
    assert_eq!(clear(&[ecx, esi]), "proved");
}

#[test]
fn a_computed_goto_may_lose_nothing() {
    let inside = Contract {
        target: Some(0),
        scratch: 0,
        flags: false,
        cleared: 0,
        plain: false,
    };
    assert_eq!(
        judge(inside, |a| forward(a, RETPOLINE_RAX)),
        "is reached with r11 changed"
    );
}

/// A thunk that saves everything, and ends with `report` when the address is not in the table.
fn reporting(a: &mut CodeAssembler, report: Write) -> Result<(), IcedError> {
    let mut pass = a.create_label();
    a.pushfq()?;
    a.push(r10)?;
    a.push(r11)?;
    a.mov(r10, qword_ptr(rsp + 24))?;
    a.sub(r10, LOW as i32)?;
    a.cmp(r10, SIZE as i32)?;
    a.jae(pass)?;
    a.bt(qword_ptr(TABLE), r10)?;
    a.jc(pass)?;
    report(a)?;
    a.set_label(&mut pass)?;
    RESTORE(a)?;
    a.jmp(TAIL)
}

/// What follows a report, right and wrong.
#[test]
fn reports() {
    let cases: [(&str, Write, &str); 17] = [
        (
            "kills",
            |a| {
                RESTORE(a)?;
                a.out(0xe5, al)?;
                a.ud2()
            },
            "proved",
        ),
        (
            "logs",
            |a| {
                RESTORE(a)?;
                a.out(0xe4, al)?;
                a.jmp(TAIL)
            },
            "proved, log",
        ),
        (
            "panics",
            |a| {
                RESTORE(a)?;
                a.out(0xe5, al)?;
                a.mov(rdi, MESSAGE as i64)?;
                a.xor(eax, eax)?;
                a.jmp(PANIC)
            },
            "proved, panic",
        ),
        (
            "reports before it restores",
            |a| {
                a.out(0xe5, al)?;
                RESTORE(a)?;
                a.ud2()
            },
            "is reached with rsp off by -24",
        ),
        (
            "restores the stack only",
            |a| {
                a.add(rsp, 24)?;
                a.out(0xe5, al)?;
                a.ud2()
            },
            "is reached with r10 changed",
        ),
        (
            "restores all but the flags",
            |a| {
                a.pop(r11)?;
                a.pop(r10)?;
                a.add(rsp, 8)?;
                a.out(0xe4, al)?;
                a.jmp(TAIL)
            },
            "is reached with CF changed",
        ),
        (
            "loses a register after its report",
            |a| {
                RESTORE(a)?;
                a.out(0xe5, al)?;
                a.xor(eax, eax)?;
                a.ud2()
            },
            "is reached with rax changed",
        ),
        (
            "loses a register and goes on",
            |a| {
                RESTORE(a)?;
                a.out(0xe4, al)?;
                a.mov(rbx, rax)?;
                a.jmp(TAIL)
            },
            "is reached with rbx changed",
        ),
        (
            "kills in silence",
            |a| {
                RESTORE(a)?;
                a.ud2()
            },
            "ends the task without a report",
        ),
        (
            "says that it goes on and does not",
            |a| {
                RESTORE(a)?;
                a.out(0xe4, al)?;
                a.ud2()
            },
            "ends the task after a report that says it goes on",
        ),
        (
            "says that it does not go on and does",
            |a| {
                RESTORE(a)?;
                a.out(0xe5, al)?;
                a.jmp(TAIL)
            },
            "reports that it does not go on, and goes on",
        ),
        (
            "reports twice",
            |a| {
                RESTORE(a)?;
                a.out(0xe4, al)?;
                a.out(0xe4, al)?;
                a.jmp(TAIL)
            },
            "reports a second time",
        ),
        (
            "goes on elsewhere",
            |a| {
                RESTORE(a)?;
                a.out(0xe4, al)?;
                a.jmp(RETPOLINE_RAX)
            },
            "ends a thunk by a jump to *%rax; its slots do a return",
        ),
        (
            "uses another port",
            |a| {
                RESTORE(a)?;
                a.out(0xe3, al)?;
                a.jmp(TAIL)
            },
            "is an instruction that no thunk needs",
        ),
        (
            "panics without a report",
            |a| {
                RESTORE(a)?;
                a.mov(rdi, MESSAGE as i64)?;
                a.xor(eax, eax)?;
                a.jmp(PANIC)
            },
            "is reached without a report that says so",
        ),
        (
            "panics with what the guest chose",
            |a| {
                RESTORE(a)?;
                a.out(0xe5, al)?;
                a.xor(eax, eax)?;
                a.jmp(PANIC)
            },
            "is called without a fixed message",
        ),
        (
            "panics with vector registers",
            |a| {
                RESTORE(a)?;
                a.out(0xe5, al)?;
                a.mov(rdi, MESSAGE as i64)?;
                a.jmp(PANIC)
            },
            "is called with vector registers",
        ),
    ];
    for (name, write, verdict) in cases {
        let said = judge(STRICT, |a| reporting(a, write));
        assert_eq!(said, verdict, "a thunk that {name}");
    }
}
