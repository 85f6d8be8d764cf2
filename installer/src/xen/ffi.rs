//! Declarations that xenctrl-sys lacks: hypercalls, foreign memory, xenstore (xencall.h, xenforeignmemory.h, xenstore.h of
//! Xen 4.17) and the new sub-operation of HVMOP_altp2m.

use std::ffi::{c_char, c_int, c_uint, c_ulong, c_void};

/// `__HYPERVISOR_hvm_op` (xen/include/public/xen.h).
pub const HYPERVISOR_HVM_OP: c_uint = 34;
/// `HVMOP_altp2m_binding` (xen-patches).
pub const HVMOP_ALTP2M_BINDING: u32 = 17;
/// `PROT_READ` and `PROT_WRITE` of mmap(2).
pub const PROT_READ: c_int = 1;
/// See [`PROT_READ`].
pub const PROT_WRITE: c_int = 2;

/// `struct xen_hvm_altp2m_binding`: fills the union of `struct xen_hvm_altp2m_op`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct RawBinding {
    pub action: u32,
    pub view: u16,
    pub flags: u16,
    pub root: u64,
    pub value: u64,
    pub out: [u64; 5],
}

/// `struct xen_hvm_altp2m_op` with the binding in its union.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct RawAltp2mOp {
    pub version: u32,
    pub cmd: u32,
    pub domain: u16,
    pub pad1: u16,
    pub pad2: u32,
    pub binding: RawBinding,
}

// The union is 64 bytes; a larger or smaller struct would be read wrongly by Xen.
const _: () = assert!(size_of::<RawBinding>() == 64);
const _: () = assert!(size_of::<RawAltp2mOp>() == size_of::<xenctrl_sys::xen_hvm_altp2m_op>());
const _: () = assert!(
    std::mem::offset_of!(RawAltp2mOp, binding)
        == std::mem::offset_of!(xenctrl_sys::xen_hvm_altp2m_op, u)
);

/// `xencall_handle`.
#[repr(C)]
pub struct XenCall {
    _opaque: [u8; 0],
}

/// `xenforeignmemory_handle`.
#[repr(C)]
pub struct ForeignMemory {
    _opaque: [u8; 0],
}

/// `struct xs_handle`.
#[repr(C)]
pub struct XenStore {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    pub fn xencall_open(logger: *mut c_void, flags: c_uint) -> *mut XenCall;
    pub fn xencall_close(handle: *mut XenCall) -> c_int;
    pub fn xencall2(handle: *mut XenCall, op: c_uint, arg1: u64, arg2: u64) -> c_int;
    pub fn xencall_alloc_buffer(handle: *mut XenCall, size: usize) -> *mut c_void;
    pub fn xencall_free_buffer(handle: *mut XenCall, buffer: *mut c_void);

    pub fn xenforeignmemory_open(logger: *mut c_void, flags: c_uint) -> *mut ForeignMemory;
    pub fn xenforeignmemory_close(handle: *mut ForeignMemory) -> c_int;
    pub fn xenforeignmemory_map(
        handle: *mut ForeignMemory,
        domain: u32,
        protection: c_int,
        pages: usize,
        frames: *const u64,
        errors: *mut c_int,
    ) -> *mut c_void;
    pub fn xenforeignmemory_unmap(
        handle: *mut ForeignMemory,
        address: *mut c_void,
        pages: usize,
    ) -> c_int;

    pub fn xs_open(flags: c_ulong) -> *mut XenStore;
    pub fn xs_close(handle: *mut XenStore);
    pub fn xs_read(
        handle: *mut XenStore,
        transaction: u32,
        path: *const c_char,
        length: *mut c_uint,
    ) -> *mut c_void;

    pub fn free(pointer: *mut c_void);
}
