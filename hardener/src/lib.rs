//! Rewrites a distribution kernel's text into variants, from the image as the distribution ships it.
//!
//! Data flows one way: [`image`] (unpacked, its tables read) to [`text`] (swept, slots and caves found) to [`passes`] (slot
//! edits) with [`thunks`] (what the edits call) to a bundle ([`emit`]), which [`report`] prints and [`check`] verifies afresh.
//! A [`recipe`] says what the passes do; some come as [`presets`].
#![forbid(unsafe_code)]

pub mod check;
pub mod cli;
pub mod emit;
pub mod exit;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod image;
mod layout;
pub mod modules;
pub mod passes;
pub mod presets;
pub mod profile;
pub mod recipe;
pub mod report;
pub mod text;
pub mod thunks;
pub mod types;
