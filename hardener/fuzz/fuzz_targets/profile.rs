//! Profiles: one is taken if each of its lines is; a refusal names a line that is none.
#![no_main]

use hardener::profile::Branches;
use hardener_fuzz::{memory, seen};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: memory(64), |data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let read = Branches::parse(text);
    match &read {
        Ok(_) => assert!(text.lines().all(|line| Branches::parse(line).is_ok())),
        Err(why) => {
            let number = why.strip_prefix("line ").and_then(|rest| rest.split(' ').next());
            let number: usize = number.expect("the line's number").parse().expect("a number");
            let line = text.lines().nth(number - 1).expect("a line of the text");
            assert!(Branches::parse(line).is_err(), "{why}");
        }
    }
    seen("the reader", read);
});
