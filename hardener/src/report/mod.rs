//! What people and programs are told: progress, what is in a bundle, what stands at an address and why, how two bundles differ,
//! and a bundle in figures and pictures.

mod cave;
mod diff;
mod explain;
mod figures;
mod listing;
mod place;
mod progress;
mod summary;

pub use diff::{Difference, diff};
pub use explain::{ExplainError, Explanation, explain};
pub use figures::{Report, report};
pub use progress::Progress;
pub use summary::Summary;

/// JSON for programs, ended by a newline.
fn json(value: &impl serde::Serialize) -> String {
    let mut text =
        serde_json::to_string_pretty(value).expect("plain data with string keys encodes");
    text.push('\n');
    text
}
