//! Verifies, beside a running guest, that every view still is the guest's text plus its variant's edits.

use super::journal::{State, ViewState};
use super::verify_modules;
use super::{TextError, understand};
use crate::exit::{Exit, Exits};
use crate::guest::explain;
use crate::xen::{Errno, Gfn, Hypervisor, PAGE, XenError};
use penumbra_bundle::{Bundle, Edits, TextOff};
use serde::Serialize;
use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::Duration;
use thiserror::Error;

/// Times that a page which differs is looked at again. A poke under way differs for the microseconds until Xen mirrors it.
const LOOKS: u32 = 200;
/// Time between looks.
const LOOK_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 0 } else { 2 });
/// Differences that are listed for each view.
const LISTED: usize = 20;

/// Why nothing can be said.
#[derive(Debug, Error)]
pub enum VerifyTextError {
    /// The text cannot be read.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A frame cannot be read.
    #[error("a page of view `{view}` cannot be read: {source}")]
    Copy {
        /// The view.
        view: String,
        /// What Xen said.
        source: XenError,
    },
    /// The bundle is another one.
    #[error("the bundle has no variant `{0}`, which is applied; name the bundle that was applied")]
    OtherBundle(String),
}

impl Exits for VerifyTextError {
    fn exit(&self) -> Exit {
        Exit::Cannot
    }
}

/// What a view showed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ViewReport {
    /// Its name.
    pub name: String,
    /// Pages that it has a copy of.
    pub pages: usize,
    /// Bytes that are neither the running text's nor the variant's.
    pub differing: u64,
    /// Pages at which Xen shows another frame than it should, or lets the guest write.
    pub misplaced: u64,
    /// The first of both: symbol, what the view has, what was expected.
    pub places: Vec<String>,
}

/// What was verified.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Report {
    /// Everything is explained.
    pub explained: bool,
    /// Bytes of text in each view.
    pub text_bytes: usize,
    /// Bytes in which the running text differs from its file, explained by the image's tables.
    pub changed_bytes: u64,
    /// What of the running text is not explained.
    pub unexplained: Vec<String>,
    /// The cave holds the bundle's thunks.
    pub cave: bool,
    /// Xen was asked what each view shows where; one that does not tell is only asked for bytes.
    pub xen_tells: bool,
    /// Each view.
    pub views: Vec<ViewReport>,
    /// Each module that has views, under `VIEW/MODULE`.
    pub modules: Vec<ViewReport>,
}

/// Explains the running text and compares every copy with it.
pub fn verify(
    hypervisor: &dyn Hypervisor,
    bundle: &Bundle,
    state: &State,
) -> Result<Report, VerifyTextError> {
    let mut report = Report {
        explained: false,
        text_bytes: bundle.text.len(),
        changed_bytes: 0,
        unexplained: Vec::new(),
        cave: false,
        xen_tells: true,
        views: Vec::new(),
        modules: Vec::new(),
    };
    let expected = explain::expected(bundle, state.reader.slide());
    let understood = match understand(hypervisor, state.reader.kernel(), bundle, &expected) {
        Ok(understood) => understood,
        Err(TextError::Explain(error)) => {
            report.unexplained = vec![error.to_string()];
            return Ok(report);
        }
        Err(error) => return Err(error.into()),
    };
    report.changed_bytes = understood.explained.changed.values().sum();
    report.cave = understood.explained.cave_in_use;
    for view in &state.views {
        let (_, edits) = bundle
            .variant(&view.name)
            .ok_or_else(|| VerifyTextError::OtherBundle(view.name.clone()))?;
        let frames = &understood.text.frames;
        let mut of_view = verify_view(hypervisor, bundle, frames, view, edits)?;
        report.xen_tells &= verify_mapping(hypervisor, bundle, frames, view, &mut of_view)?;
        report.views.push(of_view);
    }
    report.modules = verify_modules::verify(hypervisor, bundle, state, &mut report.unexplained);
    let good = |view: &ViewReport| view.differing == 0 && view.misplaced == 0;
    let mut all = report.views.iter().chain(&report.modules);
    report.explained = report.cave && report.unexplained.is_empty() && all.all(good);
    Ok(report)
}

fn verify_view(
    hypervisor: &dyn Hypervisor,
    bundle: &Bundle,
    frames: &[Gfn],
    view: &ViewState,
    edits: &Edits,
) -> Result<ViewReport, VerifyTextError> {
    let mut report = ViewReport {
        name: view.name.clone(),
        pages: view.pages.len(),
        differing: 0,
        misplaced: 0,
        places: Vec::new(),
    };
    let fail = |source| VerifyTextError::Copy {
        view: view.name.clone(),
        source,
    };
    let copies: Vec<Gfn> = (0..view.pages.len() as u64)
        .map(|index| Gfn(view.first_copy.0 + index))
        .collect();
    hypervisor.prefetch(&copies);
    for (copy, page) in copies.iter().zip(&view.pages) {
        let page = *page as usize;
        let frame = *frames
            .get(page)
            .ok_or_else(|| VerifyTextError::OtherBundle(view.name.clone()))?;
        let mut looks = 0;
        let wrong = loop {
            let mut want = vec![0; PAGE];
            let mut have = vec![0; PAGE];
            hypervisor.read(frame, 0, &mut want).map_err(fail)?;
            hypervisor.read(*copy, 0, &mut have).map_err(fail)?;
            lay_edits(&mut want, page, edits);
            let wrong: Vec<usize> = (0..PAGE).filter(|at| want[*at] != have[*at]).collect();
            if wrong.is_empty() || looks == LOOKS {
                break wrong
                    .into_iter()
                    .map(|at| (at, want[at], have[at]))
                    .collect::<Vec<_>>();
            }
            looks += 1;
            sleep(LOOK_PAUSE);
        };
        report.differing += wrong.len() as u64;
        for (at, want, have) in wrong {
            if report.places.len() < LISTED {
                let symbol = explain::symbol(bundle, TextOff((page * PAGE + at) as u32));
                report.places.push(format!(
                    "{symbol}: {have:02x} where {want:02x} was expected"
                ));
            }
        }
    }
    Ok(report)
}

/// Asks Xen, page by page, whether the view shows the copies and the guest's own frames where it should, all read-only.
/// Returns whether this Xen tells.
fn verify_mapping(
    hypervisor: &dyn Hypervisor,
    bundle: &Bundle,
    frames: &[Gfn],
    view: &ViewState,
    report: &mut ViewReport,
) -> Result<bool, VerifyTextError> {
    let Some(id) = view.view else {
        return Ok(true);
    };
    let copies: BTreeMap<u32, Gfn> = view
        .pages
        .iter()
        .zip(view.first_copy.0..)
        .map(|(page, copy)| (*page, Gfn(copy)))
        .collect();
    for (page, gfn) in frames.iter().enumerate() {
        let wanted = copies.get(&(page as u32)).unwrap_or(gfn);
        let shown = match hypervisor.shown(id, *gfn) {
            Err(error) if error.is(Errno::INVAL) => return Ok(false),
            result => result.map_err(|source| VerifyTextError::Copy {
                view: view.name.clone(),
                source,
            })?,
        };
        let right =
            shown.is_some_and(|shown| shown.frame == *wanted && shown.read_only && !shown.hidden);
        if right {
            continue;
        }
        report.misplaced += 1;
        if report.places.len() < LISTED {
            let symbol = explain::symbol(bundle, TextOff((page * PAGE) as u32));
            let shown = match shown {
                None => "nothing".to_owned(),
                Some(shown) if !shown.read_only => format!("frame {}, writable", shown.frame),
                Some(shown) => format!("frame {}", shown.frame),
            };
            report.places.push(format!(
                "page at {symbol}: Xen shows {shown} where frame {wanted}, read-only, was expected"
            ));
        }
    }
    Ok(true)
}

/// Puts the edits' bytes that fall into `page` over the running ones.
fn lay_edits(bytes: &mut [u8], page: usize, edits: &Edits) {
    let start = page * PAGE;
    // An edit has at most 6 bytes, so one that starts up to 5 before the page may reach into it.
    let first = edits
        .0
        .partition_point(|edit| edit.at.0 as usize + edit.bytes.len() <= start);
    for edit in &edits.0[first..] {
        let at = edit.at.0 as usize;
        if at >= start + PAGE {
            break;
        }
        for (offset, byte) in edit.bytes.iter().enumerate() {
            if (start..start + PAGE).contains(&(at + offset)) {
                bytes[at + offset - start] = *byte;
            }
        }
    }
}
