//! Type information, through all three readers.
#![no_main]

use hardener::fuzzing;
use hardener_fuzz::{memory, seen};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: memory(64), |data: &[u8]| {
    seen("the emitter", fuzzing::btf(data));
    seen("the emitter's analysis of types", fuzzing::types(data));
    seen("the checker", fuzzing::check::btf(data));
});
