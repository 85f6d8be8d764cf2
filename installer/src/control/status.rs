//! `status` and `remove`.

use super::resume::report_cave;
use super::{CliError, cli, print, print_json, table};
use crate::audit::{Audit, Body, log_dir};
use crate::exit::Exit;
use crate::views::journal::{self, Journal, JournalError, State};
use crate::views::{self, CaveFate};
use crate::xen::{self, Domain, Hypervisor};
use serde_json::{Value, json};
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long `remove` waits for a watcher to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs `status`.
pub fn status(wanted: Option<&str>, json: bool) -> Result<Exit, CliError> {
    let domains = match wanted {
        Some(wanted) => vec![xen::resolve(wanted)?],
        None => xen::list()?,
    };
    let rows = domains
        .iter()
        .map(|(domain, name)| row(domain, name))
        .collect::<Result<Vec<Value>, CliError>>()?;
    if json {
        print_json(&json!({ "schema": "penumbra.status/v1", "domains": rows }))?;
        return Ok(Exit::Done);
    }
    let mut table = table(&[
        "ID",
        "NAME",
        "STATE",
        "DEFAULT",
        "VIEWS",
        "BOUND",
        "SWITCHES",
        "CR3 WRITES",
        "POKES",
        "WATCHER",
    ]);
    for row in &rows {
        let text = |value: &Value| match value {
            Value::String(text) => text.clone(),
            Value::Null => "-".to_owned(),
            other => other.to_string(),
        };
        let counters = &row["counters"];
        let views = row["views"].as_array().map(Vec::len);
        table.add_row([
            text(&row["domain"]),
            text(&row["name"]),
            text(&row["step"]),
            text(&row["default"]),
            views.map_or_else(|| "-".to_owned(), |views| views.to_string()),
            text(&row["bindings"]),
            text(&counters["view_switches"]),
            text(&counters["cr3_writes"]),
            text(&counters["pokes_mirrored"]),
            text(&row["watcher"]),
        ]);
    }
    print(&format!("{}\n", table.trim_fmt()))?;
    Ok(Exit::Done)
}

fn row(domain: &Domain, name: &str) -> Result<Value, CliError> {
    let state = Journal::reader(&journal::run_dir(), domain.id)
        .load()?
        .filter(|state| state.uuid == domain.uuid);
    let cave_only = state.as_ref().is_some_and(State::is_cave_only);
    let Some(state) = state.filter(|_| !cave_only) else {
        let step = if cave_only {
            "hook code left"
        } else {
            "not applied"
        };
        return Ok(json!({
            "domain": domain.id, "name": name, "applied": false, "step": step,
        }));
    };
    // A Xen without the interface has no counters; what the journal says is shown all the same.
    let xen = xen::open(domain.id)?;
    let (stats, events) = (xen.stats().ok(), xen.counters().ok());
    let alive =
        state.watcher != 0 && fs::exists(format!("/proc/{}", state.watcher)).unwrap_or(false);
    Ok(json!({
        "domain": domain.id,
        "name": name,
        "applied": stats.is_some_and(|stats| stats.enabled),
        "step": state.step,
        "default": stats.map(|stats| state.view_name(stats.default)),
        "bindings": stats.map(|stats| stats.bindings),
        "counters": stats.map(|stats| json!({
            "cr3_writes": stats.cr3_writes,
            "view_switches": stats.view_switches,
            "pokes_mirrored": stats.pokes_mirrored,
            "generation": stats.generation,
            "conflicts": stats.conflicts,
            "displaced": stats.displaced,
            "lapsed": events.as_ref().map(|events| events.lapsed),
            "refused": events.as_ref().map(|events| events.refused),
            "violations": events.as_ref().map(|events| events.violations),
        })),
        "views": state.views.iter().map(|view| json!({
            "name": view.name, "view": view.view, "pages": view.pages.len(),
            "drops_mitigation": view.drops_mitigation,
        })).collect::<Vec<_>>(),
        "slide": format!("{:#x}", state.reader.slide().0),
        "release": state.release,
        "build_id": state.build_id,
        "bundle": state.bundle,
        "policy": state.policy,
        "watcher": alive.then_some(state.watcher),
    }))
}

/// Runs `remove`.
pub fn remove(args: &cli::Remove) -> Result<Exit, CliError> {
    let (force, args) = (args.force, &args.domain);
    let (domain, name) = xen::resolve(&args.domain)?;
    let xen = xen::open(domain.id)?;
    if !force {
        no_probes(xen.as_ref())?;
    }
    let run = journal::run_dir();
    let journal = stop_watcher(&Journal::reader(&run, domain.id), || {
        Journal::writer(&run, domain.id)
    })?;
    let state = match journal.load() {
        Ok(state) => state,
        Err(error @ JournalError::Malformed { .. }) => {
            eprintln!("installer: {error}");
            None
        }
        Err(error) => return Err(error.into()),
    };
    let removed = views::remove(xen.as_ref(), &journal, state.as_ref())?;
    report_cave(&removed.cave);
    if removed.anything {
        let body = Body::Removed {
            views: removed.views,
            frames: removed.frames,
        };
        // Taking out is never refused: a log that cannot be written is said.
        let written = Audit::open(&log_dir(), &domain, &name).and_then(|mut log| log.write(body));
        if let Err(error) = written {
            eprintln!("installer: {error}");
        }
    }
    let cave = match &removed.cave {
        CaveFate::Untouched => "untouched",
        CaveFate::Restored => "restored",
        CaveFate::Left(_) => "left",
        CaveFate::OtherKernel => "with the kernel that had it",
    };
    if args.json {
        print_json(&json!({
            "schema": "penumbra.remove/v1",
            "domain": domain.id,
            "name": name,
            "removed": removed.anything,
            "views": removed.views,
            "frames": removed.frames,
            "cave": cave,
        }))?;
    } else if removed.anything {
        print(&format!(
            "removed: {name} (domain {}): {} views, {} frames, cave {cave}\n",
            domain.id, removed.views, removed.frames
        ))?;
    } else {
        print(&format!(
            "nothing was applied to {name} (domain {})\n",
            domain.id
        ))?;
    }
    Ok(Exit::Done)
}

/// Fails if a probe stands on an edited slot. A Xen that cannot say has no views.
fn no_probes(xen: &dyn Hypervisor) -> Result<(), CliError> {
    match xen.stats().map_or(0, |stats| stats.displaced) {
        0 => Ok(()),
        bytes => Err(CliError::Probed { bytes }),
    }
}

/// Waits for the lock, asking a watcher to end.
fn stop_watcher(
    reader: &Journal,
    writer: impl Fn() -> Result<Journal, JournalError>,
) -> Result<Journal, JournalError> {
    let started = Instant::now();
    loop {
        match writer() {
            Err(JournalError::Busy(_)) if started.elapsed() < PATIENCE => {
                reader.ask_to_stop()?;
                sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::no_probes;
    use crate::control::CliError;
    use crate::views::testkit;

    #[test]
    fn a_probe_on_an_edited_slot_keeps_the_views_in() {
        let bundle = testkit::bundle();
        let fake = testkit::guest(&bundle);
        assert!(no_probes(&fake).is_ok(), "nothing is applied");
        let dir = tempfile::tempdir().unwrap();
        let request = testkit::request(&bundle);
        crate::views::apply(&fake, &testkit::journal(&dir), &request).unwrap();
        assert!(no_probes(&fake).is_ok());
        fake.table.borrow_mut().displaced = 5;
        let refused = no_probes(&fake);
        assert!(
            matches!(refused, Err(CliError::Probed { bytes: 5 })),
            "{refused:?}"
        );
    }
}
