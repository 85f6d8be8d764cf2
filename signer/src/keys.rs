//! Ed25519 keys (RFC 8032) in the files that openssl reads and writes.
//!
//! Private keys are PKCS#8 version 1 (RFC 5208, RFC 8410 section 7). ring's own `generate_pkcs8` writes version 2, which
//! carries the public key along and which openssl 3.0 does not read. Public keys are SPKI (RFC 8410 section 4).

use crate::files::{self, FileError, MAX_KEY};
use ring::rand::SecureRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use std::fmt;
use std::path::{Path, PathBuf};
use thiserror::Error;
use zeroize::Zeroizing;

/// PKCS#8 version 1 of an Ed25519 key, up to its 32-byte seed: version 0, id-Ed25519, OCTET STRING in OCTET STRING.
const PKCS8_V1_PREFIX: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];
/// SPKI of an Ed25519 key, up to its 32 bytes: id-Ed25519, BIT STRING without unused bits.
const SPKI_PREFIX: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];
pub(crate) const PRIVATE_LABEL: &str = "PRIVATE KEY";
const PUBLIC_LABEL: &str = "PUBLIC KEY";

/// Why a key cannot be made, read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A new key would take the place of an old one.
    #[error("{}: exists; a key is never overwritten, choose another name or move it away", .0.display())]
    Exists(PathBuf),
    /// Others could have read the private key.
    #[error("{}: mode {mode:04o} lets others read this private key; run `chmod 600 {}`", path.display(), path.display())]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not PEM as RFC 7468 has it, or not only.
    #[error("{}: not one PEM block and nothing more; make a key with `signer key new`", .0.display())]
    NotPem(PathBuf),
    /// PEM, but of something else.
    #[error("{}: holds a {label:?}, not a {wanted}; {help}", path.display())]
    Label {
        /// The file.
        path: PathBuf,
        /// What it says it holds.
        label: String,
        /// What was asked for.
        wanted: &'static str,
        /// What to do.
        help: &'static str,
    },
    /// A key of another algorithm, or a damaged one.
    #[error("{}: no Ed25519 {kind} ({detail}); only Ed25519 is used here, make one with `signer key new`", path.display())]
    NotEd25519 {
        /// The file.
        path: PathBuf,
        /// Private or public key.
        kind: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// The system gave no random bytes.
    #[error("the system gave no random bytes; no key was made, try again")]
    NoRandomness,
}

/// An Ed25519 public key. Two that are equal are one key, whatever their files or key ids say.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// Reads an SPKI file such as `NAME.pub.pem`.
    pub fn read(path: &Path) -> Result<PublicKey, KeyError> {
        let pem = files::read(path, MAX_KEY)?;
        let (label, der) = decode_pem(path, &pem)?;
        if label != PUBLIC_LABEL {
            let help = match label {
                PRIVATE_LABEL => {
                    "give its .pub.pem, and keep this file from where it is not needed"
                }
                "CERTIFICATE" => "take the key out with `openssl x509 -pubkey -noout`",
                _ => "give a .pub.pem that `signer key new` wrote",
            };
            return Err(wrong_label(path, label, PUBLIC_LABEL, help));
        }
        PublicKey::from_spki(&der).ok_or_else(|| KeyError::NotEd25519 {
            path: path.to_owned(),
            kind: "public key",
            detail: format!("{} bytes of DER that are no Ed25519 SPKI", der.len()),
        })
    }

    fn from_spki(der: &[u8]) -> Option<PublicKey> {
        // DER has one encoding for each value, so comparing bytes is parsing.
        Some(PublicKey(der.strip_prefix(&SPKI_PREFIX)?.try_into().ok()?))
    }

    fn to_spki(self) -> Vec<u8> {
        [&SPKI_PREFIX[..], &self.0].concat()
    }

    /// The SPKI file's contents.
    pub fn to_pem(self) -> String {
        encode_pem(PUBLIC_LABEL, &self.to_spki())
    }

    /// The key id: SHA-256 of the SPKI, in hexadecimal. A hint for readers; nothing is ever decided by it.
    pub fn key_id(self) -> String {
        crate::sha256_hex(&self.to_spki())
    }

    /// Whether `signature` is this key's over `message` (RFC 8032 section 5.1.7).
    pub fn verifies(self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0)
            .verify(message, signature)
            .is_ok()
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", crate::hex(&self.0))
    }
}

/// An Ed25519 private key.
pub struct SigningKey(Ed25519KeyPair);

impl SigningKey {
    /// Reads a PKCS#8 file such as `NAME.pem`; refuses one that others may read.
    pub fn read(path: &Path) -> Result<SigningKey, KeyError> {
        let (pem, mode) = files::read_with_mode(path, MAX_KEY)?;
        let pem = Zeroizing::new(pem);
        let (label, der) = decode_pem(path, &pem)?;
        if label != PRIVATE_LABEL {
            let help = match label {
                PUBLIC_LABEL => "give the private key beside it",
                "ENCRYPTED PRIVATE KEY" => {
                    "decrypt it with `openssl pkey -in FILE -out PLAIN` first"
                }
                _ => "convert it with `openssl pkey -in FILE -out PLAIN`",
            };
            return Err(wrong_label(path, label, PRIVATE_LABEL, help));
        }
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        // `maybe_unchecked`: version 1 has no public key to check against; a version 2 file's is checked.
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der);
        pair.map(SigningKey).map_err(|error| KeyError::NotEd25519 {
            path: path.to_owned(),
            kind: "private key",
            detail: error.to_string(),
        })
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        let bytes = self.0.public_key().as_ref();
        PublicKey(bytes.try_into().expect("ring's Ed25519 keys have 32 bytes"))
    }

    /// Signs `message` (pure Ed25519: no hash before, no context).
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.0.sign(message).as_ref().to_vec()
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey(of {:?})", self.public())
    }
}

/// The two files of a new key.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// The public half.
    pub public: PublicKey,
    /// The private key's file, mode 0600.
    pub private_file: PathBuf,
    /// The public key's file.
    pub public_file: PathBuf,
}

/// Makes a key and writes `NAME.pem` and `NAME.pub.pem`: both or neither, and never over a file that is there.
pub fn new(name: &Path) -> Result<NewKey, KeyError> {
    let with = |suffix: &str| {
        let mut path = name.as_os_str().to_owned();
        path.push(suffix);
        PathBuf::from(path)
    };
    let (private_file, public_file) = (with(".pem"), with(".pub.pem"));
    let mut der = Zeroizing::new([0u8; 48]);
    let (prefix, seed) = der.split_at_mut(PKCS8_V1_PREFIX.len());
    prefix.copy_from_slice(&PKCS8_V1_PREFIX);
    let random = ring::rand::SystemRandom::new();
    random.fill(seed).map_err(|_| KeyError::NoRandomness)?;
    let pair = Ed25519KeyPair::from_seed_unchecked(seed).expect("a seed of 32 bytes");
    let public = SigningKey(pair).public();
    let pem = Zeroizing::new(encode_pem(PRIVATE_LABEL, &*der));

    // The public key goes first: should the private one then fail, what is taken back is no secret.
    create(&public_file, public.to_pem().as_bytes(), 0o644)?;
    if let Err(error) = create(&private_file, pem.as_bytes(), 0o600) {
        // Written a moment ago by us, as a name that was free.
        let _ = std::fs::remove_file(&public_file);
        return Err(error);
    }
    Ok(NewKey {
        public,
        private_file,
        public_file,
    })
}

fn create(path: &Path, bytes: &[u8], mode: u32) -> Result<(), KeyError> {
    files::write(path, bytes, mode, false).map_err(|error| match error {
        FileError::Io { source, .. } if source.kind() == std::io::ErrorKind::AlreadyExists => {
            KeyError::Exists(path.to_owned())
        }
        error => error.into(),
    })
}

fn decode_pem<'a>(path: &Path, pem: &'a [u8]) -> Result<(&'a str, Zeroizing<Vec<u8>>), KeyError> {
    // The crate's own errors say what it stumbled on, which for text that is no PEM at all misleads.
    let decoded = pem_rfc7468::decode_vec(pem);
    let (label, der) = decoded.map_err(|_| KeyError::NotPem(path.to_owned()))?;
    Ok((label, Zeroizing::new(der)))
}

fn encode_pem(label: &'static str, der: &[u8]) -> String {
    pem_rfc7468::encode_string(label, pem_rfc7468::LineEnding::LF, der)
        .expect("keys fit a PEM file")
}

fn wrong_label(path: &Path, label: &str, wanted: &'static str, help: &'static str) -> KeyError {
    KeyError::Label {
        path: path.to_owned(),
        label: label.to_owned(),
        wanted,
        help,
    }
}
