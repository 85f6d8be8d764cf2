//! Calls that are left out in `fast`: what stands for them, in which variants, and what the functions do.

use crate::cases::{Case, case};
use crate::scene::{Scene, emitted, real, report, says, vmlinuz};
use hardener::check::{Checker, Rule};
use hardener::image::unpacked;
use penumbra_bundle::{Edit, LinkVa, ModuleEdit, Put, SlotKind};

const NOTHING: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];
const TRUE: [u8; 5] = [0xb8, 1, 0, 0, 0];

fn gives_true(edit: &Edit) -> bool {
    edit.bytes == TRUE
}

/// Edits: invariants 1 and 3, and what is given back.
pub const EDITS: &[Case] = &[
    case(
        Rule::SameBoundaries,
        "another constant",
        "is not one whole instruction",
        |scene| Some(scene.change("fast", gives_true, |edit| edit.bytes[1] = 0)),
    ),
    case(
        Rule::SameBoundaries,
        "another register",
        "is not one whole instruction",
        |scene| Some(scene.change("fast", gives_true, |edit| edit.bytes[0] = 0xb9)),
    ),
    case(
        Rule::SameBoundaries,
        "nothing where a list is said to be sound",
        "gives back Nothing for a call of __list_",
        |scene| Some(scene.change("fast", gives_true, |edit| edit.bytes = NOTHING.to_vec())),
    ),
    case(
        Rule::SameBoundaries,
        "true where nothing is given back",
        "gives back True for a call of ",
        |scene| {
            let nothing = |edit: &Edit| edit.bytes == NOTHING;
            Some(scene.change("fast", nothing, |edit| edit.bytes = TRUE.to_vec()))
        },
    ),
    case(
        Rule::SameBoundaries,
        "the call one byte late",
        "does not start where an instruction starts",
        |scene| {
            let at = scene.change("fast", gives_true, |edit| edit.at.0 += 1);
            Some(LinkVa(at.0 + 1))
        },
    ),
    case(
        Rule::SameBoundaries,
        "half of the call",
        "replaces an instruction of 5 bytes by 3 bytes",
        |scene| {
            Some(scene.change("fast", gives_true, |edit| {
                edit.bytes = vec![0x0f, 0x1f, 0x00]
            }))
        },
    ),
    case(
        Rule::SameBoundaries,
        "a call of another function",
        "replaces something other than ",
        |scene| {
            // Of the function that the first one left out goes to.
            let at = call_of(scene, "mutex_lock");
            let edits = scene.edits("fast");
            let mut edit = edits.iter().find(|edit| gives_true(edit)).unwrap().clone();
            let text = scene.text().start.0;
            edit.at.0 = (at.0 - text) as u32;
            let edits = scene.edits("fast");
            let index = edits.partition_point(|other| other.at < edit.at);
            edits.insert(index, edit);
            Some(at)
        },
    ),
    case(
        Rule::SameBoundaries,
        "a call led elsewhere",
        "puts Call(",
        |scene| {
            let at = scene.change("fast", gives_true, |_| {});
            let other = scene.symbol("mutex_lock");
            let bytes = crate::scene::branch(&[0xe8], at, other);
            let offset = scene.off(at);
            let mut edits = scene.edits("fast").iter_mut();
            edits.find(|edit| edit.at == offset).unwrap().bytes = bytes;
            Some(at)
        },
    ),
    case(
        Rule::AllowedSlots,
        "a check left out that the recipe keeps",
        "leaves out a call of __list_",
        |scene| {
            let lists = |pass: &mut penumbra_bundle::PassSummary| {
                pass.parameters
                    .insert("lists".to_owned(), "keep".to_owned())
            };
            scene.pass("fast", "no-self-checks", lists);
            let first = scene.edits("fast").iter().find(|edit| gives_true(edit));
            let at = first.unwrap().at;
            Some(scene.va(at))
        },
    ),
    case(
        Rule::AllowedSlots,
        "a check left out in the variant that checks",
        "and no pass of the variant says so",
        |scene| {
            let first = scene.edits("fast").iter().find(|edit| gives_true(edit));
            let edit = first.unwrap().clone();
            let at = scene.va(edit.at);
            let edits = scene.edits("hardened");
            let index = edits.partition_point(|other| other.at < edit.at);
            edits.insert(index, edit);
            Some(at)
        },
    ),
    case(
        Rule::AllowedSlots,
        "fewer calls left out than the manifest says",
        "pass no-self-checks says ",
        |scene| {
            scene.pass("fast", "no-self-checks", |pass| {
                *pass.figures.get_mut("__list_add_valid").unwrap() += 1
            });
            None
        },
    ),
    case(
        Rule::TrueToImage,
        "calls that nobody accounts for",
        "enter what it leaves out",
        |scene| {
            scene.pass("fast", "no-self-checks", |pass| {
                pass.left.insert("noinstr".to_owned(), 7)
            });
            None
        },
    ),
    case(
        Rule::Modules,
        "a module's call that gives back something else",
        "gives back Nothing for a call of __list_",
        |scene| {
            module_call(scene).put = Put::Bytes(NOTHING.to_vec());
            None
        },
    ),
    case(
        Rule::Modules,
        "a module's call of another function",
        "replaces something other than ",
        |scene| {
            let module = scene.bundle.modules.iter_mut();
            let module = module.into_iter().find(|one| one.name == "xfs").unwrap();
            let other = module
                .sites
                .iter()
                .find(|site| site.kind == penumbra_bundle::SiteKind::Fentry);
            let at = other.unwrap().at;
            module_call(scene).at = at;
            None
        },
    ),
];

/// The first direct call of `name` in the text that is no slot.
fn call_of(scene: &Scene, name: &str) -> LinkVa {
    let (to, text) = (scene.symbol(name), scene.text().start);
    let code = &scene.bundle.text;
    let calls = (0..code.len() - 5).filter(|at| code[*at] == 0xe8);
    let mut places = calls.map(|at| LinkVa(text.0 + at as u64));
    let goes = |at: &LinkVa| crate::scene::target(&code[(at.0 - text.0) as usize..], at.0) == to;
    places.find(goes).expect("a call of it")
}

/// An edit that stands for a check of a list in a module.
fn module_call(scene: &mut Scene) -> &mut ModuleEdit {
    let mut modules = scene.bundle.modules.iter_mut();
    let module = modules.find(|module| module.name == "xfs").unwrap();
    let mut edits = module.edits[1].iter_mut();
    let found =
        edits.find(|edit| edit.slot == SlotKind::Call && edit.put == Put::Bytes(TRUE.to_vec()));
    found.expect("xfs adds to lists")
}

#[test]
fn what_a_recipe_keeps_is_called() {
    let bundle = emitted(
        "schema = 1\n[pass.no-self-checks]\nlists = \"keep\"\nfpu = \"keep\"\nslab = \"keep\"\n",
    );
    let (checker, _) = real();
    let outcome = checker.check(&bundle, false).unwrap();
    assert!(outcome.clean, "{}", outcome.render());
    let edits = &bundle.variant("fast").unwrap().1.0;
    let calls = edits.iter().filter(|edit| edit.slot == SlotKind::Call);
    let calls: Vec<&Edit> = calls.filter(|edit| edit.bytes[0] != 0xe8).collect();
    assert!(calls.len() > 300 && calls.iter().all(|edit| edit.bytes == NOTHING));
}

#[test]
fn a_function_that_does_more_than_check_is_caught() {
    let whole = unpacked(std::fs::read(vmlinuz()).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let bundle = &real().1;
    for (function, old, new, wanted) in [
        // mov $1,%eax
        (
            "__list_add_valid",
            &[0xb8, 0x01, 0, 0, 0][..],
            &[0xb8, 0x02, 0, 0, 0][..],
            "it may give back something other than 1 without a report",
        ),
        // mov (%rax),%rdx and the other way round
        (
            "fpregs_assert_state_consistent",
            &[0x48, 0x8b, 0x10],
            &[0x48, 0x89, 0x10],
            "writes memory at fpregs_assert_state_consistent+",
        ),
        // push %rbx, and what no check does
        (
            "cache_from_obj",
            &[0x53],
            &[0xf4],
            "it does what no check needs",
        ),
    ] {
        let scene = Scene::of(bundle);
        let start = scene.symbol(function);
        let mut broken = whole.clone();
        let offset = file_offset(&whole, start);
        let code = &broken[offset..offset + 256];
        let at = code.windows(old.len()).position(|bytes| bytes == old);
        let at = offset + at.expect("the instruction");
        broken[at..at + new.len()].copy_from_slice(new);
        let path = folder.path().join(function);
        std::fs::write(&path, broken).unwrap();
        let checker = Checker::open(&path).unwrap();
        let reports = checker.prove(bundle, &[Rule::AllowedSlots]).unwrap();
        assert!(says(&reports[0], Some(start), wanted), "{reports:?}");
    }
    assert_eq!(report(bundle, Rule::AllowedSlots).violation_count, 0);
}

/// Where an address stands in the file.
fn file_offset(elf: &[u8], at: LinkVa) -> usize {
    let headers = goblin::elf::Elf::parse(elf).unwrap().program_headers;
    let mut inside = headers.iter();
    let segment = inside.find(|one| one.vm_range().contains(&(at.0 as usize)));
    let segment = segment.expect("a segment");
    (segment.p_offset + at.0 - segment.p_vaddr) as usize
}
