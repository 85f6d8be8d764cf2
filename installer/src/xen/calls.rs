//! HVMOP_altp2m_binding through libxencall, with the memory that Xen reads and writes.

use super::binding::{BATCH, CHECK, GROUP, MAX_EVENTS, MAX_REMAPS, PAIR, READ_ONLY};
use super::event::{Event, Events, RECORD};
use super::ffi::{self, RawAltp2mOp, RawBinding};
use super::real::{last_errno, quiet};
use super::{Action, Binding, BindingReply, DomId, Gfn, Group, Root, ViewId, Witness, XenError};
use std::ffi::c_void;
use std::ptr::NonNull;
use xenctrl_sys as xc;

/// Bytes of the largest array that goes with a call: 1024 remaps of 16 bytes, 64 records of 256.
const DATA: usize = 16384;
const _: () = assert!(MAX_REMAPS * 16 <= DATA && MAX_EVENTS * RECORD <= DATA);

/// libxencall's handle and the buffers that Xen can reach.
pub struct Calls {
    handle: NonNull<ffi::XenCall>,
    op: NonNull<RawAltp2mOp>,
    data: NonNull<[u8; DATA]>,
}

impl Calls {
    /// Opens the interface; fails where there is no /dev/xen/hypercall.
    pub fn open() -> Result<Calls, XenError> {
        // SAFETY: the logger lives for ever. Needed: the library is C.
        let handle = NonNull::new(unsafe { ffi::xencall_open(quiet().cast::<c_void>(), 0) })
            .ok_or_else(|| XenError::NoXen {
                what: "xencall_open",
                errno: last_errno(),
            })?;
        let opened = alloc::<RawAltp2mOp>(handle).and_then(|op| {
            let data = alloc::<[u8; DATA]>(handle).inspect_err(|_| free(handle, op))?;
            Ok(Calls { handle, op, data })
        });
        if opened.is_err() {
            // SAFETY: the handle is open and not used again. Needed: the library is C.
            unsafe { ffi::xencall_close(handle.as_ptr()) };
        }
        opened
    }

    /// Any action without an array.
    pub fn binding(&self, domain: DomId, request: Binding) -> Result<BindingReply, XenError> {
        self.call(domain, request).map_err(|(error, _)| error)
    }

    /// [`Action::Set`] with witnesses.
    pub fn set(
        &self,
        domain: DomId,
        (root, view, pair): (Root, ViewId, bool),
        witnesses: &[Witness],
    ) -> Result<(), XenError> {
        self.put(witnesses.iter().flat_map(|witness| witness.to_words()));
        let request = Binding::new(Action::Set)
            .root(root)
            .view(view)
            .flags(if pair { PAIR } else { 0 })
            // No array, no address.
            .value(if witnesses.is_empty() {
                0
            } else {
                self.data_address()
            })
            .more([witnesses.len() as u64, 0]);
        self.binding(domain, request)?;
        Ok(())
    }

    /// [`Action::Events`].
    pub fn events(&self, domain: DomId) -> Result<Events, XenError> {
        let request = Binding::new(Action::Events)
            .value(self.data_address())
            .more([MAX_EVENTS as u64, 0]);
        let reply = self.binding(domain, request)?;
        let count = usize::try_from(reply.out[0]).unwrap_or(MAX_EVENTS);
        let records = (0..count.min(MAX_EVENTS))
            .map(|index| {
                // SAFETY: the buffer holds MAX_EVENTS records and `index` is below; Xen is done with it, and `&self` is
                // not shared between threads (NonNull is not Sync). Needed: hypercall memory comes from C.
                let bytes = unsafe {
                    let at = self.data.cast::<u8>().add(index * RECORD);
                    at.cast::<[u8; RECORD]>().read()
                };
                Event::from_bytes(&bytes)
            })
            .collect();
        Ok(Events {
            records,
            lost: reply.out[1],
            lapsed: reply.out[2],
            refused: reply.out[3],
            violations: reply.out[4],
        })
    }

    /// [`Action::Remap`], in as many calls as it takes.
    pub fn remap_all(
        &self,
        domain: DomId,
        view: ViewId,
        pages: &[(Gfn, Option<Gfn>)],
        read_only: bool,
    ) -> Result<(), XenError> {
        let flags = if read_only { READ_ONLY } else { 0 };
        let request = Binding::new(Action::Remap).view(view).flags(flags);
        for batch in pages.chunks(BATCH) {
            self.remap(domain, request, batch)?;
        }
        Ok(())
    }

    /// The same for a group, all read-only.
    pub fn remap_group(
        &self,
        domain: DomId,
        view: ViewId,
        pages: &[(Gfn, Option<Gfn>)],
        group: Group,
    ) -> Result<(), XenError> {
        let request = Binding::new(Action::Remap)
            .view(view)
            .flags(READ_ONLY | CHECK | GROUP)
            .root(Root(group.generation))
            .more([0, group.key.0]);
        self.remap(domain, request, pages)
    }

    fn remap(
        &self,
        domain: DomId,
        request: Binding,
        pages: &[(Gfn, Option<Gfn>)],
    ) -> Result<(), XenError> {
        let view = request.view;
        for batch in pages.chunks(MAX_REMAPS) {
            self.put(
                batch
                    .iter()
                    .flat_map(|(gfn, copy)| [gfn.0, copy.map_or(u64::MAX, |copy| copy.0)]),
            );
            let request = request
                .value(self.data_address())
                .more([batch.len() as u64, request.more[1]]);
            self.call(domain, request).map_err(|(error, done)| {
                let at = usize::try_from(done).ok().and_then(|done| batch.get(done));
                match (error, at) {
                    (XenError::Call { errno, .. }, Some((gfn, copy))) => XenError::Call {
                        what: match copy {
                            Some(copy) => format!("mapping frame {copy} at {gfn} in view {view}"),
                            None => format!("mapping the guest's own page at {gfn} in view {view}"),
                        },
                        errno,
                    },
                    (error, _) => error,
                }
            })?;
        }
        Ok(())
    }

    fn data_address(&self) -> u64 {
        self.data.as_ptr().addr() as u64
    }

    /// Writes an array for Xen to read.
    fn put(&self, words: impl Iterator<Item = u64>) {
        for (index, word) in words.enumerate() {
            assert!((index + 1) * 8 <= DATA, "the array fits its buffer");
            // SAFETY: the word lies inside the buffer, as just asserted, which is page-aligned and ours. Needed:
            // hypercall memory comes from C.
            unsafe { self.data.cast::<u64>().add(index).write(word) };
        }
    }

    /// The call itself. With the error comes what Xen left in `out[0]`.
    fn call(&self, domain: DomId, request: Binding) -> Result<BindingReply, (XenError, u64)> {
        let op = RawAltp2mOp {
            version: xc::HVMOP_ALTP2M_INTERFACE_VERSION,
            cmd: ffi::HVMOP_ALTP2M_BINDING,
            domain: domain.0,
            binding: RawBinding {
                action: request.action as u32,
                view: request.view.0,
                flags: request.flags,
                root: request.root.0,
                value: request.value,
                out: [request.more[0], request.more[1], 0, 0, 0],
            },
            ..RawAltp2mOp::default()
        };
        // SAFETY: the buffer is ours, large enough and aligned, and `&self` is not shared between threads (NonNull is
        // not Sync). Needed: hypercall memory comes from C.
        unsafe { self.op.write(op) };
        // SAFETY: Xen reads and writes one `struct xen_hvm_altp2m_op` at the buffer, and an array in `data` that is as
        // long as `out[0]` says and fits it. Needed: it is a hypercall.
        let rc = unsafe {
            ffi::xencall2(
                self.handle.as_ptr(),
                ffi::HYPERVISOR_HVM_OP,
                u64::from(xc::HVMOP_altp2m),
                self.op.as_ptr().addr() as u64,
            )
        };
        let errno = last_errno();
        // SAFETY: as for the write above. Needed: hypercall memory comes from C.
        let reply = unsafe { self.op.read() }.binding;
        if rc < 0 {
            let what = format!(
                "{:?} (view {}, root {}, value {:#x})",
                request.action, request.view, request.root, request.value
            );
            return Err((XenError::Call { what, errno }, reply.out[0]));
        }
        Ok(BindingReply {
            view: ViewId(reply.view),
            flags: reply.flags,
            root: Root(reply.root),
            value: reply.value,
            out: reply.out,
        })
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        free(self.handle, self.op);
        free(self.handle, self.data);
        // SAFETY: the handle is open, its buffers are freed, and it is not used again. Needed: the library is C.
        unsafe { ffi::xencall_close(self.handle.as_ptr()) };
    }
}

/// Memory that the privcmd driver keeps in place, the only kind that Xen can read arguments from.
fn alloc<T>(handle: NonNull<ffi::XenCall>) -> Result<NonNull<T>, XenError> {
    // SAFETY: the handle is open. Hypercall buffers are page-aligned, so the cast keeps the alignment. Needed: the library
    // is C.
    let buffer = unsafe { ffi::xencall_alloc_buffer(handle.as_ptr(), size_of::<T>()) };
    NonNull::new(buffer.cast::<T>()).ok_or_else(|| XenError::Call {
        what: "a hypercall buffer".to_owned(),
        errno: last_errno(),
    })
}

fn free<T>(handle: NonNull<ffi::XenCall>, buffer: NonNull<T>) {
    // SAFETY: the buffer came from this open handle and is freed once, by whoever owns it. Needed: the library is C.
    unsafe { ffi::xencall_free_buffer(handle.as_ptr(), buffer.as_ptr().cast::<c_void>()) };
}
