//! `events`: the audit log, as it is and as it grows.

use super::counts::Counts;
use super::{CliError, cli, print, print_json, stop_flag};
use crate::audit::{Body, Entry, Reader, Record, Site, Subject, log_dir};
use crate::exit::Exit;
use crate::xen;
use std::io;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;

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

fn wanted(entry: &Entry, only: Option<&str>) -> bool {
    match (&entry.record, only) {
        (Some(record), Some(only)) => kind(&record.body) == only,
        (record, None) => record.is_some(),
        (None, Some(_)) => false,
    }
}

/// The name of an event, as the log has it.
pub fn kind(body: &Body) -> &'static str {
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
