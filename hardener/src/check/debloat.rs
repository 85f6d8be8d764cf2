//! Functions outside a profile. Which these are is a claim of the manifest's; proved is that nothing enters them:
//!
//! - rule 3: every direct call and jump to one is edited, but for those that nobody may edit;
//! - rule 4: each edit goes to a thunk that does nothing but report that function, and then what the pass says;
//! - rule 5: each is the first byte of a function that the kernel can trace, and no table of entries and no class has one.

use super::Subject;
use super::cave::CaveImage;
use super::exec::exits::Report;
use super::kernel::sweep::Branch;
use super::kernel::symbols::hex;
use super::owed::has_fentry;
use super::report::Findings;
use super::slots::{Original, Replacement};
use super::violations::Reported;
use iced_x86::{Code, Decoder, DecoderOptions, Register};
use penumbra_bundle::{Bundle, LinkVa, Offending, VaRange, ViolationAction};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// The pass.
pub const PASS: &str = "debloat";
/// The parameter by which it counts more as inside than the profile has: part of the claim.
pub const WIDEN: &str = "widen";

/// How far behind a function's start its `__fentry__` site may stand.
const ENDBR64: u64 = 4;
/// `out %al,$PORT`, by what follows: the report is gone on with, or not.
const LOG: u64 = 0xe4;
const FATAL: u64 = 0xe5;
/// The longest thunk: `out`, `mov $message,%rdi`, `xor %eax,%eax`, `jmp panic`.
const LONGEST: u64 = 16;

/// Where the functions start that the bundle says are outside.
pub fn claimed(bundle: &Bundle) -> BTreeSet<LinkVa> {
    let text = bundle.manifest.text.start.0;
    let outside = bundle.outside.iter().flat_map(|outside| &outside.0);
    outside
        .map(|at| LinkVa(text.wrapping_add(u64::from(at.0))))
        .collect()
}

/// Direct branches that enter a function outside, but for the one that another pass edits.
pub fn into_outside<'a>(subject: &'a Subject<'_>) -> impl Iterator<Item = &'a Branch> {
    let kernel = subject.kernel;
    let free = subject.thunks.module_free.map(|(call, _)| call);
    let mut traced = kernel.tables.fentry.clone();
    traced.sort_unstable();
    kernel.sweep.branches.iter().filter(move |branch| {
        // A jump back to where its own function starts. One that lost its name to another still has its site.
        let own = || {
            let after = traced.partition_point(|site| *site <= branch.at);
            let site = traced[..after].last().copied().unwrap_or(branch.to);
            let around = kernel.symbols.around(branch.at);
            branch.back.is_none()
                && around.is_some_and(|range| range.start == branch.to)
                && site.0 <= branch.to.0 + ENDBR64
        };
        subject.thunks.outside.contains(&branch.to) && Some(branch.at) != free && !own()
    })
}

/// Rule 3: no direct branch to such a function is left alone that could be edited; `forbids` says of which it is not so.
pub fn all_stopped(
    subject: &Subject<'_>,
    forbids: impl Fn(LinkVa, LinkVa) -> bool,
    findings: &mut Findings<'_>,
) {
    let kernel = subject.kernel;
    let into: Vec<&Branch> = into_outside(subject).collect();
    let mut left = 0;
    for (variant, edits) in subject.variants() {
        if !variant.passes.iter().any(|pass| pass.name == PASS) {
            continue;
        }
        let edited: HashSet<LinkVa> = edits.iter().map(|edit| subject.place(edit)).collect();
        for branch in into.iter().filter(|branch| !edited.contains(&branch.at)) {
            let slot = matches!(
                subject.thunks.original(kernel, branch.at),
                Some((Original::Direct { .. }, _))
            );
            if slot && !forbids(branch.at, LinkVa(branch.at.0 + 5)) {
                let to = hex(branch.to);
                let what = format!("enters {to}, which is outside the profile, and is not stopped");
                findings.broken(Some(&variant.name), Some(branch.at), what);
            } else {
                left += 1;
            }
        }
    }
    if left > 0 {
        findings.proved("branches out of the profile left for a reason", left);
    }
}

/// Rule 4: the thunks of all edited calls and jumps, and what they report.
pub fn thunks(subject: &Subject<'_>, findings: &mut Findings<'_>) -> Vec<Reported> {
    let mut proved: BTreeMap<(LinkVa, LinkVa), bool> = BTreeMap::new();
    let (mut reported, mut slots) = (Vec::new(), 0);
    for (variant, edit) in subject.edits() {
        let at = subject.place(edit);
        let original = subject.thunks.original(subject.kernel, at);
        let Some((Original::Direct { to: function, .. }, _)) = original else {
            continue;
        };
        let thunk = subject.check_of(edit);
        let Some(Replacement::Call(thunk) | Replacement::Jump(thunk)) = thunk else {
            continue;
        };
        let sound = *proved.entry((thunk, function)).or_insert_with(|| {
            let image = subject.cave.as_ref().map_err(Clone::clone);
            match image.and_then(|image| report_of(subject, image, thunk, function)) {
                Ok(report) => {
                    reported.push(Reported {
                        at: thunk,
                        report,
                        pass: PASS,
                        offending: Offending::Address(function),
                    });
                    true
                }
                Err(what) => {
                    findings.broken(Some(variant), Some(at), what);
                    false
                }
            }
        });
        slots += u64::from(sound);
    }
    if slots > 0 {
        findings.proved("calls and jumps out of the profile", slots);
    }
    reported
}

/// What the thunk at `at` reports and does, which stands for `function`: by its instructions, which touch neither registers nor
/// stack before they leave.
fn report_of(
    subject: &Subject<'_>,
    image: &CaveImage,
    at: LinkVa,
    function: LinkVa,
) -> Result<Report, String> {
    let range = VaRange {
        start: at,
        end: LinkVa(at.0.saturating_add(LONGEST).min(image.thunks.end.0)),
    };
    let wrong = |what: &str| {
        let name = image.describe(at);
        Err(format!("goes to {name}, which {what}"))
    };
    if range.is_empty() || !image.thunks.encloses(&range) {
        return wrong("is no thunk");
    }
    let bytes = image.slice(&subject.bundle.manifest.cave, range);
    let code: Vec<_> = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE)
        .into_iter()
        .take(4)
        .collect();
    let port = code.first().and_then(|first| {
        let out = first.code() == Code::Out_imm8_AL && first.op1_register() == Register::AL;
        first.try_immediate(0).ok().filter(|_| out)
    });
    let jumps = |index: usize, to: LinkVa| {
        code.get(index).is_some_and(|jump| {
            jump.code() == Code::Jmp_rel32_64 && jump.near_branch_target() == to.0
        })
    };
    let is = |index: usize, wanted: Code| code.get(index).is_some_and(|one| one.code() == wanted);
    let report = |action, message| Ok(Report { action, message });
    match port {
        Some(LOG) if jumps(1, function) => report(ViolationAction::Log, None),
        Some(LOG) => wrong("reports and does not go on into the function that was called"),
        Some(FATAL) if is(1, Code::Ud2) => report(ViolationAction::Kill, None),
        Some(FATAL) if is(1, Code::Mov_rm64_imm32) && jumps(3, subject.thunks.panic) => {
            let told = code[1].op0_register() == Register::RDI;
            let none = matches!(code[2].code(), Code::Xor_rm32_r32 | Code::Xor_r32_rm32)
                && code[2].op0_register() == Register::EAX
                && code[2].op1_register() == Register::EAX;
            match told && none {
                true => report(ViolationAction::Panic, Some(code[1].immediate(1))),
                false => wrong("does not call panic as it is called"),
            }
        }
        Some(FATAL) => wrong("reports that it does not go on, and goes on"),
        _ => wrong("does not report first"),
    }
}

/// Rule 5: the claim itself.
pub fn claims(subject: &Subject<'_>, findings: &mut Findings<'_>) {
    let kernel = subject.kernel;
    let mut passes = subject.variants().flat_map(|(variant, _)| &variant.passes);
    let has_pass = passes.any(|pass| pass.name == PASS);
    if has_pass != subject.bundle.outside.is_some() {
        let what =
            format!("pass {PASS} and a list of functions outside its profile belong together");
        findings.broken(None, None, what);
    }
    let traced: HashSet<LinkVa> = kernel.tables.fentry.iter().copied().collect();
    let mut proved = 0;
    for at in &subject.thunks.outside {
        if kernel.in_text(*at) && has_fentry(kernel, &traced, *at) {
            proved += 1;
            continue;
        }
        let what =
            "is said to be outside the profile, and is no function that the kernel can trace";
        findings.broken(None, Some(*at), what.to_owned());
    }
    if has_pass {
        findings.proved("functions outside the profile", proved);
    }
}
