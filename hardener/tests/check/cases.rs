//! One fault a case: what is broken, which rule must catch it, and what it must say.

use crate::scene::{Scene, branch, target};
use hardener::check::Rule;
use iced_x86::{Code, Mnemonic, Register};
use penumbra_bundle::{Edit, LinkVa, RelocKind, SiteKind, SlotKind, TableKind, TextOff, VaRange};

/// A fault.
pub struct Case {
    /// What is wrong with the bundle.
    pub name: &'static str,
    /// Who must say so.
    pub rule: Rule,
    /// Part of what it must say.
    pub says: &'static str,
    /// Breaks the bundle; the address that the violation must name, if it has one.
    pub fault: fn(&mut Scene) -> Option<LinkVa>,
}

/// A case.
pub const fn case(
    rule: Rule,
    name: &'static str,
    says: &'static str,
    fault: fn(&mut Scene) -> Option<LinkVa>,
) -> Case {
    Case {
        name,
        rule,
        says,
        fault,
    }
}

fn is_return(edit: &Edit) -> bool {
    edit.slot == SlotKind::Return
}

fn is_call(edit: &Edit) -> bool {
    edit.slot == SlotKind::Indirect && edit.bytes[0] == 0xe8
}

fn is_long_call(edit: &Edit) -> bool {
    edit.slot == SlotKind::Indirect && edit.bytes.starts_with(&[0x2e, 0xe8])
}

/// Edits: invariants 1 and 3.
pub const EDITS: &[Case] = &[
    case(
        Rule::SameBoundaries,
        "an edit one byte late",
        "does not start where an instruction starts",
        |scene| {
            let at = scene.change("hardened", is_return, |edit| {
                edit.at = TextOff(edit.at.0 + 1)
            });
            Some(LinkVa(at.0 + 1))
        },
    ),
    case(
        Rule::SameBoundaries,
        "four bytes where five were",
        "replaces an instruction of 5 bytes by 4 bytes",
        |scene| Some(scene.change("hardened", is_return, |edit| edit.bytes.truncate(4))),
    ),
    case(
        Rule::SameBoundaries,
        "two instructions in one slot",
        "is not one whole instruction",
        |scene| {
            Some(scene.change("fast", is_return, |edit| {
                edit.bytes = vec![0x90, 0x90, 0x90, 0x90, 0xc3]
            }))
        },
    ),
    case(
        Rule::SameBoundaries,
        "a call whose return address is one byte early",
        "is not one whole instruction",
        |scene| {
            Some(scene.change("hardened", is_long_call, |edit| {
                edit.bytes.remove(0);
                edit.bytes.push(0x90);
            }))
        },
    ),
    case(
        Rule::SameBoundaries,
        "a jump where a call was",
        "where Call(",
        |scene| Some(scene.change("hardened", is_call, |edit| edit.bytes[0] = 0xe9)),
    ),
    case(
        Rule::SameBoundaries,
        "a call through another register",
        "branches through ",
        |scene| {
            let call = |edit: &Edit| edit.bytes.ends_with(&[0xff, 0xd0]);
            Some(scene.change("fast", call, |edit| *edit.bytes.last_mut().unwrap() = 0xd1))
        },
    ),
    case(
        Rule::SameBoundaries,
        "an operand-size prefix, which Intel and AMD read differently",
        "is not one whole instruction",
        |scene| Some(scene.change("hardened", is_long_call, |edit| edit.bytes[0] = 0x66)),
    ),
    case(
        Rule::SameBoundaries,
        "one slot edited twice",
        "overlaps the edit before",
        |scene| {
            let edits = scene.edits("hardened");
            let edit = edits[1000].clone();
            edits.insert(1000, edit.clone());
            Some(scene.va(edit.at))
        },
    ),
    case(
        Rule::SameBoundaries,
        "a dropped mitigation left unsaid",
        "drops {Retpoline, ReturnThunk}, the manifest says {Retpoline}",
        |scene| {
            let fast = &mut scene.bundle.manifest.variants[1];
            fast.drops
                .retain(|drop| *drop == penumbra_bundle::Mitigation::Retpoline);
            None
        },
    ),
    case(
        Rule::AllowedSlots,
        "a jump label edited",
        "edits a jump label",
        |scene| {
            let at = scene.site(SiteKind::JumpLabel, 5, scene.text());
            Some(scene.add(at, SlotKind::Return))
        },
    ),
    case(
        Rule::AllowedSlots,
        "an ftrace entry edited",
        "edits an ftrace entry",
        |scene| {
            let at = scene.site(SiteKind::Fentry, 5, scene.text());
            Some(scene.add(at, SlotKind::Indirect))
        },
    ),
    case(
        Rule::AllowedSlots,
        "a static call edited",
        "edits a static call",
        |scene| {
            let at = scene.site(SiteKind::StaticCall, 5, scene.text());
            Some(scene.add(at, SlotKind::Return))
        },
    ),
    case(
        Rule::AllowedSlots,
        "a paravirt site edited",
        "edits ",
        |scene| {
            let at = scene.site(SiteKind::Paravirt, 6, scene.text());
            Some(scene.add(at, SlotKind::Return))
        },
    ),
    case(
        Rule::AllowedSlots,
        "a lock prefix edited",
        "edits an SMP lock prefix",
        |scene| {
            let at = scene.site(SiteKind::SmpLock, 1, scene.text());
            Some(scene.add(at, SlotKind::Return))
        },
    ),
    case(
        Rule::AllowedSlots,
        "a return in .noinstr.text edited",
        "edits .noinstr.text",
        |scene| {
            let range = scene.between("__noinstr_text_start", "__noinstr_text_end");
            let at = scene.site(SiteKind::Return, 5, range);
            Some(scene.add(at, SlotKind::Return))
        },
    ),
    case(
        Rule::AllowedSlots,
        "a return in .entry.text edited",
        "edits .entry.text",
        |scene| {
            let range = scene.between("__entry_text_start", "__entry_text_end");
            let at = scene.site(SiteKind::Return, 5, range);
            Some(scene.add(at, SlotKind::Return))
        },
    ),
    case(
        Rule::AllowedSlots,
        "a return in a kernel thunk edited",
        "edits .text..__x86.*",
        |scene| {
            let range = scene.between("__indirect_thunk_start", "__indirect_thunk_end");
            Some(scene.add(range.start, SlotKind::Return))
        },
    ),
    case(
        Rule::AllowedSlots,
        "a return of a function that kprobes must not touch edited",
        "on the kprobe blacklist",
        |scene| {
            // On the blacklist by NOKPROBE_SYMBOL (arch/x86/kernel/kprobes/core.c).
            let start = scene.symbol("kprobe_int3_handler");
            let range = VaRange {
                start,
                end: LinkVa(start.0 + 0x400),
            };
            let at = scene.site(SiteKind::Return, 5, range);
            Some(scene.add(at, SlotKind::Return))
        },
    ),
    case(
        Rule::AllowedSlots,
        "a direct call edited",
        "calls nothing that a variant keeps from being called",
        |scene| Some(scene.change("hardened", is_call, |edit| edit.slot = SlotKind::Call)),
    ),
    case(
        Rule::AllowedSlots,
        "a retpoline site called a return",
        "is not a slot that .return_sites lists",
        |scene| Some(scene.change("hardened", is_call, |edit| edit.slot = SlotKind::Return)),
    ),
    case(
        Rule::AllowedSlots,
        "a return left alone",
        "is a return that is not checked, and nothing forbids to",
        |scene| {
            let edits = scene.edits("hardened");
            let is_return = |edit: &Edit| edit.slot == SlotKind::Return;
            let index = edits.iter().rposition(is_return)?;
            let edit = edits.remove(index);
            Some(scene.va(edit.at))
        },
    ),
];

/// The cave: invariant 2.
pub const CAVE: &[Case] = &[
    case(
        Rule::OneSharedCave,
        "the cave begins in code",
        "the cave holds ",
        |scene| {
            let range = &mut scene.bundle.manifest.cave.range;
            range.start = LinkVa(range.start.0 - 0x2000);
            Some(range.start)
        },
    ),
    case(
        Rule::OneSharedCave,
        "a symbol in the cave",
        "lies in the cave",
        |scene| {
            let start = scene.symbol("__lock_text_end");
            scene.bundle.manifest.cave.range.start = LinkVa(start.0 - 1);
            Some(start)
        },
    ),
    case(
        Rule::OneSharedCave,
        "a table over another",
        "overlaps `return_targets`",
        |scene| {
            let tables = &mut scene.bundle.manifest.cave.tables;
            tables[1].range.start = tables[0].range.start;
            Some(tables[0].range.start)
        },
    ),
    case(
        Rule::OneSharedCave,
        "thunks behind the cave's end",
        "leaves the cave",
        |scene| {
            let thunks = scene.named("return_cfi");
            let range = &mut scene.bundle.manifest.cave.range;
            range.end = thunks;
            Some(range.start)
        },
    ),
    case(
        Rule::OneSharedCave,
        "an edit in the cave",
        "edits the cave",
        |scene| {
            let start = scene.bundle.manifest.cave.range.start;
            Some(scene.add(start, SlotKind::Return))
        },
    ),
];

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

/// Tables: exactly the legal sets.
pub const TABLES: &[Case] = &[
    case(
        Rule::ExactSets,
        "a return site taken out of the bitmap",
        "missing from return_targets",
        |scene| Some(drop_bit(scene, "return_targets")),
    ),
    case(
        Rule::ExactSets,
        "an address that follows no call added to the bitmap",
        "too many in return_targets",
        |scene| Some(set_bit(scene, "return_targets")),
    ),
    case(
        Rule::ExactSets,
        "an entry taken out of the bitmap",
        "missing from entries",
        |scene| Some(drop_bit(scene, "entries")),
    ),
    case(
        Rule::ExactSets,
        "an address that is no entry added to the bitmap",
        "too many in entries",
        |scene| Some(set_bit(scene, "entries")),
    ),
    case(
        Rule::ExactSets,
        "a sorted return site moved by one byte",
        "missing from return_targets",
        |scene| Some(move_offset(scene, "return_targets_sorted")),
    ),
    case(
        Rule::ExactSets,
        "a sorted entry moved by one byte",
        "missing from entries",
        |scene| Some(move_offset(scene, "entries_sorted")),
    ),
    case(
        Rule::ExactSets,
        "a table that claims more than it holds",
        "the manifest says ",
        |scene| {
            let table = &mut scene.bundle.manifest.cave.tables[0];
            table.count += 1;
            Some(table.range.start)
        },
    ),
];

/// What the bundle says about the kernel.
pub const IMAGE: &[Case] = &[
    case(
        Rule::TrueToImage,
        "a byte of text flipped",
        "text.bin has ",
        |scene| {
            scene.bundle.text[0x12345] ^= 1;
            Some(scene.va(TextOff(0x12345)))
        },
    ),
    case(
        Rule::TrueToImage,
        "a relocation of the text left out",
        "model.abs32 lacks a relocation",
        |scene| {
            let at = scene.bundle.model.abs32.remove(1000);
            Some(scene.va(at))
        },
    ),
    case(
        Rule::TrueToImage,
        "a relocation of the text made up",
        "model.abs64 has a relocation that the image lacks",
        |scene| {
            scene.bundle.model.abs64.insert(0, TextOff(1));
            Some(scene.va(TextOff(1)))
        },
    ),
    case(
        Rule::TrueToImage,
        "a poke site made up",
        "has a JumpLabel site that no table of the image names",
        |scene| {
            let sites = &mut scene.bundle.model.sites;
            let index = sites
                .iter()
                .position(|site| site.kind == SiteKind::JumpLabel)
                .unwrap();
            sites[index].at = TextOff(sites[index].at.0 + 1);
            let at = sites[index].at;
            Some(scene.va(at))
        },
    ),
    case(
        Rule::TrueToImage,
        "a poke site left out",
        "lacks a Fentry site",
        |scene| {
            let sites = &mut scene.bundle.model.sites;
            let index = sites
                .iter()
                .position(|site| site.kind == SiteKind::Fentry)
                .unwrap();
            let at = sites.remove(index).at;
            Some(scene.va(at))
        },
    ),
    case(
        Rule::TrueToImage,
        "a structure offset off by eight",
        "layout `task_struct.mm` is ",
        |scene| {
            *scene
                .bundle
                .manifest
                .layout
                .get_mut("task_struct.mm")
                .unwrap() += 8;
            None
        },
    ),
    case(
        Rule::TrueToImage,
        "a data symbol elsewhere",
        "data `poking_mm` is not where the image has it",
        |scene| {
            let at = scene.bundle.manifest.data.get_mut("poking_mm").unwrap();
            at.0 += 8;
            Some(*at)
        },
    ),
    case(
        Rule::TrueToImage,
        "the system call entry elsewhere",
        "kernel.syscall_entry is ",
        |scene| {
            scene.bundle.manifest.kernel.syscall_entry.0 += 16;
            None
        },
    ),
    case(
        Rule::TrueToImage,
        "the digest of another image file",
        "kernel.image_sha256 is ",
        |scene| {
            scene.bundle.manifest.kernel.image_sha256 = "00".repeat(32);
            None
        },
    ),
    case(
        Rule::TrueToImage,
        "a symbol renamed",
        "is not in the image",
        |scene| {
            let symbol = &mut scene.bundle.symbols.0[500];
            symbol.name.push('x');
            let at = symbol.at;
            Some(scene.va(at))
        },
    ),
    case(
        Rule::TrueToImage,
        "a slot that no pass accounts for",
        "pass return-cfi accounts for ",
        |scene| {
            let pass = &mut scene.bundle.manifest.variants[2].passes[0];
            *pass.left.values_mut().next().unwrap() += 1;
            None
        },
    ),
    case(
        Rule::TrueToImage,
        "an edit fewer than the manifest says",
        "edits; the manifest says ",
        |scene| {
            scene.edits("fast").pop();
            None
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

/// Takes a member out of a bitmap, and counts one fewer.
fn drop_bit(scene: &mut Scene, name: &str) -> LinkVa {
    change_bit(scene, name, |byte| byte != 0, u8::trailing_zeros, -1)
}

/// Adds a member to a bitmap, and counts one more.
fn set_bit(scene: &mut Scene, name: &str) -> LinkVa {
    change_bit(scene, name, |byte| byte != 0xff, u8::trailing_ones, 1)
}

fn change_bit(
    scene: &mut Scene,
    name: &str,
    which: fn(u8) -> bool,
    bit: fn(u8) -> u32,
    count: i64,
) -> LinkVa {
    let tables = &mut scene.bundle.manifest.cave.tables;
    let table = tables
        .iter_mut()
        .find(|table| table.name == name)
        .expect("a table");
    table.count = table.count.checked_add_signed(count).unwrap();
    let (range, covers, kind) = (table.range, table.covers, table.kind);
    let TableKind::Bitmap { granule } = kind else {
        panic!("`{name}` is no bitmap");
    };
    // From the middle, which is far from filler.
    let middle = LinkVa(range.start.0 + range.len() / 2);
    let bytes = scene.cave(middle, 4096);
    let index = bytes
        .iter()
        .position(|byte| which(*byte))
        .expect("such a byte");
    let bit = bit(bytes[index]);
    bytes[index] ^= 1 << bit;
    let number = (range.len() / 2 + index as u64) * 8 + u64::from(bit);
    LinkVa(covers.start.0 + number * u64::from(granule))
}

/// Moves a sorted offset by one byte; the address that is missing now.
fn move_offset(scene: &mut Scene, name: &str) -> LinkVa {
    let tables = &scene.bundle.manifest.cave.tables;
    let table = tables
        .iter()
        .find(|table| table.name == name)
        .expect("a table");
    let (start, covers) = (table.range.start, table.covers);
    let bytes = scene.cave(LinkVa(start.0 + 4 * 7), 4);
    let offset = u32::from_le_bytes((&*bytes).try_into().unwrap());
    bytes.copy_from_slice(&(offset + 1).to_le_bytes());
    LinkVa(covers.start.0 + u64::from(offset))
}
