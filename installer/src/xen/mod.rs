//! Xen, as the rest of the installer needs it: the [`Hypervisor`] trait and the one real provider, [`Xen`].
//!
//! All `unsafe` of Penumbra is in this folder: calls into libxenctrl, libxencall, libxenforeignmemory and libxenstore,
//! and copies out of and into mapped guest frames. Everything above works on plain values and is tested against
//! `fake::Fake`.

mod binding;
mod calls;
#[cfg(any(test, feature = "lab"))]
pub mod contract;
mod event;
#[cfg(test)]
pub mod fake;
#[cfg(any(test, feature = "lab"))]
pub mod faults;
mod ffi;
mod frames;
mod ids;
mod names;
mod real;

pub use binding::{
    Action, Binding, BindingReply, Bound, Group, MAX_EVENTS, MAX_WITNESSES, Shown, Stats, Witness,
};
pub use event::{Event, EventKind, Events};
pub use ids::{DomId, Gfn, GuestPa, GuestVa, PAGE, Root, ViewId};
pub use names::{ResolveError, list, resolve};
use real::Xen;

use crate::exit::{Exit, Exits};
use std::collections::BTreeMap;
use thiserror::Error;

/// What Xen says about a domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Domain {
    /// Its id.
    pub id: DomId,
    /// Its UUID: tells one user of an id from the next.
    pub uuid: String,
    /// Highest vCPU number.
    pub max_vcpu: u32,
    /// Pages that it has.
    pub pages: u64,
    /// Pages that it may have.
    pub max_pages: u64,
    /// Width of its guest-physical addresses in bits.
    pub address_bits: u8,
    /// Runs with hardware virtualisation (PVH or HVM).
    pub hvm: bool,
    /// Uses hardware-assisted paging.
    pub hap: bool,
    /// Whether it still runs.
    pub life: Life,
}

/// Whether a domain runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Life {
    /// It runs, or is paused.
    Runs,
    /// It has suspended itself, to be saved or migrated; it goes on if that fails.
    Suspended,
    /// It has asked for a soft reset: its kernel has ended and starts another one in its place (kexec, kdump).
    SoftReset,
    /// It will not run again under this id.
    Ended(End),
}

/// How a domain ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// It shut down.
    PoweredOff,
    /// It shut down in order to start again, under another id; a triple fault counts as that (HVM_PARAM_TRIPLE_FAULT_REASON).
    Reboots,
    /// Its kernel crashed, or Xen stopped it.
    Crashed,
    /// It was taken away while it ran.
    Destroyed,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            End::PoweredOff => "powered off",
            End::Reboots => "went down for a reboot",
            End::Crashed => "crashed",
            End::Destroyed => "was destroyed",
        })
    }
}

/// The registers of a vCPU that the installer looks at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Vcpu {
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Page-table root and flags.
    pub cr3: u64,
    /// Control register 4; bit 12 is five-level paging.
    pub cr4: u64,
    /// Where SYSCALL enters.
    pub lstar: u64,
    /// In user mode (SS.DPL 3).
    pub user: bool,
}

/// How `altp2m=` stands in the domain's configuration (`HVM_PARAM_ALTP2M`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Altp2mMode {
    /// Off.
    Off,
    /// Only the toolstack may use it: what Penumbra needs.
    External,
    /// The guest may use it too (mixed or limited).
    Guest,
}

/// A failed request to Xen.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum XenError {
    /// The machine does not run Xen, or this is no privileged domain.
    #[error(
        "{what}: {errno}; run the installer as root in dom0 with the Xen tools started (is /dev/xen/privcmd there?)"
    )]
    NoXen {
        /// What was being opened.
        what: &'static str,
        /// What the system said.
        errno: Errno,
    },
    /// Xen refused a call.
    #[error("Xen refused {what}: {errno}")]
    Call {
        /// The call and its arguments, in words.
        what: String,
        /// Why.
        errno: Errno,
    },
    /// A guest frame is not there.
    #[error("guest frame {0} is not populated")]
    NoFrame(Gfn),
}

impl XenError {
    /// The error number, where there is one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            XenError::NoXen { errno, .. } | XenError::Call { errno, .. } => Some(*errno),
            XenError::NoFrame(_) => None,
        }
    }

    /// Whether Xen said `errno`.
    pub fn is(&self, errno: Errno) -> bool {
        self.errno() == Some(errno)
    }
}

impl Exits for XenError {
    fn exit(&self) -> Exit {
        match self {
            XenError::NoXen { .. } => Exit::NoXen,
            XenError::Call { errno, .. } if *errno == Errno::PERM || *errno == Errno::ACCES => {
                Exit::NoXen
            }
            XenError::Call { .. } | XenError::NoFrame(_) => Exit::Cannot,
        }
    }
}

/// A Linux error number; Xen's are the same for those that it returns (xen/include/public/errno.h).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Errno(pub i32);

impl Errno {
    /// Operation not permitted.
    pub const PERM: Errno = Errno(1);
    /// Not there.
    pub const NOENT: Errno = Errno(2);
    /// No such domain.
    pub const SRCH: Errno = Errno(3);
    /// Try again.
    pub const AGAIN: Errno = Errno(11);
    /// Out of memory.
    pub const NOMEM: Errno = Errno(12);
    /// Input or output error.
    pub const IO: Errno = Errno(5);
    /// Access denied.
    pub const ACCES: Errno = Errno(13);
    /// Bad address.
    pub const FAULT: Errno = Errno(14);
    /// In use.
    pub const BUSY: Errno = Errno(16);
    /// Not armed.
    pub const NODEV: Errno = Errno(19);
    /// Bad argument.
    pub const INVAL: Errno = Errno(22);
    /// Table full.
    pub const NOSPC: Errno = Errno(28);
    /// No such call.
    pub const NOSYS: Errno = Errno(38);
    /// No data: Xen has no context of a vCPU that is down.
    pub const NODATA: Errno = Errno(61);
    /// A witness does not hold.
    pub const STALE: Errno = Errno(116);
    /// Call not supported.
    pub const OPNOTSUPP: Errno = Errno(95);
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(&std::io::Error::from_raw_os_error(self.0), f)
    }
}

/// Opens all interfaces to one domain.
pub fn open(domain: DomId) -> Result<Box<dyn Hypervisor>, XenError> {
    let xen: Box<dyn Hypervisor> = Box::new(Xen::open(domain)?);
    #[cfg(feature = "lab")]
    let xen = Box::new(faults::Faulty::from_env(xen));
    Ok(xen)
}

/// One domain under Xen, as the installer uses it.
///
/// No call pauses the domain from outside: Xen itself stops vCPUs for the moment that a context read or a binding
/// change takes.
pub trait Hypervisor {
    /// What Xen says about the domain now.
    fn domain(&self) -> Result<Domain, XenError>;
    /// The registers of vCPU `index`.
    fn vcpu(&self, index: u32) -> Result<Vcpu, XenError>;
    /// Reads inside one frame of the host view: `offset + buf.len()` is at most [`PAGE`].
    fn read(&self, gfn: Gfn, offset: usize, buf: &mut [u8]) -> Result<(), XenError>;
    /// Writes inside one frame of the host view.
    fn write(&self, gfn: Gfn, offset: usize, bytes: &[u8]) -> Result<(), XenError>;
    /// Many writes, each a frame, an offset in it and bytes; a provider may do them in few calls.
    fn write_all(&self, writes: &[(Gfn, usize, &[u8])]) -> Result<(), XenError> {
        for (gfn, offset, bytes) in writes {
            self.write(*gfn, *offset, bytes)?;
        }
        Ok(())
    }
    /// Says which frames will be read soon, so that a provider can map them in few calls.
    fn prefetch(&self, _frames: &[Gfn]) {}
    /// Forgets mapped frames: what is read next is what the guest has there now.
    fn refresh(&self);
    /// The highest frame number that the domain uses.
    fn highest_gfn(&self) -> Result<Gfn, XenError>;
    /// Sets how many pages the domain may have.
    fn set_max_pages(&self, pages: u64) -> Result<(), XenError>;
    /// Gives the domain new frames at `first` and up, `count` of them, or fails; some may be there after a failure.
    fn populate(&self, first: Gfn, count: u64) -> Result<(), XenError>;
    /// Takes frames away; frames that are not there are passed over. Returns how many were taken.
    fn depopulate(&self, first: Gfn, count: u64) -> Result<u64, XenError>;
    /// How the domain's configuration has altp2m.
    fn altp2m_mode(&self) -> Result<Altp2mMode, XenError>;
    /// Whether altp2m is on now.
    fn altp2m_on(&self) -> Result<bool, XenError>;
    /// Turns altp2m on or off; off drops every view.
    fn altp2m_set(&self, on: bool) -> Result<(), XenError>;
    /// Makes a view equal to the host's.
    fn create_view(&self) -> Result<ViewId, XenError>;
    /// Removes a view; EBUSY if it is the default, bound, or not there.
    fn destroy_view(&self, view: ViewId) -> Result<(), XenError>;
    /// Lets each gfn mean its copy in `view`, or the host's page again where there is none; `read_only` as
    /// [`Hypervisor::protect`]. Those before one that fails are done.
    fn remap_all(
        &self,
        view: ViewId,
        pages: &[(Gfn, Option<Gfn>)],
        read_only: bool,
    ) -> Result<(), XenError>;
    /// The same for entries that belong together, all read-only: EAGAIN if text was poked or a group freed since
    /// `group.generation`. Xen drops them in all views when the guest frees `group.key`, before it does.
    fn remap_group(
        &self,
        view: ViewId,
        pages: &[(Gfn, Option<Gfn>)],
        group: Group,
    ) -> Result<(), XenError>;
    /// HVMOP_altp2m_binding, for the actions that need no array.
    fn binding(&self, request: Binding) -> Result<BindingReply, XenError>;
    /// Binds `root` to `view` for as long as every witness holds; ESTALE if one does not hold now. With `pair` the root
    /// with bit 12 flipped on means the same binding (page-table isolation's user half).
    fn set_binding(
        &self,
        root: Root,
        view: ViewId,
        pair: bool,
        witnesses: &[Witness],
    ) -> Result<(), XenError>;
    /// Takes up to 64 records of what happened.
    fn events(&self) -> Result<Events, XenError>;

    /// The counters of [`Hypervisor::events`] alone; every record stays.
    fn counters(&self) -> Result<Events, XenError> {
        let out = self.binding(Binding::new(Action::Events))?.out;
        Ok(Events {
            records: Vec::new(),
            lost: out[1],
            lapsed: out[2],
            refused: out[3],
            violations: out[4],
        })
    }

    /// Says where the running task is (`current`, from the GS base) and where its pid and comm are in it, for the records.
    fn sample(&self, current: u64, pid: u64, comm: u64) -> Result<(), XenError> {
        let request = Binding::new(Action::Sample).value(current);
        self.binding(request.more([pid, comm])).map(drop)
    }

    /// Makes `count` entries of `view` from `first` on read-only to the guest: what it writes there is dropped and recorded.
    fn protect(&self, view: ViewId, first: Gfn, count: u64) -> Result<(), XenError> {
        let mut done = 0;
        while done < count {
            let some = (binding::BATCH as u64).min(count - done);
            let request = Binding::new(Action::Protect).view(view);
            self.binding(request.value(first.0 + done).more([some, 0]))?;
            done += some;
        }
        Ok(())
    }

    /// Keeps `count` frames from `first` on out of the guest's sight and reach; 0 shows them again.
    fn hide(&self, first: Gfn, count: u64) -> Result<(), XenError> {
        let request = Binding::new(Action::Hide).value(first.0);
        self.binding(request.more([count, 0])).map(drop)
    }

    /// What `view` shows at `gfn`; `None` where it has no entry of its own yet and will get the host's.
    fn shown(&self, view: ViewId, gfn: Gfn) -> Result<Option<Shown>, XenError> {
        match self.binding(Binding::new(Action::Query).view(view).value(gfn.0)) {
            Ok(reply) => Ok(Some(reply.shown())),
            Err(error) if error.is(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The counters and state of the binding table.
    fn stats(&self) -> Result<Stats, XenError> {
        self.binding(Binding::new(Action::Stats))
            .map(|reply| reply.stats())
    }

    /// Every binding that Xen has.
    fn bindings(&self) -> Result<Vec<Bound>, XenError> {
        // A binding that lapses gives its index to the last one: from the end on, that one is seen twice rather than missed.
        let mut found: BTreeMap<Root, Bound> = BTreeMap::new();
        for index in (0..self.stats()?.bindings).rev() {
            match self.binding(Binding::new(Action::Get).value(index)) {
                Ok(reply) => {
                    found.insert(reply.root, reply.bound());
                }
                Err(error) if error.is(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found.into_values().collect())
    }
}
