//! A guest small enough to read: four pages of text, five processes, one cave; and the bundle for it.
//!
//! | text offset | holds |
//! |---|---|
//! | 0x10, 0x1010 | return sites; in the file a jump to the return thunk at 0x800, running a plain `ret` |
//! | 0x20, 0x1020 | retpoline sites: `call` to 0x900 |
//! | 0x40 | a jump label |
//! | 0x100 | a 32-bit absolute address |
//! | 0x2004 to 0x4000 | the cave: a thunk at 0x2010 with its tail at 0x2020, one at 0x2040, an address at 0x2060 |

use crate::guest::forms::add32;
use crate::guest::{Kernel, explain};
use crate::views::journal::Journal;
use crate::views::{Request, digest};
use crate::xen::fake::Fake;
use crate::xen::{Gfn, GuestPa, Hypervisor, PAGE, Vcpu, ViewId};
use penumbra_bundle::{
    Bundle, Cave, Edit, Edits, FileRef, Form, LinkVa, Manifest, Mitigation, Reloc, RelocKind,
    RunTimeModel, Site, SiteKind, SlotKind, Symbol, Symbols, Text, TextOff, VaRange, Variant,
};
use std::path::PathBuf;
use std::sync::LazyLock;

pub const LINK: u64 = 0xffff_ffff_8100_0000;
pub const SLIDE: u64 = 0xa0_0000;
/// Where the text lies in guest-physical memory.
pub const TEXT: GuestPa = GuestPa(0x1_0000);
const DATA: u64 = 0x1_4000;
const DIRECT: u64 = 0xffff_8880_0000_0000;
pub const RET: [u8; 5] = [0xc3, 0xcc, 0xcc, 0xcc, 0xcc];
/// poking_mm's root.
pub const POKING: u64 = 0x2_1000;

fn rel(opcode: u8, at: u32, to: u32) -> Vec<u8> {
    let mut bytes = vec![opcode];
    bytes.extend(to.wrapping_sub(at + 5).to_le_bytes());
    bytes
}

fn put(text: &mut [u8], at: usize, bytes: &[u8]) {
    text[at..at + bytes.len()].copy_from_slice(bytes);
}

fn file(name: &str) -> FileRef {
    FileRef {
        name: name.to_owned(),
        sha256: String::new(),
    }
}

fn edit(at: u32, slot: SlotKind, bytes: Vec<u8>) -> Edit {
    Edit {
        at: TextOff(at),
        slot,
        bytes,
    }
}

fn site(at: u32, len: u8, kind: SiteKind, forms: Vec<Form>) -> Site {
    Site {
        at: TextOff(at),
        len,
        kind,
        forms,
    }
}

pub fn exact(bytes: &[u8]) -> Form {
    Form::Exact {
        bytes: bytes.to_vec(),
        abs32: Vec::new(),
        inverse32: Vec::new(),
    }
}

/// An ELF file with one allocated section (gABI, ELF-64).
fn elf(address: u64, data: &[u8]) -> Vec<u8> {
    let names = b"\0.thunks\0.shstrtab\0";
    let (data_at, names_at) = (64, 64 + data.len());
    let headers_at = (names_at + names.len()).next_multiple_of(8);
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend([0; 16]);
    elf.extend((headers_at as u64).to_le_bytes());
    elf.extend([0; 4]);
    for half in [64_u16, 0, 0, 64, 3, 2] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(data);
    elf.extend(names);
    elf.resize(headers_at, 0);
    elf.extend([0; 64]);
    for (name, kind, flags, addr, at, len) in [
        (1_u32, 1_u32, 6_u64, address, data_at, data.len()),
        (9, 3, 0, 0, names_at, names.len()),
    ] {
        elf.extend(name.to_le_bytes());
        elf.extend(kind.to_le_bytes());
        for word in [flags, addr, at as u64, len as u64, 0, 1, 0] {
            // link and info share the fifth word; alignment and entry size are the last two.
            elf.extend(word.to_le_bytes());
        }
    }
    elf
}

const LAYOUT: [(&str, u32); 30] = [
    ("task_struct.tasks", 0x00),
    ("task_struct.mm", 0x10),
    ("task_struct.pid", 0x18),
    ("task_struct.flags", 0x1c),
    ("task_struct.comm", 0x20),
    ("task_struct.real_cred", 0x30),
    ("task_struct.start_time", 0x38),
    ("task_struct.stack", 0x40),
    ("task_struct.signal", 0x48),
    ("task_struct.thread_node", 0x50),
    ("task_struct.thread", 0x60),
    ("thread_struct.sp", 0x08),
    ("signal_struct.thread_head", 0x08),
    ("mm_struct.pgd", 0x08),
    ("mm_struct.exe_file", 0x10),
    ("file.f_path", 0x08),
    ("path.mnt", 0x00),
    ("path.dentry", 0x08),
    ("dentry.d_name", 0x08),
    ("dentry.d_parent", 0x00),
    ("qstr.len", 0x04),
    ("qstr.name", 0x08),
    ("vfsmount.mnt_root", 0x00),
    ("mount.mnt", 0x10),
    ("mount.mnt_parent", 0x00),
    ("mount.mnt_mountpoint", 0x08),
    ("cred.uid", 0x04),
    ("cred.euid", 0x08),
    ("const.THREAD_SIZE", 0x1000),
    ("const.ORC_TYPE_BITS", 3),
];

/// The bundle.
pub fn bundle() -> Bundle {
    static BUNDLE: LazyLock<Bundle> = LazyLock::new(make_bundle);
    BUNDLE.clone()
}

fn make_bundle() -> Bundle {
    let mut text = vec![0x90; 4 * PAGE];
    for at in [0x10, 0x1010] {
        put(&mut text, at as usize, &rel(0xe9, at, 0x800));
    }
    for at in [0x20, 0x1020] {
        put(&mut text, at as usize, &rel(0xe8, at, 0x900));
    }
    put(&mut text, 0x40, &[0x0f, 0x1f, 0x44, 0, 0]);
    put(&mut text, 0x100, &0x8100_0800_u32.to_le_bytes());
    text[0x2004..].fill(0xcc);
    let mut cave = vec![0xcc; 0x70];
    put(&mut cave, 0x10, &rel(0xe9, 0x2020, 0x800));
    put(&mut cave, 0x50, &(LINK + 0x900).to_le_bytes());
    let at = |offset: u64| LinkVa(LINK + offset);
    let model = RunTimeModel {
        abs32: vec![TextOff(0x100)],
        sites: vec![
            site(0x10, 5, SiteKind::Return, vec![exact(&RET)]),
            site(
                0x20,
                5,
                SiteKind::Retpoline,
                vec![exact(&[0xff, 0xd0, 0x0f, 0x1f, 0])],
            ),
            site(
                0x40,
                5,
                SiteKind::JumpLabel,
                vec![exact(&rel(0xe9, 0x40, 0x60))],
            ),
            site(0x1010, 5, SiteKind::Return, vec![exact(&RET)]),
            site(
                0x1020,
                5,
                SiteKind::Retpoline,
                vec![exact(&[0xff, 0xd0, 0x0f, 0x1f, 0])],
            ),
        ],
        functions: vec![TextOff(0), TextOff(0x1000)],
        return_thunks: vec![TextOff(0x800)],
        ..RunTimeModel::default()
    };
    let variant = |name: &str, drops: Vec<Mitigation>| Variant {
        name: name.to_owned(),
        passes: Vec::new(),
        drops,
        edits: file(&format!("{name}.edits")),
        edit_count: 0,
    };
    let fast = [0x10, 0x20, 0x1010, 0x1020].map(|at| {
        if at & 0xff == 0x10 {
            edit(at, SlotKind::Return, RET.to_vec())
        } else {
            edit(at, SlotKind::Indirect, vec![0x2e, 0x2e, 0x2e, 0xff, 0xd0])
        }
    });
    let hardened = [0x10, 0x20, 0x1010, 0x1020].map(|at| {
        if at & 0xff == 0x10 {
            edit(at, SlotKind::Return, rel(0xe9, at, 0x2010))
        } else {
            edit(at, SlotKind::Indirect, rel(0xe8, at, 0x2040))
        }
    });
    let mut data: Vec<(&str, u64)> = vec![("init_top_pgt", 0x1_2000)];
    data.extend([
        ("init_task", 0x1_0000),
        ("poking_mm", 0x1_1000),
        ("poking_addr", 0x1_1008),
        ("__start_orc_unwind_ip", 0x1_3000),
        ("__stop_orc_unwind_ip", 0x1_3008),
        ("__start_orc_unwind", 0x1_3100),
    ]);
    let mut bundle = Bundle {
        manifest: Manifest {
            schema: penumbra_bundle::SCHEMA.to_owned(),
            generator: "testkit".to_owned(),
            kernel: penumbra_bundle::Kernel {
                build_id: "abcd".to_owned(),
                release: "6.1.0-test".to_owned(),
                banner: String::new(),
                image_sha256: String::new(),
                notes: VaRange {
                    start: at(0x1_1100),
                    end: at(0x1_1114),
                },
                syscall_entry: at(0x200),
            },
            text: Text {
                start: at(0),
                end: at(4 * PAGE as u64),
                file: file("text.bin"),
            },
            model: file("model.postcard"),
            symbols: file("symbols.postcard"),
            cave: Cave {
                range: VaRange {
                    start: at(0x2004),
                    end: at(0x4000),
                },
                filler: 0xcc,
                file: file("cave.elf"),
                relocs: file("relocations.postcard"),
                return_tails: vec![at(0x2020)],
                tables: Vec::new(),
                traps: Vec::new(),
            },
            variants: vec![
                variant("stock", Vec::new()),
                variant("fast", vec![Mitigation::Retpoline]),
                variant("hardened", Vec::new()),
            ],
            forward: None,
            backward: None,
            watched: None,
            modules: None,
            layout: LAYOUT
                .iter()
                .map(|(name, at)| ((*name).to_owned(), *at))
                .collect(),
            data: data
                .into_iter()
                .map(|(name, to)| (name.to_owned(), at(to)))
                .collect(),
        },
        text,
        model,
        symbols: Symbols(vec![
            Symbol {
                at: TextOff(0),
                name: "first".to_owned(),
            },
            Symbol {
                at: TextOff(0x1000),
                name: "second".to_owned(),
            },
        ]),
        relocs: vec![Reloc {
            at: TextOff(0x2060),
            kind: RelocKind::Abs64,
        }],
        cave: elf(LINK + 0x2010, &cave),
        forward: None,
        backward: None,
        watched: None,
        modules: Vec::new(),
        edits: vec![
            Edits::default(),
            Edits(fast.to_vec()),
            Edits(hardened.to_vec()),
        ],
    };
    let files = bundle.seal();
    Bundle::from_files(&files).expect("the testkit's bundle is sound")
}

/// The running text: relocated, returns patched.
pub fn running(bundle: &Bundle) -> Vec<u8> {
    let mut text = bundle.text.clone();
    add32(&mut text[0x100..0x104], SLIDE as u32);
    put(&mut text, 0x10, &RET);
    put(&mut text, 0x1010, &RET);
    text
}

fn word(fake: &Fake, at: u64, value: u64) {
    fake.poke(GuestPa(at), &value.to_le_bytes());
}

/// A guest whose kernel is up.
pub fn guest(bundle: &Bundle) -> Fake {
    let fake = Fake::with_ram(64);
    // init_top_pgt is the data page at 0x12000 behind the text's start.
    let top = DATA + 0x2000;
    let pd_index = ((LINK + SLIDE) >> 21) & 0x1ff;
    for (at, value) in [
        (top + 511 * 8, 0x2003),
        (0x2000 + 510 * 8, 0x3003),
        (0x3000 + pd_index * 8, 0x4003),
        (top + 273 * 8, 0x5003),
        (0x5000, 0x6003),
        (0x6000, 0x7003),
    ] {
        word(&fake, at, value);
    }
    for page in 0..4 {
        word(&fake, 0x4000 + page * 8, TEXT.0 + page * 0x1000 + 3);
        word(&fake, 0x4000 + (16 + page) * 8, DATA + page * 0x1000 + 3);
    }
    for page in 0..64 {
        word(&fake, 0x7000 + page * 8, page * 0x1000 + 3);
    }
    fake.poke(TEXT, &running(bundle));
    // poking_mm, poking_addr, notes.
    let poking_mm = 0x2_2000;
    word(&fake, DATA + 0x1000, DIRECT + poking_mm);
    word(&fake, DATA + 0x1008, 0x5555_0000);
    word(&fake, poking_mm + 8, DIRECT + POKING);
    fake.poke(
        GuestPa(DATA + 0x1100),
        b"\x04\0\0\0\x02\0\0\0\x03\0\0\0GNU\0\xab\xcd\0\0",
    );
    // In the first two pages of the text a frame has 0x20 bytes and a return address at its end; of others nothing is known.
    let ips = [-0x1_3000_i32, 0x2000 - 0x1_3004];
    fake.poke(GuestPa(DATA + 0x3000), &ips.map(i32::to_le_bytes).concat());
    fake.poke(
        GuestPa(DATA + 0x3100),
        &[0x20, 0, 0, 0, 5, 2, 0, 0, 0, 0, 0, 0],
    );
    processes(&fake);
    *fake.vcpus.borrow_mut() = vec![Vcpu {
        rip: 0x40_1000,
        rsp: 0x7fff_0000,
        cr3: top | 0x5,
        cr4: 0,
        lstar: LINK + SLIDE + 0x200,
        user: true,
    }];
    fake
}

/// Where process `index` (0 is init_task) has its structures; stack and page-table root have pages of their own.
pub fn task(index: u64) -> u64 {
    if index == 0 {
        DATA
    } else {
        0x2_4000 + index * 0x1000
    }
}

/// The kernel's own address of the task in physical memory at `at`.
fn va(at: u64) -> u64 {
    if (DATA..DATA + 0x4000).contains(&at) {
        LINK + SLIDE + 0x1_0000 + (at - DATA)
    } else {
        DIRECT + at
    }
}

/// The page-table root of process `index`.
pub fn root(index: u64) -> crate::xen::Root {
    crate::xen::Root(0x3_0000 + index * 0x1000)
}

/// Where process `index`'s stack is.
pub fn stack(index: u64) -> u64 {
    0x3_8000 + index * 0x1000
}

const TOP_MOUNT: u64 = 0x2_3000;
/// The mount of a namespace that a user made.
const OTHER_MOUNT: u64 = 0x2_3040;
const ROOT_DENTRY: u64 = 0x2_3080;

fn processes(fake: &Fake) {
    for mount in [TOP_MOUNT, OTHER_MOUNT] {
        word(fake, mount, va(mount));
        word(fake, mount + 0x10, va(ROOT_DENTRY));
    }
    word(fake, ROOT_DENTRY, va(ROOT_DENTRY));
    let list: [(u32, &str, &str, u64); 5] = [
        (0, "swapper", "", TOP_MOUNT),
        (1, "init", "/sbin/init", TOP_MOUNT),
        (100, "payroll", "/usr/bin/payroll", TOP_MOUNT),
        (101, "sh", "/bin/sh", TOP_MOUNT),
        (102, "payroll", "/usr/bin/payroll", OTHER_MOUNT),
    ];
    for (index, (pid, comm, exe, mount)) in list.iter().enumerate() {
        let index = index as u64;
        let at = task(index);
        word(fake, at, va(task((index + 1) % list.len() as u64)));
        fake.poke(GuestPa(at + 0x18), &pid.to_le_bytes());
        fake.poke(GuestPa(at + 0x20), comm.as_bytes());
        word(fake, at + 0x30, va(at) + 0x100);
        word(fake, at + 0x38, 1000 + index);
        word(fake, at + 0x40, va(stack(index)));
        word(fake, at + 0x48, va(at) + 0x140);
        // The thread list: head and the one thread.
        word(fake, at + 0x148, va(at) + 0x50);
        word(fake, at + 0x50, va(at) + 0x148);
        word(fake, at + 0x68, va(stack(index)) + 0xf00);
        if exe.is_empty() {
            continue;
        }
        fake.poke(GuestPa(at + 0x104), &1000_u32.to_le_bytes());
        fake.poke(GuestPa(at + 0x108), &1000_u32.to_le_bytes());
        word(fake, at + 0x10, va(at) + 0x180);
        word(fake, at + 0x188, va(root(index).0));
        word(fake, at + 0x190, va(at) + 0x1c0);
        word(fake, at + 0x1c8, va(*mount) + 0x10);
        set_exe(fake, index, exe);
    }
}

/// Has process `index` run the program `exe`: another file in the same mm, as seen from outside.
pub fn set_exe(fake: &Fake, index: u64, exe: &str) {
    let at = task(index);
    let parts: Vec<&str> = exe.split('/').skip(1).collect();
    let mut parent = ROOT_DENTRY;
    for (depth, part) in parts.iter().enumerate() {
        let dentry = at + 0x200 + depth as u64 * 0x40;
        word(fake, dentry, va(parent));
        fake.poke(GuestPa(dentry + 0x0c), &(part.len() as u32).to_le_bytes());
        word(fake, dentry + 0x10, va(dentry) + 0x20);
        fake.poke(GuestPa(dentry + 0x20), part.as_bytes());
        parent = dentry;
    }
    // The other of two files.
    let old = fake.peek(ViewId::HOST, GuestPa(at + 0x190), 8);
    let file = if old == (va(at) + 0x1c0).to_le_bytes() {
        0x1e0
    } else {
        0x1c0
    };
    let mount = fake.peek(ViewId::HOST, GuestPa(at + 0x1c8), 8);
    fake.poke(GuestPa(at + file + 8), &mount);
    word(fake, at + file + 0x10, va(parent));
    word(fake, at + 0x190, va(at) + file);
}

/// A second thread's task, for [`add_thread`].
pub const THREAD: u64 = 0x2_b000;

/// Gives process `index` a second thread.
pub fn add_thread(fake: &Fake, index: u64) {
    let at = task(index);
    let leader = fake.peek(ViewId::HOST, GuestPa(at), 0x60);
    fake.poke(GuestPa(THREAD), &leader);
    word(fake, THREAD + 0x38, 5000);
    // Head, leader, thread, head.
    word(fake, at + 0x50, va(THREAD) + 0x50);
    word(fake, THREAD + 0x50, va(at) + 0x148);
}

/// Another kernel starts in the guest: its system calls enter elsewhere.
pub fn kexec(fake: &Fake) {
    for vcpu in fake.vcpus.borrow_mut().iter_mut() {
        vcpu.lstar += 0x20_0000;
    }
}

/// Binds a root as somebody else would.
pub fn bind(fake: &Fake, root: crate::xen::Root, view: ViewId) {
    fake.set_binding(root, view, false, &[])
        .expect("a binding of the test's own");
}

/// What must be as before once nothing is applied: frames, text, pages, limit.
pub type Snapshot = (Vec<Gfn>, Vec<u8>, u64, u64);

/// Takes it.
pub fn snapshot(fake: &Fake) -> Snapshot {
    let domain = fake.domain.borrow();
    (
        fake.memory.borrow().keys().copied().collect(),
        text_of(fake, ViewId::HOST),
        domain.pages,
        domain.max_pages,
    )
}

/// Nothing is applied, and all is as before.
pub fn assert_nothing(fake: &Fake, before: &Snapshot, when: &str) {
    assert!(!fake.on.get(), "{when}: altp2m is off");
    assert!(fake.views.borrow().is_empty(), "{when}: no view is left");
    let table = fake.table.borrow();
    assert_eq!(*table, Default::default(), "{when}: no binding is left");
    assert!(
        snapshot(fake) == *before,
        "{when}: frames and text are as before"
    );
}

/// Every vCPU is on its own text or on a complete view, whatever root it loads.
pub fn assert_complete(fake: &Fake, bundle: &Bundle) {
    let table = fake.table.borrow();
    if !table.enabled {
        return;
    }
    let mut complete: Vec<Vec<u8>> = Vec::new();
    for variant in &bundle.manifest.variants {
        complete.push(with_edits(bundle, fake, &variant.name));
    }
    let bound = table.bound.values().map(|bound| bound.view);
    for view in bound.chain([table.default]) {
        assert!(
            complete.contains(&text_of(fake, view)),
            "view {view} is in use and no variant's text"
        );
    }
}

/// What a test asks to apply.
pub fn request(bundle: &Bundle) -> Request<'_> {
    Request {
        bundle,
        manifest_sha256: digest::sha256(b"manifest"),
        bundle_path: PathBuf::from("/bundle"),
        policy_path: PathBuf::from("/policy.toml"),
        name: "guest".to_owned(),
        default: "hardened".to_owned(),
    }
}

/// A journal in a directory that goes away.
pub fn journal(dir: &tempfile::TempDir) -> Journal {
    Journal::writer(dir.path(), crate::xen::DomId(1)).expect("a fresh directory")
}

/// The text as a view has it.
pub fn text_of(fake: &Fake, view: ViewId) -> Vec<u8> {
    fake.peek(view, TEXT, 4 * PAGE)
}

/// The running text with the edits of a variant and the cave over it.
pub fn with_edits(bundle: &Bundle, fake: &Fake, variant: &str) -> Vec<u8> {
    let kernel = Kernel::find(fake, &bundle.manifest).expect("the kernel is up");
    let mut text = text_of(fake, ViewId::HOST);
    let cave = super::cave::CaveImage::new(bundle, kernel.slide, explain::ReturnForm::Ret)
        .expect("the cave is sound");
    put(&mut text, cave.at.0 as usize, &cave.bytes);
    let (_, edits) = bundle.variant(variant).expect("a variant");
    for edit in &edits.0 {
        put(&mut text, edit.at.0 as usize, &edit.bytes);
    }
    text
}
