//! `.altinstructions`: every state that a site can reach (arch/x86/kernel/alternative.c, `apply_alternatives`), and
//! `.smp_locks` and `.parainstructions`, which write the same places.

use super::{exact, nops, site};
use crate::image::{AltEntry, Fault, Image, Tables};
use crate::text::{Span, TextError};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction};
use penumbra_bundle::{Form, LinkVa, Site, SiteKind};
use std::collections::BTreeSet;

const NOP: u8 = 0x90;
/// A LOCK prefix, and the DS prefix that replaces it on one CPU (`alternatives_smp_unlock`).
const LOCK: u8 = 0xf0;
const NO_LOCK: u8 = 0x3e;
/// More states than any site of a real kernel reaches (measured: 8); a bound on memory.
const MAX_STATES: usize = 256;

/// Bytes and the offsets in them that KASLR relocates.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    bytes: Vec<u8>,
    abs32: BTreeSet<u8>,
    inverse32: BTreeSet<u8>,
}

/// Adds the sites of all three tables.
pub fn sites(
    image: &Image,
    tables: &Tables,
    span: Span,
    sites: &mut Vec<Site>,
) -> Result<(), TextError> {
    let mut entries: Vec<&AltEntry> = tables
        .alternatives
        .iter()
        .filter(|entry| span.offset(entry.site).is_some())
        .collect();
    // Stable: entries of one site stay in the order in which the kernel applies them.
    entries.sort_by_key(|entry| entry.site);
    let mut rest = &entries[..];
    while let [first, ..] = rest {
        let mut end = first.site.0;
        let together = rest
            .iter()
            .take_while(|entry| {
                let joins = entry.site.0 < end || entry.site == first.site;
                if joins {
                    end = end.max(entry.site.0 + u64::from(entry.site_len));
                }
                joins
            })
            .count();
        let (group, later) = rest.split_at(together);
        rest = later;
        if end > first.site.0 {
            sites.extend(group_sites(
                image,
                tables,
                span,
                group,
                (end - first.site.0) as usize,
            )?);
        }
    }
    for one in &tables.paravirt {
        // An operation that does nothing leaves NOPs, any other a direct call.
        let forms = vec![Form::Call, Form::Nops];
        sites.extend(site(span, one.site, one.len, SiteKind::Paravirt, forms));
    }
    for va in &tables.smp_locks {
        sites.extend(site(
            span,
            *va,
            1,
            SiteKind::SmpLock,
            vec![exact(&[NO_LOCK])],
        ));
    }
    Ok(())
}

/// The sites of entries that overlap: one for all states, one for each run of NOPs that may be optimised alone because a
/// paravirt call before it was patched first.
fn group_sites(
    image: &Image,
    tables: &Tables,
    span: Span,
    group: &[&AltEntry],
    len: usize,
) -> Result<Vec<Site>, TextError> {
    let start = group[0].site;
    let damaged = |what: String| Fault::damaged(".altinstructions", what);
    let original = image
        .at(start, len)
        .ok_or_else(|| damaged(format!("the site {start} leaves the text")))?;
    let short_len =
        u8::try_from(len).map_err(|_| damaged(format!("the site {start} has {len} bytes")))?;
    let original = state(image, start, original);
    let mut states = BTreeSet::new();
    for longest in nops::LONGEST {
        let mut reached = BTreeSet::from([original.clone()]);
        for entry in group {
            let at = (entry.site.0 - start.0) as usize;
            let room = at..at + usize::from(entry.site_len);
            let mut next = BTreeSet::new();
            for before in &reached {
                let mut skipped = before.clone();
                optimise(&mut skipped, room.clone(), longest);
                next.insert(skipped);
                for mut applied in apply(image, entry, before, room.clone())? {
                    optimise(&mut applied, room.clone(), longest);
                    next.insert(applied);
                }
            }
            if next.len() > MAX_STATES {
                return Err(damaged(format!(
                    "the site {start} has more than {MAX_STATES} states"
                ))
                .into());
            }
            reached = next;
        }
        states.extend(reached);
    }
    // One CPU: LOCK prefixes that stayed are replaced after the alternatives.
    let locks: Vec<usize> = tables
        .smp_locks
        .iter()
        .filter_map(|va| va.0.checked_sub(start.0).map(|at| at as usize))
        .filter(|at| *at < len)
        .collect();
    let unlocked: Vec<State> = states
        .iter()
        .map(|state| {
            let mut state = state.clone();
            for at in &locks {
                if state.bytes[*at] == LOCK {
                    state.bytes[*at] = NO_LOCK;
                }
            }
            state
        })
        .collect();
    states.extend(unlocked);
    let mut sites = nop_runs(span, start, &original.bytes);
    states.remove(&original);
    let forms = states.into_iter().map(|state| Form::Exact {
        bytes: state.bytes,
        abs32: state.abs32.into_iter().collect(),
        inverse32: state.inverse32.into_iter().collect(),
    });
    sites.extend(site(
        span,
        start,
        short_len,
        SiteKind::Alternative,
        forms.collect(),
    ));
    Ok(sites)
}

/// `bytes` at `va` with the relocations that fall on them.
fn state(image: &Image, va: LinkVa, bytes: &[u8]) -> State {
    let inside = |list: &[LinkVa]| {
        let first = list.partition_point(|at| *at < va);
        list[first..]
            .iter()
            .take_while(|at| at.0 + 4 <= va.0 + bytes.len() as u64)
            .map(|at| (at.0 - va.0) as u8)
            .collect()
    };
    State {
        bytes: bytes.to_vec(),
        abs32: inside(&image.relocs.abs32),
        inverse32: inside(&image.relocs.inverse32),
    }
}

/// `before` with the entry's replacement: branches out of it keep their targets; a long jump may become a short one.
fn apply(
    image: &Image,
    entry: &AltEntry,
    before: &State,
    room: std::ops::Range<usize>,
) -> Result<Vec<State>, TextError> {
    let len = usize::from(entry.replacement_len);
    let replacement = image
        .at(entry.replacement, len)
        .filter(|_| len <= room.len())
        .ok_or_else(|| {
            Fault::damaged(
                ".altinstructions",
                format!(
                    "the replacement {} of {} is not in the file or too long",
                    entry.replacement, entry.site
                ),
            )
        })?;
    let moved = state(image, entry.replacement, replacement);
    let mut code = moved.bytes.clone();
    let mut short = None;
    let inside = entry.replacement.0..entry.replacement.0 + len as u64;
    for instruction in Decoder::with_ip(64, replacement, entry.replacement.0, DecoderOptions::NONE)
    {
        let at = (instruction.ip() - entry.replacement.0) as usize;
        let end = at + instruction.len();
        let target = instruction.near_branch_target();
        if !is_rel32(&instruction) || inside.contains(&target) {
            continue;
        }
        let displacement = target.wrapping_sub(entry.site.0 + end as u64) as i64;
        code[end - 4..end].copy_from_slice(&(displacement as i32).to_le_bytes());
        // `recompute_jump`: two bytes and three NOPs when the target is near.
        let near = target.wrapping_sub(entry.site.0 + at as u64 + 2) as i64;
        if instruction.code() == Code::Jmp_rel32_64 && i8::try_from(near).is_ok() {
            let mut two = code.clone();
            two[at] = 0xeb;
            two[at + 1] = near as u8;
            nops::fill(&mut two[at + 2..end], 8);
            short = Some(two);
        }
    }
    let place = |code: Vec<u8>| {
        let mut after = before.clone();
        after.bytes[room.clone()].fill(NOP);
        after.bytes[room.start..room.start + len].copy_from_slice(&code);
        for (list, new) in [
            (&mut after.abs32, &moved.abs32),
            (&mut after.inverse32, &moved.inverse32),
        ] {
            list.retain(|at| !room.contains(&usize::from(*at)));
            list.extend(new.iter().map(|at| at + room.start as u8));
        }
        after
    };
    Ok([Some(code), short]
        .into_iter()
        .flatten()
        .map(place)
        .collect())
}

fn is_rel32(instruction: &Instruction) -> bool {
    matches!(instruction.code(), Code::Call_rel32_64 | Code::Jmp_rel32_64)
        || instruction.is_jcc_near()
}

/// `optimize_nops`: runs of one-byte NOPs become longer ones.
fn optimise(state: &mut State, room: std::ops::Range<usize>, longest: usize) {
    for run in one_byte_nops(&state.bytes[room.clone()]) {
        nops::fill(
            &mut state.bytes[room.start + run.start..room.start + run.end],
            longest,
        );
    }
}

/// Runs of two or more one-byte NOPs that are instructions of their own.
fn one_byte_nops(code: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for instruction in Decoder::new(64, code, DecoderOptions::NONE) {
        if instruction.is_invalid() {
            break;
        }
        let at = instruction.ip() as usize;
        if instruction.len() == 1 && code[at] == NOP {
            match runs.last_mut() {
                Some(run) if run.end == at => run.end += 1,
                _ => runs.push(at..at + 1),
            }
        }
    }
    runs.retain(|run| run.len() > 1);
    runs
}

fn nop_runs(span: Span, start: LinkVa, original: &[u8]) -> Vec<Site> {
    let runs = one_byte_nops(original).into_iter();
    runs.filter_map(|run| {
        let at = LinkVa(start.0 + run.start as u64);
        site(
            span,
            at,
            run.len() as u8,
            SiteKind::Alternative,
            vec![Form::Nops],
        )
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::group_sites;
    use crate::image::{AltEntry, Image, Tables};
    use crate::text::Span;
    use penumbra_bundle::{Form, LinkVa, SiteKind, VaRange};

    const TEXT: u64 = 0xffff_ffff_8100_0000;

    /// The exact forms of a site at TEXT whose replacement stands 0x100 later.
    fn forms(original: &[u8], replacement: &[u8]) -> Vec<Vec<u8>> {
        let mut bytes = vec![0xcc; 0x1000];
        bytes[..original.len()].copy_from_slice(original);
        bytes[0x100..0x100 + replacement.len()].copy_from_slice(replacement);
        let range = VaRange {
            start: LinkVa(TEXT),
            end: LinkVa(TEXT + 0x1000),
        };
        let span = Span { range, code: range };
        let image = Image::synthetic(LinkVa(TEXT), bytes);
        let entry = AltEntry {
            site: LinkVa(TEXT),
            site_len: original.len() as u8,
            replacement: LinkVa(TEXT + 0x100),
            replacement_len: replacement.len() as u8,
        };
        let sites =
            group_sites(&image, &Tables::default(), span, &[&entry], original.len()).unwrap();
        let site = sites
            .iter()
            .rfind(|site| site.kind == SiteKind::Alternative)
            .unwrap();
        let exact = |form: &Form| match form {
            Form::Exact { bytes, .. } => Some(bytes.clone()),
            _ => None,
        };
        site.forms.iter().filter_map(exact).collect()
    }

    #[test]
    fn a_shorter_replacement_is_followed_by_one_long_nop() {
        // clac over three one-byte NOPs, and the NOPs alone, optimised.
        assert_eq!(
            forms(&[0x90; 3], &[0x0f, 0x01, 0xca]),
            [vec![0x0f, 0x01, 0xca], vec![0x0f, 0x1f, 0x00]]
        );
        assert!(forms(&[0x90; 6], &[0xfa]).contains(&vec![0xfa, 0x0f, 0x1f, 0x44, 0, 0]));
    }

    #[test]
    fn a_call_keeps_its_target() {
        // At TEXT+0x100: call TEXT+0x205; moved to TEXT.
        let moved = forms(&[0x90; 5], &[0xe8, 0x00, 0x01, 0, 0]);
        assert!(
            moved.contains(&vec![0xe8, 0x00, 0x02, 0, 0]),
            "{moved:02x?}"
        );
    }

    #[test]
    fn a_near_jump_may_become_short() {
        // At TEXT+0x100: jmp TEXT+0x20.
        let moved = forms(&[0x90; 5], &[0xe9, 0x1b, 0xff, 0xff, 0xff]);
        assert!(moved.contains(&vec![0xe9, 0x1b, 0, 0, 0]), "{moved:02x?}");
        assert!(
            moved.contains(&vec![0xeb, 0x1e, 0x0f, 0x1f, 0x00]),
            "{moved:02x?}"
        );
    }

    #[test]
    fn a_replacement_longer_than_its_site_is_refused() {
        let result = std::panic::catch_unwind(|| forms(&[0x90; 2], &[0x90; 3]));
        assert!(result.is_err());
    }
}
