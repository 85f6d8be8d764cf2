//! The guest, read from outside: no agent, no module, no symbol package in it.
//!
//! Everything read here is an allegation of the guest. A guest that lies about its tasks gets the wrong view for its own
//! processes and nothing else: no value from the guest is used as a length, an index or a loop bound without a limit of
//! ours, and every walk ends.

pub mod differences;
pub mod explain;
pub mod forms;
pub mod kernel;
pub mod layout;
pub mod memory;
pub mod modules;
pub mod orc;
pub mod path;
pub mod processes;
pub mod stacks;
pub mod text;
pub mod walk;
pub mod witness;

pub use explain::{Explained, ReturnForm, Slide, Unexplained};
pub use kernel::{FindError, Kernel};
pub use layout::Layout;
pub use memory::{GuestMemory, ReadError};
pub use processes::{Process, ProcessList, Reader};
