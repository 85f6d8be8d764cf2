//! The trust policy: which process of a guest runs on which variant of the kernel's text.
//!
//! A policy is a TOML file. It has a default view and rules; all rules are looked at, and **the strictest view among
//! those that match wins**, so their order means nothing. `hardened` is stricter than `stock`, `stock` than `fast`. What
//! is not known about a process never makes it faster: see [`Policy::decide`].
//!
//! ```toml
//! schema  = 1
//! name    = "payroll"
//! version = 1
//!
//! [default]
//! view = "hardened"
//!
//! [modules]
//! unknown = "refuse"                           # while a module stays on its own text nobody is faster; or "report"
//!
//! [[rule]]
//! id     = "payroll-fast"
//! reason = "reviewed by the kernel team"       # every rule for `fast` says why
//! view   = "fast"
//! match  = { exe = "/usr/bin/payroll" }        # keys AND, list values OR; exe: `*` in a segment, `**` across
//! unless = { uid = [65534] }
//!
//! [[test]]
//! name    = "a shell is hardened"
//! process = { exe = "/bin/sh" }
//! expect  = { view = "hardened", rule = "default" }
//! ```
//!
//! | module | is |
//! |---|---|
//! | `diagnostic` | what is wrong, where, and what to do; drawn as rustc draws it |
//! | `parse`, `fields` | TOML to [`Policy`], all errors at once |
//! | `glob` | path patterns |
//! | `decide` | process to view |
//! | `check` | a policy file with its own tests, for `installer policy check` |
#![forbid(unsafe_code)]

mod check;
mod decide;
mod diagnostic;
mod fields;
mod glob;
mod parse;

pub use check::{TestResult, check_bytes, check_file};
pub use decide::{Condition, DEFAULT_RULE, Decision, Policy, Process, Rule, Test, View};
pub use diagnostic::{Diagnostic, Severity, render};
pub use glob::{Glob, GlobError};
