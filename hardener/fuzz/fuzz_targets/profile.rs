//! Profiles of branches and of functions: one is taken if each of its lines is; a refusal names a line that is none.
#![no_main]

use hardener::profile::{Branches, Functions};
use hardener_fuzz::{memory, seen};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: memory(64), |data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let branches = Branches::parse(text);
    agrees(text, &branches, |line| Branches::parse(line).is_ok());
    let functions = Functions::parse(text);
    let empty = |line: &str| line.split('#').next().is_none_or(|line| line.trim().is_empty());
    if !text.lines().all(empty) {
        agrees(text, &functions, |line| empty(line) || Functions::parse(line).is_ok());
    }
    seen("the reader", branches);
});

/// Whether the lines one by one are what all of them are.
fn agrees<T>(text: &str, read: &Result<T, String>, taken: impl Fn(&str) -> bool) {
    match read {
        Ok(_) => assert!(text.lines().all(taken)),
        Err(why) => {
            let number = why
                .strip_prefix("line ")
                .and_then(|rest| rest.split(' ').next());
            let number: usize = number
                .expect("the line's number")
                .parse()
                .expect("a number");
            let line = text.lines().nth(number - 1).expect("a line of the text");
            assert!(!taken(line), "{why}");
        }
    }
}
