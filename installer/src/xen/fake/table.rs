//! The binding table of a [`Fake`]: HVMOP_altp2m_binding.

use super::{Fake, refuse};
use crate::xen::binding::{MAX_EVENTS, MAX_PROTECTS, PAIR};
use crate::xen::{
    Action, Binding, BindingReply, Errno, Event, Events, Gfn, GuestVa, MAX_WITNESSES, PAGE, Root,
    ViewId, Witness, XenError,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Records that Xen keeps for a domain.
const RING: usize = 256;

/// One binding.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bound {
    /// The view.
    pub view: ViewId,
    /// The root with bit 12 on means it too.
    pub pair: bool,
    /// What must hold.
    pub witnesses: Vec<Witness>,
}

/// The binding table.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Table {
    /// poking_mm's root and poking_addr.
    pub armed: Option<(Root, u64)>,
    /// Bindings take effect.
    pub enabled: bool,
    /// View of unbound roots.
    pub default: ViewId,
    /// Pokes so far.
    pub generation: u64,
    /// Bytes of views' own that a probe stands on.
    pub displaced: u64,
    /// The bindings.
    pub bound: BTreeMap<Root, Bound>,
    /// Views that drop a mitigation.
    pub flagged: BTreeSet<ViewId>,
    /// Frames that the guest neither sees nor reaches.
    pub hidden: Option<(Gfn, u64)>,
    /// What is dropped when the guest frees a key.
    pub groups: BTreeMap<GuestVa, BTreeSet<Gfn>>,
    /// Where the running task, its pid and its comm are.
    pub sample: Option<[u64; 3]>,
    /// Records that nobody took yet.
    pub events: VecDeque<Event>,
    /// The counters of [`Events`]: overwritten, lapsed, refused, violations.
    pub counts: [u64; 4],
}

impl Table {
    /// Keeps a record.
    pub fn record(&mut self, event: Event) {
        if self.events.len() == RING {
            self.events.pop_front();
            self.counts[0] += 1;
        }
        self.events.push_back(event);
    }
}

impl Fake {
    /// Refuses on a Xen without the interface, and before ARM.
    pub(super) fn armed(&self, what: &str) -> Result<(), XenError> {
        if !self.patched.get() || !self.on.get() {
            return refuse(what, Errno::OPNOTSUPP);
        }
        match self.table.borrow().armed {
            Some(_) => Ok(()),
            None => refuse(what, Errno::NODEV),
        }
    }

    /// Whether a witness holds now.
    pub(super) fn holds(&self, witness: &Witness) -> bool {
        let memory = self.memory.borrow();
        memory.get(&witness.gpa.gfn()).is_some_and(|page| {
            let at = (witness.gpa.0 % PAGE as u64) as usize;
            let mut word = [0; 8];
            word.copy_from_slice(&page[at..at + 8]);
            u64::from_le_bytes(word) & witness.mask == witness.value
        })
    }

    pub(super) fn take_events(&self) -> Result<Events, XenError> {
        self.armed("Events")?;
        let mut table = self.table.borrow_mut();
        let count = table.events.len().min(MAX_EVENTS);
        let [lost, lapsed, refused, violations] = table.counts;
        Ok(Events {
            records: table.events.drain(..count).collect(),
            lost,
            lapsed,
            refused,
            violations,
        })
    }

    pub(super) fn table_action(
        &self,
        request: Binding,
        witnesses: &[Witness],
    ) -> Result<BindingReply, XenError> {
        let what = format!("{:?}", request.action);
        if !matches!(
            request.action,
            Action::Arm | Action::Disable | Action::Stats
        ) {
            self.armed(&what)?;
        } else if !self.patched.get() || !self.on.get() {
            return refuse(&what, Errno::OPNOTSUPP);
        }
        if !request.action.only_asks() {
            self.change(format!("{what} {} {}", request.view, request.root))?;
        } else if let Some(asked) = &*self.asked.borrow() {
            asked(self, &what);
        }
        let known = request.view == ViewId::HOST || self.views.borrow().contains_key(&request.view);
        let mut table = self.table.borrow_mut();
        let mut reply = BindingReply::default();
        match request.action {
            Action::Arm => match table.armed {
                Some(old) if old != (request.root, request.value) => {
                    return refuse(&what, Errno::BUSY);
                }
                _ => table.armed = Some((request.root, request.value)),
            },
            Action::Enable | Action::Default | Action::Flags if !known => {
                return refuse(&what, Errno::INVAL);
            }
            Action::Enable if table.generation != request.value => {
                return refuse(&what, Errno::AGAIN);
            }
            Action::Enable => {
                table.enabled = true;
                table.default = request.view;
            }
            Action::Default if !table.enabled => return refuse(&what, Errno::NODEV),
            Action::Default => table.default = request.view,
            Action::Flags => {
                table.flagged.insert(request.view);
            }
            Action::Disable => *table = Table::default(),
            Action::Set => {
                let poking = table.armed.is_some_and(|(root, _)| root == request.root);
                let pair = request.flags & PAIR != 0;
                let aligned = request.root.0 != 0
                    && request.root.0.is_multiple_of(PAGE as u64)
                    && !(pair && request.root.0 & 0x1000 != 0);
                let sound = witnesses.len() <= MAX_WITNESSES
                    && witnesses.iter().all(|witness| {
                        witness.gpa.0.is_multiple_of(8)
                            && witness.mask != 0
                            && witness.value & !witness.mask == 0
                    });
                if !known || poking || !aligned || !sound {
                    return refuse(&what, Errno::INVAL);
                }
                if !witnesses.iter().all(|witness| self.holds(witness)) {
                    return refuse(&what, Errno::STALE);
                }
                if table.bound.len() == self.room.get() && !table.bound.contains_key(&request.root)
                {
                    return refuse(&what, Errno::NOSPC);
                }
                let bound = Bound {
                    view: request.view,
                    pair,
                    witnesses: witnesses.to_vec(),
                };
                table.bound.insert(request.root, bound);
            }
            Action::Clear => {
                if table.bound.remove(&request.root).is_none() {
                    return refuse(&what, Errno::NOENT);
                }
            }
            Action::Get => {
                let index = usize::try_from(request.value).expect("a small index");
                match table.bound.iter().nth(index) {
                    Some((root, bound)) => {
                        (reply.root, reply.view) = (*root, bound.view);
                        reply.flags = if bound.pair { PAIR } else { 0 };
                        reply.out[1] = bound.witnesses.len() as u64;
                    }
                    None => return refuse(&what, Errno::NOENT),
                }
            }
            Action::Stats => {
                reply.view = table.default;
                reply.flags = u16::from(table.enabled) | u16::from(table.armed.is_some()) << 1;
                reply.value = table.bound.len() as u64;
                reply.out[3] = table.generation;
                reply.root = Root(table.displaced);
            }
            Action::Sample => {
                table.sample = Some([request.value, request.more[0], request.more[1]]);
            }
            Action::Protect => {
                let count = request.more[0];
                let mut views = self.views.borrow_mut();
                let Some(view) = views
                    .get_mut(&request.view)
                    .filter(|_| (1..=MAX_PROTECTS).contains(&count))
                else {
                    return refuse(&what, Errno::INVAL);
                };
                for gfn in (request.value..request.value + count).map(Gfn) {
                    if !self.memory.borrow().contains_key(&gfn) {
                        return refuse(&what, Errno::SRCH);
                    }
                    view.read_only.insert(gfn);
                }
            }
            Action::Hide => {
                let range = (Gfn(request.value), request.more[0]);
                match table.hidden {
                    _ if range.1 == 0 => table.hidden = None,
                    Some(hidden) if hidden != range => return refuse(&what, Errno::BUSY),
                    _ => table.hidden = Some(range),
                }
            }
            Action::Query => {
                let views = self.views.borrow();
                let gfn = Gfn(request.value);
                if !known {
                    return refuse(&what, Errno::INVAL);
                }
                let hidden = table
                    .hidden
                    .is_some_and(|(first, count)| (first.0..first.0 + count).contains(&gfn.0));
                if hidden {
                    reply.out[0] = u64::MAX;
                    reply.flags = 2;
                    return Ok(reply);
                }
                let Some(view) = views
                    .get(&request.view)
                    .filter(|_| self.memory.borrow().contains_key(&gfn))
                else {
                    return refuse(&what, Errno::NOENT);
                };
                reply.out[0] = view.map.get(&gfn).copied().unwrap_or(gfn).0;
                reply.flags = u16::from(view.read_only.contains(&gfn));
            }
            // Without room for records: the counters alone.
            Action::Events => {
                let [lost, lapsed, refused, violations] = table.counts;
                reply.out = [0, lost, lapsed, refused, violations];
            }
            Action::Remap => unreachable!("it has a method of its own"),
        }
        Ok(reply)
    }
}
