//! Functions whose direct calls are led through a thunk, and the calls.

use super::{Direct, Text, slots};
use crate::image::{Fault, Image, Tables};
use penumbra_bundle::{LinkVa, TextOff};
use std::collections::{BTreeMap, HashMap};

/// What thunks look at to tell for whom they are called.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// Where a CPU's preemption count stands, from its GS base.
    pub preempt_count: u32,
    /// The same of a pointer to its running task.
    pub current: u32,
    /// Where the flags of a task stand, from its start.
    pub flags: u32,
}

impl Task {
    fn of(image: &Image) -> Result<Task, Fault> {
        let missing =
            |what: &str| Fault::unsupported(".BTF", format!("does not tell where {what} stands"));
        let low = |va: LinkVa, what| u32::try_from(va.0).map_err(|_| missing(what));
        let count = image.per_cpu("__preempt_count", "preempt_count")?;
        let current = image.per_cpu("current_task", "current_task")?;
        let flags = image.btf.member("task_struct", "flags");
        let flags = flags.and_then(|member| member.byte());
        Ok(Task {
            preempt_count: low(count, "the preemption count")?,
            current: low(current, "the running task")?,
            flags: flags.ok_or_else(|| missing("`task_struct.flags`"))?,
        })
    }
}

/// Some functions of one kernel, all with an `__fentry__` site.
pub struct Watched {
    /// Where each starts. Sorted.
    pub functions: Vec<TextOff>,
    /// What each is called; where several have a name, with its offset behind it.
    names: Vec<String>,
    /// What thunks look at.
    pub task: Task,
    /// The slots that enter one.
    pub slots: Vec<Direct>,
    /// Direct calls and jumps to one that are no slots, by reason.
    pub left: BTreeMap<String, u64>,
}

impl Watched {
    /// Finds the calls of `functions`, which are sorted.
    pub fn of(
        image: &Image,
        tables: &Tables,
        text: &Text,
        functions: Vec<TextOff>,
    ) -> Result<Watched, Fault> {
        let enters = |at: TextOff| functions.binary_search(&at).is_ok();
        let (slots, left) = slots::find_direct(text, tables, enters);
        Ok(Watched {
            names: names(image, text, &functions),
            task: Task::of(image)?,
            functions,
            slots,
            left,
        })
    }

    /// What the function that starts at `at` is called.
    pub fn name(&self, at: TextOff) -> Option<&str> {
        let index = self.functions.binary_search(&at).ok()?;
        Some(&self.names[index])
    }

    /// Whether the function that starts at `at` is one.
    pub fn contains(&self, at: TextOff) -> bool {
        self.functions.binary_search(&at).is_ok()
    }
}

/// A name for each function, and no two the same.
fn names(image: &Image, text: &Text, functions: &[TextOff]) -> Vec<String> {
    let symbols: Vec<Option<&str>> = functions
        .iter()
        .map(|at| {
            let va = text.va(*at);
            let first = image.symbols.partition_point(|symbol| symbol.va < va);
            let symbols = image.symbols[first..].iter();
            let mut own = symbols.take_while(|symbol| symbol.va == va);
            own.find(|symbol| symbol.is_code())
                .map(|symbol| symbol.name.as_str())
        })
        .collect();
    let mut uses: HashMap<&str, u32> = HashMap::new();
    for name in symbols.iter().flatten() {
        *uses.entry(name).or_default() += 1;
    }
    let all = functions.iter().zip(symbols);
    all.map(|(at, symbol)| match symbol {
        Some(name) if uses[name] == 1 => name.to_owned(),
        Some(name) => format!("{name}@{:x}", at.0),
        None => format!("@{:x}", at.0),
    })
    .collect()
}
