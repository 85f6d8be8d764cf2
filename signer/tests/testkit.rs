//! Cases in files: `testkit/<area>/<fault>/case.toml` says what is wrong and what signer must say about it.
//!
//! `testkit/make` wrote them without signer, with signatures by openssl. `BLESS=1 cargo test -p signer --test testkit`
//! writes the expected messages anew; read the difference before it is committed.
#![allow(missing_docs, reason = "a test")]

use signer::statement::{BUNDLE_V1, Statement};
use signer::verify::read_envelope;
use signer::{Trust, VerifyError, verify_bundle, verify_policy};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

struct Case {
    folder: PathBuf,
    table: toml::Table,
}

impl Case {
    fn text(&self, key: &str) -> &str {
        self.table[key].as_str().unwrap()
    }

    fn trust(&self) -> Result<Trust, String> {
        let files = self.table["trust"].as_array().unwrap().iter();
        let files: Vec<_> = files
            .map(|file| self.folder.join(file.as_str().unwrap()))
            .collect();
        let threshold = self.table["threshold"].as_integer().unwrap();
        let threshold = usize::try_from(threshold).unwrap();
        Trust::from_pem_files(&files, threshold).map_err(|error| error.to_string())
    }

    /// What signer says: "ok" or its message; and the error's code when it is one of verification.
    fn run(&self) -> (String, Option<&'static str>) {
        let trust = match self.trust() {
            Ok(trust) => trust,
            Err(message) => return (message, None),
        };
        let said = |result: Result<(), VerifyError>| match result {
            Ok(()) => ("ok".to_owned(), None),
            Err(error) => (error.to_string(), Some(error.code())),
        };
        match self.text("verify") {
            "bundle" => {
                let dir = self.folder.join("bundle");
                said(verify_bundle(&dir, &trust).map(|bundle| {
                    assert_eq!(bundle.keyids.len(), trust.threshold());
                    for (name, bytes) in bundle.files {
                        assert_eq!(bytes, fs::read(dir.join(name)).unwrap());
                    }
                }))
            }
            "policy" => {
                let file = self.folder.join("policy.toml");
                said(verify_policy(&file, &trust).map(|policy| {
                    assert_eq!(policy.bytes, fs::read(&file).unwrap());
                }))
            }
            "trust" => ("ok".to_owned(), None),
            other => panic!("{other}"),
        }
    }
}

fn cases() -> Vec<Case> {
    let entries = |dir: &Path| {
        let entries = fs::read_dir(dir).unwrap();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.is_dir());
        paths.sort();
        paths
    };
    let areas = entries(Path::new("tests/testkit")).into_iter();
    let folders = areas
        .filter(|area| !area.ends_with("keys"))
        .flat_map(|area| entries(&area));
    let case = |folder: PathBuf| Case {
        table: fs::read_to_string(folder.join("case.toml"))
            .unwrap()
            .parse()
            .unwrap(),
        folder,
    };
    folders.map(case).collect()
}

#[test]
fn testkit() {
    let bless = std::env::var_os("BLESS").is_some();
    let (mut wrong, mut codes, mut accepted) = (Vec::new(), BTreeSet::new(), 0);
    for mut case in cases() {
        let (said, code) = case.run();
        codes.extend(code);
        accepted += usize::from(said == "ok");
        // Messages name files; the case does not depend on where it lies.
        let said = said.replace(&case.folder.display().to_string(), "CASE");
        // Blessing must not turn a refusal into an acceptance.
        let accepts = case.folder.starts_with("tests/testkit/accepted");
        if accepts != (said == "ok") || (!bless && said != case.text("expect")) {
            wrong.push(format!("{}:\n  {said}", case.folder.display()));
        } else if bless {
            case.table.insert("expect".to_owned(), said.into());
            let line = |key: &str| format!("{key} = {}\n", case.table[key]);
            let text: String = ["about", "verify", "trust", "threshold", "expect"]
                .map(line)
                .concat();
            fs::write(case.folder.join("case.toml"), text).unwrap();
        }
    }
    assert!(wrong.is_empty(), "not as expected:\n{}", wrong.join("\n"));
    assert!(accepted >= 10, "{accepted}");
    // `io` needs a file that cannot be read and `too-large` a file of its size: tests/files.rs.
    let all = "digest envelope extra-file missing-file not-named not-regular payload-type statement \
               too-few-signatures unsigned";
    assert_eq!(codes.into_iter().collect::<Vec<_>>().join(" "), all);
}

/// No edit of one byte of an envelope makes signer accept another statement, or panic.
#[test]
fn no_edit_of_an_envelope_changes_what_is_accepted() {
    let folder = Path::new("tests/testkit/accepted/two-of-two");
    let keys =
        ["alice", "bob"].map(|name| PathBuf::from(format!("tests/testkit/keys/{name}.pub.pem")));
    let trust = Trust::from_pem_files(&keys, 2).unwrap();
    let envelope = folder.join("bundle/statement.dsse.json");
    let original = read_envelope(&envelope).unwrap();
    let json = fs::read(&envelope).unwrap();
    let (mut refused, mut accepted) = (0, 0);
    for at in 0..json.len() {
        for byte in *b"\0 \"{}[],:=AZaz09+/-_\\\n\xff" {
            let mut edited = json.clone();
            if edited[at] == byte {
                continue;
            }
            edited[at] = byte;
            match signer::dsse::Envelope::parse(&edited) {
                Ok(edited) if trust.signers(&edited).is_ok() => {
                    // White space and key ids may change; what is signed may not.
                    assert_eq!(edited.pae(), original.pae());
                    accepted += 1;
                }
                _ => refused += 1,
            }
        }
    }
    assert!(
        refused > 5 * accepted && accepted > 0,
        "{refused} refused, {accepted} accepted"
    );
}

/// Statements are parsed only after their signatures held; all the same no edit of one makes signer panic, or take a
/// file name that could leave the bundle.
#[test]
fn edited_statements_never_panic_and_never_name_a_path() {
    let envelope = "tests/testkit/accepted/plain/bundle/statement.dsse.json";
    let payload = read_envelope(Path::new(envelope)).unwrap().payload;
    let (mut refused, mut accepted) = (0, 0);
    for at in 0..payload.len() {
        for byte in *b"\0 \"{}[],:./\\0aZ\n\xff" {
            let mut edited = payload.clone();
            edited[at] = byte;
            match Statement::parse(&edited, BUNDLE_V1) {
                Ok(statement) => {
                    accepted += 1;
                    for name in statement.files.keys() {
                        let path = Path::new(name);
                        assert_eq!(path.components().count(), 1, "{name:?}");
                        assert!(path.file_name().is_some_and(|file| file == name.as_str()));
                    }
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(
        refused > 1000 && accepted > 100,
        "{refused} refused, {accepted} accepted"
    );
}
