//! A loadable module: its file laid out in memory as the kernel's loader does it (kernel/module/main.c), at nominal
//! addresses, so that everything that is known to read a kernel's tables can read a module's.
//!
//! The nominal addresses never leave the hardener: what depends on them is a relocation, kept by what it points to.

mod layout;
mod relocs;

use super::elf::Section;
use super::{Btf, BuildId, Fault, Image, KernelSymbol, Relocs, Segment, notes};
use goblin::elf::header::{EM_X86_64, ET_REL};
use goblin::elf::section_header::{SHF_EXECINSTR, SHT_NOBITS};
use goblin::elf::{Elf, sym};
pub use layout::Arrangement;
use penumbra_bundle::{
    Export, LinkVa, Memory, ModuleReloc, ModuleSection, PerMemory, Place, Target, TextOff, VaRange,
};
use relocs::moved;
pub use relocs::target_address;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Where the text is taken to be: where the module area starts without KASLR (arch/x86/include/asm/pgtable_64_types.h).
pub const TEXT: LinkVa = LinkVa(0xffff_ffff_c000_0000);
const PERCPU: u64 = 0x0100_0000;
/// No module comes near; Debian's largest has 5 MB. Other memories are taken to be so far behind one another.
const MAX_MODULE: u64 = 64 << 20;

/// What the kernel exports, by name.
pub type Exports = HashMap<String, LinkVa>;

/// A module read.
pub struct ModuleImage {
    /// `module.name`.
    pub name: String,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// `.modinfo`.
    pub info: BTreeMap<String, String>,
    /// What the loader allocates.
    pub sections: Vec<ModuleSection>,
    /// How many bytes hold code: whole pages.
    pub text_size: u32,
    /// What the sections take of each memory.
    pub sizes: PerMemory<u32>,
    /// The code before relocation.
    pub text: Vec<u8>,
    /// What relocations point to.
    pub targets: Vec<Target>,
    /// Relocations of the code. Sorted.
    pub relocs: Vec<ModuleReloc>,
    /// What other modules may use.
    pub exports: Vec<Export>,
    /// The module at its nominal addresses, relocated.
    pub image: Image,
}

impl Image {
    /// What `__ksymtab` and `__ksymtab_gpl` hold (include/linux/export.h).
    pub fn exports(&self) -> Result<Exports, Fault> {
        let size = self.btf.size_of("kernel_symbol").unwrap_or(0) as usize;
        let member = |name| self.btf.member("kernel_symbol", name)?.byte();
        let (Some(value), Some(name)) = (member("value_offset"), member("name_offset")) else {
            let what = "does not describe `struct kernel_symbol` with relative members";
            return Err(Fault::unsupported(".BTF", what));
        };
        let mut exports = Exports::new();
        for table in ["__ksymtab", "__ksymtab_gpl"] {
            let Some(section) = self.section(table) else {
                continue;
            };
            let (mut at, end) = (section.range.start.0, section.range.end.0);
            let damaged = || Fault::damaged(table, "an entry leaves the image");
            let next = |at: u64| at.checked_add(size as u64).filter(|next| *next <= end);
            while let Some(behind) = next(at).filter(|_| size > 0) {
                let follow = |member: u32| {
                    let place = at.checked_add(u64::from(member))?;
                    let offset = self.u32_at(LinkVa(place))? as i32;
                    Some(LinkVa(place.wrapping_add_signed(i64::from(offset))))
                };
                let (value, name) = follow(value).zip(follow(name)).ok_or_else(damaged)?;
                exports.insert(self.string(name).ok_or_else(damaged)?, value);
                at = behind;
            }
        }
        Ok(exports)
    }

    fn string(&self, at: LinkVa) -> Option<String> {
        let mut len = 0;
        while *self.at(LinkVa(at.0.checked_add(len)?), 1)?.first()? != 0 {
            len += 1;
            (len < 512).then_some(())?;
        }
        let bytes = self.at(at, len as usize)?;
        Some(String::from_utf8_lossy(bytes).into_owned())
    }
}

/// What reading modules needs of their kernel.
pub struct Host<'a> {
    /// What it exports.
    pub exports: &'a Exports,
    /// Its types.
    pub btf: &'a Arc<Btf>,
    /// How it arranges modules in memory.
    pub arrangement: Arrangement,
    /// Symbols that module code branches to and that are known by name.
    pub thunks: &'a [(String, LinkVa)],
}

/// Reads a `.ko` file, uncompressed.
pub fn read(file: &[u8], host: &Host<'_>) -> Result<ModuleImage, Fault> {
    let elf = Elf::parse(file).map_err(|error| Fault::damaged("ELF headers", error.to_string()))?;
    if elf.header.e_machine != EM_X86_64 || elf.header.e_type != ET_REL {
        let what = "is no x86-64 kernel module (ET_REL)";
        return Err(Fault::not_a_kernel("ELF header", what));
    }
    Loader {
        file,
        elf: &elf,
        host,
        sections: Vec::new(),
        places: Vec::new(),
        memories: PerMemory::default(),
        targets: Vec::new(),
        known: HashMap::new(),
    }
    .load()
}

struct Loader<'a> {
    file: &'a [u8],
    elf: &'a Elf<'a>,
    host: &'a Host<'a>,
    sections: Vec<ModuleSection>,
    /// By section index.
    places: Vec<Option<Place>>,
    /// What each memory holds; nothing of per-CPU memory.
    memories: PerMemory<Vec<u8>>,
    targets: Vec<Target>,
    known: HashMap<Target, u32>,
}

impl Loader<'_> {
    fn load(mut self) -> Result<ModuleImage, Fault> {
        let (text_size, sizes) = self.lay_out()?;
        self.copy()?;
        let text = self.memories[Memory::Text][..text_size as usize].to_vec();
        let applied = self.relocate(text_size)?;
        let info = self.info();
        let name = self.name()?;
        let symbols = self.symbols();
        let exports = self.exports();
        let image = self.image(applied.narrow, applied.wide, symbols)?;
        Ok(ModuleImage {
            name,
            sha256: Sha256::digest(self.file)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
            info,
            text_size,
            sizes,
            text,
            targets: self.targets,
            relocs: applied.text,
            exports,
            sections: self.sections,
            image,
        })
    }

    fn section_name(&self, index: usize) -> &str {
        let header = self.elf.section_headers.get(index);
        header
            .and_then(|header| self.elf.shdr_strtab.get_at(header.sh_name))
            .unwrap_or("")
    }

    fn damaged(&self, index: usize, what: impl Into<String>) -> Fault {
        Fault::damaged(format!("section {}", self.section_name(index)), what)
    }

    fn bytes(&self, index: usize) -> Option<&[u8]> {
        let header = self.elf.section_headers.get(index)?;
        if header.sh_type == SHT_NOBITS {
            return Some(&[]);
        }
        let start = header.sh_offset as usize;
        self.file
            .get(start..start.checked_add(header.sh_size as usize)?)
    }

    fn named(&self, name: &str) -> Option<&[u8]> {
        let index = (0..self.places.len()).find(|index| self.section_name(*index) == name)?;
        self.bytes(index)
    }

    /// `move_module`.
    fn copy(&mut self) -> Result<(), Fault> {
        for index in 0..self.places.len() {
            let Some(place) = self.places[index] else {
                continue;
            };
            let bytes = self.bytes(index);
            let bytes = bytes.ok_or_else(|| self.damaged(index, "leaves the file"))?;
            let bytes = bytes.to_vec();
            if place.memory != Memory::PerCpu {
                let at = place.at as usize;
                self.memories[place.memory][at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
        Ok(())
    }

    fn info(&self) -> BTreeMap<String, String> {
        let text = String::from_utf8_lossy(self.named(".modinfo").unwrap_or_default());
        let pairs = text.split('\0').filter_map(|pair| pair.split_once('='));
        // Of several (`alias`, `parm`) the first one; none of those is used.
        let mut info = BTreeMap::new();
        for (key, value) in pairs {
            info.entry(key.to_owned())
                .or_insert_with(|| value.to_owned());
        }
        info
    }

    /// `struct module` is in the file, with its name.
    fn name(&self) -> Result<String, Fault> {
        let section = ".gnu.linkonce.this_module";
        let at = self.host.btf.member("module", "name");
        let at = at.and_then(|member| member.byte()).unwrap_or(0) as usize;
        let bytes = self.named(section).and_then(|bytes| bytes.get(at..));
        let name = bytes.and_then(|bytes| bytes.split(|byte| *byte == 0).next());
        let name = name.filter(|name| !name.is_empty() && name.len() < 56);
        let name = name.and_then(|name| std::str::from_utf8(name).ok());
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        name.filter(|name| name.bytes().all(plain))
            .map(str::to_owned)
            .ok_or_else(|| Fault::damaged(section, "holds no module name"))
    }

    fn symbols(&self) -> Vec<KernelSymbol> {
        let mut symbols: Vec<KernelSymbol> = self
            .elf
            .syms
            .iter()
            .filter(|symbol| symbol.st_type() <= sym::STT_FUNC)
            .filter_map(|symbol| {
                let name = self.elf.strtab.get_at(symbol.st_name)?;
                let place = self.places.get(symbol.st_shndx).copied().flatten()?;
                let place = moved(place, u32::try_from(symbol.st_value).ok()?)?;
                let header = &self.elf.section_headers[symbol.st_shndx];
                let exec = header.sh_flags & u64::from(SHF_EXECINSTR) != 0;
                let kind = if exec { b't' } else { b'd' };
                (!name.is_empty()).then(|| KernelSymbol {
                    va: nominal(place),
                    kind,
                    name: name.to_owned(),
                })
            })
            .collect();
        symbols.sort_by(|a, b| (a.va, &a.name).cmp(&(b.va, &b.name)));
        symbols
    }

    /// `EXPORT_SYMBOL` makes `__ksymtab_NAME` beside `NAME`.
    fn exports(&self) -> Vec<Export> {
        let mut places = BTreeMap::new();
        let mut wanted = Vec::new();
        for symbol in self.elf.syms.iter() {
            let Some(name) = self.elf.strtab.get_at(symbol.st_name) else {
                continue;
            };
            if let Some(name) = name.strip_prefix("__ksymtab_") {
                wanted.push(name);
            }
            let place = self.places.get(symbol.st_shndx).copied().flatten();
            let offset = u32::try_from(symbol.st_value).ok();
            if symbol.st_bind() != sym::STB_LOCAL
                && let Some(place) = place.and_then(|place| moved(place, offset?))
            {
                places.insert(name, place);
            }
        }
        wanted.sort_unstable();
        wanted.dedup();
        wanted
            .into_iter()
            .filter_map(|name| {
                Some(Export {
                    name: name.to_owned(),
                    place: *places.get(name)?,
                })
            })
            .collect()
    }

    fn image(
        &self,
        narrow: Vec<LinkVa>,
        wide: Vec<LinkVa>,
        symbols: Vec<KernelSymbol>,
    ) -> Result<Image, Fault> {
        let mut bytes = Vec::new();
        let starts = PerMemory::new(|memory| {
            let start = bytes.len();
            bytes.extend(&self.memories[memory]);
            start
        });
        let inside = self.sections.iter();
        let inside = inside.filter(|section| section.place.memory != Memory::PerCpu);
        let sections = inside.map(|section| {
            let file = starts[section.place.memory] + section.place.at as usize;
            let start = nominal(section.place);
            Section {
                name: section.name.clone(),
                range: VaRange {
                    start,
                    end: LinkVa(start.0 + u64::from(section.size)),
                },
                file: file..file + section.size as usize,
                alloc: true,
                exec: section.flags & u64::from(SHF_EXECINSTR) != 0,
            }
        });
        let by_name = symbols
            .iter()
            .rev()
            .map(|symbol| (symbol.name.clone(), symbol.va))
            .chain(self.host.thunks.iter().cloned())
            .collect();
        let segments = self.memories.iter().map(|(memory, bytes)| Segment {
            va: nominal(Place::new(memory, 0)).0,
            // Nothing of a module is found by physical address.
            pa: u64::MAX,
            file: starts[memory]..starts[memory] + bytes.len(),
        });
        let note = ".note.gnu.build-id";
        let build_id: BuildId = match self.named(note) {
            Some(bytes) => notes::build_id(bytes)?,
            None => {
                let what = "the section is missing; a module is recognised by it";
                return Err(Fault::unsupported(note, what));
            }
        };
        Ok(Image {
            sha256: String::new(),
            packing: "none",
            segments: segments.collect(),
            sections: sections.collect(),
            relocs: Relocs {
                abs32: narrow,
                inverse32: Vec::new(),
                abs64: wide,
            },
            symbols,
            by_name,
            btf: Arc::clone(self.host.btf),
            build_id,
            bytes,
        })
    }
}

/// Where a place is taken to be.
pub fn nominal(place: Place) -> LinkVa {
    let base = match place.memory {
        Memory::PerCpu => PERCPU,
        memory => TEXT.0 + memory as u64 * MAX_MODULE,
    };
    LinkVa(base + u64::from(place.at))
}

/// The offset in a text of `size` bytes that is taken to be at `va`.
pub fn text_offset(va: LinkVa, size: u32) -> Option<TextOff> {
    let at = u32::try_from(va.0.checked_sub(TEXT.0)?).ok()?;
    (at < size).then_some(TextOff(at))
}
