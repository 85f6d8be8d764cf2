//! Symbols of a stripped kernel, through both readers.
#![no_main]

use hardener::fuzzing;
use hardener_fuzz::{memory, seen};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: memory(64), |data: &[u8]| {
    seen("the emitter", fuzzing::kallsyms(data));
    seen("the checker", fuzzing::check::kallsyms(data));
});
