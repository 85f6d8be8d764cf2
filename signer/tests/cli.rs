//! The command line, word for word. `TRYCMD=overwrite cargo test -p signer --test cli` writes the output anew.
#![allow(missing_docs, reason = "a test")]

#[test]
fn cli() {
    trycmd::TestCases::new().case("tests/cmd/*.trycmd");
}
