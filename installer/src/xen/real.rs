//! The real Xen, through libxenctrl and libxencall.

use super::calls::Calls;
use super::frames::Frames;
use super::{
    Altp2mMode, Binding, BindingReply, DomId, Domain, End, Errno, Events, Gfn, Group, Hypervisor,
    Life, Root, Vcpu, ViewId, Witness, XenError,
};
use std::ffi::c_void;
use std::ptr::NonNull;
use xenctrl_sys as xc;

/// `HVM_SAVE_CODE(CPU)` (xen/include/public/arch-x86/hvm/save.h).
const SAVE_CPU: u16 = 2;
/// Frames in one call that gives them to the domain.
const BATCH: u64 = 1024;
/// Frames in one call that takes them from the domain: for each Xen interrupts the processors that run it and waits for them,
/// and a kernel of dom0 that does not preempt itself gets the processor back only between calls.
const DEPOPULATE_BATCH: u64 = 64;

/// The error number of the library call that failed last.
pub fn last_errno() -> Errno {
    Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

/// libxenctrl's handle.
pub struct Control(NonNull<xc::xc_interface>);

impl Control {
    /// Opens libxenctrl; fails where there is no /dev/xen/privcmd.
    pub fn open() -> Result<Control, XenError> {
        let quiet = quiet();
        // SAFETY: the logger lives for ever and its two called members are set. Needed: the library is C.
        let handle = unsafe { xc::xc_interface_open(quiet, quiet, 0) };
        NonNull::new(handle)
            .map(Control)
            .ok_or_else(|| XenError::NoXen {
                what: "xc_interface_open",
                errno: last_errno(),
            })
    }

    fn raw(&self) -> *mut xc::xc_interface {
        self.0.as_ptr()
    }

    /// The first domain with an id of at least `from`.
    pub fn next_domain(&self, from: u32) -> Result<Option<Domain>, XenError> {
        let mut info = xc::xc_domaininfo_t::default();
        // SAFETY: room for one element, and one is asked for. Needed: the library is C.
        let count = unsafe { xc::xc_domain_getinfolist(self.raw(), from, 1, &mut info) };
        match count {
            1 => Ok(Some(Domain {
                id: DomId(info.domain),
                uuid: info
                    .handle
                    .iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect(),
                max_vcpu: info.max_vcpu_id,
                pages: info.tot_pages,
                max_pages: info.max_pages,
                address_bits: info.gpaddr_bits,
                hvm: info.flags & xc::XEN_DOMINF_hvm_guest != 0,
                hap: info.flags & xc::XEN_DOMINF_hap != 0,
                life: life(info.flags),
            })),
            0 => Ok(None),
            _ => Err(failed("the list of domains")),
        }
    }
}

/// What a domain's flags say (xen/include/public/sysctl.h and sched.h).
fn life(flags: u32) -> Life {
    let dying = flags & xc::XEN_DOMINF_dying != 0;
    if flags & xc::XEN_DOMINF_shutdown != 0 {
        return match (flags >> xc::XEN_DOMINF_shutdownshift) & xc::XEN_DOMINF_shutdownmask {
            xc::SHUTDOWN_poweroff => Life::Ended(End::PoweredOff),
            xc::SHUTDOWN_reboot => Life::Ended(End::Reboots),
            xc::SHUTDOWN_suspend | xc::SHUTDOWN_soft_reset if dying => Life::Ended(End::Destroyed),
            xc::SHUTDOWN_suspend => Life::Suspended,
            xc::SHUTDOWN_soft_reset => Life::SoftReset,
            // The watchdog's, and what later versions may add.
            _ => Life::Ended(End::Crashed),
        };
    }
    if dying {
        Life::Ended(End::Destroyed)
    } else {
        Life::Runs
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // SAFETY: the handle is open and not used again. Needed: the library is C.
        unsafe { xc::xc_interface_close(self.raw()) };
    }
}

/// A logger that says nothing: every error is reported by its caller, once, in one form.
///
/// The libraries keep the pointer for their handle's life; one leaked struct of three pointers per handle is the price.
pub fn quiet() -> *mut xc::xentoollog_logger {
    Box::leak(Box::new(xc::xentoollog_logger {
        vmessage: Some(no_message),
        progress: Some(no_progress),
        destroy: None,
    }))
}

/// Swallows a message: every error is reported by its caller, once.
unsafe extern "C" fn no_message(
    _: *mut xc::xentoollog_logger,
    _: xc::xentoollog_level,
    _: i32,
    _: *const std::ffi::c_char,
    _: *const std::ffi::c_char,
    _: *mut xc::__va_list_tag,
) {
}

/// Swallows a progress report.
unsafe extern "C" fn no_progress(
    _: *mut xc::xentoollog_logger,
    _: *const std::ffi::c_char,
    _: *const std::ffi::c_char,
    _: i32,
    _: std::ffi::c_ulong,
    _: std::ffi::c_ulong,
) {
}

fn failed(what: impl Into<String>) -> XenError {
    XenError::Call {
        what: what.into(),
        errno: last_errno(),
    }
}

fn done(rc: i32, what: impl FnOnce() -> String) -> Result<(), XenError> {
    if rc < 0 { Err(failed(what())) } else { Ok(()) }
}

/// One domain under the real Xen.
pub struct Xen {
    domain: DomId,
    control: Control,
    frames: Frames,
    calls: Calls,
}

impl Xen {
    /// Opens all interfaces for one domain.
    pub fn open(domain: DomId) -> Result<Xen, XenError> {
        Ok(Xen {
            domain,
            control: Control::open()?,
            frames: Frames::open(domain)?,
            calls: Calls::open()?,
        })
    }

    fn dom(&self) -> u32 {
        u32::from(self.domain.0)
    }

    fn raw(&self) -> *mut xc::xc_interface {
        self.control.raw()
    }
}

impl Hypervisor for Xen {
    fn domain(&self) -> Result<Domain, XenError> {
        match self.control.next_domain(self.dom())? {
            Some(domain) if domain.id == self.domain => Ok(domain),
            _ => Err(XenError::Call {
                what: format!("domain {}", self.domain),
                errno: Errno::SRCH,
            }),
        }
    }

    fn vcpu(&self, index: u32) -> Result<Vcpu, XenError> {
        let mut cpu = xc::hvm_hw_cpu::default();
        let instance = u16::try_from(index).unwrap_or(u16::MAX);
        // SAFETY: the buffer is a `struct hvm_hw_cpu` of the size that is passed. Needed: the library is C.
        let rc = unsafe {
            xc::xc_domain_hvm_getcontext_partial(
                self.raw(),
                self.dom(),
                SAVE_CPU,
                instance,
                (&raw mut cpu).cast::<c_void>(),
                size_of::<xc::hvm_hw_cpu>() as u32,
            )
        };
        done(rc, || format!("the registers of vCPU {index}"))?;
        Ok(Vcpu {
            rip: cpu.rip,
            rsp: cpu.rsp,
            cr3: cpu.cr3,
            cr4: cpu.cr4,
            lstar: cpu.msr_lstar,
            // Descriptor privilege level of SS, bits 5 and 6 of the attributes (SDM volume 3C, 25.4.1).
            user: (cpu.ss_arbytes >> 5) & 3 == 3,
        })
    }

    fn read(&self, gfn: Gfn, offset: usize, buf: &mut [u8]) -> Result<(), XenError> {
        self.frames.read(gfn, offset, buf)
    }

    fn write(&self, gfn: Gfn, offset: usize, bytes: &[u8]) -> Result<(), XenError> {
        self.frames.write(gfn, offset, bytes)
    }

    fn prefetch(&self, frames: &[Gfn]) {
        self.frames.prefetch(frames);
    }

    fn write_all(&self, writes: &[(Gfn, usize, &[u8])]) -> Result<(), XenError> {
        self.frames.write_all(writes)
    }

    fn refresh(&self) {
        self.frames.refresh();
    }

    fn highest_gfn(&self) -> Result<Gfn, XenError> {
        let mut highest = 0;
        // SAFETY: the out argument is valid. Needed: the library is C.
        let rc = unsafe { xc::xc_domain_maximum_gpfn(self.raw(), self.dom(), &mut highest) };
        done(rc, || "the highest frame number".to_owned())?;
        Ok(Gfn(highest))
    }

    fn set_max_pages(&self, pages: u64) -> Result<(), XenError> {
        // SAFETY: plain numbers only. Needed: the library is C.
        let rc = unsafe { xc::xc_domain_setmaxmem(self.raw(), self.dom(), pages * 4) };
        done(rc, || format!("a memory limit of {pages} pages"))
    }

    fn populate(&self, first: Gfn, count: u64) -> Result<(), XenError> {
        let mut at = 0;
        while at < count {
            let len = BATCH.min(count - at);
            let mut frames: Vec<u64> = (0..len).map(|index| first.0 + at + index).collect();
            // SAFETY: the array has `len` elements and lives across the call. Needed: the library is C.
            let rc = unsafe {
                xc::xc_domain_populate_physmap_exact(
                    self.raw(),
                    self.dom(),
                    len,
                    0,
                    0,
                    frames.as_mut_ptr(),
                )
            };
            done(rc, || format!("{len} more frames at {}", Gfn(first.0 + at)))?;
            at += len;
        }
        Ok(())
    }

    fn depopulate(&self, first: Gfn, count: u64) -> Result<u64, XenError> {
        self.frames.clear();
        let (mut at, mut taken) = (0, 0);
        while at < count {
            let len = DEPOPULATE_BATCH.min(count - at);
            let mut frames: Vec<u64> = (0..len).map(|index| first.0 + at + index).collect();
            // SAFETY: the array has `len` elements and lives across the call. Needed: the library is C.
            let rc = unsafe {
                xc::xc_domain_decrease_reservation(
                    self.raw(),
                    self.dom(),
                    len,
                    0,
                    frames.as_mut_ptr(),
                )
            };
            // Xen stops at the first frame that is not there and says how many came before it; go on behind it.
            match u64::try_from(rc) {
                Ok(some) => {
                    taken += some;
                    at += if some == len { len } else { some + 1 };
                }
                Err(_) => return Err(failed(format!("taking back {len} frames"))),
            }
        }
        Ok(taken)
    }

    fn altp2m_mode(&self) -> Result<Altp2mMode, XenError> {
        let mut mode = 0;
        // SAFETY: the out argument is valid. Needed: the library is C.
        let rc = unsafe {
            xc::xc_hvm_param_get(self.raw(), self.dom(), xc::HVM_PARAM_ALTP2M, &mut mode)
        };
        done(rc, || "the domain's altp2m mode".to_owned())?;
        Ok(match mode {
            0 => Altp2mMode::Off,
            mode if mode == u64::from(xc::XEN_ALTP2M_external) => Altp2mMode::External,
            _ => Altp2mMode::Guest,
        })
    }

    fn altp2m_on(&self) -> Result<bool, XenError> {
        let mut on = false;
        // SAFETY: the out argument is valid. Needed: the library is C.
        let rc = unsafe { xc::xc_altp2m_get_domain_state(self.raw(), self.dom(), &mut on) };
        done(rc, || "the state of altp2m".to_owned())?;
        Ok(on)
    }

    fn altp2m_set(&self, on: bool) -> Result<(), XenError> {
        // SAFETY: plain values only. Needed: the library is C.
        let rc = unsafe { xc::xc_altp2m_set_domain_state(self.raw(), self.dom(), on) };
        done(rc, || {
            format!("turning altp2m {}", if on { "on" } else { "off" })
        })
    }

    fn create_view(&self) -> Result<ViewId, XenError> {
        let mut view = 0;
        // SAFETY: the out argument is valid. Needed: the library is C.
        let rc = unsafe {
            xc::xc_altp2m_create_view(
                self.raw(),
                self.dom(),
                xc::xenmem_access_t::XENMEM_access_rwx,
                &mut view,
            )
        };
        done(rc, || "another view".to_owned())?;
        Ok(ViewId(view))
    }

    fn destroy_view(&self, view: ViewId) -> Result<(), XenError> {
        // SAFETY: plain numbers only. Needed: the library is C.
        let rc = unsafe { xc::xc_altp2m_destroy_view(self.raw(), self.dom(), view.0) };
        done(rc, || format!("removing view {view}"))
    }

    fn binding(&self, request: Binding) -> Result<BindingReply, XenError> {
        self.calls.binding(self.domain, request)
    }

    fn set_binding(
        &self,
        root: Root,
        view: ViewId,
        pair: bool,
        witnesses: &[Witness],
    ) -> Result<(), XenError> {
        self.calls.set(self.domain, (root, view, pair), witnesses)
    }

    fn events(&self) -> Result<Events, XenError> {
        self.calls.events(self.domain)
    }

    fn remap_all(
        &self,
        view: ViewId,
        pages: &[(Gfn, Option<Gfn>)],
        read_only: bool,
    ) -> Result<(), XenError> {
        self.calls.remap_all(self.domain, view, pages, read_only)
    }

    fn remap_group(
        &self,
        view: ViewId,
        pages: &[(Gfn, Option<Gfn>)],
        group: Group,
    ) -> Result<(), XenError> {
        self.calls.remap_group(self.domain, view, pages, group)
    }
}

#[cfg(test)]
mod tests {
    use super::life;
    use crate::xen::{End, Life};
    use xenctrl_sys as xc;

    #[test]
    fn a_domains_flags_say_how_it_is() {
        let (dying, shutdown) = (xc::XEN_DOMINF_dying, xc::XEN_DOMINF_shutdown);
        let reason = |code: u32| shutdown | code << xc::XEN_DOMINF_shutdownshift;
        for (flags, expected) in [
            (xc::XEN_DOMINF_running, Life::Runs),
            (xc::XEN_DOMINF_paused, Life::Runs),
            (dying, Life::Ended(End::Destroyed)),
            (reason(xc::SHUTDOWN_poweroff), Life::Ended(End::PoweredOff)),
            (reason(xc::SHUTDOWN_reboot), Life::Ended(End::Reboots)),
            (
                reason(xc::SHUTDOWN_reboot) | dying,
                Life::Ended(End::Reboots),
            ),
            (reason(xc::SHUTDOWN_crash), Life::Ended(End::Crashed)),
            (reason(xc::SHUTDOWN_watchdog), Life::Ended(End::Crashed)),
            (reason(xc::SHUTDOWN_suspend), Life::Suspended),
            (
                reason(xc::SHUTDOWN_suspend) | dying,
                Life::Ended(End::Destroyed),
            ),
            (reason(xc::SHUTDOWN_soft_reset), Life::SoftReset),
        ] {
            assert_eq!(life(flags), expected, "{flags:#x}");
        }
    }
}
