//! Which returns may clear the caller-saved registers that carry nothing back.
//!
//! A function with an `__fentry__` site was compiled with `-pg`, so its callers were compiled without knowing which registers
//! it leaves alone (`-fipa-ra` is off, gcc/opts.cc), and every caller-saved register but rax and rdx is dead when it returns
//! (System V psABI, 3.2.1 and 3.2.3). Assembly may know better than the ABI. So a function is left out when assembly calls it,
//! when it is not known who does (its address is taken, or it is exported), and when behind any call that gets to it some
//! instruction reads one of the registers before it is written.

use super::Text;
use super::callgraph::CallGraph;
use super::liveness::Liveness;
use super::return_sets::MAX_COMPARED;
use super::steps::{Set, whole};
use crate::image::{Image, Tables};
use penumbra_bundle::TextOff;
use std::collections::BTreeMap;

/// rcx, rsi, rdi and r8 to r11: all that a call may change but rax and rdx, in which values come back.
const ZEROED: Set = whole(1 << 1 | 1 << 6 | 1 << 7 | 0xf << 8);

/// The returns of one kernel that may clear registers.
pub struct Zeroing {
    /// Whether each R slot's return may, in the order of the slots.
    pub of_slot: Vec<bool>,
    /// How many may not, by reason.
    pub left: BTreeMap<String, u64>,
}

/// What stands behind calls.
struct Behind<'a> {
    text: &'a Text,
    graph: &'a CallGraph,
    live: Liveness,
}

impl Zeroing {
    /// Asks about every R slot.
    pub fn find(image: &Image, tables: &Tables, text: &Text, graph: &CallGraph) -> Zeroing {
        let live = Liveness::find(image, tables, text, ZEROED);
        let behind = Behind { text, graph, live };
        let mut zeroing = Zeroing {
            of_slot: Vec::with_capacity(text.slots.returns.len()),
            left: text.slots.returns_left.clone(),
        };
        let mut last = None;
        for slot in &text.slots.returns {
            let number = text.functions.number(slot.at);
            let known = last.filter(|(other, _)| *other == number);
            let reason = known.map_or_else(
                || number.map_or(Some(UNKNOWN), |number| behind.lives(number)),
                |(_, reason)| reason,
            );
            last = Some((number, reason));
            let reason = reason.or((!slot.scratch_free).then_some(UNTRACED));
            if let Some(reason) = reason {
                *zeroing.left.entry(reason.to_owned()).or_default() += 1;
            }
            zeroing.of_slot.push(reason.is_none());
        }
        zeroing
    }
}

const UNTRACED: &str = "not-compiled-for-tracing";
const UNKNOWN: &str = "callers-unknown";
const ASSEMBLY: &str = "called-by-assembly";
const READ: &str = "read-behind-a-call";
const INDIRECT: &str = "reached-by-indirect-calls";

impl Behind<'_> {
    /// Why a register may live on when the function of this number returns.
    fn lives(&self, number: usize) -> Option<&'static str> {
        if !self.text.functions.calls_fentry(number) {
            return Some(UNTRACED);
        }
        let callers = self.graph.callers(number);
        if callers.unknown || callers.called.len() > MAX_COMPARED {
            return Some(UNKNOWN);
        }
        if callers.indirect {
            return Some(INDIRECT);
        }
        for called in &callers.called {
            for back in &self.graph.direct[*called as usize] {
                let caller = self.text.functions.number(TextOff(back.0 - 1));
                if !caller.is_some_and(|caller| self.graph.facts[caller].compiled) {
                    return Some(ASSEMBLY);
                }
                if self.live.at(*back) != 0 {
                    return Some(READ);
                }
            }
        }
        None
    }
}
