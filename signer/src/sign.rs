//! Signing: a bundle directory or a policy file gets an envelope, or one more signature in the envelope it has.

use crate::dsse::{Envelope, IN_TOTO, Signature};
use crate::files::{self, Directory, FileError, MAX_BUNDLE, MAX_POLICY};
use crate::keys::SigningKey;
use crate::statement::{MAX_SUBJECTS, Statement, StatementError, check_name};
use crate::verify::{
    ENVELOPE, MANIFEST, VerifyError, bundle_names, envelope_of_policy, read_envelope,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why something cannot be signed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SignError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A directory that is no bundle.
    #[error("{}: no bundle ({detail}); emit one with `hardener emit`", path.display())]
    NotABundle {
        /// The directory or its manifest.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A file that is no policy, perhaps a key.
    #[error("{}: neither a bundle directory nor a policy file, whose name ends in .toml", .0.display())]
    NotAPolicy(PathBuf),
    /// A name that a statement cannot carry.
    #[error("{}: {source}; rename it", path.display())]
    Name {
        /// The file.
        path: PathBuf,
        /// What is wrong with its name.
        source: StatementError,
    },
    /// More files than a statement may name.
    #[error("{}: {count} files, a statement names at most {MAX_SUBJECTS}", path.display())]
    TooMany {
        /// The directory.
        path: PathBuf,
        /// How many.
        count: usize,
    },
    /// The envelope that is there cannot be read.
    #[error("the envelope that is there: {0}")]
    Envelope(#[from] VerifyError),
    /// The envelope that is there is over something else.
    #[error("{}: its signatures are over other contents: the files have changed since, or another program signed; \
        pass --replace to drop those signatures and start anew", .0.display())]
    OtherPayload(PathBuf),
}

/// What signing did.
#[derive(Clone, Debug)]
pub struct Signed {
    /// The envelope's file.
    pub envelope: PathBuf,
    /// The signing key's id.
    pub keyid: String,
    /// Signatures in the envelope now.
    pub signatures: usize,
    /// False when this key's signature was there already.
    pub added: bool,
}

/// Signs `path`, a bundle directory or a policy file, with `key`.
///
/// The envelope goes to `output`, else to where [`crate::verify_bundle`] and [`crate::verify_policy`] look. An envelope
/// over the very same payload is added to; one over another payload is an error unless `replace`.
pub fn sign(
    path: &Path,
    key: &SigningKey,
    output: Option<&Path>,
    replace: bool,
) -> Result<Signed, SignError> {
    let (statement, usual) = if path.is_dir() {
        (state_bundle(path)?, path.join(ENVELOPE))
    } else {
        (state_policy(path)?, envelope_of_policy(path))
    };
    let target = output.unwrap_or(&usual);
    let payload = statement.to_json();
    let mut envelope = match read_envelope(target) {
        Err(VerifyError::Unsigned(_)) => new_envelope(payload),
        // What cannot be read cannot be added to, but it can be replaced.
        Err(VerifyError::Envelope { .. }) if replace => new_envelope(payload),
        Err(error) => return Err(error.into()),
        // A second signer signs what he has seen himself: the bytes must be the same, not only their meaning.
        Ok(old) if old.payload == payload && old.payload_type == IN_TOTO => old,
        Ok(_) if replace => new_envelope(payload),
        Ok(_) => return Err(SignError::OtherPayload(target.to_owned())),
    };
    let message = envelope.pae();
    let public = key.public();
    let mut signatures = envelope.signatures.iter();
    let added = !signatures.any(|signature| public.verifies(&message, &signature.sig));
    if added {
        envelope.signatures.push(Signature {
            keyid: Some(public.key_id()),
            sig: key.sign(&message),
        });
        files::write(target, &envelope.to_json(), 0o644, true)?;
    }
    Ok(Signed {
        envelope: target.to_owned(),
        keyid: public.key_id(),
        signatures: envelope.signatures.len(),
        added,
    })
}

fn new_envelope(payload: Vec<u8>) -> Envelope {
    Envelope {
        payload,
        payload_type: IN_TOTO.to_owned(),
        signatures: Vec::new(),
    }
}

fn state_bundle(dir: &Path) -> Result<Statement, SignError> {
    let not_a_bundle = |path: &Path, detail: String| SignError::NotABundle {
        path: path.to_owned(),
        detail,
    };
    let directory = Directory::open(dir)?;
    let names = bundle_names(&directory)?;
    if names.len() > MAX_SUBJECTS {
        return Err(SignError::TooMany {
            path: dir.to_owned(),
            count: names.len(),
        });
    }
    if !names.iter().any(|name| name == MANIFEST) {
        return Err(not_a_bundle(dir, format!("there is no {MANIFEST} in it")));
    }
    let mut files = BTreeMap::new();
    let mut budget = MAX_BUNDLE;
    for name in names {
        check_name(&name).map_err(|source| SignError::Name {
            path: dir.join(&name),
            source,
        })?;
        let bytes = directory.read(&name, budget)?;
        budget -= bytes.len() as u64;
        files.insert(name, bytes);
    }
    let manifest = serde_json::from_slice(&files[MANIFEST])
        .map_err(|error| not_a_bundle(&dir.join(MANIFEST), error.to_string()))?;
    Ok(Statement::of_bundle(&files, &manifest))
}

fn state_policy(file: &Path) -> Result<Statement, SignError> {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    if !name.ends_with(".toml") {
        return Err(SignError::NotAPolicy(file.to_owned()));
    }
    check_name(&name).map_err(|source| SignError::Name {
        path: file.to_owned(),
        source,
    })?;
    Ok(Statement::of_policy(&name, &files::read(file, MAX_POLICY)?))
}
