//! From a process to its view.

use crate::{Diagnostic, Glob};
use std::collections::BTreeSet;
use std::fmt;

/// What [`Decision::rule`] says when no rule decided. No rule can have this id.
pub const DEFAULT_RULE: &str = "default";

/// A variant of the kernel's text. Ordered by strictness: the greater is the stricter.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum View {
    /// Mitigations that the policy's author has judged unneeded are left out.
    Fast,
    /// The kernel as it booted.
    Stock,
    /// With checks added.
    Hardened,
}

impl View {
    /// All of them, strictest first.
    pub const ALL: [View; 3] = [View::Hardened, View::Stock, View::Fast];

    /// The variant's name in policies and bundles.
    pub fn name(self) -> &'static str {
        match self {
            View::Fast => "fast",
            View::Stock => "stock",
            View::Hardened => "hardened",
        }
    }
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A policy that has been checked.
#[derive(Clone, Debug)]
pub struct Policy {
    /// What the policy is called.
    pub name: String,
    /// Grows with each release of the policy.
    pub version: u64,
    /// Build-ids of the kernels that the policy speaks about, lower-case hexadecimal; empty: any.
    pub kernels: Vec<String>,
    /// The view of processes that no rule matches.
    pub default: View,
    /// While a module stays on its own text nobody has a laxer view than the default.
    pub refuses_unknown_modules: bool,
    /// The rules. Their order has no meaning.
    pub rules: Vec<Rule>,
    /// The policy's own tests.
    pub tests: Vec<Test>,
    /// What is allowed and probably not meant.
    pub warnings: Vec<Diagnostic>,
}

/// One rule.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Unique in the policy.
    pub id: String,
    /// Why the rule is there.
    pub reason: Option<String>,
    /// The view it gives.
    pub view: View,
    /// When it matches.
    pub when: Condition,
    /// When it does not all the same.
    pub unless: Option<Condition>,
}

/// What is asked of a process: every list that is not empty must hold, by one of its values.
#[derive(Clone, Debug, Default)]
pub struct Condition {
    /// Patterns for the executable's path.
    pub exe: Vec<Glob>,
    /// Real user ids, as the guest's initial user namespace counts them.
    pub uid: Vec<u32>,
}

/// One of a policy's own tests.
#[derive(Clone, Debug)]
pub struct Test {
    /// What it shows.
    pub name: String,
    /// The process.
    pub process: Process,
    /// The view that it must get.
    pub view: View,
    /// The rule that must decide, when the test names one.
    pub rule: Option<String>,
    /// Where the test stands in the file.
    pub(crate) span: std::ops::Range<usize>,
}

/// What is known about a process; `None` is unknown. All of it is the guest kernel's word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// The executable's absolute path; `None` also for kernel threads, which have none.
    pub exe: Option<String>,
    /// The real user id.
    pub uid: Option<u32>,
}

/// The view of a process and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The view's name.
    pub view: String,
    /// Id of the rule that decided, or [`DEFAULT_RULE`].
    pub rule: String,
    /// Why, in one line.
    pub why: String,
}

/// Truth of a condition about a process of which some things are not known (Kleene's three values).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Truth {
    No,
    Unknown,
    Yes,
}

impl Truth {
    fn not(self) -> Truth {
        match self {
            Truth::No => Truth::Yes,
            Truth::Unknown => Truth::Unknown,
            Truth::Yes => Truth::No,
        }
    }
}

impl Condition {
    fn holds(&self, process: &Process) -> Truth {
        let exe = ask(&self.exe, process.exe.as_deref(), |glob, exe| {
            glob.matches(exe)
        });
        let uid = ask(&self.uid, process.uid, |wanted, uid| *wanted == uid);
        exe.min(uid)
    }
}

/// One key of a condition: true when nothing is asked, unknown when the answer is not known.
fn ask<W, V: Copy>(wanted: &[W], value: Option<V>, fits: impl Fn(&W, V) -> bool) -> Truth {
    match value {
        _ if wanted.is_empty() => Truth::Yes,
        None => Truth::Unknown,
        Some(value) if wanted.iter().any(|wanted| fits(wanted, value)) => Truth::Yes,
        Some(_) => Truth::No,
    }
}

impl Rule {
    fn matches(&self, process: &Process) -> Truth {
        let unless = self.unless.as_ref();
        let unless = unless.map_or(Truth::No, |unless| unless.holds(process));
        self.when.holds(process).min(unless.not())
    }
}

impl Policy {
    /// The view of `process`.
    ///
    /// The strictest view among the rules that match; the default when none does. A rule of which it is not known
    /// whether it matches counts when that makes the view stricter, never when it makes it laxer: whatever the unknown
    /// values are, the view is at least as strict as it would be if they were known.
    pub fn decide(&self, process: &Process) -> Decision {
        let (mut certain, mut possible) = (None::<&Rule>, None::<&Rule>);
        for rule in &self.rules {
            let strictest = match rule.matches(process) {
                Truth::No => continue,
                Truth::Yes => &mut certain,
                Truth::Unknown => &mut possible,
            };
            // Of equally strict rules the first in the file is named.
            if strictest.is_none_or(|other| other.view < rule.view) {
                *strictest = Some(rule);
            }
        }
        let view = certain.map_or(self.default, |rule| rule.view);
        let unknown = match (&process.exe, process.uid) {
            (None, None) => "exe and uid are unknown",
            (None, Some(_)) => "exe is unknown",
            _ => "uid is unknown",
        };
        let decision = |view: View, rule: &str, why: String| Decision {
            view: view.to_string(),
            rule: rule.to_owned(),
            why,
        };
        match (certain, possible) {
            (_, Some(rule)) if rule.view > view => {
                let why = format!("{unknown}; this rule may match and is stricter than `{view}`");
                decision(rule.view, &rule.id, why)
            }
            (Some(rule), _) => {
                let why = rule.reason.clone();
                decision(
                    view,
                    &rule.id,
                    why.unwrap_or_else(|| "it matches".to_owned()),
                )
            }
            (None, Some(_)) => {
                let why = format!("{unknown}; no rule matches for certain");
                decision(view, DEFAULT_RULE, why)
            }
            (None, None) => decision(view, DEFAULT_RULE, "no rule matches".to_owned()),
        }
    }

    /// Names of all views that a process can get.
    pub fn views(&self) -> BTreeSet<String> {
        let views = self.rules.iter().map(|rule| rule.view);
        let views = views.chain([self.default]);
        views.map(|view| view.to_string()).collect()
    }

    /// Whether the policy speaks about the kernel with this build-id.
    pub fn allows_kernel(&self, build_id: &str) -> bool {
        self.kernels.is_empty()
            || self
                .kernels
                .iter()
                .any(|kernel| kernel.eq_ignore_ascii_case(build_id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever is unknown, knowing it never gives a stricter view: tried with every policy of two rules over small
    /// sets of values.
    #[test]
    fn the_unknown_is_never_faster() {
        let exes = ["/a", "/b"];
        let mut conditions = Vec::new();
        for exe in [&[][..], &["/a"], &["/b"]] {
            for uid in [&[][..], &[0], &[1]] {
                let exe = exe.iter().map(|text| Glob::new(text).unwrap()).collect();
                conditions.push(Condition {
                    exe,
                    uid: uid.to_vec(),
                });
            }
        }
        let mut rules = Vec::new();
        for view in View::ALL {
            for when in &conditions {
                for unless in conditions.iter().map(Some).chain([None]) {
                    rules.push(Rule {
                        id: "r".to_owned(),
                        reason: None,
                        view,
                        when: when.clone(),
                        unless: unless.cloned(),
                    });
                }
            }
        }
        let strictness = |policy: &Policy, process: &Process| {
            let name = policy.decide(process).view;
            View::ALL
                .into_iter()
                .find(|view| view.name() == name)
                .unwrap()
        };
        let mut tried = 0;
        for default in View::ALL {
            for (index, first) in rules.iter().enumerate() {
                // Every seventh second rule: all pairs would take long without showing more.
                for second in rules.iter().skip(index % 7).step_by(7) {
                    let policy = Policy {
                        name: String::new(),
                        version: 1,
                        kernels: Vec::new(),
                        default,
                        refuses_unknown_modules: false,
                        rules: vec![first.clone(), second.clone()],
                        tests: Vec::new(),
                        warnings: Vec::new(),
                    };
                    for exe in exes {
                        for uid in [0, 1] {
                            let (exe, uid) = (Some(exe.to_owned()), Some(uid));
                            let known = Process {
                                exe: exe.clone(),
                                uid,
                            };
                            let known = strictness(&policy, &known);
                            for unknown in [
                                Process { exe: None, uid },
                                Process { exe, uid: None },
                                Process::default(),
                            ] {
                                assert!(
                                    strictness(&policy, &unknown) >= known,
                                    "{policy:?} {unknown:?}"
                                );
                                tried += 1;
                            }
                        }
                    }
                }
            }
        }
        assert!(tried > 100_000, "{tried}");
    }
}
