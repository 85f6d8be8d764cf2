//! Path patterns: anchored at both ends, `*` inside a segment, `**` for any number of segments.

use std::fmt;
use thiserror::Error;

/// Why a pattern is not one.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum GlobError {
    /// Relative paths name nothing: a process's executable is an absolute path.
    #[error("does not start with `/`; write the whole path, or `/**/NAME` for any directory")]
    NotAbsolute,
    /// `//`, a trailing `/`, `.` or `..`: no path that the kernel reports has these.
    #[error("has an empty, `.` or `..` segment, which no executable's path has")]
    Segment,
    /// `**` glued to other characters.
    #[error("`**` must stand alone between slashes; use `*` inside a segment")]
    Stars,
    /// Characters that mean something in a shell's patterns, and control characters.
    #[error("has the character {0:?}, which is not supported; only `*` and `**` are special here")]
    Character(char),
    /// Longer than any path.
    #[error("is longer than 4096 bytes, the longest path in Linux (PATH_MAX)")]
    TooLong,
}

/// A path pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob {
    text: String,
    segments: Vec<Segment>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    /// `**`: any number of segments; at the end, at least one.
    Any,
    /// One segment; `*` in it stands for any characters.
    One(String),
}

impl Glob {
    /// Reads a pattern.
    pub fn new(text: &str) -> Result<Glob, GlobError> {
        if text.len() > 4096 {
            return Err(GlobError::TooLong);
        }
        let special = |c: char| c.is_control() || "?[]{}\\".contains(c);
        if let Some(character) = text.chars().find(|c| special(*c)) {
            return Err(GlobError::Character(character));
        }
        let rest = text.strip_prefix('/').ok_or(GlobError::NotAbsolute)?;
        let segment = |text: &str| match text {
            "" | "." | ".." => Err(GlobError::Segment),
            "**" => Ok(Segment::Any),
            text if text.contains("**") => Err(GlobError::Stars),
            text => Ok(Segment::One(text.to_owned())),
        };
        Ok(Glob {
            text: text.to_owned(),
            segments: rest.split('/').map(segment).collect::<Result<_, _>>()?,
        })
    }

    /// Whether the whole of `path` matches.
    pub fn matches(&self, path: &str) -> bool {
        let Some(rest) = path.strip_prefix('/') else {
            return false;
        };
        let path: Vec<&str> = rest.split('/').collect();
        // `reached[n]`: the pattern so far can end before segment n. No backtracking: the time is pattern times path.
        let mut reached = vec![false; path.len() + 1];
        reached[0] = true;
        for (index, segment) in self.segments.iter().enumerate() {
            let mut next = vec![false; path.len() + 1];
            match segment {
                Segment::One(pattern) => {
                    for at in 0..path.len() {
                        next[at + 1] = reached[at] && matches_segment(pattern, path[at]);
                    }
                }
                Segment::Any => {
                    let last = index + 1 == self.segments.len();
                    let mut open = false;
                    for at in 0..=path.len() {
                        next[at] = open || (reached[at] && !last);
                        open |= reached[at];
                    }
                }
            }
            reached = next;
        }
        reached[path.len()]
    }

    /// The segments before the first wildcard, as a path: what every match starts with.
    pub(crate) fn fixed_prefix(&self) -> String {
        let fixed =
            |segment: &&Segment| matches!(segment, Segment::One(text) if !text.contains('*'));
        let segments = self.segments.iter().take_while(fixed);
        segments
            .filter_map(|segment| match segment {
                Segment::One(text) => Some(format!("/{text}")),
                Segment::Any => None,
            })
            .collect()
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Whether `text` matches `pattern`, where `*` stands for any characters: first piece at the start, last piece at the
/// end, the others at their first occurrence in between.
fn matches_segment(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(mut text) = text.strip_prefix(first) else {
        return false;
    };
    let mut pieces: Vec<&str> = rest.split('*').collect();
    let last = pieces.pop().unwrap_or_default();
    for piece in pieces {
        match text.find(piece) {
            Some(at) => text = &text[at + piece.len()..],
            None => return false,
        }
    }
    text.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches() {
        for (pattern, path, expected) in [
            ("/usr/bin/payroll", "/usr/bin/payroll", true),
            ("/usr/bin/payroll", "/usr/bin/payroll2", false),
            ("/usr/bin/payroll", "/x/usr/bin/payroll", false),
            ("/usr/bin/payroll", "usr/bin/payroll", false),
            ("/usr/bin/payroll", "/usr/bin/payroll (deleted)", false),
            ("/usr/bin/*", "/usr/bin/x", true),
            ("/usr/bin/*", "/usr/bin/x/y", false),
            ("/usr/bin/*", "/usr/bin", false),
            ("/usr/*/x", "/usr/bin/x", true),
            ("/usr/*/x", "/usr/a/b/x", false),
            ("/opt/**", "/opt/a", true),
            ("/opt/**", "/opt/a/b/c", true),
            ("/opt/**", "/opt", false),
            ("/opt/**", "/optional/a", false),
            ("/opt/**/bin/*", "/opt/bin/x", true),
            ("/opt/**/bin/*", "/opt/a/b/bin/x", true),
            ("/opt/**/bin/*", "/opt/a/b/bin/x/y", false),
            ("/**/x", "/x", true),
            ("/**/**/x", "/a/x", true),
            ("/usr/bin/php*-fpm*", "/usr/bin/php8.2-fpm", true),
            ("/usr/bin/php*-fpm*", "/usr/bin/php-fpm8", true),
            ("/usr/bin/php*-fpm*", "/usr/bin/php8.2-cgi", false),
            ("/a*a", "/a", false),
            ("/a*a", "/aa", true),
            ("/*ab*b", "/abb", true),
            ("/*ab*b", "/ab", false),
            ("/h\u{e9}*", "/h\u{e9}llo", true),
        ] {
            let glob = Glob::new(pattern).unwrap();
            assert_eq!(glob.matches(path), expected, "{pattern} on {path}");
        }
    }

    /// A pattern that takes exponential time in matchers that backtrack.
    #[test]
    fn many_stars_are_cheap() {
        let glob = Glob::new(&format!("{}/b", "/**/a*a*a*a".repeat(200))).unwrap();
        assert!(!glob.matches(&"/aaaaaaaaaaaaaaaa".repeat(200)));
    }
}
