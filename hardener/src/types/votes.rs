//! What a function's own uses say about its values: passed on where a type is declared.

use super::around::Uses;
use super::btf::Btf;
use super::flow::Flow;
use super::functions::{FunctionIndex, pointee, registers};
use super::layout::Ptr;
use super::resolve::Pointers;
use super::values::{Op, UNKNOWN, Value};

/// What each value of one function is used as.
pub struct Votes {
    passed: Vec<(Value, Ptr)>,
    /// The words behind values that it follows or calls.
    pub uses: Uses,
}

impl Votes {
    /// What a function's calls say about the values that it passes, and what it does itself with what is behind them.
    pub fn of(btf: &Btf, functions: &FunctionIndex, flow: &Flow) -> Votes {
        let mut votes = Vec::new();
        for call in &flow.calls {
            let Some(callee) = functions.at(call.to) else {
                continue;
            };
            // Statics of one name: which it is is not known.
            let [prototype] = callee.prototypes[..] else {
                continue;
            };
            for (value, parameter) in call.arguments.iter().zip(registers(btf, prototype)) {
                let (base, offset) = flow.values.split(*value);
                if *value != UNKNOWN
                    && let Some(ty) = parameter.and_then(|ty| pointee(btf, ty))
                    && let Ok(delta) = i32::try_from(-offset)
                {
                    votes.push((base, Ptr { ty, delta }));
                }
            }
        }
        votes.sort_unstable();
        votes.dedup();
        votes.shrink_to_fit();
        Votes {
            passed: votes,
            uses: Uses::of(flow),
        }
    }

    /// All of them, by value.
    pub fn all(&self) -> &[(Value, Ptr)] {
        &self.passed
    }

    /// What one value is used as. Sorted.
    pub fn about(&self, value: Value) -> Pointers {
        let from = self.passed.partition_point(|vote| vote.0 < value);
        let about = self.passed[from..]
            .iter()
            .take_while(|vote| vote.0 == value);
        about.map(|vote| vote.1).collect()
    }

    /// Things on the function's stack whose addresses it passes on as pointers to them, by offset from RSP at entry.
    pub fn stack_objects(&self, flow: &Flow) -> Vec<(i32, Ptr)> {
        let objects = self
            .passed
            .iter()
            .filter_map(|(value, ptr)| match flow.values.op(*value) {
                Op::Stack(at) => Some((at, *ptr)),
                _ => None,
            });
        let mut objects: Vec<(i32, Ptr)> = objects.collect();
        objects.sort_unstable();
        objects
    }
}
