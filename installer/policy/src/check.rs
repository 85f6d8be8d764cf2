//! A policy file and its own tests, for `installer policy check FILE`.

use crate::diagnostic::{Diagnostic, Severity, render};
use crate::parse::MAX_POLICY;
use crate::{Decision, Policy, Test};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

/// The policy is sound and its tests pass.
const SOUND: u8 = 0;
/// The policy is sound; a test of its own fails.
const TEST_FAILED: u8 = 1;
/// The policy cannot be read or is refused.
const REFUSED: u8 = 2;

/// How one of a policy's own tests went.
#[derive(Clone, Debug)]
pub struct TestResult<'p> {
    /// The test.
    pub test: &'p Test,
    /// What the policy decided.
    pub decision: Decision,
    /// Whether that is what the test expects.
    pub passed: bool,
}

impl Policy {
    /// Runs the policy's own tests.
    pub fn run_tests(&self) -> Vec<TestResult<'_>> {
        let mut results = Vec::new();
        for test in &self.tests {
            let decision = self.decide(&test.process);
            let rule_fits = test.rule.as_ref().is_none_or(|rule| *rule == decision.rule);
            results.push(TestResult {
                test,
                passed: rule_fits && decision.view == test.view.name(),
                decision,
            });
        }
        results
    }
}

/// Checks the policy file `path`, runs its tests, and writes what there is to say to `out`.
///
/// The result is the exit code: 0 sound, 1 a test fails, 2 refused or unreadable. An error is one of writing to `out`.
pub fn check_file(path: &Path, out: &mut dyn Write) -> io::Result<u8> {
    let name = path.display().to_string();
    let mut bytes = Vec::new();
    // One byte more than is read: enough for the parser to see that the file is too large.
    let file = File::open(path);
    let read = file.and_then(|file| file.take(MAX_POLICY as u64 + 1).read_to_end(&mut bytes));
    if let Err(error) = read {
        writeln!(out, "{name}: {error}")?;
        return Ok(REFUSED);
    }
    Ok(match check_bytes(&name, &bytes, out)? {
        Ok(_) => SOUND,
        Err(code) => code,
    })
}

/// Checks a policy that was read already (the signer's verified bytes), as [`check_file`] does.
///
/// A sound policy comes back; any other as the exit code that [`check_file`] has for it.
pub fn check_bytes(
    name: &str,
    bytes: &[u8],
    out: &mut dyn Write,
) -> io::Result<Result<Policy, u8>> {
    let src = String::from_utf8_lossy(bytes);
    let policy = match Policy::parse_bytes(name, bytes) {
        Ok(policy) => policy,
        Err(found) => {
            let errors = found
                .iter()
                .filter(|found| found.severity == Severity::Error)
                .count();
            let s = if errors == 1 { "" } else { "s" };
            writeln!(
                out,
                "{}{name}: refused: {errors} error{s}",
                render(&src, &found)
            )?;
            return Ok(Err(REFUSED));
        }
    };
    let results = policy.run_tests();
    let failed: Vec<_> = results.iter().filter(|result| !result.passed).collect();
    let mut found = policy.warnings.clone();
    found.extend(failed.iter().map(|result| failure((name, &src), result)));
    write!(out, "{}", render(&src, &found))?;
    let verdict = if failed.is_empty() {
        "sound"
    } else {
        "its own tests fail"
    };
    let (rules, tests) = (policy.rules.len(), results.len());
    writeln!(
        out,
        "{name}: {verdict}: policy {} version {}, {rules} rule(s), {} of {tests} test(s) passed",
        policy.name,
        policy.version,
        tests - failed.len(),
    )?;
    let sound = failed.is_empty();
    Ok(if sound { Ok(policy) } else { Err(TEST_FAILED) })
}

fn failure(place: (&str, &str), result: &TestResult<'_>) -> Diagnostic {
    let TestResult { test, decision, .. } = result;
    let Decision { view, rule, why } = decision;
    let expected = match &test.rule {
        Some(rule) => format!("expected `{}` by `{rule}`", test.view),
        None => format!("expected `{}`", test.view),
    };
    let message = format!("test \"{}\" fails", test.name);
    Diagnostic::new(place, Severity::Error, "P201", test.span.clone(), message)
        .label(format!("{expected}, is `{view}` by `{rule}`"))
        .help(format!("why `{view}`: {why}"))
}
