//! The words of HVMOP_altp2m_binding (xen-patches, public/hvm/hvm_op.h).

use super::{Gfn, GuestPa, GuestVa, Root, ViewId};

/// What a request asks for. The numbers are the interface's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u32)]
pub enum Action {
    /// Intercept CR3 writes and mirror the guest's own text pokes into every view.
    Arm = 0,
    /// Set the default view and let bindings take effect, if no poke was mirrored since a generation.
    Enable = 1,
    /// All vCPUs to the host view; drop bindings; stop intercepting.
    Disable = 2,
    /// Bind a root to a view.
    Set = 3,
    /// Unbind a root.
    Clear = 4,
    /// Read one binding by its index.
    Get = 5,
    /// Read state and counters.
    Stats = 6,
    /// Change the default view.
    Default = 7,
    /// Say that a view drops a speculation mitigation.
    Flags = 8,
    /// Take the records of what happened since the last time.
    Events = 9,
    /// Say where the guest keeps the running task's pid and comm, so that a violation's record has them.
    Sample = 10,
    /// Make entries of a view read-only to the guest.
    Protect = 11,
    /// Keep a range of frames out of the guest's sight and reach.
    Hide = 12,
    /// Let many entries of a view mean other frames.
    Remap = 13,
    /// Say what a view shows at a frame.
    Query = 14,
}

impl Action {
    /// Changes nothing.
    pub fn only_asks(self) -> bool {
        matches!(self, Action::Get | Action::Stats | Action::Query)
    }
}

/// Flag of [`Action::Set`]: the root with bit 12 flipped on means the same binding (page-table isolation's user half).
pub const PAIR: u16 = 1;
/// Flag of [`Action::Remap`]: the entries become read-only too.
pub const READ_ONLY: u16 = 1;
/// Flag of [`Action::Remap`]: only if the generation still is the one in `root`.
pub const CHECK: u16 = 2;
/// Flag of [`Action::Remap`]: the entries are a group, to be dropped when the guest says that it frees its key.
pub const GROUP: u16 = 4;
/// Most witnesses of one binding.
pub const MAX_WITNESSES: usize = 8;
/// Most entries in one [`Action::Remap`].
pub const MAX_REMAPS: usize = 1024;
/// Most entries in one [`Action::Protect`].
#[cfg(any(test, feature = "lab"))]
pub const MAX_PROTECTS: u64 = 512;
/// Entries that are asked for in one call: dom0's vCPU does nothing else meanwhile.
pub const BATCH: usize = 128;
/// Most records in one [`Action::Events`].
pub const MAX_EVENTS: usize = 64;

/// A word of guest memory that must keep its value for a binding to hold: `*gpa & mask == value`. Xen looks when the
/// binding is made and before each CR3 load of its root takes effect; when it does not hold, the binding is gone and the
/// vCPU gets the default view.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Witness {
    /// Where; 8-byte aligned.
    pub gpa: GuestPa,
    /// The bits that count.
    pub mask: u64,
    /// What they are.
    pub value: u64,
}

impl Witness {
    /// `struct xen_hvm_altp2m_witness`.
    pub fn to_words(self) -> [u64; 3] {
        [self.gpa.0, self.mask, self.value]
    }
}

/// Remaps that belong together, of something that the guest may free: a module's text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Group {
    /// What the guest names when it frees it: the `struct module`. Not null.
    pub key: GuestVa,
    /// The generation before the guest was looked at: [`super::Stats::generation`], which text pokes and frees count up.
    pub generation: u64,
}

/// A request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Binding {
    /// What to do.
    pub action: Action,
    /// The view concerned.
    pub view: ViewId,
    /// Flags; bit 0 of [`Action::Flags`] is "drops a speculation mitigation".
    pub flags: u16,
    /// The page-table root concerned.
    pub root: Root,
    /// Poking address, generation, index, frame or address, as the action says.
    pub value: u64,
    /// Numbers and offsets, as the action says: what Xen reads from `out`.
    pub more: [u64; 2],
}

impl Binding {
    /// A request with everything else zero.
    pub fn new(action: Action) -> Binding {
        Binding {
            action,
            view: ViewId::HOST,
            flags: 0,
            root: Root(0),
            value: 0,
            more: [0; 2],
        }
    }

    /// With a view.
    #[must_use]
    pub fn view(self, view: ViewId) -> Binding {
        Binding { view, ..self }
    }

    /// With flags.
    #[must_use]
    pub fn flags(self, flags: u16) -> Binding {
        Binding { flags, ..self }
    }

    /// With a root.
    #[must_use]
    pub fn root(self, root: Root) -> Binding {
        Binding { root, ..self }
    }

    /// With a value.
    #[must_use]
    pub fn value(self, value: u64) -> Binding {
        Binding { value, ..self }
    }

    /// With numbers or offsets.
    #[must_use]
    pub fn more(self, more: [u64; 2]) -> Binding {
        Binding { more, ..self }
    }
}

/// What Xen wrote back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BindingReply {
    /// View.
    pub view: ViewId,
    /// Flags.
    pub flags: u16,
    /// Root.
    pub root: Root,
    /// Value.
    pub value: u64,
    /// Counters.
    pub out: [u64; 5],
}

impl BindingReply {
    /// Reads the reply to [`Action::Stats`].
    pub fn stats(&self) -> Stats {
        Stats {
            default: self.view,
            enabled: self.flags & 1 != 0,
            armed: self.flags & 2 != 0,
            bindings: self.value,
            cr3_writes: self.out[0],
            view_switches: self.out[1],
            pokes_mirrored: self.out[2],
            generation: self.out[3],
            conflicts: self.out[4],
            displaced: self.root.0,
        }
    }
}

/// State and counters of a domain's binding table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct Stats {
    /// The view of every root that is not bound.
    pub default: ViewId,
    /// Bindings take effect.
    pub enabled: bool,
    /// CR3 writes are intercepted and pokes mirrored.
    pub armed: bool,
    /// Number of bindings.
    pub bindings: u64,
    /// CR3 writes seen.
    pub cr3_writes: u64,
    /// CR3 writes that changed the view.
    pub view_switches: u64,
    /// Text pokes copied into the views.
    pub pokes_mirrored: u64,
    /// Counts pokes that changed a byte; [`Action::Enable`] compares it.
    pub generation: u64,
    /// Pokes that hit a byte which a view had changed.
    pub conflicts: u64,
    /// Bytes that views have changed and that something of the guest's (a probe) stands on at present.
    pub displaced: u64,
}

/// A binding as Xen lists it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bound {
    /// The root.
    pub root: Root,
    /// Its view.
    pub view: ViewId,
    /// Switches made because of it.
    pub switches: u64,
    /// How many witnesses it has.
    pub witnesses: u64,
    /// The root with bit 12 on means it too.
    pub pair: bool,
}

/// What a view shows at a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shown {
    /// The frame whose contents are seen there.
    pub frame: Gfn,
    /// The guest cannot write it.
    pub read_only: bool,
    /// The guest sees nothing there.
    pub hidden: bool,
}

impl BindingReply {
    /// Reads the reply to [`Action::Get`].
    pub fn bound(&self) -> Bound {
        Bound {
            root: self.root,
            view: self.view,
            switches: self.out[0],
            witnesses: self.out[1],
            pair: self.flags & PAIR != 0,
        }
    }

    /// Reads the reply to [`Action::Query`].
    pub fn shown(&self) -> Shown {
        Shown {
            frame: Gfn(self.out[0]),
            read_only: self.flags & 1 != 0,
            hidden: self.flags & 2 != 0,
        }
    }
}
