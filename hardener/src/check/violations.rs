//! Rule 4, what is stopped: each report is made where, by whom and with the consequence that the manifest says.

use super::Subject;
use super::cave::CaveImage;
use super::exec::exits::Report;
use super::exec::machine::Contract;
use super::large_frames::{FRAME, LEFT};
use super::report::Findings;
use super::{self_checks, watched};
use penumbra_bundle::{LinkVa, Offending, PassSummary, Trap, VaRange, ViolationAction};
use std::collections::{BTreeMap, BTreeSet};

/// The parameter in which a pass's summary says what its thunks do.
const ON_VIOLATION: &str = "on-violation";
/// The parameter in which a pass says which targets its slots may reach, and the passes that have one; rule 5 proves what they
/// may.
const POLICY: &str = "policy";
/// The same for which returns are checked; rule 3 proves that.
const SCOPE: &str = "scope";
const RETURN_CFI: &str = "return-cfi";
const FORWARD_CFI: &str = "forward-cfi";
/// More is no message that a panic's line holds (kernel/panic.c, `buf`).
const MAX_MESSAGE: u64 = 200;

/// A report as it was followed to its end.
pub struct Reported {
    /// The `out`.
    pub at: LinkVa,
    /// What follows.
    pub report: Report,
    /// The pass whose slots lead here.
    pub pass: &'static str,
    /// What they are about.
    pub offending: Offending,
}

impl Reported {
    /// The report of a thunk of whom its slots asked `contract`.
    pub fn of(at: LinkVa, report: Report, contract: &Contract) -> Reported {
        let (pass, offending) = match contract.target {
            Some(register) => (FORWARD_CFI, Offending::Register(register)),
            None => (RETURN_CFI, Offending::Stack(0)),
        };
        Reported {
            at,
            report,
            pass,
            offending,
        }
    }
}

/// Compares what thunks do with what the manifest says; all thunks have been proved.
pub fn check(
    subject: &Subject<'_>,
    image: &CaveImage,
    reported: &[Reported],
    findings: &mut Findings<'_>,
) {
    let cave = &subject.bundle.manifest.cave;
    let listed: BTreeMap<LinkVa, &Trap> = cave.traps.iter().map(|trap| (trap.at, trap)).collect();
    let mut reached = BTreeSet::new();
    for Reported {
        at,
        report,
        pass,
        offending,
    } in reported
    {
        // Rule 4 has named it: an `out` that is not listed.
        let Some(trap) = listed.get(at) else {
            continue;
        };
        reached.insert(*at);
        let mut wrong = Vec::new();
        if trap.pass != *pass {
            wrong.push(format!("for pass {}, it is for {pass}", trap.pass));
        }
        if trap.offending != *offending {
            let (said, found) = (trap.offending, offending);
            wrong.push(format!("about {said:?}, it is about {found:?}"));
        }
        if trap.action != report.action {
            let (said, found) = (trap.action.name(), report.action.name());
            wrong.push(format!("to {said}, the thunk does {found}"));
        }
        if let Some(message) = report.message {
            wrong.extend(message_fault(subject, image, LinkVa(message)));
        }
        for what in wrong {
            let what = format!("{}: the manifest's trap is {what}", image.describe(*at));
            findings.broken(None, Some(*at), what);
        }
    }
    for trap in &cave.traps {
        if !reached.contains(&trap.at) {
            let what = "no slot leads to the manifest's trap".to_owned();
            findings.broken(None, Some(trap.at), what);
        }
    }
    findings.proved("reports followed to their end", reached.len() as u64);
    parameters(subject, findings);
}

/// What `panic` prints is a string in the cave, outside every table, that is no format.
fn message_fault(subject: &Subject<'_>, image: &CaveImage, at: LinkVa) -> Option<String> {
    let cave = &subject.bundle.manifest.cave;
    let range = |len| VaRange {
        start: at,
        end: LinkVa(at.0.saturating_add(len)),
    };
    let byte = |index| {
        let one = VaRange {
            start: LinkVa(at.0.saturating_add(index)),
            end: LinkVa(at.0.saturating_add(index + 1)),
        };
        let inside = image.tables.encloses(&one);
        inside.then(|| image.slice(cave, one)[0])
    };
    let text: Vec<u8> = (0..MAX_MESSAGE)
        .map_while(byte)
        .take_while(|byte| *byte != 0)
        .collect();
    let ends = byte(text.len() as u64) == Some(0);
    let plain = |byte: &u8| (b' '..=b'~').contains(byte) && *byte != b'%';
    if !ends || text.is_empty() || !text.iter().all(plain) {
        return Some("followed by a panic whose message is no plain text in the cave".to_owned());
    }
    let message = range(text.len() as u64 + 1);
    let overlaps = |other: &VaRange| message.start < other.end && other.start < message.end;
    cave.tables
        .iter()
        .any(|table| overlaps(&table.range))
        .then(|| "followed by a panic whose message lies in a table".to_owned())
}

/// What each pass's summary says is what all its traps do.
fn parameters(subject: &Subject<'_>, findings: &mut Findings<'_>) {
    let traps = &subject.bundle.manifest.cave.traps;
    let mut passes = BTreeSet::new();
    for (variant, _) in subject.variants() {
        for pass in &variant.passes {
            passes.insert(pass.name.as_str());
            let own = traps.iter().filter(|trap| trap.pass == pass.name);
            let actions: BTreeSet<ViolationAction> = own.map(|trap| trap.action).collect();
            match said(pass, &actions) {
                None => findings.proved("parameters", pass.parameters.len() as u64),
                Some(what) => findings.broken(Some(&variant.name), None, what),
            }
        }
    }
    for trap in traps {
        if !passes.contains(trap.pass.as_str()) {
            let what = format!("the trap is for pass {}, which no variant has", trap.pass);
            findings.broken(None, Some(trap.at), what);
        }
    }
}

fn said(pass: &PassSummary, actions: &BTreeSet<ViolationAction>) -> Option<String> {
    let name = &pass.name;
    let cfi = [RETURN_CFI, FORWARD_CFI].contains(&name.as_str());
    let scoped = name == RETURN_CFI;
    let widened = name == watched::DEBLOAT;
    let probe = name == watched::PROBE;
    let deep = name == watched::STACK_DEPTH;
    let proved = |key: &&String| {
        *key == ON_VIOLATION
            || cfi && *key == POLICY
            || scoped && *key == SCOPE
            || name == self_checks::PASS
            || widened && [watched::WIDEN, watched::TARGETS].contains(&key.as_str())
            || deep && [FRAME, LEFT].contains(&key.as_str())
    };
    if let Some(other) = pass.parameters.keys().find(|key| !proved(key)) {
        return Some(format!("pass {name} says `{other}`, which no rule proves"));
    }
    let found: Vec<&str> = actions.iter().map(|action| action.name()).collect();
    let said = pass.parameters.get(ON_VIOLATION);
    let said: Vec<&str> = said.map(String::as_str).into_iter().collect();
    // A probe always goes on, and there is nothing to say about it.
    let goes_on = probe && said.is_empty() && (found == ["log"] || pass.edited == 0);
    let idle = goes_on || (widened || deep) && pass.edited == 0 && found.is_empty();
    (found != said && !idle).then(|| {
        let (said, found) = (said.join(", "), found.join(", "));
        format!("pass {name} says {ON_VIOLATION} `{said}`, its thunks do `{found}`")
    })
}
