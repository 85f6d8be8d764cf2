//! What cannot lie in a repository: pipes, permissions, files that change, files of forbidden sizes and names.
#![allow(missing_docs, reason = "a test")]

use signer::keys::{self, KeyError, PublicKey, SigningKey};
use signer::{SignError, Trust, VerifyError, sign, verify_bundle, verify_policy};
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A fresh folder with a bundle of two files, and a key.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("bundle")).unwrap();
        let bench = Bench { folder };
        fs::write(bench.at("bundle/manifest.json"), MANIFEST).unwrap();
        fs::write(bench.at("bundle/text.bin"), [0x90; 4096]).unwrap();
        fs::write(bench.at("policy.toml"), "schema = 1\n").unwrap();
        keys::new(&bench.at("alice")).unwrap();
        bench
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn sign(&self, path: &str, name: &str, replace: bool) -> Result<bool, SignError> {
        let key = SigningKey::read(&self.at(&format!("{name}.pem"))).unwrap();
        sign(&self.at(path), &key, None, replace).map(|signed| signed.added)
    }

    fn trust(&self, names: &[&str], threshold: usize) -> Trust {
        let file = |name: &&str| self.at(&format!("{name}.pub.pem"));
        Trust::from_pem_files(&names.iter().map(file).collect::<Vec<_>>(), threshold).unwrap()
    }

    fn verify(&self) -> Result<(), VerifyError> {
        verify_bundle(&self.at("bundle"), &self.trust(&["alice"], 1)).map(drop)
    }
}

const MANIFEST: &str = r#"{"schema": "penumbra.bundle/v1", "kernel": {"build_id": "00ff", "release": "6.1"},
    "variants": [{"name": "stock", "passes": []}, {"name": "fast"}]}"#;

fn mkfifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn sign_and_verify() {
    let bench = Bench::new();
    assert!(bench.sign("bundle", "alice", false).unwrap());
    let trust = bench.trust(&["alice"], 1);
    let bundle = verify_bundle(&bench.at("bundle"), &trust).unwrap();
    assert_eq!(bundle.files["text.bin"], [0x90; 4096]);
    assert_eq!(bundle.files.len(), 2);
    let alice = PublicKey::read(&bench.at("alice.pub.pem")).unwrap();
    assert_eq!(bundle.keyids, [alice.key_id()]);
    let predicate = r#"{"kernel":{"build_id":"00ff","release":"6.1"},"variants":["stock","fast"]}"#;
    assert_eq!(bundle.statement.predicate.to_string(), predicate);

    bench.sign("policy.toml", "alice", false).unwrap();
    let policy = verify_policy(&bench.at("policy.toml"), &trust).unwrap();
    assert_eq!(policy.bytes, b"schema = 1\n");
    assert_eq!(
        policy.statement.predicate.to_string(),
        r#"{"format":"toml"}"#
    );
}

#[test]
fn a_second_key_adds_its_signature_and_nobody_signs_twice() {
    let bench = Bench::new();
    keys::new(&bench.at("bob")).unwrap();
    assert!(bench.sign("bundle", "alice", false).unwrap());
    assert!(!bench.sign("bundle", "alice", false).unwrap());
    let both = bench.trust(&["alice", "bob"], 2);
    let one = verify_bundle(&bench.at("bundle"), &both).unwrap_err();
    assert_eq!(one.code(), "too-few-signatures");
    assert!(bench.sign("bundle", "bob", false).unwrap());
    assert_eq!(
        verify_bundle(&bench.at("bundle"), &both)
            .unwrap()
            .keyids
            .len(),
        2
    );
}

#[test]
fn signatures_over_other_contents_are_dropped_only_on_request() {
    let bench = Bench::new();
    bench.sign("policy.toml", "alice", false).unwrap();
    fs::write(bench.at("policy.toml"), "schema = 1\n# edited\n").unwrap();
    let before = fs::read(bench.at("policy.toml.dsse.json")).unwrap();
    let refused = bench.sign("policy.toml", "alice", false).unwrap_err();
    assert!(matches!(refused, SignError::OtherPayload(_)), "{refused}");
    assert_eq!(fs::read(bench.at("policy.toml.dsse.json")).unwrap(), before);
    assert!(bench.sign("policy.toml", "alice", true).unwrap());
    verify_policy(&bench.at("policy.toml"), &bench.trust(&["alice"], 1)).unwrap();

    fs::write(bench.at("policy.toml.dsse.json"), "garbage").unwrap();
    let refused = bench.sign("policy.toml", "alice", false).unwrap_err();
    assert!(
        matches!(refused, SignError::Envelope(VerifyError::Envelope { .. })),
        "{refused}"
    );
    assert!(bench.sign("policy.toml", "alice", true).unwrap());
}

#[test]
fn keys_are_private_and_never_overwritten() {
    let bench = Bench::new();
    let (private, public) = (bench.at("alice.pem"), bench.at("alice.pub.pem"));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&private), 0o600);
    let before = (fs::read(&private).unwrap(), fs::read(&public).unwrap());
    for lost in [None, Some(&private), Some(&public)] {
        if let Some(lost) = lost {
            fs::remove_file(lost).unwrap();
        }
        let error = keys::new(&bench.at("alice")).unwrap_err();
        assert!(matches!(error, KeyError::Exists(_)), "{error}");
        // Nothing new is there, no temporary file either.
        let left = fs::read_dir(bench.folder.path()).unwrap().count();
        assert_eq!(left, if lost.is_some() { 3 } else { 4 });
        fs::write(&private, &before.0).unwrap();
        fs::write(&public, &before.1).unwrap();
        fs::set_permissions(&private, Permissions::from_mode(0o600)).unwrap();
    }
    for mode in [0o640, 0o604, 0o660] {
        fs::set_permissions(&private, Permissions::from_mode(mode)).unwrap();
        let error = SigningKey::read(&private).unwrap_err();
        assert!(
            matches!(error, KeyError::Exposed { .. }),
            "{mode:o}: {error}"
        );
    }
}

#[test]
fn private_keys_of_other_kinds() {
    let bench = Bench::new();
    let read = |text: &str| {
        let path = bench.at("other.pem");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        SigningKey::read(&path).unwrap_err().to_string()
    };
    let public = fs::read_to_string(bench.at("alice.pub.pem")).unwrap();
    assert!(read(&public).contains("give the private key beside it"));
    let private = fs::read_to_string(bench.at("alice.pem")).unwrap();
    let encrypted = private.replace("PRIVATE", "ENCRYPTED PRIVATE");
    assert!(read(&encrypted).contains("decrypt it with `openssl pkey"));

    let openssl = Command::new("openssl")
        .args(["genpkey", "-algorithm", "X25519"])
        .output()
        .unwrap();
    let x25519 = String::from_utf8(openssl.stdout).unwrap();
    assert!(read(&x25519).contains("only Ed25519 is used here"));
    assert!(read(&private[..80]).contains("not one PEM block"));
}

/// Would wait for ever if opening a pipe waited for a writer.
#[test]
fn pipes_are_refused() {
    let bench = Bench::new();
    bench.sign("bundle", "alice", false).unwrap();
    fs::remove_file(bench.at("bundle/text.bin")).unwrap();
    mkfifo(&bench.at("bundle/text.bin"));
    let error = bench.verify().unwrap_err();
    assert!(error.to_string().contains("text.bin: is a pipe"), "{error}");

    fs::remove_file(bench.at("bundle/statement.dsse.json")).unwrap();
    mkfifo(&bench.at("bundle/statement.dsse.json"));
    assert_eq!(bench.verify().unwrap_err().code(), "not-regular");
}

#[test]
fn names_in_messages_are_escaped() {
    let bench = Bench::new();
    bench.sign("bundle", "alice", false).unwrap();
    fs::write(bench.at("bundle/\u{1b}[2J"), "").unwrap();
    let error = bench.verify().unwrap_err();
    assert_eq!(error.code(), "extra-file");
    assert!(error.to_string().contains(r"\x1b[2J"), "{error}");
    let error = bench.sign("bundle", "alice", true).unwrap_err();
    assert!(matches!(error, SignError::Name { .. }), "{error}");
}

#[test]
fn sizes_are_bounded() {
    let bench = Bench::new();
    bench.sign("bundle", "alice", false).unwrap();
    // Sparse: takes no room on the disk, and must take none in memory.
    let text = fs::File::options()
        .write(true)
        .open(bench.at("bundle/text.bin"))
        .unwrap();
    text.set_len((512 << 20) + 1).unwrap();
    let error = bench.verify().unwrap_err();
    assert_eq!(error.code(), "too-large", "{error}");
    let envelope = bench.at("bundle/statement.dsse.json");
    fs::write(&envelope, vec![b' '; (1 << 20) + 1]).unwrap();
    assert_eq!(bench.verify().unwrap_err().code(), "too-large");
    fs::write(bench.at("policy.toml"), vec![b'#'; (1 << 20) + 1]).unwrap();
    let trust = bench.trust(&["alice"], 1);
    let error = verify_policy(&bench.at("policy.toml"), &trust).unwrap_err();
    assert_eq!(error.code(), "too-large");
}

#[test]
fn many_entries_are_refused() {
    let bench = Bench::new();
    bench.sign("bundle", "alice", false).unwrap();
    for n in 0..300 {
        fs::write(bench.at(&format!("bundle/f{n}")), "").unwrap();
    }
    let error = bench.verify().unwrap_err().to_string();
    assert!(error.contains("more than 257 entries"), "{error}");
    let error = bench.sign("bundle", "alice", true).unwrap_err().to_string();
    assert!(error.contains("more than 257 entries"), "{error}");
}

/// A link to the bundle is the operator's business; a link inside it is not.
#[test]
fn links_outside_and_inside() {
    let bench = Bench::new();
    bench.sign("bundle", "alice", false).unwrap();
    symlink(bench.at("bundle"), bench.at("current")).unwrap();
    verify_bundle(&bench.at("current"), &bench.trust(&["alice"], 1)).unwrap();
    fs::rename(bench.at("bundle/text.bin"), bench.at("text.bin")).unwrap();
    symlink(bench.at("text.bin"), bench.at("bundle/text.bin")).unwrap();
    assert_eq!(bench.verify().unwrap_err().code(), "not-regular");
    let error = bench.sign("bundle", "alice", true).unwrap_err().to_string();
    assert!(error.contains("is a symbolic link"), "{error}");
}

#[test]
fn what_is_no_bundle_and_no_policy_is_not_signed() {
    let bench = Bench::new();
    for (path, said) in [
        ("alice.pem", "neither a bundle directory nor a policy file"),
        ("nowhere", "neither a bundle directory nor a policy file"),
        ("nowhere.toml", "No such file"),
        (".", "there is no manifest.json in it"),
    ] {
        let error = bench.sign(path, "alice", false).unwrap_err().to_string();
        assert!(error.contains(said), "{path}: {error}");
    }
    fs::write(bench.at("bundle/manifest.json"), "{").unwrap();
    let error = bench
        .sign("bundle", "alice", false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("manifest.json: no bundle"), "{error}");
    fs::write(bench.at("a b.toml"), "").unwrap();
    let error = bench.sign("a b.toml", "alice", false).unwrap_err();
    assert!(matches!(error, SignError::Name { .. }), "{error}");
}
