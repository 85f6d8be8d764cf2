//! `hardener emit`: from an image to a bundle.

use crate::image::{Fault, Image, ImageError, KernelFiles, Lacks};
use crate::layout;
use crate::modules::{Modules, Refused};
use crate::passes::{self, Analyses, Context, PassError};
use crate::recipe::{Recipe, RecipeError};
use crate::text::callgraph::CallGraph;
use crate::text::changeable::Changeable;
use crate::text::exposed::Exposed;
use crate::text::large_frames::LargeFrames;
use crate::text::outside::Outside;
use crate::text::probed::Probed;
use crate::text::promotion::Promotion;
use crate::text::return_sets::ReturnSets;
use crate::text::stack_use::StackUse;
use crate::text::zeroing::Zeroing;
use crate::text::{self, REGISTERS, Span, Text, TextError};
use crate::thunks::{self, CaveContents, KernelThunks};
use crate::types;
use penumbra_bundle::{
    Bundle, Cave, FileRef, Kernel, LinkVa, Manifest, Module, ModuleName, ModuleSet, Reloc,
    RelocKind, SCHEMA, Symbol, Symbols, TextOff, VaRange, Variant, ViolationAction, Watched,
    WriteError,
};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::PathBuf;
use thiserror::Error;

/// Symbols that the analysis of the text and of the kernel's own tables cannot do without.
const TEXT: &[&str] = &[
    "__entry_text_start",
    "__entry_text_end",
    "__noinstr_text_start",
    "__noinstr_text_end",
    "__static_call_text_start",
    "__static_call_text_end",
    "__start_mcount_loc",
    "__stop_mcount_loc",
    "__start___jump_table",
    "__stop___jump_table",
    "__start_static_call_sites",
    "__stop_static_call_sites",
    "__x86_return_thunk",
    "entry_SYSCALL_64",
    "panic",
];

/// Why there is no bundle.
#[derive(Debug, Error)]
pub enum EmitError {
    /// The recipe is refused.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The image cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The kernel in it cannot be taken.
    #[error("{file}: {source}")]
    Text {
        /// The image.
        file: String,
        /// Why.
        source: TextError,
    },
    /// A module cannot be taken.
    #[error(transparent)]
    Module(#[from] Refused),
    /// A pass is at fault.
    #[error("{file}: {source}")]
    Pass {
        /// The image.
        file: String,
        /// Why.
        source: PassError,
    },
    /// The bundle cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// The stages of the work, for progress.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Unpacking the image and reading its tables.
    Image,
    /// Sweeping the text, finding slots and targets.
    Text,
    /// Modelling what the kernel itself edits.
    Model,
    /// Reading modules.
    Modules,
    /// Assembling thunks and tables.
    Thunks,
    /// Running the passes.
    Passes,
    /// Writing the bundle.
    Write,
}

impl Stage {
    /// What a person is told.
    pub fn label(self) -> &'static str {
        match self {
            Stage::Image => "unpacking the kernel, reading its tables",
            Stage::Text => "sweeping the text",
            Stage::Model => "modelling what the kernel edits itself",
            Stage::Modules => "reading modules",
            Stage::Thunks => "assembling thunks and tables",
            Stage::Passes => "running the passes",
            Stage::Write => "writing the bundle",
        }
    }
}

/// Reads the kernel at `image` and makes its bundle as `recipe` says; `progress` hears of each stage as it starts.
pub fn emit<'a>(
    image: impl Into<KernelFiles<'a>>,
    recipe: &Recipe,
    progress: &mut dyn FnMut(Stage),
) -> Result<Bundle, EmitError> {
    Ok(emit_with(image, recipe, &[], progress)?.bundle)
}

/// A bundle, and the modules that are not in it though they were there.
pub struct Emitted {
    /// The bundle.
    pub bundle: Bundle,
    /// Modules found in a folder that cannot be taken.
    pub refused: Vec<Refused>,
    /// What the kernel has no room for, and what takes its place, for people.
    pub given_up: Vec<String>,
    /// Whether tasks are ended outside a profile that has no such end.
    pub lacks_oops: bool,
}

/// Like [`emit`], with the modules in `modules`: files, or folders of them.
pub fn emit_with<'a>(
    image: impl Into<KernelFiles<'a>>,
    recipe: &Recipe,
    modules: &[PathBuf],
    progress: &mut dyn FnMut(Stage),
) -> Result<Emitted, EmitError> {
    let files = image.into();
    let file = files.image.display().to_string();
    progress(Stage::Image);
    let image = Image::open(files)?;
    bundle(&image, recipe, modules, progress).map_err(|error| match error {
        Failure::Text(source) => EmitError::Text { file, source },
        Failure::Pass(source) => EmitError::Pass { file, source },
        Failure::Module(refused) => EmitError::Module(refused),
    })
}

/// What can fail between the image and the bundle.
enum Failure {
    Text(TextError),
    Pass(PassError),
    Module(Refused),
}

impl<E: Into<TextError>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::Text(error.into())
    }
}

fn bundle(
    image: &Image,
    recipe: &Recipe,
    modules: &[PathBuf],
    progress: &mut dyn FnMut(Stage),
) -> Result<Emitted, Failure> {
    let mut lacks = Lacks::default();
    for name in TEXT {
        lacks.note(image.need_symbol(name).map(drop))?;
    }
    let data = layout::data(image, &mut lacks)?;
    let layout = layout::members(image, &mut lacks)?;
    let tables = lacks.note(image.tables())?;
    lacks.none()?;
    progress(Stage::Text);
    let choices = recipe.choices();
    let asked = |wants: fn(&Recipe) -> bool| choices.iter().any(wants);
    // What the kernel edits itself and its types need nothing that the text says.
    let (text, (model, btf)) = rayon::join(
        || Text::analyse(image, &tables),
        || {
            let model = Span::of(image).and_then(|span| text::model::build(image, &tables, span));
            (
                model,
                asked(passes::is_typed).then(|| types::Btf::of(image)),
            )
        },
    );
    let mut text = text?;
    progress(Stage::Model);
    let model = model?;
    let kernel = kernel_thunks(image)?;
    if !modules.is_empty() {
        progress(Stage::Modules);
    }
    let mut modules = Modules::read(image, &kernel, modules).map_err(Failure::Module)?;
    progress(Stage::Thunks);
    let btf = btf.transpose()?;
    let (by_function, by_frame) = (asked(passes::is_per_function), asked(passes::is_by_frame));
    let by_change = asked(passes::is_by_change);
    let zeroing = asked(passes::is_zeroing);
    let (profile, probes, limits) = (
        passes::debloat_profile(recipe),
        passes::probed_functions(recipe),
        passes::stack_limits(recipe),
    );
    // Prototypes, stack and callers need nothing of each other.
    let (
        (forward, stack),
        (graph, (outside, probed, large), return_sets, (exposed, changeable, zeroing)),
    ) = rayon::join(
        || {
            rayon::join(
                || {
                    let btf = btf.as_ref();
                    btf.map(|btf| types::analyse(image, btf, &tables, &text))
                },
                || asked(passes::is_clearing).then(|| StackUse::find(image, &tables, &text)),
            )
        },
        || {
            let wanted = by_function
                || by_frame
                || by_change
                || zeroing
                || profile.is_some()
                || probes.is_some()
                || limits.is_some();
            let mut graph = wanted.then(|| CallGraph::build(image, &tables, &text));
            let outside = profile
                .zip(graph.as_mut())
                .map(|((profile, widen), graph)| {
                    let outside = Outside::find(image, &tables, &text, graph, &profile, widen)?;
                    graph.redirect(&text, &outside.watched.functions);
                    Ok::<Outside, Fault>(outside)
                });
            let probed = probes.zip(graph.as_mut()).map(|(list, graph)| {
                let outside = outside.as_ref().and_then(|outside| outside.as_ref().ok());
                let probed = Probed::find(image, &tables, &text, &list, outside)?;
                graph.redirect(&text, &probed.watched.functions);
                Ok::<Probed, Fault>(probed)
            });
            let large = limits.zip(graph.as_mut()).map(|(limits, graph)| {
                let outside = outside.as_ref().and_then(|outside| outside.as_ref().ok());
                let probed = probed.as_ref().and_then(|probed| probed.as_ref().ok());
                let elsewhere = |at| {
                    outside.is_some_and(|outside| outside.watched.contains(at))
                        || probed.is_some_and(|probed| probed.watched.contains(at))
                };
                let large = LargeFrames::find(image, &tables, &text, limits, elsewhere)?;
                graph.redirect(&text, &large.watched.functions);
                Ok::<LargeFrames, Fault>(large)
            });
            if let Some(graph) = &mut graph {
                graph.redirect(&text, &passes::left_out(&text, recipe));
            }
            let of = |wanted: bool| graph.as_ref().filter(|_| wanted);
            let (return_sets, others) = rayon::join(
                || of(by_function).map(|graph| ReturnSets::find(image, &tables, &text, graph)),
                || {
                    let (exposed, changeable) = (
                        of(by_frame).map(|graph| Exposed::find(&text, graph)),
                        of(by_change).map(|graph| Changeable::find(&tables, &text, graph)),
                    );
                    let zeroing =
                        of(zeroing).map(|graph| Zeroing::find(image, &tables, &text, graph));
                    (exposed, changeable, zeroing)
                },
            );
            (graph, (outside, probed, large), return_sets, others)
        },
    );
    let mut forward = forward.transpose()?;
    let (outside, probed) = (outside.transpose()?, probed.transpose()?);
    let large = large.transpose()?;
    let narrowed = outside.as_ref().filter(|_| passes::narrows_targets(recipe));
    if let Some(outside) = narrowed {
        text.entries.retain(|at| !outside.watched.contains(*at));
        text.landings.retain(|at| !outside.watched.contains(*at));
        if let Some(forward) = &mut forward {
            forward.retain(|at| !outside.watched.contains(at));
        }
    }
    let known = return_sets.as_ref().zip(graph.as_ref());
    let known = known.zip(forward.as_ref().filter(|_| asked(passes::is_by_class)));
    let classed = known.map(|((sets, graph), forward)| {
        let most = thunks::most_return_classes(text.range);
        sets.by_class(image, &text, graph, forward, most)
    });
    let profile = passes::promote_profile(recipe);
    let promotion = profile.map(|profile| Promotion::find(image, &text, &profile));
    let for_choice = |choice: &Recipe| Analyses {
        forward: forward.as_ref().filter(|_| passes::is_typed(choice)),
        return_sets: match passes::is_by_class(choice) {
            true => classed.as_ref(),
            false => return_sets
                .as_ref()
                .filter(|_| passes::is_per_function(choice)),
        },
        exposed: exposed.as_ref().filter(|_| passes::is_by_frame(choice)),
        changeable: changeable.as_ref().filter(|_| passes::is_by_change(choice)),
        zeroing: zeroing.as_ref(),
        stack: stack.as_ref(),
        promotion: promotion.as_ref(),
        outside: outside.as_ref(),
        probed: probed.as_ref(),
        large_frames: large.as_ref(),
    };
    let slots = modules.slots();
    let build = |choice: &Recipe| thunks::build(&text, &slots, &kernel, choice, for_choice(choice));
    let mut recipe_used = recipe;
    let mut cave = None;
    for choice in &choices {
        recipe_used = choice;
        let made = cave.insert(build(choice));
        // The next one may need less.
        let too_much = |error: &TextError| matches!(error, TextError::Cave { .. });
        if !made.as_ref().is_err_and(too_much) {
            break;
        }
    }
    let cave = cave.unwrap_or_else(|| build(recipe))?;
    let analyses = for_choice(recipe_used);
    let forward = analyses.forward;
    progress(Stage::Passes);
    let context = Context {
        text: &text,
        cave: &cave,
        recipe: recipe_used,
        analyses,
    };
    let (mut variants, mut edits) = (Vec::new(), Vec::new());
    let all = passes::VARIANTS;
    let made = all.par_iter().map(|(name, passes)| {
        let made = passes::run(name, passes, &context);
        made.map(|made| (*name, made))
    });
    for made in made.collect::<Vec<_>>() {
        let (name, made) = made.map_err(Failure::Pass)?;
        variants.push(Variant {
            name: name.to_owned(),
            passes: made.passes,
            drops: made.drops,
            edits: file_ref(&format!("{name}.edits")),
            edit_count: made.edits.0.len() as u64,
        });
        edits.push(made.edits);
    }
    let refused = std::mem::take(&mut modules.refused);
    let modules = modules.finish(&cave, recipe_used).map_err(Failure::Pass)?;
    let mut manifest = manifest(image, &text, &cave, variants, layout, data)?;
    manifest.forward = forward.map(|_| file_ref("forward.postcard"));
    let backward = analyses.return_sets.and_then(|sets| sets.claims(&text));
    manifest.backward = backward.as_ref().map(|_| file_ref("backward.postcard"));
    let ends = recipe.on_violation(passes::DEBLOAT) == ViolationAction::Kill;
    let lacks_oops = ends && outside.as_ref().is_some_and(|outside| !outside.has_oops);
    let watching = outside.is_some() || probed.is_some() || large.is_some();
    manifest.watched = watching.then(|| file_ref("watched.postcard"));
    manifest.modules = module_set(&modules);
    let symbols = symbols(image, &text);
    let bundle = Bundle {
        manifest,
        text: text.bytes,
        model,
        symbols,
        relocs: relocs(&cave.relocs, text.range.start),
        cave: cave.elf,
        edits,
        forward: forward.map(|forward| forward.claims()),
        backward,
        watched: watching.then(|| Watched {
            outside: outside.map_or(Vec::new(), |outside| outside.watched.functions),
            probed: probed.map_or(Vec::new(), |probed| probed.watched.functions),
            large: large.map_or(Vec::new(), |large| large.watched.functions),
        }),
        modules,
    };
    Ok(Emitted {
        bundle,
        refused,
        given_up: recipe.given_up(recipe_used),
        lacks_oops,
    })
}

/// The absolute addresses in the cave, as offsets from the text's start.
fn relocs(places: &[LinkVa], start: LinkVa) -> Vec<Reloc> {
    let places = places.iter();
    let relocs = places.map(|at| Reloc {
        at: TextOff((at.0 - start.0) as u32),
        kind: RelocKind::Abs32,
    });
    relocs.collect()
}

/// Names the modules, if there are any.
fn module_set(modules: &[Module]) -> Option<ModuleSet> {
    let names = modules.iter().map(|module| ModuleName {
        name: module.name.clone(),
        build_id: module.build_id.clone(),
    });
    (!modules.is_empty()).then(|| ModuleSet {
        file: file_ref("modules.postcard"),
        modules: names.collect(),
    })
}

/// The kernel's own thunks, by symbol.
pub fn kernel_thunks(image: &Image) -> Result<KernelThunks, Fault> {
    let mut indirect = BTreeMap::new();
    for (number, name) in (0u8..).zip(REGISTERS) {
        if let Some(va) = image.symbol(&format!("__x86_indirect_thunk_{name}")) {
            indirect.insert(number, va);
        }
    }
    Ok(KernelThunks {
        return_thunk: image.need_symbol("__x86_return_thunk")?,
        indirect,
        panic: image.need_symbol("panic")?,
        module_cleanup: image.symbol(thunks::MODULE_CLEANUP),
    })
}

/// A file of the bundle; its digest is computed when the bundle is written.
fn file_ref(name: &str) -> FileRef {
    FileRef {
        name: name.to_owned(),
        sha256: String::new(),
    }
}

fn manifest(
    image: &Image,
    text: &Text,
    cave: &CaveContents,
    variants: Vec<Variant>,
    layout: BTreeMap<String, u32>,
    data: BTreeMap<String, LinkVa>,
) -> Result<Manifest, Fault> {
    let banner = image.banner()?;
    let release = banner.split(' ').nth(2).unwrap_or_default().to_owned();
    let notes = image.section(".notes").map(|section| section.range);
    Ok(Manifest {
        schema: SCHEMA.to_owned(),
        generator: concat!("hardener ", env!("CARGO_PKG_VERSION")).to_owned(),
        kernel: Kernel {
            build_id: image.build_id.hex.clone(),
            release,
            banner,
            image_sha256: image.sha256.clone(),
            notes: notes.unwrap_or(VaRange {
                start: LinkVa(0),
                end: LinkVa(0),
            }),
            syscall_entry: image.need_symbol("entry_SYSCALL_64")?,
        },
        text: penumbra_bundle::Text {
            start: text.range.start,
            end: text.range.end,
            file: file_ref("text.bin"),
        },
        model: file_ref("model.postcard"),
        symbols: file_ref("symbols.postcard"),
        cave: Cave {
            range: cave.range,
            filler: text::FILLER,
            file: file_ref("cave.elf"),
            relocs: file_ref("relocations.postcard"),
            return_tails: cave.return_tails.clone(),
            tables: cave.tables.clone(),
            traps: cave.traps.clone(),
        },
        variants,
        forward: None,
        backward: None,
        watched: None,
        modules: None,
        layout,
        data,
    })
}

/// Every symbol in the text's pages, whatever its kind.
fn symbols(image: &Image, text: &Text) -> Symbols {
    let inside = image
        .symbols
        .iter()
        .filter(|symbol| text.range.contains(symbol.va));
    let named = inside.map(|symbol| Symbol {
        at: penumbra_bundle::TextOff((symbol.va.0 - text.range.start.0) as u32),
        name: symbol.name.clone(),
    });
    Symbols(named.collect())
}
