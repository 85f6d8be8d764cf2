//! Functions by which the kernel checks itself: for correct code a call of one changes nothing, and what it gives back is known
//! before. What they catch goes on when they are not called.

use super::Sweep;
use super::slots::Editable;
use crate::image::Image;
use penumbra_bundle::{LinkVa, TextOff};
use std::collections::BTreeMap;

/// What a call of such a function gives back when nothing is wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gives {
    /// Nothing: `void`.
    Nothing,
    /// `true`.
    True,
    /// Its first argument.
    First,
}

/// A function that checks.
#[derive(Clone, Copy, Debug)]
pub struct SelfCheck {
    /// Its name.
    pub name: &'static str,
    /// What is checked: a parameter of the pass.
    pub subject: &'static str,
    /// What it gives back.
    pub gives: Gives,
}

const fn check(name: &'static str, subject: &'static str, gives: Gives) -> SelfCheck {
    SelfCheck {
        name,
        subject,
        gives,
    }
}

/// All of them that are known, of whatever kernel.
pub const KNOWN: &[SelfCheck] = &[
    // Whether what is copied to or from user mode lies in one object (mm/usercopy.c, CONFIG_HARDENED_USERCOPY).
    check("__check_object_size", "usercopy", Gives::Nothing),
    // Whether neighbours in a list point to each other (lib/list_debug.c, CONFIG_DEBUG_LIST; the longer names from Linux 6.6 on).
    check("__list_add_valid", "lists", Gives::True),
    check("__list_del_entry_valid", "lists", Gives::True),
    check("__list_add_valid_or_report", "lists", Gives::True),
    check("__list_del_entry_valid_or_report", "lists", Gives::True),
    // Whether an object is given back to the cache that it came from (mm/slub.c, CONFIG_SLAB_FREELIST_HARDENED).
    check("cache_from_obj", "slab", Gives::First),
    // Whether the FPU holds what the task's state says, each time that user mode is entered, and XFD what its features need
    // (arch/x86/kernel/fpu, CONFIG_X86_DEBUG_FPU).
    check("fpregs_assert_state_consistent", "fpu", Gives::Nothing),
    check("xfd_validate_state", "fpu", Gives::Nothing),
];

/// Those of one kernel: indices into [`KNOWN`], by address.
pub type SelfChecks = BTreeMap<LinkVa, usize>;

/// Finds them. A name that two functions share tells of neither.
pub fn find(image: &Image) -> SelfChecks {
    let named = |name: &str| {
        let mut symbols = image.symbols.iter();
        let mut found = symbols.by_ref().filter(|symbol| symbol.name == name);
        let first = found.next()?;
        found.next().is_none().then_some(first.va)
    };
    let known = KNOWN.iter().enumerate();
    known
        .filter_map(|(index, check)| Some((named(check.name)?, index)))
        .collect()
}

/// A direct branch to such a function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CheckCall {
    /// Where it stands.
    pub at: TextOff,
    /// Where the function starts.
    pub to: LinkVa,
    /// Which it is: an index into [`KNOWN`].
    pub check: usize,
    /// Why it is no slot, if it is none.
    pub left: Option<&'static str>,
}

/// All direct branches to them from elsewhere, by address.
pub fn calls(
    checks: &SelfChecks,
    bytes: &[u8],
    sweep: &Sweep,
    editable: &Editable<'_>,
) -> Vec<CheckCall> {
    const CALL: u8 = 0xe8;
    let of = |to: Option<LinkVa>| checks.get_key_value(&to?);
    let direct = sweep.calls.iter().filter_map(|call| {
        let (to, check) = of(call.to)?;
        let whole = bytes[call.at.0 as usize] == CALL && call.end.0 == call.at.0 + 5;
        let left = editable.why_not(call.at, 5);
        Some(CheckCall {
            at: call.at,
            to: *to,
            check: *check,
            left: left.or_else(|| (!whole).then_some("long-call")),
        })
    });
    // What follows is not known to whoever jumps.
    let jumps = sweep.jumps.iter().filter_map(|jump| {
        let (to, check) = of(jump.to)?;
        Some(CheckCall {
            at: jump.at,
            to: *to,
            check: *check,
            left: Some("tail-call"),
        })
    });
    let mut calls: Vec<CheckCall> = direct.chain(jumps).collect();
    calls.sort_by_key(|call| call.at);
    calls
}
