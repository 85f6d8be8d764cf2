//! One module in the testkit's guest, laid out by hand; and what is said when something about it is not as its file.

use super::{Exports, Loaded, Reader, State, Unknown, edited, explain, recognise};
use crate::guest::kernel::Kernel;
use crate::views::testkit::{self, LINK, RET, SLIDE, exact};
use crate::xen::fake::Fake;
use crate::xen::{GuestPa, GuestVa};
use penumbra_bundle::{
    Bundle, Export, Form, FormReloc, LinkVa, Module, ModuleEdit, ModuleReloc, ModuleRelocKind,
    ModuleSection, Place, Put, Site, SiteKind, SlotKind, Symbol, Target, TextOff,
};
use std::collections::BTreeMap;

const CORE: u64 = 0xffff_ffff_c040_0000;
const INIT: u64 = 0xffff_ffff_c050_0000;
/// Where another module exports `helper`.
const HELPER: u64 = 0xffff_ffff_c060_0120;
/// In guest-physical memory: the module's two pages, and two `struct module`.
const TEXT: u64 = 0xa000;
const THIS: [u64; 2] = [0xc000, 0xc200];
/// The list's head, in the kernel's data.
const HEAD: u64 = 0x1_5200;
const HEAD_LINK: u64 = LINK + 0x1_1200;
const DIRECT: u64 = 0xffff_8880_0000_0000;
const PERCPU: u64 = 0x3_0040;
const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];

/// (offset, kind, target, addend) of each relocation of the module's text.
const RELOCS: [(u32, ModuleRelocKind, u32, i64); 8] = [
    (0x11, ModuleRelocKind::Relative32, 0, -4),
    (0x21, ModuleRelocKind::Relative32, 1, -4),
    (0x31, ModuleRelocKind::Relative32, 2, -4),
    (0x43, ModuleRelocKind::Abs32Signed, 3, 8),
    (0x49, ModuleRelocKind::Relative32, 4, -4),
    (0x62, ModuleRelocKind::Relative32, 5, 0x20),
    (0x71, ModuleRelocKind::Abs32Signed, 6, 0),
    (0x78, ModuleRelocKind::Abs64, 2, 0),
];

fn reloc(at: u32, kind: ModuleRelocKind, target: u32, addend: i64) -> ModuleReloc {
    ModuleReloc {
        at: TextOff(at),
        kind,
        target,
        addend,
    }
}

fn module() -> Module {
    let mut text = vec![0x90; 0x1000];
    for (at, bytes) in [
        (0x10, &[0xe9, 0, 0, 0, 0][..]),
        (0x20, &[0xe8, 0, 0, 0, 0]),
        (0x30, &[0xe8, 0, 0, 0, 0]),
        (0x40, &[0x48, 0xc7, 0xc0, 0, 0, 0, 0]),
        (0x48, &[0xe8, 0, 0, 0, 0]),
        (0x60, &[0x0f, 0x85, 0, 0, 0, 0]),
        (0x70, &[0xbf, 0, 0, 0, 0]),
        (0x78, &[0; 8]),
    ] {
        text[at..at + bytes.len()].copy_from_slice(bytes);
    }
    let site = |at, kind, forms| Site {
        at: TextOff(at),
        len: 5,
        kind,
        forms,
    };
    let edit = |at, slot, put| ModuleEdit {
        at: TextOff(at),
        slot,
        put,
    };
    Module {
        name: "sample".to_owned(),
        build_id: "5a".repeat(20),
        srcversion: None,
        vermagic: "6.1.0-test SMP".to_owned(),
        file_sha256: String::new(),
        sections: vec![
            ModuleSection {
                name: ".altinstr_aux".to_owned(),
                flags: 6,
                size: 6,
                align: 1,
                place: Place::Core(0x60),
            },
            ModuleSection {
                name: ".note.gnu.build-id".to_owned(),
                flags: 2,
                size: 36,
                align: 4,
                place: Place::Core(0x1000),
            },
        ],
        text_size: 0x1000,
        core_size: 0x1100,
        text,
        targets: vec![
            Target::Kernel(LinkVa(LINK + 0x800)),
            Target::Kernel(LinkVa(LINK + 0x900)),
            Target::Kernel(LinkVa(LINK + 0x1000)),
            Target::Own(Place::Core(0x1040)),
            Target::Export("helper".to_owned()),
            Target::Own(Place::Init(0x10)),
            Target::Own(Place::PerCpu(8)),
        ],
        relocs: RELOCS
            .iter()
            .map(|(at, kind, target, addend)| reloc(*at, *kind, *target, *addend))
            .collect(),
        sites: vec![
            site(
                0x10,
                SiteKind::Return,
                vec![exact(&RET), Form::JumpReturnThunk],
            ),
            site(
                0x20,
                SiteKind::Retpoline,
                vec![exact(&[0xff, 0xd0, 0x0f, 0x1f, 0])],
            ),
            site(
                0x30,
                SiteKind::Fentry,
                vec![exact(&NOP5), Form::CallAnywhere],
            ),
            site(
                0x50,
                SiteKind::Alternative,
                vec![exact(&[0xe8, 0, 0, 0, 0])],
            ),
            site(0x58, SiteKind::Paravirt, vec![Form::Call, Form::Nops]),
        ],
        form_relocs: vec![FormReloc {
            site: 3,
            form: 0,
            reloc: reloc(0x51, ModuleRelocKind::Relative32, 2, -4),
        }],
        symbols: vec![Symbol {
            at: TextOff(0),
            name: "sample_open".to_owned(),
        }],
        exports: vec![Export {
            name: "sample_open".to_owned(),
            place: Place::Core(0x30),
        }],
        edits: vec![
            vec![],
            vec![edit(0x10, SlotKind::Return, Put::Bytes(RET.to_vec()))],
            vec![
                edit(
                    0x10,
                    SlotKind::Return,
                    Put::Branch(vec![0xe9], LinkVa(LINK + 0x2010)),
                ),
                edit(
                    0x20,
                    SlotKind::Indirect,
                    Put::Branch(vec![0xe8], LinkVa(LINK + 0x2040)),
                ),
            ],
        ],
        left: BTreeMap::new(),
    }
}

fn rel(at: u64, to: u64) -> [u8; 4] {
    (to.wrapping_sub(CORE + at + 4) as u32).to_le_bytes()
}

/// The module's text as a guest runs it, computed here and not by what is tested.
fn running() -> Vec<u8> {
    let mut text = module().text;
    let kernel = LINK + SLIDE;
    let mut put = |at: u64, bytes: &[u8]| {
        text[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    };
    put(0x10, &RET);
    put(0x21, &rel(0x21, kernel + 0x900));
    put(0x30, &NOP5);
    put(0x43, &((CORE + 0x1048) as u32).to_le_bytes());
    put(0x49, &rel(0x49, HELPER));
    put(0x50, &[0xe8]);
    put(0x51, &rel(0x51, kernel + 0x1000));
    put(0x58, &[0xe8]);
    put(0x59, &rel(0x59, kernel));
    // `addend` counts from the field, as in the file.
    put(0x62, &((INIT + 0x30 - CORE - 0x62) as u32).to_le_bytes());
    put(0x71, &((PERCPU + 8) as u32).to_le_bytes());
    put(0x78, &(kernel + 0x1000).to_le_bytes());
    text
}

struct Scene {
    bundle: Bundle,
    fake: Fake,
}

impl Scene {
    fn new() -> Scene {
        let mut bundle = testkit::bundle();
        for (name, at) in [
            ("module.list", 0x08),
            ("module.name", 0x18),
            ("module.state", 0x00),
            ("module.core_layout", 0x60),
            ("module.init_layout", 0xa0),
            ("module_layout.base", 0x00),
            ("module_layout.size", 0x08),
            ("module_layout.text_size", 0x0c),
            ("module.percpu", 0xe0),
        ] {
            bundle.manifest.layout.insert(name.to_owned(), at);
        }
        let data = &mut bundle.manifest.data;
        data.insert("modules".to_owned(), LinkVa(HEAD_LINK));
        bundle.modules = vec![module()];
        let fake = testkit::guest(&bundle);
        let scene = Scene { bundle, fake };
        // The module area: PDPT entry 511, one page directory, one table.
        scene.word(0x2000 + 511 * 8, 0x8003);
        scene.word(0x8000 + ((CORE >> 21) & 0x1ff) * 8, 0x9003);
        scene.word(0x9000, TEXT + 3);
        scene.word(0x9008, TEXT + 0x1000 + 3);
        scene.fake.poke(GuestPa(TEXT), &running());
        let note = [&b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0"[..], &[0x5a; 20]].concat();
        scene.fake.poke(GuestPa(TEXT + 0x1000), &note);
        for (index, (name, state)) in [(0, ("sample", 0_u32)), (1, ("other", 1))] {
            let at = THIS[index];
            scene.fake.poke(GuestPa(at), &state.to_le_bytes());
            scene.fake.poke(GuestPa(at + 0x18), name.as_bytes());
            scene.word(at + 0x60, CORE + index as u64 * 0x10_0000);
            scene
                .fake
                .poke(GuestPa(at + 0x68), &0x2000_u32.to_le_bytes());
            scene
                .fake
                .poke(GuestPa(at + 0x6c), &0x1000_u32.to_le_bytes());
            scene.word(at + 0xe0, PERCPU);
        }
        let link = |index: usize| DIRECT + THIS[index] + 8;
        scene.word(HEAD, link(0));
        scene.word(THIS[0] + 8, link(1));
        scene.word(THIS[1] + 8, HEAD_LINK + SLIDE);
        scene
    }

    fn word(&self, at: u64, value: u64) {
        self.fake.poke(GuestPa(at), &value.to_le_bytes());
    }

    fn kernel(&self) -> Kernel {
        Kernel::find(&self.fake, &self.bundle.manifest).expect("the testkit's kernel")
    }

    fn list(&self) -> super::ModuleList {
        let kernel = self.kernel();
        let reader = Reader::new(&self.bundle.manifest, &kernel).expect("all offsets");
        reader.list(&kernel.memory(&self.fake))
    }

    fn sample(&self) -> Loaded {
        self.list().modules.swap_remove(0)
    }

    fn recognised(&self) -> Result<String, Unknown> {
        let kernel = self.kernel();
        let memory = kernel.memory(&self.fake);
        recognise(&self.bundle, &memory, &self.sample()).map(|module| module.name.clone())
    }

    fn explained(&self) -> Result<super::ExplainedModule, Unknown> {
        let kernel = self.kernel();
        let mut exports = Exports::default();
        let other = Module {
            exports: vec![Export {
                name: "helper".to_owned(),
                place: Place::Core(0x120),
            }],
            ..module()
        };
        let elsewhere = Loaded {
            core: GuestVa(HELPER - 0x120),
            ..self.sample()
        };
        exports.add(&other, &elsewhere);
        explain(
            &self.bundle,
            kernel.slide,
            &self.bundle.modules[0],
            &self.sample(),
            &exports,
            &kernel.memory(&self.fake),
        )
    }
}

#[test]
fn the_list_is_walked_to_its_head() {
    let scene = Scene::new();
    let list = scene.list();
    assert_eq!(list.trouble, Vec::<String>::new());
    let seen: Vec<(&str, State, GuestVa)> = list
        .modules
        .iter()
        .map(|module| (module.name.as_str(), module.state, module.core))
        .collect();
    assert_eq!(
        seen,
        [
            ("sample", State::Live, GuestVa(CORE)),
            ("other", State::Coming, GuestVa(CORE + 0x10_0000)),
        ]
    );
    assert_eq!(list.modules[0].text_size, 0x1000);
    assert_eq!(list.modules[0].percpu, PERCPU);
}

#[test]
fn a_broken_list_ends() {
    let scene = Scene::new();
    scene.word(THIS[1] + 8, DIRECT + THIS[0] + 8);
    let list = scene.list();
    assert_eq!(list.modules.len(), 2);
    assert!(
        list.trouble[0].contains("in a circle"),
        "{:?}",
        list.trouble
    );
    scene.word(THIS[0] + 8, 0x1234);
    let list = scene.list();
    assert!(
        list.trouble.iter().any(|what| what.contains("breaks off")),
        "{:?}",
        list.trouble
    );
}

#[test]
fn a_kernel_with_another_layout_is_named() {
    let mut scene = Scene::new();
    scene.bundle.manifest.layout.remove("module.core_layout");
    let error = Reader::new(&scene.bundle.manifest, &scene.kernel()).unwrap_err();
    assert!(error.to_string().contains("module.core_layout"), "{error}");
}

#[test]
fn a_module_is_recognised_by_name_and_build_id() {
    let scene = Scene::new();
    assert_eq!(scene.recognised(), Ok("sample".to_owned()));
    scene.fake.poke(GuestPa(TEXT + 0x1010), &[0x5b]);
    let other = scene.recognised().unwrap_err();
    assert!(other.to_string().contains("has build-id 5b5a"), "{other}");
    // A note of another kind is no build-id.
    let scene = Scene::new();
    scene.fake.poke(GuestPa(TEXT + 0x1008), &[1]);
    assert!(matches!(
        scene.recognised(),
        Err(Unknown::OtherBuild { .. })
    ));
}

#[test]
fn what_is_not_this_module_is_said() {
    let scene = Scene::new();
    scene.fake.poke(GuestPa(THIS[0] + 0x18), b"sampler");
    assert_eq!(scene.recognised(), Err(Unknown::NotInBundle));

    let scene = Scene::new();
    scene
        .fake
        .poke(GuestPa(THIS[0] + 0x6c), &0x2000_u32.to_le_bytes());
    let said = scene.recognised().unwrap_err().to_string();
    assert!(
        said.contains("8192 bytes of code in 8192, the file makes 4096"),
        "{said}"
    );

    // The guest says that the module's memory is the kernel's own text, or that it ends outside the module area.
    for core in [LINK + SLIDE, 0xffff_ffff_feff_f000, CORE + 0x10] {
        let scene = Scene::new();
        scene.word(THIS[0] + 0x60, core);
        let said = scene.recognised().unwrap_err().to_string();
        assert!(
            said.contains("is not in the module area"),
            "{core:#x}: {said}"
        );
    }

    for state in [2_u32, 3, 77] {
        let scene = Scene::new();
        scene.fake.poke(GuestPa(THIS[0]), &state.to_le_bytes());
        assert_eq!(scene.recognised(), Err(Unknown::NotReady));
    }
}

#[test]
fn running_text_is_explained_by_relocations_and_tables() {
    let explained = Scene::new().explained().unwrap();
    assert_eq!(explained.running, running());
    let kinds: Vec<SiteKind> = explained.changed.keys().copied().collect();
    assert_eq!(
        kinds,
        [
            SiteKind::Alternative,
            SiteKind::Paravirt,
            SiteKind::Return,
            SiteKind::Fentry,
        ]
    );
}

#[test]
fn text_as_it_is_before_any_poke_is_explained_too() {
    let scene = Scene::new();
    let file = module().text;
    for at in [0x50, 0x58] {
        scene
            .fake
            .poke(GuestPa(TEXT + at), &file[at as usize..at as usize + 5]);
    }
    scene.fake.poke(GuestPa(TEXT + 0x10), &[0xe9]);
    scene
        .fake
        .poke(GuestPa(TEXT + 0x11), &rel(0x11, LINK + SLIDE + 0x800));
    scene.fake.poke(GuestPa(TEXT + 0x30), &[0xe8]);
    scene
        .fake
        .poke(GuestPa(TEXT + 0x31), &rel(0x31, LINK + SLIDE + 0x1000));
    assert_eq!(scene.explained().unwrap().changed, BTreeMap::new());
}

#[test]
fn every_changed_byte_is_found() {
    let text = running();
    let mut missed = Vec::new();
    for at in 0..0x90 {
        let scene = Scene::new();
        scene
            .fake
            .poke(GuestPa(TEXT + at), &[text[at as usize] ^ 0x41]);
        match scene.explained() {
            Err(Unknown::Unexplained(what)) => {
                assert!(what[0].contains("[sample]"), "{what:?}");
            }
            other => missed.push((at, other.map(|_| ()))),
        }
    }
    // Initialisation memory is gone, so code that nothing executes may name any page of the module area as where it was.
    assert_eq!(missed, [(0x64, Ok(()))]);
    // While it is there, it is known where.
    let scene = Scene::new();
    scene.word(THIS[0] + 0xa0, INIT);
    assert!(scene.explained().is_ok());
    scene.fake.poke(GuestPa(TEXT + 0x64), &[text[0x64] ^ 0x41]);
    assert!(matches!(scene.explained(), Err(Unknown::Unexplained(_))));
}

#[test]
fn a_jump_that_leaves_the_kernels_functions_is_not_explained() {
    let scene = Scene::new();
    // The paravirt site calls the middle of a function.
    scene
        .fake
        .poke(GuestPa(TEXT + 0x59), &rel(0x59, LINK + SLIDE + 4));
    assert!(matches!(scene.explained(), Err(Unknown::Unexplained(_))));
}

#[test]
fn an_unknown_neighbour_leaves_the_module_unknown() {
    let scene = Scene::new();
    let kernel = scene.kernel();
    let error = explain(
        &scene.bundle,
        kernel.slide,
        &scene.bundle.modules[0],
        &scene.sample(),
        &Exports::default(),
        &kernel.memory(&scene.fake),
    );
    let error = error.unwrap_err().to_string();
    assert!(error.contains("uses `helper` of another module"), "{error}");
}

#[test]
fn a_guest_without_retpolines_is_refused() {
    let scene = Scene::new();
    scene
        .fake
        .poke(GuestPa(TEXT + 0x20), &[0xff, 0xd0, 0x0f, 0x1f, 0]);
    assert_eq!(scene.explained(), Err(Unknown::RetpolinesOff(1)));
}

#[test]
fn a_variants_text_is_the_running_text_with_its_edits() {
    let scene = Scene::new();
    let (module, slide) = (&scene.bundle.modules[0], scene.kernel().slide);
    let running = running();
    let text = |variant| edited(module, variant, GuestVa(CORE), slide, &running).unwrap();
    assert_eq!(text(0), running);
    assert_eq!(text(1), running, "a plain return is what this kernel has");
    let hardened = text(2);
    let kernel = LINK + SLIDE;
    let mut expected = running.clone();
    expected[0x10] = 0xe9;
    expected[0x11..0x15].copy_from_slice(&rel(0x11, kernel + 0x2010));
    expected[0x21..0x25].copy_from_slice(&rel(0x21, kernel + 0x2040));
    assert_eq!(hardened, expected);
    assert!(edited(module, 3, GuestVa(CORE), slide, &running).is_none());
    let far = GuestVa(0xffff_9000_0000_0000);
    assert!(edited(module, 2, far, slide, &running).is_none());
}
