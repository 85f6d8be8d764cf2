//! Verification: signatures first, then the statement, then every file. What comes back are the verified bytes.

use crate::dsse::{Envelope, EnvelopeError, IN_TOTO};
use crate::files::{self, Directory, FileError, MAX_BUNDLE, MAX_ENVELOPE, MAX_POLICY};
use crate::statement::{BUNDLE_V1, MAX_SUBJECTS, POLICY_V1, Statement, StatementError};
use crate::trust::Trust;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The envelope's name in a bundle directory.
pub const ENVELOPE: &str = "statement.dsse.json";
/// The file that every bundle has.
pub const MANIFEST: &str = "manifest.json";

/// Why something is not verified.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is no envelope.
    #[error("{}: not there, so nothing is signed; sign with `signer sign`, or copy the envelope along with what it signs", .0.display())]
    Unsigned(PathBuf),
    /// The envelope is damaged.
    #[error("{}: {source}; fetch it again or sign again", path.display())]
    Envelope {
        /// The envelope's file.
        path: PathBuf,
        /// What is wrong.
        source: EnvelopeError,
    },
    /// The envelope holds something else.
    #[error("{}: payloadType is {found:?}, not {IN_TOTO:?}; this envelope is not the signer's", path.display())]
    PayloadType {
        /// The envelope's file.
        path: PathBuf,
        /// What it says it holds.
        found: String,
    },
    /// Too few trusted keys have signed exactly this.
    #[error("{}: signed by {signed} of {trusted} trusted key(s), {threshold} needed ({signatures} signature(s) in the envelope); \
        it was edited after signing, or signed with other keys: compare `signer key show` with who signed, or have it signed again",
        path.display())]
    TooFew {
        /// The envelope's file.
        path: PathBuf,
        /// Distinct trusted keys that signed.
        signed: usize,
        /// Trusted keys.
        trusted: usize,
        /// How many are needed.
        threshold: usize,
        /// Signatures of whatever kind.
        signatures: usize,
    },
    /// What was signed is no statement for this.
    #[error("{}: the signed statement: {source}; have it signed again by this version of signer", path.display())]
    Statement {
        /// The envelope's file.
        path: PathBuf,
        /// What is wrong.
        source: StatementError,
    },
    /// The statement is about other files.
    #[error("{}: the signed statement is about {named}, not about {wanted}; \
        put the files under the names they were signed under, or have them signed again", path.display())]
    NotNamed {
        /// The envelope's file.
        path: PathBuf,
        /// What it should name.
        wanted: String,
        /// What it names.
        named: String,
    },
    /// A signed file is missing.
    #[error("{}: missing, but signed; copy the bundle again", .0.display())]
    Missing(PathBuf),
    /// A file that nobody signed.
    #[error("{}: not signed; remove it, or emit and sign the bundle again", .0.display())]
    Extra(PathBuf),
    /// A file is not the one that was signed.
    #[error("{}: SHA-256 is {found}, signed is {signed}; the file was changed after signing", path.display())]
    Digest {
        /// The file.
        path: PathBuf,
        /// Its digest.
        found: String,
        /// The signed one.
        signed: String,
    },
}

impl VerifyError {
    /// A stable name for scripts.
    pub fn code(&self) -> &'static str {
        match self {
            VerifyError::File(FileError::NotRegular { .. }) => "not-regular",
            VerifyError::File(FileError::TooLarge { .. }) => "too-large",
            VerifyError::File(FileError::Io { .. }) => "io",
            VerifyError::Unsigned(_) => "unsigned",
            VerifyError::Envelope { .. } => "envelope",
            VerifyError::PayloadType { .. } => "payload-type",
            VerifyError::TooFew { .. } => "too-few-signatures",
            VerifyError::Statement { .. } => "statement",
            VerifyError::NotNamed { .. } => "not-named",
            VerifyError::Missing(_) => "missing-file",
            VerifyError::Extra(_) => "extra-file",
            VerifyError::Digest { .. } => "digest",
        }
    }
}

/// A bundle whose every byte is signed.
#[derive(Clone, Debug)]
pub struct VerifiedBundle {
    /// The bytes of every file by name, as they were hashed. Use these; do not read the files again.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Key ids of the trusted keys that signed.
    pub keyids: Vec<String>,
    /// What was signed.
    pub statement: Statement,
}

/// A policy whose every byte is signed.
#[derive(Clone, Debug)]
pub struct VerifiedPolicy {
    /// The policy's bytes, as they were hashed. Use these; do not read the file again.
    pub bytes: Vec<u8>,
    /// Key ids of the trusted keys that signed.
    pub keyids: Vec<String>,
    /// What was signed.
    pub statement: Statement,
}

/// Verifies the bundle in the directory `dir` by the envelope in it.
pub fn verify_bundle(dir: &Path, trust: &Trust) -> Result<VerifiedBundle, VerifyError> {
    verify_bundle_with(dir, &dir.join(ENVELOPE), trust)
}

/// Verifies the bundle in the directory `dir` by the envelope in the file `envelope`.
pub fn verify_bundle_with(
    dir: &Path,
    envelope: &Path,
    trust: &Trust,
) -> Result<VerifiedBundle, VerifyError> {
    let directory = Directory::open(dir)?;
    let (statement, keyids) = verify_envelope(envelope, BUNDLE_V1, trust)?;
    if !statement.files.contains_key(MANIFEST) {
        return Err(not_named(
            envelope,
            "a bundle with a manifest.json",
            &statement,
        ));
    }
    // Every file that is there must be signed, and every signed file must be there.
    for name in bundle_names(&directory)? {
        if !statement.files.contains_key(&name) {
            return Err(VerifyError::Extra(dir.join(name)));
        }
    }
    let mut files = BTreeMap::new();
    let mut budget = MAX_BUNDLE;
    for (name, signed) in &statement.files {
        let bytes = directory.read(name, budget).map_err(|error| {
            if error.is_not_found() {
                VerifyError::Missing(dir.join(name))
            } else {
                error.into()
            }
        })?;
        budget -= bytes.len() as u64;
        check_digest(&dir.join(name), &bytes, signed)?;
        files.insert(name.clone(), bytes);
    }
    Ok(VerifiedBundle {
        files,
        keyids,
        statement,
    })
}

/// Verifies a policy file by the envelope beside it, `FILE.dsse.json`.
pub fn verify_policy(file: &Path, trust: &Trust) -> Result<VerifiedPolicy, VerifyError> {
    verify_policy_with(file, &envelope_of_policy(file), trust)
}

/// Verifies a policy file by the envelope in the file `envelope`.
pub fn verify_policy_with(
    file: &Path,
    envelope: &Path,
    trust: &Trust,
) -> Result<VerifiedPolicy, VerifyError> {
    let bytes = files::read(file, MAX_POLICY)?;
    let (statement, keyids) = verify_envelope(envelope, POLICY_V1, trust)?;
    // The name is held to as well: another signed policy, copied over this one, is not this one.
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    match statement.files.get(&*name) {
        Some(signed) if statement.files.len() == 1 => check_digest(file, &bytes, signed)?,
        _ => return Err(not_named(envelope, &format!("{name:?} alone"), &statement)),
    }
    Ok(VerifiedPolicy {
        bytes,
        keyids,
        statement,
    })
}

/// Where the envelope of a policy file stands unless said otherwise.
pub fn envelope_of_policy(file: &Path) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(".dsse.json");
    path.into()
}

/// Reads an envelope file without deciding anything about it.
pub fn read_envelope(path: &Path) -> Result<Envelope, VerifyError> {
    let json = files::read(path, MAX_ENVELOPE).map_err(|error| {
        if error.is_not_found() {
            VerifyError::Unsigned(path.to_owned())
        } else {
            error.into()
        }
    })?;
    Envelope::parse(&json).map_err(|source| VerifyError::Envelope {
        path: path.to_owned(),
        source,
    })
}

/// The names of a bundle's files as they are in the directory: all but the envelope.
pub(crate) fn bundle_names(directory: &Directory) -> Result<Vec<String>, FileError> {
    let mut names = directory.names(MAX_SUBJECTS + 1)?;
    names.retain(|name| name != ENVELOPE);
    Ok(names)
}

/// The statement in an envelope that enough trusted keys have signed, and their key ids.
///
/// The order is DSSE's (protocol.md, "Protocol"): signatures, then the payload's type, and only then is the statement
/// parsed, from the very bytes whose signatures held.
fn verify_envelope(
    path: &Path,
    predicate_type: &'static str,
    trust: &Trust,
) -> Result<(Statement, Vec<String>), VerifyError> {
    let envelope = read_envelope(path)?;
    let signers = trust
        .signers(&envelope)
        .map_err(|too_few| VerifyError::TooFew {
            path: path.to_owned(),
            signed: too_few.signed,
            trusted: trust.keys().count(),
            threshold: trust.threshold(),
            signatures: too_few.signatures,
        })?;
    if envelope.payload_type != IN_TOTO {
        return Err(VerifyError::PayloadType {
            path: path.to_owned(),
            found: envelope.payload_type,
        });
    }
    let statement = Statement::parse(&envelope.payload, predicate_type);
    let statement = statement.map_err(|source| VerifyError::Statement {
        path: path.to_owned(),
        source,
    })?;
    Ok((
        statement,
        signers.into_iter().map(|key| key.key_id()).collect(),
    ))
}

fn check_digest(path: &Path, bytes: &[u8], signed: &str) -> Result<(), VerifyError> {
    let found = crate::sha256_hex(bytes);
    if found != signed {
        return Err(VerifyError::Digest {
            path: path.to_owned(),
            found,
            signed: signed.to_owned(),
        });
    }
    Ok(())
}

fn not_named(envelope: &Path, wanted: &str, statement: &Statement) -> VerifyError {
    let mut named: Vec<_> = statement.files.keys().take(4).map(String::as_str).collect();
    if statement.files.len() > named.len() {
        named.push("...");
    }
    VerifyError::NotNamed {
        path: envelope.to_owned(),
        wanted: wanted.to_owned(),
        named: named.join(", "),
    }
}
