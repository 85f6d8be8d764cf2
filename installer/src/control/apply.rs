//! `apply`: verify, build, bind, watch.

use super::cli::Apply;
use super::resume::{report_cave, resume};
use super::watch::{self, Console};
use super::{CliError, print, stop_flag};
use crate::audit::{Audit, Body, Decoder, Trail, log_dir};
use crate::exit::Exit;
use crate::views::apply::ApplyError;
use crate::views::journal::{self, Journal, POLICY_COPY, State};
use crate::views::modules::{self, Modules};
use crate::views::{self, Applied, Request, apply as views_apply, digest, remove};
use crate::watch::Watcher;
use crate::watch::run::{Listener, Outcome, Watch};
use crate::xen::{self, Domain, End, Events, Hypervisor};
use penumbra_bundle::{Bundle, MANIFEST};
use penumbra_policy::Policy;
use signer::Trust;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How views came to be that were there already.
const TAKEN_OVER: &str = "taken over";
/// Time between tries on a guest that boots.
const BOOT: Duration = Duration::from_millis(500);
/// Tries on a guest that came back and is up, before the refusal stands.
const TRIES: u32 = 5;

/// Runs `apply`.
pub fn apply(args: &Apply) -> Result<Exit, CliError> {
    let stop = stop_flag()?;
    let stop = || stop.load(Ordering::Relaxed);
    let checked = Checked::new(args)?;
    let (mut domain, name) = xen::resolve(&args.domain)?;
    let mut came_back = false;
    loop {
        let end = match on_domain(args, &checked, (&domain, &name), came_back, &stop)? {
            Over::Exit(exit) => return Ok(exit),
            Over::Ended(end) => end,
        };
        // No mapping of the old domain's memory is left here: its successor may need the room.
        match watch::successor(&domain.uuid, domain.id, end, &stop)? {
            // By the same name: the toolstack may not have written it yet.
            Some(next) => domain = next,
            None => return Ok(watch::exit(end)),
        }
        came_back = true;
    }
}

/// Why the work on one domain is over.
enum Over {
    Exit(Exit),
    Ended(End),
}

/// Applies to one domain and watches it to its end.
fn on_domain(
    args: &Apply,
    checked: &Checked,
    (domain, name): (&Domain, &str),
    came_back: bool,
    stop: &dyn Fn() -> bool,
) -> Result<Over, CliError> {
    let started = Instant::now();
    let xen = xen::open(domain.id)?;
    let xen = xen.as_ref();
    let journal = Journal::writer(&journal::run_dir(), domain.id)?;
    journal.clear_stop()?;
    // What cannot be recorded is not begun.
    let audit = Audit::open(&log_dir(), domain, name)?;
    let request = Request {
        bundle: &checked.bundle,
        manifest_sha256: checked.manifest_sha256.clone(),
        bundle_path: absolute(&args.bundle),
        policy_path: absolute(&args.policy),
        name: name.to_owned(),
        default: checked.policy.default.to_string(),
    };
    let (mut state, how) = match resume(xen, &journal, &request)? {
        Some(state) => (state, TAKEN_OVER.to_owned()),
        None => {
            let applied = match build(xen, &journal, &request, came_back, stop)? {
                Ok(applied) => applied,
                Err(over) => return Ok(over),
            };
            let how = format!(
                "explained {} changed bytes, filled {} time{}, followed {}",
                applied.changed_bytes,
                applied.fills,
                if applied.fills == 1 { "" } else { "s" },
                applied.looks
            );
            (applied.state, how)
        }
    };
    let copy = journal.dir().join(POLICY_COPY);
    if let Err(source) = fs::write(&copy, &checked.policy_bytes) {
        // No room for it means none for the journal either, sooner or later: better nothing than half of it.
        report_cave(&remove(xen, &journal, Some(&state))?.cave);
        return Err(CliError::File { path: copy, source });
    }
    let mut watcher = Watcher::default();
    let decoder = Decoder::new(&checked.bundle, state.reader.slide());
    let modules = Modules::new(&checked.bundle, &state);
    if let Some(why) = modules.unable() {
        eprintln!("installer: modules stay on their own text in every view: {why}");
    }
    let refuses = checked.policy.refuses_unknown_modules;
    let trail = Trail::new(audit, decoder);
    let mut console = Console::new(xen, &journal, trail, modules, refuses);
    console.write(applied_record(checked, &state, how == TAKEN_OVER));
    if !args.once {
        state.watcher = std::process::id();
        journal.save(&state)?;
        // Bound before it is said; what fails here is tried again by the watching.
        let foreign = console.foreign();
        match watcher.pass(xen, &state, &checked.policy, foreign, journal.dir()) {
            Ok(pass) => console.passed(&mut state, &pass, &Events::default()),
            Err(error) => console.trouble(&format!("{error}; trying again")),
        }
    }
    let views: Vec<String> = state
        .views
        .iter()
        .filter_map(|view| Some(format!("{}={}", view.name, view.view?)))
        .collect();
    print(&format!(
        "applied: {name} (domain {}): kernel {}, slide {:#x}, views {}, default {}; {how}; {:.1} s\n",
        domain.id,
        state.release,
        state.reader.slide().0,
        views.join(" "),
        state.default,
        started.elapsed().as_secs_f64()
    ))?;
    if args.once {
        return Ok(Over::Exit(Exit::Done));
    }
    let watching = Watch {
        hypervisor: xen,
        journal: &journal,
        policy: &checked.policy,
        poll: Duration::from_millis(args.poll_ms),
    };
    let outcome = watching.run(&mut state, watcher, &mut console, stop, &sleep)?;
    Ok(match outcome {
        Outcome::Stopped(dropped) => {
            console.write(Body::Stopped { dropped });
            eprintln!(
                "installer: stopped watching {name}; {dropped} binding{} dropped, every process now runs on `{}`; `installer remove {name}` takes the views out",
                if dropped == 1 { "" } else { "s" },
                state.default,
            );
            Over::Exit(Exit::Done)
        }
        Outcome::Ended(end) => {
            console.write(Body::Ended {
                how: end.to_string(),
            });
            eprintln!("installer: domain {name} {end}; its views are gone with it");
            Over::Ended(end)
        }
        Outcome::OtherKernel => {
            console.write(Body::Ended {
                how: "runs another kernel".to_owned(),
            });
            eprintln!(
                "installer: {name} runs another kernel now, which the bundle is not for; its views were taken out, and it runs unprotected: `installer apply` with a bundle for the new kernel"
            );
            Over::Exit(Exit::No)
        }
    })
}

/// What the audit log says of an apply.
fn applied_record(checked: &Checked, state: &State, taken_over: bool) -> Body {
    Body::Applied {
        release: state.release.clone(),
        build_id: state.build_id.clone(),
        bundle: state.manifest_sha256.clone(),
        policy: digest::sha256(&checked.policy_bytes),
        default: state.default.clone(),
        views: state.views.iter().map(|view| view.name.clone()).collect(),
        taken_over,
    }
}

/// Builds the views. On a domain that came back it waits for the kernel to be up, as long as it takes.
fn build(
    xen: &dyn Hypervisor,
    journal: &Journal,
    request: &Request<'_>,
    came_back: bool,
    stop: &dyn Fn() -> bool,
) -> Result<Result<Applied, Over>, CliError> {
    let mut tries = 0;
    loop {
        let error = match views_apply(xen, journal, request) {
            Ok(applied) => return Ok(Ok(applied)),
            Err(error) => error,
        };
        match error {
            ApplyError::Ended { end, .. } if came_back => return Ok(Err(Over::Ended(end))),
            error if came_back && (error.is_early() || tries < TRIES) => {
                tries += u32::from(!error.is_early());
            }
            error => return Err(error.into()),
        }
        sleep(BOOT);
        xen.refresh();
        if stop() {
            return Ok(Err(Over::Exit(Exit::Done)));
        }
    }
}

/// What was verified before Xen is even opened.
struct Checked {
    bundle: Bundle,
    manifest_sha256: String,
    policy: Policy,
    policy_bytes: Vec<u8>,
}

impl Checked {
    fn new(args: &Apply) -> Result<Checked, CliError> {
        let trust = Trust::from_pem_files(&args.trust, args.threshold)?;
        let verified = signer::verify_bundle(&args.bundle, &trust)?;
        let policy_bytes = signer::verify_policy(&args.policy, &trust)?.bytes;
        // From here on only the bytes that were verified are used; the files are not opened again.
        let bundle = Bundle::from_files(&verified.files)?;
        let name = args.policy.display().to_string();
        let told = &mut std::io::stderr();
        let policy = penumbra_policy::check_bytes(&name, &policy_bytes, told)
            .ok()
            .and_then(Result::ok)
            .ok_or_else(|| CliError::Policy {
                path: args.policy.clone(),
            })?;
        let build_id = &bundle.manifest.kernel.build_id;
        if !policy.allows_kernel(build_id) {
            return Err(CliError::PolicyKernel {
                path: args.policy.clone(),
                build_id: build_id.clone(),
                listed: policy.kernels.join(", "),
            });
        }
        if policy.refuses_unknown_modules
            && let Err(why) = modules::able(&bundle)
        {
            return Err(CliError::PolicyModules {
                path: args.policy.clone(),
                why,
            });
        }
        for view in policy.views() {
            if bundle.variant(&view).is_none() {
                return Err(views::apply::no_variant(&bundle, &view).into());
            }
        }
        Ok(Checked {
            manifest_sha256: verified
                .files
                .get(MANIFEST)
                .map(|bytes| digest::sha256(bytes))
                .unwrap_or_default(),
            bundle,
            policy,
            policy_bytes,
        })
    }
}

fn absolute(path: &std::path::Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
