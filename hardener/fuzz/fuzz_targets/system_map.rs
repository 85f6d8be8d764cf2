//! A `System.map`, through both readers.
#![no_main]

use hardener::fuzzing;
use hardener_fuzz::{memory, seen};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: memory(64), |data: &[u8]| {
    seen("the emitter", fuzzing::system_map(data));
    seen("the checker", fuzzing::check::system_map(data));
});
