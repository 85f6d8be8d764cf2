//! Symbolic execution of thunks: what each path needs, changes, and decides.
//!
//! Registers, flags, stack words and the checked address are symbols. Every path from a thunk's entry to its exits is
//! followed; a branch splits the subjects (values of the checked address) into those that go either way where that is a
//! set of intervals, and is kept as a condition to be evaluated for each subject where it is not (a table look-up).

pub mod calls;
pub mod exits;
pub mod interval;
pub mod machine;
pub mod memo;
pub mod term;
pub mod tree;

#[cfg(test)]
mod before_tests;
#[cfg(test)]
mod bytes_tests;
#[cfg(test)]
mod tests;
mod words;
