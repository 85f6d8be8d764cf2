//! `apply`: verify, build, bind, watch.

use super::cli::Apply;
use super::{CliError, print, stop_flag};
use crate::exit::Exit;
use crate::guest::Process;
use crate::views::journal::{self, Journal, State, Step};
use crate::views::{self, Request, apply as views_apply, digest, remove, verify};
use crate::watch::{self, Watcher, pins};
use crate::xen::{self, Action, Binding, Hypervisor, Xen};
use penumbra_bundle::{Bundle, MANIFEST};
use penumbra_policy::Policy;
use signer::Trust;
use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The verified policy's copy beside the journal, for `ps`.
pub const POLICY_COPY: &str = "policy.toml";

/// How long a guest frame stays mapped: a guest that gives frames back makes its own processes' data stale no longer than
/// this.
const REFRESH: Duration = Duration::from_secs(1);

/// Runs `apply`.
pub fn apply(args: &Apply) -> Result<Exit, CliError> {
    let started = Instant::now();
    let stop = stop_flag()?;
    let checked = Checked::new(args)?;
    let (domain, name) = xen::resolve(&args.domain)?;
    let xen = Xen::open(domain.id)?;
    let journal = Journal::writer(&journal::run_dir(), domain.id)?;
    journal.clear_stop()?;
    let request = Request {
        bundle: &checked.bundle,
        manifest_sha256: checked.manifest_sha256.clone(),
        bundle_path: absolute(&args.bundle),
        policy_path: absolute(&args.policy),
        name: name.clone(),
        default: checked.policy.default.to_string(),
    };
    let (mut state, how) = match resume(&xen, &journal, &request)? {
        Some(state) => (state, "taken over".to_owned()),
        None => {
            let applied = views_apply(&xen, &journal, &request)?;
            let how = format!(
                "explained {} changed bytes, filled {} time{}",
                applied.changed_bytes,
                applied.fills,
                if applied.fills == 1 { "" } else { "s" }
            );
            (applied.state, how)
        }
    };
    let copy = journal.dir().join(POLICY_COPY);
    fs::write(&copy, &checked.policy_bytes)
        .map_err(|source| CliError::File { path: copy, source })?;
    let mut watcher = Watcher::default();
    if !args.once {
        state.watcher = std::process::id();
        journal.save(&state)?;
        look(&xen, &journal, &state, &checked.policy, &mut watcher)?;
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
        return Ok(Exit::Done);
    }
    let wait = Duration::from_millis(args.poll_ms);
    watch_on(&xen, &journal, state, &checked.policy, watcher, wait, &stop)
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

/// Takes over what an earlier `apply` left, if it is whole; cleans up what one left half-done.
fn resume(xen: &Xen, journal: &Journal, request: &Request<'_>) -> Result<Option<State>, CliError> {
    let Some(mut state) = journal.load()? else {
        return Ok(None);
    };
    let whole = state.uuid == xen.domain()?.uuid && state.step == Step::Applied;
    if !whole || !xen.altp2m_on()? || !xen.stats()?.enabled {
        eprintln!("installer: an earlier apply did not finish; cleaning up after it");
        report_cave(&remove(xen, journal, Some(&state))?.cave);
        return Ok(None);
    }
    if state.manifest_sha256 != request.manifest_sha256 {
        return Err(CliError::OtherBundle {
            applied: state.bundle,
        });
    }
    // Bindings of a watcher that was killed: nobody vouches for them any more.
    watch::drop_bindings(xen, &state, journal.dir())?;
    if !verify::verify(xen, request.bundle, &state)?.explained {
        return Err(CliError::Damaged);
    }
    state.default.clone_from(&request.default);
    state.bundle.clone_from(&request.bundle_path);
    state.policy.clone_from(&request.policy_path);
    if let Some(view) = state.view(&state.default)
        && xen.stats()?.default != view
    {
        xen.binding(Binding::new(Action::Default).view(view))?;
    }
    journal.save(&state)?;
    Ok(Some(state))
}

/// Says what became of the cave, if that needs saying.
pub fn report_cave(cave: &views::CaveFate) {
    if let views::CaveFate::Left(why) = cave {
        eprintln!(
            "installer: the hook code stays in the guest's cave, where nothing jumps to it any more: {why}; it is harmless, and the next `apply` of this bundle finds it"
        );
    }
}

/// One look at the guest's processes.
fn look(
    xen: &Xen,
    journal: &Journal,
    state: &State,
    policy: &Policy,
    watcher: &mut Watcher,
) -> Result<Vec<String>, CliError> {
    let memory = state.reader.kernel().memory(xen);
    let list = state.reader.list(&memory);
    let is_still = |process: &Process| state.reader.is_still(&memory, process, list.top);
    let is_pinned = |root| pins::is_pinned(journal.dir(), root);
    Ok(watcher
        .pass(xen, state, policy, &list, &is_still, &is_pinned)?
        .trouble)
}

fn watch_on(
    xen: &Xen,
    journal: &Journal,
    mut state: State,
    policy: &Policy,
    mut watcher: Watcher,
    wait: Duration,
    stop: &AtomicBool,
) -> Result<Exit, CliError> {
    // Each trouble is said once: a guest that makes them by the second must not fill the disk.
    let mut said: HashSet<String> = HashSet::new();
    let mut refreshed = Instant::now();
    while !stop.load(Ordering::Relaxed) && !journal.asked_to_stop() {
        match xen.domain() {
            Ok(domain) if !domain.gone && domain.uuid == state.uuid => {}
            _ => {
                eprintln!(
                    "installer: domain {} is gone; nothing is left to watch",
                    state.name
                );
                journal.erase()?;
                return Ok(Exit::Done);
            }
        }
        if refreshed.elapsed() > REFRESH {
            refreshed = Instant::now();
            xen.refresh();
        }
        for trouble in look(xen, journal, &state, policy, &mut watcher)? {
            if said.len() < 1000 && said.insert(trouble.clone()) {
                eprintln!("installer: {trouble}");
            }
        }
        std::thread::sleep(wait);
    }
    let dropped = watch::drop_bindings(xen, &state, journal.dir())?;
    state.watcher = 0;
    journal.save(&state)?;
    eprintln!(
        "installer: stopped watching {}; {dropped} binding{} dropped, every process now runs on `{}`; `installer remove {}` takes the views out",
        state.name,
        if dropped == 1 { "" } else { "s" },
        state.default,
        state.name
    );
    Ok(Exit::Done)
}
