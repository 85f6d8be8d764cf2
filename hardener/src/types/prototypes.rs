//! Prototypes as classes: two are one when no caller can tell them apart.
//!
//! Qualifiers and typedefs go; integers and enumerations count by their size, structures by their names, pointers by what they
//! point to. What is merged makes a class larger, never smaller.

use super::btf::{Btf, Type};
use rustc_hash::FxHashMap;
use std::fmt::Write as _;

/// A class of prototypes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ProtoId(pub u32);

/// Pointers to pointers to functions nest no deeper.
const MAX_DEPTH: u32 = 6;

/// The classes of one kernel.
#[derive(Default)]
pub struct Prototypes {
    /// By BTF id.
    of: FxHashMap<u32, ProtoId>,
    /// What each looks like, for people.
    pub shown: Vec<String>,
    /// How many integer registers each takes its arguments in; more than 6 count as 6.
    pub arity: Vec<u8>,
}

impl Prototypes {
    /// Sorts all prototypes of `btf` into classes.
    pub fn of(btf: &Btf) -> Prototypes {
        let mut prototypes = Prototypes::default();
        let mut known: FxHashMap<String, ProtoId> = FxHashMap::default();
        for id in btf.ids() {
            let Some((_, parameters, _)) = btf.prototype(id) else {
                continue;
            };
            let mut shown = String::new();
            show(btf, id, MAX_DEPTH, &mut shown);
            let class = *known.entry(shown.clone()).or_insert_with(|| {
                let class = ProtoId(prototypes.shown.len() as u32);
                prototypes.shown.push(shown);
                prototypes.arity.push(arity(btf, parameters));
                class
            });
            prototypes.of.insert(id, class);
        }
        prototypes
    }

    /// The class of a prototype's BTF id.
    pub fn class(&self, id: u32) -> Option<ProtoId> {
        self.of.get(&id).copied()
    }
}

/// Registers that arguments take (System V psABI, 3.2.3): structures up to 16 bytes take two, larger ones the stack.
fn arity(btf: &Btf, parameters: &[u32]) -> u8 {
    let registers = |parameter: &u32| match btf.at(btf.plain(*parameter)) {
        Type::Composite { size, .. } if size > 16 => 0,
        Type::Composite { size, .. } if size > 8 => 2,
        _ => 1,
    };
    let all: u32 = parameters.iter().map(registers).sum();
    all.min(6) as u8
}

fn show(btf: &Btf, id: u32, depth: u32, out: &mut String) {
    let id = btf.plain(id);
    let Some(deeper) = depth.checked_sub(1) else {
        out.push('?');
        return;
    };
    match btf.at(id) {
        Type::Void => out.push_str("void"),
        Type::Scalar(size) => {
            let _ = write!(out, "u{}", size * 8);
        }
        Type::Pointer(to) => {
            show(btf, to, deeper, out);
            out.push('*');
        }
        Type::Array(of, count) => {
            show(btf, of, deeper, out);
            let _ = write!(out, "[{count}]");
        }
        Type::Composite { .. } | Type::Forward => match btf.name(id) {
            // Without a name every declaration is a type of its own.
            "" => {
                let _ = write!(out, "struct#{id}");
            }
            name => out.push_str(name),
        },
        Type::Prototype { .. } => {
            let (returns, parameters, more) = btf.prototype(id).unwrap_or((0, &[], false));
            show(btf, returns, deeper, out);
            out.push('(');
            for (index, parameter) in parameters.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                show(btf, *parameter, deeper, out);
            }
            if more {
                out.push_str(",...");
            }
            out.push(')');
        }
        _ => out.push('?'),
    }
}
