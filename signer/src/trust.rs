//! Which keys count, and how many of them must have signed.

use crate::dsse::Envelope;
use crate::keys::{KeyError, PublicKey};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a trust set cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrustError {
    /// A key file cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// No key at all.
    #[error("no trusted key was given; name the signers' public keys with --trust NAME.pub.pem")]
    NoKeys,
    /// A threshold that nothing or everything meets.
    #[error(
        "threshold {threshold}, but {keys} distinct trusted key(s) given; choose 1 to {keys}, or trust more keys"
    )]
    Threshold {
        /// What was asked for.
        threshold: usize,
        /// How many distinct keys there are.
        keys: usize,
    },
}

/// A set of distinct public keys and how many of them must have signed.
#[derive(Clone, Debug)]
pub struct Trust {
    /// The keys, each once, in the order given, with the first file that held it.
    keys: Vec<(PublicKey, PathBuf)>,
    threshold: usize,
}

/// Too few of the trusted keys have signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooFew {
    /// Distinct trusted keys that have signed.
    pub signed: usize,
    /// Signatures in the envelope, of whatever kind.
    pub signatures: usize,
}

impl Trust {
    /// Reads public keys. Two files with the same key are one key.
    pub fn from_pem_files(files: &[PathBuf], threshold: usize) -> Result<Trust, TrustError> {
        if files.is_empty() {
            return Err(TrustError::NoKeys);
        }
        let mut keys: Vec<(PublicKey, PathBuf)> = Vec::new();
        for file in files {
            let key = PublicKey::read(file)?;
            if !keys.iter().any(|(other, _)| *other == key) {
                keys.push((key, file.clone()));
            }
        }
        if threshold == 0 || threshold > keys.len() {
            return Err(TrustError::Threshold {
                threshold,
                keys: keys.len(),
            });
        }
        Ok(Trust { keys, threshold })
    }

    /// How many distinct keys must have signed.
    pub fn threshold(&self) -> usize {
        self.threshold
    }

    /// The trusted keys, each with the file that it came from.
    pub fn keys(&self) -> impl Iterator<Item = (PublicKey, &Path)> {
        self.keys.iter().map(|(key, file)| (*key, file.as_path()))
    }

    /// The trusted keys that signed `envelope`; an error when they are fewer than the threshold.
    ///
    /// The only place where a threshold is decided. DSSE protocol, "(t, n)-ENVELOPE": what counts are distinct keys, so
    /// a key that signed twice, or under two key ids, is one. Key ids are not looked at: they are not signed.
    pub fn signers(&self, envelope: &Envelope) -> Result<Vec<PublicKey>, TooFew> {
        let message = envelope.pae();
        let signed_by = |key: &PublicKey| {
            let mut signatures = envelope.signatures.iter();
            signatures.any(|signature| key.verifies(&message, &signature.sig))
        };
        let keys = self.keys.iter().map(|(key, _)| *key);
        let signers: Vec<_> = keys.filter(signed_by).collect();
        if signers.len() < self.threshold {
            return Err(TooFew {
                signed: signers.len(),
                signatures: envelope.signatures.len(),
            });
        }
        Ok(signers)
    }
}
