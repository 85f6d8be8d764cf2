//! What is wrong with a recipe, and where.

use super::read::MAX_RECIPE;
use std::io;
use std::path::PathBuf;
use thiserror::Error;

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
    /// Returns by the classes of branches that are not typed.
    #[error(
        "policy `class` goes by the classes of branches; give forward-cfi the policy `typed`, or returns `function`"
    )]
    NoClasses,
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
