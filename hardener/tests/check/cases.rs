//! One fault a case: what is broken, which rule must catch it, and what it must say.

use crate::scene::Scene;
use hardener::check::Rule;
use penumbra_bundle::{Edit, LinkVa, SlotKind};

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

/// The edit of a return.
pub fn is_return(edit: &Edit) -> bool {
    edit.slot == SlotKind::Return
}

/// The edit of an indirect call of five bytes.
pub fn is_call(edit: &Edit) -> bool {
    edit.slot == SlotKind::Indirect && edit.bytes[0] == 0xe8
}

/// The edit of an indirect call with a prefix.
pub fn is_long_call(edit: &Edit) -> bool {
    edit.slot == SlotKind::Indirect && edit.bytes.starts_with(&[0x2e, 0xe8])
}
