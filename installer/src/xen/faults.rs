//! Makes calls fail, or ends the program before one, so that tests reach every place where that can happen.
//!
//! Only in unit tests and with the cargo feature `lab`; the released program has none of it. There the environment says
//! what to do: `PENUMBRA_FAULT="end 7"` ends the program, as a kill would, before its 7th call that changes something;
//! `PENUMBRA_FAULT="tell"` names each of these on standard error;
//! `PENUMBRA_FAULT="fail populate 12"` lets the first call of that name fail with error 12.

use super::{
    Altp2mMode, Binding, BindingReply, Domain, Errno, Events, Gfn, Group, Hypervisor, Root, Vcpu,
    ViewId, Witness, XenError,
};
use std::cell::Cell;

/// What is to happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Nothing.
    None,
    /// Calls that change something are named on standard error.
    #[cfg(feature = "lab")]
    Tell,
    /// The program ends before this call that changes something, counted from 1.
    #[cfg(feature = "lab")]
    End(usize),
    /// The first call of this name fails.
    #[cfg(feature = "lab")]
    Fail(&'static str, Errno),
    /// This call of any kind fails, counted from 1.
    FailAny(usize, Errno),
    /// This call of any kind and all that follow fail: what Xen sees when the program was killed there.
    Dead(usize),
}

/// A hypervisor with faults.
pub struct Faulty<H> {
    inner: H,
    /// What is to happen.
    pub fault: Cell<Fault>,
    /// Calls so far: of any kind, and those that change something.
    pub calls: Cell<(usize, usize)>,
}

impl<H: AsRef<dyn Hypervisor>> Faulty<H> {
    /// `inner` with `fault`.
    pub fn new(inner: H, fault: Fault) -> Faulty<H> {
        Faulty {
            inner,
            fault: Cell::new(fault),
            calls: Cell::default(),
        }
    }

    /// `inner` with the fault that the environment names.
    #[cfg(feature = "lab")]
    pub fn from_env(inner: H) -> Faulty<H> {
        let asked = std::env::var("PENUMBRA_FAULT").unwrap_or_default();
        let words: Vec<&str> = asked.split_whitespace().collect();
        let number = |word: &str| word.parse().expect("PENUMBRA_FAULT counts calls");
        let fault = match words[..] {
            [] => Fault::None,
            ["tell"] => Fault::Tell,
            ["end", at] => Fault::End(number(at)),
            ["fail", name, errno] => {
                let errno = errno.parse().expect("PENUMBRA_FAULT names an error number");
                // Once in a program's life.
                Fault::Fail(name.to_owned().leak(), Errno(errno))
            }
            _ => panic!("PENUMBRA_FAULT is `tell`, `end N` or `fail NAME ERRNO`, not `{asked}`"),
        };
        Faulty::new(inner, fault)
    }

    /// One call.
    fn at(&self, what: &str, changes: bool) -> Result<&dyn Hypervisor, XenError> {
        let (mut any, mut changing) = self.calls.get();
        any += 1;
        changing += usize::from(changes);
        self.calls.set((any, changing));
        let errno = match self.fault.get() {
            #[cfg(feature = "lab")]
            Fault::Tell if changes => {
                eprintln!("installer: calls {what}");
                return Ok(self.inner.as_ref());
            }
            #[cfg(feature = "lab")]
            Fault::End(at) if changes && at == changing => {
                eprintln!("installer: ended before {what}, as PENUMBRA_FAULT says");
                std::process::abort();
            }
            #[cfg(feature = "lab")]
            Fault::Fail(name, errno) if name == what => {
                self.fault.set(Fault::None);
                errno
            }
            Fault::FailAny(at, errno) if at == any => errno,
            Fault::Dead(at) if at <= any => Errno::IO,
            _ => return Ok(self.inner.as_ref()),
        };
        Err(XenError::Call {
            what: what.to_owned(),
            errno,
        })
    }
}

impl<H: AsRef<dyn Hypervisor>> Hypervisor for Faulty<H> {
    fn domain(&self) -> Result<Domain, XenError> {
        self.at("domain", false)?.domain()
    }

    fn vcpu(&self, index: u32) -> Result<Vcpu, XenError> {
        self.at("vcpu", false)?.vcpu(index)
    }

    fn read(&self, gfn: Gfn, offset: usize, buf: &mut [u8]) -> Result<(), XenError> {
        self.at("read", false)?.read(gfn, offset, buf)
    }

    fn write(&self, gfn: Gfn, offset: usize, bytes: &[u8]) -> Result<(), XenError> {
        self.at("write", true)?.write(gfn, offset, bytes)
    }

    fn write_all(&self, writes: &[(Gfn, usize, &[u8])]) -> Result<(), XenError> {
        self.at("write_all", true)?.write_all(writes)
    }

    fn prefetch(&self, frames: &[Gfn]) {
        self.inner.as_ref().prefetch(frames);
    }

    fn refresh(&self) {
        self.inner.as_ref().refresh();
    }

    fn highest_gfn(&self) -> Result<Gfn, XenError> {
        self.at("highest_gfn", false)?.highest_gfn()
    }

    fn set_max_pages(&self, pages: u64) -> Result<(), XenError> {
        self.at("set_max_pages", true)?.set_max_pages(pages)
    }

    fn populate(&self, first: Gfn, count: u64) -> Result<(), XenError> {
        self.at("populate", true)?.populate(first, count)
    }

    fn depopulate(&self, first: Gfn, count: u64) -> Result<u64, XenError> {
        self.at("depopulate", true)?.depopulate(first, count)
    }

    fn altp2m_mode(&self) -> Result<Altp2mMode, XenError> {
        self.at("altp2m_mode", false)?.altp2m_mode()
    }

    fn altp2m_on(&self) -> Result<bool, XenError> {
        self.at("altp2m_on", false)?.altp2m_on()
    }

    fn altp2m_set(&self, on: bool) -> Result<(), XenError> {
        self.at("altp2m_set", true)?.altp2m_set(on)
    }

    fn create_view(&self) -> Result<ViewId, XenError> {
        self.at("create_view", true)?.create_view()
    }

    fn destroy_view(&self, view: ViewId) -> Result<(), XenError> {
        self.at("destroy_view", true)?.destroy_view(view)
    }

    fn remap_all(
        &self,
        view: ViewId,
        pages: &[(Gfn, Option<Gfn>)],
        read_only: bool,
    ) -> Result<(), XenError> {
        self.at("Remap", true)?.remap_all(view, pages, read_only)
    }

    fn remap_group(
        &self,
        view: ViewId,
        pages: &[(Gfn, Option<Gfn>)],
        group: Group,
    ) -> Result<(), XenError> {
        self.at("Remap", true)?.remap_group(view, pages, group)
    }

    fn binding(&self, request: Binding) -> Result<BindingReply, XenError> {
        let action = request.action;
        let changes = !action.only_asks();
        self.at(&format!("{action:?}"), changes)?.binding(request)
    }

    fn set_binding(
        &self,
        root: Root,
        view: ViewId,
        pair: bool,
        witnesses: &[Witness],
    ) -> Result<(), XenError> {
        self.at("Set", true)?
            .set_binding(root, view, pair, witnesses)
    }

    fn events(&self) -> Result<Events, XenError> {
        self.at("Events", false)?.events()
    }
}
