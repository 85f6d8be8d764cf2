//! The container and its compressed payload, and packed modules.
#![no_main]

use hardener::image::{unpacked, unpacked_module};
use hardener_fuzz::{memory, seen};
use libfuzzer_sys::fuzz_target;

// The largest kernel that is unpacked has 256 MiB; its buffer doubles as it grows.
fuzz_target!(init: memory(800), |data: &[u8]| {
    let kernel = unpacked(data.to_vec());
    // A module is packed without a container; a kernel's stream has more behind it.
    let _ = unpacked_module(data.to_vec());
    seen("unpacking", kernel);
});
