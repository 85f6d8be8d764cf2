//! Reads a recipe's TOML: every fault of the file, each with its place.

use super::{
    File, ON_VIOLATION, Parameter, Recipe, RecipeError, RecipeFault, RecipeFaultKind, SCHEMA,
};
use crate::passes::{self, FileParameter};
use std::io::Read as _;
use std::ops::Range;
use std::path::Path;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The largest recipe, in bytes.
pub(super) const MAX_RECIPE: u64 = 1 << 20;
/// The largest file that a recipe names, in bytes.
const MAX_FILE: u64 = 1 << 26;
/// Nobody reads more of what is wrong with one file.
const MAX_FAULTS: usize = 50;

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
        if reader.faults.is_empty() && recipe.choices().is_empty() {
            let at = src
                .find(BY_CLASS)
                .map_or(0..0, |at| at..at + BY_CLASS.len());
            reader.fault(at, RecipeFaultKind::NoClasses);
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
}

/// The policy of returns that needs one of branches, as it is written.
const BY_CLASS: &str = "\"class\"";

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
