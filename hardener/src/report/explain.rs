//! `hardener explain`: what stands at an address or in a function in each variant, and why.

use super::cave::CaveView;
use super::listing::{Lister, Names, spaced};
use super::place::{self, Place};
use crate::passes;
use penumbra_bundle::{Bundle, Edit, LinkVa, SiteKind, SlotKind, TextOff, VaRange, Variant};
use serde::Serialize;
use std::collections::BTreeMap;
use thiserror::Error;

/// Instructions that are shown on either side of one that was asked for.
const AROUND: usize = 5;

/// Why nothing can be explained.
#[derive(Debug, Error)]
pub enum ExplainError {
    /// What was asked for is nowhere.
    #[error(transparent)]
    Place(#[from] place::PlaceError),
    /// `cave.elf` is no ELF file.
    #[error("cave.elf: {0}; emit the bundle again with this version of hardener")]
    Cave(String),
}

/// What is said about an address or a function.
#[derive(Serialize)]
pub struct Explanation {
    schema: &'static str,
    kernel: String,
    build_id: String,
    /// The function or thunk, and what it is.
    name: String,
    kind: &'static str,
    range: VaRange,
    /// Other names of the same address.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    aliases: Vec<String>,
    /// The address that was asked for; none when it was a whole function.
    #[serde(skip_serializing_if = "Option::is_none")]
    at: Option<LinkVa>,
    variants: Vec<String>,
    instructions: Vec<Row>,
    /// What the tables say about the address, or about the function's first.
    tables: BTreeMap<String, bool>,
    /// How many slots of each variant end here: for a thunk.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    slots: BTreeMap<String, u64>,
}

/// One instruction, in every variant.
#[derive(Serialize)]
struct Row {
    at: LinkVa,
    name: Option<String>,
    bytes: String,
    text: String,
    /// What the kernel itself may write here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    poked: Vec<SiteKind>,
    /// What a trap reports here: for a thunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    reports: Option<String>,
    /// The variants that have something else here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    edits: Vec<Edited>,
    /// Why no variant edits a slot here.
    #[serde(skip_serializing_if = "Option::is_none")]
    left: Option<String>,
}

#[derive(Serialize)]
struct Edited {
    variant: String,
    slot: SlotKind,
    bytes: String,
    text: String,
    /// Where it goes in the cave.
    #[serde(skip_serializing_if = "Option::is_none")]
    thunk: Option<String>,
    /// The pass that put it there, and what that does.
    pass: String,
    does: String,
    parameters: BTreeMap<String, String>,
}

/// Explains `what`: an address, a symbol, or a symbol and an offset.
pub fn explain(bundle: &Bundle, what: &str) -> Result<Explanation, ExplainError> {
    let cave = CaveView::read(bundle).map_err(ExplainError::Cave)?;
    let place = place::find(bundle, &cave, what)?;
    let names = Names::of(bundle, &cave);
    let mut explainer = Explainer {
        bundle,
        lister: Lister::new(&names),
        cave,
        names,
    };
    Ok(explainer.explanation(place))
}

struct Explainer<'a> {
    bundle: &'a Bundle,
    cave: CaveView<'a>,
    names: std::rc::Rc<Names>,
    lister: Lister,
}

impl Explainer<'_> {
    fn explanation(&mut self, place: Place) -> Explanation {
        let manifest = &self.bundle.manifest;
        let subject = place.at.unwrap_or(place.range.start);
        let bytes = match place.thunk {
            true => self.cave.bytes(place.range).unwrap_or_default(),
            false => {
                let from = (place.range.start.0 - manifest.text.start.0) as usize;
                let to = (place.range.end.0 - manifest.text.start.0) as usize;
                self.bundle.text.get(from..to).unwrap_or_default()
            }
        };
        let lines = self.lister.lines(place.range.start, bytes);
        let holds = |at: LinkVa, len: usize, va: LinkVa| at <= va && va.0 < at.0 + len as u64;
        let center = place.at.and_then(|at| {
            let found = |line: &super::listing::Line| holds(line.at, line.bytes.len(), at);
            lines.iter().position(found)
        });
        let shown = match center {
            Some(center) => center.saturating_sub(AROUND)..(center + AROUND + 1).min(lines.len()),
            None => 0..lines.len(),
        };
        let rows: Vec<Row> = lines[shown]
            .iter()
            .map(|line| match place.thunk {
                true => self.in_thunk(line),
                false => self.in_text(line),
            })
            .collect();
        let tables = manifest.cave.tables.iter().filter_map(|table| {
            let said = self.cave.holds(table, subject)?;
            Some((table.name.clone(), said))
        });
        let tables = tables.collect();
        let slots = if place.thunk {
            self.users(place.range)
        } else {
            BTreeMap::new()
        };
        Explanation {
            schema: "penumbra.explain/v1",
            kernel: manifest.kernel.release.clone(),
            build_id: manifest.kernel.build_id.clone(),
            name: place.name,
            kind: if place.thunk { "thunk" } else { "function" },
            range: place.range,
            aliases: place.aliases,
            at: place.at,
            variants: manifest
                .variants
                .iter()
                .map(|one| one.name.clone())
                .collect(),
            instructions: rows,
            tables,
            slots,
        }
    }

    fn in_text(&mut self, line: &super::listing::Line) -> Row {
        let manifest = &self.bundle.manifest;
        let at = TextOff((line.at.0 - manifest.text.start.0) as u32);
        let end = at.0 + line.bytes.len() as u32;
        // Sites are by start and at most 255 bytes long.
        let sites = &self.bundle.model.sites;
        let first = sites.partition_point(|site| site.at.0 + 255 < at.0);
        let near = sites[first..].iter().take_while(|site| site.at.0 < end);
        let mut poked: Vec<SiteKind> = near
            .filter(|site| site.at.0 + u32::from(site.len) > at.0)
            .map(|site| site.kind)
            .collect();
        poked.dedup();
        let mut edits = Vec::new();
        for (variant, list) in manifest.variants.iter().zip(&self.bundle.edits) {
            if let Ok(index) = list.0.binary_search_by_key(&at, |edit| edit.at) {
                edits.push(self.edited(variant, &list.0[index], line.at));
            }
        }
        let left = edits.is_empty().then(|| self.why_not(&poked)).flatten();
        Row {
            at: line.at,
            name: self.names.name(line.at),
            bytes: spaced(&line.bytes),
            text: line.text.clone(),
            poked,
            reports: None,
            edits,
            left,
        }
    }

    fn edited(&mut self, variant: &Variant, edit: &Edit, at: LinkVa) -> Edited {
        let lines = self.lister.lines(at, &edit.bytes);
        let text: Vec<&str> = lines.iter().map(|line| line.text.as_str()).collect();
        let target = lines.last().and_then(|line| line.target);
        let thunk = target.and_then(|target| self.cave.thunk_at(target).cloned());
        let cave = &self.bundle.manifest.cave;
        let pass = place::pass_of(cave, variant, edit.slot, thunk.as_ref());
        let known = passes::known();
        let does = known
            .get(pass.map_or("", |pass| &pass.name))
            .map(|pass| pass.does());
        let sharing = known.values().filter(|pass| {
            let named = thunk.as_ref().is_some_and(|thunk| pass.is_in(&thunk.name));
            named && pass.shares_slots() && pass.slot() == edit.slot
        });
        let also: String = sharing
            .map(|pass| format!("; {}: {}", pass.name(), pass.does()))
            .collect();
        Edited {
            variant: variant.name.clone(),
            slot: edit.slot,
            bytes: spaced(&edit.bytes),
            text: text.join("; "),
            thunk: thunk.map(|thunk| thunk.name),
            pass: pass
                .map_or("a pass unknown to this version", |pass| &pass.name)
                .to_owned(),
            does: does.unwrap_or("").to_owned() + &also,
            parameters: pass.map(|pass| pass.parameters.clone()).unwrap_or_default(),
        }
    }

    /// Why a return or an indirect branch that the image's tables name is no slot.
    fn why_not(&self, poked: &[SiteKind]) -> Option<String> {
        let (kind, what) = match poked {
            kinds if kinds.contains(&SiteKind::Return) => (SlotKind::Return, "return"),
            kinds if kinds.contains(&SiteKind::Retpoline) => {
                (SlotKind::Indirect, "indirect branch")
            }
            _ => return None,
        };
        let known = passes::known();
        let mut reasons: Vec<&str> = Vec::new();
        for pass in self
            .bundle
            .manifest
            .variants
            .iter()
            .flat_map(|variant| &variant.passes)
        {
            if known
                .get(pass.name.as_str())
                .is_some_and(|pass| pass.slot() == kind)
            {
                reasons.extend(pass.left.keys().map(String::as_str));
            }
        }
        reasons.sort_unstable();
        reasons.dedup();
        Some(format!(
            "a {what} that no pass may edit, for one of: {}",
            reasons.join(", ")
        ))
    }

    fn in_thunk(&mut self, line: &super::listing::Line) -> Row {
        let trap = self.bundle.manifest.cave.trap_at(line.at);
        let reports = trap.map(|trap| {
            format!(
                "{} reports the value in {}, then: {}",
                trap.pass,
                place::offending(trap.offending),
                trap.action.name()
            )
        });
        Row {
            at: line.at,
            name: self.names.name(line.at),
            bytes: spaced(&line.bytes),
            text: line.text.clone(),
            poked: Vec::new(),
            reports,
            edits: Vec::new(),
            left: None,
        }
    }

    /// How many slots of each variant branch into `range`.
    fn users(&self, range: VaRange) -> BTreeMap<String, u64> {
        let manifest = &self.bundle.manifest;
        let count = |edits: &[Edit]| {
            let ends = edits.iter().filter_map(|edit| {
                // `opcode rel32` at the end, behind prefixes.
                let split = edit.bytes.len().checked_sub(5)?;
                let (opcode, field) = (edit.bytes[split], &edit.bytes[split + 1..]);
                let displacement = i32::from_le_bytes(field.try_into().ok()?);
                let next = manifest.text.start.0 + u64::from(edit.at.0) + edit.bytes.len() as u64;
                let target = LinkVa(next.wrapping_add_signed(i64::from(displacement)));
                (matches!(opcode, 0xe8 | 0xe9) && range.contains(target)).then_some(())
            });
            ends.count() as u64
        };
        let all = manifest.variants.iter().zip(&self.bundle.edits);
        all.map(|(variant, edits)| (variant.name.clone(), count(&edits.0)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

impl Explanation {
    /// For programs.
    pub fn json(&self) -> String {
        super::json(self)
    }

    /// For people: the listing with a column for each variant, then what each slot is.
    pub fn text(&self) -> String {
        let mut out = format!(
            "{} {}, {} to {}, {} bytes, kernel {}\n",
            self.kind,
            self.name,
            self.range.start,
            self.range.end,
            self.range.len(),
            self.kernel
        );
        if !self.aliases.is_empty() {
            out.push_str(&format!("also named {}\n", self.aliases.join(", ")));
        }
        for (variant, count) in &self.slots {
            out.push_str(&format!("{count} slots of {variant} go here\n"));
        }
        out.push('\n');
        out.push_str(&self.listing());
        for row in &self.instructions {
            out.push_str(&row.why());
        }
        let subject = self.at.unwrap_or(self.range.start);
        if self.kind == "function" {
            let held = self.tables.iter().filter(|(_, held)| **held);
            let held: Vec<&str> = held.map(|(table, _)| table.as_str()).collect();
            let held = match held.is_empty() {
                true => "no table holds it; no checked branch or return goes there".to_owned(),
                false => format!("in table {}", held.join(", ")),
            };
            out.push_str(&format!("\n{subject}: {held}\n"));
        }
        out
    }

    fn listing(&self) -> String {
        // Variants that differ nowhere here have no column.
        let differs = |name: &&String| {
            let mut rows = self.instructions.iter();
            rows.any(|row| row.edits.iter().any(|edit| edit.variant == **name))
        };
        let variants: Vec<&String> = self.variants.iter().filter(differs).collect();
        let mut header = vec!["", "address", "bytes", "as in the file"];
        header.extend(variants.iter().map(|name| name.as_str()));
        let mut grid = super::summary::grid(&header);
        for row in &self.instructions {
            let here = self
                .at
                .is_some_and(|at| row.at <= at && at.0 < row.at.0 + row.len());
            let mut cells = vec![
                if here { ">" } else { "" }.to_owned(),
                row.at.to_string(),
                row.bytes.clone(),
                row.text.clone(),
            ];
            for name in &variants {
                let edit = row.edits.iter().find(|edit| edit.variant == **name);
                cells.push(edit.map_or(String::new(), |edit| edit.text.clone()));
            }
            grid.add_row(cells);
        }
        super::summary::trimmed(&grid) + "\n"
    }
}

impl Row {
    fn len(&self) -> u64 {
        self.bytes.split(' ').count() as u64
    }

    fn why(&self) -> String {
        let name = self.name.as_deref().unwrap_or("");
        let mut out = String::new();
        let head = |out: &mut String, what: &str| {
            out.push_str(&format!("\n{} {name}: {what}\n", self.at));
        };
        if let Some(reports) = &self.reports {
            head(&mut out, reports);
        }
        if let Some(left) = &self.left {
            head(&mut out, left);
        }
        if let Some(first) = self.edits.first() {
            let (letter, what) = place::slot(first.slot);
            head(
                &mut out,
                &format!("slot {letter}, {what}, {} bytes", self.len()),
            );
            for edit in &self.edits {
                let set: Vec<String> = edit
                    .parameters
                    .iter()
                    .map(|(name, value)| format!("{name} = {value}"))
                    .collect();
                let set = match set.is_empty() {
                    true => String::new(),
                    false => format!(" ({})", set.join(", ")),
                };
                out.push_str(&format!(
                    "  {}: {}{set}: {}\n",
                    edit.variant, edit.pass, edit.does
                ));
            }
        }
        let others = self.poked.iter().filter(|kind| {
            self.edits.is_empty() && !matches!(kind, SiteKind::Return | SiteKind::Retpoline)
        });
        let others: Vec<String> = others
            .map(|kind| super::summary::kind_name(*kind))
            .collect();
        if !others.is_empty() {
            let what = format!("the kernel itself may write here: {}", others.join(", "));
            head(&mut out, &what);
        }
        out
    }
}
