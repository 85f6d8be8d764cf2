//! `hardener diff`: what two bundles have in common and what not.
//!
//! What is compared is what things mean: an edit by the instruction that it puts in place, with the name of the thunk that it
//! reaches, so that a thunk that only moved is no difference; a function by its instructions without the distances in them, so
//! that two builds of a kernel can be compared.

use super::cave::CaveView;
use super::explain::ExplainError;
use super::listing::{Lister, Names};
use iced_x86::{Decoder, DecoderOptions, Instruction};
use penumbra_bundle::{Bundle, Edits, LinkVa, TextOff, VaRange, Variant};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::rc::Rc;

/// Places that are named, of many.
const FIRST: usize = 10;

/// How two bundles differ.
#[derive(Serialize)]
pub struct Difference {
    schema: &'static str,
    same: bool,
    kernels: [String; 2],
    /// Facts that differ, by name; none where a bundle has no such fact.
    facts: BTreeMap<String, [Option<String>; 2]>,
    /// Thunks by name.
    thunks: Changes,
    /// Members of tables, where the texts are the same.
    tables: BTreeMap<String, Changes>,
    /// Slots of each variant, where the texts are the same.
    sites: BTreeMap<String, Changes>,
    /// Functions by name, where the texts differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    functions: Option<Changes>,
}

/// Two sets of named things.
#[derive(Serialize, Default)]
struct Changes {
    same: u64,
    changed: u64,
    only_a: u64,
    only_b: u64,
    /// The first of them, and how they changed.
    first: Vec<Change>,
}

#[derive(Serialize)]
struct Change {
    what: String,
    a: Option<String>,
    b: Option<String>,
}

impl Changes {
    /// Of two maps from a thing to what it is; `name` says what a thing is called.
    fn of<K: Ord, V: PartialEq>(
        a: &BTreeMap<K, V>,
        b: &BTreeMap<K, V>,
        name: impl Fn(&K) -> String,
        show: impl Fn(&V) -> String,
    ) -> Changes {
        let mut changes = Changes::default();
        let keys: BTreeSet<&K> = a.keys().chain(b.keys()).collect();
        for key in keys {
            let both = (a.get(key), b.get(key));
            let count = match both {
                (Some(a), Some(b)) if a == b => {
                    changes.same += 1;
                    continue;
                }
                (Some(_), Some(_)) => &mut changes.changed,
                (Some(_), None) => &mut changes.only_a,
                _ => &mut changes.only_b,
            };
            *count += 1;
            if changes.first.len() < FIRST {
                changes.first.push(Change {
                    what: name(key),
                    a: both.0.map(&show),
                    b: both.1.map(&show),
                });
            }
        }
        changes
    }

    fn none(&self) -> bool {
        self.changed + self.only_a + self.only_b == 0
    }

    fn line(&self) -> String {
        format!(
            "{} the same, {} changed, {} only in A, {} only in B",
            self.same, self.changed, self.only_a, self.only_b
        )
    }

    fn write(&self, out: &mut String, title: &str) {
        if self.none() {
            return;
        }
        let _ = writeln!(out, "\n{title}: {}", self.line());
        for change in &self.first {
            let side = |side: &Option<String>| match side.as_deref() {
                None => "-".to_owned(),
                Some("") => "there".to_owned(),
                Some(text) => text.to_owned(),
            };
            let _ = writeln!(
                out,
                "  {}: {} | {}",
                change.what,
                side(&change.a),
                side(&change.b)
            );
        }
        let rest = (self.changed + self.only_a + self.only_b) as usize - self.first.len();
        if rest > 0 {
            let _ = writeln!(out, "  and {rest} more");
        }
    }
}

/// One of the two.
struct Side<'a> {
    bundle: &'a Bundle,
    cave: CaveView<'a>,
    names: Rc<Names>,
    lister: Lister,
}

impl<'a> Side<'a> {
    fn of(bundle: &'a Bundle) -> Result<Side<'a>, ExplainError> {
        let cave = CaveView::read(bundle).map_err(ExplainError::Cave)?;
        let names = Names::of(bundle, &cave);
        Ok(Side {
            bundle,
            lister: Lister::new(&names),
            cave,
            names,
        })
    }

    /// What can be said in a word.
    fn facts(&self) -> BTreeMap<String, String> {
        let manifest = &self.bundle.manifest;
        let (kernel, cave) = (&manifest.kernel, &manifest.cave);
        let mut facts = BTreeMap::new();
        let mut fact = |name: String, value: String| facts.insert(name, value);
        let range = |range: VaRange| format!("{} to {}", range.start, range.end);
        fact("generator".into(), manifest.generator.clone());
        fact("kernel.release".into(), kernel.release.clone());
        fact("kernel.build_id".into(), kernel.build_id.clone());
        fact("kernel.image_sha256".into(), kernel.image_sha256.clone());
        fact("text".into(), range(manifest.text.range()));
        fact("cave".into(), range(cave.range));
        fact(
            "model.sites".into(),
            self.bundle.model.sites.len().to_string(),
        );
        fact("modules".into(), self.bundle.modules.len().to_string());
        for table in &cave.tables {
            fact(
                format!("table.{}.addresses", table.name),
                table.count.to_string(),
            );
            fact(
                format!("table.{}.bytes", table.name),
                table.range.len().to_string(),
            );
        }
        for trap in &cave.traps {
            fact(
                format!("traps.{}", trap.pass),
                trap.action.name().to_owned(),
            );
        }
        for variant in &manifest.variants {
            self.variant(variant, &mut fact);
        }
        facts
    }

    fn variant(&self, variant: &Variant, fact: &mut impl FnMut(String, String) -> Option<String>) {
        let own = &variant.name;
        let names: Vec<&str> = variant
            .passes
            .iter()
            .map(|pass| pass.name.as_str())
            .collect();
        fact(format!("{own}.passes"), names.join(", "));
        let drops: Vec<String> = variant
            .drops
            .iter()
            .map(|one| super::summary::mitigation(*one).to_owned())
            .collect();
        fact(format!("{own}.leaves-out"), drops.join(", "));
        for pass in &variant.passes {
            let own = format!("{own}.{}", pass.name);
            fact(format!("{own}.edited"), pass.edited.to_string());
            for (reason, count) in &pass.left {
                fact(format!("{own}.left.{reason}"), count.to_string());
            }
            for (name, value) in &pass.parameters {
                fact(format!("{own}.{name}"), value.clone());
            }
        }
    }

    /// Each slot's new instruction.
    fn sites(&mut self, edits: &Edits) -> BTreeMap<TextOff, String> {
        let start = self.bundle.manifest.text.start;
        let edits = edits.0.iter().map(|edit| {
            let at = LinkVa(start.0 + u64::from(edit.at.0));
            let lines = self.lister.lines(at, &edit.bytes);
            let text: Vec<String> = lines.into_iter().map(|line| line.text).collect();
            (edit.at, text.join("; "))
        });
        edits.collect()
    }

    /// Each thunk's instructions, without their addresses.
    fn thunks(&mut self) -> BTreeMap<String, String> {
        let thunks = self.cave.thunks().to_vec();
        let text = thunks.into_iter().map(|thunk| {
            let code = self.cave.bytes(thunk.range).unwrap_or_default();
            let lines = self.lister.lines(thunk.range.start, code);
            let text: Vec<String> = lines.into_iter().map(|line| line.text).collect();
            (thunk.name, text.join("\n"))
        });
        text.collect()
    }

    /// A digest of each function's code without the distances in it, by name and which of that name it is.
    fn functions(&self) -> BTreeMap<(String, u32), (u64, [u8; 32])> {
        let (text, symbols) = (&self.bundle.text, &self.bundle.symbols.0);
        let model = &self.bundle.model;
        // Fields that KASLR changes hold addresses.
        let mut fields: Vec<(u32, u32)> = Vec::new();
        for (list, width) in [(&model.abs32, 4), (&model.inverse32, 4), (&model.abs64, 8)] {
            fields.extend(list.iter().map(|at| (at.0, width)));
        }
        fields.sort_unstable();
        let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
        let mut functions = BTreeMap::new();
        for (index, symbol) in symbols.iter().enumerate() {
            // Call padding (Linux 6.2 and later) has symbols of its own.
            if symbol.name.starts_with("__pfx_") {
                continue;
            }
            let next = symbols[index..].iter().find(|next| next.at > symbol.at);
            let end = next.map_or(text.len(), |next| next.at.0 as usize);
            let Some(code) = text.get(symbol.at.0 as usize..end) else {
                continue;
            };
            let mut code = code.to_vec();
            blank(&mut code, symbol.at.0, &fields);
            let number = seen.entry(&symbol.name).or_default();
            let digest = Sha256::digest(&code).into();
            functions.insert((symbol.name.clone(), *number), (code.len() as u64, digest));
            *number += 1;
        }
        functions
    }
}

/// Zeroes what depends on where code and data lie: distances of branches and of operands relative to the instruction pointer,
/// and the fields that KASLR relocates.
fn blank(code: &mut [u8], start: u32, fields: &[(u32, u32)]) {
    let original = code.to_vec();
    let mut decoder = Decoder::new(64, &original, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        let from = decoder.position();
        decoder.decode_out(&mut instruction);
        let constants = decoder.get_constant_offsets(&instruction);
        let near = instruction.near_branch_target() != 0 && constants.has_immediate();
        if near && constants.immediate_size() == 4 {
            let at = from + constants.immediate_offset();
            code[at..at + 4].fill(0);
        }
        if instruction.is_ip_rel_memory_operand() && constants.has_displacement() {
            let at = from + constants.displacement_offset();
            code[at..at + constants.displacement_size()].fill(0);
        }
    }
    let first = fields.partition_point(|(at, _)| *at < start);
    for (at, width) in &fields[first..] {
        let at = (at - start) as usize;
        let Some(field) = code.get_mut(at..at + *width as usize) else {
            break;
        };
        field.fill(0);
    }
}

/// Compares two bundles.
pub fn diff(a: &Bundle, b: &Bundle) -> Result<Difference, ExplainError> {
    let (mut left, mut right) = (Side::of(a)?, Side::of(b)?);
    let (facts_a, facts_b) = (left.facts(), right.facts());
    let names: BTreeSet<&String> = facts_a.keys().chain(facts_b.keys()).collect();
    let facts: BTreeMap<String, [Option<String>; 2]> = names
        .into_iter()
        .map(|name| {
            (
                name.clone(),
                [facts_a.get(name).cloned(), facts_b.get(name).cloned()],
            )
        })
        .filter(|(_, [a, b])| a != b)
        .collect();
    // What a thunk does is shown by `explain`.
    let count = |code: &String| format!("{} instructions", code.lines().count());
    let thunks = Changes::of(&left.thunks(), &right.thunks(), String::clone, count);
    let same_text = a.manifest.text.start == b.manifest.text.start && a.text == b.text;
    let (mut tables, mut sites, mut functions) = (BTreeMap::new(), BTreeMap::new(), None);
    if same_text {
        let members = |side: &Side<'_>, name: &str| -> BTreeMap<LinkVa, ()> {
            let all = side.bundle.manifest.cave.tables.iter();
            let own = all.filter(|table| table.name == name);
            own.flat_map(|table| side.cave.members(table))
                .map(|at| (at, ()))
                .collect()
        };
        let both = a.manifest.cave.tables.iter().chain(&b.manifest.cave.tables);
        let both: BTreeSet<&str> = both.map(|table| table.name.as_str()).collect();
        for table in both {
            let (in_a, in_b) = (members(&left, table), members(&right, table));
            let name = |at: &LinkVa| left.place(*at);
            let changes = Changes::of(&in_a, &in_b, name, |()| String::new());
            tables.insert(table.to_owned(), changes);
        }
        let variants = a.manifest.variants.iter().chain(&b.manifest.variants);
        let variants: BTreeSet<&str> = variants.map(|variant| variant.name.as_str()).collect();
        for variant in variants {
            let edits = |bundle: &Bundle| bundle.variant(variant).map(|(_, edits)| edits.clone());
            let (in_a, in_b) = (edits(a).unwrap_or_default(), edits(b).unwrap_or_default());
            let (in_a, in_b) = (left.sites(&in_a), right.sites(&in_b));
            let start = a.manifest.text.start;
            let name = |at: &TextOff| left.place(LinkVa(start.0 + u64::from(at.0)));
            sites.insert(
                variant.to_owned(),
                Changes::of(&in_a, &in_b, name, String::clone),
            );
        }
    } else {
        let name = |(name, number): &(String, u32)| match number {
            0 => name.clone(),
            _ => format!("{name} ({})", number + 1),
        };
        let show = |(len, _): &(u64, [u8; 32])| format!("{len} bytes");
        functions = Some(Changes::of(
            &left.functions(),
            &right.functions(),
            name,
            show,
        ));
    }
    let quiet = |all: &BTreeMap<String, Changes>| all.values().all(Changes::none);
    let same = facts.is_empty()
        && thunks.none()
        && quiet(&tables)
        && quiet(&sites)
        && functions.as_ref().is_none_or(Changes::none);
    Ok(Difference {
        schema: "penumbra.diff/v1",
        same,
        kernels: [a, b].map(|one| one.manifest.kernel.release.clone()),
        facts,
        thunks,
        tables,
        sites,
        functions,
    })
}

impl Side<'_> {
    fn place(&self, at: LinkVa) -> String {
        match self.names.name(at) {
            Some(name) => format!("{at} {name}"),
            None => at.to_string(),
        }
    }
}

impl Difference {
    /// Whether nothing differs.
    pub fn same(&self) -> bool {
        self.same
    }

    /// For programs.
    pub fn json(&self) -> String {
        super::json(self)
    }

    /// For people.
    pub fn text(&self) -> String {
        if self.same {
            return "the bundles are the same\n".to_owned();
        }
        let mut out = String::new();
        if !self.facts.is_empty() {
            let mut grid = super::summary::grid(&["what differs", "A", "B"]);
            for (name, [a, b]) in &self.facts {
                let side = |side: &Option<String>| side.clone().unwrap_or_else(|| "-".to_owned());
                grid.add_row([name.clone(), side(a), side(b)]);
            }
            let _ = writeln!(out, "{}", super::summary::trimmed(&grid));
        }
        self.thunks.write(&mut out, "thunks");
        for (table, changes) in &self.tables {
            changes.write(&mut out, &format!("members of table {table}"));
        }
        for (variant, changes) in &self.sites {
            changes.write(&mut out, &format!("slots of {variant}"));
        }
        if let Some(functions) = &self.functions {
            functions.write(
                &mut out,
                "functions (the texts differ, so slots are not compared one by one)",
            );
        }
        out
    }
}
