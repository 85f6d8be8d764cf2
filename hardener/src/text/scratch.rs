//! Where r10, r11 and the flags are free at returns of functions that are not compiled for tracing.
//!
//! Of such a function (`notrace`, as all that the kernel declares `inline` and the compiler kept apart) no `__fentry__` site
//! says that its callers expect these to be lost. So its callers are looked at: when all are known and compiled, and behind none
//! of their calls one of the three is read before it is written, the function may lose them.

use super::behind::Behind;
use super::callgraph::CallGraph;
use super::steps::{BehindCalls, FLAGS, Set, whole};
use super::{Bitmap, Text};
use crate::image::{Image, Tables};

/// r10, r11 and the flags: what thunks use.
const USED: Set = whole(1 << 10 | 1 << 11) | FLAGS;

/// Whether all three are free at each R slot, in the order of the slots.
pub fn find(image: &Image, tables: &Tables, text: &Text, graph: &CallGraph) -> Vec<bool> {
    let labelled = &labelled(image, tables, text);
    let behind_calls = BehindCalls { graph, labelled };
    let mut behind = Behind::new(image, tables, text, USED, behind_calls);
    let mut is_free = |number: usize| {
        let back = graph.returns_to(text, number);
        back.is_some_and(|back| back.iter().all(|at| !behind.reads(*at)))
    };
    let mut last = None;
    let slots = text.slots.returns.iter();
    let free = slots.map(|slot| {
        if slot.scratch_free {
            return true;
        }
        let number = text.functions.number(slot.at);
        match last {
            Some((other, free)) if other == number => free,
            _ => {
                let free = number.is_some_and(&mut is_free);
                last = Some((number, free));
                free
            }
        }
    });
    free.collect()
}

/// The text of functions with labels that data points to: their jumps may go there.
fn labelled(image: &Image, tables: &Tables, text: &Text) -> Bitmap {
    let mut labelled = Bitmap::new(text.bytes.len());
    let labels = super::entries::pointers(image, tables).into_iter();
    let labels = labels.filter_map(|va| text.span.offset(va));
    for label in labels.filter(|at| !text.functions.is_start(*at)) {
        let function = text.functions.around(label);
        for at in function.start.0..function.end.0.min(text.bytes.len() as u32) {
            labelled.set(at as usize);
        }
    }
    labelled
}
