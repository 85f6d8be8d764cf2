//! Profiles: what a kernel did in a run that was recorded, in plain text. They are merged by concatenation, and `#` begins a
//! comment.

mod branches;
mod functions;

pub use branches::{Branches, Resolved};
pub use functions::Functions;

use crate::image::Image;
use penumbra_bundle::LinkVa;
use std::collections::HashMap;

/// A place in the kernel: `symbol`, `symbol+0x12`, or an address as the kernel is linked, `0xffffffff81234567`.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Place {
    Va(LinkVa),
    Symbol(String, u64),
}

impl Place {
    fn parse(word: &str) -> Option<Place> {
        let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
        if let Some(digits) = word.strip_prefix("0x") {
            return Some(Place::Va(LinkVa(hex(digits)?)));
        }
        if word.starts_with(|first: char| first.is_ascii_digit()) {
            return None;
        }
        let (name, offset) = match word.split_once('+') {
            Some((name, offset)) => (name, hex(offset.strip_prefix("0x")?)?),
            None => (word, 0),
        };
        (!name.is_empty()).then(|| Place::Symbol(name.to_owned(), offset))
    }
}

/// A kernel's symbols by name: several functions may have the same.
struct Names<'a>(HashMap<&'a str, Vec<LinkVa>>);

impl<'a> Names<'a> {
    fn of(image: &'a Image) -> Names<'a> {
        let mut names: HashMap<&str, Vec<LinkVa>> = HashMap::new();
        for symbol in &image.symbols {
            let known = names.entry(&symbol.name).or_default();
            // Symbols are sorted by address.
            if known.last() != Some(&symbol.va) {
                known.push(symbol.va);
            }
        }
        Names(names)
    }

    /// Every address that `place` may mean.
    fn find(&self, place: &Place) -> Vec<LinkVa> {
        match place {
            Place::Va(va) => vec![*va],
            Place::Symbol(name, offset) => {
                let starts = self.0.get(name.as_str()).into_iter().flatten();
                starts.filter_map(|va| va.checked_add(*offset)).collect()
            }
        }
    }
}

/// The words of each line that says something, with its number from 1.
fn lines(text: &str) -> impl Iterator<Item = (usize, Vec<&str>)> {
    let lines = (1..).zip(text.lines()).map(|(number, line)| {
        let content = line.split('#').next().unwrap_or_default();
        (number, content.split_whitespace().collect::<Vec<_>>())
    });
    lines.filter(|(_, words)| !words.is_empty())
}
