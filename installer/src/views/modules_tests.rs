//! One module in the small guest: two pages of text with a return site in each.

use super::{Modules, News, reset, spare};
use crate::guest::forms::JMP;
use crate::views::journal::{Journal, State};
use crate::views::testkit::{self, LINK, RET, SLIDE};
use crate::views::{apply, verify};
use crate::xen::fake::Fake;
use crate::xen::{GuestPa, GuestVa, Hypervisor as _, PAGE};
use penumbra_bundle::{
    Bundle, FileRef, Form, LinkVa, Module, ModuleEdit, ModuleName, ModuleReloc, ModuleRelocKind,
    ModuleSet, PassSummary, PerMemory, Put, Site, SiteKind, SlotKind, Target, TextOff,
};
use std::collections::BTreeMap;

/// Where its text lies: behind the kernel's, in frames of its own.
const TEXT: GuestPa = GuestPa(0x1_8000);
const BASE: u64 = LINK + SLIDE + 0x2_0000;
/// Its `struct module`, and where the list's head is.
const STRUCT: u64 = 0x1_a000;
const DIRECT: u64 = 0xffff_8880_0000_0000;
const HEAD: u64 = 0x1_5200;
const SITES: [u32; 2] = [0x10, 0x1010];

fn module() -> Module {
    let edit = |put: &dyn Fn() -> Put| -> Vec<ModuleEdit> {
        SITES
            .map(|at| ModuleEdit {
                at: TextOff(at),
                slot: SlotKind::Return,
                put: put(),
            })
            .to_vec()
    };
    let mut text = vec![0x90; 2 * PAGE];
    for at in SITES {
        text[at as usize] = JMP;
    }
    Module {
        name: "small".to_owned(),
        build_id: "beef".to_owned(),
        srcversion: None,
        vermagic: String::new(),
        file_sha256: String::new(),
        sections: Vec::new(),
        text_size: text.len() as u32,
        sizes: PerMemory::new(|_| text.len() as u32),
        text,
        targets: vec![Target::Kernel(LinkVa(LINK + 0x800))],
        relocs: SITES
            .map(|at| ModuleReloc {
                at: TextOff(at + 1),
                kind: ModuleRelocKind::Relative32,
                target: 0,
                addend: -4,
            })
            .to_vec(),
        sites: SITES
            .map(|at| Site {
                at: TextOff(at),
                len: 5,
                kind: SiteKind::Return,
                forms: vec![testkit::exact(&RET), Form::JumpReturnThunk],
            })
            .to_vec(),
        form_relocs: Vec::new(),
        symbols: Vec::new(),
        exports: Vec::new(),
        edits: vec![
            Vec::new(),
            edit(&|| Put::Bytes(RET.to_vec())),
            edit(&|| Put::Branch(vec![JMP], LinkVa(LINK + 0x2010))),
        ],
        left: BTreeMap::new(),
    }
}

/// Where `struct module` has what stays in memory, and what does not.
const TOGETHER: &[(&str, u32)] = &[
    ("module.core_layout", 0x60),
    ("module.init_layout", 0x80),
    ("module_layout.base", 0),
    ("module_layout.text_size", 0xc),
];
/// Where it has each of its memories (from Linux 6.4 on); the numbers are no kernel's.
const APART: &[(&str, u32)] = &[
    ("module.mem", 0x300),
    ("sizeof.module_memory", 0x18),
    ("module_memory.base", 0),
    ("module_memory.size", 8),
    ("mod_mem_type.MOD_DATA", 0),
    ("mod_mem_type.MOD_RODATA", 1),
    ("mod_mem_type.MOD_TEXT", 2),
    ("mod_mem_type.MOD_RO_AFTER_INIT", 3),
    ("mod_mem_type.MOD_INIT_DATA", 4),
    ("mod_mem_type.MOD_INIT_RODATA", 5),
    ("mod_mem_type.MOD_INIT_TEXT", 6),
];

fn bundle() -> Bundle {
    bundle_with(TOGETHER)
}

fn bundle_with(memories: &[(&str, u32)]) -> Bundle {
    let mut bundle = testkit::bundle();
    let layout = &mut bundle.manifest.layout;
    layout.extend(memories.iter().map(|(key, at)| ((*key).to_owned(), *at)));
    for (key, offset) in [
        ("module.state", 0),
        ("module.list", 8),
        ("module.name", 0x18),
        ("module.percpu", 0xa0),
        ("module.notes_attrs", 0xa8),
        ("module_notes_attrs.notes", 0),
        ("module_notes_attrs.attrs", 8),
        ("sizeof.bin_attribute", 0x20),
        ("bin_attribute.attr", 0),
        ("bin_attribute.size", 8),
        ("bin_attribute.private", 0x10),
        ("attribute.name", 0),
    ] {
        bundle.manifest.layout.insert(key.to_owned(), offset);
    }
    let head = LinkVa(LINK + 0x1_0000 + (HEAD - 0x1_4000));
    bundle.manifest.data.insert("modules".to_owned(), head);
    for variant in &mut bundle.manifest.variants {
        variant.passes.push(PassSummary {
            name: super::FREE_HOOK.to_owned(),
            edited: 1,
            left: BTreeMap::new(),
            parameters: BTreeMap::new(),
            figures: BTreeMap::new(),
        });
    }
    bundle.modules = vec![module()];
    bundle.manifest.modules = Some(ModuleSet {
        file: FileRef {
            name: "modules.postcard".to_owned(),
            sha256: String::new(),
        },
        modules: vec![ModuleName {
            name: "small".to_owned(),
            build_id: "beef".to_owned(),
        }],
    });
    let files = bundle.seal();
    Bundle::from_files(&files).unwrap()
}

fn word(fake: &Fake, at: u64, value: u64) {
    fake.poke(GuestPa(at), &value.to_le_bytes());
}

fn head_va() -> u64 {
    LINK + SLIDE + 0x1_0000 + (HEAD - 0x1_4000)
}

/// The guest loads the module; `build` are the two bytes of its build-id.
fn load(fake: &Fake, build: [u8; 2]) {
    for page in 0..2 {
        // The page table that maps the text has an entry for each page from LINK + SLIDE on.
        word(fake, 0x4000 + (32 + page) * 8, TEXT.0 + page * 0x1000 + 3);
    }
    let mut text = vec![0x90; 2 * PAGE];
    for at in SITES {
        text[at as usize..][..5].copy_from_slice(&RET);
    }
    fake.poke(TEXT, &text);
    let at = STRUCT;
    fake.poke(GuestPa(at), &[0; 0x400]);
    fake.poke(GuestPa(at + 0x18), b"small\0");
    word(fake, at + 0x60, BASE);
    fake.poke(GuestPa(at + 0x6c), &0x2000_u32.to_le_bytes());
    // The same for who looks for its memories apart: the third of them.
    word(fake, at + 0x330, BASE);
    fake.poke(GuestPa(at + 0x338), &0x2000_u32.to_le_bytes());
    word(fake, at + 0xa8, DIRECT + at + 0x200);
    fake.poke(GuestPa(at + 0x200), &1_u32.to_le_bytes());
    word(fake, at + 0x208, DIRECT + at + 0x280);
    word(fake, at + 0x210, 18);
    word(fake, at + 0x218, DIRECT + at + 0x2c0);
    fake.poke(GuestPa(at + 0x280), b".note.gnu.build-id\0");
    let note = [&b"\x04\0\0\0\x02\0\0\0\x03\0\0\0GNU\0"[..], &build].concat();
    fake.poke(GuestPa(at + 0x2c0), &note);
    // The list: head -> module -> head.
    word(fake, HEAD, DIRECT + at + 8);
    word(fake, at + 8, head_va());
}

/// The guest unloads it: says so, takes it from the list, and uses the frames for something else.
fn unload(fake: &Fake) {
    fake.free(GuestVa(DIRECT + STRUCT));
    word(fake, HEAD, head_va());
    fake.poke(TEXT, &[0xaa; 2 * PAGE]);
}

struct World {
    fake: Fake,
    journal: Journal,
    state: State,
    _dir: tempfile::TempDir,
}

fn world(bundle: &Bundle) -> World {
    let fake = testkit::guest(bundle);
    word(&fake, HEAD, head_va());
    let dir = tempfile::tempdir().unwrap();
    let journal = testkit::journal(&dir);
    fake.domain.borrow_mut().max_pages += 2 * spare(&testkit::request(bundle));
    let state = apply(&fake, &journal, &testkit::request(bundle))
        .unwrap()
        .state;
    World {
        fake,
        journal,
        state,
        _dir: dir,
    }
}

impl World {
    fn look(&mut self, modules: &mut Modules<'_>) -> Vec<News> {
        let events = self.fake.events().unwrap();
        modules
            .look(&self.fake, &self.journal, &mut self.state, &events)
            .unwrap()
    }

    /// The five bytes at the module's first site in the view called `name`.
    fn site(&self, name: &str) -> Vec<u8> {
        let view = self.state.view(name).unwrap();
        self.fake.peek(view, GuestPa(TEXT.0 + 0x10), 5)
    }

    fn explained(&self, bundle: &Bundle) -> bool {
        let report = verify::verify(&self.fake, bundle, &self.state).unwrap();
        report.explained
    }
}

fn hardened_site() -> Vec<u8> {
    let distance = (LINK + SLIDE + 0x2010).wrapping_sub(BASE + 0x15) as u32;
    [&[JMP][..], &distance.to_le_bytes()].concat()
}

#[test]
fn a_module_gets_views_when_it_is_live_and_loses_them_before_it_is_freed() {
    let bundle = bundle();
    let mut world = world(&bundle);
    let mut modules = Modules::new(&bundle, &world.state);
    assert_eq!(modules.unable(), None);
    assert_eq!(modules.foreign(), None);
    assert_eq!(world.look(&mut modules), []);
    assert_eq!(modules.foreign(), Some(&[][..]));
    for _ in 0..3 {
        load(&world.fake, [0xbe, 0xef]);
        let news = world.look(&mut modules);
        assert!(
            matches!(&news[..], [News::Mapped { name, pages: 2, .. }] if name == "small"),
            "{news:?}"
        );
        assert_eq!(world.site("hardened"), hardened_site());
        assert_eq!(world.site("stock"), RET);
        assert_eq!(world.site("fast"), RET);
        assert!(world.explained(&bundle));
        for view in ["stock", "fast", "hardened"] {
            let view = world.state.view(view).unwrap();
            assert!(!world.fake.store(view, TEXT, &[0]), "text is read-only");
        }
        assert_eq!(world.look(&mut modules), []);
        unload(&world.fake);
        // At once, before the watcher looks: the frames are the guest's own again, to read and to write.
        for view in ["stock", "fast", "hardened"] {
            assert_eq!(world.site(view), [0xaa; 5]);
            let view = world.state.view(view).unwrap();
            assert!(world.fake.store(view, TEXT, &[0xaa]));
        }
        assert_eq!(world.look(&mut modules), []);
        assert!(world.state.modules.is_empty());
    }
}

#[test]
fn code_in_a_memory_of_its_own_is_found_by_the_kernels_number_for_it() {
    let bundle = bundle_with(APART);
    let mut world = world(&bundle);
    let mut modules = Modules::new(&bundle, &world.state);
    load(&world.fake, [0xbe, 0xef]);
    let news = world.look(&mut modules);
    assert!(
        matches!(&news[..], [News::Mapped { pages: 2, .. }]),
        "{news:?}"
    );
    assert_eq!(world.site("hardened"), hardened_site());
    assert!(world.explained(&bundle));
    unload(&world.fake);
    assert_eq!(world.site("hardened"), [0xaa; 5]);

    // Without a number for each memory nothing is believed.
    let bundle = bundle_with(&APART[..APART.len() - 1]);
    let modules = Modules::new(&bundle, &world.state);
    assert!(modules.unable().unwrap().contains("is not known"));
}

#[test]
fn a_poke_or_a_free_between_reading_and_mapping_makes_it_try_again() {
    let bundle = bundle();
    let mut world = world(&bundle);
    let mut modules = Modules::new(&bundle, &world.state);
    load(&world.fake, [0xbe, 0xef]);
    // When the first copy is written, the guest frees something else.
    *world.fake.hook.borrow_mut() = Some(Box::new(|fake, call| {
        if call.starts_with("write ") {
            fake.free(GuestVa(0x1234));
        }
    }));
    assert_eq!(world.look(&mut modules), []);
    assert!(world.state.modules.is_empty());
    assert_eq!(world.site("hardened"), RET);
    *world.fake.hook.borrow_mut() = None;
    assert!(matches!(
        &world.look(&mut modules)[..],
        [News::Mapped { .. }]
    ));
    assert_eq!(world.site("hardened"), hardened_site());
}

#[test]
fn an_unknown_build_or_text_stays_and_is_said_once() {
    let bundle = bundle();
    let mut world = world(&bundle);
    let mut modules = Modules::new(&bundle, &world.state);
    load(&world.fake, [0xbe, 0xee]);
    let news = world.look(&mut modules);
    assert!(
        matches!(&news[..], [News::Stays { why, .. }] if why.contains("beee")),
        "{news:?}"
    );
    assert_eq!(world.look(&mut modules), []);
    assert_eq!(modules.foreign(), Some(&["small".to_owned()][..]));
    unload(&world.fake);
    world.look(&mut modules);
    assert_eq!(modules.foreign(), Some(&[][..]));

    let mut modules = Modules::new(&bundle, &world.state);
    load(&world.fake, [0xbe, 0xef]);
    world.fake.poke(GuestPa(TEXT.0 + 0x1100), &[0xcc]);
    let news = world.look(&mut modules);
    assert!(
        matches!(&news[..], [News::Stays { why, .. }] if why.contains("cannot be explained")),
        "{news:?}"
    );
    assert_eq!(world.site("hardened"), RET);
}

#[test]
fn a_bundle_without_the_hook_maps_no_module() {
    let mut bundle = bundle();
    bundle.manifest.variants[0].passes.clear();
    let bundle = Bundle::from_files(&bundle.seal()).unwrap();
    let mut world = world(&bundle);
    let mut modules = Modules::new(&bundle, &world.state);
    assert!(modules.unable().unwrap().contains("hook"));
    load(&world.fake, [0xbe, 0xef]);
    assert_eq!(world.look(&mut modules), []);
    assert_eq!(world.site("hardened"), RET);
}

#[test]
fn what_another_watcher_mapped_is_taken_out_first() {
    let bundle = bundle();
    let mut world = world(&bundle);
    let mut modules = Modules::new(&bundle, &world.state);
    load(&world.fake, [0xbe, 0xef]);
    world.look(&mut modules);
    assert_eq!(world.site("hardened"), hardened_site());
    let mut state = world.journal.load().unwrap().unwrap();
    assert_eq!(state.modules.len(), 1, "the journal knows");
    reset(&world.fake, &world.journal, &mut state).unwrap();
    assert_eq!(world.site("hardened"), RET);
    assert!(world.journal.load().unwrap().unwrap().modules.is_empty());
    world.state = state;
    let mut next = Modules::new(&bundle, &world.state);
    assert!(matches!(&world.look(&mut next)[..], [News::Mapped { .. }]));
    assert!(world.explained(&bundle));
}
