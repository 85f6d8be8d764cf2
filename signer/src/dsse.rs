//! The envelope: DSSE v1 (Dead Simple Signing Envelope, protocol.md and envelope.md).

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig, general_purpose};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The payload type of in-toto Statements (in-toto attestation framework, "Envelope").
pub const IN_TOTO: &str = "application/vnd.in-toto+json";
/// The most signatures that an envelope may carry: each costs a verification by each trusted key.
pub const MAX_SIGNATURES: usize = 64;

/// Why bytes are no envelope.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EnvelopeError {
    /// Not the JSON that envelope.md describes.
    #[error("no DSSE envelope: {0}")]
    Json(#[from] serde_json::Error),
    /// A field that should be base64.
    #[error("no DSSE envelope: {field} is not base64: {source}")]
    Base64 {
        /// Which one.
        field: String,
        /// What is wrong with it.
        source: base64::DecodeError,
    },
    /// More signatures than anybody needs.
    #[error("{0} signatures in one envelope, at most {MAX_SIGNATURES} are read")]
    TooManySignatures(usize),
}

/// An envelope. Nothing in it is trusted before [`crate::Trust::signers`] says who signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The payload's exact bytes.
    pub payload: Vec<u8>,
    /// What the payload is; signed together with it.
    pub payload_type: String,
    /// The signatures.
    pub signatures: Vec<Signature>,
}

/// One signature of an envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// An unsigned hint at the key.
    pub keyid: Option<String>,
    /// The signature's bytes.
    pub sig: Vec<u8>,
}

/// The JSON of an envelope. Unknown fields are ignored, as envelope.md asks; a field that is there twice is an error.
#[derive(Serialize, Deserialize)]
#[serde(expecting = "an object with payload, payloadType and signatures")]
struct Wire {
    payload: String,
    #[serde(rename = "payloadType")]
    payload_type: String,
    signatures: Vec<WireSignature>,
}

#[derive(Serialize, Deserialize)]
#[serde(expecting = "an object with keyid and sig")]
struct WireSignature {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    keyid: Option<String>,
    sig: String,
}

impl Envelope {
    /// Reads an envelope from its JSON.
    pub fn parse(json: &[u8]) -> Result<Envelope, EnvelopeError> {
        let wire: Wire = serde_json::from_slice(json)?;
        if wire.signatures.len() > MAX_SIGNATURES {
            return Err(EnvelopeError::TooManySignatures(wire.signatures.len()));
        }
        let signatures = wire.signatures.into_iter().enumerate();
        let signatures = signatures.map(|(index, signature)| {
            Ok(Signature {
                keyid: signature.keyid,
                sig: decode(&signature.sig, || format!("signature {}", index + 1))?,
            })
        });
        Ok(Envelope {
            payload: decode(&wire.payload, || "the payload".to_owned())?,
            payload_type: wire.payload_type,
            signatures: signatures.collect::<Result<_, EnvelopeError>>()?,
        })
    }

    /// The envelope's JSON, one line.
    pub fn to_json(&self) -> Vec<u8> {
        let encode = |bytes: &[u8]| general_purpose::STANDARD.encode(bytes);
        let signatures = self.signatures.iter().map(|signature| WireSignature {
            keyid: signature.keyid.clone(),
            sig: encode(&signature.sig),
        });
        let wire = Wire {
            payload: encode(&self.payload),
            payload_type: self.payload_type.clone(),
            signatures: signatures.collect(),
        };
        let mut json = serde_json::to_vec(&wire).expect("strings always serialise");
        json.push(b'\n');
        json
    }

    /// What is signed.
    pub fn pae(&self) -> Vec<u8> {
        pae(&self.payload_type, &self.payload)
    }
}

/// PAE(type, body), the bytes that are signed (protocol.md, "Signature Definition"):
/// `"DSSEv1" SP LEN(type) SP type SP LEN(body) SP body`, lengths in bytes, in decimal.
pub fn pae(payload_type: &str, body: &[u8]) -> Vec<u8> {
    let (type_len, body_len) = (payload_type.len(), body.len());
    let head = format!("DSSEv1 {type_len} {payload_type} {body_len} ");
    [head.as_bytes(), body].concat()
}

/// envelope.md: "Either standard or URL-safe encoding is allowed". Signers leave the padding of the latter away or not.
fn decode(text: &str, field: impl FnOnce() -> String) -> Result<Vec<u8>, EnvelopeError> {
    const LENIENT: GeneralPurposeConfig =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
    const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);
    let url_safe = text.bytes().any(|byte| byte == b'-' || byte == b'_');
    let engine = if url_safe { &URL_SAFE } else { &STANDARD };
    engine.decode(text).map_err(|source| EnvelopeError::Base64 {
        field: field(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// protocol.md, "Test Vectors".
    #[test]
    fn pae_of_the_specification() {
        let bytes = pae("http://example.com/HelloWorld", b"hello world");
        assert_eq!(
            bytes,
            b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        );
    }

    /// LEN counts bytes: two for each of these letters.
    #[test]
    fn pae_counts_bytes() {
        assert_eq!(
            pae("\u{e9}", "\u{e9}".as_bytes()),
            "DSSEv1 2 \u{e9} 2 \u{e9}".as_bytes()
        );
        assert_eq!(pae("", b""), b"DSSEv1 0  0 ");
    }

    /// The envelope of the same test vectors. Its key is of ECDSA (P-256), which only this test knows.
    #[test]
    fn envelope_of_the_specification() {
        let json = br#"{"payload": "aGVsbG8gd29ybGQ=",
            "payloadType": "http://example.com/HelloWorld",
            "signatures": [{"sig": "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="}]}"#;
        let envelope = Envelope::parse(json).unwrap();
        assert_eq!(envelope.payload, b"hello world");
        assert_eq!(envelope.signatures[0].keyid, None);
        let key = [
            "04",
            "67cd390f77aa359cb08c2235f652270493a9ed832b0abcc01f70954c0390d238",
            "0c782bd54e269125a44f4433aff1432ce94e12bca73aa67ac80cea12608ddf74",
        ]
        .concat();
        let key: Vec<u8> = (0..key.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&key[at..at + 2], 16).unwrap())
            .collect();
        ring::signature::UnparsedPublicKey::new(&ring::signature::ECDSA_P256_SHA256_FIXED, key)
            .verify(&envelope.pae(), &envelope.signatures[0].sig)
            .unwrap();
        assert_eq!(Envelope::parse(&envelope.to_json()).unwrap(), envelope);
    }
}
