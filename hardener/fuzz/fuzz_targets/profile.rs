//! Profiles: read twice in a row they say everything twice, so a line of the same text parses alone.
#![no_main]

use hardener::profile::Branches;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: hardener_fuzz::memory(64), |data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match Branches::parse(text) {
        Ok(_) => assert!(text.lines().all(|line| Branches::parse(line).is_ok())),
        Err(why) => {
            let number = why.strip_prefix("line ").and_then(|rest| rest.split(' ').next());
            let number: usize = number.expect("the line's number").parse().expect("a number");
            let line = text.lines().nth(number - 1).expect("a line of the text");
            assert!(Branches::parse(line).is_err(), "{why}");
        }
    }
});
