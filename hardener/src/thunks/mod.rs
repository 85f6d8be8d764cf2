//! What goes into the cave: tables of legal targets and the thunks that slots jump to. One cave for all variants, so that an
//! address inside it is valid in every view (design, invariant 2).

mod assembler;
mod elf;
pub mod forward_cfi;
pub mod forward_class;
mod hashed;
mod hashed_bytes;
mod lookup;
pub mod module_free;
pub mod promote;
pub mod return_cfi;
pub mod return_function;
pub mod stack_clear;
mod tables;
mod violation;
pub mod watched;

use crate::passes::{Analyses, DEBLOAT, FORWARD_CFI, PROBE, RETURN_CFI, STACK_DEPTH};
use crate::recipe::Recipe;
use crate::text::{Indirect, PAGE, Slots, Text, TextError};
use crate::types::{Forward, Reach};
use assembler::Section;
use penumbra_bundle::{LinkVa, Table, Trap, VaRange, ViolationAction};
use return_cfi::Mode;
use std::collections::BTreeMap;

pub use hashed::{Hashed, HashedTable};
pub use tables::{Dense, TargetTables, Targets};
pub use violation::Violation;

/// Called by `free_module` with the module, before its memory is freed (kernel/module/main.c).
pub const MODULE_CLEANUP: &str = "module_arch_cleanup";

/// A named piece of the cave.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Named {
    /// Its symbol.
    pub name: String,
    /// Where it lies.
    pub range: VaRange,
}

/// Thunks and tables at their link addresses.
pub struct CaveContents {
    /// Whole pages of the cave that are used.
    pub range: VaRange,
    /// `cave.elf`.
    pub elf: Vec<u8>,
    /// Thunks by symbol.
    pub thunks: BTreeMap<String, LinkVa>,
    /// The tables.
    pub tables: Vec<Table>,
    /// Absolute addresses of 32 bits. Sorted.
    pub relocs: Vec<LinkVa>,
    /// Where thunks end by returning. Sorted.
    pub return_tails: Vec<LinkVa>,
    /// Where thunks report. Sorted.
    pub traps: Vec<Trap>,
}

/// Addresses that thunks need from the kernel.
pub struct KernelThunks {
    /// `__x86_return_thunk`.
    pub return_thunk: LinkVa,
    /// `__x86_indirect_thunk_REG`, by register number.
    pub indirect: BTreeMap<u8, LinkVa>,
    /// `panic`.
    pub panic: LinkVa,
    /// `module_arch_cleanup`, which is called before a module's memory is freed.
    pub module_cleanup: Option<LinkVa>,
}

impl KernelThunks {
    /// All of them by name.
    pub fn named(&self) -> Vec<(String, LinkVa)> {
        let indirect = self.indirect.iter().map(|(register, va)| {
            let register = crate::text::REGISTERS[usize::from(*register)];
            (format!("__x86_indirect_thunk_{register}"), *va)
        });
        let own = [
            ("__x86_return_thunk".to_owned(), self.return_thunk),
            ("panic".to_owned(), self.panic),
        ];
        let cleanup = self
            .module_cleanup
            .map(|va| (MODULE_CLEANUP.to_owned(), va));
        indirect.chain(own).chain(cleanup).collect()
    }
}

/// What is chosen for speed where there is room, and for size where there is not.
#[derive(Clone, Copy)]
struct Layout {
    /// How return addresses are encoded.
    returns: Dense,
    /// Whether the thunks of functions share the code that compares.
    shared: bool,
}

/// Builds the cave for a text and for modules with these slots: tables and messages first, thunks behind them. Where the cave
/// has no room for a bit for each byte of text, return addresses are hashed; where it has none for a thunk for each function,
/// these share their code.
pub fn build(
    text: &Text,
    modules: &[&Slots],
    kernel: &KernelThunks,
    recipe: &Recipe,
    analyses: Analyses<'_>,
) -> Result<CaveContents, TextError> {
    let with = |returns, shared| {
        let layout = Layout { returns, shared };
        build_with(text, modules, kernel, recipe, analyses, layout)
    };
    // Beside the thunks of all functions there is hardly room for a bit for each byte; and few returns get that far.
    let (first, second) = match analyses.return_sets {
        Some(_) => ((Dense::Hashed, false), (Dense::Hashed, true)),
        None => ((Dense::Bitmap(1), false), (Dense::Hashed, false)),
    };
    match with(first.0, first.1) {
        Err(TextError::Cave { .. }) => with(second.0, second.1),
        done => done,
    }
}

/// How many classes the return sites of a kernel's indirect calls can have.
pub fn most_return_classes(text: VaRange) -> usize {
    hashed::class_numbers(text).1.len()
}

fn build_with(
    text: &Text,
    modules: &[&Slots],
    kernel: &KernelThunks,
    recipe: &Recipe,
    analyses: Analyses<'_>,
    layout: Layout,
) -> Result<CaveContents, TextError> {
    let Analyses {
        forward,
        return_sets,
        exposed: _,
        changeable: _,
        zeroing,
        stack,
        promotion,
        outside,
        probed,
        large_frames,
    } = analyses;
    let start = text.cave.pages.start;
    let dense_end = text.cave.run.start;
    let mut at = start;
    let mut place = |name: &str, addresses, encoding| {
        let table = TargetTables::build(name, addresses, text.range, dense_end, encoding, at);
        at = table.end();
        table
    };
    let returns = place("return_targets", &text.return_targets, layout.returns);
    let entries = Dense::Bitmap(tables::ENTRY_GRANULE);
    let entries = place("entries", &text.entries, entries);
    let indirect = return_sets.map(|sets| {
        let table = HashedTable::build("indirect_return_sites", &sets.indirect, text.range, at);
        at = table.end();
        table
    });
    let return_classes = return_sets.and_then(|sets| {
        let made = return_function::class_table(sets, text.range, at)?;
        at = made.0.end();
        Some(made)
    });
    let classes = forward.and_then(|forward| {
        let slots = &text.slots.indirect;
        let classes = forward_class::ClassTable::build(forward, slots, text.range, at)?;
        at = classes.table.end();
        Some(classes)
    });
    let by_arity = |forward: &&Forward| {
        let mut classes = forward.classes.iter();
        classes.any(|class| matches!(class.reach, Reach::Arity(_)))
    };
    let arities = forward.filter(by_arity).map(|forward| {
        let table = HashedTable::of_arities("entry_arities", &forward.arities, text.range, at);
        at = table.end();
        table
    });
    let messages_start = at;
    let mut messages = Vec::new();
    let mut violation = |pass| {
        let violation = Violation {
            pass,
            action: recipe.on_violation(pass),
            panic: kernel.panic,
            message: at,
        };
        if violation.action == ViolationAction::Panic {
            let text = violation.message_text();
            let end = LinkVa(at.0 + text.len() as u64);
            let name = format!("{}_message", pass.replace('-', "_"));
            messages.push((named(&name, at, end), text));
            at = end;
        }
        violation
    };
    let (on_return, on_call) = (violation(RETURN_CFI), violation(FORWARD_CFI));
    let outside = outside.map(|outside| (&outside.watched, None, violation(DEBLOAT)));
    let large = large_frames.map(|large| (&large.watched, Some(large), violation(STACK_DEPTH)));
    // A probe goes on, whatever happens.
    let probed = probed.map(|probed| {
        let on_entry = Violation {
            pass: PROBE,
            action: ViolationAction::Log,
            panic: kernel.panic,
            message: start,
        };
        (&probed.watched, None, on_entry)
    });
    let code_start = LinkVa(at.0.next_multiple_of(PAGE));

    let mut code = Section::new(code_start);
    let (return_targets, call_targets) = (returns.targets(text.range), entries.targets(text.range));
    let mut modes = vec![Mode::Plain, Mode::Saving];
    modes.extend(zeroing.map(|_| Mode::Zeroing));
    let any = return_cfi::emit(
        &mut code,
        &modes,
        &return_targets,
        kernel.return_thunk,
        &on_return,
    );
    if let (Some(sets), Some(indirect)) = (return_sets, &indirect) {
        let needs = return_function::Needs {
            sets,
            slots: &text.slots,
            analyses: &analyses,
            sites: return_targets,
            indirect: indirect.hashed(),
            classes: return_classes
                .as_ref()
                .map(|(table, offset_bits)| return_function::Classes {
                    table: table.hashed(),
                    offset_bits: *offset_bits,
                }),
            special: &text.return_specials,
            return_thunk: kernel.return_thunk,
            shared: layout.shared,
        };
        return_function::emit(&mut code, &needs, &any, &on_return);
    }
    if let Some(stack) = stack {
        stack_clear::emit(&mut code, &text.slots, stack, &analyses, &on_return);
    }
    // A slot of a class of its own has a thunk of its own.
    let own = |slot: &&Indirect| {
        forward.is_some_and(|forward| forward_class::name(forward, slot).is_some())
    };
    let slots = text.slots.indirect.iter().filter(|slot| !own(slot));
    let slots = slots.chain(modules.iter().flat_map(|slots| &slots.indirect));
    let slots: Vec<&Indirect> = slots.collect();
    forward_cfi::emit(&mut code, &call_targets, kernel, &slots, &on_call);
    if let Some(forward) = forward {
        let slots = &text.slots.indirect;
        let tables = forward_class::Tables {
            large: classes.as_ref(),
            arities: arities.as_ref().map(HashedTable::hashed),
            compact: layout.shared,
        };
        forward_class::emit(
            &mut code, forward, &tables, text.range, kernel, slots, &on_call,
        );
    }
    if let Some(cleanup) = kernel.module_cleanup {
        module_free::emit(&mut code, cleanup, &on_return);
    }
    if let Some(promotion) = promotion {
        promote::emit(&mut code, promotion, &text.slots, &on_call);
    }
    let go_on = kernel.indirect.get(&watched::FUNCTION);
    for (watched, large, on_entry) in outside.iter().chain(&probed).chain(&large) {
        let go_on = go_on.copied().ok_or(TextError::Missing {
            what: "__x86_indirect_thunk_r11",
        })?;
        watched::emit(&mut code, text, watched, *large, go_on, on_entry);
    }
    let code_end = LinkVa(code_start.0 + code.bytes().len() as u64);
    let range = VaRange {
        start,
        end: LinkVa(code_end.0.next_multiple_of(PAGE)),
    };
    if range.end > text.cave.pages.end {
        return Err(TextError::Cave {
            needed: range.len(),
            found: text.cave.pages.len(),
        });
    }
    let mut table_bytes = Vec::new();
    let mut names = Vec::new();
    let mut tables = Vec::new();
    for part in [returns, entries] {
        part.append(start, &mut table_bytes, &mut names, &mut tables);
    }
    let classes = classes.map(|classes| classes.table);
    let return_classes = return_classes.map(|(table, _)| table);
    for part in [indirect, return_classes, classes, arities]
        .into_iter()
        .flatten()
    {
        part.append(start, &mut table_bytes, &mut names, &mut tables);
    }
    if !messages.is_empty() {
        table_bytes.resize((messages_start.0 - start.0) as usize, 0);
    }
    for (name, text) in messages {
        names.push(name);
        table_bytes.extend(text);
    }
    let mut relocs = code.relocs().to_vec();
    relocs.sort_unstable();
    let mut return_tails = code.return_tails().to_vec();
    return_tails.sort_unstable();
    Ok(CaveContents {
        range,
        elf: elf::write(
            &elf::Part {
                start,
                bytes: &table_bytes,
                named: &names,
            },
            &elf::Part {
                start: code_start,
                bytes: code.bytes(),
                named: code.named(),
            },
            &kernel.named(),
        ),
        thunks: code
            .named()
            .iter()
            .map(|one| (one.name.clone(), one.range.start))
            .collect(),
        tables,
        relocs,
        return_tails,
        traps: code.traps().to_vec(),
    })
}

fn named(name: &str, start: LinkVa, end: LinkVa) -> Named {
    Named {
        name: name.to_owned(),
        range: VaRange { start, end },
    }
}
