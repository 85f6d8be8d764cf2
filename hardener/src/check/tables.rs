//! Rule 5: the tables that thunks read hold exactly the legal addresses.

use super::Subject;
use super::cave::CaveImage;
use super::classes;
use super::kernel::KernelError;
use super::kernel::symbols::hex;
use super::promoted;
use super::report::{Findings, Rule, RuleReport};
use super::returns;
use super::sets::{self, Legal};
use super::thunks::Roles;
use super::watched;
use penumbra_bundle::{Bundle, HashedBytes, LinkVa, TableKind};
use std::collections::BTreeSet;

/// The members of each table of the manifest, ascending.
pub fn decoded_tables(bundle: &Bundle, image: &CaveImage) -> Vec<Vec<u64>> {
    let cave = &bundle.manifest.cave;
    let decode = |table: &penumbra_bundle::Table| {
        // Rule 2 reports a table that is not where it should be; here it is empty.
        if !image.tables.encloses(&table.range) {
            return Vec::new();
        }
        let bytes = image.slice(cave, table.range);
        let mut members: Vec<u64> = match table.kind {
            TableKind::Bitmap { granule } => bytes
                .iter()
                .enumerate()
                .filter(|(_, byte)| **byte != 0)
                .flat_map(|(index, byte)| {
                    let bits = (0..8).filter(move |bit| byte >> bit & 1 == 1);
                    bits.map(move |bit| (index as u64 * 8 + bit) * u64::from(granule))
                })
                .collect(),
            TableKind::HashedBytes { offset_bits } => hashed_bytes(bytes, offset_bits),
            TableKind::SortedOffsets
            | TableKind::HashedOffsets
            | TableKind::HashedClasses { .. }
            | TableKind::HashedArities => bytes
                .chunks_exact(4)
                .map(|word| u64::from(u32::from_le_bytes(word.try_into().expect("4 bytes"))))
                .collect(),
        };
        if table.kind == TableKind::SortedOffsets {
            // An offset that no text reaches fills the table up behind its last member.
            while members
                .pop_if(|member| *member == u64::from(u32::MAX))
                .is_some()
            {}
        }
        if let TableKind::HashedBytes { .. } = table.kind {
            // Where none stands, something past all that is covered does.
            members.retain(|member| *member < table.covers.len());
            members.sort_unstable();
        }
        if table.kind == TableKind::HashedOffsets {
            // Where none stands, in any order; that each is found is what the thunks are proved to do.
            members.retain(|member| *member != u64::from(u32::MAX));
            members.sort_unstable();
        }
        if table.kind == TableKind::HashedArities {
            members.retain(|word| *word != u64::from(u32::MAX));
            members.iter_mut().for_each(|word| *word >>= 3);
            members.sort_unstable();
        }
        if let TableKind::HashedClasses { offset_bits } = table.kind {
            // Which class each is in, the thunks say: they are followed for each word.
            members.retain(|word| *word != u64::from(u32::MAX));
            for word in &mut members {
                *word &= (1 << offset_bits.min(32)) - 1;
            }
            members.sort_unstable();
        }
        for member in &mut members {
            *member = member.wrapping_add(table.covers.start.0);
        }
        members
    };
    cave.tables.iter().map(decode).collect()
}

/// The offsets that a table of bytes says, one a byte: its place is the high bits of the offset's product with the part's multiplier,
/// modulo 2^`bits`, and it is the offset's own low byte. So the product's low byte is known, and with it the offset.
fn hashed_bytes(bytes: &[u8], bits: u32) -> Vec<u64> {
    // Rule 2 reports a table whose parts do not come out even.
    let Some(hash) = HashedBytes::new(bits) else {
        return Vec::new();
    };
    let parts = bytes.chunks_exact(hash.part_len()).take(HashedBytes::PARTS);
    let mut members = Vec::with_capacity(bytes.len());
    for (part, bytes) in parts.enumerate() {
        let odd = hash.multiplier(part) >> (32 - bits);
        // The order of an odd number modulo 2^32 divides 2^30: its power before that is its inverse.
        let inverse = (0..30).fold(1u32, |power, _| power.wrapping_mul(power).wrapping_mul(odd));
        for (place, byte) in (0u32..).zip(bytes) {
            let product = place << 8 | u32::from(*byte).wrapping_mul(odd) & 0xff;
            let offset = product.wrapping_mul(inverse) & (u32::MAX >> (32 - bits));
            members.push(offset.into());
        }
    }
    members
}

/// Proves rule 5.
pub fn check(subject: &Subject<'_>, roles: &Roles) -> Result<RuleReport, KernelError> {
    let kernel = subject.kernel;
    let mut findings = Findings::new(Rule::ExactSets, kernel);
    let cave = &subject.bundle.manifest.cave;
    let Ok(image) = subject.cave else {
        if !cave.tables.is_empty() {
            findings.broken(None, None, "the tables cannot be read".to_owned());
        }
        return Ok(findings.done());
    };
    let decoded = decoded_tables(subject.bundle, image);
    for (table, members) in cave.tables.iter().zip(&decoded) {
        let place = Some(table.range.start);
        if table.count != members.len() as u64 {
            let what = format!(
                "table `{}` holds {} addresses, the manifest says {}",
                table.name,
                members.len(),
                table.count
            );
            findings.broken(None, place, what);
        }
        // One entry may be in several classes.
        let once = !matches!(table.kind, TableKind::HashedClasses { .. });
        if once && !members.is_sorted_by(|a, b| a < b) {
            findings.broken(None, place, format!("table `{}` is not sorted", table.name));
        }
        if let Some(stray) = members
            .iter()
            .find(|at| !table.covers.contains(LinkVa(**at)))
        {
            let what = format!(
                "table `{}` holds an address that it does not cover",
                table.name
            );
            findings.broken(None, Some(LinkVa(*stray)), what);
        }
    }
    let mut used = roles.hashed.clone();
    let (return_sites, mut entries) = (sets::return_sites(kernel)?, sets::entries(kernel)?);
    watched::claims(subject, &mut findings);
    for at in watched::unreachable(subject) {
        entries.required.remove(at);
        entries.optional.remove(at);
    }
    returns::check(subject, roles, &return_sites, &mut findings)?;
    classes::check(subject, roles, &entries, &mut findings)?;
    promoted::are_entries(&roles.promoted, &entries, &mut findings);
    for (sets, what, legal) in [
        (&roles.returns, "return sites", return_sites),
        (&roles.entries, "entries", entries),
    ] {
        for tables in sets {
            used.extend(tables.iter().copied());
            compare(subject, &decoded, tables, what, &legal, &mut findings);
        }
    }
    for (index, table) in cave.tables.iter().enumerate() {
        if !used.contains(&index) {
            let what = format!("no thunk was proved to read table `{}`", table.name);
            findings.broken(None, Some(table.range.start), what);
        }
    }
    Ok(findings.done())
}

fn compare(
    subject: &Subject<'_>,
    decoded: &[Vec<u64>],
    tables: &[usize],
    what: &str,
    legal: &Legal,
    findings: &mut Findings<'_>,
) {
    let manifest = &subject.bundle.manifest.cave.tables;
    let names: Vec<&str> = tables
        .iter()
        .map(|table| manifest[*table].name.as_str())
        .collect();
    let names = names.join(" and ");
    let held: BTreeSet<LinkVa> = tables
        .iter()
        .flat_map(|table| decoded[*table].iter().map(|at| LinkVa(*at)))
        .collect();
    // What no table covers passes: the text must be covered from end to end.
    let text = subject.kernel.text;
    if !tables
        .iter()
        .any(|table| manifest[*table].covers.encloses(&text))
    {
        let reason = format!(
            "{names} does not cover all of .text ({} to {}); what it leaves out passes unchecked",
            hex(text.start),
            hex(text.end)
        );
        findings.broken(None, Some(text.start), reason);
    }
    for at in legal.required.difference(&held) {
        let reason =
            format!("missing from {names}: one of the legal {what}; correct code would be killed");
        findings.broken(None, Some(*at), reason);
    }
    let mut optional = 0;
    for at in held.difference(&legal.required) {
        if legal.optional.contains(at) {
            optional += 1;
            continue;
        }
        let reason =
            format!("too many in {names}: none of the legal {what}; the check is weakened");
        findings.broken(None, Some(*at), reason);
    }
    findings.proved(&format!("legal {what}"), legal.required.len() as u64);
    if optional > 0 {
        findings.proved(&format!("{what} that cannot be reached"), optional);
    }
}
