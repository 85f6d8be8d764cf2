//! Attests what Penumbra maps: a bundle or a policy is signed by an envelope that names every file's SHA-256.
//!
//! | module | is |
//! |---|---|
//! | [`keys`] | Ed25519 keys in the files that openssl reads too |
//! | [`trust`] | which keys count, how many are needed, and the one place where that is decided |
//! | [`dsse`] | the envelope: what is signed, byte for byte |
//! | [`statement`] | the in-toto Statement inside it |
//! | [`mod@sign`], [`verify`] | the two operations on bundle directories and policy files |
//! | `files` | bounded reading that follows no links, writing that is whole or not at all |
//! | [`cli`], [`exit`] | the command line and its exit codes |
//!
//! Nothing here touches the network or the clock. What a verification returns are the bytes that were verified: whoever
//! uses them never opens the files again, so nobody can swap them in between.
#![forbid(unsafe_code)]

pub mod cli;
pub mod dsse;
pub mod exit;
mod files;
pub mod keys;
pub mod sign;
pub mod statement;
pub mod trust;
pub mod verify;

pub use files::FileError;
pub use keys::{KeyError, PublicKey, SigningKey};
pub use sign::{SignError, sign};
pub use trust::{Trust, TrustError};
pub use verify::{VerifiedBundle, VerifiedPolicy, VerifyError, verify_bundle, verify_policy};

/// `bytes` in lower-case hexadecimal.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of `bytes` (FIPS 180-4), in lower-case hexadecimal.
fn sha256_hex(bytes: &[u8]) -> String {
    hex(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref())
}
