//! Finds the guest's kernel without its help: slide from LSTAR, tables from CR3, build-id from its notes.

use super::layout::{self, MissingName};
use super::memory::{GuestMemory, ReadError};
use super::walk::{Levels, WalkError};
use crate::exit::{Exit, Exits};
use crate::xen::{Errno, GuestPa, GuestVa, Hypervisor, Root, Vcpu, XenError};
use penumbra_bundle::{LinkVa, Manifest};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// KASLR moves the kernel by multiples of this (CONFIG_PHYSICAL_ALIGN).
const SLIDE_STEP: u64 = 2 << 20;
/// and by less than this (KERNEL_IMAGE_SIZE, arch/x86/include/asm/page_64_types.h).
const SLIDE_MAX: u64 = 1 << 30;
/// More vCPUs than Xen gives a guest.
const MAX_VCPUS: u32 = 512;
/// Notes are a few hundred bytes; a manifest that claims more is not read.
const MAX_NOTES: u64 = 64 << 10;
/// `NT_GNU_BUILD_ID` (elf.h).
const NT_GNU_BUILD_ID: u32 = 3;

/// How far KASLR moved the kernel: guest address minus link address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slide(pub u64);

impl Slide {
    /// Where a link address is in the guest.
    pub fn guest(self, va: LinkVa) -> GuestVa {
        GuestVa(va.0.wrapping_add(self.0))
    }
}

/// Why the kernel is not found, or is not the bundle's.
#[derive(Debug, Error)]
pub enum FindError {
    /// Xen refused.
    #[error(transparent)]
    Xen(#[from] XenError),
    /// The manifest lacks a name.
    #[error(transparent)]
    Missing(#[from] MissingName),
    /// No vCPU has a syscall entry yet.
    #[error(
        "the guest has set no syscall entry (LSTAR is 0): its kernel is still booting; try again when it is up"
    )]
    NotBooted,
    /// vCPUs disagree.
    #[error(
        "vCPUs have different syscall entries ({0:#x} and {1:#x}); something in the guest took over LSTAR, this kernel cannot be explained"
    )]
    TwoEntries(u64, u64),
    /// No slide of this kernel gives that entry.
    #[error(
        "this bundle is for another kernel: the guest enters system calls at {lstar:#x}, which is no 2 MiB slide of {entry} ({release}, build-id {build_id}); emit a bundle from the guest's own vmlinuz"
    )]
    OtherEntry {
        /// What LSTAR holds.
        lstar: u64,
        /// The bundle's entry.
        entry: LinkVa,
        /// The bundle's kernel.
        release: String,
        /// The bundle's build-id.
        build_id: String,
    },
    /// The build-id differs.
    #[error(
        "this bundle is for another kernel: the guest's build-id is {found}, the bundle's is {expected} ({release}); emit a bundle from the guest's own vmlinuz"
    )]
    OtherBuild {
        /// The guest's.
        found: String,
        /// The bundle's.
        expected: String,
        /// The bundle's kernel.
        release: String,
    },
    /// No vCPU's tables map the kernel.
    #[error("no vCPU's page tables map the kernel's text at {0}; is the guest running?")]
    Unmapped(GuestVa),
    /// Memory cannot be read.
    #[error("{what}: {source}; the guest's memory does not look like this kernel's")]
    Read {
        /// What was being read.
        what: &'static str,
        /// Where and why.
        source: ReadError,
    },
}

impl Exits for FindError {
    fn exit(&self) -> Exit {
        match self {
            FindError::Xen(error) => error.exit(),
            _ => Exit::Cannot,
        }
    }
}

/// A kernel that was found and is the bundle's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Kernel {
    /// How far it was moved.
    pub slide: Slide,
    /// The kernel's own page tables (`init_top_pgt`): they map all of the kernel, whatever process runs.
    pub root: GuestPa,
    /// Their depth.
    pub levels: Levels,
    /// Where it enters system calls.
    pub entry: GuestVa,
    /// Where its notes are.
    pub notes: GuestVa,
    /// How many bytes of them.
    pub notes_len: u64,
}

impl Kernel {
    /// The guest's memory as its kernel sees it.
    pub fn memory<'a>(&self, hypervisor: &'a dyn Hypervisor) -> GuestMemory<'a> {
        GuestMemory::new(hypervisor, self.root, self.levels)
    }

    /// Finds the kernel that `manifest` is for.
    pub fn find(hypervisor: &dyn Hypervisor, manifest: &Manifest) -> Result<Kernel, FindError> {
        let vcpus = vcpus(hypervisor)?;
        let slide = slide(&vcpus, manifest)?;
        let text = slide.guest(manifest.text.start);
        let (through, levels) = vcpus
            .iter()
            .filter_map(|vcpu| {
                let levels = Levels::from_cr4(vcpu.cr4);
                // Page-table isolation keeps the user's tables in the next page (Linux, PTI_PGTABLE_SWITCH_BIT): bit 12
                // clear is the kernel's half.
                let root = GuestPa(Root::from_cr3(vcpu.cr3).0 & !0x1000);
                let plain = GuestPa(Root::from_cr3(vcpu.cr3).0);
                [root, plain].into_iter().find_map(|root| {
                    let memory = GuestMemory::new(hypervisor, root, levels);
                    memory.translate(text).is_ok().then_some((memory, levels))
                })
            })
            .next()
            .ok_or(FindError::Unmapped(text))?;
        check_build_id(&through, slide, manifest)?;
        let top = layout::data(manifest, slide, "init_top_pgt")?;
        let root = through.translate(top).map_err(|source| FindError::Read {
            what: "init_top_pgt",
            source,
        })?;
        Ok(Kernel {
            slide,
            root,
            levels,
            entry: slide.guest(manifest.kernel.syscall_entry),
            notes: slide.guest(manifest.kernel.notes.start),
            notes_len: manifest.kernel.notes.len().min(MAX_NOTES),
        })
    }

    /// Whether the guest still runs this kernel, whose build-id is `build_id`: after kexec it runs another one, or this one
    /// elsewhere.
    pub fn still_runs(
        &self,
        hypervisor: &dyn Hypervisor,
        build_id: &str,
    ) -> Result<bool, XenError> {
        let vcpus = vcpus(hypervisor)?;
        // A vCPU that is being brought up has none yet.
        let mut entries = vcpus.iter().map(|vcpu| vcpu.lstar).filter(|at| *at != 0);
        if !entries.all(|at| at == self.entry.0) || vcpus.iter().all(|vcpu| vcpu.lstar == 0) {
            return Ok(false);
        }
        match read_build_id(&self.memory(hypervisor), self.notes, self.notes_len) {
            Ok(found) => Ok(found.as_deref() == Some(build_id)),
            // Xen that does not answer says nothing about the guest; memory that is not there does.
            Err(
                ReadError::Walk(WalkError::Table { source, .. }) | ReadError::Frame { source, .. },
            ) if !matches!(source, XenError::NoFrame(_)) => Err(source),
            Err(_) => Ok(false),
        }
    }
}

/// The registers of every vCPU that is up.
pub fn vcpus(hypervisor: &dyn Hypervisor) -> Result<Vec<Vcpu>, XenError> {
    let domain = hypervisor.domain()?;
    let mut found = Vec::new();
    for index in 0..=domain.max_vcpu.min(MAX_VCPUS) {
        match hypervisor.vcpu(index) {
            Ok(vcpu) => found.push(vcpu),
            // Xen has no context of a vCPU that is down.
            Err(error) if error.is(Errno::NOENT) || error.is(Errno::NODATA) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn slide(vcpus: &[Vcpu], manifest: &Manifest) -> Result<Slide, FindError> {
    let mut entries = vcpus
        .iter()
        .map(|vcpu| vcpu.lstar)
        .filter(|lstar| *lstar != 0);
    let lstar = entries.next().ok_or(FindError::NotBooted)?;
    if let Some(other) = entries.find(|other| *other != lstar) {
        return Err(FindError::TwoEntries(lstar, other));
    }
    let kernel = &manifest.kernel;
    let slide = lstar.wrapping_sub(kernel.syscall_entry.0);
    if !slide.is_multiple_of(SLIDE_STEP) || slide >= SLIDE_MAX {
        return Err(FindError::OtherEntry {
            lstar,
            entry: kernel.syscall_entry,
            release: kernel.release.clone(),
            build_id: kernel.build_id.clone(),
        });
    }
    Ok(Slide(slide))
}

fn check_build_id(
    memory: &GuestMemory<'_>,
    slide: Slide,
    manifest: &Manifest,
) -> Result<(), FindError> {
    let notes = manifest.kernel.notes;
    let found = read_build_id(memory, slide.guest(notes.start), notes.len())
        .map_err(|source| FindError::Read {
            what: "the kernel's notes",
            source,
        })?
        .unwrap_or_else(|| "not there".to_owned());
    if found == manifest.kernel.build_id {
        Ok(())
    } else {
        Err(FindError::OtherBuild {
            found,
            expected: manifest.kernel.build_id.clone(),
            release: manifest.kernel.release.clone(),
        })
    }
}

fn read_build_id(
    memory: &GuestMemory<'_>,
    notes: GuestVa,
    len: u64,
) -> Result<Option<String>, ReadError> {
    let len = usize::try_from(len.min(MAX_NOTES)).unwrap_or(0);
    Ok(build_id(&memory.bytes(notes, len)?))
}

/// The GNU build-id in a run of notes (System V gABI, "Note Section"; name and descriptor padded to 4 bytes).
pub(crate) fn build_id(notes: &[u8]) -> Option<String> {
    let word = |at: usize| {
        let bytes = notes.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    let mut at = 0;
    // Each round takes at least the 12 bytes of a header, so this ends with the notes.
    while let (Some(name), Some(desc), Some(kind)) = (word(at), word(at + 4), word(at + 8)) {
        let name_at = at + 12;
        let desc_at = name_at.checked_add((name as usize).next_multiple_of(4))?;
        let end = desc_at.checked_add(desc as usize)?;
        let name = notes.get(name_at..name_at + name as usize)?;
        let desc = notes.get(desc_at..end)?;
        if kind == NT_GNU_BUILD_ID && name == b"GNU\0" {
            return Some(desc.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        at = end.next_multiple_of(4);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::build_id;

    fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        note.extend((name.len() as u32).to_le_bytes());
        note.extend((desc.len() as u32).to_le_bytes());
        note.extend(kind.to_le_bytes());
        for part in [name, desc] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    #[test]
    fn build_id_behind_other_notes() {
        let mut notes = note(b"Xen\0", 6, b"linux");
        notes.extend(note(b"Linux\0", 3, &[9; 7]));
        notes.extend(note(b"GNU\0", 3, &[0xab, 0xcd]));
        assert_eq!(build_id(&notes).as_deref(), Some("abcd"));
    }

    #[test]
    fn hostile_notes_end() {
        assert_eq!(build_id(&[0xff; 64]), None);
        assert_eq!(build_id(&[0; 64]), None);
        let mut cut = note(b"GNU\0", 3, &[1; 20]);
        cut.truncate(20);
        assert_eq!(build_id(&cut), None);
    }
}
