//! Guest frames mapped into this process, kept until [`Frames::clear`].
//!
//! A mapping holds the machine frame that the guest had when it was made, so it goes stale when the guest gives the
//! frame back; callers clear between passes. No Rust reference into a mapping is ever made: the guest writes there at
//! any time, so bytes go in and out by volatile accesses only.

use super::ffi;
use super::{DomId, Errno, Gfn, PAGE, XenError};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ffi::{c_int, c_void};
use std::ptr::NonNull;

/// Most frames in one mapping call: keeps the argument arrays small.
const BATCH: usize = 512;
/// Most frames kept: 64 MiB of address space. More are mapped after the oldest are dropped.
const KEPT: usize = 16384;

/// Maps frames of one domain.
pub struct Frames {
    handle: NonNull<ffi::ForeignMemory>,
    domain: DomId,
    cache: RefCell<Cache>,
}

#[derive(Default)]
struct Cache {
    regions: Vec<Region>,
    by_gfn: HashMap<Gfn, NonNull<u8>>,
    /// Frames read since the last refresh.
    used: HashSet<Gfn>,
}

struct Region {
    address: NonNull<c_void>,
    pages: usize,
}

impl Frames {
    /// Opens the interface; fails where there is no /dev/xen/privcmd.
    pub fn open(domain: DomId) -> Result<Frames, XenError> {
        let logger = super::real::quiet().cast::<c_void>();
        // SAFETY: the logger lives for ever. Needed: the library is C.
        let handle = unsafe { ffi::xenforeignmemory_open(logger, 0) };
        Ok(Frames {
            handle: NonNull::new(handle).ok_or_else(|| XenError::NoXen {
                what: "xenforeignmemory_open",
                errno: super::real::last_errno(),
            })?,
            domain,
            cache: RefCell::default(),
        })
    }

    /// Copies out of a frame.
    pub fn read(&self, gfn: Gfn, offset: usize, buf: &mut [u8]) -> Result<(), XenError> {
        assert!(offset + buf.len() <= PAGE, "a read stays in its frame");
        let known = self.cache.borrow().by_gfn.get(&gfn).copied();
        let page = match known {
            Some(page) => page,
            None => {
                self.prefetch(&[gfn]);
                let cache = self.cache.borrow();
                *cache.by_gfn.get(&gfn).ok_or(XenError::NoFrame(gfn))?
            }
        };
        self.cache.borrow_mut().used.insert(gfn);
        // SAFETY: `page` is a live read mapping of PAGE bytes (regions are unmapped only in `clear`, which also empties
        // `by_gfn`, and nothing clears between the lookup and here), and the range was asserted to lie inside.
        // Needed: guest memory changes under us, so it cannot be a slice.
        unsafe { copy_out(page.as_ptr().add(offset), buf) };
        Ok(())
    }

    /// Copies into a frame, through a mapping of its own.
    pub fn write(&self, gfn: Gfn, offset: usize, bytes: &[u8]) -> Result<(), XenError> {
        self.write_all(&[(gfn, offset, bytes)])
    }

    /// Copies into many frames, in few mapping calls; each write is a frame, an offset in it and bytes.
    pub fn write_all(&self, writes: &[(Gfn, usize, &[u8])]) -> Result<(), XenError> {
        for batch in writes.chunks(BATCH) {
            let frames: Vec<Gfn> = batch.iter().map(|(gfn, _, _)| *gfn).collect();
            let (region, errors) = self.map(&frames, ffi::PROT_READ | ffi::PROT_WRITE)?;
            let mut result = Ok(());
            for (index, (gfn, offset, bytes)) in batch.iter().enumerate() {
                assert!(offset + bytes.len() <= PAGE, "a write stays in its frame");
                if errors[index] != 0 {
                    result = Err(XenError::NoFrame(*gfn));
                    break;
                }
                // SAFETY: the mapping is writable, has a page per element of the batch and lives until `unmap` below; the
                // range inside the page was asserted. Needed: as in `read`.
                unsafe {
                    let page = region.address.cast::<u8>().as_ptr().add(index * PAGE);
                    copy_in(page.add(*offset), bytes);
                }
            }
            self.unmap(&region);
            result?;
        }
        Ok(())
    }

    /// Maps those of `frames` that are not mapped yet, in few calls. A frame that is not there is passed over.
    pub fn prefetch(&self, frames: &[Gfn]) {
        if self.cache.borrow().by_gfn.len() + frames.len() > KEPT {
            self.clear();
        }
        let mut missing: Vec<Gfn> = {
            let cache = self.cache.borrow();
            frames
                .iter()
                .copied()
                .filter(|gfn| !cache.by_gfn.contains_key(gfn))
                .collect()
        };
        missing.sort_unstable();
        missing.dedup();
        for batch in missing.chunks(BATCH) {
            // A batch that cannot be mapped at all shows as frames that are not there when they are read.
            let Ok((region, errors)) = self.map(batch, ffi::PROT_READ) else {
                continue;
            };
            let mut cache = self.cache.borrow_mut();
            for (index, gfn) in batch.iter().enumerate() {
                if errors[index] == 0 {
                    // SAFETY: `index` is below the region's page count, so the address stays inside the mapping.
                    // Needed: one mapping holds many frames.
                    let page = unsafe { region.address.cast::<u8>().add(index * PAGE) };
                    cache.by_gfn.insert(*gfn, page);
                }
            }
            cache.regions.push(region);
        }
    }

    /// Maps the frames that were read since the last refresh anew, in few calls, and drops all others.
    pub fn refresh(&self) {
        let used: Vec<Gfn> = self.cache.borrow_mut().used.drain().collect();
        self.clear();
        self.prefetch(&used);
    }

    /// Unmaps everything.
    pub fn clear(&self) {
        let cache = std::mem::take(&mut *self.cache.borrow_mut());
        for region in &cache.regions {
            self.unmap(region);
        }
    }

    fn map(&self, frames: &[Gfn], protection: c_int) -> Result<(Region, Vec<c_int>), XenError> {
        let numbers: Vec<u64> = frames.iter().map(|gfn| gfn.0).collect();
        let mut errors = vec![0; frames.len()];
        // SAFETY: both arrays have `frames.len()` elements, as xenforeignmemory_map demands, and live across the call;
        // with an error array the call reports a missing frame per element instead of failing.
        // Needed: the library is C.
        let address = unsafe {
            ffi::xenforeignmemory_map(
                self.handle.as_ptr(),
                u32::from(self.domain.0),
                protection,
                frames.len(),
                numbers.as_ptr(),
                errors.as_mut_ptr(),
            )
        };
        match NonNull::new(address) {
            Some(address) => Ok((
                Region {
                    address,
                    pages: frames.len(),
                },
                errors,
            )),
            None => match super::real::last_errno() {
                Errno::FAULT | Errno::NOENT | Errno::INVAL => Err(XenError::NoFrame(frames[0])),
                errno => Err(XenError::Call {
                    what: format!("mapping {} frames from {}", frames.len(), frames[0]),
                    errno,
                }),
            },
        }
    }

    fn unmap(&self, region: &Region) {
        // SAFETY: the region came from `map` with this page count and is unmapped once: `clear` takes it out of the
        // cache first and `write` owns its own. Needed: the library is C.
        let rc = unsafe {
            ffi::xenforeignmemory_unmap(self.handle.as_ptr(), region.address.as_ptr(), region.pages)
        };
        // munmap of a range that mmap returned fails only for arguments that were never mapped: our error.
        assert_eq!(rc, 0, "a mapped region unmaps");
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        self.clear();
        // SAFETY: the handle is open and not used again. Needed: the library is C.
        unsafe { ffi::xenforeignmemory_close(self.handle.as_ptr()) };
    }
}

/// Copies from guest memory: whole aligned words where it can, so that a pointer that the guest is writing is read old or
/// new and never half of each.
///
/// # Safety
/// `from` must be readable for `to.len()` bytes.
unsafe fn copy_out(from: *const u8, to: &mut [u8]) {
    let mut at = 0;
    while at < to.len() {
        let left = to.len() - at;
        // SAFETY: `at` is below the length that the caller vouches for.
        let source = unsafe { from.add(at) };
        if source.addr().is_multiple_of(8) && left >= 8 {
            // SAFETY: aligned, and eight bytes are left.
            let word = unsafe { source.cast::<u64>().read_volatile() };
            to[at..at + 8].copy_from_slice(&word.to_ne_bytes());
            at += 8;
        } else {
            // SAFETY: one byte is left.
            to[at] = unsafe { source.read_volatile() };
            at += 1;
        }
    }
}

/// Copies into guest memory, in the same way.
///
/// # Safety
/// `to` must be writable for `from.len()` bytes.
unsafe fn copy_in(to: *mut u8, from: &[u8]) {
    let mut at = 0;
    while at < from.len() {
        // SAFETY: `at` is below the length that the caller vouches for.
        let target = unsafe { to.add(at) };
        if let (true, Some(word)) = (
            target.addr().is_multiple_of(8),
            from[at..].first_chunk::<8>(),
        ) {
            // SAFETY: aligned, and eight bytes are left.
            unsafe {
                target
                    .cast::<u64>()
                    .write_volatile(u64::from_ne_bytes(*word));
            }
            at += 8;
        } else {
            // SAFETY: one byte is left.
            unsafe { target.write_volatile(from[at]) };
            at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{copy_in, copy_out};

    #[test]
    fn copies_any_alignment_and_length() {
        let source: Vec<u8> = (0..64).collect();
        for start in 0..16 {
            for len in 0..40 {
                let mut out = vec![0xaa; len];
                // SAFETY: 16 + 40 is below 64.
                unsafe { copy_out(source.as_ptr().add(start), &mut out) };
                assert_eq!(out, source[start..start + len]);
                let mut target = vec![0xee; 64];
                // SAFETY: as above.
                unsafe { copy_in(target.as_mut_ptr().add(start), &out) };
                assert_eq!(target[start..start + len], out[..]);
                assert!(target[..start].iter().all(|byte| *byte == 0xee));
                assert!(target[start + len..].iter().all(|byte| *byte == 0xee));
            }
        }
    }
}
