//! `ps`: each process with its view and the rule that chose it.

use super::{CliError, Target, cli, print, print_json, table};
use crate::exit::Exit;
use crate::views::journal::POLICY_COPY;
use crate::watch;
use crate::xen::{Bound, Root};
use penumbra_policy::Policy;
use serde_json::json;
use std::collections::HashMap;
use std::fs;

/// Runs `ps`.
pub fn ps(args: &cli::Domain) -> Result<Exit, CliError> {
    let target = Target::open(&args.domain)?;
    let (xen, state) = (target.xen.as_ref(), &target.state);
    let path = target.journal.dir().join(POLICY_COPY);
    let bytes = fs::read(&path).map_err(|source| CliError::File {
        path: path.clone(),
        source,
    })?;
    let policy = Policy::parse_bytes(&path.display().to_string(), &bytes)
        .map_err(|_| CliError::Policy { path })?;
    let memory = state.reader.kernel().memory(xen);
    let list = state.reader.list(&memory);
    let stats = xen.stats()?;
    let bound: HashMap<Root, Bound> = xen
        .bindings()?
        .into_iter()
        .map(|bound| (bound.root, bound))
        .collect();
    let wanted = watch::wanted(&policy, &list, &state.default);
    let mut rows = Vec::new();
    for process in &list.processes {
        let decision = watch::decide(&policy, process);
        let identity = &process.identity;
        let binding = bound.get(&identity.root);
        let view = state.view_name(binding.map_or(stats.default, |bound| bound.view));
        // What counts is the strictest view of all processes on the root.
        let due = wanted
            .get(&identity.root)
            .map_or(&state.default, |want| &want.view);
        rows.push(json!({
            "pid": identity.pid,
            "comm": process.comm,
            "exe": identity.exe,
            "shown_exe": process.shown_exe,
            "uid": identity.uid.map(|(real, _)| real),
            "euid": identity.uid.map(|(_, effective)| effective),
            "view": view,
            "rule": decision.rule,
            "why": decision.why,
            "policy_view": due,
            "agrees": view == *due,
            "bound": binding.is_some(),
            "switches": binding.map(|bound| bound.switches),
            "witnesses": binding.map(|bound| bound.witnesses),
            "both_halves": binding.map(|bound| bound.pair),
            "root": identity.root,
        }));
    }
    for trouble in &list.trouble {
        eprintln!("installer: {trouble}");
    }
    if args.json {
        print_json(&json!({
            "schema": "penumbra.ps/v1",
            "domain": state.domain,
            "name": state.name,
            "default": state.view_name(stats.default),
            "kernel_threads": list.kernel_threads,
            "processes": rows,
        }))?;
        return Ok(Exit::Done);
    }
    let mut table = table(&["PID", "COMM", "UID", "VIEW", "", "RULE", "EXE"]);
    for row in &rows {
        let text = |key: &str| match &row[key] {
            serde_json::Value::String(text) => text.escape_debug().to_string(),
            serde_json::Value::Null => "?".to_owned(),
            other => other.to_string(),
        };
        let flag = if row["agrees"] == true { "" } else { "!" };
        let exe = match (&row["exe"], &row["shown_exe"]) {
            (serde_json::Value::String(_), _) => text("exe"),
            (_, serde_json::Value::String(_)) => {
                format!("{} (in another mount namespace)", text("shown_exe"))
            }
            _ => "?".to_owned(),
        };
        table.add_row([
            text("pid"),
            text("comm"),
            text("uid"),
            text("view"),
            flag.to_owned(),
            text("rule"),
            exe,
        ]);
    }
    print(&format!("{}\n", table.trim_fmt()))?;
    Ok(Exit::Done)
}
