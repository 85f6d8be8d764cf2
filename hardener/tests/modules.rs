//! Debian's modules as they are shipped: all of the cloud kernels' are taken, and damaged ones are refused in good order.
#![allow(missing_docs, reason = "a test")]

mod common;

use hardener::check::{Checker, Rule};
use hardener::emit::{EmitError, Emitted, emit_with};
use hardener::recipe::Recipe;
use penumbra_bundle::{Bundle, Memory, Module, PerMemory, Placement, Put, SiteKind, SlotKind};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

fn emitted(modules: &[PathBuf]) -> Result<Emitted, EmitError> {
    emitted_for(common::cloud(), modules)
}

fn emitted_for(kernel: &Path, modules: &[PathBuf]) -> Result<Emitted, EmitError> {
    emit_with(kernel, &Recipe::default(), modules, &mut |_| {})
}

fn all() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| all_of(common::cloud(), common::modules()))
}

/// Those of a kernel that keeps code and data of modules apart.
fn all_of_next() -> &'static Bundle {
    static MADE: OnceLock<Bundle> = OnceLock::new();
    MADE.get_or_init(|| all_of(common::cloud_backports(), common::modules_backports()))
}

fn all_of(kernel: &Path, modules: &Path) -> Bundle {
    let emitted = emitted_for(kernel, &[modules.to_owned()]).unwrap();
    let refused: Vec<String> = emitted.refused.iter().map(ToString::to_string).collect();
    assert!(refused.is_empty(), "{refused:#?}");
    emitted.bundle
}

/// The file of one module, below the folder of all.
fn file(name: &str) -> PathBuf {
    common::module(common::modules(), name)
}

fn module<'b>(bundle: &'b Bundle, name: &str) -> &'b Module {
    let found = bundle.modules.iter().find(|module| module.name == name);
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
    let few = ["xfs", "nf_tables", "af_key"].map(file);
    let one = emitted(&few).unwrap().bundle.seal();
    let mut turned = few.to_vec();
    turned.reverse();
    assert!(one == emitted(&turned).unwrap().bundle.seal());
    assert!(emitted(&[few[0].clone()]).unwrap().bundle.seal() != one);
}

#[test]
fn every_module_of_the_next_release_is_taken_and_proved() {
    let bundle = all_of_next();
    assert!(bundle.modules.len() > 1000, "{}", bundle.modules.len());
    let mut sealed = bundle.clone();
    assert!(Bundle::from_files(&sealed.seal()).unwrap().modules == bundle.modules);
    let folder = common::modules_backports().to_owned();
    let checker = Checker::open(common::cloud_backports()).unwrap();
    let checker = checker.with_modules(&[folder]).unwrap();
    for report in checker
        .prove(bundle, &[Rule::Modules, Rule::ThunkContract])
        .unwrap()
    {
        let said: Vec<String> = report.violations.iter().map(|one| one.line()).collect();
        assert!(said.is_empty(), "{said:#?}");
    }
}

/// Each kind of section has a memory; nothing but code is in that of the text, and a module may have none.
#[test]
fn memories_of_the_next_release_hold_what_their_names_say() {
    for module in &all_of_next().modules {
        let mut used = PerMemory::<u32>::default();
        for section in &module.sections {
            let (write, code) = (section.flags & 1 != 0, section.flags & 4 != 0);
            let wanted = match (section.name.as_str(), section.name.starts_with(".init")) {
                (".data..percpu", _) => Memory::PerCpu,
                (".data..ro_after_init" | "__jump_table", _) => Memory::RoAfterInit,
                (_, true) if code => Memory::InitText,
                (_, true) if write => Memory::InitData,
                (_, true) => Memory::InitRodata,
                _ if code => Memory::Text,
                _ if write => Memory::Data,
                _ => Memory::Rodata,
            };
            let place = section.place;
            assert_eq!(place.memory, wanted, "{} {section:?}", module.name);
            assert!(place.at.is_multiple_of(section.align));
            assert!(used[wanted] <= place.at, "in the file's order");
            used[wanted] = place.at + section.size;
        }
        assert_eq!(used, module.sizes, "{}", module.name);
        let whole = module.sizes[Memory::Text].next_multiple_of(4096);
        assert_eq!(module.text_size, whole);
    }
    let data_only = module(all_of_next(), "cast_common");
    assert!(data_only.text.is_empty() && data_only.edits.iter().all(Vec::is_empty));
}

#[test]
fn every_site_of_a_module_is_edited_or_left_for_a_reason() {
    for bundle in [all(), all_of_next()] {
        every_site_is_edited_or_left(bundle);
    }
}

fn every_site_is_edited_or_left(bundle: &Bundle) {
    let (mut edited, mut left, mut calls) = (0, 0, 0);
    for module in &bundle.modules {
        let sites = module.sites.iter();
        let sites =
            sites.filter(|site| matches!(site.kind, SiteKind::Return | SiteKind::Retpoline));
        let by_variant: Vec<BTreeSet<_>> = module.edits[1..]
            .iter()
            .map(|edits| {
                let sites = edits.iter().filter(|edit| edit.slot != SlotKind::Call);
                sites.map(|edit| (edit.at, edit.len())).collect()
            })
            .collect();
        assert!(module.edits[0].is_empty(), "stock");
        // Calls are no sites: `fast` leaves out those that only check.
        calls += module.edits[1].len() - by_variant[0].len();
        assert_eq!(module.edits[2].len(), by_variant[1].len(), "hardened");
        assert_eq!(by_variant[0], by_variant[1], "{}", module.name);
        let reasons: u64 = module.left.values().sum();
        let count = by_variant[0].len() as u64;
        assert_eq!(count + reasons, sites.count() as u64, "{}", module.name);
        edited += count;
        left += reasons;
    }
    assert!(
        edited > 50_000 && left * 50 < edited && calls > 1_000,
        "{edited} edited, {left} left, {calls} calls left out"
    );
}

#[test]
fn branches_go_to_thunks_wherever_the_module_is() {
    for bundle in [all(), all_of_next()] {
        branches_go_to_thunks(bundle);
    }
}

fn branches_go_to_thunks(bundle: &Bundle) {
    let module = module(bundle, "xfs");
    let elf = goblin::elf::Elf::parse(&bundle.cave).unwrap();
    let thunks: BTreeSet<u64> = elf.syms.iter().map(|symbol| symbol.st_value).collect();
    for (base, step, slide) in [
        (0xffff_ffff_c000_0000, 0x100_0000, 0),
        (0xffff_ffff_c0a3_7000, 0x2a_3000, 0x2ca0_0000),
    ] {
        let placement = Placement {
            bases: PerMemory::new(|memory| match memory {
                Memory::PerCpu => 0x3_0000,
                memory => base + memory as u64 * step,
            }),
            slide,
        };
        let text = module
            .relocated(&placement, &|name| {
                let others = bundle.modules.iter().flat_map(|module| &module.exports);
                others
                    .into_iter()
                    .any(|export| export.name == name)
                    .then_some(base + 0x200_0000)
            })
            .unwrap();
        assert_eq!(text.len(), module.text_size as usize);
        let mut kinds = BTreeMap::new();
        for edit in &module.edits[2] {
            let bytes = edit.bytes(&placement).unwrap();
            let at = placement.text(edit.at);
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
    let path = file("af_key");
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
    let whole = std::fs::read(file("af_key")).unwrap();
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
    let whole = std::fs::read(file("af_key")).unwrap();
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

/// A name in the types of an unpacked kernel, changed.
fn with_another_name(kernel: &Path, name: &str) -> hardener::image::Image {
    let packed = std::fs::read(kernel).unwrap();
    let mut vmlinux = hardener::image::unpacked(packed).unwrap();
    let types = section(&vmlinux, ".BTF");
    let whole = [b"\0", name.as_bytes(), b"\0"].concat();
    let at = memchr::memmem::find(&vmlinux[types.clone()], &whole).unwrap();
    vmlinux[types.start + at + name.len()] = b'?';
    hardener::image::Image::parse(vmlinux).unwrap()
}

#[test]
fn a_kernel_that_arranges_modules_in_another_way_takes_none_and_says_so() {
    for (kernel, name, expected) in [
        (
            common::cloud_backports(),
            "MOD_RO_AFTER_INIT",
            "has other memories in `enum mod_mem_type` than are known",
        ),
        (
            common::cloud_backports(),
            "mod_mem_type",
            "does not describe `enum mod_mem_type`",
        ),
        (
            common::cloud(),
            "core_layout",
            "has neither `core_layout` nor `mem`",
        ),
    ] {
        let image = with_another_name(kernel, name);
        let thunks = hardener::emit::kernel_thunks(&image).unwrap();
        let files = [file("af_key")];
        let said = hardener::modules::Modules::read(&image, &thunks, &files).err();
        let said = said.expect("a refusal").to_string();
        assert!(
            said.contains(expected) && said.contains("leave --module out"),
            "{said}"
        );
    }
}

/// Every symbol 4 GiB behind its section: sums of the two are no addresses.
#[test]
fn a_symbol_far_behind_its_section_is_no_overflow() {
    let image = hardener::image::Image::open(common::cloud()).unwrap();
    let thunks = hardener::emit::kernel_thunks(&image).unwrap();
    let mut module = std::fs::read(file("af_key")).unwrap();
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
    let bundle = emitted(&[file("af_key")]).unwrap().bundle;
    let mut module = std::fs::read(file("af_key")).unwrap();
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
