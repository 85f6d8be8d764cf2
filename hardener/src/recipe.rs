//! A recipe: what the passes do, in TOML. Without one every pass does its default.
//!
//! ```toml
//! schema = 1
//!
//! [pass.return-cfi]
//! on-violation = "log"     # kill (the default), log or panic
//! policy = ["function", "return-sites"]   # or one of them alone; return-sites is the default
//!
//! [pass.forward-cfi]
//! on-violation = "panic"
//! policy = "typed"         # address-taken (the default) or typed
//!
//! [pass.zero-regs]         # runs only where it is named, as do stack-clear, promote and debloat
//! ```
//!
//! Of several policies the first is used for which the kernel has room.
//!
//! A pass that works by a file (`[pass.promote]` and `[pass.debloat]`, `profile = "FILE"`) is given its name, from the recipe's folder.
//!
//! All errors of a file are found at once, each with its place.

use crate::passes::{self, FileParameter};
use penumbra_bundle::ViolationAction;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, Read as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use thiserror::Error;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The parameter that says what a thunk does about a value that it does not accept.
pub const ON_VIOLATION: &str = "on-violation";

/// The only schema that this version reads.
const SCHEMA: &str = "1";
/// The largest recipe.
const MAX_RECIPE: u64 = 1 << 20;
/// The largest file that a recipe names.
const MAX_FILE: u64 = 1 << 26;
/// Nobody reads more of what is wrong with one file.
const MAX_FAULTS: usize = 50;
/// The parameter of a pass that reports what it stops.
pub const VIOLATION: Parameter = Parameter {
    name: ON_VIOLATION,
    values: &["kill", "log", "panic"],
    takes_list: false,
};

/// What a recipe may set of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    /// Its key.
    pub name: &'static str,
    /// What it may be; the first is the default.
    pub values: &'static [&'static str],
    /// Whether a recipe may list several, of which the first is used that the kernel has room for.
    pub takes_list: bool,
}

/// What the passes do.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Recipe {
    /// By pass and parameter.
    set: BTreeMap<(&'static str, &'static str), &'static str>,
    /// What may take its place where there is no room for it, in this order.
    instead: BTreeMap<(&'static str, &'static str), Vec<&'static str>>,
    /// Files by pass: the key, the name as written, the text.
    files: BTreeMap<&'static str, File>,
    /// The passes that it has a table of, with or without parameters.
    named: BTreeSet<&'static str>,
}

/// A file that a pass is given.
#[derive(Clone, PartialEq, Eq, Debug)]
struct File {
    key: &'static str,
    name: String,
    text: String,
}

/// Why a recipe is refused.
#[derive(Debug, Error)]
pub enum RecipeError {
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// The recipe.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The recipe is no recipe.
    #[error("{}", lines(.0))]
    Bad(Vec<RecipeFault>),
}

/// What is wrong at one place: `FILE:LINE:COLUMN: what; remedy`.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("{file}:{line}:{column}: {kind}")]
pub struct RecipeFault {
    /// The file's name as given.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong.
    pub kind: RecipeFaultKind,
}

/// What is wrong.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum RecipeFaultKind {
    /// Too long to be a recipe.
    #[error("larger than {MAX_RECIPE} bytes; is it the right file?")]
    TooLarge,
    /// TOML is UTF-8.
    #[error("not UTF-8, as TOML must be")]
    NotUtf8,
    /// Not TOML.
    #[error("{0}")]
    Syntax(String),
    /// A key that must be there is not.
    #[error("the recipe has no `schema`; write `schema = 1`, the version of this format")]
    NoSchema,
    /// Another version of the format.
    #[error(
        "this version reads schema 1 only; use a newer hardener, or write the recipe as schema 1"
    )]
    OtherSchema,
    /// A value of another type.
    #[error("expected {expected}, found {found}")]
    Type {
        /// What stands there in a recipe.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// A pass without its file.
    #[error("pass `{pass}` has no `{key}`; name the file that it works by")]
    NoFile {
        /// The pass.
        pass: &'static str,
        /// The parameter.
        key: &'static str,
    },
    /// A file that cannot be used.
    #[error("{path}: {what}")]
    File {
        /// The file.
        path: String,
        /// What is wrong with it.
        what: String,
    },
    /// A key, pass, parameter or value that there is not.
    #[error("unknown {what} `{name}`; {}", known_or_near(.name, .known))]
    Unknown {
        /// What it would be.
        what: &'static str,
        /// What is written.
        name: String,
        /// What may stand there.
        known: Vec<&'static str>,
    },
}

fn lines(faults: &[RecipeFault]) -> String {
    let lines: Vec<String> = faults.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

fn known_or_near(name: &str, known: &[&'static str]) -> String {
    // Longer than any name: not worth the quadratic distance.
    let near = known
        .iter()
        .filter(|_| name.len() <= 40)
        .min_by_key(|known| strsim::osa_distance(name, known))
        .filter(|near| strsim::osa_distance(name, near) <= near.len().max(name.len()) / 3);
    match near {
        Some(near) => format!("did you mean `{near}`?"),
        None if known.is_empty() => "there is none".to_owned(),
        None => format!("there are: {}", known.join(", ")),
    }
}

impl Recipe {
    /// Reads the recipe in the file `path`.
    pub fn open(path: &Path) -> Result<Recipe, RecipeError> {
        let fail = |source| RecipeError::Io {
            path: path.to_owned(),
            source,
        };
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).map_err(fail)?;
        file.take(MAX_RECIPE + 1)
            .read_to_end(&mut bytes)
            .map_err(fail)?;
        Recipe::parse(&path.display().to_string(), &bytes)
    }

    /// Reads a recipe from its bytes; `file` is its name in messages.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Recipe, RecipeError> {
        let src = String::from_utf8_lossy(bytes);
        let mut reader = Reader {
            file,
            src: &src,
            faults: Vec::new(),
        };
        let mut recipe = Recipe::default();
        if bytes.len() as u64 > MAX_RECIPE {
            reader.fault(0..0, RecipeFaultKind::TooLarge);
        } else if let Err(error) = std::str::from_utf8(bytes) {
            let at = error.valid_up_to();
            reader.fault(at..at, RecipeFaultKind::NotUtf8);
        } else {
            reader.read(&mut recipe);
        }
        if reader.faults.is_empty() {
            return Ok(recipe);
        }
        reader
            .faults
            .sort_by_key(|fault| (fault.line, fault.column));
        // The TOML parser says once for each of many open brackets that the file ends.
        reader.faults.dedup();
        Err(RecipeError::Bad(reader.faults))
    }

    /// What the thunks of `pass` do about a value that they do not accept.
    pub fn on_violation(&self, pass: &'static str) -> ViolationAction {
        match self.value(pass, &VIOLATION) {
            "log" => ViolationAction::Log,
            "panic" => ViolationAction::Panic,
            _ => ViolationAction::Kill,
        }
    }

    /// Whether it names `pass`: some run only then.
    pub fn names(&self, pass: &str) -> bool {
        self.named.contains(pass)
    }

    /// The text of the file that `pass` is given.
    pub fn file(&self, pass: &str) -> Option<&str> {
        self.files.get(pass).map(|file| file.text.as_str())
    }

    /// What is to be tried in turn where the kernel lacks room: all choices of the recipe, its first ones first. A later
    /// pass gives way before an earlier one (by name).
    pub fn choices(&self) -> Vec<Recipe> {
        let mut choices = vec![Recipe {
            instead: BTreeMap::new(),
            ..self.clone()
        }];
        for (key, instead) in &self.instead {
            choices = choices
                .into_iter()
                .flat_map(|choice| {
                    let others = instead.iter().map(|value| {
                        let mut other = choice.clone();
                        other.set.insert(*key, value);
                        other
                    });
                    let others: Vec<Recipe> = others.collect();
                    std::iter::once(choice).chain(others)
                })
                .collect();
        }
        choices
    }

    /// What `choice` has in place of this recipe's first choices, for people.
    pub fn given_up(&self, choice: &Recipe) -> Vec<String> {
        let differ = self.set.iter().filter_map(|(key, first)| {
            let value = choice.set.get(key).filter(|value| *value != first)?;
            let (pass, parameter) = key;
            Some(format!(
                "{pass}: {parameter} `{value}` instead of `{first}`"
            ))
        });
        differ.collect()
    }

    /// What `parameter` of `pass` is.
    pub fn value(&self, pass: &'static str, parameter: &Parameter) -> &'static str {
        let set = self.set.get(&(pass, parameter.name));
        set.copied().unwrap_or(parameter.values[0])
    }
}

type Value<'i> = Spanned<DeValue<'i>>;

struct Reader<'a> {
    file: &'a str,
    src: &'a str,
    faults: Vec<RecipeFault>,
}

impl Reader<'_> {
    fn fault(&mut self, span: Range<usize>, kind: RecipeFaultKind) {
        if self.faults.len() >= MAX_FAULTS {
            return;
        }
        let mut start = span.start.min(self.src.len());
        while !self.src.is_char_boundary(start) {
            start -= 1;
        }
        let before = &self.src[..start];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        self.faults.push(RecipeFault {
            file: self.file.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            kind,
        });
    }

    fn read(&mut self, recipe: &mut Recipe) {
        let (root, errors) = DeTable::parse_recoverable(self.src);
        let broken = !errors.is_empty();
        for error in errors {
            let kind = RecipeFaultKind::Syntax(error.message().to_owned());
            self.fault(error.span().unwrap_or(0..0), kind);
        }
        let root = root.get_ref();
        match root.get("schema") {
            Some(value) => match value.get_ref().as_integer() {
                Some(number) if number.as_str() == SCHEMA && number.radix() == 10 => {}
                // Of another schema nothing else can be said.
                Some(_) => return self.fault(value.span(), RecipeFaultKind::OtherSchema),
                None => self.wrong_type(value, "an integer"),
            },
            None if broken => {}
            None => self.fault(0..0, RecipeFaultKind::NoSchema),
        }
        self.only(root, "key", &["schema", "pass"]);
        let Some(table) = root.get("pass").and_then(|value| self.table(value)) else {
            return;
        };
        let known = passes::known();
        self.only(table, "pass", &known.keys().copied().collect::<Vec<_>>());
        for (name, pass) in known {
            let value = table.get(name);
            if let Some(fields) = value.and_then(|value| self.table(value)) {
                recipe.named.insert(name);
                let parameters = pass.parameters();
                let mut names: Vec<&str> = parameters.iter().map(|one| one.name).collect();
                let file = pass.file();
                names.extend(file.map(|file| file.name));
                self.only(fields, "parameter", &names);
                if let (Some(wanted), Some(of)) = (file, table.get(name)) {
                    let kind = RecipeFaultKind::NoFile {
                        pass: name,
                        key: wanted.name,
                    };
                    match fields.get(wanted.name) {
                        None => self.fault(of.span(), kind),
                        Some(value) => {
                            let file = self.file(value, wanted);
                            recipe.files.extend(file.map(|file| (name, file)));
                        }
                    }
                }
                for parameter in parameters {
                    let value = fields.get(parameter.name);
                    let values = value.map(|value| self.choices(value, parameter));
                    let mut values = values.unwrap_or_default().into_iter();
                    if let Some(first) = values.next() {
                        recipe.set.insert((name, parameter.name), first);
                        let instead: Vec<&str> = values.collect();
                        if !instead.is_empty() {
                            recipe.instead.insert((name, parameter.name), instead);
                        }
                    }
                }
            }
        }
    }

    /// Reads the file that `value` names, from the recipe's own folder.
    fn file(&mut self, value: &Value<'_>, wanted: FileParameter) -> Option<File> {
        let Some(name) = value.get_ref().as_str() else {
            self.wrong_type(value, "a string");
            return None;
        };
        let folder = Path::new(self.file).parent().unwrap_or(Path::new(""));
        let path = folder.join(name);
        let text = read_text(&path).and_then(|text| {
            (wanted.check)(&text)?;
            Ok(text)
        });
        match text {
            Ok(text) => Some(File {
                key: wanted.name,
                name: name.to_owned(),
                text,
            }),
            Err(what) => {
                let path = path.display().to_string();
                self.fault(value.span(), RecipeFaultKind::File { path, what });
                None
            }
        }
    }

    /// One value, or a list of them where the parameter takes one.
    fn choices(&mut self, value: &Value<'_>, parameter: &Parameter) -> Vec<&'static str> {
        let list = value.get_ref().as_array().filter(|_| parameter.takes_list);
        let Some(list) = list else {
            let expected = match parameter.takes_list {
                true => "a string or a list of strings",
                false => "a string",
            };
            return Vec::from_iter(self.choice(value, parameter, expected));
        };
        if list.is_empty() {
            self.wrong_type(value, "at least one string");
        }
        let mut values = Vec::new();
        for value in list {
            let choice = self.choice(value, parameter, "a string");
            values.extend(choice.filter(|choice| !values.contains(choice)));
        }
        values
    }

    fn choice(
        &mut self,
        value: &Value<'_>,
        parameter: &Parameter,
        expected: &'static str,
    ) -> Option<&'static str> {
        let Some(name) = value.get_ref().as_str() else {
            self.wrong_type(value, expected);
            return None;
        };
        let choice = parameter.values.iter().find(|known| **known == name);
        if choice.is_none() {
            let what = match parameter.name {
                ON_VIOLATION => "action",
                other => other,
            };
            self.unknown(value.span(), what, name, parameter.values);
        }
        choice.copied()
    }

    fn table<'t, 'i>(&mut self, value: &'t Value<'i>) -> Option<&'t DeTable<'i>> {
        let table = value.get_ref().as_table();
        if table.is_none() {
            self.wrong_type(value, "a table");
        }
        table
    }

    fn only(&mut self, table: &DeTable<'_>, what: &'static str, known: &[&'static str]) {
        for key in table.keys() {
            let name = key.get_ref().as_ref();
            if !known.contains(&name) {
                self.unknown(key.span(), what, name, known);
            }
        }
    }

    fn unknown(
        &mut self,
        span: Range<usize>,
        what: &'static str,
        name: &str,
        known: &[&'static str],
    ) {
        let kind = RecipeFaultKind::Unknown {
            what,
            name: name.escape_debug().to_string(),
            known: known.to_vec(),
        };
        self.fault(span, kind);
    }

    fn wrong_type(&mut self, value: &Value<'_>, expected: &'static str) {
        let found = value.get_ref().type_str();
        let vowel = found.starts_with(['a', 'e', 'i', 'o', 'u']);
        let found = format!("{} {found}", if vowel { "an" } else { "a" });
        self.fault(value.span(), RecipeFaultKind::Type { expected, found });
    }
}

/// The text of a file that a recipe names, or what is wrong with it.
fn read_text(path: &Path) -> Result<String, String> {
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    let read = file.take(MAX_FILE + 1).read_to_end(&mut bytes);
    read.map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("larger than {MAX_FILE} bytes"));
    }
    String::from_utf8(bytes).map_err(|_| "not UTF-8".to_owned())
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "schema = {SCHEMA}")?;
        for pass in &self.named {
            writeln!(f, "\n[pass.{pass}]")?;
            if let Some(file) = self.files.get(pass) {
                // Names of files may hold anything, ends of lines too.
                let name = toml::Value::from(file.name.as_str());
                writeln!(f, "{} = {name}", file.key)?;
            }
            for (key, value) in self.set.iter().filter(|((of, _), _)| of == pass) {
                let (_, parameter) = key;
                match self.instead.get(key) {
                    None => writeln!(f, "{parameter} = \"{value}\"")?,
                    Some(instead) => {
                        let all = std::iter::once(value).chain(instead);
                        let all: Vec<String> = all.map(|one| format!("\"{one}\"")).collect();
                        writeln!(f, "{parameter} = [{}]", all.join(", "))?;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_RECIPE, Recipe};
    use crate::passes::{self, FORWARD_CFI, RETURN_CFI};
    use penumbra_bundle::ViolationAction;

    fn said(src: impl AsRef<[u8]>) -> String {
        match Recipe::parse("r.toml", src.as_ref()) {
            Ok(recipe) => recipe.to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_pass_does_what_its_recipe_says_and_kills_otherwise() {
        let src = "schema = 1\n\n[pass.return-cfi]\non-violation = \"log\"\n";
        let recipe = Recipe::parse("r.toml", src.as_bytes()).unwrap();
        assert_eq!(recipe.on_violation(RETURN_CFI), ViolationAction::Log);
        assert_eq!(recipe.on_violation(FORWARD_CFI), ViolationAction::Kill);
        assert_eq!(recipe.to_string(), src);
    }

    #[test]
    fn of_a_list_each_value_is_a_choice_and_the_first_ones_come_first() {
        let src = "schema = 1\n\n[pass.forward-cfi]\npolicy = [\"typed\", \"address-taken\"]\n\n\
                   [pass.return-cfi]\npolicy = [\"function\", \"return-sites\"]\n";
        let recipe = Recipe::parse("r.toml", src.as_bytes()).unwrap();
        assert_eq!(recipe.to_string(), src);
        let choices = recipe.choices();
        let policies = choices.iter().map(|choice| {
            let has = (passes::is_typed(choice), passes::is_per_function(choice));
            (has, recipe.given_up(choice))
        });
        let no_function = "return-cfi: policy `return-sites` instead of `function`".to_owned();
        let no_types = "forward-cfi: policy `address-taken` instead of `typed`".to_owned();
        assert_eq!(
            policies.collect::<Vec<_>>(),
            [
                ((true, true), vec![]),
                ((true, false), vec![no_function.clone()]),
                ((false, true), vec![no_types.clone()]),
                ((false, false), vec![no_types, no_function]),
            ]
        );
        assert_eq!(Recipe::default().choices(), [Recipe::default()]);
    }

    #[test]
    fn a_pass_that_is_off_by_default_is_named_to_run() {
        let src = "schema = 1\n\n[pass.zero-regs]\n";
        let recipe = Recipe::parse("r.toml", src.as_bytes()).unwrap();
        assert!(recipe.names("zero-regs") && !recipe.names(RETURN_CFI));
        assert_eq!(recipe.to_string(), src);
        assert!(!Recipe::default().names("zero-regs"));
    }

    #[test]
    fn the_documented_example_is_a_recipe() {
        let doc = include_str!("recipe.rs").lines();
        let example: Vec<&str> = doc
            .skip_while(|line| *line != "//! ```toml")
            .skip(1)
            .map_while(|line| line.strip_prefix("//!").filter(|line| *line != " ```"))
            .map(str::trim_start)
            .collect();
        let recipe = Recipe::parse("doc", example.join("\n").as_bytes()).unwrap();
        assert_eq!(recipe.on_violation(FORWARD_CFI), ViolationAction::Panic);
    }

    #[test]
    fn each_mistake_is_named_with_its_place() {
        for (src, expected) in [
            (
                "",
                "r.toml:1:1: the recipe has no `schema`; write `schema = 1`, the version of this format",
            ),
            (
                "schema = 2\n[pass.x]\n",
                "r.toml:1:10: this version reads schema 1 only; use a newer hardener, or write the recipe as schema 1",
            ),
            (
                "schema = \"1\"\n",
                "r.toml:1:10: expected an integer, found a string",
            ),
            (
                "schema = 1\npasses = 3\n",
                "r.toml:2:1: unknown key `passes`; did you mean `pass`?",
            ),
            (
                "schema = 1\n[pass.retrun-cfi]\n",
                "r.toml:2:7: unknown pass `retrun-cfi`; did you mean `return-cfi`?",
            ),
            (
                "schema = 1\n[pass.return-cfi]\non-violation = \"ignore\"\n",
                "r.toml:3:16: unknown action `ignore`; there are: kill, log, panic",
            ),
            (
                "schema = 1\n[pass.return-cfi]\non-violation = 1\n[pass.forward-cfi]\nwhen = 1\n",
                "r.toml:3:16: expected a string, found an integer\n\
                 r.toml:5:1: unknown parameter `when`; there are: on-violation, policy",
            ),
            (
                "schema = 1\n[pass.no-rethunk]\non-violation = \"log\"\n",
                "r.toml:3:1: unknown parameter `on-violation`; there is none",
            ),
            (
                "schema = 1\n[pass.forward-cfi]\npolicy = \"type\"\n",
                "r.toml:3:10: unknown policy `type`; did you mean `typed`?",
            ),
            (
                "schema = 1\n[pass.return-cfi]\npolicy = []\n",
                "r.toml:3:10: expected at least one string, found an array",
            ),
            (
                "schema = 1\n[pass.return-cfi]\npolicy = [\"function\", 1]\n",
                "r.toml:3:23: expected a string, found an integer",
            ),
            (
                "schema = 1\n[pass.return-cfi]\npolicy = 1\n",
                "r.toml:3:10: expected a string or a list of strings, found an integer",
            ),
            (
                "schema = 1\n[pass.return-cfi]\non-violation = [\"log\"]\n",
                "r.toml:3:16: expected a string, found an array",
            ),
            (
                "schema = 1\n[pass.return-cfi]\npolicy = \"functions\"\n",
                "r.toml:3:10: unknown policy `functions`; did you mean `function`?",
            ),
            (
                "schema = 1\npass = 1\n",
                "r.toml:2:8: expected a table, found an integer",
            ),
        ] {
            assert_eq!(said(src), expected, "{src}");
        }
        assert!(said("schema = 1\n[pass").starts_with("r.toml:2:"));
        assert_eq!(
            said(b"schema = 1\n# \xff"),
            "r.toml:2:3: not UTF-8, as TOML must be"
        );
        let long = "#".repeat(MAX_RECIPE as usize + 1);
        assert!(said(long).contains("larger than"));
    }
}
