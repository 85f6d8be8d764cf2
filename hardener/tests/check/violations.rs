//! Faults in what thunks do about values that they do not accept, and in what the manifest says about that.

use crate::cases::{Case, case};
use crate::scene::{Scene, branch};
use hardener::check::Rule;
use iced_x86::{Code, Instruction, Mnemonic};
use penumbra_bundle::{LinkVa, Offending, ViolationAction};

/// In a bundle whose thunks kill.
pub const KILL: &[Case] = &[
    case(
        Rule::ThunkContract,
        "a trap left out of the manifest",
        "a report that the manifest lacks",
        |scene| Some(scene.bundle.manifest.cave.traps.remove(3).at),
    ),
    case(
        Rule::ThunkContract,
        "a trap where there is none",
        "the manifest's trap is no `out`",
        |scene| {
            let trap = scene.trap("return_cfi");
            trap.at.0 -= 2;
            Some(trap.at)
        },
    ),
    case(
        Rule::ThunkContract,
        "a trap said to log",
        "the manifest's trap is to log, the thunk does kill",
        |scene| {
            let trap = scene.trap("return_cfi");
            trap.action = ViolationAction::Log;
            Some(trap.at)
        },
    ),
    case(
        Rule::ThunkContract,
        "a trap about another register",
        "about Register(1), it is about Register(0)",
        |scene| {
            let trap = scene.trap("forward_cfi_rax");
            trap.offending = Offending::Register(1);
            Some(trap.at)
        },
    ),
    case(
        Rule::ThunkContract,
        "a trap about another word of the stack",
        "about Stack(1), it is about Stack(0)",
        |scene| {
            let trap = scene.trap("return_cfi_saving");
            trap.offending = Offending::Stack(1);
            Some(trap.at)
        },
    ),
    case(
        Rule::ThunkContract,
        "a trap of another pass",
        "for pass forward-cfi, it is for return-cfi",
        |scene| {
            let trap = scene.trap("return_cfi");
            trap.pass = "forward-cfi".to_owned();
            Some(trap.at)
        },
    ),
    case(
        Rule::ThunkContract,
        "a pass said to log",
        "pass return-cfi says on-violation `log`, its thunks do `kill`",
        |scene| {
            let parameters = &mut scene.bundle.manifest.variants[2].passes[0].parameters;
            parameters.insert("on-violation".to_owned(), "log".to_owned());
            None
        },
    ),
    case(
        Rule::ThunkContract,
        "a parameter made up",
        "pass forward-cfi says `level`, which no rule proves",
        |scene| {
            let parameters = &mut scene.bundle.manifest.variants[2].passes[1].parameters;
            parameters.insert("level".to_owned(), "9".to_owned());
            None
        },
    ),
    case(
        Rule::ThunkContract,
        "a report that is not fatal before a kill",
        "ends the task after a report that says it goes on",
        |scene| {
            port(scene, "return_cfi", 0xe4);
            Some(LinkVa(scene.trap("return_cfi").at.0 + 2))
        },
    ),
    case(
        Rule::ThunkContract,
        "a kill without a report",
        "ends the task without a report",
        |scene| {
            let thunk = scene.named("return_cfi");
            let out = scene.patch(thunk, |instruction, _| {
                (instruction.mnemonic() == Mnemonic::Out).then(|| vec![0x66, 0x90])
            });
            Some(LinkVa(out.0 + 2))
        },
    ),
    case(
        Rule::ThunkContract,
        "a report before r10 is restored",
        "is reached with r11 changed",
        |scene| {
            let thunk = scene.named("return_cfi_saving");
            patch_last(scene, thunk, |_, bytes| {
                // pop %r10 becomes pop %r11.
                (bytes == [0x41, 0x5a]).then(|| vec![0x41, 0x5b])
            });
            Some(scene.trap("return_cfi_saving").at)
        },
    ),
];

/// The hook before a module is freed.
pub const MODULE_FREE: &[Case] = &[
    case(
        Rule::ThunkContract,
        "a freed module reported to another port",
        "goes to no thunk that reports a freed module and calls on",
        |scene| {
            port(scene, "module_free", 0xe4);
            None
        },
    ),
    case(
        Rule::ThunkContract,
        "a hook that does not call on",
        "goes to no thunk that reports a freed module and calls on",
        |scene| {
            let (thunk, other) = (scene.named("module_free"), scene.symbol("commit_creds"));
            scene.patch(thunk, |instruction, _| {
                (instruction.code() == Code::Jmp_rel32_64)
                    .then(|| branch(&[0xe9], LinkVa(instruction.ip()), other))
            });
            None
        },
    ),
    case(
        Rule::ThunkContract,
        "a hook that goes to another thunk",
        "goes to no thunk that reports a freed module and calls on",
        |scene| {
            let thunk = scene.named("return_cfi");
            let start = scene.bundle.manifest.text.start.0;
            let edit = &mut scene.edits("stock")[0];
            edit.bytes = branch(&[0xe8], LinkVa(start + u64::from(edit.at.0)), thunk);
            None
        },
    ),
    case(
        Rule::SameBoundaries,
        "a hook that jumps",
        "where ModuleFree(",
        |scene| {
            scene.edits("stock")[0].bytes[0] = 0xe9;
            None
        },
    ),
];

/// In a bundle whose return thunks log and whose forward thunks panic.
pub const LOG_AND_PANIC: &[Case] = &[
    case(
        Rule::ThunkContract,
        "a thunk that logs and then decides again",
        "which decides after a report",
        |scene| {
            let (thunk, trap) = (
                scene.named("return_cfi_saving"),
                scene.trap("return_cfi_saving").at,
            );
            // The short jump back to the return tail goes to the thunk's start.
            let jump = scene.cave(LinkVa(trap.0 + 2), 2);
            jump[1] = (thunk.0 as i64 - trap.0 as i64 - 4) as u8;
            None
        },
    ),
    case(
        Rule::ThunkContract,
        "a trap said to kill",
        "the manifest's trap is to kill, the thunk does log",
        |scene| {
            let trap = scene.trap("return_cfi");
            trap.action = ViolationAction::Kill;
            Some(trap.at)
        },
    ),
    case(
        Rule::ThunkContract,
        "another function in the place of panic",
        "which is reached but is no thunk",
        |scene| {
            let thunk = scene.named("forward_cfi_rax");
            let (panic, other) = (scene.symbol("panic"), scene.symbol("commit_creds"));
            scene.patch(thunk, |instruction, _| {
                (instruction.near_branch_target() == panic.0)
                    .then(|| branch(&[0xe9], LinkVa(instruction.ip()), other))
            });
            Some(other)
        },
    ),
    case(
        Rule::ThunkContract,
        "a message that is a format",
        "no plain text in the cave",
        |scene| {
            let message = scene.named("forward_cfi_message");
            scene.cave(message, 1)[0] = b'%';
            Some(scene.trap("forward_cfi_rax").at)
        },
    ),
    case(
        Rule::ThunkContract,
        "a message without an end",
        "no plain text in the cave",
        |scene| {
            let message = scene.named("forward_cfi_message");
            let text = scene.cave(message, 64);
            let end = text
                .iter()
                .position(|byte| *byte == 0)
                .unwrap_or(text.len() - 1);
            text[end..].fill(b'x');
            Some(scene.trap("forward_cfi_rax").at)
        },
    ),
    case(
        Rule::ThunkContract,
        "a message in a table",
        "whose message",
        |scene| {
            let table = scene.bundle.manifest.cave.tables[0].range.start;
            let thunk = scene.named("forward_cfi_rax");
            scene.patch(thunk, |instruction, bytes| {
                (instruction.code() == Code::Mov_rm64_imm32)
                    .then(|| [&bytes[..3], &(table.0 as u32).to_le_bytes()].concat())
            });
            Some(scene.trap("forward_cfi_rax").at)
        },
    ),
];

/// Another port in the report of a thunk; where that is.
fn port(scene: &mut Scene, thunk: &str, port: u8) -> LinkVa {
    let thunk = scene.named(thunk);
    scene.patch(thunk, |instruction, _| {
        (instruction.mnemonic() == Mnemonic::Out).then(|| vec![0xe6, port])
    })
}

/// Like [`Scene::patch`], but in the second of two places: a thunk restores first where it goes on, then where it reports.
fn patch_last(
    scene: &mut Scene,
    thunk: LinkVa,
    with: impl Fn(&Instruction, &[u8]) -> Option<Vec<u8>>,
) {
    // Finds the first place without changing it, then patches from behind it.
    let at = scene.patch(thunk, |instruction, bytes| {
        with(instruction, bytes).map(|_| bytes.to_vec())
    });
    let len = scene.instruction(at).len() as u64;
    scene.patch(LinkVa(at.0 + len), with);
}
