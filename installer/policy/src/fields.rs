//! Walks TOML tables by hand: every error is kept with its place, and reading goes on after it.

use crate::diagnostic::{Diagnostic, Severity};
use std::fmt::Display;
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A TOML value and where it stands.
pub(crate) type Value<'i> = Spanned<DeValue<'i>>;

/// A table, where it stands, and what it is called in messages.
#[derive(Clone, Copy)]
pub(crate) struct Table<'t, 'i> {
    pub(crate) fields: &'t DeTable<'i>,
    pub(crate) place: &'t str,
    /// Where to point when a key is missing.
    pub(crate) head: usize,
}

/// The most findings that are kept: each costs a walk to its line, and nobody reads more.
pub(crate) const MAX_FOUND: usize = 200;

/// Reads the values of one file and collects what is wrong with them.
pub(crate) struct Reader<'a> {
    pub(crate) file: &'a str,
    pub(crate) src: &'a str,
    pub(crate) found: Vec<Diagnostic>,
    /// Stands for every finding after the last that is kept.
    pub(crate) overflow: Option<Diagnostic>,
    /// The file does not parse as TOML, so a missing key may be one that the parser could not see.
    pub(crate) broken: bool,
}

impl Reader<'_> {
    /// Adds an error; the caller may set its label, help and related place.
    pub(crate) fn error(
        &mut self,
        code: &'static str,
        span: Range<usize>,
        message: impl Into<String>,
    ) -> &mut Diagnostic {
        self.add(Severity::Error, code, span, message)
    }

    /// Adds a finding.
    pub(crate) fn add(
        &mut self,
        severity: Severity,
        code: &'static str,
        span: Range<usize>,
        message: impl Into<String>,
    ) -> &mut Diagnostic {
        let index = self.found.len();
        if index == MAX_FOUND {
            let place = (self.file, "");
            let hidden = || Diagnostic::new(place, Severity::Error, code, 0..0, "");
            return self.overflow.get_or_insert_with(hidden);
        }
        let place = (self.file, self.src);
        let diagnostic = Diagnostic::new(place, severity, code, span, message);
        self.found.push(diagnostic);
        &mut self.found[index]
    }

    /// Reports every key of `table` that is not in `known`.
    pub(crate) fn only(&mut self, table: Table<'_, '_>, known: &[&str]) {
        for key in table.fields.keys() {
            let name = key.get_ref().as_ref();
            if known.contains(&name) {
                continue;
            }
            let help = match (not_offered(name), suggest(name, known)) {
                (Some(why), _) => why.to_owned(),
                (None, Some(near)) => format!("did you mean `{near}`?"),
                (None, None) => format!("known here: {}", list(known)),
            };
            let message = format!("unknown key `{}` in {}", name.escape_debug(), table.place);
            self.error("P002", key.span(), message).help = help;
        }
    }

    /// The value of a key that must be there.
    pub(crate) fn need<'t, 'i>(
        &mut self,
        table: Table<'t, 'i>,
        key: &str,
        help: &str,
    ) -> Option<&'t Value<'i>> {
        let value = table.fields.get(key);
        if value.is_none() && !self.broken {
            let message = format!("{} has no `{key}`", table.place);
            self.error("P004", table.head..table.head, message).help = help.to_owned();
        }
        value
    }

    /// A string of printable characters, not empty.
    pub(crate) fn text<'t>(&mut self, value: &'t Value<'_>) -> Option<&'t str> {
        let Some(text) = value.get_ref().as_str() else {
            self.wrong_type(value, "a string");
            return None;
        };
        if text.trim().is_empty() || text.chars().any(char::is_control) {
            let message = "expected text without control characters, and not empty";
            self.error("P006", value.span(), message);
            return None;
        }
        Some(text)
    }

    /// A name: lower-case letters, digits, `-`, `_` and `.`, at most 64.
    pub(crate) fn name(&mut self, value: &Value<'_>) -> Option<String> {
        let text = self.text(value)?;
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b);
        if text.len() > 64 || !text.bytes().all(plain) {
            let message = format!("`{text}` is not a plain name");
            self.error("P006", value.span(), message).help =
                "use at most 64 lower-case letters, digits, `-`, `_` and `.`".to_owned();
            return None;
        }
        Some(text.to_owned())
    }

    /// An integer in `range`.
    pub(crate) fn integer(&mut self, value: &Value<'_>, range: Range<u64>) -> Option<u64> {
        let Some(integer) = value.get_ref().as_integer() else {
            self.wrong_type(value, "an integer");
            return None;
        };
        let number = u64::from_str_radix(integer.as_str(), integer.radix()).ok();
        let number = number.filter(|number| range.contains(number));
        if number.is_none() {
            let message = format!(
                "{integer} is not between {} and {}",
                range.start,
                range.end - 1
            );
            self.error("P006", value.span(), message);
        }
        number
    }

    /// `true` or `false`.
    pub(crate) fn boolean(&mut self, value: &Value<'_>) -> Option<bool> {
        let boolean = value.get_ref().as_bool();
        if boolean.is_none() {
            self.wrong_type(value, "`true` or `false`");
        }
        boolean
    }

    /// A table.
    pub(crate) fn table<'t, 'i>(
        &mut self,
        value: &'t Value<'i>,
        place: &'t str,
    ) -> Option<Table<'t, 'i>> {
        let Some(fields) = value.get_ref().as_table() else {
            self.wrong_type(value, "a table");
            return None;
        };
        Some(Table {
            fields,
            place,
            head: value.span().start,
        })
    }

    /// The tables of `[[key]]`; none when the key is not there.
    pub(crate) fn tables<'t, 'i>(
        &mut self,
        table: Table<'t, 'i>,
        key: &'t str,
        place: &'t str,
    ) -> Vec<Table<'t, 'i>> {
        let Some(value) = table.fields.get(key) else {
            return Vec::new();
        };
        let Some(array) = value.get_ref().as_array() else {
            // A broken `[[rule` looks like a table to the parser.
            if !self.broken {
                self.wrong_type(value, "an array of tables").help = format!("write [[{key}]]");
            }
            return Vec::new();
        };
        let tables = array.iter().map(|value| self.table(value, place));
        tables.flatten().collect()
    }

    /// One value or a list of them; a list that is empty is an error.
    pub(crate) fn one_or_many<'t, 'i>(&mut self, value: &'t Value<'i>) -> Vec<&'t Value<'i>> {
        match value.get_ref().as_array() {
            None => vec![value],
            Some(array) if array.is_empty() => {
                self.error("P012", value.span(), "an empty list matches nothing")
                    .help = "leave the key away to ask nothing of it".to_owned();
                Vec::new()
            }
            Some(array) => array.iter().collect(),
        }
    }

    fn wrong_type(&mut self, value: &Value<'_>, wanted: &str) -> &mut Diagnostic {
        let found = value.get_ref().type_str();
        let message = format!("expected {wanted}, found {}", article(found));
        self.error("P003", value.span(), message)
    }
}

fn article(noun: &str) -> String {
    let vowel = noun.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {noun}", if vowel { "an" } else { "a" })
}

/// `a`, `b`, `c`.
pub(crate) fn list(items: &[impl Display]) -> String {
    let quoted: Vec<_> = items.iter().map(|item| format!("`{item}`")).collect();
    quoted.join(", ")
}

/// The one of `known` that `typed` may have been meant as.
pub(crate) fn suggest<'k>(typed: &str, known: &[&'k str]) -> Option<&'k str> {
    // Longer than any key: not worth the quadratic distance.
    if typed.len() > 40 {
        return None;
    }
    let typed = typed.to_lowercase().replace('_', "-");
    let distance = |known: &&str| strsim::osa_distance(&typed, known);
    let near = known.iter().copied().min_by_key(distance)?;
    (distance(&near) <= near.len().max(typed.len()) / 3).then_some(near)
}

/// Keys that people look for and that are left out on purpose.
fn not_offered(key: &str) -> Option<&'static str> {
    match key {
        "comm" | "cmdline" | "environ" => {
            Some("a process writes this itself, so no trust can rest on it; match `exe`")
        }
        "path" | "binary" | "command" => Some("the executable's path is `exe`"),
        "user" | "euid" | "username" => Some("match the number of the real user: `uid`"),
        "pid" => Some("process ids are used again by other programs; match `exe`"),
        _ => None,
    }
}
