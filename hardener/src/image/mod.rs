//! The kernel image: unpacked, its tables, symbols, types and relocations read.
//!
//! Everything read here is hostile until checked: sizes are bounded, every offset is looked up with a bounds check, and what
//! does not fit is refused with its place.

mod btf;
mod bzimage;
mod elf;
mod fault;
pub(crate) mod kallsyms;
pub mod module;
mod notes;
mod read;
mod relocs;
pub(crate) mod system_map;
mod tables;
mod unpack;

pub use btf::{Btf, Member};
pub use elf::{Section, Segment};
pub use fault::{Fault, FaultKind, ImageError};
pub use notes::BuildId;
pub use read::Reader;
pub use relocs::Relocs;
pub use tables::{
    AltEntry, ConstantValue, JumpEntry, ParavirtSite, RuntimeConstant, StaticCallSite, Tables,
};

use penumbra_bundle::{LinkVa, VaRange};
use sha2::{Digest, Sha256};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

/// Where Linux maps physical address 0 for its own image (`__START_KERNEL_map`, arch/x86/include/asm/page_64_types.h).
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// The largest image file that is read.
const MAX_FILE: u64 = 512 << 20;
/// More symbols than any kernel has; a bound on memory.
const MAX_SYMBOLS: usize = 1 << 21;
/// No symbol name is longer when unpacked (`KSYM_NAME_LEN` is 512).
const MAX_NAME: usize = 1024;

/// The files that a kernel is read from.
#[derive(Clone, Copy, Debug)]
pub struct KernelFiles<'a> {
    /// A bzImage or an ELF `vmlinux`.
    pub image: &'a Path,
    /// Its `System.map`: the symbols of an image that names none itself.
    pub system_map: Option<&'a Path>,
}

impl<'a, P: AsRef<Path> + ?Sized> From<&'a P> for KernelFiles<'a> {
    fn from(image: &'a P) -> KernelFiles<'a> {
        KernelFiles {
            image: image.as_ref(),
            system_map: None,
        }
    }
}

/// A symbol of the kernel: address, kind as `nm` prints it, name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KernelSymbol {
    /// Link address.
    pub va: LinkVa,
    /// `t`, `T`, `d`, `w` and the like.
    pub kind: u8,
    /// Its name; names repeat.
    pub name: String,
}

impl KernelSymbol {
    /// Whether it names code (weak ones among it).
    pub fn is_code(&self) -> bool {
        matches!(self.kind, b't' | b'T' | b'w' | b'W')
    }
}

/// An unpacked kernel image.
pub struct Image {
    /// SHA-256 of the file that was read, in hexadecimal.
    pub sha256: String,
    /// How the kernel was packed: `gzip`, `xz`, `lz4`, `zstd` or `none`.
    pub packing: &'static str,
    bytes: Vec<u8>,
    segments: Vec<Segment>,
    sections: Vec<Section>,
    /// Places that KASLR relocates.
    pub relocs: Relocs,
    /// All symbols by address.
    pub symbols: Vec<KernelSymbol>,
    by_name: HashMap<String, LinkVa>,
    /// The image's own type information.
    pub btf: Arc<Btf>,
    /// Build-id and release.
    pub build_id: BuildId,
}

impl Image {
    /// Reads a bzImage or an ELF `vmlinux`, with its `System.map` if there is one.
    pub fn open<'a>(files: impl Into<KernelFiles<'a>>) -> Result<Image, ImageError> {
        let files = files.into();
        let bytes = read_file(files.image, MAX_FILE)?;
        let bad = |path: &Path| {
            let file = path.display().to_string();
            |fault| ImageError::Bad { file, fault }
        };
        let Some(path) = files.system_map else {
            return Image::parse(bytes).map_err(bad(files.image));
        };
        let map = system_map::read(&read_file(path, system_map::MAX_FILE)?).map_err(bad(path))?;
        let image = Image::parse_with(bytes, &map).map_err(bad(files.image))?;
        system_map::agrees(&map, &image.symbols).map_err(bad(path))?;
        Ok(image)
    }

    /// Reads an image from the bytes of its file.
    pub fn parse(file: Vec<u8>) -> Result<Image, Fault> {
        Image::parse_with(file, &[])
    }

    /// Reads an image from the bytes of its file; if it has no symbols, those of its `map` are its own.
    fn parse_with(file: Vec<u8>, map: &[KernelSymbol]) -> Result<Image, Fault> {
        let sha256 = Sha256::digest(&file)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let (bytes, packing) = unpack_file(file)?;
        let elf = elf::read(&bytes)?;
        let mut lacks = Lacks::default();
        let relocs = lacks.note(relocs::read(&bytes, elf.end))?;
        let mut image = Image {
            sha256,
            packing,
            segments: elf.segments,
            sections: elf.sections,
            relocs,
            symbols: elf.symbols,
            by_name: HashMap::new(),
            btf: Arc::default(),
            build_id: BuildId::default(),
            bytes,
        };
        // Names and types need nothing of each other.
        let (symbols, btf) = rayon::join(
            || {
                let rodata = image.section_bytes(".rodata").unwrap_or_default();
                image.symbols.is_empty().then(|| kallsyms::read(rodata))
            },
            || image.need_section(".BTF").and_then(Btf::parse),
        );
        if let Some(found) = symbols {
            image.symbols = match found {
                Err(fault) if fault.kind == FaultKind::Unsupported && !map.is_empty() => {
                    map.to_vec()
                }
                found => lacks.note(found)?,
            };
        }
        image
            .symbols
            .sort_by(|a, b| (a.va, &a.name).cmp(&(b.va, &b.name)));
        // The first of several wins: the names that are looked up by name are global and unique.
        for symbol in image.symbols.iter().rev() {
            image.by_name.insert(symbol.name.clone(), symbol.va);
        }
        image.btf = Arc::new(lacks.note(btf)?);
        let build_id = image.need_section(".notes").and_then(notes::build_id);
        image.build_id = lacks.note(build_id)?;
        for (name, why) in tables::NEEDED {
            lacks.note(image.need_table(name, why).map(drop))?;
        }
        lacks.none()?;
        Ok(image)
    }

    /// The section called `name`.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// All sections.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The bytes of the section called `name`; empty when it occupies no file space, `None` when it is not there.
    pub fn section_bytes(&self, name: &str) -> Option<&[u8]> {
        let section = self.section(name)?;
        self.bytes.get(section.file.clone())
    }

    fn need_section(&self, name: &str) -> Result<&[u8], Fault> {
        self.section_bytes(name).ok_or_else(|| {
            Fault::unsupported(
                name,
                "the section is missing; Penumbra needs a kernel built with CONFIG_DEBUG_INFO_BTF, as Debian's are",
            )
        })
    }

    /// The `len` bytes that the kernel has at `va` before it runs; `None` when the file has not all of them.
    pub fn at(&self, va: LinkVa, len: usize) -> Option<&[u8]> {
        let start = self.file_offset(va)?;
        self.bytes
            .get(start.start..start.start.checked_add(len)?)
            .filter(|_| start.start + len <= start.end)
    }

    /// Where `va` stands in the file, to the end of its segment's bytes.
    fn file_offset(&self, va: LinkVa) -> Option<std::ops::Range<usize>> {
        let by = |base: fn(&Segment) -> u64, at: u64| {
            self.segments.iter().find_map(|segment| {
                let inside = at.checked_sub(base(segment))?;
                (inside < segment.file.len() as u64)
                    .then(|| segment.file.start + inside as usize..segment.file.end)
            })
        };
        by(|segment| segment.va, va.0)
            // Per-cpu data is linked at 0 and loaded by its physical address.
            .or_else(|| by(|segment| segment.pa, va.0.checked_sub(START_KERNEL_MAP)?))
    }

    /// The 64-bit word at `va`.
    pub fn u64_at(&self, va: LinkVa) -> Option<u64> {
        Some(u64::from_le_bytes(self.at(va, 8)?.try_into().ok()?))
    }

    /// The 32-bit word at `va`.
    pub fn u32_at(&self, va: LinkVa) -> Option<u32> {
        Some(u32::from_le_bytes(self.at(va, 4)?.try_into().ok()?))
    }

    /// The address of the symbol called `name` (the lowest when several share it).
    pub fn symbol(&self, name: &str) -> Option<LinkVa> {
        self.by_name.get(name).copied()
    }

    /// The address of a symbol that Penumbra cannot do without.
    pub fn need_symbol(&self, name: &str) -> Result<LinkVa, Fault> {
        self.symbol(name).ok_or_else(|| {
            Fault::unsupported(
                "symbols",
                format!("`{name}` is missing; Penumbra needs a kernel built with CONFIG_KALLSYMS_ALL, as Debian's are"),
            )
        })
    }

    /// Where a per-CPU variable stands, as an offset from a CPU's GS base: a symbol of its own, or in Linux 6.2 to 6.14 a member
    /// of `pcpu_hot`.
    pub fn per_cpu(&self, symbol: &str, member: &str) -> Result<LinkVa, Fault> {
        if let Some(va) = self.symbol(symbol) {
            return Ok(va);
        }
        let hot = self.need_symbol("pcpu_hot")?;
        let found = self.btf.member("pcpu_hot", member);
        let at = found.and_then(|found| hot.checked_add(u64::from(found.byte()?)));
        at.ok_or_else(|| Fault::unsupported(".BTF", format!("`struct pcpu_hot` has no `{member}`")))
    }

    /// The range from one symbol to another.
    pub fn between(&self, start: &str, end: &str) -> Result<VaRange, Fault> {
        let range = VaRange {
            start: self.need_symbol(start)?,
            end: self.need_symbol(end)?,
        };
        if range.start > range.end {
            return Err(Fault::damaged(
                "symbols",
                format!("`{start}` lies after `{end}`"),
            ));
        }
        Ok(range)
    }

    /// The kernel's banner, as /proc/version prints it.
    pub fn banner(&self) -> Result<String, Fault> {
        let va = self.need_symbol("linux_banner")?;
        let bytes = self
            .at(va, 512)
            .and_then(|bytes| bytes.split(|byte| *byte == 0).next())
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .filter(|banner| banner.starts_with("Linux version "));
        bytes
            .map(|banner| banner.trim_end().to_owned())
            .ok_or_else(|| Fault::damaged("linux_banner", "does not start with `Linux version `"))
    }
}

/// The bytes of a file that has at most `max`.
fn read_file(path: &Path, max: u64) -> Result<Vec<u8>, ImageError> {
    let name = || path.display().to_string();
    let io = |source| ImageError::Io {
        file: name(),
        source,
    };
    let file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(max + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > max {
        return Err(ImageError::Bad {
            file: name(),
            fault: Fault::not_a_kernel("file", format!("is larger than {} MiB", max >> 20)),
        });
    }
    Ok(bytes)
}

/// What a kernel does not have: all of it is said at once.
#[derive(Default)]
pub(crate) struct Lacks(Vec<Fault>);

impl Lacks {
    /// Goes on with nothing where something is not there, and fails where something is wrong.
    pub(crate) fn note<T: Default>(&mut self, found: Result<T, Fault>) -> Result<T, Fault> {
        found.or_else(|fault| match fault.kind {
            FaultKind::Unsupported => {
                self.0.push(fault);
                Ok(T::default())
            }
            _ => Err(fault),
        })
    }

    /// Fails when anything is not there.
    pub(crate) fn none(mut self) -> Result<(), Fault> {
        let mut seen = HashSet::new();
        self.0.retain(|fault| seen.insert(fault.to_string()));
        match self.0.len() {
            0 => Ok(()),
            1 => Err(self.0.remove(0)),
            count => {
                let each = self.0.iter().map(|fault| format!("\n  {fault}"));
                let detail = format!("lacks {count} things:{}", each.collect::<String>());
                Err(Fault::unsupported("the kernel", detail))
            }
        }
    }
}

/// The ELF file in `file`, which is a bzImage or that ELF file itself, and how it was packed.
fn unpack_file(file: Vec<u8>) -> Result<(Vec<u8>, &'static str), Fault> {
    if file.starts_with(b"\x7fELF") {
        return Ok((file, "none"));
    }
    unpack::unpack(bzimage::payload(&file)?)
}

/// A module's ELF file in `file`, which may be packed as distributions do (`.ko.xz`, `.ko.gz`, `.ko.zst`).
pub fn unpacked_module(file: Vec<u8>) -> Result<Vec<u8>, Fault> {
    unpack::module(file)
}

/// The ELF file in `file`, nothing more: what the checker shares with the emitter.
pub fn unpacked(file: Vec<u8>) -> Result<Vec<u8>, Fault> {
    Ok(unpack_file(file)?.0)
}

#[cfg(test)]
impl Image {
    /// An image of one segment and no tables, for tests.
    pub(crate) fn synthetic(va: LinkVa, bytes: Vec<u8>) -> Image {
        Image {
            sha256: String::new(),
            packing: "none",
            segments: vec![Segment {
                va: va.0,
                pa: va.0 - START_KERNEL_MAP,
                file: 0..bytes.len(),
            }],
            sections: vec![],
            relocs: Relocs::default(),
            symbols: vec![],
            by_name: HashMap::new(),
            btf: Arc::default(),
            build_id: BuildId::default(),
            bytes,
        }
    }
}
