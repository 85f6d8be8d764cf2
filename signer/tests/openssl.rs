//! Plain openssl and signer take each other's keys and signatures.
#![allow(missing_docs, reason = "a test")]

use signer::dsse::{Envelope, IN_TOTO, Signature};
use signer::keys::{self, PublicKey, SigningKey};
use signer::verify::read_envelope;
use signer::{Trust, sign, verify_policy};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Runs openssl in `dir`; its standard output, or nothing when it fails.
fn openssl(dir: &Path, args: &str) -> Option<Vec<u8>> {
    let output = Command::new("openssl")
        .args(args.split(' '))
        .current_dir(dir)
        .output()
        .expect("openssl is needed for this test: install the package openssl");
    output.status.success().then_some(output.stdout)
}

#[test]
fn openssl_reads_our_keys() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    keys::new(&dir.join("ours")).unwrap();
    let text = openssl(dir, "pkey -in ours.pem -noout -text").unwrap();
    assert!(
        text.starts_with(b"ED25519 Private-Key"),
        "{}",
        text.escape_ascii()
    );
    let public = fs::read(dir.join("ours.pub.pem")).unwrap();
    assert_eq!(openssl(dir, "pkey -in ours.pem -pubout").unwrap(), public);
    // The key id is what sha256sum says of the DER.
    fs::write(
        dir.join("der"),
        openssl(dir, "pkey -pubin -in ours.pub.pem -outform DER").unwrap(),
    )
    .unwrap();
    let digest = String::from_utf8(openssl(dir, "dgst -sha256 -r der").unwrap()).unwrap();
    let key = PublicKey::read(&dir.join("ours.pub.pem")).unwrap();
    assert_eq!(digest.split(' ').next().unwrap(), key.key_id());
    // And ours is what openssl writes itself: the same DER in the same PEM.
    assert_eq!(
        openssl(dir, "pkey -in ours.pem").unwrap(),
        fs::read(dir.join("ours.pem")).unwrap()
    );
}

#[test]
fn openssl_verifies_our_signature() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    keys::new(&dir.join("ours")).unwrap();
    fs::write(dir.join("p.toml"), "schema = 1\n").unwrap();
    let key = SigningKey::read(&dir.join("ours.pem")).unwrap();
    sign(&dir.join("p.toml"), &key, None, false).unwrap();
    let envelope = read_envelope(&dir.join("p.toml.dsse.json")).unwrap();
    fs::write(dir.join("sig"), &envelope.signatures[0].sig).unwrap();
    let check = "pkeyutl -verify -pubin -inkey ours.pub.pem -rawin -in pae -sigfile sig";
    fs::write(dir.join("pae"), envelope.pae()).unwrap();
    openssl(dir, check).expect("openssl accepts the signature");
    let mut edited = envelope.pae();
    *edited.last_mut().unwrap() ^= 1;
    fs::write(dir.join("pae"), edited).unwrap();
    assert_eq!(openssl(dir, check), None);
}

/// `signer verify --emit-pae` prints commands that do what it says.
#[test]
fn printed_commands_work() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    fs::write(dir.join("p.toml"), "schema = 1\n").unwrap();
    for name in ["alice", "bob"] {
        keys::new(&dir.join(name)).unwrap();
        let key = SigningKey::read(&dir.join(format!("{name}.pem"))).unwrap();
        sign(&dir.join("p.toml"), &key, None, false).unwrap();
    }
    let printed = |trust: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_signer"))
            .args(format!("verify p.toml --trust {trust}.pub.pem --emit-pae out").split(' '))
            .current_dir(dir)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let commands = text
            .lines()
            .filter_map(|line| line.strip_prefix("  openssl "));
        commands.map(str::to_owned).collect::<Vec<_>>()
    };
    for trust in ["alice", "bob"] {
        let commands = printed(trust);
        // The trusted key's own signature holds; the other one, shown with it because nobody trusted made it, does not.
        assert_eq!(commands.len(), 2, "{commands:?}");
        let held = commands
            .iter()
            .filter(|command| openssl(dir, command).is_some());
        assert_eq!(held.count(), 1, "{commands:?}");
    }
    let payload = read_envelope(&dir.join("p.toml.dsse.json"))
        .unwrap()
        .payload;
    assert!(
        fs::read(dir.join("out/statement.pae"))
            .unwrap()
            .ends_with(&payload)
    );
}

#[test]
fn we_read_openssls_keys_and_verify_its_signature() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    openssl(dir, "genpkey -algorithm ed25519 -out theirs.pem").unwrap();
    openssl(dir, "pkey -in theirs.pem -pubout -out theirs.pub.pem").unwrap();
    let public = PublicKey::read(&dir.join("theirs.pub.pem")).unwrap();
    assert_eq!(
        SigningKey::read(&dir.join("theirs.pem")).unwrap().public(),
        public
    );

    // The whole chain without signer: statement, pre-authentication encoding and signature by other hands.
    fs::write(dir.join("p.toml"), "schema = 1\n").unwrap();
    let digest = String::from_utf8(openssl(dir, "dgst -sha256 -r p.toml").unwrap()).unwrap();
    let digest = &digest[..64];
    let payload = format!(
        r#"{{"_type": "https://in-toto.io/Statement/v1", "predicateType": "urn:penumbra:policy:v1",
            "subject": [{{"name": "p.toml", "digest": {{"sha256": "{digest}"}}}}]}}"#
    );
    fs::write(
        dir.join("pae"),
        format!(
            "DSSEv1 {} {IN_TOTO} {} {payload}",
            IN_TOTO.len(),
            payload.len()
        ),
    )
    .unwrap();
    let sig = openssl(dir, "pkeyutl -sign -inkey theirs.pem -rawin -in pae").unwrap();
    let mut envelope = Envelope {
        payload: payload.into_bytes(),
        payload_type: IN_TOTO.to_owned(),
        signatures: vec![Signature { keyid: None, sig }],
    };
    let trust = Trust::from_pem_files(&[dir.join("theirs.pub.pem")], 1).unwrap();
    let verify = |envelope: &Envelope| {
        fs::write(dir.join("p.toml.dsse.json"), envelope.to_json()).unwrap();
        verify_policy(&dir.join("p.toml"), &trust)
    };
    assert_eq!(verify(&envelope).unwrap().keyids, [public.key_id()]);
    envelope.signatures[0].sig[63] ^= 1;
    assert_eq!(verify(&envelope).unwrap_err().code(), "too-few-signatures");
}
