//! Of which entries BTF may have another function's prototype, and what follows from that.
//!
//! Static functions share names, and a kernel's build may keep fewer prototypes of a name than there are functions: which of
//! them it is about cannot be known, and makes no difference only where all of them are the same code. Each other such entry
//! must be claimed as doubtful. Claims that are made for another reason are
//! believed: all that they do is to let more through, which the thunks are proved to do.

use super::Subject;
use super::kernel::btf::Btf;
use super::kernel::{Kernel, KernelError};
use super::report::Findings;
use super::sets::Legal;
use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind};
use penumbra_bundle::{ForwardSets, LinkVa, VaRange};
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
        let what = "BTF has fewer prototypes than there are different functions of this name, and it is not claimed to be doubtful";
        findings.broken(None, Some(*at), what.to_owned());
    }
    findings.proved(
        "entries of which BTF may have another one's prototype",
        doubts.all.len() as u64,
    );
    Ok(doubts)
}

/// The entries of whose names BTF has fewer prototypes than there are functions, unless these are the same.
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
        .filter(|(name, places)| places.len() > prototypes[name] && !are_one(kernel, places));
    let all = short.flat_map(|(_, places)| places);
    Ok(all.filter(|at| entries.contains(at)).collect())
}

/// Whether the functions that start at these places are the same instructions, byte for byte but for displacements, which must
/// lead to the same addresses, or to the same place in the function.
fn are_one(kernel: &Kernel, starts: &BTreeSet<LinkVa>) -> bool {
    let shown: Option<BTreeSet<Vec<Shown>>> = starts
        .iter()
        .map(|start| shown(kernel, own_range(kernel, *start)?))
        .collect();
    shown.is_some_and(|shown| shown.len() == 1)
}

/// The text of the function that starts at `start`: up to the next symbol, or to the next function that has lost its name.
fn own_range(kernel: &Kernel, start: LinkVa) -> Option<VaRange> {
    let mut range = kernel.symbols.around(start)?;
    let inside = kernel.in_text(start) && range.start == start;
    let traced = kernel.tables.fentry.iter();
    let traced =
        traced.filter(|site| range.contains(**site) && site.0 > start.0 + ENDBR64.len() as u64);
    if let Some(site) = traced.min() {
        let before = LinkVa(site.0 - ENDBR64.len() as u64);
        let endbr = kernel.vmlinux.bytes(before, ENDBR64.len()) == Some(&ENDBR64);
        range.end = if endbr { before } else { *site };
    }
    Some(range).filter(|_| inside)
}

/// What starts a function that may be branched to indirectly.
const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];

/// An instruction without its displacement: its bytes, and where this leads.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Shown {
    bytes: Vec<u8>,
    leads: Option<Leads>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Leads {
    Inside(u64),
    To(u64),
}

/// The instructions of one function up to the filler behind it; none when they do not decode.
fn shown(kernel: &Kernel, range: VaRange) -> Option<Vec<Shown>> {
    let code = kernel.bytes(range)?;
    let mut decoder = Decoder::with_ip(64, code, range.start.0, DecoderOptions::NONE);
    let (mut all, mut filler) = (Vec::new(), 0);
    while decoder.can_decode() {
        let at = decoder.position();
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return None;
        }
        filler = match instruction.mnemonic() {
            Mnemonic::Int3 | Mnemonic::Nop => filler + 1,
            _ => 0,
        };
        let offsets = decoder.get_constant_offsets(&instruction);
        let mut bytes = code[at..decoder.position()].to_vec();
        let mut blank = |from: usize, len: usize| bytes[from..from + len].fill(0);
        let leads = if instruction.op0_kind() == OpKind::NearBranch64 {
            blank(offsets.immediate_offset(), offsets.immediate_size());
            Some(instruction.near_branch_target())
        } else if instruction.is_ip_rel_memory_operand() {
            blank(offsets.displacement_offset(), offsets.displacement_size());
            Some(instruction.ip_rel_memory_address())
        } else {
            None
        };
        let leads = leads.map(|to| match range.contains(LinkVa(to)) {
            true => Leads::Inside(to - range.start.0),
            false => Leads::To(to),
        });
        all.push(Shown { bytes, leads });
    }
    all.truncate(all.len() - filler);
    (!all.is_empty()).then_some(all)
}
