//! SHA-256 of the guest's text as the host view has it.

use crate::guest::text::RunningText;
use crate::guest::{Kernel, ReadError};
use crate::xen::Hypervisor;
use penumbra_bundle::Manifest;
use sha2::{Digest as _, Sha256};

/// The digest of `[text.start, text.end)`, in hexadecimal.
pub fn digest(
    hypervisor: &dyn Hypervisor,
    kernel: &Kernel,
    manifest: &Manifest,
) -> Result<String, ReadError> {
    let text = RunningText::read(hypervisor, kernel, manifest)?;
    Ok(sha256(&text.bytes))
}

/// SHA-256 (FIPS 180-4) in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
