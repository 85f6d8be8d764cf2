//! Faults of edits.

use crate::cases::{Case, case, is_call, is_long_call, is_return};
use hardener::check::Rule;
use penumbra_bundle::{Edit, LinkVa, SiteKind, SlotKind, TextOff, VaRange};

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
