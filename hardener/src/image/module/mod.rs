//! A loadable module: its file laid out in memory as the loader of Linux 6.1 does it (kernel/module/main.c), at nominal
//! addresses, so that everything that is known to read a kernel's tables can read a module's.
//!
//! The nominal addresses never leave the hardener: what depends on them is a relocation, kept by what it points to.

mod relocs;

use super::elf::Section;
use super::{Btf, BuildId, Fault, Image, KernelSymbol, Relocs, Segment, notes};
use goblin::elf::header::{EM_X86_64, ET_REL};
use goblin::elf::section_header::{SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE, SHT_NOBITS};
use goblin::elf::{Elf, sym};
use penumbra_bundle::{Export, LinkVa, ModuleReloc, ModuleSection, Place, Target, VaRange};
use relocs::moved;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Where core memory is taken to be: where the module area starts without KASLR (arch/x86/include/asm/pgtable_64_types.h).
pub const CORE: u64 = 0xffff_ffff_c000_0000;
const INIT: u64 = 0xffff_ffff_d000_0000;
const PERCPU: u64 = 0x0100_0000;
/// No module comes near; Debian's largest has 5 MB.
const MAX_MODULE: u64 = 64 << 20;
/// A flag of the loader itself (include/linux/module.h, `SHF_RO_AFTER_INIT`).
const SHF_RO_AFTER_INIT: u64 = 0x0020_0000;
const PAGE: u32 = 4096;

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
    /// Whole pages of core memory that hold code.
    pub text_size: u32,
    /// What the sections take of core memory.
    pub core_size: u32,
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
        core: Vec::new(),
        init: Vec::new(),
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
    core: Vec<u8>,
    init: Vec<u8>,
    targets: Vec<Target>,
    known: HashMap<Target, u32>,
}

impl Loader<'_> {
    fn load(mut self) -> Result<ModuleImage, Fault> {
        let (text_size, core_size) = self.lay_out()?;
        self.copy()?;
        let text = self.core[..text_size as usize].to_vec();
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
            core_size,
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

    /// `layout_sections`: executable sections first, then read-only ones, those that are read-only after initialisation,
    /// writable ones; each kind in the file's order.
    fn lay_out(&mut self) -> Result<(u32, u32), Fault> {
        let headers = &self.elf.section_headers;
        let alloc = u64::from(SHF_ALLOC);
        let flags: Vec<u64> = headers
            .iter()
            .enumerate()
            .map(|(index, header)| match self.section_name(index) {
                // `rewrite_section_headers`, `setup_load_info`: not kept with the module.
                "__versions" | ".modinfo" | ".data..percpu" => header.sh_flags & !alloc,
                // `module_mark_ro_after_init`.
                ".data..ro_after_init" | "__jump_table" => header.sh_flags | SHF_RO_AFTER_INIT,
                _ => header.sh_flags,
            })
            .collect();
        let masks = [
            (alloc | u64::from(SHF_EXECINSTR), 0),
            (alloc, u64::from(SHF_WRITE)),
            (alloc | SHF_RO_AFTER_INIT, 0),
            (alloc | u64::from(SHF_WRITE), 0),
            (alloc, 0),
        ];
        self.places = vec![None; headers.len()];
        let (mut text_size, mut core_size) = (0, 0);
        for init in [false, true] {
            let mut size: u64 = 0;
            for (kind, (wanted, unwanted)) in masks.into_iter().enumerate() {
                for (index, header) in headers.iter().enumerate() {
                    // `module_init_layout_section` with CONFIG_MODULE_UNLOAD.
                    let is_init = self.section_name(index).starts_with(".init");
                    let fits = flags[index] & wanted == wanted && flags[index] & unwanted == 0;
                    if !fits || is_init != init || self.places[index].is_some() {
                        continue;
                    }
                    let align = header.sh_addralign.max(1);
                    if !align.is_power_of_two() || align > u64::from(PAGE) {
                        let what = format!("is aligned to {align}");
                        return Err(self.damaged(index, what));
                    }
                    let at = size.next_multiple_of(align);
                    size = at.saturating_add(header.sh_size);
                    if size > MAX_MODULE {
                        return Err(self.damaged(index, "makes the module too large"));
                    }
                    let at = at as u32;
                    let place = if init {
                        Place::Init(at)
                    } else {
                        Place::Core(at)
                    };
                    self.places[index] = Some(place);
                }
                // `strict_align`: code, read-only data and what is read-only later end with their page.
                if kind < 3 {
                    size = size.next_multiple_of(u64::from(PAGE));
                }
                if kind == 0 && !init {
                    text_size = size as u32;
                }
            }
            if !init {
                core_size = size as u32;
            }
            let memory = if init { &mut self.init } else { &mut self.core };
            memory.resize(size as usize, 0);
        }
        for (index, header) in headers.iter().enumerate() {
            let name = self.section_name(index).to_owned();
            if name == ".data..percpu" {
                self.places[index] = Some(Place::PerCpu(0));
            }
            if let Some(place) = self.places[index] {
                self.sections.push(ModuleSection {
                    name,
                    flags: flags[index],
                    size: header.sh_size as u32,
                    align: header.sh_addralign.max(1) as u32,
                    place,
                });
            }
        }
        Ok((text_size, core_size))
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
            let (memory, at) = match place {
                Place::Core(at) => (&mut self.core, at),
                Place::Init(at) => (&mut self.init, at),
                Place::PerCpu(_) => continue,
            };
            memory[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
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
        let core = self.core.len();
        let sections = self.sections.iter().filter_map(|section| {
            let file = match section.place {
                Place::Core(at) => at as usize,
                Place::Init(at) => core + at as usize,
                Place::PerCpu(_) => return None,
            };
            let start = nominal(section.place);
            Some(Section {
                name: section.name.clone(),
                range: VaRange {
                    start,
                    end: LinkVa(start.0 + u64::from(section.size)),
                },
                file: file..file + section.size as usize,
                alloc: true,
                exec: section.flags & u64::from(SHF_EXECINSTR) != 0,
            })
        });
        let by_name = symbols
            .iter()
            .rev()
            .map(|symbol| (symbol.name.clone(), symbol.va))
            .chain(self.host.thunks.iter().cloned())
            .collect();
        let segment = |va, file: std::ops::Range<usize>| Segment {
            va,
            // Nothing of a module is found by physical address.
            pa: u64::MAX,
            file,
        };
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
            segments: vec![
                segment(CORE, 0..core),
                segment(INIT, core..core + self.init.len()),
            ],
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
            bytes: [&self.core[..], &self.init[..]].concat(),
        })
    }
}

fn nominal(place: Place) -> LinkVa {
    match place {
        Place::Core(at) => LinkVa(CORE + u64::from(at)),
        Place::Init(at) => LinkVa(INIT + u64::from(at)),
        Place::PerCpu(at) => LinkVa(PERCPU + u64::from(at)),
    }
}
