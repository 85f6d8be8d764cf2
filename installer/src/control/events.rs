//! `events`: the audit log, as it is and as it grows.

use super::{CliError, cli, print, print_json, stop_flag, table};
use crate::audit::{Body, Entry, Reader, Record, Site, Subject, log_dir};
use crate::exit::Exit;
use crate::xen;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;

/// What `--count --json` prints.
const COUNTS: &str = "penumbra.counts/v1";
/// Time between two looks at a log that grows.
const FOLLOW: Duration = Duration::from_millis(200);

/// Runs `events`.
pub fn events(args: &cli::Events) -> Result<Exit, CliError> {
    let stop = stop_flag()?;
    let dir = log_dir();
    let uuid = match &args.uuid {
        Some(uuid) => uuid.clone(),
        None => {
            xen::resolve(args.domain.as_deref().unwrap_or_default())?
                .0
                .uuid
        }
    };
    let mut reader = loop {
        match Reader::open(&dir, &uuid) {
            Ok(reader) => break reader,
            Err(error) if error.kind() == io::ErrorKind::NotFound && args.follow => {
                if stop.load(Ordering::Relaxed) {
                    return Ok(Exit::Done);
                }
                sleep(FOLLOW);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(CliError::NoLog { dir, uuid });
            }
            Err(source) => {
                return Err(CliError::File { path: dir, source });
            }
        }
    };
    let mut whole = true;
    let mut counts = Counts::default();
    loop {
        for entry in reader.new_entries()? {
            whole &= entry.fault.is_none();
            if let Some(fault) = entry.fault {
                eprintln!("installer: {uuid}.jsonl:{}: {fault}", entry.line);
            }
            if !wanted(&entry, args.only.as_deref()) {
                continue;
            }
            match &entry.record {
                Some(record) if args.count => counts.add(&record.body),
                _ => show(&entry, args.json)?,
            }
        }
        if !args.follow || stop.load(Ordering::Relaxed) {
            if args.count {
                match args.json {
                    true => print_json(&counts.json())?,
                    false => print(&counts.text())?,
                }
            }
            return Ok(if whole { Exit::Done } else { Exit::No });
        }
        sleep(FOLLOW);
    }
}

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
struct Counts(BTreeMap<Counted, u64>);

impl Counts {
    fn add(&mut self, body: &Body) {
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

    fn json(self) -> serde_json::Value {
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

    fn text(self) -> String {
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

fn wanted(entry: &Entry, only: Option<&str>) -> bool {
    match (&entry.record, only) {
        (Some(record), Some(only)) => kind(&record.body) == only,
        (record, None) => record.is_some(),
        (None, Some(_)) => false,
    }
}

/// The name of an event, as the log has it.
fn kind(body: &Body) -> &'static str {
    match body {
        Body::Applied { .. } => "applied",
        Body::Bound(_) => "bound",
        Body::Unbound(_) => "unbound",
        Body::Lapsed { .. } => "lapsed",
        Body::Violation { .. } => "violation",
        Body::Entered { .. } => "entered",
        Body::UnknownTrap { .. } => "unknown-trap",
        Body::Refused { .. } => "refused",
        Body::Lost { .. } => "lost",
        Body::Mapped { .. } => "mapped",
        Body::Stays { .. } => "stays",
        Body::Unmapped { .. } => "unmapped",
        Body::Overflow { .. } => "overflow",
        Body::Removed { .. } => "removed",
        Body::Stopped { .. } => "stopped",
        Body::Ended { .. } => "ended",
    }
}

fn show(entry: &Entry, json: bool) -> io::Result<()> {
    match &entry.record {
        // The line as it is: what is printed can be checked against the chain.
        Some(_) if json => print(&format!("{}\n", entry.text)),
        Some(record) => print(&format!("{}\n", in_words(record))),
        None => Ok(()),
    }
}

fn in_words(record: &Record) -> String {
    let missed = match record.missed {
        0 => String::new(),
        count => format!(" ({count} records before this one could not be written)"),
    };
    format!(
        "{} {} {}{missed}",
        record.time,
        record.name,
        describe(&record.body)
    )
}

/// An event in one line of words, its kind first.
pub fn describe(body: &Body) -> String {
    let what = match body {
        Body::Applied {
            release,
            default,
            views,
            taken_over,
            ..
        } => format!(
            "{release}, views {}, default {default}{}",
            views.join(" "),
            if *taken_over { ", taken over" } else { "" }
        ),
        Body::Bound(change) | Body::Unbound(change) => format!(
            "{} ({}) root {} view {}{}",
            change.comm,
            change.pid,
            change.root,
            change.view,
            change
                .rule
                .as_ref()
                .map_or_else(String::new, |rule| format!(", rule {rule}"))
        ),
        Body::Lapsed {
            root,
            witness,
            process,
        } => format!(
            "root {root} is no longer {} (witness {witness}); it runs on the default view",
            name(process)
        ),
        Body::Violation {
            action,
            pass,
            site,
            value,
            target,
            caller,
            process,
            view,
            vcpu,
            ..
        } => format!(
            "{pass} stopped {}{}{} by {} in view {view} on vCPU {vcpu}: {action}",
            place(value.to_string(), target.as_ref()),
            site.as_ref()
                .map_or_else(String::new, |site| format!(" at {}", site.symbol)),
            caller
                .as_ref()
                .map_or_else(String::new, |site| format!(" under {}", site.symbol)),
            name(process),
        ),
        Body::Entered {
            function,
            site,
            process,
            view,
            vcpu,
            ..
        } => format!(
            "{}{} by {} in view {view} on vCPU {vcpu}",
            function.symbol,
            site.as_ref()
                .map_or_else(String::new, |site| format!(" at {}", site.symbol)),
            name(process),
        ),
        Body::UnknownTrap { rip, vcpu } => {
            format!("from {rip} on vCPU {vcpu}: not a trap of this bundle")
        }
        Body::Refused {
            address,
            rip,
            writer,
            view,
            vcpu,
        } => format!(
            "write to text at {address} by {} in view {view} on vCPU {vcpu}",
            place(rip.to_string(), writer.as_ref())
        ),
        Body::Lost { gfn } => format!("a view lost frame {gfn}"),
        Body::Mapped { module, pages, .. } => format!("module {module}: {pages} pages"),
        Body::Stays { module, why, .. } => {
            format!("module {} on its own text: {why}", module.escape_debug())
        }
        Body::Unmapped { at } => format!("the module at {at}: the guest frees it"),
        Body::Overflow { records } => format!("{records} records were lost in Xen"),
        Body::Removed { views, frames } => format!("{views} views, {frames} frames"),
        Body::Stopped { dropped } => format!("{dropped} bindings dropped"),
        Body::Ended { how } => how.clone(),
    };
    format!("{} {what}", kind(body))
}

fn place(address: String, site: Option<&Site>) -> String {
    match site {
        Some(site) => format!("{address} ({})", site.symbol),
        None => address,
    }
}

fn name(process: &Subject) -> String {
    if process.pid == 0 && process.comm.is_empty() {
        return "an unknown process".to_owned();
    }
    let exe = process.exe.as_deref().unwrap_or(&process.comm);
    format!("{exe} ({})", process.pid)
}

#[cfg(test)]
mod tests {
    use super::{Counts, Site, Subject};
    use crate::audit::Body;
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
