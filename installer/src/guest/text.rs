//! Reads the guest's text as it runs.

use super::kernel::Kernel;
use super::memory::ReadError;
use crate::xen::{Gfn, GuestVa, Hypervisor, PAGE};
use penumbra_bundle::Manifest;

/// The running text: its bytes, and the frame behind each page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RunningText {
    /// Where it starts.
    pub start: GuestVa,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// One frame a page.
    pub frames: Vec<Gfn>,
}

impl RunningText {
    /// Reads all of it. The guest runs on: two pages may be of different moments.
    pub fn read(
        hypervisor: &dyn Hypervisor,
        kernel: &Kernel,
        manifest: &Manifest,
    ) -> Result<RunningText, ReadError> {
        let memory = kernel.memory(hypervisor);
        let start = kernel.slide.guest(manifest.text.start);
        // A bundle's text is at most 256 MiB (checked when it was read).
        let len = usize::try_from(manifest.text.range().len()).unwrap_or(0);
        let frames = memory.frames(start, len / PAGE)?;
        hypervisor.prefetch(&frames);
        let mut text = RunningText {
            start,
            bytes: vec![0; len],
            frames,
        };
        text.reread_all(hypervisor)?;
        Ok(text)
    }

    /// Reads all of it again.
    pub fn reread_all(&mut self, hypervisor: &dyn Hypervisor) -> Result<(), ReadError> {
        for page in 0..self.frames.len() {
            self.reread(hypervisor, page)?;
        }
        Ok(())
    }

    /// Reads all of it again; returns what the pages that have changed held before, by page number.
    pub fn reread_changed(
        &mut self,
        hypervisor: &dyn Hypervisor,
    ) -> Result<Vec<(usize, Vec<u8>)>, ReadError> {
        let mut changed = Vec::new();
        let mut before = vec![0; PAGE];
        for page in 0..self.frames.len() {
            before.copy_from_slice(self.page(page));
            self.reread(hypervisor, page)?;
            if self.page(page) != before {
                changed.push((page, before.clone()));
            }
        }
        Ok(changed)
    }

    /// The bytes of one page.
    pub fn page(&self, page: usize) -> &[u8] {
        &self.bytes[page * PAGE..][..PAGE]
    }

    /// Reads one page again, from the same frame: kernel text does not move.
    pub fn reread(&mut self, hypervisor: &dyn Hypervisor, page: usize) -> Result<(), ReadError> {
        let bytes = &mut self.bytes[page * PAGE..(page + 1) * PAGE];
        hypervisor
            .read(self.frames[page], 0, bytes)
            .map_err(|source| ReadError::Frame {
                va: self.start.offset((page * PAGE) as u64),
                source,
            })
    }
}
