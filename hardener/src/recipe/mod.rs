//! A recipe: what the passes do, in TOML. Without one every pass does its default.
//!
//! ```toml
//! schema = 1
//!
//! [pass.return-cfi]
//! on-violation = "log"     # kill (the default), log or panic
//! policy = ["class", "function", "return-sites"]   # or one of them alone; return-sites is the default
//!
//! [pass.forward-cfi]
//! on-violation = "panic"
//! policy = "typed"         # address-taken (the default) or typed
//!
//! [pass.zero-regs]         # runs only where it is named, as do stack-clear, stack-depth, promote, debloat and probe
//! ```
//!
//! Of several policies the first is used for which the kernel has room.
//!
//! A pass that works by a file (`[pass.promote]` and `[pass.debloat]`, `profile = "FILE"`) is given its name, from the recipe's folder.
//!
//! All errors of a file are found at once, each with its place.

mod error;
mod read;
#[cfg(test)]
mod tests;

pub use error::{RecipeError, RecipeFault, RecipeFaultKind};

use crate::passes;
use penumbra_bundle::ViolationAction;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// The parameter that says what a thunk does about a value that it does not accept.
pub const ON_VIOLATION: &str = "on-violation";

/// The only schema that this version reads.
const SCHEMA: &str = "1";
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

impl Recipe {
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
        // Without classes of branches there are none of returns.
        choices.retain(|choice| passes::is_typed(choice) || !passes::is_by_class(choice));
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
