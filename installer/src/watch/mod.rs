//! Keeps Xen's bindings equal to what the policy says of the processes that run.
//!
//! Only processes whose view is not the default are bound. In each pass bindings are dropped before any is made. A binding
//! to a laxer view than the default carries witnesses (`guest::witness`): Xen itself drops it at the first load of a root
//! whose process ended, ran another program or changed its user, so polling only decides how soon a process gets its
//! view, never how long another one keeps it. Killed, the watcher leaves bindings that lapse in the same way.

pub mod pins;
pub mod run;
#[cfg(test)]
mod run_tests;
pub mod storm;
#[cfg(test)]
mod tests;

use crate::guest::{GuestMemory, Process, ProcessList, witness};
use crate::views::State;
use crate::xen::{Action, Binding, Bound, Errno, Hypervisor, Root, XenError};
use penumbra_policy::{Decision, Policy};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Display;
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
    /// The rule that chose it, if one did.
    pub rule: Option<String>,
    /// All processes that use the root (vfork and CLONE_VM share one), by process id.
    pub who: Vec<Process>,
}

/// The views of all roots that are in use. Of several processes on one root the strictest view counts, and the default
/// among them: each could become another program while the root's binding is held for the other's sake.
pub fn wanted(policy: &Policy, list: &ProcessList, default: &str) -> BTreeMap<Root, Wanted> {
    let mut roots: BTreeMap<Root, Wanted> = BTreeMap::new();
    for process in &list.processes {
        let decision = decide(policy, process);
        let mut new = Wanted {
            view: decision.view,
            rule: Some(decision.rule),
            who: Vec::new(),
        };
        let who = match roots.remove(&process.identity.root) {
            None => Vec::new(),
            Some(old) => {
                if strictness(default) > strictness(&new.view) {
                    (new.view, new.rule) = (default.to_owned(), None);
                }
                if strictness(&old.view) >= strictness(&new.view) {
                    (new.view, new.rule) = (old.view, old.rule);
                }
                old.who
            }
        };
        new.who = who;
        new.who.push(process.clone());
        new.who.sort_by_key(|process| process.identity.pid);
        roots.insert(process.identity.root, new);
    }
    roots
}

/// A process that was bound or unbound.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Change {
    /// Its page-table root.
    pub root: Root,
    /// The view that it was bound to.
    pub view: String,
    /// Process id.
    pub pid: u32,
    /// The name that it gives itself.
    pub comm: String,
    /// Its executable, if believed.
    pub exe: Option<String>,
    /// The rule that chose the view.
    pub rule: Option<String>,
}

/// What a pass did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Pass {
    /// Processes bound.
    pub bound: Vec<Change>,
    /// Processes unbound, with what they had been bound to.
    pub unbound: Vec<Change>,
    /// The same for bindings that Xen dropped because a witness no longer held.
    pub lapsed: Vec<Change>,
    /// What could not be read or bound.
    pub trouble: Vec<String>,
    /// The processes as they were read.
    pub list: ProcessList,
}

/// The watcher's memory between passes.
#[derive(Debug, Default)]
pub struct Watcher {
    /// Who a binding was made for.
    made_for: HashMap<Root, Wanted>,
}

impl Watcher {
    /// One pass: reads the guest's processes into bindings. Roots that a storm has pinned under `journal_dir` are left
    /// alone. While there is `foreign` text in the guest's kernel, a policy that refuses it gives nobody a laxer view than
    /// the default.
    pub fn pass(
        &mut self,
        hypervisor: &dyn Hypervisor,
        state: &State,
        policy: &Policy,
        foreign: bool,
        journal_dir: &Path,
    ) -> Result<Pass, XenError> {
        let memory = state.reader.kernel().memory(hypervisor);
        let list = state.reader.list(&memory);
        let mut wanted = wanted(policy, &list, &state.default);
        let mut pass = Pass {
            trouble: list.trouble.clone(),
            list,
            ..Pass::default()
        };
        let is_pinned = |root| pins::is_pinned(journal_dir, root);
        // The default needs no binding, and poking_mm's is Xen's own.
        wanted.retain(|root, want| want.view != state.default && *root != state.poking_root);
        if foreign && policy.refuses_unknown_modules {
            wanted.retain(|_, want| strictness(&want.view) > strictness(&state.default));
        }
        let mut there: HashSet<Root> = HashSet::new();
        for Bound { root, view, .. } in hypervisor.bindings()? {
            if root == state.poking_root || is_pinned(root) {
                continue;
            }
            let rightful = wanted.get(&root).is_some_and(|want| {
                self.made_for
                    .get(&root)
                    .is_some_and(|made| same(made, want))
                    && state.view(&want.view) == Some(view)
            });
            if rightful {
                there.insert(root);
                continue;
            }
            clear(hypervisor, root)?;
            if let Some(made) = self.made_for.remove(&root) {
                pass.unbound.extend(changes(root, &made));
            }
        }
        // Bound by us and no longer there: Xen dropped it.
        self.made_for.retain(|root, made| {
            let stays = there.contains(root);
            if !stays && !is_pinned(*root) {
                pass.lapsed.extend(changes(*root, made));
            }
            stays
        });
        for (root, want) in wanted {
            if there.contains(&root) || is_pinned(root) {
                continue;
            }
            self.bind(hypervisor, state, &memory, (root, want), &mut pass)?;
        }
        Ok(pass)
    }

    /// Binds one root. Xen compares the witnesses as it binds: a process that became another since it was read is not
    /// bound, and the next pass sees what it is now.
    fn bind(
        &mut self,
        hypervisor: &dyn Hypervisor,
        state: &State,
        memory: &GuestMemory<'_>,
        (root, want): (Root, Wanted),
        pass: &mut Pass,
    ) -> Result<(), XenError> {
        let stays =
            |why: &dyn Display| format!("{} stays on the default view: {why}", names(&want));
        let Some(view) = state.view(&want.view) else {
            pass.trouble
                .push(format!("view `{}` is not in the bundle", want.view));
            return Ok(());
        };
        let witnesses = match (&want.who[..], strictness(&want.view)) {
            // Losing its binding would loosen it, so nothing may take it away but the watcher.
            (_, strict) if strict > strictness(&state.default) => Vec::new(),
            ([process], _) => match witness::witnesses(&state.reader, memory, process) {
                Ok(witnesses) => witnesses,
                Err(error) => {
                    pass.trouble.push(stays(&error));
                    return Ok(());
                }
            },
            // `wanted` gives a shared root no view that is laxer than the default.
            _ => return Ok(()),
        };
        let pair = witness::has_user_half(memory, root);
        match hypervisor.set_binding(root, view, pair, &witnesses) {
            Ok(()) => {
                pass.bound.extend(changes(root, &want));
                self.made_for.insert(root, want);
                Ok(())
            }
            Err(error) if error.is(Errno::STALE) => Ok(()),
            Err(error) if error.is(Errno::NOSPC) || error.is(Errno::INVAL) => {
                pass.trouble.push(stays(&error));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether a binding made for `made` is right for `want`: the same processes, the same view.
fn same(made: &Wanted, want: &Wanted) -> bool {
    made.view == want.view
        && made
            .who
            .iter()
            .map(|process| &process.identity)
            .eq(want.who.iter().map(|process| &process.identity))
}

fn changes(root: Root, want: &Wanted) -> Vec<Change> {
    let change = |process: &Process| Change {
        root,
        view: want.view.clone(),
        pid: process.identity.pid,
        comm: process.comm.clone(),
        exe: process.identity.exe.clone(),
        rule: want.rule.clone(),
    };
    want.who.iter().map(change).collect()
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
    for Bound { root, .. } in hypervisor.bindings()? {
        if root != state.poking_root && !pins::is_pinned(journal_dir, root) {
            clear(hypervisor, root)?;
            dropped += 1;
        }
    }
    Ok(dropped)
}
