//! What is in a bundle, as tables and as JSON.

use crate::passes::FORWARD_CFI;
use comfy_table::{CellAlignment, Table as Grid, presets};
use penumbra_bundle::{Bundle, Cave, Kernel, Mitigation, SiteKind, Text, Variant, ViolationAction};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// A bundle summed up.
pub struct Summary<'a> {
    bundle: &'a Bundle,
    sites: BTreeMap<String, u64>,
}

#[derive(Serialize)]
struct Json<'a> {
    schema: &'a str,
    generator: &'a str,
    kernel: &'a Kernel,
    text: &'a Text,
    cave: &'a Cave,
    variants: &'a [Variant],
    poke_sites: &'a BTreeMap<String, u64>,
    functions: usize,
    symbols: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    forward: Option<Forward>,
    #[serde(skip_serializing_if = "Option::is_none")]
    modules: Option<Modules>,
    layout: &'a BTreeMap<String, u32>,
    data: &'a BTreeMap<String, penumbra_bundle::LinkVa>,
    /// What `return-cfi` measured, where it looks at functions.
    #[serde(rename = "return", skip_serializing_if = "Option::is_none")]
    returns: Option<BTreeMap<&'a str, u64>>,
    /// What a profile leaves of the text, where `debloat` has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    debloat: Option<&'a BTreeMap<String, u64>>,
}

/// How many entries indirect branches may reach, when they are checked by class.
#[derive(Serialize)]
struct Forward {
    /// Branches that are checked.
    sites: u64,
    /// The share of them that may reach functions of one prototype, or of a list that is narrower.
    unique_share: f64,
    /// Entries that a branch may reach.
    median: u64,
    mean: f64,
    /// Branches by what decides their class.
    by: BTreeMap<String, u64>,
}

impl Forward {
    fn of(variants: &[Variant]) -> Option<Forward> {
        let mut passes = variants.iter().flat_map(|variant| &variant.passes);
        let pass = passes.find(|pass| pass.name == FORWARD_CFI && !pass.figures.is_empty())?;
        let with = |prefix: &'static str| {
            let figures = pass.figures.iter();
            figures.filter_map(move |(key, value)| Some((key.strip_prefix(prefix)?, *value)))
        };
        let by: BTreeMap<String, u64> = with("by.").map(|(key, n)| (key.to_owned(), n)).collect();
        let sites: u64 = by.values().sum();
        let entries = with("set-size.").filter_map(|(size, n)| Some(size.parse::<u64>().ok()? * n));
        let unique = ["prototype", "functions"]
            .iter()
            .filter_map(|key| by.get(*key));
        let share = |part: u64| part as f64 / sites.max(1) as f64;
        Some(Forward {
            sites,
            unique_share: share(unique.sum()),
            median: pass.figures.get("median").copied().unwrap_or(0),
            mean: share(entries.sum()),
            by,
        })
    }
}

/// The modules of a bundle, counted.
#[derive(Serialize)]
struct Modules {
    count: usize,
    text_bytes: u64,
    relocations: usize,
    poke_sites: usize,
    edits: BTreeMap<String, usize>,
    left: BTreeMap<String, u64>,
}

impl Modules {
    fn of(bundle: &Bundle) -> Option<Modules> {
        let all = &bundle.modules;
        let mut left = BTreeMap::new();
        for (reason, count) in all.iter().flat_map(|module| &module.left) {
            *left.entry(reason.clone()).or_default() += count;
        }
        let names = bundle.manifest.variants.iter().enumerate();
        let edits = names.map(|(index, variant)| {
            let count = all.iter().map(|module| module.edits[index].len()).sum();
            (variant.name.clone(), count)
        });
        (!all.is_empty()).then(|| Modules {
            count: all.len(),
            text_bytes: all.iter().map(|module| u64::from(module.text_size)).sum(),
            relocations: all.iter().map(|module| module.relocs.len()).sum(),
            poke_sites: all.iter().map(|module| module.sites.len()).sum(),
            edits: edits.collect(),
            left,
        })
    }

    fn line(&self) -> String {
        let edits = self.edits.iter().filter(|(_, count)| **count > 0);
        let edits: Vec<String> = edits
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        let left: Vec<String> = self
            .left
            .iter()
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        let left = match left.is_empty() {
            true => String::new(),
            false => format!("; left alone: {}", left.join(", ")),
        };
        format!(
            "{}, {} KiB of text; edits: {}{left}",
            self.count,
            self.text_bytes / 1024,
            edits.join(", ")
        )
    }
}

impl<'a> Summary<'a> {
    /// Sums up.
    pub fn of(bundle: &'a Bundle) -> Summary<'a> {
        let mut sites = BTreeMap::new();
        for site in &bundle.model.sites {
            *sites.entry(kind_name(site.kind)).or_default() += 1;
        }
        Summary { bundle, sites }
    }

    /// For programs; addresses are strings.
    pub fn json(&self, schema: &str) -> String {
        let manifest = &self.bundle.manifest;
        let json = Json {
            schema,
            generator: &manifest.generator,
            kernel: &manifest.kernel,
            text: &manifest.text,
            cave: &manifest.cave,
            variants: &manifest.variants,
            poke_sites: &self.sites,
            functions: self.bundle.model.functions.len(),
            symbols: self.bundle.symbols.0.len(),
            forward: Forward::of(&manifest.variants),
            modules: Modules::of(self.bundle),
            layout: &manifest.layout,
            data: &manifest.data,
            // Returns by the size of their set are a picture in the report.
            returns: self.figures("return-cfi").map(|figures| {
                let figures = figures.iter().map(|(key, value)| (key.as_str(), *value));
                figures
                    .filter(|(key, _)| !key.starts_with("set-size."))
                    .collect()
            }),
            debloat: self.figures("debloat"),
        };
        super::json(&json)
    }

    /// What a pass measured in the first variant that has it.
    fn figures(&self, pass: &str) -> Option<&'a BTreeMap<String, u64>> {
        let passes = self.bundle.manifest.variants.iter();
        let mut passes = passes.flat_map(|variant| &variant.passes);
        let figures = &passes.find(|one| one.name == pass)?.figures;
        (!figures.is_empty()).then_some(figures)
    }

    /// For people.
    pub fn text(&self) -> String {
        let manifest = &self.bundle.manifest;
        let (kernel, cave) = (&manifest.kernel, &manifest.cave);
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<10} {value}");
        };
        line("kernel", kernel.release.clone());
        line("build-id", kernel.build_id.clone());
        line("image", format!("sha256 {}", kernel.image_sha256));
        line(
            "text",
            format!(
                "{} to {}, {} KiB",
                manifest.text.start,
                manifest.text.end,
                manifest.text.range().len() / 1024
            ),
        );
        line(
            "cave",
            format!(
                "{} to {}, {} KiB, {} relocations, {} return tails, {} traps",
                cave.range.start,
                cave.range.end,
                cave.range.len() / 1024,
                self.bundle.relocs.len(),
                cave.return_tails.len(),
                cave.traps.len()
            ),
        );
        line("written by", manifest.generator.clone());
        if let Some(modules) = Modules::of(self.bundle) {
            line("modules", modules.line());
        }
        if let Some(profile) = self.figures("debloat").and_then(profile_line) {
            line("profile", profile);
        }
        text.push('\n');
        text.push_str(&self.variants_table());

        let mut tables = grid(&["table", "addresses", "bytes", "speaks about"]);
        for table in &cave.tables {
            tables.add_row([
                table.name.clone(),
                table.count.to_string(),
                table.range.len().to_string(),
                format!("{} to {}", table.covers.start, table.covers.end),
            ]);
        }
        right(&mut tables, &[1, 2]);
        let mut kinds: BTreeMap<(&str, ViolationAction), u64> = BTreeMap::new();
        for trap in &cave.traps {
            *kinds.entry((&trap.pass, trap.action)).or_default() += 1;
        }
        let mut traps = grid(&["what is stopped", "traps", "reported, then"]);
        for ((pass, action), count) in kinds {
            traps.add_row([pass, &count.to_string(), consequence(action)]);
        }
        right(&mut traps, &[1]);
        let mut sites = grid(&["what the kernel itself edits", "sites"]);
        for (kind, count) in &self.sites {
            sites.add_row([kind.clone(), count.to_string()]);
        }
        right(&mut sites, &[1]);
        for grid in [tables, traps, sites] {
            let _ = write!(text, "\n{}\n", trimmed(&grid));
        }
        text
    }

    /// The modules, counted; empty when there are none.
    pub fn modules_line(&self) -> String {
        let modules = Modules::of(self.bundle);
        modules.map_or(String::new(), |modules| {
            format!("modules {}\n", modules.line())
        })
    }

    /// The variants and what each pass did.
    pub fn variants_table(&self) -> String {
        let mut variants = grid(&["variant", "pass", "edited", "left alone", "leaves out"]);
        for variant in &self.bundle.manifest.variants {
            let drops: Vec<&str> = variant.drops.iter().map(|one| mitigation(*one)).collect();
            let drops = drops.join(", ");
            if variant.passes.is_empty() {
                variants.add_row([variant.name.as_str(), "-", "0", "", &drops]);
            }
            for (n, pass) in variant.passes.iter().enumerate() {
                let left: Vec<String> = pass
                    .left
                    .iter()
                    .map(|(reason, count)| format!("{reason} {count}"))
                    .collect();
                let (name, drops) = if n == 0 {
                    (variant.name.as_str(), drops.as_str())
                } else {
                    ("", "")
                };
                variants.add_row([
                    name,
                    &pass.name,
                    &pass.edited.to_string(),
                    &left.join(", "),
                    drops,
                ]);
            }
        }
        right(&mut variants, &[2]);
        trimmed(&variants) + "\n"
    }
}

/// What a profile leaves of the text.
fn profile_line(figures: &BTreeMap<String, u64>) -> Option<String> {
    let figure = |name: &str| figures.get(name).copied();
    let (inside, outside) = (figure("bytes-inside")?, figure("bytes-outside")?);
    let share = 100.0 * inside as f64 / (inside + outside).max(1) as f64;
    Some(format!(
        "{share:.0} % of the text can be reached, {} KiB of {}; {} functions ran, {} are outside",
        inside / 1024,
        (inside + outside) / 1024,
        figure("functions-in-profile")?,
        figure("functions-outside")?,
    ))
}

/// A table for a terminal.
pub(super) fn grid(header: &[&str]) -> Grid {
    let mut grid = Grid::new();
    grid.load_preset(presets::NOTHING).set_header(header);
    grid
}

/// Aligns columns of numbers.
pub(super) fn right(grid: &mut Grid, columns: &[usize]) {
    for column in columns {
        if let Some(column) = grid.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// Without the blanks that fill each line's end.
pub(super) fn trimmed(grid: &Grid) -> String {
    let lines: Vec<String> = grid
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect();
    lines.join("\n")
}

fn consequence(action: ViolationAction) -> &'static str {
    match action {
        ViolationAction::Kill => "kill: the kernel ends the task",
        ViolationAction::Log => "log: goes on",
        ViolationAction::Panic => "panic: the kernel stops",
    }
}

/// A mitigation's name.
pub(super) fn mitigation(one: Mitigation) -> &'static str {
    match one {
        Mitigation::Retpoline => "retpoline",
        Mitigation::ReturnThunk => "return-thunk",
    }
}

/// As in the bundle's own spelling.
pub(super) fn kind_name(kind: SiteKind) -> String {
    match serde_json::to_value(kind) {
        Ok(serde_json::Value::String(name)) => name,
        _ => format!("{kind:?}"),
    }
}
