//! Typed reads of the guest's kernel memory by virtual address.

use super::walk::{self, Levels, WalkError};
use crate::xen::{Gfn, GuestPa, GuestVa, Hypervisor, PAGE, XenError};
use std::cell::RefCell;
use std::collections::HashMap;
use thiserror::Error;

/// Why guest memory cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ReadError {
    /// The address does not translate.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// The frame cannot be read.
    #[error("{va}: {source}")]
    Frame {
        /// The address.
        va: GuestVa,
        /// What Xen said.
        source: XenError,
    },
}

/// The guest's memory through one set of page tables.
///
/// Translations are remembered until [`GuestMemory::forget`]; one object serves one pass over the guest.
pub struct GuestMemory<'a> {
    hypervisor: &'a dyn Hypervisor,
    root: GuestPa,
    levels: Levels,
    known: RefCell<HashMap<GuestVa, Gfn>>,
}

impl<'a> GuestMemory<'a> {
    /// Memory as the tables at `root` map it.
    pub fn new(hypervisor: &'a dyn Hypervisor, root: GuestPa, levels: Levels) -> Self {
        GuestMemory {
            hypervisor,
            root,
            levels,
            known: RefCell::default(),
        }
    }

    /// Forgets translations.
    pub fn forget(&self) {
        self.known.borrow_mut().clear();
    }

    /// Where `va` lies in guest-physical memory.
    pub fn translate(&self, va: GuestVa) -> Result<GuestPa, ReadError> {
        Ok(walk::translate(
            self.hypervisor,
            self.root,
            self.levels,
            va,
        )?)
    }

    /// The same, from what is remembered.
    pub fn locate(&self, va: GuestVa) -> Result<GuestPa, ReadError> {
        let frame = self.frame(va.page())?;
        Ok(GuestPa(frame.base().0 + va.in_page() as u64))
    }

    /// All of one guest-physical frame.
    pub fn frame_bytes(&self, gfn: Gfn) -> Result<Vec<u8>, XenError> {
        let mut bytes = vec![0; PAGE];
        self.hypervisor.read(gfn, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn frame(&self, page: GuestVa) -> Result<Gfn, ReadError> {
        if let Some(gfn) = self.known.borrow().get(&page) {
            return Ok(*gfn);
        }
        let gfn = self.translate(page)?.gfn();
        self.known.borrow_mut().insert(page, gfn);
        Ok(gfn)
    }

    /// Fills `buf` from `va` on.
    pub fn read(&self, va: GuestVa, buf: &mut [u8]) -> Result<(), ReadError> {
        let mut done = 0;
        while done < buf.len() {
            let at = va.offset(done as u64);
            let offset = at.in_page();
            let len = (PAGE - offset).min(buf.len() - done);
            let gfn = self.frame(at.page())?;
            self.hypervisor
                .read(gfn, offset, &mut buf[done..done + len])
                .map_err(|source| ReadError::Frame { va: at, source })?;
            done += len;
        }
        Ok(())
    }

    /// `len` bytes; the caller bounds `len`.
    pub fn bytes(&self, va: GuestVa, len: usize) -> Result<Vec<u8>, ReadError> {
        let mut bytes = vec![0; len];
        self.read(va, &mut bytes)?;
        Ok(bytes)
    }

    /// A little-endian 64-bit value.
    pub fn u64(&self, va: GuestVa) -> Result<u64, ReadError> {
        let mut bytes = [0; 8];
        self.read(va, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A little-endian 32-bit value.
    pub fn u32(&self, va: GuestVa) -> Result<u32, ReadError> {
        let mut bytes = [0; 4];
        self.read(va, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// A pointer; not yet known to point anywhere.
    pub fn pointer(&self, va: GuestVa) -> Result<GuestVa, ReadError> {
        self.u64(va).map(GuestVa)
    }

    /// The frames of `pages` pages from `va` on.
    pub fn frames(&self, va: GuestVa, pages: usize) -> Result<Vec<Gfn>, ReadError> {
        (0..pages)
            .map(|index| self.frame(va.offset((index * PAGE) as u64)))
            .collect()
    }
}
