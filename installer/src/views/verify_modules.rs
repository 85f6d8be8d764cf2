//! Verifies the views of modules: each module's running text is explained, each copy is that text plus its variant's edits.

use super::journal::{ModuleState, State};
use super::modules::module_of;
use super::verify::ViewReport;
use crate::guest::modules::{Known, Loaded, ModuleReader, Verdict, examine};
use crate::xen::{Hypervisor, PAGE};
use penumbra_bundle::Bundle;
use std::thread::sleep;
use std::time::Duration;

/// Looks at a module that differs: it may be poked, or leave, while it is read.
const LOOKS: u32 = 20;
/// Time between looks.
const PAUSE: Duration = Duration::from_millis(if cfg!(test) { 0 } else { 5 });

/// Verifies every module that the state has. What is not explained goes to `unexplained`.
pub fn verify(
    hypervisor: &dyn Hypervisor,
    bundle: &Bundle,
    state: &State,
    unexplained: &mut Vec<String>,
) -> Vec<ViewReport> {
    let Ok(reader) = ModuleReader::new(&bundle.manifest, state.reader.slide()) else {
        return Vec::new();
    };
    let mut reports = Vec::new();
    for one in &state.modules {
        let mut looks = 0;
        loop {
            let (found, reasons) = look(hypervisor, bundle, state, &reader, one);
            let good = reasons.is_empty() && found.iter().all(|report| report.differing == 0);
            if good || looks == LOOKS {
                reports.extend(found);
                unexplained.extend(reasons);
                break;
            }
            looks += 1;
            sleep(PAUSE);
        }
    }
    reports
}

fn look(
    hypervisor: &dyn Hypervisor,
    bundle: &Bundle,
    state: &State,
    reader: &ModuleReader,
    one: &ModuleState,
) -> (Vec<ViewReport>, Vec<String>) {
    let memory = state.reader.kernel().memory(hypervisor);
    let list = reader.list(&memory);
    let here = |loaded: &&Loaded| loaded.module == one.module && loaded.text() == one.base;
    let Some(loaded) = list.modules.iter().find(here) else {
        // It left after the state was read; Xen has taken it out of the views.
        return (Vec::new(), Vec::new());
    };
    let slide = state.reader.slide();
    let known = match examine(&memory, bundle, slide, loaded, &list.modules) {
        Ok(Verdict::Known(known)) => known,
        Ok(Verdict::Early) => return (Vec::new(), Vec::new()),
        Ok(Verdict::Unknown(why)) => return (Vec::new(), vec![format!("{}: {why}", one.name)]),
        Err(error) => return (Vec::new(), vec![format!("{}: {error}", one.name)]),
    };
    let mut reports = Vec::new();
    for (index, view) in state.views.iter().enumerate() {
        reports.push(ViewReport {
            name: format!("{}/{}", view.name, one.name),
            pages: one.views.get(index).map_or(0, Vec::len),
            differing: 0,
            misplaced: 0,
            places: Vec::new(),
        });
        let report = reports.last_mut().expect("just pushed");
        if let Err(why) = compare(hypervisor, bundle, one, &known, index, report) {
            return (reports, vec![format!("{}: {why}", one.name)]);
        }
    }
    (reports, Vec::new())
}

/// Counts the bytes of one view's copies that are not the running text plus edits.
fn compare(
    hypervisor: &dyn Hypervisor,
    bundle: &Bundle,
    one: &ModuleState,
    known: &Known,
    index: usize,
    report: &mut ViewReport,
) -> Result<(), String> {
    let module = module_of(bundle, one).ok_or("the bundle does not have it")?;
    let edits = module
        .edits
        .get(index)
        .ok_or("the bundle has no such view")?;
    let mut want = known.text.clone();
    for edit in edits {
        let bytes = edit
            .bytes(&known.placement)
            .ok_or("a thunk is out of reach")?;
        want[edit.at.0 as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    for (page, _, copy) in one.views.get(index).into_iter().flatten() {
        let start = *page as usize * PAGE;
        let want = want.get(start..start + PAGE).ok_or("it has other pages")?;
        let mut have = known.text[start..start + PAGE].to_vec();
        if let Some(copy) = copy {
            let read = hypervisor.read(*copy, 0, &mut have);
            read.map_err(|error| error.to_string())?;
        }
        report.differing += want.iter().zip(&have).filter(|(a, b)| a != b).count() as u64;
    }
    Ok(())
}
