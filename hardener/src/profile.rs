//! A profile of indirect branches: where each went, and how often.
//!
//! ```text
//! # branch            target            count
//! do_syscall_64+0x5b  __x64_sys_read    120000
//! 0xffffffff812f3a4c  ext4_file_read_iter 8042
//! ```
//!
//! One branch and one target a line; the counts of lines that say the same are added up, so that profiles are merged by
//! concatenation. A place is a symbol, with or without an offset, or an address as the kernel is linked.

use crate::image::Image;
use penumbra_bundle::LinkVa;
use std::collections::{BTreeMap, HashMap};

/// Where indirect branches went.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Branches(Vec<Line>);

#[derive(Clone, PartialEq, Eq, Debug)]
struct Line {
    branch: Place,
    target: Place,
    count: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Place {
    Va(LinkVa),
    Symbol(String, u64),
}

/// A profile's branches in one kernel.
#[derive(Default)]
pub struct Resolved {
    /// By branch: its targets and how often each was reached.
    pub branches: BTreeMap<LinkVa, BTreeMap<LinkVa, u64>>,
    /// Lines that name what this kernel does not have, or has more than once.
    pub unknown: u64,
}

impl Branches {
    /// Reads a profile; which line is none, and why.
    pub fn parse(text: &str) -> Result<Branches, String> {
        let mut lines = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let content = line.split('#').next().unwrap_or_default();
            let words: Vec<&str> = content.split_whitespace().collect();
            if words.is_empty() {
                continue;
            }
            let parsed = match words[..] {
                [branch, target, count] => Line::parse(branch, target, count),
                _ => None,
            };
            let Some(line) = parsed else {
                return Err(format!(
                    "line {number} is no `BRANCH TARGET COUNT`, as in `do_syscall_64+0x5b __x64_sys_read 1200`"
                ));
            };
            lines.push(line);
        }
        Ok(Branches(lines))
    }

    /// Finds its places in `image`.
    pub fn resolve(&self, image: &Image) -> Resolved {
        let mut symbols: HashMap<&str, Option<LinkVa>> = HashMap::new();
        for symbol in &image.symbols {
            let known = symbols.entry(&symbol.name).or_insert(Some(symbol.va));
            // A name that several have names none of them.
            *known = known.filter(|va| *va == symbol.va);
        }
        let find = |place: &Place| match place {
            Place::Va(va) => Some(*va),
            Place::Symbol(name, offset) => {
                let start = symbols.get(name.as_str()).copied().flatten()?;
                start.checked_add(*offset)
            }
        };
        let mut resolved = Resolved::default();
        for line in &self.0 {
            let (Some(branch), Some(target)) = (find(&line.branch), find(&line.target)) else {
                resolved.unknown += 1;
                continue;
            };
            let targets = resolved.branches.entry(branch).or_default();
            let count = targets.entry(target).or_default();
            *count = count.saturating_add(line.count);
        }
        resolved
    }
}

impl Line {
    fn parse(branch: &str, target: &str, count: &str) -> Option<Line> {
        Some(Line {
            branch: Place::parse(branch)?,
            target: Place::parse(target)?,
            count: count.parse().ok()?,
        })
    }
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

#[cfg(test)]
mod tests {
    use super::Branches;

    #[test]
    fn comments_and_empty_lines_say_nothing() {
        let text = "# a profile\n\na+0x5 b 3 # hot\n";
        assert_eq!(Branches::parse(text), Branches::parse("a+0x5\tb 3"),);
        assert_eq!(Branches::parse("a b 1").unwrap().0.len(), 1);
    }

    #[test]
    fn what_is_no_line_is_named() {
        for bad in [
            "a b", "a b c", "a b 1 2", "a b -1", "a+5 b 1", "0xzz b 1", "12 b 1", "+0x1 b 1",
        ] {
            let said = Branches::parse(&format!("a b 1\n{bad}\n")).unwrap_err();
            assert!(said.starts_with("line 2 is no"), "{bad}: {said}");
        }
    }
}
