//! Types of function pointers, from the stripped image: the prototypes that BTF has for functions are followed through each
//! function's values to its indirect branches.
//!
//! | file | what |
//! |---|---|
//! | `btf.rs`, `prototypes.rs`, `layout.rs` | types; prototypes as classes; what stands where in a structure |
//! | `around.rs` | into which structure a pointer points, by all its uses |
//! | `alike.rs`, `functions.rs`, `blocks.rs`, `flow.rs`, `step.rs`, `values.rs` | functions; what their registers hold, as terms over what they were given |
//! | `globals.rs`, `shapes.rs`, `facts.rs`, `hooks.rs`, `lists.rs` | what data is, by its initial values and by what functions do with it |
//! | `votes.rs`, `resolve.rs` | the types of values |
//! | `puts.rs` | where functions' addresses are put, for those of which BTF may have another one's prototype |
//! | `patched.rs` | what calls may reach that the kernel makes direct ones |
//! | `analysis.rs`, `sites.rs` | all of it together: each branch and the entries that it may reach |
//!
//! What it relies on: a pointer that the kernel declares as a pointer to functions of a prototype is called as such. Where
//! a pointer may be to anything (`void *` in a structure, in a union or in one of several structures that are possible), the
//! branch is not typed.

mod alike;
mod analysis;
mod around;
mod blocks;
pub(crate) mod btf;
mod facts;
mod flow;
mod functions;
mod globals;
mod hooks;
mod layout;
mod lists;
mod patched;
mod prototypes;
mod puts;
mod resolve;
mod shapes;
pub mod sites;
mod step;
mod values;
mod votes;

pub use analysis::analyse;
pub use btf::Btf;
pub use prototypes::{ProtoId, Prototypes};
pub use sites::{Class, Forward, Reach, Site};
