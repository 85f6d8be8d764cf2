//! `digest`, `verify-text` and `storm`.

use super::{CliError, Target, cli, print, print_json, stop_flag};
use crate::exit::Exit;
use crate::guest::Kernel;
use crate::guest::explain::{self, Explained};
use crate::guest::text::RunningText;
use crate::views::cave::CaveImage;
use crate::views::digest;
use crate::views::verify::{self, Report};
use crate::watch::storm;
use crate::xen::{self, PAGE};
use penumbra_bundle::{Bundle, MANIFEST, Manifest, SCHEMA};
use serde_json::json;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// Manifests have some ten KiB.
const MAX_MANIFEST: u64 = 16 << 20;
/// More text than any kernel has; the limit of the bundle's reader.
const MAX_TEXT: u64 = 256 << 20;

/// Runs `digest`.
pub fn digest(wanted: &str, bundle: &Path, explain: bool, json: bool) -> Result<Exit, CliError> {
    let manifest = manifest_alone(bundle)?;
    let (domain, _) = xen::resolve(wanted)?;
    let xen = xen::open(domain.id)?;
    let kernel = Kernel::find(xen.as_ref(), &manifest)?;
    let text = RunningText::read(xen.as_ref(), &kernel, &manifest)?;
    let sha256 = digest::sha256(&text.bytes);
    let explained = if explain {
        let bundle = Bundle::read_dir(bundle)?;
        Some(explain_text(&bundle, &kernel, &text)?)
    } else {
        None
    };
    if json {
        let mut report = json!({
            "schema": "penumbra.digest/v1",
            "domain": domain.id,
            "sha256": sha256,
            "start": kernel.slide.guest(manifest.text.start),
            "end": kernel.slide.guest(manifest.text.end),
            "slide": format!("{:#x}", kernel.slide.0),
            "build_id": manifest.kernel.build_id,
        });
        if let Some(explained) = &explained {
            report["changed_bytes"] = json!(explained.changed);
            report["cave_in_use"] = json!(explained.cave_in_use);
        }
        print_json(&report)?;
    } else {
        print(&format!("{sha256}\n"))?;
        if let Some(explained) = &explained {
            for (table, bytes) in &explained.changed {
                let table = json!(table);
                let table = table.as_str().unwrap_or("?");
                print(&format!("{bytes:8} bytes changed: {table}\n"))?;
            }
            if explained.cave_in_use {
                print("the bundle's hook code is in the cave\n")?;
            }
        }
    }
    Ok(Exit::Done)
}

/// What the guest's own text differs in from the file. The hook code may be in the cave: a `remove` leaves it there while
/// something may still run in it.
fn explain_text(
    bundle: &Bundle,
    kernel: &Kernel,
    text: &RunningText,
) -> Result<Explained, CliError> {
    let expected = explain::expected(bundle, kernel.slide);
    let returns = explain::return_form(bundle, &text.bytes)?;
    let cave = CaveImage::new(bundle, kernel.slide, returns)?;
    let allowed = Some((cave.at, cave.bytes.as_slice()));
    let explained = explain::explain(bundle, kernel.slide, &expected, &text.bytes, allowed)?;
    Ok(explained)
}

/// A bundle's manifest without the rest, for what only needs to know where the text is: nothing of it is mapped.
fn manifest_alone(bundle: &Path) -> Result<Manifest, CliError> {
    let path = bundle.join(MANIFEST);
    let file = fs::File::open(&path);
    let mut bytes = Vec::new();
    file.and_then(|file| file.take(MAX_MANIFEST).read_to_end(&mut bytes))
        .map_err(|source| CliError::File {
            path: path.clone(),
            source,
        })?;
    let fail = |detail: String| CliError::Manifest {
        path: path.clone(),
        detail,
    };
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|error| fail(error.to_string()))?;
    if manifest.schema != SCHEMA {
        return Err(fail(format!("the schema is not `{SCHEMA}`")));
    }
    let text = manifest.text.range();
    let aligned = [text.start, text.end]
        .iter()
        .all(|va| va.0.is_multiple_of(PAGE as u64));
    if text.is_empty() || text.len() > MAX_TEXT || !aligned {
        return Err(fail(
            "the text range is not whole pages of a kernel".to_owned(),
        ));
    }
    Ok(manifest)
}

/// The bundle that was applied, read again: every file's digest is in its manifest, whose digest is in the journal.
fn applied_bundle(target: &Target) -> Result<Bundle, CliError> {
    let path = &target.state.bundle;
    let manifest = path.join(MANIFEST);
    let bytes = fs::read(&manifest).map_err(|source| CliError::File {
        path: manifest,
        source,
    })?;
    if digest::sha256(&bytes) != target.state.manifest_sha256 {
        return Err(CliError::BundleChanged { path: path.clone() });
    }
    Ok(Bundle::read_dir(path)?)
}

/// Runs `verify-text`.
pub fn verify_text(args: &cli::Domain) -> Result<Exit, CliError> {
    let target = Target::open(&args.domain)?;
    let bundle = applied_bundle(&target)?;
    let report = verify::verify(target.xen.as_ref(), &bundle, &target.state)?;
    if args.json {
        print_json(&json!({
            "schema": "penumbra.verify-text/v1",
            "domain": target.state.domain,
            "explained": report.explained,
            "text": report,
        }))?;
    } else {
        print(&in_words(&report))?;
    }
    Ok(verdict(&report))
}

fn verdict(report: &Report) -> Exit {
    if report.explained {
        Exit::Done
    } else {
        Exit::No
    }
}

fn in_words(report: &Report) -> String {
    let mut text = String::new();
    for line in &report.unexplained {
        text.push_str(&format!("{line}\n"));
    }
    if !report.cave && report.unexplained.is_empty() {
        text.push_str("the cave does not hold the bundle's thunks\n");
    }
    for view in &report.views {
        text.push_str(&format!(
            "{}: {} pages of its own, {} bytes differ",
            view.name, view.pages, view.differing
        ));
        text.push_str(&match (report.xen_tells, view.misplaced) {
            (false, _) => "; this Xen does not tell what it shows where\n".to_owned(),
            (true, 0) => ", every page read-only and where it should be\n".to_owned(),
            (true, some) => format!(", {some} pages not where they should be, or writable\n"),
        });
        for place in &view.places {
            text.push_str(&format!("  {place}\n"));
        }
    }
    text.push_str(&if report.explained {
        format!(
            "explained: {} bytes in {} views; {} bytes were changed by the kernel itself\n",
            report.text_bytes,
            report.views.len(),
            report.changed_bytes
        )
    } else {
        "not explained\n".to_owned()
    });
    text
}

/// Runs `storm`.
pub fn storm(args: &cli::Storm) -> Result<Exit, CliError> {
    let stop = stop_flag()?;
    let target = Target::open(&args.domain)?;
    let bundle = applied_bundle(&target)?;
    let (xen, state) = (target.xen.as_ref(), &target.state);
    let memory = state.reader.kernel().memory(xen);
    let list = state.reader.list(&memory);
    let processes = args
        .pid
        .iter()
        .map(|pid| storm::find(&list, *pid))
        .collect::<Result<Vec<_>, _>>()?;
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    let before = xen.stats()?;
    let started = Instant::now();
    let storm = storm::run(
        xen,
        state,
        target.journal.dir(),
        &processes,
        storm::Plan {
            flips: args.flips,
            seed,
            longest_wait: Duration::from_micros(args.wait_us),
        },
        &stop,
    )?;
    let flipped = started.elapsed();
    let after = xen.stats()?;
    xen.refresh();
    let report = if args.no_verify {
        None
    } else {
        Some(verify::verify(xen, &bundle, state)?)
    };
    if args.json {
        print_json(&json!({
            "schema": "penumbra.storm/v1",
            "domain": state.domain,
            "processes": processes.iter().zip(&storm.per_process).map(|(process, flips)| json!({
                "pid": process.identity.pid, "comm": process.comm, "flips": flips,
            })).collect::<Vec<_>>(),
            "flips": storm.flips,
            "per_view": storm.per_view,
            "seed": storm.seed,
            "view_switches": after.view_switches.saturating_sub(before.view_switches),
            "pokes_mirrored": after.pokes_mirrored.saturating_sub(before.pokes_mirrored),
            "conflicts": after.conflicts.saturating_sub(before.conflicts),
            "seconds": flipped.as_secs_f64(),
            "explained": report.as_ref().map(|report| report.explained),
            "text": report,
        }))?;
    } else {
        let per_view: Vec<String> = storm
            .per_view
            .iter()
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        let who: Vec<String> = processes
            .iter()
            .map(|process| format!("{} ({})", process.comm.escape_debug(), process.identity.pid))
            .collect();
        print(&format!(
            "storm: {} flips of {}: {}; seed {}; {} view switches, {} pokes mirrored, {} conflicts\n{}",
            storm.flips,
            who.join(", "),
            per_view.join(", "),
            storm.seed,
            after.view_switches.saturating_sub(before.view_switches),
            after.pokes_mirrored.saturating_sub(before.pokes_mirrored),
            after.conflicts.saturating_sub(before.conflicts),
            report.as_ref().map_or_else(String::new, in_words)
        ))?;
    }
    Ok(report.as_ref().map_or(Exit::Done, verdict))
}
