//! A profile of indirect branches: where each went, and how often.
//!
//! ```text
//! # branch            target            count
//! do_syscall_64+0x5b  __x64_sys_read    120000
//! 0xffffffff812f3a4c  ext4_file_read_iter 8042
//! ```
//!
//! One branch and one target a line; the counts of lines that say the same are added up. A place is a symbol, with or without
//! an offset, or an address as the kernel is linked.

use super::{Names, Place, lines};
use crate::image::Image;
use penumbra_bundle::LinkVa;
use std::collections::BTreeMap;

/// Where indirect branches went.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Branches(Vec<Line>);

#[derive(Clone, PartialEq, Eq, Debug)]
struct Line {
    branch: Place,
    target: Place,
    count: u64,
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
        let mut branches = Vec::new();
        for (number, words) in lines(text) {
            let parsed = match words[..] {
                [branch, target, count] => Line::parse(branch, target, count),
                _ => None,
            };
            branches.push(parsed.ok_or_else(|| {
                format!(
                    "line {number} is no `BRANCH TARGET COUNT`, as in `do_syscall_64+0x5b __x64_sys_read 1200`"
                )
            })?);
        }
        Ok(Branches(branches))
    }

    /// Finds its places in `image`.
    pub fn resolve(&self, image: &Image) -> Resolved {
        let names = Names::of(image);
        // A name that several have names none of them.
        let find = |place: &Place| match names.find(place)[..] {
            [va] => Some(va),
            _ => None,
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
