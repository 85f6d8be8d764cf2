//! Builds and enables the views, without ever pausing the guest.
//!
//! The guest may poke its own text at any moment. From ARM on, Xen counts each poke. So: read the counter, read and explain
//! the text, fill the copies, and ENABLE only if the counter still stands: then no poke came between the reading and the
//! switch. Else the counter is read again and the copies follow what was poked (see `follow`), until it stands still for
//! so long. From ENABLE on Xen copies each poke into every view that has a copy of the page.

use super::build;
use super::follow::follow;
use super::journal::{Journal, State, Step};
use super::modules;
pub use super::refusal::ApplyError;
use super::{remove, understand, understand_again};
use crate::guest::Kernel;
use crate::guest::explain;
use crate::guest::layout;
use crate::guest::processes::Reader;
use crate::guest::text::RunningText;
use crate::xen::{Action, Altp2mMode, Binding, Domain, Errno, Hypervisor, Life, Root, XenError};
use penumbra_bundle::Bundle;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

/// Times that filled copies are brought up to date before giving up on a guest that pokes its text without pause.
const LOOKS: u32 = 1000;
/// Time between two of these.
const LOOK_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 0 } else { 1 });

/// What to apply.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The verified bundle.
    pub bundle: &'a Bundle,
    /// SHA-256 of its manifest.
    pub manifest_sha256: String,
    /// Where the bundle came from, for `verify-text`.
    pub bundle_path: PathBuf,
    /// Where the policy came from.
    pub policy_path: PathBuf,
    /// The domain's name.
    pub name: String,
    /// The default view's name.
    pub default: String,
}

/// What was applied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Applied {
    /// The journal's last word.
    pub state: State,
    /// Bytes of running text that differ from the file, all explained.
    pub changed_bytes: u64,
    /// Times that the copies were filled as a whole.
    pub fills: u32,
    /// Times that they were brought up to date because the guest had poked its text.
    pub looks: u32,
}

/// Applies. On any failure everything is taken out again before the error is returned.
pub fn apply(
    hypervisor: &dyn Hypervisor,
    journal: &Journal,
    request: &Request<'_>,
) -> Result<Applied, ApplyError> {
    let domain = hypervisor.domain()?;
    check_domain(hypervisor, &domain, request)?;
    let manifest = &request.bundle.manifest;
    let kernel = Kernel::find(hypervisor, manifest)?;
    let reader = Reader::new(manifest, kernel)?;
    check_booted(hypervisor, &reader)?;
    let expected = explain::expected(request.bundle, kernel.slide);

    let mut state = State::new(&domain, &request.name, reader);
    state.bundle.clone_from(&request.bundle_path);
    state.policy.clone_from(&request.policy_path);
    state.manifest_sha256.clone_from(&request.manifest_sha256);
    state.release.clone_from(&manifest.kernel.release);
    state.build_id.clone_from(&manifest.kernel.build_id);
    state.default.clone_from(&request.default);
    // What a `remove` had to leave is not forgotten if this fails.
    let left = journal.load().ok().flatten();
    let left = left.filter(|left| left.uuid == state.uuid);
    state.cave = left.and_then(|left| left.cave);
    journal.save(&state)?;
    match steps(hypervisor, journal, request, &domain, &mut state, &expected) {
        Ok((changed_bytes, fills, looks)) => Ok(Applied {
            state,
            changed_bytes,
            fills,
            looks,
        }),
        Err(error) => match remove(hypervisor, journal, Some(&state)) {
            Ok(_) => Err(error),
            Err(cleanup) => Err(ApplyError::Uncleaned {
                error: Box::new(error),
                cleanup: Box::new(cleanup),
            }),
        },
    }
}

fn check_domain(
    hypervisor: &dyn Hypervisor,
    domain: &Domain,
    request: &Request<'_>,
) -> Result<(), ApplyError> {
    let name = || request.name.clone();
    match domain.life {
        Life::Runs => {}
        Life::Suspended => return Err(ApplyError::Suspended(name())),
        Life::SoftReset => return Err(ApplyError::Booting("it starts another kernel")),
        Life::Ended(end) => return Err(ApplyError::Ended { name: name(), end }),
    }
    if !domain.hvm || !domain.hap {
        return Err(ApplyError::NotHvm(name()));
    }
    match hypervisor.altp2m_mode()? {
        Altp2mMode::External => {}
        Altp2mMode::Off => return Err(ApplyError::Altp2mOff(name())),
        Altp2mMode::Guest => return Err(ApplyError::Altp2mGuest(name())),
    }
    if request.bundle.variant(&request.default).is_none() {
        return Err(no_variant(request.bundle, &request.default));
    }
    match hypervisor.altp2m_on() {
        Ok(false) => Ok(()),
        Ok(true) => Err(ApplyError::InUse(name())),
        Err(error) => Err(ApplyError::NoInterface(error)),
    }
}

/// Until its first process runs a program, the kernel writes its text in place, as no view could follow: alternatives and
/// jump labels (text_poke_early), and its own page protections (kernel_init, init/main.c: mark_readonly comes before
/// run_init_process).
fn check_booted(hypervisor: &dyn Hypervisor, reader: &Reader) -> Result<(), ApplyError> {
    let memory = reader.kernel().memory(hypervisor);
    match reader.has_started(&memory) {
        Ok(true) => Ok(()),
        Ok(false) => Err(ApplyError::Booting("its first process has not started")),
        Err(source) => Err(ApplyError::Read {
            what: "the first process",
            source,
        }),
    }
}

/// The error for a view that the bundle lacks.
pub fn no_variant(bundle: &Bundle, view: &str) -> ApplyError {
    let known: Vec<&str> = bundle
        .manifest
        .variants
        .iter()
        .map(|variant| variant.name.as_str())
        .collect();
    ApplyError::NoVariant {
        view: view.to_owned(),
        known: known.join(", "),
    }
}

fn steps(
    hypervisor: &dyn Hypervisor,
    journal: &Journal,
    request: &Request<'_>,
    domain: &Domain,
    state: &mut State,
    expected: &[u8],
) -> Result<(u64, u32, u32), ApplyError> {
    hypervisor.altp2m_set(true).map_err(interface)?;
    hypervisor.stats().map_err(interface)?;
    arm(hypervisor, journal, request, state)?;
    let (mut fills, mut looks) = (0, 0);
    let mut text: Option<RunningText> = None;
    loop {
        let mut generation = hypervisor.stats()?.generation;
        let kernel = *state.reader.kernel();
        let mut understood = match text.take() {
            None => understand(hypervisor, &kernel, request.bundle, expected)?,
            Some(text) => understand_again(hypervisor, &kernel, request.bundle, expected, text)?,
        };
        let mut views = build::plan(request.bundle, &mut understood, expected)?;
        if fills == 0 {
            build::put_cave(hypervisor, journal, request, state, &understood)?;
            let spare = modules::spare(request);
            build::make_room(hypervisor, journal, domain, state, &views, spare)?;
            build::make_views(hypervisor, journal, state, &understood.text.frames, &views)?;
        }
        build::fill(hypervisor, state, &views)?;
        fills += 1;
        let mut text_now = understood.text;
        let mut changed = understood.explained.changed;
        let looks_before = looks;
        loop {
            if enable(hypervisor, journal, request, state, generation)? {
                if looks > looks_before {
                    // What was carried over is still to be explained, as it runs.
                    let again =
                        understand_again(hypervisor, &kernel, request.bundle, expected, text_now)?;
                    changed = again.explained.changed;
                }
                return Ok((changed.values().sum(), fills, looks));
            }
            looks += 1;
            if looks == LOOKS {
                return Err(ApplyError::TooManyPokes(looks));
            }
            sleep(LOOK_PAUSE);
            generation = hypervisor.stats()?.generation;
            if !follow(hypervisor, state, &mut text_now, &mut views)? {
                break;
            }
        }
        text = Some(text_now);
    }
}

/// A Xen that does not know the call is a different matter than one that refuses it.
fn interface(error: XenError) -> ApplyError {
    match error.errno() {
        Some(Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => ApplyError::NoInterface(error),
        _ => ApplyError::Xen(error),
    }
}

/// Has Xen intercept CR3 writes and mirror pokes from here on.
fn arm(
    hypervisor: &dyn Hypervisor,
    journal: &Journal,
    request: &Request<'_>,
    state: &mut State,
) -> Result<(), ApplyError> {
    let manifest = &request.bundle.manifest;
    let kernel = *state.reader.kernel();
    let memory = kernel.memory(hypervisor);
    let read = |what| move |source| ApplyError::Read { what, source };
    let mm = memory
        .pointer(layout::data(manifest, kernel.slide, "poking_mm")?)
        .map_err(read("poking_mm"))?;
    let address = memory
        .u64(layout::data(manifest, kernel.slide, "poking_addr")?)
        .map_err(read("poking_addr"))?;
    if mm.0 == 0 || address == 0 {
        return Err(ApplyError::Booting(
            "it has no address space for text pokes",
        ));
    }
    let pgd = memory
        .pointer(mm.offset(state.reader.layout().mm_pgd))
        .map_err(read("poking_mm's page tables"))?;
    let root = memory
        .translate(pgd)
        .map_err(read("poking_mm's page tables"))?;
    state.poking_root = Root(root.0);
    state.step = Step::Arm;
    journal.save(state)?;
    hypervisor.binding(
        Binding::new(Action::Arm)
            .root(state.poking_root)
            .value(address),
    )?;
    // What was there before is nobody's; and a Xen that knows bindings but not this is too old.
    hypervisor.events().map_err(interface)?;
    // Who it was that was stopped is best read at that moment: it may be gone at the next look.
    if let Some(current) = manifest.data.get("current_task") {
        let layout = state.reader.layout();
        hypervisor.sample(current.0, layout.task_pid, layout.task_comm)?;
    }
    Ok(())
}

/// Lets the default view take effect, if no poke came since `generation`.
fn enable(
    hypervisor: &dyn Hypervisor,
    journal: &Journal,
    request: &Request<'_>,
    state: &mut State,
    generation: u64,
) -> Result<bool, ApplyError> {
    let default = state
        .view(&request.default)
        .ok_or_else(|| no_variant(request.bundle, &request.default))?;
    // Once is enough, and every moment counts.
    if state.step != Step::Enable {
        state.step = Step::Enable;
        journal.save(state)?;
    }
    match hypervisor.binding(Binding::new(Action::Enable).view(default).value(generation)) {
        Ok(_) => {
            state.step = Step::Applied;
            journal.save(state)?;
            Ok(true)
        }
        Err(error) if error.is(Errno::AGAIN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
