//! The guest's loaded modules: found, recognised by build-id, their text explained.

mod explain;
mod list;

pub use explain::{Known, Verdict, examine};
pub use list::{Loaded, ModuleList, ModuleReader, ModuleState};
