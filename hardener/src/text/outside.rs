//! Which functions lie outside a profile, and the direct calls and jumps that would enter them.
//!
//! Inside is what the profile names, what the kernel runs to end a task or itself, and every function without an `__fentry__`
//! site: those are assembly, parts that the compiler split off, and what must not be traced (entry code, NMIs), which no
//! recorder of the kernel's own sees.

use super::callgraph::CallGraph;
use super::watched::Watched;
use super::{FILLER, Text};
use crate::image::{Fault, Image, Tables};
use crate::profile::Functions;
use penumbra_bundle::{LinkVa, TextOff};
use std::collections::BTreeMap;

/// Where the kernel goes when something is wrong: few profiles have all of it, and a thunk that stops a task relies on it. What
/// `exc_invalid_op` does about an `ud2` (arch/x86/kernel/traps.c), to the end of the task (kernel/exit.c), and a panic.
const LAST_RESORTS: [&str; 6] = [
    "panic",
    "die",
    "do_error_trap",
    "make_task_dead",
    "report_bug",
    "__warn",
];

/// Called at the end of every oops (arch/x86/kernel/dumpstack.c).
const OOPS: &str = "oops_end";

/// A function that calls more others is a switch over what somebody asks for, as `x64_sys_call` is: what of it is used, the profile
/// says.
const MOST_CALLEES: usize = 128;

/// The functions of one kernel that lie outside a profile.
pub struct Outside {
    /// With their calls.
    pub watched: Watched,
    /// Whether the profile itself has the end of a task by an oops.
    pub has_oops: bool,
    /// Shares and counts, for the manifest.
    pub figures: BTreeMap<String, u64>,
}

impl Outside {
    /// Asks the profile about every function; `reachable` counts as inside what those inside call or jump to directly.
    pub fn find(
        image: &Image,
        tables: &Tables,
        text: &Text,
        graph: &CallGraph,
        profile: &Functions,
        reachable: bool,
    ) -> Result<Outside, Fault> {
        let (named, unknown) = profile.resolve(image);
        let number = |va: LinkVa| text.functions.number(text.span.offset(va)?);
        let callees = callees(text, graph);
        let mut inside = vec![false; text.functions.count()];
        let profiled = named.iter().filter_map(|va| number(*va));
        for number in profiled {
            inside[number] = true;
        }
        let in_profile = inside.iter().filter(|inside| **inside).count() as u64;
        let ends = image.symbol(OOPS).and_then(number);
        let has_oops = ends.is_some_and(|number| inside[number]);
        if reachable {
            let roots = (0..inside.len()).filter(|number| inside[*number]).collect();
            close(&mut inside, roots, &callees);
        }
        let last = LAST_RESORTS.iter().filter_map(|name| image.symbol(name));
        let last: Vec<usize> = last.filter_map(number).collect();
        let mut needed = vec![false; inside.len()];
        close(&mut needed, last, &callees);
        for (number, inside) in inside.iter_mut().enumerate() {
            *inside |= needed[number] || !text.functions.calls_fentry(number);
        }
        let outside = |number: usize| !inside[number];
        let functions: Vec<TextOff> = (0..inside.len())
            .filter(|number| outside(*number))
            .map(|number| text.functions.start(number))
            .collect();
        let enters = |at: TextOff| functions.binary_search(&at).is_ok();
        let size = |number: usize| {
            let start = text.functions.start(number).0 as usize;
            let end = text.functions.starts_after(number);
            let end = end.map_or(text.span.code.len() as usize, |end| end.0 as usize);
            // The filler behind it is nobody's.
            let last = text.bytes[start..end]
                .iter()
                .rposition(|byte| *byte != FILLER);
            last.map_or(0, |last| last as u64 + 1)
        };
        let (outside, inside): (Vec<usize>, Vec<usize>) =
            (0..inside.len()).partition(|number| outside(*number));
        let taken = text.entries.iter().filter(|at| enters(**at));
        let figures = [
            ("functions-in-profile", in_profile),
            ("functions-inside", inside.len() as u64),
            ("functions-outside", outside.len() as u64),
            ("bytes-inside", inside.into_iter().map(size).sum()),
            ("bytes-outside", outside.into_iter().map(size).sum()),
            ("indirect-targets-outside", taken.count() as u64),
            ("profile-lines-unknown", unknown),
        ];
        Ok(Outside {
            watched: Watched::of(image, tables, text, functions)?,
            has_oops,
            figures: figures.map(|(name, value)| (name.to_owned(), value)).into(),
        })
    }
}

/// The functions that each function calls or jumps to directly, by number.
fn callees(text: &Text, graph: &CallGraph) -> Vec<Vec<u32>> {
    let mut callees = vec![Vec::new(); text.functions.count()];
    for (callee, sites) in graph.direct.iter().enumerate() {
        for site in sites {
            // A return address may be the next function's first byte.
            if let Some(caller) = text.functions.number(TextOff(site.0 - 1)) {
                callees[caller].push(callee as u32);
            }
        }
    }
    for (to, sources) in graph.jumped_from.iter().enumerate() {
        for source in sources {
            callees[*source as usize].push(to as u32);
        }
    }
    for list in &mut callees {
        list.sort_unstable();
        list.dedup();
    }
    callees
}

/// Adds to `set` what can be reached from `open`, but not through switches.
fn close(set: &mut [bool], mut open: Vec<usize>, callees: &[Vec<u32>]) {
    for number in &open {
        set[*number] = true;
    }
    while let Some(number) = open.pop() {
        if callees[number].len() > MOST_CALLEES {
            continue;
        }
        for callee in &callees[number] {
            if !std::mem::replace(&mut set[*callee as usize], true) {
                open.push(*callee as usize);
            }
        }
    }
}
