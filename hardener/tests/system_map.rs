//! Kernels whose symbols are elsewhere than in kallsyms: in a `System.map`, in `.symtab`. The bundle is the same.
#![allow(missing_docs, reason = "a test")]

mod common;

use hardener::check::Checker;
use hardener::emit::emit;
use hardener::image::{Image, KernelFiles, KernelSymbol, unpacked};
use hardener::recipe::Recipe;
use penumbra_bundle::{Bundle, MANIFEST};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;
use tempfile::TempDir;

/// The cloud kernel, its symbols, and what it is without them.
struct Scene {
    folder: TempDir,
    vmlinux: Vec<u8>,
    stripped: Vec<u8>,
    symbols: Vec<KernelSymbol>,
    files: BTreeMap<String, Vec<u8>>,
}

fn scene() -> &'static Scene {
    static MADE: OnceLock<Scene> = OnceLock::new();
    MADE.get_or_init(|| {
        let vmlinux = unpacked(fs::read(common::cloud()).unwrap()).unwrap();
        let image = Image::parse(vmlinux.clone()).unwrap();
        let stripped = without_kallsyms(&image, &vmlinux);
        let files = bundle(common::cloud()).seal();
        Scene {
            folder: tempfile::tempdir().unwrap(),
            vmlinux,
            stripped,
            symbols: image.symbols,
            files,
        }
    })
}

/// The kernel with zeros where the tokens of kallsyms are: among them is one for each digit.
fn without_kallsyms(image: &Image, vmlinux: &[u8]) -> Vec<u8> {
    let rodata = image.section(".rodata").unwrap().file.clone();
    let digits = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
    let mut hits = memchr::memmem::find_iter(&vmlinux[rodata.clone()], digits);
    let blanked = hits.find_map(|hit| {
        let mut blanked = vmlinux.to_vec();
        blanked[rodata.start + hit..][..2048].fill(0);
        let fault = Image::parse(blanked.clone()).err()?;
        (fault.place == "kallsyms").then_some(blanked)
    });
    blanked.expect("tables of kallsyms")
}

impl Scene {
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn map(&self) -> String {
        self.symbols.iter().map(line).collect()
    }
}

/// As `nm` prints it.
fn line(symbol: &KernelSymbol) -> String {
    let kind = char::from(symbol.kind);
    format!("{:016x} {kind} {}\n", symbol.va.0, symbol.name)
}

fn bundle<'a>(files: impl Into<KernelFiles<'a>>) -> Bundle {
    emit(files, &Recipe::default(), &mut |_| {}).unwrap_or_else(|error| panic!("{error}"))
}

/// What emitter and checker say of a kernel that neither takes.
fn refused(files: KernelFiles<'_>) -> [String; 2] {
    let emitter = emit(files, &Recipe::default(), &mut |_| {}).err();
    let checker = Checker::open(files).err();
    [
        emitter.expect("the emitter takes it").to_string(),
        checker.expect("the checker takes it").to_string(),
    ]
}

/// The bundle of `files` is that of the kernel as shipped, the image's digest aside, and is proved against `files`.
fn is_the_same(files: KernelFiles<'_>) {
    let mut bundle = bundle(files);
    let outcome = Checker::open(files).unwrap().check(&bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
    let found = bundle.seal();
    let expected = &scene().files;
    assert!(found.keys().eq(expected.keys()));
    for (name, bytes) in expected.iter().filter(|(name, _)| *name != MANIFEST) {
        assert!(found[name] == *bytes, "{name} differs");
    }
    let said = |files: &BTreeMap<String, Vec<u8>>| {
        let mut manifest: serde_json::Value = serde_json::from_slice(&files[MANIFEST]).unwrap();
        manifest["kernel"]["image_sha256"].take();
        manifest
    };
    assert_eq!(said(&found), said(expected));
}

#[test]
fn a_vmlinux_without_symbols_and_its_system_map_make_the_same_bundle() {
    let scene = scene();
    let image = scene.file("stripped", &scene.stripped);
    let map = scene.file("System.map-stripped", scene.map().as_bytes());
    for said in refused(KernelFiles::from(&image)) {
        assert!(
            said.contains("stripped: kallsyms: ") && said.contains("System.map"),
            "{said}"
        );
    }
    is_the_same(KernelFiles {
        image: &image,
        system_map: Some(&map),
    });
}

#[test]
fn a_vmlinux_with_a_symbol_table_makes_the_same_bundle() {
    let scene = scene();
    let image = scene.file("symtab", &with_symtab(&scene.stripped, &scene.symbols));
    is_the_same(KernelFiles::from(&image));
}

#[test]
fn a_system_map_that_agrees_changes_nothing() {
    let scene = scene();
    let map = scene.file("System.map-same", scene.map().as_bytes());
    let files = KernelFiles {
        image: common::cloud(),
        system_map: Some(&map),
    };
    assert!(bundle(files).seal() == scene.files);
    assert!(Checker::open(files).is_ok());
}

#[test]
fn a_system_map_of_another_kernel_is_refused_by_the_symbol() {
    let scene = scene();
    let symbol = scene
        .symbols
        .iter()
        .find(|symbol| symbol.name == "vfs_read");
    let line = format!("{:016x} T vfs_read", symbol.unwrap().va.0);
    let moved = scene.map().replace(&line, "ffffffff81234560 T vfs_read");
    let map = scene.file("System.map-other", moved.as_bytes());
    let image = scene.file("whole", &scene.vmlinux);
    for image in [common::cloud(), &image] {
        let files = KernelFiles {
            image,
            system_map: Some(&map),
        };
        for said in refused(files) {
            let names = said.contains("System.map-other: ") && said.contains("`vfs_read`");
            assert!(names && said.contains("0xffffffff81234560"), "{said}");
        }
    }
}

#[test]
fn a_line_that_is_no_symbol_is_named_with_its_file() {
    let scene = scene();
    let image = scene.file("stripped-too", &scene.stripped);
    for (bad, why) in [
        ("ffffffff81000000 T", "name"),
        ("zz T a", "hexadecimal"),
        ("1 T b c", "name"),
    ] {
        let map = scene.file(
            "System.map-bad",
            format!("ffffffff81000000 T a\n{bad}\n").as_bytes(),
        );
        let files = KernelFiles {
            image: &image,
            system_map: Some(&map),
        };
        for said in refused(files) {
            let place = said.contains("System.map-bad: ") && said.contains("line 2 ");
            assert!(place || said.contains("line 2: "), "{said}");
            assert!(said.to_lowercase().contains(why), "{said}");
        }
    }
}

#[test]
fn all_symbols_that_a_kernel_lacks_are_said_at_once() {
    let scene = scene();
    let image = scene.file("stripped-again", &scene.stripped);
    let lacking = [
        "panic",
        "poking_mm",
        "__start_mcount_loc",
        "__entry_text_start",
    ];
    let kept = |symbol: &&KernelSymbol| !lacking.contains(&symbol.name.as_str());
    let map: String = scene.symbols.iter().filter(kept).map(line).collect();
    let map = scene.file("System.map-lacking", map.as_bytes());
    let files = KernelFiles {
        image: &image,
        system_map: Some(&map),
    };
    let said = emit(files, &Recipe::default(), &mut |_| {}).err();
    let said = said.expect("the emitter takes it").to_string();
    assert!(
        said.contains("stripped-again: the kernel: lacks 4 things:"),
        "{said}"
    );
    for name in lacking {
        assert_eq!(said.matches(&format!("`{name}`")).count(), 1, "{said}");
    }
}

/// `vmlinux` with `.symtab` and `.strtab` between its own sections and the relocations behind them.
fn with_symtab(vmlinux: &[u8], symbols: &[KernelSymbol]) -> Vec<u8> {
    let elf = goblin::elf::Elf::parse(vmlinux).unwrap();
    let header = elf.header;
    let headers = header.e_shoff as usize;
    let end = headers + usize::from(header.e_shnum) * 64;
    let section = |va: u64| {
        let holds = |one: &goblin::elf::SectionHeader| {
            one.is_alloc() && va >= one.sh_addr && va - one.sh_addr < one.sh_size.max(1)
        };
        elf.section_headers.iter().position(holds)
    };
    let (mut table, mut strings) = (vec![0; 24], vec![0]);
    for symbol in symbols {
        // What is in no section any more is absolute (SHN_ABS), as per-cpu offsets are.
        let index = section(symbol.va.0).map_or(0xfff1, |index| index as u16);
        let bind = match symbol.kind {
            b'w' | b'W' => 2,
            kind => u8::from(kind.is_ascii_uppercase()),
        };
        table.extend((strings.len() as u32).to_le_bytes());
        table.extend([bind << 4 | if symbol.is_code() { 2 } else { 1 }, 0]);
        table.extend(index.to_le_bytes());
        table.extend(symbol.va.0.to_le_bytes());
        table.extend(0u64.to_le_bytes());
        strings.extend(symbol.name.bytes());
        strings.push(0);
    }
    let mut out = vmlinux[..end].to_vec();
    out.resize(out.len().next_multiple_of(8), 0);
    let at = [out.len(), out.len() + table.len()];
    let sizes = [table.len(), strings.len()];
    out.extend(table);
    out.extend(strings);
    out.resize(out.len().next_multiple_of(8), 0);
    let moved = out.len() as u64;
    out.extend(&vmlinux[headers..end]);
    // Name, type, flags, address, offset, size, link, info, alignment, entry size (System V gABI, section header).
    for (n, (kind, entry)) in [(2u32, 24u64), (3, 0)].into_iter().enumerate() {
        out.extend([0u32, kind].iter().flat_map(|word| word.to_le_bytes()));
        out.extend(
            [0, 0, at[n] as u64, sizes[n] as u64]
                .iter()
                .flat_map(|word| word.to_le_bytes()),
        );
        out.extend(
            [u32::from(header.e_shnum) + 1, 1]
                .iter()
                .flat_map(|word| word.to_le_bytes()),
        );
        out.extend([8, entry].iter().flat_map(|word| word.to_le_bytes()));
    }
    out[0x28..0x30].copy_from_slice(&moved.to_le_bytes());
    out[0x3c..0x3e].copy_from_slice(&(header.e_shnum + 2).to_le_bytes());
    out.extend(&vmlinux[end..]);
    out
}
