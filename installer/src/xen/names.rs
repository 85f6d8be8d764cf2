//! Domain names, from xenstore (`/local/domain/ID/name`).

use super::real::Control;
use super::{Domain, XenError, ffi};
use crate::exit::{Exit, Exits};
use std::ffi::{CString, c_void};
use std::ptr::NonNull;
use thiserror::Error;

/// Longest name that is believed.
const MAX_NAME: usize = 256;

/// Why a domain cannot be found.
#[derive(Debug, Error)]
pub enum ResolveError {
    /// Xen cannot be asked.
    #[error(transparent)]
    Xen(#[from] XenError),
    /// No such domain.
    #[error("no domain is called `{wanted}`; these run: {known}")]
    Unknown {
        /// What was asked for.
        wanted: String,
        /// What there is.
        known: String,
    },
    /// Dom0 is not a guest.
    #[error("domain 0 is the control domain itself; name a PVH guest")]
    Dom0,
}

impl Exits for ResolveError {
    fn exit(&self) -> Exit {
        match self {
            ResolveError::Xen(error) => error.exit(),
            ResolveError::Unknown { .. } | ResolveError::Dom0 => Exit::Cannot,
        }
    }
}

/// All domains but dom0, with their names.
pub fn list() -> Result<Vec<(Domain, String)>, XenError> {
    let control = Control::open()?;
    let store = Store::open();
    let mut found = Vec::new();
    let mut next = 1;
    while let Some(domain) = control.next_domain(next)? {
        next = u32::from(domain.id.0) + 1;
        let name = store
            .as_ref()
            .and_then(|store| store.read(&format!("/local/domain/{}/name", domain.id)))
            .unwrap_or_else(|| format!("domain {}", domain.id));
        found.push((domain, name));
    }
    Ok(found)
}

/// Finds a domain by name or id.
pub fn resolve(wanted: &str) -> Result<(Domain, String), ResolveError> {
    if matches!(wanted, "0" | "Domain-0") {
        return Err(ResolveError::Dom0);
    }
    let domains = list()?;
    let id = wanted.parse::<u16>().ok();
    let known = domains
        .iter()
        .map(|(domain, name)| format!("{name} ({})", domain.id))
        .collect::<Vec<_>>()
        .join(", ");
    domains
        .into_iter()
        .find(|(domain, name)| name == wanted || Some(domain.id.0) == id)
        .ok_or_else(|| ResolveError::Unknown {
            wanted: wanted.escape_default().to_string(),
            known: if known.is_empty() {
                "none".to_owned()
            } else {
                known
            },
        })
}

struct Store(NonNull<ffi::XenStore>);

impl Store {
    /// Opens xenstore; `None` where it does not answer, which costs only the names.
    fn open() -> Option<Store> {
        // SAFETY: no flag is set; the call has no other argument. Needed: the library is C.
        NonNull::new(unsafe { ffi::xs_open(0) }).map(Store)
    }

    fn read(&self, path: &str) -> Option<String> {
        let path = CString::new(path).ok()?;
        let mut length = 0;
        // SAFETY: the path is a C string and the length a valid place, both alive across the call; transaction 0 is none.
        // Needed: the library is C.
        let value = unsafe { ffi::xs_read(self.0.as_ptr(), 0, path.as_ptr(), &mut length) };
        let value = NonNull::new(value.cast::<u8>())?;
        let length = usize::try_from(length).ok()?.min(MAX_NAME);
        // SAFETY: xs_read returns a buffer of at least `length` bytes that nobody else uses. Needed: it is malloc'ed by C.
        let bytes = unsafe { std::slice::from_raw_parts(value.as_ptr(), length) }.to_vec();
        // SAFETY: xenstore.h: the caller frees it; it is not used again. Needed: it is malloc'ed by C.
        unsafe { ffi::free(value.as_ptr().cast::<c_void>()) };
        String::from_utf8(bytes).ok()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the handle is open and not used again. Needed: the library is C.
        unsafe { ffi::xs_close(self.0.as_ptr()) };
    }
}
