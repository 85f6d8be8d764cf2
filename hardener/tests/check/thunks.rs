//! Faults of thunks.

use crate::cases::{Case, case, is_call, is_return};
use crate::scene::{Scene, branch, target};
use hardener::check::Rule;
use iced_x86::{Code, Mnemonic, Register};
use penumbra_bundle::{Edit, LinkVa, RelocKind};

/// Thunks: invariant 4.
pub const THUNKS: &[Case] = &[
    case(
        Rule::ThunkContract,
        "a saving thunk that loses rbx",
        "with rbx changed",
        |scene| {
            let thunk = scene.named("return_cfi_saving");
            scene.patch(thunk, |_, bytes| {
                (bytes == [0x41, 0x5a]).then(|| vec![0x5b, 0x90])
            });
            Some(tail(scene, thunk))
        },
    ),
    case(
        Rule::ThunkContract,
        "a saving thunk that forgets a pop",
        "with rsp off by -8",
        |scene| {
            let thunk = scene.named("return_cfi_saving");
            scene.patch(thunk, |_, bytes| {
                (bytes == [0x41, 0x5b]).then(|| vec![0x66, 0x90])
            });
            Some(tail(scene, thunk))
        },
    ),
    case(
        Rule::ThunkContract,
        "a saving thunk that loses the flags",
        "changed",
        |scene| {
            let thunk = scene.named("return_cfi_saving");
            scene.patch(thunk, |_, bytes| (bytes == [0x9d]).then(|| vec![0x58]));
            Some(tail(scene, thunk))
        },
    ),
    case(
        Rule::ThunkContract,
        "a thunk without saving where registers must be kept",
        "changed; 1 slots use it",
        |scene| {
            let (free, saving) = (scene.named("return_cfi"), scene.named("return_cfi_saving"));
            let start = scene.bundle.manifest.text.start.0;
            let saves = |edit: &Edit| target(&edit.bytes, start + u64::from(edit.at.0)) == saving;
            scene.change("hardened", saves, |edit| {
                let at = LinkVa(start + u64::from(edit.at.0));
                edit.bytes = branch(&[0xe9], at, free);
            });
            Some(tail(scene, free))
        },
    ),
    case(
        Rule::ThunkContract,
        "a return that goes to an indirect branch's thunk",
        "decides by something other than the checked address; 1 slots use it",
        |scene| {
            let thunk = scene.named("forward_cfi_rax");
            let start = scene.bundle.manifest.text.start.0;
            scene.change("hardened", is_return, |edit| {
                edit.bytes = branch(&[0xe9], LinkVa(start + u64::from(edit.at.0)), thunk);
            });
            None
        },
    ),
    case(
        Rule::ThunkContract,
        "a slot for rax that goes to the thunk for rcx",
        "decides by something other than the checked address; 1 slots use it",
        |scene| {
            let (rax, rcx) = (
                scene.named("forward_cfi_rax"),
                scene.named("forward_cfi_rcx"),
            );
            let start = scene.bundle.manifest.text.start.0;
            let goes = |edit: &Edit| target(&edit.bytes, start + u64::from(edit.at.0)) == rax;
            scene.change(
                "hardened",
                |edit| is_call(edit) && goes(edit),
                |edit| {
                    edit.bytes = branch(&[0xe8], LinkVa(start + u64::from(edit.at.0)), rcx);
                },
            );
            None
        },
    ),
    case(
        Rule::ThunkContract,
        "a thunk that leaves through another register's retpoline",
        "ends a thunk by a jump to *%rcx; its slots do a jump to *%rax",
        |scene| {
            let thunk = scene.named("forward_cfi_rax");
            let (rax, rcx) = (
                scene.symbol("__x86_indirect_thunk_rax"),
                scene.symbol("__x86_indirect_thunk_rcx"),
            );
            scene.patch(thunk, |instruction, _| {
                (instruction.code() == Code::Jmp_rel32_64
                    && instruction.near_branch_target() == rax.0)
                    .then(|| branch(&[0xe9], LinkVa(instruction.ip()), rcx))
            });
            Some(rcx)
        },
    ),
    case(
        Rule::ThunkContract,
        "a thunk that passes when the bit is clear",
        "passes 0x",
        |scene| {
            let thunk = scene.named("return_cfi");
            scene.patch(thunk, |instruction, bytes| {
                (instruction.mnemonic() == Mnemonic::Jb).then(|| flip_condition(bytes))
            });
            Some(thunk)
        },
    ),
    case(
        Rule::ThunkContract,
        "a thunk whose range check is turned around",
        "",
        |scene| {
            let thunk = scene.named("return_cfi");
            scene.patch(thunk, |instruction, bytes| {
                (instruction.mnemonic() == Mnemonic::Jae).then(|| flip_condition(bytes))
            });
            Some(thunk)
        },
    ),
    case(
        Rule::ThunkContract,
        "a thunk that lets the last page pass unseen",
        "passes 0x",
        |scene| {
            let thunk = scene.named("return_cfi");
            let text = scene.text();
            scene.patch(thunk, |instruction, bytes| {
                let whole = instruction.mnemonic() == Mnemonic::Cmp
                    && instruction.op1_kind() == iced_x86::OpKind::Immediate32to64
                    && instruction.immediate(1) == text.len();
                whole.then(|| shorter(bytes, text.len() as u32 - 0x1000))
            });
            Some(thunk)
        },
    ),
    case(
        Rule::ThunkContract,
        "a forward thunk that changes its target",
        "decides by something other than the checked address",
        |scene| {
            let thunk = scene.named("forward_cfi_rax");
            // The first copy of the target into a scratch register becomes a copy into the target.
            scene.patch(thunk, |instruction, bytes| {
                let copy = instruction.mnemonic() == Mnemonic::Mov
                    && instruction.op0_register() == Register::R11
                    && instruction.op1_register() == Register::RAX;
                // mov %rax,%r11 is 49 89 c3 or 4c 8b d8; mov %r11,%rax is 4c 89 d8.
                copy.then(|| {
                    assert_eq!(bytes.len(), 3);
                    vec![0x4c, 0x89, 0xd8]
                })
            });
            None
        },
    ),
    case(
        Rule::ThunkContract,
        "a return tail left out of the manifest",
        "a return tail that the manifest lacks",
        |scene| Some(scene.bundle.manifest.cave.return_tails.remove(0)),
    ),
    case(
        Rule::ThunkContract,
        "a return tail where there is none",
        "is no jump to __x86_return_thunk",
        |scene| {
            let thunk = scene.named("return_cfi");
            let tails = &mut scene.bundle.manifest.cave.return_tails;
            tails.push(thunk);
            tails.sort();
            Some(thunk)
        },
    ),
    case(
        Rule::ThunkContract,
        "a relocation left out",
        "an absolute address without relocation",
        |scene| {
            let place = scene.bundle.cave_relocs().nth(3);
            scene.bundle.relocs.remove(3);
            place.map(|(at, _)| at)
        },
    ),
    case(
        Rule::ThunkContract,
        "a relocation of something else",
        "relocated but no absolute address",
        |scene| {
            scene.bundle.relocs[3].at.0 += 1;
            scene.bundle.cave_relocs().nth(3).map(|(at, _)| at)
        },
    ),
    case(
        Rule::ThunkContract,
        "a relocation of another width",
        "an absolute address without relocation",
        |scene| {
            scene.bundle.relocs[3].kind = RelocKind::Abs64;
            scene.bundle.cave_relocs().nth(3).map(|(at, _)| at)
        },
    ),
];

/// The first return tail at or after `thunk`.
fn tail(scene: &Scene, thunk: LinkVa) -> LinkVa {
    let tails = &scene.bundle.manifest.cave.return_tails;
    *tails
        .iter()
        .find(|tail| **tail >= thunk)
        .expect("a return tail")
}

/// The opposite of a conditional jump: the lowest bit of its opcode (SDM volume 2A, Jcc).
fn flip_condition(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let opcode = usize::from(bytes[0] == 0x0f);
    bytes[opcode] ^= 1;
    bytes
}

/// The same instruction with another 32-bit immediate at its end.
fn shorter(bytes: &[u8], immediate: u32) -> Vec<u8> {
    let (head, _) = bytes.split_at(bytes.len() - 4);
    [head, &immediate.to_le_bytes()].concat()
}
