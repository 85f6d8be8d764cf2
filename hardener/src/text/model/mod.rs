//! How the text that runs may differ from the text in the file (design, invariant 5): one function for each table.

mod alternatives;
mod calls;
mod nops;
mod thunks;

use super::{Span, TextError};
use crate::image::{Image, Tables};
use penumbra_bundle::{Form, LinkVa, RunTimeModel, Site, SiteKind, TextOff};

/// Builds the model of a kernel's text.
pub fn build(image: &Image, tables: &Tables, span: Span) -> Result<RunTimeModel, TextError> {
    let mut sites = Vec::new();
    alternatives::sites(image, tables, span, &mut sites)?;
    thunks::sites(image, tables, span, &mut sites)?;
    calls::sites(image, tables, span, &mut sites)?;
    sites.sort_by_key(|site| (site.at, site.kind, site.len));
    let offsets = |list: &[LinkVa]| list.iter().filter_map(|va| span.offset(*va)).collect();
    Ok(RunTimeModel {
        abs32: offsets(&image.relocs.abs32),
        inverse32: offsets(&image.relocs.inverse32),
        abs64: offsets(&image.relocs.abs64),
        sites,
        functions: functions(image, span),
        return_thunks: thunks::return_thunks(image, span),
    })
}

/// Function entries by symbol, each once.
fn functions(image: &Image, span: Span) -> Vec<TextOff> {
    let code = image.symbols.iter().filter(|symbol| symbol.is_code());
    let mut found: Vec<TextOff> = code.filter_map(|symbol| span.offset(symbol.va)).collect();
    found.dedup();
    found
}

/// Plain bytes without relocations.
fn exact(bytes: &[u8]) -> Form {
    Form::Exact {
        bytes: bytes.to_vec(),
        abs32: vec![],
        inverse32: vec![],
    }
}

/// The site at `va`, when it lies in the text.
fn site(span: Span, va: LinkVa, len: u8, kind: SiteKind, forms: Vec<Form>) -> Option<Site> {
    let at = span.offset(va)?;
    // A site that leaves the section would be a damaged table; the gate has seen every start, this sees the end.
    span.offset(LinkVa(va.0 + u64::from(len) - 1))?;
    Some(Site {
        at,
        len,
        kind,
        forms,
    })
}
