//! Where running bytes differ from expected ones, and which differences a table's sites account for.

use crate::xen::{GuestVa, PAGE};
use penumbra_bundle::{Form, Site, SiteKind, TextOff};
use serde::Serialize;
use std::collections::BTreeMap;

/// Unexplained bytes this near to each other are shown as one range.
const JOIN: u32 = 8;
/// Rounds in which a site may lean on what other sites explained. Tables nest two deep (an alternative over a paravirt
/// call), so more never helps.
const ROUNDS: usize = 3;
/// A range of running bytes that nothing explains.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Unexplained {
    /// Where, in the guest.
    pub address: GuestVa,
    /// How many bytes.
    pub len: u32,
    /// Nearest symbol and offset.
    pub symbol: String,
    /// What was expected there, in hexadecimal; at most 16 bytes.
    pub expected: String,
    /// What is there.
    pub found: String,
    /// The text page that holds its start.
    #[serde(skip)]
    pub page: usize,
}

impl std::fmt::Display for Unexplained {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} ({}): {} where {} was expected",
            self.address, self.symbol, self.found, self.expected
        )?;
        if self.found.starts_with("cc") && self.len <= 2 {
            f.write_str(" (an int3: a kprobe, or a text poke under way)")?;
        }
        Ok(())
    }
}

/// Matches every changed site against its forms (`matches` says whether bytes are a form, but for offsets that it is told to
/// ignore); sites that nest in others get what those leave open. Returns the bytes that each table accounts for.
pub fn explain_sites(
    sites: &[Site],
    matches: impl Fn(&Site, &Form, &[u8], &dyn Fn(usize) -> bool) -> bool,
    expected: &[u8],
    running: &[u8],
    open: &mut Differences,
) -> BTreeMap<SiteKind, u64> {
    let mut changed = BTreeMap::new();
    let mut pending = open.sites_with_any(sites);
    for round in 0..ROUNDS {
        let before = pending.len();
        pending.retain(|site| {
            let range = range_of(site);
            let bytes = &running[range.clone()];
            // In the first round a form must match by itself.
            let ignore = |index: usize| round > 0 && open.was_explained(range.start + index);
            let matched = site
                .forms
                .iter()
                .any(|form| matches(site, form, bytes, &ignore));
            if matched {
                let differing = range
                    .clone()
                    .filter(|at| expected[*at] != running[*at] && !open.was_explained(*at))
                    .count();
                *changed.entry(site.kind).or_insert(0) += differing as u64;
                open.explain(range);
            }
            !matched
        });
        if pending.is_empty() || (round > 0 && pending.len() == before) {
            break;
        }
    }
    changed
}

/// A site's text offsets.
pub fn range_of(site: &Site) -> std::ops::Range<usize> {
    let start = site.at.0 as usize;
    start..start + usize::from(site.len)
}

/// The bytes that differ from the file, and which of them are explained.
pub struct Differences {
    /// Text offsets, sorted.
    at: Vec<u32>,
    /// Bit per text byte.
    explained: Vec<u64>,
}

impl Differences {
    /// Compares; both are as long.
    pub fn new(expected: &[u8], running: &[u8]) -> Differences {
        let mut at = Vec::new();
        let chunks = expected.chunks(64).zip(running.chunks(64)).enumerate();
        for (index, (want, have)) in chunks {
            if want != have {
                let differing = want.iter().zip(have).enumerate();
                at.extend(
                    differing
                        .filter(|(_, (want, have))| want != have)
                        // A text has at most 256 MiB.
                        .map(|(offset, _)| (index * 64 + offset) as u32),
                );
            }
        }
        Differences {
            at,
            explained: vec![0; expected.len().div_ceil(64)],
        }
    }

    /// The sites that hold a difference. Sites and differences are both sorted by start: one sweep over both.
    fn sites_with_any<'s>(&self, sites: &'s [Site]) -> Vec<&'s Site> {
        let mut first = 0;
        let mut found = Vec::new();
        for site in sites {
            let range = range_of(site);
            while self
                .at
                .get(first)
                .is_some_and(|at| (*at as usize) < range.start)
            {
                first += 1;
            }
            if self
                .at
                .get(first)
                .is_some_and(|at| (*at as usize) < range.end)
            {
                found.push(site);
            }
        }
        found
    }

    fn was_explained(&self, at: usize) -> bool {
        self.explained[at / 64] & (1 << (at % 64)) != 0
    }

    /// Takes a range as explained.
    pub fn explain(&mut self, range: std::ops::Range<usize>) {
        for at in range {
            self.explained[at / 64] |= 1 << (at % 64);
        }
    }

    /// What is left; `name` gives a text offset's address and symbol.
    pub fn ranges(
        &self,
        expected: &[u8],
        running: &[u8],
        name: impl Fn(TextOff) -> (GuestVa, String),
    ) -> Vec<Unexplained> {
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        for at in self
            .at
            .iter()
            .copied()
            .filter(|at| !self.was_explained(*at as usize))
        {
            match ranges.last_mut() {
                Some((_, end)) if at - *end < JOIN => *end = at + 1,
                _ => ranges.push((at, at + 1)),
            }
        }
        ranges
            .into_iter()
            .map(|(start, end)| {
                let shown = start as usize..(end as usize).min(start as usize + 16);
                let (address, symbol) = name(TextOff(start));
                Unexplained {
                    address,
                    len: end - start,
                    symbol,
                    expected: hex(&expected[shown.clone()]),
                    found: hex(&running[shown]),
                    page: start as usize / PAGE,
                }
            })
            .collect()
    }
}

/// Bytes as hexadecimal digits with spaces.
pub fn hex(bytes: &[u8]) -> String {
    let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    digits.join(" ")
}
