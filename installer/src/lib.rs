//! The part of Penumbra that runs in dom0: it verifies a bundle and a policy, explains the guest's running text, builds
//! one Xen view per variant and binds each process's address space to the view that the policy names.
//!
//! | module | does | trusts |
//! |---|---|---|
//! | [`xen`] | talks to Xen; the only place with `unsafe` | Xen and its libraries |
//! | [`guest`] | reads the guest's memory: page tables, kernel, processes, text | nothing that it reads |
//! | [`views`] | builds, enables, verifies and removes views; keeps the journal | the verified bundle |
//! | [`watch`] | keeps bindings equal to what the policy says | the verified policy |
//! | [`audit`] | the audit log: who was bound to what, what was stopped | |
//! | [`control`] | command lines, tables, JSON, messages | |
//!
//! Data flows one way: verified bundle + guest -> explained text -> pages -> views -> bindings. Two rules hold
//! everywhere: the installer never pauses the guest, and every step is in the journal before it is taken.
#![deny(unsafe_code)]

pub mod audit;
pub mod control;
pub mod exit;
pub mod guest;
pub mod views;
pub mod watch;
#[allow(unsafe_code)]
pub mod xen;
