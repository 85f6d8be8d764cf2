//! The cave: thunks and tables, laid out for one guest.

use crate::exit::{Exit, Exits};
use crate::guest::explain::ReturnForm;
use crate::guest::forms::{self, JMP, add32};
use crate::guest::{GuestMemory, ReadError, Slide};
use crate::xen::{GuestVa, Hypervisor, PAGE, XenError};
use object::{Object, ObjectSection};
use penumbra_bundle::{Bundle, LinkVa, RelocKind, TextOff};
use thiserror::Error;

/// Why a cave cannot be laid out.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum CaveError {
    /// The file is no ELF file that can be read.
    #[error("{file}: {detail}; emit the bundle again")]
    Malformed {
        /// The file.
        file: String,
        /// What and where.
        detail: String,
    },
}

impl Exits for CaveError {
    fn exit(&self) -> Exit {
        Exit::Cannot
    }
}

/// Why a cave cannot be written.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum CaveWriteError {
    /// An address does not translate.
    #[error("the cave is not mapped in the guest: {0}")]
    Read(#[from] ReadError),
    /// A frame cannot be written.
    #[error("the cave at {va}: {source}")]
    Write {
        /// Where.
        va: GuestVa,
        /// What Xen said.
        source: XenError,
    },
}

/// What stands in the cave of one guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaveImage {
    /// Where it starts in the text.
    pub at: TextOff,
    /// Its bytes; filler between thunks and tables.
    pub bytes: Vec<u8>,
}

impl CaveImage {
    /// Lays out `cave.elf`, relocates it, and ends every thunk as the guest's own functions end.
    pub fn new(bundle: &Bundle, slide: Slide, returns: ReturnForm) -> Result<CaveImage, CaveError> {
        let cave = &bundle.manifest.cave;
        let fail = |detail: String| CaveError::Malformed {
            file: cave.file.name.clone(),
            detail,
        };
        let elf = object::File::parse(&*bundle.cave).map_err(|error| fail(error.to_string()))?;
        // The bundle's reader checked that the cave lies in the text, which has at most 256 MiB.
        let room = cave.range.len() as usize;
        let mut bytes = vec![cave.filler; room];
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for section in elf.sections() {
            // SHF_ALLOC (gABI): only such sections are there at run time.
            let object::SectionFlags::Elf { sh_flags } = section.flags() else {
                continue;
            };
            if sh_flags & u64::from(object::elf::SHF_ALLOC) == 0 || section.size() == 0 {
                continue;
            }
            let name = section.name().unwrap_or("a section").to_owned();
            let data = section
                .data()
                .map_err(|error| fail(format!("{name}: {error}")))?;
            let start = section.address();
            let end = start.wrapping_add(data.len() as u64);
            if start < cave.range.start.0 || end > cave.range.end.0 || end < start {
                return Err(fail(format!("{name} at {start:#x} leaves the cave")));
            }
            if taken.iter().any(|(from, to)| start < *to && *from < end) {
                return Err(fail(format!(
                    "{name} at {start:#x} overlaps another section"
                )));
            }
            taken.push((start, end));
            let at = (start - cave.range.start.0) as usize;
            bytes[at..at + data.len()].copy_from_slice(data);
        }
        let used = taken.iter().map(|(_, end)| end - cave.range.start.0).max();
        bytes.truncate(used.unwrap_or(0) as usize);
        let mut image = CaveImage {
            at: TextOff((cave.range.start.0 - bundle.manifest.text.start.0) as u32),
            bytes,
        };
        image.relocate(bundle, slide)?;
        image.set_tails(bundle, returns)?;
        Ok(image)
    }

    fn field(&mut self, bundle: &Bundle, at: LinkVa, len: usize) -> Result<&mut [u8], CaveError> {
        let start = at.0.wrapping_sub(bundle.manifest.cave.range.start.0);
        usize::try_from(start)
            .ok()
            .and_then(|start| self.bytes.get_mut(start..start.checked_add(len)?))
            .ok_or_else(|| CaveError::Malformed {
                file: penumbra_bundle::MANIFEST.to_owned(),
                detail: format!("cave: {at} lies outside what cave.elf fills"),
            })
    }

    fn relocate(&mut self, bundle: &Bundle, slide: Slide) -> Result<(), CaveError> {
        for (at, kind) in bundle.cave_relocs() {
            match kind {
                // Truncation to 32 bits is what the relocation does.
                RelocKind::Abs32 => add32(self.field(bundle, at, 4)?, slide.0 as u32),
                RelocKind::Inverse32 => {
                    add32(self.field(bundle, at, 4)?, (slide.0 as u32).wrapping_neg())
                }
                RelocKind::Abs64 => {
                    let field = self.field(bundle, at, 8)?;
                    let mut old = [0; 8];
                    old.copy_from_slice(field);
                    let new = u64::from_le_bytes(old).wrapping_add(slide.0);
                    field.copy_from_slice(&new.to_le_bytes());
                }
            }
        }
        Ok(())
    }

    fn set_tails(&mut self, bundle: &Bundle, returns: ReturnForm) -> Result<(), CaveError> {
        for tail in &bundle.manifest.cave.return_tails {
            let at = TextOff((tail.0.wrapping_sub(bundle.manifest.text.start.0)) as u32);
            let field = self.field(bundle, *tail, 5)?;
            let target = forms::branch_target(JMP, at, field)
                .and_then(|target| u32::try_from(target).ok())
                .map(TextOff);
            let thunks = &bundle.model.return_thunks;
            if target.is_none_or(|to| thunks.binary_search(&to).is_err()) {
                return Err(CaveError::Malformed {
                    file: bundle.manifest.cave.file.name.clone(),
                    detail: format!("the return tail at {tail} is no jump to a return thunk"),
                });
            }
            field.copy_from_slice(&returns.bytes(at));
        }
        Ok(())
    }

    /// Its first byte in the guest.
    pub fn start(&self, bundle: &Bundle, slide: Slide) -> GuestVa {
        slide
            .guest(bundle.manifest.text.start)
            .offset(u64::from(self.at.0))
    }
}

/// Writes `bytes` at `va`, page by page, through the frames behind it.
pub fn write(
    hypervisor: &dyn Hypervisor,
    memory: &GuestMemory<'_>,
    va: GuestVa,
    bytes: &[u8],
) -> Result<(), CaveWriteError> {
    let mut writes = Vec::new();
    let mut done = 0;
    while done < bytes.len() {
        let at = va.offset(done as u64);
        let len = (PAGE - at.in_page()).min(bytes.len() - done);
        let gfn = memory.translate(at)?.gfn();
        writes.push((gfn, at.in_page(), &bytes[done..done + len]));
        done += len;
    }
    hypervisor
        .write_all(&writes)
        .map_err(|source| CaveWriteError::Write { va, source })
}
