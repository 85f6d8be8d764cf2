//! Breaks on purpose, so that the harness is known to see it: behind four bytes that only a search led by coverage finds, by
//! an overflow, a panic, or memory that it never touches.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::hint::black_box;

fuzz_target!(init: hardener_fuzz::memory(64), |data: &[u8]| {
    for (byte, wanted) in data.iter().zip(b"FUZZ") {
        if *byte != *wanted {
            return;
        }
    }
    match data.get(4) {
        Some(b'p') => panic!("as it should"),
        Some(b'm') => drop(black_box(Vec::<u8>::with_capacity(black_box(1 << 32)))),
        Some(more) => drop(black_box(black_box(255u8) + more)),
        None => {}
    }
});
