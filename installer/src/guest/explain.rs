//! Explains every byte of the running text, or names what it cannot (design, invariant 5).

use super::forms::{self, JMP, add32};
pub use super::kernel::Slide;
use crate::xen::GuestVa;
use penumbra_bundle::{Bundle, LinkVa, Site, SiteKind, TextOff};
use serde::Serialize;
use std::collections::BTreeMap;
use thiserror::Error;

/// Unexplained bytes this near to each other are shown as one range.
const JOIN: u32 = 8;
/// Rounds in which a site may lean on what other sites explained. Tables nest two deep (an alternative over a paravirt
/// call), so more never helps.
const ROUNDS: usize = 3;
/// `ret; int3; int3; int3; int3`: what the kernel writes at a return site where no return thunk is needed.
pub const RET: [u8; 5] = [0xc3, 0xcc, 0xcc, 0xcc, 0xcc];

/// What the kernel chose for its return sites at boot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ReturnForm {
    /// [`RET`].
    Ret,
    /// A jump to this return thunk.
    Jump(TextOff),
}

impl ReturnForm {
    /// The five bytes at text offset `at`.
    pub fn bytes(self, at: TextOff) -> [u8; 5] {
        match self {
            ReturnForm::Ret => RET,
            ReturnForm::Jump(to) => {
                let [a, b, c, d] = to.0.wrapping_sub(at.0.wrapping_add(5)).to_le_bytes();
                [JMP, a, b, c, d]
            }
        }
    }
}

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

/// Why a text is refused.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ExplainError {
    /// Bytes that no table of the image accounts for.
    #[error("{}", unexplained_message(.0))]
    Unexplained(Vec<Unexplained>),
    /// The guest runs without retpolines.
    #[error(
        "the guest runs with retpolines off ({changed} of {sites} sites rewritten): return addresses then differ from the bundle's; boot the guest with spectre_v2=retpoline on its kernel command line"
    )]
    RetpolinesOff {
        /// Sites in another form.
        changed: usize,
        /// All sites.
        sites: usize,
    },
    /// Return sites do not agree.
    #[error(
        "the guest returns in several ways ({0}); hook code could end in the wrong one; boot the guest with one return mitigation (see /sys/devices/system/cpu/vulnerabilities in it)"
    )]
    ReturnForms(String),
}

fn unexplained_message(ranges: &[Unexplained]) -> String {
    let mut message = format!(
        "{} range{} of the guest's text cannot be explained from its image, so no view is built:",
        ranges.len(),
        if ranges.len() == 1 { "" } else { "s" }
    );
    for range in ranges.iter().take(10) {
        message.push_str(&format!("\n  {range}"));
    }
    if ranges.len() > 10 {
        message.push_str(&format!("\n  and {} more", ranges.len() - 10));
    }
    message.push_str(
        "\nremove probes and live patches in the guest, or reboot it if its kernel was changed by something unknown",
    );
    message
}

/// What the explanation found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Explained {
    /// How its functions return.
    pub returns: ReturnForm,
    /// Bytes that differ from the relocated file, by the table that explains them.
    pub changed: BTreeMap<SiteKind, u64>,
    /// The cave holds what was allowed instead of filler.
    pub cave_in_use: bool,
}

/// The file's text as this guest would have it before any poke: every relocation applied.
pub fn expected(bundle: &Bundle, slide: Slide) -> Vec<u8> {
    let mut text = bundle.text.clone();
    let model = &bundle.model;
    // Truncation to 32 bits is what the relocation does; the bundle's reader checked that every field lies inside.
    let low = slide.0 as u32;
    for at in &model.abs32 {
        add32(&mut text[at.0 as usize..][..4], low);
    }
    for at in &model.inverse32 {
        add32(&mut text[at.0 as usize..][..4], low.wrapping_neg());
    }
    for at in &model.abs64 {
        let field = &mut text[at.0 as usize..][..8];
        let mut old = [0; 8];
        old.copy_from_slice(field);
        let new = u64::from_le_bytes(old).wrapping_add(slide.0);
        field.copy_from_slice(&new.to_le_bytes());
    }
    text
}

/// Explains `running` against [`expected`]. `cave` is what the cave may hold instead of filler: its text offset and bytes.
pub fn explain(
    bundle: &Bundle,
    slide: Slide,
    expected: &[u8],
    running: &[u8],
    cave: Option<(TextOff, &[u8])>,
) -> Result<Explained, ExplainError> {
    assert_eq!(running.len(), expected.len(), "the whole text is explained");
    let mut open = Differences::new(expected, running);
    let cave_in_use = cave.is_some_and(|(at, bytes)| {
        let range = at.0 as usize..at.0 as usize + bytes.len();
        let ours = running.get(range.clone()) == Some(bytes);
        if ours {
            open.explain(range);
        }
        ours
    });
    let changed = explain_sites(bundle, slide, expected, running, &mut open);
    check_retpolines(bundle, expected, running)?;
    let left = open.ranges(bundle, slide, expected, running);
    if !left.is_empty() {
        return Err(ExplainError::Unexplained(left));
    }
    Ok(Explained {
        returns: return_form(bundle, running)?,
        changed,
        cave_in_use,
    })
}

/// Matches every changed site against its forms; sites that nest in others get what those leave open.
fn explain_sites(
    bundle: &Bundle,
    slide: Slide,
    expected: &[u8],
    running: &[u8],
    open: &mut Differences,
) -> BTreeMap<SiteKind, u64> {
    let model = &bundle.model;
    let mut changed = BTreeMap::new();
    let mut pending = open.sites_with_any(&model.sites);
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
                .any(|form| forms::matches(form, model, site, bytes, slide, running.len(), ignore));
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

pub(super) fn range_of(site: &Site) -> std::ops::Range<usize> {
    let start = site.at.0 as usize;
    start..start + usize::from(site.len)
}

/// Retpolines are off when the kernel rewrote most of its sites (arch/x86/kernel/alternative.c, patch_retpoline). A few
/// rewritten ones are other tables' (a site inside an alternative).
fn check_retpolines(bundle: &Bundle, expected: &[u8], running: &[u8]) -> Result<(), ExplainError> {
    let sites: Vec<&Site> = bundle
        .model
        .sites
        .iter()
        .filter(|site| site.kind == SiteKind::Retpoline)
        .collect();
    let changed = sites
        .iter()
        .filter(|site| expected[range_of(site)] != running[range_of(site)])
        .count();
    if changed * 2 > sites.len() {
        return Err(ExplainError::RetpolinesOff {
            changed,
            sites: sites.len(),
        });
    }
    Ok(())
}

/// Learns how the kernel returns: the one thunk that its return sites jump to, or a plain `ret`.
pub fn return_form(bundle: &Bundle, running: &[u8]) -> Result<ReturnForm, ExplainError> {
    let mut plain = 0_u64;
    let mut jumps: BTreeMap<i64, u64> = BTreeMap::new();
    for site in &bundle.model.sites {
        if site.kind != SiteKind::Return || site.len < 5 {
            continue;
        }
        let bytes = &running[range_of(site)];
        if bytes[..5] == RET {
            plain += 1;
        } else if let Some(target) = forms::branch_target(JMP, site.at, bytes) {
            *jumps.entry(target).or_insert(0) += 1;
        }
    }
    let known = |target: i64| {
        u32::try_from(target)
            .ok()
            .map(TextOff)
            .filter(|target| bundle.model.return_thunks.binary_search(target).is_ok())
    };
    let form = match jumps.len() {
        0 => Some(ReturnForm::Ret),
        // A thunk beside plain returns is the safer of the two: it is a mitigation.
        1 => jumps
            .keys()
            .next()
            .and_then(|target| known(*target))
            .map(ReturnForm::Jump),
        _ => None,
    };
    form.ok_or_else(|| {
        let ways: Vec<String> = std::iter::once(format!("{plain} plain"))
            .chain(
                jumps
                    .iter()
                    .take(4)
                    .map(|(target, count)| format!("{count} through text offset {target:#x}")),
            )
            .collect();
        ExplainError::ReturnForms(ways.join(", "))
    })
}

/// The bytes that differ from the file, and which of them are explained.
pub(super) struct Differences {
    /// Text offsets, sorted.
    at: Vec<u32>,
    /// Bit per text byte.
    explained: Vec<u64>,
}

impl Differences {
    pub(super) fn new(expected: &[u8], running: &[u8]) -> Differences {
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
    pub(super) fn sites_with_any<'s>(&self, sites: &'s [Site]) -> Vec<&'s Site> {
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

    pub(super) fn was_explained(&self, at: usize) -> bool {
        self.explained[at / 64] & (1 << (at % 64)) != 0
    }

    pub(super) fn explain(&mut self, range: std::ops::Range<usize>) {
        for at in range {
            self.explained[at / 64] |= 1 << (at % 64);
        }
    }

    /// What nothing explains: first offset and first after.
    pub(super) fn left(&self) -> Vec<(u32, u32)> {
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
    }

    fn ranges(
        &self,
        bundle: &Bundle,
        slide: Slide,
        expected: &[u8],
        running: &[u8],
    ) -> Vec<Unexplained> {
        self.left()
            .into_iter()
            .map(|(start, end)| {
                let shown = start as usize..(end as usize).min(start as usize + 16);
                Unexplained {
                    address: slide.guest(LinkVa(bundle.manifest.text.start.0 + u64::from(start))),
                    len: end - start,
                    symbol: symbol(bundle, TextOff(start)),
                    expected: hex(&expected[shown.clone()]),
                    found: hex(&running[shown]),
                    page: start as usize / crate::xen::PAGE,
                }
            })
            .collect()
    }
}

/// `name+0x12` for a text offset.
pub fn symbol(bundle: &Bundle, at: TextOff) -> String {
    match bundle.symbols.lookup(at) {
        Some((name, 0)) => name.to_owned(),
        Some((name, offset)) => format!("{name}+{offset:#x}"),
        None => format!("text+{:#x}", at.0),
    }
}

/// Bytes as hexadecimal digits with spaces.
pub fn hex(bytes: &[u8]) -> String {
    let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    digits.join(" ")
}
