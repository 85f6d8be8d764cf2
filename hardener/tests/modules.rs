//! Debian's modules as they are shipped: all of the cloud kernel's are taken, and damaged ones are refused in good order.
#![allow(missing_docs, reason = "a test")]

mod common;

use hardener::check::{Checker, Rule};
use hardener::emit::{EmitError, Emitted, emit_with};
use hardener::recipe::Recipe;
use penumbra_bundle::{Bundle, Module, Placement, Put, SiteKind, SlotKind};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

fn emitted(modules: &[PathBuf]) -> Result<Emitted, EmitError> {
    emit_with(common::cloud(), &Recipe::default(), modules, &mut |_| {})
}

fn all() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| {
        let emitted = emitted(&[common::modules().to_owned()]).unwrap();
        let refused: Vec<String> = emitted.refused.iter().map(ToString::to_string).collect();
        assert!(refused.is_empty(), "{refused:#?}");
        emitted.bundle
    })
}

/// The file of one module, below the folder of all.
fn file(name: &str) -> PathBuf {
    fn walk(folder: &Path, name: &str) -> Option<PathBuf> {
        let mut entries: Vec<PathBuf> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        entries.sort();
        entries.into_iter().find_map(|path| match path.is_dir() {
            true => walk(&path, name),
            false => (path.file_name()?.to_str()? == name).then_some(path),
        })
    }
    walk(common::modules(), name).unwrap_or_else(|| panic!("there is no {name}"))
}

fn module(name: &str) -> &'static Module {
    let found = all().modules.iter().find(|module| module.name == name);
    found.unwrap_or_else(|| panic!("there is no {name}"))
}

#[test]
fn every_module_of_the_package_is_taken_and_reads_back() {
    let mut bundle = all().clone();
    assert!(bundle.modules.len() > 1000, "{}", bundle.modules.len());
    let files = bundle.seal();
    let read = Bundle::from_files(&files).unwrap();
    assert!(read.modules == bundle.modules && read.manifest == bundle.manifest);
    // The same modules make the same bytes, given one by one in another order.
    let few = ["xfs.ko", "nf_tables.ko", "af_key.ko"].map(file);
    let one = emitted(&few).unwrap().bundle.seal();
    let mut turned = few.to_vec();
    turned.reverse();
    assert!(one == emitted(&turned).unwrap().bundle.seal());
    assert!(emitted(&[few[0].clone()]).unwrap().bundle.seal() != one);
}

#[test]
fn every_site_of_a_module_is_edited_or_left_for_a_reason() {
    let (mut edited, mut left) = (0, 0);
    for module in &all().modules {
        let sites = module.sites.iter();
        let sites =
            sites.filter(|site| matches!(site.kind, SiteKind::Return | SiteKind::Retpoline));
        let by_variant: Vec<BTreeSet<_>> = module.edits[1..]
            .iter()
            .map(|edits| edits.iter().map(|edit| (edit.at, edit.len())).collect())
            .collect();
        assert!(module.edits[0].is_empty(), "stock");
        assert_eq!(by_variant[0], by_variant[1], "{}", module.name);
        let reasons: u64 = module.left.values().sum();
        let count = by_variant[0].len() as u64;
        assert_eq!(count + reasons, sites.count() as u64, "{}", module.name);
        edited += count;
        left += reasons;
    }
    assert!(
        edited > 50_000 && left * 50 < edited,
        "{edited} edited, {left} left"
    );
}

#[test]
fn branches_go_to_thunks_wherever_the_module_is() {
    let module = module("xfs");
    let elf = goblin::elf::Elf::parse(&all().cave).unwrap();
    let thunks: BTreeSet<u64> = elf.syms.iter().map(|symbol| symbol.st_value).collect();
    for (base, slide) in [
        (0xffff_ffff_c000_0000, 0),
        (0xffff_ffff_c0a3_7000, 0x2ca0_0000),
    ] {
        let placement = Placement {
            core: base,
            init: base + 0x100_0000,
            percpu: 0x3_0000,
            slide,
        };
        let text = module
            .relocated(&placement, &|name| {
                let others = all().modules.iter().flat_map(|module| &module.exports);
                others
                    .into_iter()
                    .any(|export| export.name == name)
                    .then_some(base + 0x200_0000)
            })
            .unwrap();
        assert_eq!(text.len(), module.text_size as usize);
        let mut kinds = BTreeMap::new();
        for edit in &module.edits[2] {
            let bytes = edit.bytes(base, slide).unwrap();
            let at = base + u64::from(edit.at.0);
            let decode = |bytes: &[u8]| iced_x86::Decoder::with_ip(64, bytes, at, 0).decode();
            let (old, new) = (decode(&text[edit.at.0 as usize..][..6]), decode(&bytes));
            assert_eq!((old.len(), old.mnemonic()), (new.len(), new.mnemonic()));
            assert!(thunks.contains(&(new.near_branch_target() - slide)));
            *kinds.entry(edit.slot).or_insert(0) += 1;
            assert!(matches!(edit.put, Put::Branch(..)));
        }
        assert!(
            kinds[&SlotKind::Return] > 1000 && kinds[&SlotKind::Indirect] > 100,
            "{kinds:?}"
        );
    }
}

#[test]
fn packed_modules_are_the_same_modules() {
    let folder = tempfile::tempdir().unwrap();
    let path = file("af_key.ko");
    let bytes = std::fs::read(&path).unwrap();
    let plain = emitted(&[path]).unwrap().bundle;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&bytes).unwrap();
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    for (name, packed) in [
        ("a.ko.gz", gzip.finish().unwrap()),
        (
            "a.ko.zst",
            ruzstd::encoding::compress_to_vec(&bytes[..], level),
        ),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, packed).unwrap();
        assert!(
            emitted(&[path]).unwrap().bundle.modules == plain.modules,
            "{name}"
        );
    }
}

#[test]
fn what_is_no_module_of_this_kernel_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let said = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = emitted(std::slice::from_ref(&path))
            .err()
            .map(|error| error.to_string());
        let error = error.unwrap_or_else(|| panic!("{name} is taken"));
        assert!(error.contains(name), "{error}");
        error
    };
    let whole = std::fs::read(file("af_key.ko")).unwrap();
    let mut other = whole.clone();
    let at = memchr::memmem::find(&other, b"vermagic=6.").unwrap();
    other[at + 9] = b'5';
    assert!(said("other.ko", &other).contains("is for kernel `5."));
    assert!(said("text.ko", b"hello").contains("is neither ELF nor packed"));
    assert!(said("packed.ko.gz", &[0x1f, 0x8b, 8, 0, 0]).contains("does not unpack"));
    assert!(said("kernel.ko", &std::fs::read(common::cloud()).unwrap()).contains("is neither ELF"));
    let nothing = emitted(&[folder.path().join("none")])
        .err()
        .unwrap()
        .to_string();
    assert!(nothing.contains("none"), "{nothing}");
    let empty = tempfile::tempdir().unwrap();
    let nothing = emitted(&[empty.path().to_owned()])
        .err()
        .unwrap()
        .to_string();
    assert!(nothing.contains("holds no module"), "{nothing}");
    // In a folder the good ones are taken and the others named.
    std::fs::write(folder.path().join("good.ko"), &whole).unwrap();
    let emitted = emitted(&[folder.path().to_owned()]).unwrap();
    assert_eq!(emitted.bundle.modules.len(), 1);
    assert_eq!(emitted.refused.len(), 4);
}

/// A module cut short anywhere, or with single bytes changed, is taken or refused, and nothing else.
#[test]
fn damaged_modules_never_panic() {
    let image = hardener::image::Image::open(common::cloud()).unwrap();
    let thunks = hardener::emit::kernel_thunks(&image).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read(file("af_key.ko")).unwrap();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below as u64) as usize
    };
    // The section headers, where a change does most.
    let headers = u64::from_le_bytes(whole[0x28..0x30].try_into().unwrap()) as usize;
    let headers_len = 64 * usize::from(u16::from_le_bytes([whole[0x3c], whole[0x3d]]));
    let mut refused = 0;
    for round in 0..400 {
        let mut bytes = whole.clone();
        match round % 4 {
            0 => bytes.truncate(next(whole.len())),
            1 => {
                for _ in 0..8 {
                    bytes[headers + next(headers_len)] = next(256) as u8;
                }
            }
            2 => bytes[next(64)] ^= 1 << next(8),
            _ => {
                for _ in 0..50 {
                    bytes[next(whole.len())] = next(256) as u8;
                }
            }
        }
        let path = folder.path().join("damaged.ko");
        std::fs::write(&path, &bytes).unwrap();
        let read = hardener::modules::Modules::read(&image, &thunks, &[path]);
        refused += u32::from(read.is_err());
    }
    assert!(refused > 150, "{refused}");
}

#[test]
fn a_kernel_that_keeps_code_and_data_of_modules_apart_takes_none_and_says_so() {
    let (kernel, module) = (common::cloud_backports(), file("af_key.ko"));
    let result = emit_with(kernel, &Recipe::default(), &[module], &mut |_| {});
    let said = result.err().expect("a refusal").to_string();
    assert!(
        said.contains("struct module_memory") && said.contains("leave --module out"),
        "{said}"
    );
}

/// Every symbol 4 GiB behind its section: sums of the two are no addresses.
#[test]
fn a_symbol_far_behind_its_section_is_no_overflow() {
    let image = hardener::image::Image::open(common::cloud()).unwrap();
    let thunks = hardener::emit::kernel_thunks(&image).unwrap();
    let mut module = std::fs::read(file("af_key.ko")).unwrap();
    let table = section(&module, ".symtab");
    for symbol in module[table].chunks_exact_mut(24) {
        symbol[8..16].copy_from_slice(&u64::from(u32::MAX).to_le_bytes());
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("far.ko");
    std::fs::write(&path, module).unwrap();
    let said = hardener::modules::Modules::read(&image, &thunks, &[path]).err();
    let said = said.expect("a refusal").to_string();
    assert!(said.contains("far.ko: symbol "), "{said}");
}

/// A relocation at the very last address: the end of its field is no number of 64 bits.
#[test]
fn a_relocation_at_the_end_of_addresses_is_not_proved() {
    let bundle = emitted(&[file("af_key.ko")]).unwrap().bundle;
    let mut module = std::fs::read(file("af_key.ko")).unwrap();
    let first = section(&module, ".rela.text").start;
    module[first..first + 8].copy_from_slice(&(u64::MAX - 1).to_le_bytes());
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("af_key.ko"), module).unwrap();
    let checker = Checker::open(common::cloud()).unwrap();
    let checker = checker.with_modules(&[folder.path().to_owned()]).unwrap();
    let reports = checker.prove(&bundle, &[Rule::Modules]).unwrap();
    let mut violations = reports[0].violations.iter();
    assert!(violations.any(|one| one.what.contains(".text has a bad relocation")));
}

/// Where a section's bytes are in its file.
fn section(module: &[u8], name: &str) -> std::ops::Range<usize> {
    let elf = goblin::elf::Elf::parse(module).unwrap();
    let mut headers = elf.section_headers.iter();
    let named =
        |header: &&goblin::elf::SectionHeader| elf.shdr_strtab.get_at(header.sh_name) == Some(name);
    headers.find(named).unwrap().file_range().unwrap()
}
