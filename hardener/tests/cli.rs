//! The command line as it prints: `tests/cmd/*.toml`.

#[test]
fn what_is_printed() {
    trycmd::TestCases::new().case("tests/cmd/*.toml");
}
