//! Builds and enables the views, without ever pausing the guest.
//!
//! The guest may poke its own text at any moment. From ARM on, Xen copies each poke into every view that has a copy of the
//! page and counts it. So: read the counter, read and explain the text, fill the copies, and ENABLE only if the counter
//! still stands: then no poke came between the reading and the switch. Else once more.

use super::cave::{self, CaveError, CaveWriteError};
use super::journal::{CaveState, Copies, Journal, JournalError, State, Step, ViewState};
use super::pages::{self, PageError, Pages};
use super::remove::{self, RemoveError};
use super::{TextError, Understood, understand, understand_again};
use crate::exit::{Exit, Exits};
use crate::guest::explain::{self, ExplainError};
use crate::guest::kernel::FindError;
use crate::guest::layout::{self, MissingName};
use crate::guest::processes::Reader;
use crate::guest::text::RunningText;
use crate::guest::{Kernel, ReadError};
use crate::xen::{
    Action, Altp2mMode, Binding, Domain, Errno, Gfn, Hypervisor, PAGE, Root, ViewId, XenError,
};
use penumbra_bundle::Bundle;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;
use thiserror::Error;

/// Times that the text is read and the copies filled before giving up on a guest that pokes its text without pause.
const FILLS: u32 = 20;
/// The copies start at a multiple of this above the guest's highest frame (1 GiB): far from where the guest may look for
/// unused addresses next to its memory.
const COPY_ALIGN: u64 = 1 << 18;

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

/// Why nothing was applied.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// Xen refused.
    #[error(transparent)]
    Xen(#[from] XenError),
    /// Xen lacks the interface.
    #[error(
        "this Xen cannot bind page-table roots to views ({0}); boot Xen with the patches of xen-patches and `altp2m=1` on its command line"
    )]
    NoInterface(XenError),
    /// The domain has no altp2m.
    #[error(
        "altp2m is off for domain `{0}`; set altp2m=\"external\" in its configuration and start it again"
    )]
    Altp2mOff(String),
    /// The guest itself may switch views.
    #[error(
        "domain `{0}` may change its views itself; set altp2m=\"external\" in its configuration and start it again"
    )]
    Altp2mGuest(String),
    /// Somebody else uses altp2m.
    #[error(
        "altp2m is in use for domain `{0}` and no journal says that Penumbra did it; stop the other tool, or `installer remove {0}` if the journal was lost"
    )]
    InUse(String),
    /// Not a PVH or HVM guest.
    #[error(
        "domain `{0}` is not a PVH or HVM guest with hardware-assisted paging; only these have views"
    )]
    NotHvm(String),
    /// The domain ends.
    #[error("domain `{0}` is shutting down")]
    Gone(String),
    /// The bundle lacks a variant.
    #[error(
        "the policy names view `{view}`, the bundle has {known}; sign a policy for this bundle or emit a bundle with that variant"
    )]
    NoVariant {
        /// What the policy names.
        view: String,
        /// What there is.
        known: String,
    },
    /// The kernel is not the bundle's.
    #[error(transparent)]
    Find(#[from] FindError),
    /// The manifest lacks a name.
    #[error(transparent)]
    Missing(#[from] MissingName),
    /// The poking address space is not there.
    #[error(
        "the guest has not set up its text-poking address space yet; try again when it has booted"
    )]
    NoPoking,
    /// The guest's memory cannot be read.
    #[error("{what}: {source}")]
    Read {
        /// What was being read.
        what: &'static str,
        /// Where and why.
        source: ReadError,
    },
    /// The text is not understood.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The cave cannot be laid out.
    #[error(transparent)]
    Cave(#[from] CaveError),
    /// The cave cannot be written.
    #[error(transparent)]
    CaveWrite(#[from] CaveWriteError),
    /// A slot is not as expected.
    #[error(transparent)]
    Page(#[from] PageError),
    /// The text's slots change while views are built.
    #[error(
        "the guest changes its text's layout while views are built; try again when it is quiet"
    )]
    Restless,
    /// The guest pokes its text all the time.
    #[error(
        "the guest changed its text {0} times while the views were filled; try again when no tracing or static key is being switched in it"
    )]
    TooManyPokes(u32),
    /// No room above the guest's memory.
    #[error("no room for {count} page copies at {first}: the guest has {bits} address bits")]
    NoRoom {
        /// First frame.
        first: Gfn,
        /// How many.
        count: u64,
        /// The guest's limit.
        bits: u8,
    },
    /// No memory for the copies.
    #[error(
        "Xen has no memory for {pages} page copies ({mib} MiB): {source}; free memory (see `xl info`) or balloon dom0 down"
    )]
    NoMemory {
        /// How many pages.
        pages: u64,
        /// The same in MiB.
        mib: u64,
        /// What Xen said.
        source: XenError,
    },
    /// The journal cannot be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The apply failed and taking it out failed too.
    #[error(
        "{error}\nand taking out what was done failed: {cleanup}; run `installer remove` again"
    )]
    Uncleaned {
        /// Why it failed.
        error: Box<ApplyError>,
        /// Why the cleaning failed.
        cleanup: Box<RemoveError>,
    },
}

impl Exits for ApplyError {
    fn exit(&self) -> Exit {
        match self {
            ApplyError::Xen(error) => error.exit(),
            ApplyError::NoInterface(_) | ApplyError::Altp2mOff(_) | ApplyError::Altp2mGuest(_) => {
                Exit::NoXen
            }
            ApplyError::Find(error) => error.exit(),
            ApplyError::Journal(error) => error.exit(),
            ApplyError::Uncleaned { error, .. } => error.exit(),
            _ => Exit::Cannot,
        }
    }
}

/// What was applied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Applied {
    /// The journal's last word.
    pub state: State,
    /// Bytes of running text that differ from the file, all explained.
    pub changed_bytes: u64,
    /// Times that the copies were filled.
    pub fills: u32,
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
    let expected = explain::expected(request.bundle, kernel.slide);

    let mut state = State::new(&domain, &request.name, reader);
    state.bundle.clone_from(&request.bundle_path);
    state.policy.clone_from(&request.policy_path);
    state.manifest_sha256.clone_from(&request.manifest_sha256);
    state.release.clone_from(&manifest.kernel.release);
    state.build_id.clone_from(&manifest.kernel.build_id);
    state.default.clone_from(&request.default);
    journal.save(&state)?;
    match steps(hypervisor, journal, request, &domain, &mut state, &expected) {
        Ok((changed_bytes, fills)) => Ok(Applied {
            state,
            changed_bytes,
            fills,
        }),
        Err(error) => match remove::remove(hypervisor, journal, Some(&state)) {
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
    if domain.gone {
        return Err(ApplyError::Gone(name()));
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
) -> Result<(u64, u32), ApplyError> {
    hypervisor.altp2m_set(true).map_err(interface)?;
    hypervisor.stats().map_err(interface)?;
    arm(hypervisor, journal, request, state)?;
    let mut fills = 0;
    let mut text: Option<RunningText> = None;
    loop {
        let generation = hypervisor.stats()?.generation;
        let kernel = state.reader.kernel();
        let mut understood = match text.take() {
            None => understand(hypervisor, kernel, request.bundle, expected)?,
            Some(text) => understand_again(hypervisor, kernel, request.bundle, expected, text)?,
        };
        let views = plan(request.bundle, &mut understood, expected)?;
        if fills == 0 {
            put_cave(hypervisor, journal, request, state, &understood)?;
            make_room(hypervisor, journal, domain, state, &views)?;
            map_views(hypervisor, journal, request, state, &understood, &views)?;
        }
        fill(hypervisor, state, &views)?;
        fills += 1;
        if enable(hypervisor, journal, request, state, generation)? {
            let changed = understood.explained.changed.values().sum();
            return Ok((changed, fills));
        }
        text = Some(understood.text);
        if fills == FILLS {
            return Err(ApplyError::TooManyPokes(fills));
        }
        sleep(Duration::from_millis(u64::from(fills)));
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
        return Err(ApplyError::NoPoking);
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
    Ok(())
}

/// The pages of every view but stock, in the manifest's order.
fn plan(
    bundle: &Bundle,
    understood: &mut Understood,
    expected: &[u8],
) -> Result<Vec<(String, bool, Pages)>, ApplyError> {
    // As it will run: with the cave written.
    let cave = &understood.cave;
    let running = &mut understood.text.bytes;
    running[cave.at.0 as usize..][..cave.bytes.len()].copy_from_slice(&cave.bytes);
    let mut views = Vec::new();
    for (variant, edits) in bundle.manifest.variants.iter().zip(&bundle.edits).skip(1) {
        let pages = pages::build(bundle, &variant.name, edits, running, expected)?;
        views.push((variant.name.clone(), !variant.drops.is_empty(), pages));
    }
    Ok(views)
}

/// Writes thunks and tables into the guest's own frames. Nothing jumps there yet.
fn put_cave(
    hypervisor: &dyn Hypervisor,
    journal: &Journal,
    request: &Request<'_>,
    state: &mut State,
    understood: &Understood,
) -> Result<(), ApplyError> {
    let start = understood.cave.start(request.bundle, state.reader.slide());
    state.cave = Some(CaveState {
        start,
        len: understood.cave.bytes.len() as u64,
        filler: request.bundle.manifest.cave.filler,
    });
    state.step = Step::Cave;
    journal.save(state)?;
    let memory = state.reader.kernel().memory(hypervisor);
    cave::write(hypervisor, &memory, start, &understood.cave.bytes)?;
    Ok(())
}

/// Gives the domain frames for the copies, above all that it has.
fn make_room(
    hypervisor: &dyn Hypervisor,
    journal: &Journal,
    domain: &Domain,
    state: &mut State,
    views: &[(String, bool, Pages)],
) -> Result<(), ApplyError> {
    let count: u64 = views.iter().map(|(_, _, pages)| pages.len() as u64).sum();
    let first = Gfn((hypervisor.highest_gfn()?.0 + 1).next_multiple_of(COPY_ALIGN));
    let limit = 1_u64 << domain.address_bits.clamp(12, 52).saturating_sub(12);
    if first.0 + count > limit {
        return Err(ApplyError::NoRoom {
            first,
            count,
            bits: domain.address_bits,
        });
    }
    state.copies = Some(Copies {
        first,
        count,
        max_pages_before: domain.max_pages,
    });
    state.step = Step::Copies;
    journal.save(state)?;
    let no_memory = |source| ApplyError::NoMemory {
        pages: count,
        mib: (count * PAGE as u64).div_ceil(1 << 20),
        source,
    };
    if domain.max_pages - domain.pages.min(domain.max_pages) < count {
        hypervisor.set_max_pages(domain.pages + count)?;
    }
    hypervisor.populate(first, count).map_err(no_memory)
}

/// Makes the views and maps the copies into them; the copies are still empty and no vCPU uses the views.
fn map_views(
    hypervisor: &dyn Hypervisor,
    journal: &Journal,
    request: &Request<'_>,
    state: &mut State,
    understood: &Understood,
    views: &[(String, bool, Pages)],
) -> Result<(), ApplyError> {
    let copies = state
        .copies
        .expect("frames were added before views are made");
    state.views.push(ViewState {
        name: request.bundle.manifest.variants[0].name.clone(),
        view: Some(ViewId::HOST),
        drops_mitigation: false,
        pages: Vec::new(),
        first_copy: copies.first,
    });
    let mut next = copies.first.0;
    for (name, drops, pages) in views {
        state.views.push(ViewState {
            name: name.clone(),
            view: None,
            drops_mitigation: *drops,
            pages: pages.keys().copied().collect(),
            first_copy: Gfn(next),
        });
        next += pages.len() as u64;
    }
    state.step = Step::Views;
    journal.save(state)?;
    for index in 1..state.views.len() {
        let view = hypervisor.create_view()?;
        state.views[index].view = Some(view);
        journal.save(state)?;
        let entry = &state.views[index];
        for (offset, page) in entry.pages.iter().enumerate() {
            hypervisor.remap(
                view,
                understood.text.frames[*page as usize],
                Gfn(entry.first_copy.0 + offset as u64),
            )?;
        }
        if entry.drops_mitigation {
            hypervisor.binding(Binding::new(Action::Flags).view(view).flags(1))?;
        }
    }
    Ok(())
}

/// Fills the copies. Every fill writes all of every page: a copy is either whole or not in use.
fn fill(
    hypervisor: &dyn Hypervisor,
    state: &State,
    views: &[(String, bool, Pages)],
) -> Result<(), ApplyError> {
    for (name, _, pages) in views {
        let entry = state
            .views
            .iter()
            .find(|view| view.name == *name)
            .expect("every planned view has an entry");
        // The slots' own bytes do not change at run time, so every plan has the same pages; refuse if one had not.
        if !entry.pages.iter().eq(pages.keys()) {
            return Err(ApplyError::Restless);
        }
        let writes: Vec<(Gfn, usize, &[u8])> = pages
            .values()
            .enumerate()
            .map(|(offset, bytes)| {
                let copy = Gfn(entry.first_copy.0 + offset as u64);
                (copy, 0, bytes.as_slice())
            })
            .collect();
        hypervisor.write_all(&writes)?;
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
    state.step = Step::Enable;
    journal.save(state)?;
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

impl From<ExplainError> for ApplyError {
    fn from(error: ExplainError) -> ApplyError {
        ApplyError::Text(TextError::Explain(error))
    }
}
