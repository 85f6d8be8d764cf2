//! What the fuzz targets share: a bound on memory, and inputs of several parts.
#![forbid(unsafe_code)]

pub mod files;

use cap::Cap;
use std::alloc::System;
use std::fmt::Debug;
use std::sync::OnceLock;

/// libFuzzer sees allocations only under a sanitizer, which stable Rust has not; this ends a target that asks for too much,
/// though it never touches what it asks for.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Lets the target have so many MiB at once, its corpus aside.
pub fn memory(mib: usize) {
    let limit = ALLOCATOR.allocated() + (mib << 20);
    ALLOCATOR
        .set_limit(limit)
        .expect("it is above what is allocated");
}

/// Splits an input of several files: each behind its length, a little-endian 32-bit word. What is too long ends with the
/// input; parts that are not there are empty.
pub fn parts<const N: usize>(mut input: &[u8]) -> [&[u8]; N] {
    [(); N].map(|()| {
        let Some((length, rest)) = input.split_first_chunk::<4>() else {
            return input;
        };
        let (part, rest) = rest.split_at((u32::from_le_bytes(*length) as usize).min(rest.len()));
        input = rest;
        part
    })
}

/// Takes note of what a reader said. With `PENUMBRA_FUZZ_SEEDS` in the environment it must have taken the input: seeds that
/// are refused at the door lead nowhere.
pub fn seen<T, E: Debug>(reader: &str, said: Result<T, E>) -> Option<T> {
    static SEEDS: OnceLock<bool> = OnceLock::new();
    let seeds = SEEDS.get_or_init(|| std::env::var_os("PENUMBRA_FUZZ_SEEDS").is_some());
    match said {
        Err(error) if *seeds => panic!("{reader} refuses a seed: {error:?}"),
        said => said.ok(),
    }
}
