//! `.altinstructions`: every state that a site can reach (arch/x86/kernel/alternative.c, `apply_alternatives`), and
//! `.smp_locks` and `.parainstructions`, which write the same places; run-time constants.

use super::nops::{PADDINGS, Padding};
use super::thunks::return_thunks;
use super::{exact, site};
use crate::image::{AltEntry, ConstantValue, Fault, Image, Tables};
use crate::text::{Span, TextError};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic};
use penumbra_bundle::{Form, LinkVa, Site, SiteKind};
use std::collections::BTreeSet;

const NOP: u8 = 0x90;
/// What a return becomes that needs no thunk.
const RET: [u8; 5] = [0xc3, 0xcc, 0xcc, 0xcc, 0xcc];
/// A LOCK prefix, and the DS prefix that replaces it on one CPU (`alternatives_smp_unlock`).
const LOCK: u8 = 0xf0;
const NO_LOCK: u8 = 0x3e;
/// `TASK_SIZE_MAX` with four and with five levels of page tables (arch/x86/include/asm/page_64.h).
const USER_ENDS: [u64; 2] = [(1 << 47) - 4096, (1 << 56) - 4096];
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
    let returns = Returns::new(image, tables, span);
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
                &returns,
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
    for one in &tables.runtime_constants {
        let forms = match one.value {
            ConstantValue::Pointer => vec![Form::KernelPointer],
            ConstantValue::UserEnd => USER_ENDS.map(|end| exact(&end.to_le_bytes())).to_vec(),
            ConstantValue::Shift => vec![Form::Shift],
        };
        let len = one.value.width();
        sites.extend(site(span, one.at, len, SiteKind::RuntimeConstant, forms));
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
    returns: &Returns,
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
    for padding in PADDINGS {
        let mut reached = BTreeSet::from([original.clone()]);
        for entry in group {
            let at = (entry.site.0 - start.0) as usize;
            // Nested alternatives pad one site differently: the longest counts for all (from Linux 6.9 on).
            let twins = group.iter().filter(|other| other.site == entry.site);
            let longest = twins.map(|other| other.site_len).max();
            let room = at..at + usize::from(longest.unwrap_or(entry.site_len));
            let mut next = BTreeSet::new();
            for before in &reached {
                let mut skipped = before.clone();
                optimise(&mut skipped, room.clone(), padding);
                next.insert(skipped);
                if entry.direct_call {
                    // A site of its own: where the call goes is in data.
                    continue;
                }
                for mut applied in apply(image, entry, before, room.clone(), padding, returns)? {
                    optimise(&mut applied, room.clone(), padding);
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
    padding: Padding,
    returns: &Returns,
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
    let mut decoder = Decoder::with_ip(64, replacement, entry.replacement.0, DecoderOptions::NONE);
    while decoder.can_decode() {
        let instruction = decoder.decode();
        let at = (instruction.ip() - entry.replacement.0) as usize;
        let end = at + instruction.len();
        let (target, field) = if is_rel32(&instruction) {
            (instruction.near_branch_target(), end - 4)
        } else if instruction.is_ip_rel_memory_operand() {
            let offsets = decoder.get_constant_offsets(&instruction);
            (
                instruction.ip_rel_memory_address(),
                at + offsets.displacement_offset(),
            )
        } else {
            continue;
        };
        if inside.contains(&target) {
            continue;
        }
        let displacement = target.wrapping_sub(entry.site.0 + end as u64) as i64;
        code[field..field + 4].copy_from_slice(&(displacement as i32).to_le_bytes());
        // `recompute_jump`, `__apply_relocation`: two bytes when the target is near.
        let near = target.wrapping_sub(entry.site.0 + at as u64 + 2) as i64;
        if instruction.code() == Code::Jmp_rel32_64 && i8::try_from(near).is_ok() {
            let mut two = code.clone();
            two[at] = 0xeb;
            two[at + 1] = near as u8;
            padding.fill_dead(&mut two[at + 2..end]);
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
    let codes = [Some(code), short].into_iter().flatten();
    Ok(codes
        .flat_map(|code| returns.forms(entry, code))
        .map(place)
        .collect())
}

/// Returns inside replacements are patched where they lie (`apply_returns`), before the replacements are copied.
struct Returns {
    /// All return sites, sorted.
    sites: Vec<LinkVa>,
    thunks: Vec<LinkVa>,
}

impl Returns {
    fn new(image: &Image, tables: &Tables, span: Span) -> Returns {
        let mut sites = tables.returns.clone();
        sites.sort_unstable();
        let thunks = return_thunks(image, span).into_iter();
        let thunks = thunks.map(|at| span.va(at)).collect();
        Returns { sites, thunks }
    }

    /// `code` of the entry's replacement, moved to its site, as it is and with every way to return.
    fn forms(&self, entry: &AltEntry, code: Vec<u8>) -> Vec<Vec<u8>> {
        let start = entry.replacement;
        let first = self.sites.partition_point(|at| *at < start);
        let inside = self.sites[first..]
            .iter()
            .map(|at| (at.0 - start.0) as usize);
        let inside: Vec<usize> = inside
            .take_while(|at| at + RET.len() <= code.len())
            .collect();
        if inside.is_empty() {
            return vec![code];
        }
        let jump = |at: usize, thunk: LinkVa| {
            let from = entry.site.0 + (at + RET.len()) as u64;
            let mut jump = [0xe9; 5];
            jump[1..].copy_from_slice(&(thunk.0.wrapping_sub(from) as u32).to_le_bytes());
            jump
        };
        let ways = std::iter::once(None).chain(self.thunks.iter().copied().map(Some));
        let patched = ways.map(|way| {
            let mut code = code.clone();
            for at in &inside {
                let bytes = way.map_or(RET, |thunk| jump(*at, thunk));
                code[*at..at + RET.len()].copy_from_slice(&bytes);
            }
            code
        });
        std::iter::once(code.clone()).chain(patched).collect()
    }
}

fn is_rel32(instruction: &Instruction) -> bool {
    matches!(instruction.code(), Code::Call_rel32_64 | Code::Jmp_rel32_64)
        || instruction.is_jcc_near()
}

/// `optimize_nops`: runs of one-byte NOPs, and later of any, become as few as can be.
fn optimise(state: &mut State, room: std::ops::Range<usize>, padding: Padding) {
    let one_byte = padding != Padding::NopOrJump;
    for run in nops(&state.bytes[room.clone()], one_byte) {
        padding.fill(&mut state.bytes[room.start + run.start..room.start + run.end]);
    }
}

/// Runs of two or more bytes of NOPs, of one-byte ones alone or of any.
fn nops(code: &[u8], one_byte: bool) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for instruction in Decoder::new(64, code, DecoderOptions::NONE) {
        if instruction.is_invalid() {
            break;
        }
        let at = instruction.ip() as usize;
        // NOP (90) has no operand; `xchg %r8,%rax` (49 90) and PAUSE (f3 90) are none.
        let nop = match one_byte {
            true => instruction.len() == 1 && code[at] == NOP,
            false => instruction.mnemonic() == Mnemonic::Nop,
        };
        if nop {
            match runs.last_mut() {
                Some(run) if run.end == at => run.end += instruction.len(),
                _ => runs.push(at..at + instruction.len()),
            }
        }
    }
    runs.retain(|run| run.len() > 1);
    runs
}

fn nop_runs(span: Span, start: LinkVa, original: &[u8]) -> Vec<Site> {
    let runs = nops(original, true).into_iter();
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
    use super::{Returns, group_sites};
    use crate::image::{AltEntry, Image, Tables};
    use crate::text::Span;
    use penumbra_bundle::{Form, LinkVa, SiteKind, VaRange};

    const TEXT: u64 = 0xffff_ffff_8100_0000;

    /// The exact forms of a site at TEXT whose replacement stands 0x100 later.
    fn forms(original: &[u8], replacement: &[u8]) -> Vec<Vec<u8>> {
        forms_with(&Tables::default(), original, replacement)
    }

    fn forms_with(tables: &Tables, original: &[u8], replacement: &[u8]) -> Vec<Vec<u8>> {
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
            direct_call: false,
        };
        let returns = Returns::new(&image, tables, span);
        let sites = group_sites(&image, tables, &returns, span, &[&entry], original.len()).unwrap();
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
    fn from_linux_6_8_on_a_short_jump_is_followed_by_int3s() {
        let moved = forms(&[0x90; 5], &[0xe9, 0x1b, 0xff, 0xff, 0xff]);
        assert!(
            moved.contains(&vec![0xeb, 0x1e, 0xcc, 0xcc, 0xcc]),
            "{moved:02x?}"
        );
    }

    #[test]
    fn a_return_in_a_replacement_is_patched_before_it_is_copied() {
        // `rep movsb` and a return, of which `.return_sites` says where it is: memmove with FSRM.
        let replacement = [0xf3, 0xa4, 0xe9, 0x00, 0x01, 0, 0];
        let tables = Tables {
            returns: vec![LinkVa(TEXT + 0x102)],
            ..Tables::default()
        };
        let moved = forms_with(&tables, &[0x90; 7], &replacement);
        let plain = vec![0xf3, 0xa4, 0xc3, 0xcc, 0xcc, 0xcc, 0xcc];
        assert!(moved.contains(&plain), "{moved:02x?}");
        assert!(!forms(&[0x90; 7], &replacement).contains(&plain));
    }

    #[test]
    fn a_replacement_longer_than_its_site_is_refused() {
        let result = std::panic::catch_unwind(|| forms(&[0x90; 2], &[0x90; 3]));
        assert!(result.is_err());
    }
}
