//! A small bundle is written and read back; each case breaks it in one way and names what must be said.

use penumbra_bundle::{
    Bundle, Cave, Edit, Edits, FileRef, Form, FormReloc, Kernel, LinkVa, Manifest, Memory, Module,
    ModuleEdit, ModuleName, ModuleReloc, ModuleRelocKind, ModuleSection, ModuleSet, Offending,
    PerMemory, Place, Placement, Put, Reloc, RelocKind, RunTimeModel, SCHEMA, Site, SiteKind,
    SlotKind, Symbol, Symbols, Target, Text, TextOff, Trap, VaRange, Variant, ViolationAction,
    WriteError,
};
use std::collections::BTreeMap;

const START: u64 = 0xffff_ffff_8100_0000;

fn range(start: u64, end: u64) -> VaRange {
    VaRange {
        start: LinkVa(START + start),
        end: LinkVa(START + end),
    }
}

fn file(name: &str) -> FileRef {
    FileRef {
        name: name.to_owned(),
        sha256: String::new(),
    }
}

fn variant(name: &str) -> Variant {
    Variant {
        name: name.to_owned(),
        passes: vec![],
        drops: vec![],
        edits: file(&format!("{name}.edits")),
        edit_count: 0,
    }
}

/// Two pages of text, one slot edited, one poke site.
fn small() -> Bundle {
    Bundle {
        manifest: Manifest {
            schema: SCHEMA.to_owned(),
            generator: "test".to_owned(),
            kernel: Kernel {
                build_id: "00".repeat(20),
                release: "6.1.0".to_owned(),
                banner: "Linux version 6.1.0".to_owned(),
                image_sha256: "00".repeat(32),
                notes: range(0, 36),
                syscall_entry: LinkVa(START),
            },
            text: Text {
                start: LinkVa(START),
                end: LinkVa(START + 0x2000),
                file: file("text.bin"),
            },
            model: file("model.postcard"),
            symbols: file("symbols.postcard"),
            cave: Cave {
                range: range(0x1000, 0x2000),
                filler: 0xcc,
                file: file("cave.elf"),
                relocs: file("relocations.postcard"),
                return_tails: vec![],
                tables: vec![],
                traps: vec![],
            },
            variants: vec![variant("stock"), variant("hardened")],
            forward: None,
            backward: None,
            watched: None,
            modules: None,
            layout: BTreeMap::from([("task_struct.mm".to_owned(), 0x8b0)]),
            data: BTreeMap::from([("init_task".to_owned(), LinkVa(START))]),
        },
        text: vec![0xcc; 0x2000],
        model: RunTimeModel {
            sites: vec![Site {
                at: TextOff(0x10),
                len: 5,
                kind: SiteKind::Return,
                forms: vec![Form::JumpReturnThunk],
            }],
            ..RunTimeModel::default()
        },
        symbols: Symbols(vec![Symbol {
            at: TextOff(0),
            name: "_stext".to_owned(),
        }]),
        cave: b"\x7fELF".to_vec(),
        relocs: [0x1004, 0x1ff8]
            .map(|at| Reloc {
                at: TextOff(at),
                kind: RelocKind::Abs64,
            })
            .to_vec(),
        forward: None,
        backward: None,
        watched: None,
        modules: Vec::new(),
        edits: vec![
            Edits::default(),
            Edits(vec![Edit {
                at: TextOff(0x10),
                slot: SlotKind::Return,
                bytes: vec![0xe9, 0, 0, 0, 0],
            }]),
        ],
    }
}

fn trap(at: u64) -> Trap {
    Trap {
        at: LinkVa(START + at),
        pass: "return-cfi".to_owned(),
        offending: Offending::Stack(0),
        action: ViolationAction::Kill,
    }
}

/// A page of code with one slot, one relocation of each kind of user.
fn module() -> Module {
    let reloc = |at| ModuleReloc {
        at: TextOff(at),
        kind: ModuleRelocKind::Relative32,
        target: 0,
        addend: -4,
    };
    Module {
        name: "xfs".to_owned(),
        build_id: "11".repeat(20),
        srcversion: None,
        vermagic: "6.1.0 SMP".to_owned(),
        file_sha256: "22".repeat(32),
        sections: vec![ModuleSection {
            name: ".text".to_owned(),
            flags: 6,
            size: 0x900,
            align: 16,
            place: Place::new(Memory::Text, 0),
        }],
        text_size: 0x1000,
        sizes: PerMemory::new(|_| 0x1800),
        text: vec![0; 0x1000],
        targets: vec![Target::Kernel(LinkVa(START))],
        relocs: vec![reloc(0x11), reloc(0x31)],
        sites: vec![Site {
            at: TextOff(0x30),
            len: 5,
            kind: SiteKind::Alternative,
            forms: vec![Form::Exact {
                bytes: vec![0xe8, 0, 0, 0, 0],
                abs32: vec![],
                inverse32: vec![],
            }],
        }],
        form_relocs: vec![FormReloc {
            site: 0,
            form: 0,
            reloc: reloc(0x31),
        }],
        symbols: vec![],
        exports: vec![],
        edits: vec![
            vec![],
            vec![ModuleEdit {
                at: TextOff(0x10),
                slot: SlotKind::Return,
                put: Put::Branch(vec![0xe9], LinkVa(START + 0x1000)),
            }],
        ],
        left: BTreeMap::new(),
    }
}

fn with_module() -> Bundle {
    let mut bundle = small();
    bundle.modules = vec![module()];
    bundle.manifest.modules = Some(ModuleSet {
        file: file("modules.postcard"),
        modules: vec![ModuleName {
            name: "xfs".to_owned(),
            build_id: "11".repeat(20),
        }],
    });
    bundle
}

/// Each case: what is broken, how, and a part of what must be said.
#[test]
fn a_module_of_the_wrong_shape_is_refused() {
    type Break = fn(&mut Module);
    let cases: &[(&str, Break, &str)] = &[
        (
            "a name that is a path",
            |m| m.name = "../x".to_owned(),
            "not those that the manifest",
        ),
        (
            "another build",
            |m| m.build_id.push('0'),
            "not those that the manifest",
        ),
        (
            "text too short",
            |m| m.text.truncate(0xfff),
            "sizes contradict",
        ),
        (
            "a memory smaller than the text in it",
            |m| {
                m.sections.clear();
                m.sizes[Memory::Text] = 0;
            },
            "sizes contradict",
        ),
        (
            "a section past the end",
            |m| m.sections[0].size = 0x1801,
            "a section leaves",
        ),
        (
            "a section in a memory that the module has not",
            |m| {
                m.sections[0].place.memory = Memory::Data;
                m.sizes[Memory::Data] = 0;
            },
            "a section leaves",
        ),
        (
            "a relocation past the end",
            |m| m.relocs[1].at = TextOff(0xffd),
            "its relocations",
        ),
        (
            "relocations unsorted",
            |m| m.relocs.swap(0, 1),
            "its relocations",
        ),
        (
            "a relocation to nothing",
            |m| m.relocs[0].target = 1,
            "its relocations",
        ),
        (
            "a site past the end",
            |m| m.sites[0].at = TextOff(0xffc),
            "its sites",
        ),
        (
            "a site without a length",
            |m| m.sites[0].len = 0,
            "its sites",
        ),
        (
            "a form's field before the site",
            |m| m.form_relocs[0].reloc.at = TextOff(0x2f),
            "a form's",
        ),
        (
            "a form's field past the site",
            |m| m.form_relocs[0].reloc.at = TextOff(0x32),
            "a form's",
        ),
        (
            "a field of no form",
            |m| m.form_relocs[0].form = 1,
            "a form's",
        ),
        (
            "a field of no site",
            |m| m.form_relocs[0].site = 1,
            "a form's",
        ),
        (
            "an edit past the end",
            |m| m.edits[1][0].at = TextOff(0xffc),
            "its edits",
        ),
        (
            "an edit of four bytes",
            |m| m.edits[1][0].put = Put::Bytes(vec![0; 4]),
            "its edits",
        ),
        (
            "edits overlapping",
            |m| {
                let one = m.edits[1][0].clone();
                m.edits[1].push(one);
            },
            "its edits",
        ),
        (
            "edits of too few variants",
            |m| m.edits.truncate(1),
            "its edits",
        ),
        (
            "a symbol past the end",
            |m| {
                m.symbols.push(Symbol {
                    at: TextOff(0x1001),
                    name: "late".to_owned(),
                })
            },
            "its symbols",
        ),
    ];
    for (what, break_it, expected) in cases {
        let mut bundle = with_module();
        break_it(&mut bundle.modules[0]);
        let said = refusal(&bundle.seal());
        assert!(
            said.starts_with("modules.postcard: ") && said.contains(expected),
            "{what}: {said}"
        );
    }
    assert_eq!(refusal(&with_module().seal()), "accepted");
    let mut files = with_module().seal();
    files.get_mut("modules.postcard").unwrap()[9] ^= 1;
    assert!(refusal(&files).starts_with("modules.postcard: SHA-256 is "));
    files.remove("modules.postcard");
    assert!(refusal(&files).starts_with("modules.postcard: missing"));
}

#[test]
fn a_module_is_relocated_and_edited_to_where_it_is() {
    let module = module();
    let placement = Placement {
        bases: PerMemory::new(|_| 0xffff_ffff_c012_3000),
        slide: 0x20_0000,
    };
    let text = module.relocated(&placement, &|_| None).unwrap();
    let branch = |bytes: &[u8], at: u64| {
        let distance = i32::from_le_bytes(bytes[1..5].try_into().unwrap());
        (placement.text(TextOff(0)) + at + 5).wrapping_add_signed(distance.into())
    };
    assert_eq!(branch(&text[0x10..], 0x10), START + 0x20_0000);
    assert_eq!(branch(&text[0x30..], 0x30), START + 0x20_0000);
    let bytes = module.edits[1][0].bytes(&placement).unwrap();
    assert_eq!((bytes[0], branch(&bytes, 0x10)), (0xe9, START + 0x20_1000));
    let far = Placement {
        bases: PerMemory::new(|_| 0xffff_9000_0000_0000),
        ..placement
    };
    assert!(module.relocated(&far, &|_| None).is_err());
    assert!(module.edits[1][0].bytes(&far).is_none());
}

fn refusal(files: &BTreeMap<String, Vec<u8>>) -> String {
    match Bundle::from_files(files) {
        Ok(_) => "accepted".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_is_written_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bundle");
    let mut bundle = small();
    bundle.write_dir(&path, false).unwrap();
    let read = Bundle::read_dir(&path).unwrap();
    assert_eq!(read.manifest, bundle.manifest);
    assert_eq!(read.text, bundle.text);
    assert_eq!(read.model, bundle.model);
    assert_eq!(read.symbols, bundle.symbols);
    assert_eq!(read.edits, bundle.edits);
    assert_eq!(read.manifest.variants[1].edit_count, 1);
    assert_eq!(read.symbols.lookup(TextOff(9)), Some(("_stext", 9)));
}

#[test]
fn an_existing_directory_is_replaced_only_when_it_is_a_bundle_and_forced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bundle");
    let mut bundle = small();
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("diary.txt"), "mine").unwrap();
    assert!(matches!(
        bundle.write_dir(&path, false),
        Err(WriteError::Exists(_))
    ));
    assert!(matches!(
        bundle.write_dir(&path, true),
        Err(WriteError::NotABundle(_))
    ));
    assert!(path.join("diary.txt").exists());
    std::fs::remove_dir_all(&path).unwrap();
    let lost = dir.path().join("not/there");
    assert!(matches!(
        bundle.write_dir(&lost, false),
        Err(WriteError::NoParent(_))
    ));
    bundle.write_dir(&path, false).unwrap();
    bundle.write_dir(&path, true).unwrap();
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        1,
        "nothing is left beside it"
    );
}

#[test]
fn an_edited_file_is_refused_by_its_name() {
    for name in [
        "text.bin",
        "model.postcard",
        "symbols.postcard",
        "cave.elf",
        "relocations.postcard",
        "hardened.edits",
    ] {
        let mut files = small().seal();
        files.get_mut(name).unwrap()[0] ^= 1;
        let said = refusal(&files);
        assert!(
            said.starts_with(&format!("{name}: SHA-256 is ")),
            "{name}: {said}"
        );
    }
}

#[test]
fn relocations_are_sorted_and_inside_the_text() {
    for (first, last) in [(0x1ff8, 0x1004), (0x1004, 0x1ff9), (0x1004, u32::MAX)] {
        let mut bundle = small();
        bundle.relocs[0].at = TextOff(first);
        bundle.relocs[1].at = TextOff(last);
        let said = refusal(&bundle.seal());
        assert!(
            said.starts_with("relocations.postcard: relocations are unsorted or leave the text"),
            "{said}"
        );
    }
}

#[test]
fn a_truncated_manifest_is_refused_with_its_place() {
    let mut files = small().seal();
    let manifest = files.get_mut("manifest.json").unwrap();
    manifest.truncate(manifest.len() / 2);
    let said = refusal(&files);
    assert!(
        said.contains("manifest.json") && said.contains("line"),
        "{said}"
    );
}

/// Each case: what is broken, how, and a part of what must be said.
#[test]
fn a_bundle_of_the_wrong_shape_is_refused() {
    type Break = fn(&mut Bundle);
    let cases: &[(&str, Break, &str)] = &[
        (
            "text too short",
            |b| b.text.truncate(0x1fff),
            "8191 bytes, the text range has 8192",
        ),
        (
            "text not whole pages",
            |b| b.manifest.text.end = LinkVa(START + 0x1fff),
            "not whole pages",
        ),
        (
            "text inverted",
            |b| b.manifest.text.end = LinkVa(START - 0x1000),
            "not whole pages",
        ),
        (
            "cave outside",
            |b| b.manifest.cave.range = range(0x1000, 0x3000),
            "leaves the text",
        ),
        (
            "schema of tomorrow",
            |b| b.manifest.schema = "penumbra.bundle/v2".to_owned(),
            "this version reads",
        ),
        (
            "stock with edits",
            |b| b.edits.swap(0, 1),
            "`stock` has edits",
        ),
        (
            "no stock",
            |b| b.manifest.variants[0].name = "base".to_owned(),
            "not `stock`",
        ),
        (
            "one name twice",
            |b| b.manifest.variants[1].name = "stock".to_owned(),
            "there twice",
        ),
        (
            "a name that is a path",
            |b| b.manifest.variants[1].name = "../x".to_owned(),
            "variant name",
        ),
        (
            "a file that is a path",
            |b| b.manifest.variants[1].edits = file("../../etc/passwd"),
            "no file name",
        ),
        (
            "an edit past the end",
            |b| b.edits[1].0[0].at = TextOff(0x1ffc),
            "leaves the text",
        ),
        (
            "an edit of four bytes",
            |b| b.edits[1].0[0].bytes.truncate(4),
            "4 bytes long",
        ),
        (
            "edits overlapping",
            |b| {
                let mut next = b.edits[1].0[0].clone();
                next.at = TextOff(0x14);
                b.edits[1].0.push(next);
            },
            "overlaps",
        ),
        (
            "a site past the end",
            |b| b.model.sites[0].at = TextOff(0x1ffe),
            "leaves the text",
        ),
        (
            "a form of another length",
            |b| {
                b.model.sites[0].forms = vec![Form::Exact {
                    bytes: vec![0xc3],
                    abs32: vec![],
                    inverse32: vec![],
                }]
            },
            "another length",
        ),
        (
            "functions unsorted",
            |b| b.model.functions = vec![TextOff(2), TextOff(1)],
            "unsorted",
        ),
        (
            "a relocation past the end",
            |b| b.model.abs32 = vec![TextOff(0x1ffd)],
            "leaves the text",
        ),
        (
            "a trap outside the cave",
            |b| b.manifest.cave.traps = vec![trap(0xffe)],
            "the trap at ",
        ),
        (
            "traps overlapping",
            |b| b.manifest.cave.traps = vec![trap(0x1000), trap(0x1001)],
            "the trap at ",
        ),
        (
            "a trap about no register",
            |b| {
                b.manifest.cave.traps = vec![trap(0x1000)];
                b.manifest.cave.traps[0].offending = Offending::Register(16);
            },
            "names no register",
        ),
        (
            "symbols unsorted",
            |b| {
                b.symbols.0.insert(
                    0,
                    Symbol {
                        at: TextOff(9),
                        name: "late".to_owned(),
                    },
                )
            },
            "unsorted",
        ),
    ];
    for (what, break_it, expected) in cases {
        let mut bundle = small();
        break_it(&mut bundle);
        let said = refusal(&bundle.seal());
        assert!(said.contains(expected), "{what}: {said}");
    }
    assert_eq!(refusal(&small().seal()), "accepted");
}
