//! Of which entries BTF may have another function's prototype, and what follows from that.
//!
//! Static functions share names, and a kernel's build may keep fewer prototypes of a name than there are functions: which of
//! them it is about cannot be known. Each such entry must be claimed as doubtful. Claims that are made for another reason are
//! believed: all that they do is to let more through, which the thunks are proved to do.

use super::Subject;
use super::kernel::btf::Btf;
use super::kernel::{Kernel, KernelError};
use super::report::Findings;
use super::sets::Legal;
use penumbra_bundle::{ForwardSets, LinkVa};
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet};

/// Why an entry is doubted: its name, or something that the checker does not look into.
const NAME: &str = "name";
const OTHERS: [&str; 2] = ["place", "code"];

/// The entries that are claimed to be doubtful.
#[derive(Default)]
pub struct Doubts {
    /// All of them.
    pub all: BTreeSet<LinkVa>,
    /// Those that every branch by prototype lets through.
    pub untold: BTreeSet<LinkVa>,
}

/// Proves that the claims have every entry that shares its name, and returns them.
pub fn check(
    subject: &Subject<'_>,
    claims: &ForwardSets,
    entries: &Legal,
    findings: &mut Findings<'_>,
) -> Result<Doubts, KernelError> {
    let kernel = subject.kernel;
    let text = subject.bundle.manifest.text.start.0;
    let sharing = sharing(kernel, &entries.required)?;
    let exports: BTreeSet<LinkVa> = kernel.tables.exports.iter().copied().collect();
    let mut doubts = Doubts::default();
    for claim in &claims.doubts {
        let at = LinkVa(text + u64::from(claim.at.0));
        doubts.all.insert(at);
        if !claim.told {
            doubts.untold.insert(at);
        }
        let mut wrong = |what: &str| findings.broken(None, Some(at), what.to_owned());
        if !entries.required.contains(&at) {
            wrong("is claimed to be doubtful, and its address is never taken");
        }
        if claim.by == NAME && !sharing.contains(&at) {
            wrong("is claimed to share its name with functions that BTF lacks, and does not");
        }
        if claim.by != NAME && !OTHERS.contains(&claim.by.as_str()) {
            wrong("is claimed to be doubtful for no reason that there is");
        }
        if claim.told && exports.contains(&at) {
            wrong("is claimed to be put in known places only, and modules may put it anywhere");
        }
    }
    for at in sharing.difference(&doubts.all) {
        let what = "BTF has fewer prototypes than there are functions of this name, and it is not claimed to be doubtful";
        findings.broken(None, Some(*at), what.to_owned());
    }
    findings.proved(
        "entries of which BTF may have another one's prototype",
        doubts.all.len() as u64,
    );
    Ok(doubts)
}

/// The entries of whose names BTF has fewer prototypes than there are functions.
fn sharing(kernel: &Kernel, entries: &BTreeSet<LinkVa>) -> Result<BTreeSet<LinkVa>, KernelError> {
    let btf = Btf::read(&kernel.vmlinux)?;
    let mut prototypes: FxHashMap<&[u8], usize> = FxHashMap::default();
    for name in btf.functions() {
        *prototypes.entry(name).or_default() += 1;
    }
    let mut places: BTreeMap<&[u8], BTreeSet<LinkVa>> = BTreeMap::new();
    for symbol in kernel.symbols.iter().filter(|symbol| symbol.is_code()) {
        let name = symbol.name.as_bytes();
        if prototypes.contains_key(name) {
            places.entry(name).or_default().insert(symbol.at);
        }
    }
    let short = places
        .into_iter()
        .filter(|(name, places)| places.len() > prototypes[name]);
    let all = short.flat_map(|(_, places)| places);
    Ok(all.filter(|at| entries.contains(at)).collect())
}
