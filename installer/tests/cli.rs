//! The command line word for word, on a machine without Xen: what it says and how it ends.

#[test]
fn command_lines() {
    // Nothing here may touch a real journal, whatever machine runs it.
    trycmd::TestCases::new()
        .env("PENUMBRA_RUN", "/nonexistent/penumbra")
        .case("tests/cmd/*.trycmd");
}
