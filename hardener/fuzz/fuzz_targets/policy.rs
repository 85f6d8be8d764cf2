//! Trust policies: parsed with their own tests; what is wrong is drawn for a person.
#![no_main]

use hardener_fuzz::{memory, seen};
use libfuzzer_sys::fuzz_target;
use penumbra_policy::{Policy, check_bytes};

fuzz_target!(init: memory(64), |data: &[u8]| {
    let mut said = Vec::new();
    let checked = check_bytes("p", data, &mut said).expect("memory takes all that is written");
    let read = Policy::parse_bytes("p", data);
    match &read {
        Ok(_) => assert!(checked.is_ok() || !said.is_empty()),
        Err(wrong) => assert!(checked.is_err() && !wrong.is_empty() && !said.is_empty()),
    }
    seen("the reader", read);
});
