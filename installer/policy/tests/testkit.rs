//! Policy files and what is said about them: `testkit/NAME.toml` with `testkit/NAME.stderr`, exit code at its end.
//!
//! `BLESS=1 cargo test -p penumbra-policy` writes the expectations anew; read the difference before it is committed.
#![allow(missing_docs, reason = "a test")]

use penumbra_policy::{Policy, Severity, check_file, render};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn policies(dir: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "toml")
    });
    paths.sort();
    assert!(!paths.is_empty(), "no policies in {dir}");
    paths
}

fn check(path: &Path) -> (String, u8) {
    let mut out = Vec::new();
    let code = check_file(path, &mut out).unwrap();
    (String::from_utf8(out).unwrap(), code)
}

#[test]
fn testkit() {
    let bless = std::env::var_os("BLESS").is_some();
    let mut wrong = Vec::new();
    for path in policies("tests/testkit") {
        let (said, code) = check(&path);
        let said = format!("{said}exit {code}\n");
        let expected = path.with_extension("stderr");
        if bless {
            fs::write(&expected, &said).unwrap();
        } else if fs::read_to_string(&expected).unwrap_or_default() != said {
            wrong.push(format!("{}:\n{said}", path.display()));
        }
    }
    assert!(
        wrong.is_empty(),
        "not as in the .stderr files:\n{}",
        wrong.join("\n")
    );
}

/// Every code that the sources can say is said in the testkit.
#[test]
fn every_code_has_a_case() {
    let codes = |text: &str| -> BTreeSet<String> {
        let starts = text.match_indices('P').map(|(at, _)| &text[at..]);
        let codes = starts.filter_map(|text| text.get(..4));
        let code = |text: &&str| text[1..].bytes().all(|b| b.is_ascii_digit());
        codes.filter(code).map(str::to_owned).collect()
    };
    let sources = ["fields", "parse", "check"].map(|name| format!("src/{name}.rs"));
    let sources = sources
        .map(|path| fs::read_to_string(path).unwrap())
        .concat();
    let quoted = codes(&sources);
    let said: String = policies("tests/testkit")
        .iter()
        .map(|path| fs::read_to_string(path.with_extension("stderr")).unwrap())
        .collect();
    assert!(quoted.len() > 10, "{quoted:?}");
    assert_eq!(quoted, codes(&said));
}

/// The policies that are shipped are sound, and their own tests pass.
#[test]
fn shipped_policies() {
    for path in policies("../../policies") {
        let (said, code) = check(&path);
        assert_eq!(code, 0, "{said}");
        assert!(!said.contains("warning"), "{said}");
        let policy = Policy::parse_bytes("p", &fs::read(&path).unwrap()).unwrap();
        assert!(policy.tests.len() >= 2, "{} tests nothing", path.display());
    }
}

/// The example in the crate's documentation is a policy.
#[test]
fn documented_example() {
    let doc = fs::read_to_string("src/lib.rs").unwrap();
    let lines = doc.lines().filter_map(|line| line.strip_prefix("//! "));
    let from = lines.skip_while(|line| *line != "```toml").skip(1);
    let example: Vec<_> = from.take_while(|line| *line != "```").collect();
    let policy = Policy::parse("lib.rs", &example.join("\n")).unwrap();
    assert!(policy.run_tests().iter().all(|result| result.passed));
    assert_eq!(policy.tests.len(), 1);
}

/// Every prefix of a policy, and every policy with one byte changed, is read or refused in good order, and can be drawn.
#[test]
fn damaged_policies_never_panic() {
    let (mut refused, mut read) = (0, 0);
    for path in policies("tests/testkit") {
        let bytes = fs::read(&path).unwrap();
        let mut damaged: Vec<Vec<u8>> = (0..bytes.len()).map(|len| bytes[..len].to_vec()).collect();
        for at in 0..bytes.len() {
            for byte in *b"\0\"[}=\n\xff" {
                let mut bytes = bytes.clone();
                bytes[at] = byte;
                damaged.push(bytes);
            }
        }
        for bytes in damaged {
            match Policy::parse_bytes("p", &bytes) {
                Ok(_) => read += 1,
                Err(found) => {
                    refused += 1;
                    if refused % 50 == 0 {
                        assert!(!render(&String::from_utf8_lossy(&bytes), &found).is_empty());
                    }
                }
            }
        }
    }
    assert!(
        refused > 5_000 && read > 500,
        "{refused} refused, {read} read"
    );
}

/// Files made to keep a reader busy: as many findings as fit, in many lines and in one.
#[test]
fn hostile_sizes_are_refused_in_good_order() {
    let head = "schema = 1\nname = \"t\"\nversion = 1\n";
    let rule = "[[rule]]\nid = \"a\"\nreason = \"r\"\nview = \"fast\"\nmatch = ";
    let many = |item: &str| item.repeat(300_000 / item.len());
    for (what, body) in [
        (
            "unknown keys",
            (0..30_000).map(|n| format!("k{n} = 1\n")).collect(),
        ),
        (
            "bad values in one line",
            format!("{rule}{{ uid = [{}] }}\n", many("\"x\", ")),
        ),
        // Warnings alone, so many that an error after them is not among the findings that are kept.
        (
            "warnings before an error",
            format!(
                "{rule}{{ exe = [{}] }}\n[[rule]]\nid = \"b\"\n",
                many("\"/tmp/x\", ")
            ),
        ),
        (
            "warnings only",
            format!("{rule}{{ exe = [{}] }}\n", many("\"/tmp/x\", ")),
        ),
        ("brackets", many("[[")),
        ("quotes", many("\"\"\"")),
        ("errors", many("= \n")),
        ("rules", many("[[rule]]\n")),
    ] {
        let src = format!("{head}{body}");
        let found = Policy::parse("p", &src).expect_err(what);
        assert!(
            !found.is_empty() && found.len() <= 201,
            "{what}: {}",
            found.len()
        );
        assert!(
            found.iter().any(|found| found.severity == Severity::Error),
            "{what}"
        );
        assert!(render(&src, &found).len() < 1 << 20, "{what}");
    }
    let large = format!("{head}{}", "#".repeat(1 << 20));
    assert!(
        Policy::parse("p", &large).unwrap_err()[0]
            .message
            .contains("larger than")
    );
}
