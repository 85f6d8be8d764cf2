//! Keeps Xen's bindings equal to what the policy says of the processes that run.
//!
//! Only processes whose view is not the default are bound. In each pass bindings are dropped before any is made. What a
//! process is is read again right after it was bound, so that one that turned into another in between is unbound at once.
//!
//! Limit: the guest's processes are polled. One that exits keeps its binding until the next pass, and its page-table
//! root may be used by another process meanwhile; it is then on that view for at most one poll interval.
//! If the watcher is killed with SIGKILL, bindings stay until the next `apply` or `remove`.

pub mod pins;
pub mod storm;
#[cfg(test)]
mod tests;

use crate::guest::processes::Identity;
use crate::guest::{Process, ProcessList};
use crate::views::State;
use crate::xen::{Action, Binding, Errno, Hypervisor, Root, ViewId, XenError};
use penumbra_policy::{Decision, Policy};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// What the policy says of one process.
pub fn decide(policy: &Policy, process: &Process) -> Decision {
    policy.decide(&penumbra_policy::Process {
        exe: process.identity.exe.clone(),
        uid: process.identity.uid.map(|(real, _)| real),
    })
}

/// How strict a view is; unknown names are strictest, so that they win.
fn strictness(view: &str) -> usize {
    // View::ALL is strictest first.
    penumbra_policy::View::ALL
        .iter()
        .position(|known| known.name() == view)
        .map_or(usize::MAX, |index| usize::MAX - 1 - index)
}

/// What one root should be bound to, and because of whom.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// The view's name.
    pub view: String,
    /// All processes that use the root (vfork and CLONE_VM share one), by process id.
    pub who: Vec<Process>,
}

/// The views of all roots that are in use. Of several processes on one root the strictest view counts.
pub fn wanted(policy: &Policy, list: &ProcessList) -> BTreeMap<Root, Wanted> {
    let mut roots: BTreeMap<Root, Wanted> = BTreeMap::new();
    for process in &list.processes {
        let view = decide(policy, process).view;
        let entry = roots
            .entry(process.identity.root)
            .or_insert_with(|| Wanted {
                view: view.clone(),
                who: Vec::new(),
            });
        if strictness(&view) > strictness(&entry.view) {
            entry.view = view;
        }
        entry.who.push(process.clone());
        entry.who.sort_by_key(|process| process.identity.pid);
    }
    roots
}

/// What a pass did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Pass {
    /// Roots bound.
    pub bound: usize,
    /// Roots unbound.
    pub unbound: usize,
    /// What could not be read or bound.
    pub trouble: Vec<String>,
}

/// The watcher's memory between passes.
#[derive(Debug, Default)]
pub struct Watcher {
    /// Who a binding was made for.
    made_for: HashMap<Root, Vec<Identity>>,
}

impl Watcher {
    /// One pass: reads `list` into bindings. `pins` says which roots a storm has for itself.
    pub fn pass(
        &mut self,
        hypervisor: &dyn Hypervisor,
        state: &State,
        policy: &Policy,
        list: &ProcessList,
        is_still: &dyn Fn(&Process) -> bool,
        is_pinned: &dyn Fn(Root) -> bool,
    ) -> Result<Pass, XenError> {
        let mut pass = Pass {
            trouble: list.trouble.clone(),
            ..Pass::default()
        };
        let mut wanted = wanted(policy, list);
        // The default needs no binding, and poking_mm's is Xen's own.
        wanted.retain(|root, want| want.view != state.default && *root != state.poking_root);
        let mut there: HashMap<Root, ViewId> = HashMap::new();
        for (root, view, _) in hypervisor.bindings()? {
            if root == state.poking_root || is_pinned(root) {
                continue;
            }
            let rightful = wanted.get(&root).is_some_and(|want| {
                self.made_for.get(&root) == Some(&identities(want))
                    && state.view(&want.view) == Some(view)
            });
            if rightful {
                there.insert(root, view);
            } else {
                clear(hypervisor, root)?;
                pass.unbound += 1;
            }
        }
        self.made_for.retain(|root, _| there.contains_key(root));
        for (root, want) in &wanted {
            if there.contains_key(root) || is_pinned(*root) {
                continue;
            }
            let Some(view) = state.view(&want.view) else {
                pass.trouble
                    .push(format!("view `{}` is not in the bundle", want.view));
                continue;
            };
            match hypervisor.binding(Binding::new(Action::Set).root(*root).view(view)) {
                Ok(_) if want.who.iter().all(is_still) => {
                    self.made_for.insert(*root, identities(want));
                    pass.bound += 1;
                }
                Ok(_) => clear(hypervisor, *root)?,
                Err(error) if error.is(Errno::NOSPC) || error.is(Errno::INVAL) => {
                    pass.trouble.push(format!(
                        "{} stays on the default view: {error}",
                        names(want)
                    ))
                }
                Err(error) => return Err(error),
            }
        }
        Ok(pass)
    }
}

fn identities(want: &Wanted) -> Vec<Identity> {
    want.who
        .iter()
        .map(|process| process.identity.clone())
        .collect()
}

fn names(want: &Wanted) -> String {
    let names: Vec<String> = want
        .who
        .iter()
        .map(|process| {
            format!(
                "{} ({})",
                process.comm.escape_default(),
                process.identity.pid
            )
        })
        .collect();
    names.join(", ")
}

/// Unbinds a root; that it is not bound is as good.
pub fn clear(hypervisor: &dyn Hypervisor, root: Root) -> Result<(), XenError> {
    match hypervisor.binding(Binding::new(Action::Clear).root(root)) {
        Ok(_) => Ok(()),
        Err(error) if error.is(Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Drops all bindings but pinned ones and poking_mm's: nobody watches any more, so what is unknown is hardened. Returns how
/// many there were.
pub fn drop_bindings(
    hypervisor: &dyn Hypervisor,
    state: &State,
    journal_dir: &Path,
) -> Result<usize, XenError> {
    let mut dropped = 0;
    for (root, _, _) in hypervisor.bindings()? {
        if root != state.poking_root && !pins::is_pinned(journal_dir, root) {
            clear(hypervisor, root)?;
            dropped += 1;
        }
    }
    Ok(dropped)
}
