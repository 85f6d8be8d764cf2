//! The in-toto Statement v1: which files are meant, by SHA-256, and what is claimed about them.
//!
//! Two claims exist (`predicateType`): a bundle, whose predicate repeats what its manifest says of the kernel and names
//! the variants, for readers and tools that look at statements only; and a policy.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use thiserror::Error;

/// `_type` of every statement (in-toto attestation framework v1, "Statement").
pub const STATEMENT_V1: &str = "https://in-toto.io/Statement/v1";
/// `predicateType` of a bundle's statement.
pub const BUNDLE_V1: &str = "urn:penumbra:bundle:v1";
/// `predicateType` of a policy's statement.
pub const POLICY_V1: &str = "urn:penumbra:policy:v1";
/// The most files that a statement may name.
pub const MAX_SUBJECTS: usize = 256;
/// The longest file name.
const MAX_NAME: usize = 128;

/// Why a payload is no statement that can be acted on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StatementError {
    /// Not the JSON of a statement.
    #[error("no in-toto statement: {0}")]
    Json(#[from] serde_json::Error),
    /// Another version or another thing.
    #[error("_type is {0:?}, this version reads {STATEMENT_V1:?}")]
    Type(String),
    /// A claim about something else: signed for another purpose.
    #[error("predicateType is {found:?}, not {wanted:?}: this was signed for another purpose")]
    Predicate {
        /// What the statement claims.
        found: String,
        /// What was asked for.
        wanted: &'static str,
    },
    /// No file, or too many.
    #[error("names {0} files; it must be 1 to {MAX_SUBJECTS}")]
    Count(usize),
    /// A name that could leave the directory or hide in it.
    #[error(
        "file name {0:?} is not plain: letters, digits, `.`, `-`, `_`, no leading dot, at most {MAX_NAME} bytes"
    )]
    Name(String),
    /// The same name twice, perhaps with two digests.
    #[error("names {0:?} twice")]
    Duplicate(String),
    /// Not 64 lower-case hexadecimal digits.
    #[error("sha256 of {0:?} is not 64 lower-case hexadecimal digits")]
    Digest(String),
}

/// A statement whose names, digests and type have been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Statement {
    /// SHA-256 in hexadecimal by file name.
    pub files: BTreeMap<String, String>,
    /// What is claimed.
    pub predicate_type: String,
    /// The claim.
    pub predicate: Value,
}

/// The JSON of a statement. Unknown fields are ignored, as the framework's parsing rules ask.
#[derive(Serialize, Deserialize)]
#[serde(expecting = "an object with _type, subject, predicateType and predicate")]
struct Wire {
    #[serde(rename = "_type")]
    type_: String,
    subject: Vec<Subject>,
    #[serde(rename = "predicateType")]
    predicate_type: String,
    #[serde(default)]
    predicate: Value,
}

#[derive(Serialize, Deserialize)]
#[serde(expecting = "an object with name and digest")]
struct Subject {
    name: String,
    digest: Digest,
}

/// Other algorithms may stand beside SHA-256; they are not looked at.
#[derive(Serialize, Deserialize)]
#[serde(expecting = "an object with sha256")]
struct Digest {
    sha256: String,
}

impl Statement {
    /// The statement about a bundle of `files` (bytes by name) with this `manifest`.
    pub fn of_bundle(files: &BTreeMap<String, Vec<u8>>, manifest: &Value) -> Statement {
        let name = |variant: &Value| match variant {
            Value::String(name) => Some(json!(name)),
            variant => variant.get("name").cloned(),
        };
        let mut predicate = serde_json::Map::new();
        if let Some(kernel) = manifest.get("kernel") {
            predicate.insert("kernel".to_owned(), kernel.clone());
        }
        if let Some(Value::Array(variants)) = manifest.get("variants") {
            predicate.insert(
                "variants".to_owned(),
                variants.iter().filter_map(name).collect(),
            );
        }
        Statement {
            files: digests(files),
            predicate_type: BUNDLE_V1.to_owned(),
            predicate: predicate.into(),
        }
    }

    /// The statement about the policy file called `name`.
    pub fn of_policy(name: &str, bytes: &[u8]) -> Statement {
        Statement {
            files: BTreeMap::from([(name.to_owned(), crate::sha256_hex(bytes))]),
            predicate_type: POLICY_V1.to_owned(),
            // in-toto's own library refuses an empty predicate.
            predicate: json!({ "format": "toml" }),
        }
    }

    /// Reads a statement that claims `wanted`. Only for bytes whose signatures have been verified.
    pub fn parse(payload: &[u8], wanted: &'static str) -> Result<Statement, StatementError> {
        let wire: Wire = serde_json::from_slice(payload)?;
        if wire.type_ != STATEMENT_V1 {
            return Err(StatementError::Type(wire.type_));
        }
        if wire.predicate_type != wanted {
            return Err(StatementError::Predicate {
                found: wire.predicate_type,
                wanted,
            });
        }
        if !(1..=MAX_SUBJECTS).contains(&wire.subject.len()) {
            return Err(StatementError::Count(wire.subject.len()));
        }
        let mut files = BTreeMap::new();
        for Subject { name, digest } in wire.subject {
            check_name(&name)?;
            let hexadecimal = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            if digest.sha256.len() != 64 || !digest.sha256.bytes().all(hexadecimal) {
                return Err(StatementError::Digest(name));
            }
            if files.contains_key(&name) {
                return Err(StatementError::Duplicate(name));
            }
            files.insert(name, digest.sha256);
        }
        Ok(Statement {
            files,
            predicate_type: wire.predicate_type,
            predicate: wire.predicate,
        })
    }

    /// The payload's bytes: the same statement always gives the same.
    pub fn to_json(&self) -> Vec<u8> {
        let subject = self.files.iter().map(|(name, sha256)| Subject {
            name: name.clone(),
            digest: Digest {
                sha256: sha256.clone(),
            },
        });
        let wire = Wire {
            type_: STATEMENT_V1.to_owned(),
            subject: subject.collect(),
            predicate_type: self.predicate_type.clone(),
            predicate: self.predicate.clone(),
        };
        serde_json::to_vec(&wire).expect("strings and JSON values always serialise")
    }
}

/// Refuses a name that is not one plain path component.
pub(crate) fn check_name(name: &str) -> Result<(), StatementError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || !name.bytes().all(plain)
    {
        // Escaped and cut: a hostile name ends up in an error message.
        return Err(StatementError::Name(name.chars().take(MAX_NAME).collect()));
    }
    Ok(())
}

fn digests(files: &BTreeMap<String, Vec<u8>>) -> BTreeMap<String, String> {
    let digest = |(name, bytes): (&String, &Vec<u8>)| (name.clone(), crate::sha256_hex(bytes));
    files.iter().map(digest).collect()
}
