//! What a check found, for people and for programs.

use super::kernel::Kernel;
use super::kernel::symbols::hex;
use penumbra_bundle::LinkVa;
use serde::Serialize;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// Violations of one rule beyond these are counted, not listed.
const LISTED: usize = 50;

/// What is proved, in the order of the design's invariants.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Invariant 1: one whole instruction by one of the same length.
    SameBoundaries,
    /// Invariant 2: thunks and tables in filler, apart from one another.
    OneSharedCave,
    /// Invariant 3: only slots that nobody pokes.
    AllowedSlots,
    /// Invariant 4: thunks keep what their slots must keep and check what they claim.
    ThunkContract,
    /// The tables hold exactly the legal addresses.
    ExactSets,
    /// Text, relocations, layouts and names are the image's.
    TrueToImage,
    /// Modules are their files', and their edits obey the rules for edits.
    Modules,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Rule; 7] = [
        Rule::SameBoundaries,
        Rule::OneSharedCave,
        Rule::AllowedSlots,
        Rule::ThunkContract,
        Rule::ExactSets,
        Rule::TrueToImage,
        Rule::Modules,
    ];

    fn name(self) -> &'static str {
        match self {
            Rule::SameBoundaries => "same-boundaries",
            Rule::OneSharedCave => "one-shared-cave",
            Rule::AllowedSlots => "allowed-slots",
            Rule::ThunkContract => "thunk-contract",
            Rule::ExactSets => "exact-sets",
            Rule::TrueToImage => "true-to-image",
            Rule::Modules => "modules",
        }
    }
}

/// A place where a bundle breaks a rule.
#[derive(Clone, Debug, Serialize)]
pub struct Violation {
    /// Which rule.
    pub rule: Rule,
    /// In which variant; none when it concerns all.
    pub variant: Option<String>,
    /// Where, as a link address.
    pub address: Option<LinkVa>,
    /// The symbol there, with the offset from it.
    pub symbol: Option<String>,
    /// What is wrong.
    pub what: String,
}

/// What one rule came to.
#[derive(Clone, Debug, Serialize)]
pub struct RuleReport {
    /// Which rule.
    pub rule: Rule,
    /// What was proved, and of how many.
    pub proved: Vec<(String, u64)>,
    /// The first violations.
    pub violations: Vec<Violation>,
    /// All violations, listed or not.
    pub violation_count: u64,
    /// How long it took.
    pub milliseconds: u64,
}

/// Collects what one rule finds.
pub struct Findings<'a> {
    kernel: &'a Kernel,
    started: Instant,
    report: RuleReport,
}

impl<'a> Findings<'a> {
    /// Starts on a rule.
    pub fn new(rule: Rule, kernel: &'a Kernel) -> Findings<'a> {
        Findings {
            kernel,
            started: Instant::now(),
            report: RuleReport {
                rule,
                proved: Vec::new(),
                violations: Vec::new(),
                violation_count: 0,
                milliseconds: 0,
            },
        }
    }

    /// Notes that `count` of `what` hold.
    pub fn proved(&mut self, what: &str, count: u64) {
        let proved = &mut self.report.proved;
        match proved.iter_mut().find(|(known, _)| known == what) {
            Some((_, sum)) => *sum += count,
            None => proved.push((what.to_owned(), count)),
        }
    }

    /// Notes a violation.
    pub fn broken(&mut self, variant: Option<&str>, address: Option<LinkVa>, what: String) {
        self.report.violation_count += 1;
        if self.report.violations.len() < LISTED {
            let symbol = address.and_then(|at| self.kernel.symbols.name(at));
            self.report.violations.push(Violation {
                rule: self.report.rule,
                variant: variant.map(str::to_owned),
                address,
                symbol,
                what,
            });
        }
    }

    /// Ends the rule.
    pub fn done(mut self) -> RuleReport {
        self.report.milliseconds = millis(self.started.elapsed());
        self.report
    }
}

/// The verdict on a bundle.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    schema: &'static str,
    /// Whether no rule is broken.
    pub clean: bool,
    /// The bundle's kernel.
    pub release: String,
    /// Each rule.
    pub rules: Vec<RuleReport>,
    /// How long reading image and bundle took.
    pub reading_milliseconds: u64,
    #[serde(skip)]
    json: bool,
}

impl Outcome {
    /// Sums up.
    pub fn new(release: String, rules: Vec<RuleReport>, reading: Duration, json: bool) -> Outcome {
        Outcome {
            schema: "penumbra.check/v1",
            clean: rules.iter().all(|rule| rule.violation_count == 0),
            release,
            rules,
            reading_milliseconds: millis(reading),
            json,
        }
    }

    /// All listed violations.
    pub fn violations(&self) -> impl Iterator<Item = &Violation> {
        self.rules.iter().flat_map(|rule| &rule.violations)
    }

    /// The report for stdout: JSON when it was asked for.
    pub fn render(&self) -> String {
        if self.json {
            let mut text = serde_json::to_string_pretty(self).expect("plain data always encodes");
            text.push('\n');
            return text;
        }
        let mut text = String::new();
        for rule in &self.rules {
            let mark = if rule.violation_count == 0 {
                "ok    "
            } else {
                "BROKEN"
            };
            let proved: Vec<String> = rule
                .proved
                .iter()
                .map(|(what, count)| format!("{count} {what}"))
                .collect();
            let _ = writeln!(
                text,
                "{mark} {:<16} {} ({} ms)",
                rule.rule.name(),
                proved.join(", "),
                rule.milliseconds
            );
        }
        for rule in self.rules.iter().filter(|rule| rule.violation_count > 0) {
            let _ = writeln!(
                text,
                "\n{}: {} violations",
                rule.rule.name(),
                rule.violation_count
            );
            for violation in &rule.violations {
                let _ = writeln!(text, "  {}", violation.line());
            }
            if rule.violation_count > rule.violations.len() as u64 {
                let _ = writeln!(text, "  and more");
            }
        }
        let verdict = if self.clean { "proved" } else { "NOT proved" };
        let _ = writeln!(text, "{verdict}: bundle for {}", self.release);
        text
    }
}

impl Violation {
    /// One line: variant, address, symbol, what.
    pub fn line(&self) -> String {
        let mut line = String::new();
        if let Some(variant) = &self.variant {
            let _ = write!(line, "[{variant}] ");
        }
        if let Some(address) = self.address {
            let _ = write!(line, "{} ", hex(address));
        }
        if let Some(symbol) = &self.symbol {
            let _ = write!(line, "({symbol}) ");
        }
        line + &self.what
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
