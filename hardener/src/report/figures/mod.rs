//! `hardener report`: a bundle in figures, for a terminal, for programs and as a page with pictures.

mod charts;
mod cost;
mod page;
mod sections;

use super::cave::CaveView;
use super::explain::ExplainError;
use super::summary::{grid, mitigation, right, trimmed};
use crate::passes;
use cost::Cost;
use penumbra_bundle::{Bundle, PassSummary, SlotKind};
use sections::{Map, Section};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// How [`PassSummary::figures`] names the number of slots whose set has so many members.
const SET_SIZE: &str = "set-size.";

/// A bundle in figures.
#[derive(Serialize)]
pub struct Report {
    schema: &'static str,
    kernel: String,
    build_id: String,
    generator: String,
    text_bytes: u64,
    functions: usize,
    variants: Vec<VariantReport>,
    /// What may be reached, for each pass that checks it.
    targets: Vec<Targets>,
    sections: Vec<Section>,
    map: Map,
    costs: Vec<Cost>,
}

#[derive(Serialize)]
struct VariantReport {
    name: String,
    leaves_out: Vec<&'static str>,
    passes: Vec<PassReport>,
}

#[derive(Serialize)]
struct PassReport {
    name: String,
    does: &'static str,
    slot: Option<SlotKind>,
    edited: u64,
    left: BTreeMap<String, u64>,
    parameters: BTreeMap<String, String>,
}

/// Where the slots of a pass may go, before and after.
#[derive(Serialize)]
struct Targets {
    variant: String,
    pass: String,
    slot: SlotKind,
    /// Addresses that a slot may reach without the pass: every byte of the text.
    before: u64,
    /// Slots by the size of the set that they may reach, ascending.
    classes: Vec<Class>,
    median: u64,
    p90: u64,
    mean: f64,
    /// Members of the pass's tables, all together.
    members: u64,
    /// The mean set's share of [`Targets::before`].
    left: f64,
}

/// Slots whose sets have one size.
#[derive(Serialize)]
struct Class {
    size: u64,
    slots: u64,
}

impl Targets {
    /// Of slots by the size of their sets; `None` when there are none.
    fn of(
        variant: &str,
        pass: &str,
        slot: SlotKind,
        before: u64,
        members: u64,
        sizes: &BTreeMap<u64, u64>,
    ) -> Option<Targets> {
        let slots: u64 = sizes.values().sum();
        let quantile = |per_cent: u64| {
            let mut seen = 0;
            let found = sizes.iter().find(|(_, count)| {
                seen += **count;
                seen * 100 >= slots * per_cent
            });
            found.map(|(size, _)| *size)
        };
        let (median, p90) = (quantile(50)?, quantile(90)?);
        if slots == 0 {
            return None;
        }
        let sum: u64 = sizes.iter().map(|(size, count)| size * count).sum();
        let mean = sum as f64 / slots as f64;
        let classes = sizes.iter().map(|(size, slots)| Class {
            size: *size,
            slots: *slots,
        });
        Some(Targets {
            variant: variant.to_owned(),
            pass: pass.to_owned(),
            slot,
            before,
            classes: classes.collect(),
            median,
            p90,
            mean,
            members,
            left: mean / before as f64,
        })
    }
}

/// Computes a bundle's figures.
pub fn report(bundle: &Bundle) -> Result<Report, ExplainError> {
    let cave = CaveView::read(bundle).map_err(ExplainError::Cave)?;
    let manifest = &bundle.manifest;
    let known = passes::known();
    let variants = manifest.variants.iter().map(|variant| VariantReport {
        name: variant.name.clone(),
        leaves_out: variant.drops.iter().map(|one| mitigation(*one)).collect(),
        passes: variant
            .passes
            .iter()
            .map(|pass| {
                let own = known.get(pass.name.as_str());
                PassReport {
                    name: pass.name.clone(),
                    does: own.map_or("", |pass| pass.does()),
                    slot: own.map(|pass| pass.slot()),
                    edited: pass.edited,
                    left: pass.left.clone(),
                    parameters: pass.parameters.clone(),
                }
            })
            .collect(),
    });
    let before = manifest.text.range().len();
    let mut targets = Vec::new();
    for variant in &manifest.variants {
        for pass in &variant.passes {
            let Some(slot) = known.get(pass.name.as_str()).map(|pass| pass.slot()) else {
                continue;
            };
            let members = cost::members(&cave, manifest, &pass.name);
            let sizes = sizes(pass, members);
            targets.extend(Targets::of(
                &variant.name,
                &pass.name,
                slot,
                before,
                members,
                &sizes,
            ));
        }
    }
    Ok(Report {
        schema: "penumbra.report/v1",
        kernel: manifest.kernel.release.clone(),
        build_id: manifest.kernel.build_id.clone(),
        generator: manifest.generator.clone(),
        text_bytes: before,
        functions: bundle.model.functions.len(),
        variants: variants.collect(),
        targets,
        sections: sections::of(bundle),
        map: sections::map(bundle),
        costs: cost::of(bundle, &cave),
    })
}

/// Slots by the size of the set that each may reach: what the pass says, else all of them share its tables.
fn sizes(pass: &PassSummary, members: u64) -> BTreeMap<u64, u64> {
    let said = pass.figures.iter().filter_map(|(name, slots)| {
        let size = name.strip_prefix(SET_SIZE)?.parse().ok()?;
        (*slots > 0).then_some((size, *slots))
    });
    let said: BTreeMap<u64, u64> = said.collect();
    if !said.is_empty() || members == 0 || pass.edited == 0 {
        return said;
    }
    BTreeMap::from([(members, pass.edited)])
}

impl Report {
    /// For programs.
    pub fn json(&self) -> String {
        super::json(self)
    }

    /// One file with everything in it: pictures, no script, nothing that is fetched.
    pub fn html(&self) -> String {
        page::write(self)
    }

    /// For people at a terminal.
    pub fn text(&self) -> String {
        let mut out = format!(
            "kernel {}, {} KiB of text, {} functions\n\n",
            self.kernel,
            self.text_bytes / 1024,
            self.functions
        );
        let mut table = grid(&["variant", "pass", "slots", "left alone", "what it does"]);
        for variant in &self.variants {
            for pass in &variant.passes {
                let (left, edited) = (pass.left.values().sum::<u64>(), pass.edited);
                table.add_row([
                    variant.name.clone(),
                    pass.name.clone(),
                    edited.to_string(),
                    left.to_string(),
                    pass.does.to_owned(),
                ]);
            }
        }
        right(&mut table, &[2, 3]);
        let _ = writeln!(out, "{}\n", trimmed(&table));

        let mut table = grid(&[
            "where slots may go",
            "before",
            "after: median",
            "p90",
            "mean",
            "share left",
        ]);
        for one in &self.targets {
            table.add_row([
                format!("{} ({})", one.pass, one.variant),
                one.before.to_string(),
                one.median.to_string(),
                one.p90.to_string(),
                format!("{:.1}", one.mean),
                per_cent(one.left),
            ]);
        }
        right(&mut table, &[1, 2, 3, 4, 5]);
        let _ = writeln!(out, "{}\n", trimmed(&table));

        let mut table = grid(&["text", "from", "KiB", "returns", "indirect", "calls"]);
        for one in &self.sections {
            table.add_row([
                one.name.clone(),
                one.range.start.to_string(),
                format!("{:.1}", one.range.len() as f64 / 1024.0),
                one.slots.returns.to_string(),
                one.slots.indirect.to_string(),
                one.slots.calls.to_string(),
            ]);
        }
        right(&mut table, &[2, 3, 4, 5]);
        let _ = writeln!(out, "{}\n", trimmed(&table));

        let mut table = grid(&[
            "instructions more per slot",
            "slot",
            "slots",
            "least",
            "usual",
            "most",
        ]);
        for one in &self.costs {
            let (letter, what) = super::place::slot(one.slot);
            table.add_row([
                format!("{} ({})", one.pass, one.variant),
                format!("{letter}, {what}"),
                one.slots.to_string(),
                one.least.to_string(),
                format!("{:.1}", one.usual),
                one.most
                    .map_or("unbounded".to_owned(), |most| most.to_string()),
            ]);
        }
        right(&mut table, &[2, 3, 4, 5]);
        let _ = writeln!(out, "{}", trimmed(&table));
        out
    }
}

/// A share for people: small ones keep two digits that say something.
fn per_cent(share: f64) -> String {
    let value = share * 100.0;
    if value == 0.0 || value >= 1.0 {
        return format!("{value:.1} %");
    }
    let digits = (1.0 - value.log10().floor()) as usize;
    format!("{value:.digits$} %")
}

#[cfg(test)]
mod tests {
    use super::{Targets, per_cent, sizes};
    use penumbra_bundle::{PassSummary, SlotKind};
    use std::collections::BTreeMap;

    fn pass(figures: &[(&str, u64)]) -> PassSummary {
        PassSummary {
            name: "p".to_owned(),
            edited: 12,
            left: BTreeMap::new(),
            parameters: BTreeMap::new(),
            figures: figures
                .iter()
                .map(|(name, count)| ((*name).to_owned(), *count))
                .collect(),
        }
    }

    #[test]
    fn sets_are_as_the_pass_says_or_one_for_all() {
        let said = pass(&[("set-size.2", 9), ("set-size.1000", 3), ("median", 2)]);
        assert_eq!(sizes(&said, 77), BTreeMap::from([(2, 9), (1000, 3)]));
        assert_eq!(sizes(&pass(&[]), 77), BTreeMap::from([(77, 12)]));
        assert_eq!(sizes(&pass(&[]), 0), BTreeMap::new());
    }

    #[test]
    fn quantiles_count_slots_and_not_sizes() {
        let of = |sizes: &[(u64, u64)]| {
            let sizes = sizes.iter().copied().collect();
            Targets::of("v", "p", SlotKind::Return, 1000, 0, &sizes)
        };
        let targets = of(&[(1, 5), (4, 4), (100, 1)]).unwrap();
        assert_eq!((targets.median, targets.p90), (1, 4));
        assert_eq!(targets.mean, 12.1);
        assert_eq!(targets.left, 0.0121);
        assert!(of(&[]).is_none());
    }

    #[test]
    fn shares_keep_what_they_say() {
        assert_eq!(per_cent(0.5), "50.0 %");
        assert_eq!(per_cent(0.0123), "1.2 %");
        assert_eq!(per_cent(0.000_123), "0.012 %");
        assert_eq!(per_cent(0.0), "0.0 %");
    }
}
