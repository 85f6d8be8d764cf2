//! What a [`Fake`]'s guest does, and what Xen makes of it.

use super::Fake;
use crate::xen::{Event, EventKind, GuestPa, GuestVa, PAGE, Root, ViewId};

/// A record with nothing but what is given.
fn event(kind: EventKind, view: ViewId, root: Root, addr: u64) -> Event {
    Event {
        kind,
        vcpu: 0,
        view,
        time: 0,
        root,
        rip: 0,
        rsp: 0,
        addr,
        gpr: [0; 16],
        stack: [0; 3],
        pid: 0,
        tgid: 0,
        comm: [0; 16],
    }
}

impl Fake {
    /// The guest loads CR3: the view that it runs on from then on.
    pub fn load_cr3(&self, cr3: u64) -> ViewId {
        let mut table = self.table.borrow_mut();
        let loaded = Root::from_cr3(cr3);
        if !table.enabled || table.armed.is_some_and(|(poking, _)| poking == loaded) {
            return ViewId::HOST;
        }
        let kernel_half = Root(loaded.0 & !0x1000);
        let root = if table.bound.contains_key(&loaded) {
            loaded
        } else {
            kernel_half
        };
        let default = table.default;
        let Some(bound) = table.bound.get(&root) else {
            return default;
        };
        if root != loaded && !bound.pair {
            return default;
        }
        match bound
            .witnesses
            .iter()
            .position(|witness| !self.holds(witness))
        {
            None => bound.view,
            Some(index) => {
                table.bound.remove(&root);
                table.counts[1] += 1;
                table.record(event(EventKind::Lapsed, default, root, index as u64));
                default
            }
        }
    }

    /// The guest writes through `view`. Returns whether it was let.
    pub fn store(&self, view: ViewId, at: GuestPa, bytes: &[u8]) -> bool {
        let mut table = self.table.borrow_mut();
        let hidden = table
            .hidden
            .is_some_and(|(first, count)| (first.0..first.0 + count).contains(&at.gfn().0));
        let views = self.views.borrow();
        let entry = views.get(&view);
        if hidden || entry.is_some_and(|view| view.read_only.contains(&at.gfn())) {
            table.counts[2] += 1;
            table.record(event(EventKind::Refused, view, Root(0), at.0));
            return false;
        }
        let gfn = entry.and_then(|view| view.map.get(&at.gfn()).copied());
        let offset = at.0 % PAGE as u64;
        self.poke(GuestPa(gfn.unwrap_or(at.gfn()).base().0 + offset), bytes);
        true
    }

    /// The guest says that it is about to free what `key` names.
    pub fn free(&self, key: GuestVa) {
        let mut table = self.table.borrow_mut();
        if table.armed.is_none() {
            return;
        }
        table.generation += 1;
        let Some(gfns) = table.groups.remove(&key) else {
            return;
        };
        for view in self.views.borrow_mut().values_mut() {
            for gfn in &gfns {
                view.map.remove(gfn);
                view.read_only.remove(gfn);
            }
        }
        let view = table.default;
        table.record(event(EventKind::Dropped, view, Root(0), key.0));
    }

    /// A thunk's check fails, and the thunk says so.
    pub fn trap(&self, fatal: bool, rip: u64) {
        let mut table = self.table.borrow_mut();
        if table.armed.is_none() {
            return;
        }
        let kind = if fatal {
            EventKind::FatalViolation
        } else {
            EventKind::Violation
        };
        table.counts[3] += 1;
        let view = table.default;
        table.record(Event {
            rip,
            ..event(kind, view, Root(0), 0)
        });
    }
}
