//! `events --count`: the audit log summed up.

use super::events::kind;
use super::table;
use crate::audit::{Body, Subject};
use serde::Serialize;
use std::collections::BTreeMap;

/// What `--count --json` prints.
const COUNTS: &str = "penumbra.counts/v1";

/// What `--count` counts by.
#[derive(Serialize, PartialEq, Eq, PartialOrd, Ord)]
struct Counted {
    /// The kind of event.
    event: &'static str,
    /// The pass, of what it stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pass: Option<String>,
    /// The function that was called, or the place that was stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    function: Option<String>,
    /// Who did it.
    #[serde(skip_serializing_if = "Option::is_none")]
    program: Option<String>,
}

/// How often each was seen.
#[derive(Default)]
pub struct Counts(BTreeMap<Counted, u64>);

impl Counts {
    /// Counts one more.
    pub fn add(&mut self, body: &Body) {
        let program = |process: &Subject| {
            let program = process.exe.as_ref().unwrap_or(&process.comm);
            (!program.is_empty()).then(|| program.clone())
        };
        let (pass, function, program) = match body {
            Body::Violation {
                pass,
                value,
                target,
                process,
                ..
            } => {
                let target = target.as_ref().map(|site| site.symbol.clone());
                let target = target.unwrap_or_else(|| value.to_string());
                (Some(pass.clone()), Some(target), program(process))
            }
            Body::Entered {
                function, process, ..
            } => (None, Some(function.symbol.clone()), program(process)),
            _ => (None, None, None),
        };
        let counted = Counted {
            event: kind(body),
            pass,
            function,
            program,
        };
        *self.0.entry(counted).or_default() += 1;
    }

    /// The most frequent first.
    fn rows(self) -> Vec<(Counted, u64)> {
        let mut rows: Vec<(Counted, u64)> = self.0.into_iter().collect();
        rows.sort_by(|(a, times), (b, others)| others.cmp(times).then_with(|| a.cmp(b)));
        rows
    }

    /// For programs.
    pub fn json(self) -> serde_json::Value {
        #[derive(Serialize)]
        struct Row {
            #[serde(flatten)]
            what: Counted,
            count: u64,
        }
        let rows = self.rows().into_iter();
        let rows: Vec<Row> = rows.map(|(what, count)| Row { what, count }).collect();
        serde_json::json!({ "schema": COUNTS, "counts": rows })
    }

    /// For people.
    pub fn text(self) -> String {
        let mut table = table(&["COUNT", "EVENT", "PASS", "FUNCTION", "PROGRAM"]);
        for (what, count) in self.rows() {
            let word = |word: Option<String>| word.unwrap_or_default();
            table.add_row([
                count.to_string(),
                what.event.to_owned(),
                word(what.pass),
                word(what.function),
                // A name of the guest's choosing.
                word(what.program).escape_debug().to_string(),
            ]);
        }
        format!("{table}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::{Body, Counts, Subject};
    use crate::audit::Site;
    use crate::xen::{GuestVa, Root};

    fn entered(symbol: &str, comm: &str) -> Body {
        Body::Entered {
            function: Site {
                address: GuestVa(1),
                symbol: symbol.to_owned(),
            },
            site: None,
            process: Subject {
                comm: comm.to_owned(),
                ..Subject::default()
            },
            view: "hardened".to_owned(),
            vcpu: 0,
            root: Root(0x1000),
            xen_time: 1,
        }
    }

    #[test]
    fn events_are_counted_by_function_and_program_the_most_frequent_first() {
        let mut counts = Counts::default();
        for body in [
            entered("vfs_read", "a"),
            entered("vfs_write", "a"),
            entered("vfs_write", "a"),
            entered("vfs_write", "b\x1b"),
            Body::Overflow { records: 3 },
        ] {
            counts.add(&body);
        }
        let text = counts.text();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines[1], ["2", "entered", "vfs_write", "a"]);
        assert_eq!(lines.len(), 5, "{text}");
        assert!(!text.contains('\x1b'), "{text:?}");
    }

    #[test]
    fn counts_are_one_object_for_programs() {
        let mut counts = Counts::default();
        counts.add(&entered("vfs_read", "a"));
        let json = counts.json();
        let row = serde_json::json!({
            "event": "entered", "function": "vfs_read", "program": "a", "count": 1
        });
        assert_eq!(json["counts"], serde_json::json!([row]));
    }
}
