//! What people and programs are told: progress, and what is in a bundle.

mod progress;
mod summary;

pub use progress::Progress;
pub use summary::Summary;
