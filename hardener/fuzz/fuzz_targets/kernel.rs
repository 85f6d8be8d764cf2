//! A kernel as it is unpacked, through the emitter's readers and the checker's.
#![no_main]

use hardener::fuzzing;
use hardener_fuzz::{memory, seen};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: memory(64), |data: &[u8]| {
    seen("the emitter", fuzzing::kernel(data));
    seen("the checker", fuzzing::check::kernel(data));
});
