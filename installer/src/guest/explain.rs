//! Explains every byte of the running text, or names what it cannot (design, invariant 5).

use super::differences::{self, Differences, range_of};
pub use super::differences::{Unexplained, hex};
use super::forms::{self, JMP, add32};
pub use super::kernel::Slide;
use penumbra_bundle::{Bundle, LinkVa, Site, SiteKind, TextOff};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

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
    let model = &bundle.model;
    let changed = differences::explain_sites(
        &model.sites,
        |site, form, bytes, ignore| {
            forms::matches(form, model, site, bytes, slide, running.len(), ignore)
        },
        expected,
        running,
        &mut open,
    );
    check_retpolines(bundle, expected, running)?;
    let start = bundle.manifest.text.start.0;
    let left = open.ranges(expected, running, |at| {
        let address = slide.guest(LinkVa(start + u64::from(at.0)));
        (address, symbol(bundle, at))
    });
    if !left.is_empty() {
        return Err(ExplainError::Unexplained(left));
    }
    Ok(Explained {
        returns: return_form(bundle, running)?,
        changed,
        cave_in_use,
    })
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
    // A trampoline of nothing is a return in the file; one that has got a function jumps there, whatever returns do.
    let trampolines = bundle.model.sites.iter();
    let trampolines = trampolines.filter(|site| site.kind == SiteKind::StaticCallTrampoline);
    let trampolines: BTreeSet<TextOff> = trampolines.map(|site| site.at).collect();
    for site in &bundle.model.sites {
        let is_return = site.kind == SiteKind::Return && site.len >= 5;
        if !is_return || trampolines.contains(&site.at) {
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

/// `name+0x12` for a text offset.
pub fn symbol(bundle: &Bundle, at: TextOff) -> String {
    match bundle.symbols.lookup(at) {
        Some((name, 0)) => name.to_owned(),
        Some((name, offset)) => format!("{name}+{offset:#x}"),
        None => format!("text+{:#x}", at.0),
    }
}
