//! A module and the types of its kernel, through the emitter's loader and the checker's.
#![no_main]

use hardener::fuzzing;
use hardener_fuzz::{memory, parts, seen};
use libfuzzer_sys::fuzz_target;

// A module's memories have 64 MiB together at most, and the checker loads a module twice.
fuzz_target!(init: memory(512), |data: &[u8]| {
    let [types, file] = parts(data);
    seen("the emitter", fuzzing::module(types, file));
    seen("the checker", fuzzing::check::module(types, file));
});
