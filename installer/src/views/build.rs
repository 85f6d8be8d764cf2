//! The parts of an apply that make something: cave, frames, views, their contents.

use super::Understood;
use super::apply::Request;
use super::cave;
use super::journal::{CaveState, Copies, Journal, State, Step, ViewState};
use super::pages::{self, Pages};
use super::refusal::ApplyError;
use crate::xen::{Action, Binding, Domain, Gfn, Hypervisor, PAGE};
use penumbra_bundle::Bundle;

/// The copies start at a multiple of this above the guest's highest frame (1 GiB): far from where the guest may look for
/// unused addresses next to its memory.
const COPY_ALIGN: u64 = 1 << 18;

/// A view as it shall be.
pub struct PlannedView {
    /// The variant's name.
    pub name: String,
    /// Leaves out a speculation mitigation.
    pub drops_mitigation: bool,
    /// Its own pages.
    pub pages: Pages,
}

/// Every view, in the manifest's order: stock, which has no page of its own, first.
pub fn plan(
    bundle: &Bundle,
    understood: &mut Understood,
    expected: &[u8],
) -> Result<Vec<PlannedView>, ApplyError> {
    // As it will run: with the cave written.
    let cave = &understood.cave;
    let running = &mut understood.text.bytes;
    running[cave.at.0 as usize..][..cave.bytes.len()].copy_from_slice(&cave.bytes);
    let mut views = Vec::new();
    for (variant, edits) in bundle.manifest.variants.iter().zip(&bundle.edits) {
        views.push(PlannedView {
            name: variant.name.clone(),
            drops_mitigation: !variant.drops.is_empty(),
            pages: pages::build(bundle, &variant.name, edits, running, expected)?,
        });
    }
    Ok(views)
}

/// Writes thunks and tables into the guest's own frames. Nothing jumps there yet.
pub fn put_cave(
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

/// Gives the domain frames for the copies, above all that it has, out of the guest's sight.
pub fn make_room(
    hypervisor: &dyn Hypervisor,
    journal: &Journal,
    domain: &Domain,
    state: &mut State,
    views: &[PlannedView],
    spare: u64,
) -> Result<(), ApplyError> {
    let used: u64 = views.iter().map(|view| view.pages.len() as u64).sum();
    let count = used + spare;
    let first = Gfn((hypervisor.highest_gfn()?.0 + 1).next_multiple_of(COPY_ALIGN));
    let limit = 1_u64 << domain.address_bits.clamp(12, 52).saturating_sub(12);
    if first.0 + count > limit {
        return Err(ApplyError::NoRoom {
            first,
            count,
            bits: domain.address_bits,
        });
    }
    let copies = Copies {
        first,
        count,
        max_pages_before: domain.max_pages,
    };
    state.copies = Some(copies);
    state.spare = (spare > 0).then_some((Gfn(first.0 + used), spare));
    state.step = Step::Copies;
    journal.save(state)?;
    let no_memory = |source| ApplyError::NoMemory {
        pages: count,
        mib: (count * PAGE as u64).div_ceil(1 << 20),
        source,
    };
    // Also where there is room: it is the guest's, which may have been ballooned down and be given it back.
    hypervisor.set_max_pages(copies.max_pages())?;
    // Before there is anything in them that the guest could get hold of.
    hypervisor.hide(first, count)?;
    hypervisor.populate(first, count).map_err(no_memory)
}

/// Makes the views, all of whose text is read-only to the guest, and maps the copies into them. The copies are still empty
/// and no vCPU uses the views.
pub fn make_views(
    hypervisor: &dyn Hypervisor,
    journal: &Journal,
    state: &mut State,
    frames: &[Gfn],
    views: &[PlannedView],
) -> Result<(), ApplyError> {
    let copies = state
        .copies
        .expect("frames were added before views are made");
    let mut next = copies.first.0;
    for view in views {
        state.views.push(ViewState {
            name: view.name.clone(),
            view: None,
            drops_mitigation: view.drops_mitigation,
            pages: view.pages.keys().copied().collect(),
            first_copy: Gfn(next),
        });
        next += view.pages.len() as u64;
    }
    state.step = Step::Views;
    journal.save(state)?;
    for index in 0..state.views.len() {
        let view = hypervisor.create_view()?;
        state.views[index].view = Some(view);
        journal.save(state)?;
        for (first, count) in runs(frames) {
            hypervisor.protect(view, first, count)?;
        }
        let entry = &state.views[index];
        let copies = (entry.first_copy.0..).map(|copy| Some(Gfn(copy)));
        let pages = entry.pages.iter().map(|page| frames[*page as usize]);
        let remaps: Vec<(Gfn, Option<Gfn>)> = pages.zip(copies).collect();
        hypervisor.remap_all(view, &remaps, true)?;
        if entry.drops_mitigation {
            hypervisor.binding(Binding::new(Action::Flags).view(view).flags(1))?;
        }
    }
    Ok(())
}

/// Frames that follow each other, as first and number.
fn runs(frames: &[Gfn]) -> Vec<(Gfn, u64)> {
    let mut runs: Vec<(Gfn, u64)> = Vec::new();
    for frame in frames {
        match runs.last_mut() {
            Some((first, count)) if first.0 + *count == frame.0 => *count += 1,
            _ => runs.push((*frame, 1)),
        }
    }
    runs
}

/// Fills the copies. Every fill writes all of every page: a copy is either whole or not in use.
pub fn fill(
    hypervisor: &dyn Hypervisor,
    state: &State,
    views: &[PlannedView],
) -> Result<(), ApplyError> {
    for (PlannedView { pages, .. }, entry) in views.iter().zip(&state.views) {
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
