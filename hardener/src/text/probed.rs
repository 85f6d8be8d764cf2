//! The functions of one kernel that a list names, to be probed.

use super::Text;
use super::outside::Outside;
use super::watched::Watched;
use crate::image::{Fault, Image, Tables};
use crate::profile::Functions;
use std::collections::BTreeMap;

/// The functions that are probed.
pub struct Probed {
    /// With their calls.
    pub watched: Watched,
    /// Counts, for the manifest.
    pub figures: BTreeMap<String, u64>,
}

impl Probed {
    /// Finds the functions of `list`, but for those `outside` the profile, whose calls are led elsewhere already.
    pub fn find(
        image: &Image,
        tables: &Tables,
        text: &Text,
        list: &Functions,
        outside: Option<&Outside>,
    ) -> Result<Probed, Fault> {
        let (named, unknown) = list.resolve(image);
        let numbers = named
            .iter()
            .filter_map(|va| text.functions.number(text.span.offset(*va)?));
        let mut numbers: Vec<usize> = numbers.collect();
        numbers.sort_unstable();
        numbers.dedup();
        let all = numbers.len();
        numbers.retain(|number| text.functions.calls_fentry(*number));
        let traced = numbers.len();
        let starts = numbers
            .into_iter()
            .map(|number| text.functions.start(number));
        let elsewhere = |at| outside.is_some_and(|outside| outside.watched.contains(at));
        let functions: Vec<_> = starts.filter(|at| !elsewhere(*at)).collect();
        let taken = functions
            .iter()
            .filter(|at| text.entries.binary_search(at).is_ok());
        let figures = [
            ("functions", functions.len()),
            ("functions-not-traceable", all - traced),
            ("functions-outside-the-profile", traced - functions.len()),
            // What reaches these by their address is not seen.
            ("functions-with-address-taken", taken.count()),
        ];
        let mut figures: BTreeMap<String, u64> = figures
            .map(|(name, value)| (name.to_owned(), value as u64))
            .into();
        figures.insert("list-lines-unknown".to_owned(), unknown);
        Ok(Probed {
            watched: Watched::of(image, tables, text, functions)?,
            figures,
        })
    }
}
