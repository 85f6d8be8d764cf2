//! Faults in what a bundle says about modules, and in their edits.

use crate::cases::{Case, case};
use crate::scene::Scene;
use hardener::check::Rule;
use penumbra_bundle::{
    LinkVa, Memory, Mitigation, Module, ModuleEdit, Place, Put, SiteKind, SlotKind, Target, TextOff,
};

/// Modules: the same invariants.
pub const MODULES: &[Case] = &[
    case(
        Rule::Modules,
        "a byte of a module's text flipped",
        "its text differs from the file's at ",
        |scene| {
            let module = xfs(scene);
            let at = module.edits[1][100].at.0 as usize;
            module.text[at] ^= 1;
            None
        },
    ),
    case(
        Rule::Modules,
        "a relocation left out",
        "its text differs from the file's at ",
        |scene| {
            xfs(scene).relocs.remove(1000);
            None
        },
    ),
    case(
        Rule::Modules,
        "a relocation with another addend",
        "its text differs from the file's at ",
        |scene| {
            xfs(scene).relocs[1000].addend += 1;
            None
        },
    ),
    case(
        Rule::Modules,
        "a kernel symbol elsewhere",
        "its text differs from the file's at ",
        |scene| {
            let target = xfs(scene)
                .targets
                .iter_mut()
                .find_map(|target| match target {
                    Target::Kernel(va) => Some(va),
                    _ => None,
                });
            target.unwrap().0 += 16;
            None
        },
    ),
    case(
        Rule::Modules,
        "a symbol of the kernel that does not slide",
        "its text ",
        |scene| {
            for target in &mut xfs(scene).targets {
                if let Target::Kernel(va) = *target {
                    *target = Target::Fixed(va.0);
                }
            }
            None
        },
    ),
    case(
        Rule::Modules,
        "another build of the module",
        "its build-id is `0000",
        |scene| {
            xfs(scene).build_id = "00".repeat(20);
            None
        },
    ),
    case(
        Rule::Modules,
        "another name",
        "no file was given to prove it against",
        |scene| {
            xfs(scene).name = "xfsx".to_owned();
            None
        },
    ),
    case(
        Rule::Modules,
        "a section elsewhere",
        ", the loader makes Part",
        |scene| {
            let sections = &mut xfs(scene).sections;
            let data = sections.iter_mut().find(|section| section.name == ".data");
            data.unwrap().place.at += 8;
            None
        },
    ),
    case(
        Rule::Modules,
        "a poke site left out",
        "lacks a Fentry site at ",
        |scene| {
            let sites = &mut xfs(scene).sites;
            let fentry = sites.iter().position(|site| site.kind == SiteKind::Fentry);
            sites.remove(fentry.unwrap());
            None
        },
    ),
    case(
        Rule::Modules,
        "a poke site made up",
        "has a JumpLabel site at ",
        |scene| {
            let sites = &mut xfs(scene).sites;
            let label = sites.iter().find(|site| site.kind == SiteKind::JumpLabel);
            let mut site = label.unwrap().clone();
            site.at.0 += 1;
            sites.push(site);
            None
        },
    ),
    case(
        Rule::Modules,
        "a poke site of a kind that no table has",
        "has a Other site at ",
        |scene| {
            xfs(scene).sites[7].kind = SiteKind::Other;
            None
        },
    ),
    case(
        Rule::Modules,
        "a symbol renamed",
        "its symbols are not the file's",
        |scene| {
            xfs(scene).symbols[9].name.push('x');
            None
        },
    ),
    case(
        Rule::Modules,
        "an export made up",
        "its exports are not the file's",
        |scene| {
            let modules = &mut scene.bundle.modules;
            let exports = modules.iter_mut().find(|module| !module.exports.is_empty());
            exports.unwrap().exports[0].place = Place::new(Memory::Text, 0);
            None
        },
    ),
    case(
        Rule::Modules,
        "an edit one byte late",
        "replaces something other than a return or retpoline site's branch",
        |scene| {
            edit(scene, SlotKind::Return).at.0 += 1;
            None
        },
    ),
    case(
        Rule::Modules,
        "an edit of something that is no slot",
        "replaces something other than a return or retpoline site's branch",
        |scene| {
            let module = xfs(scene);
            let fentry = module
                .sites
                .iter()
                .find(|site| site.kind == SiteKind::Fentry);
            module.edits[2][0].at = fentry.unwrap().at;
            None
        },
    ),
    case(
        Rule::Modules,
        "a return site called an indirect branch",
        "is not a slot that the module's tables list",
        |scene| {
            edit(scene, SlotKind::Return).slot = SlotKind::Indirect;
            None
        },
    ),
    case(
        Rule::Modules,
        "an edit of a static call's trampoline",
        "edits code that must stay as it is",
        |scene| {
            let mut modules = scene.bundle.modules.iter_mut();
            let module = modules.find(|module| module.name == "kvm").unwrap();
            let mut parts = module.sections.iter();
            let part = parts.find(|part| part.name == ".static_call.text").unwrap();
            let start = part.place.at;
            let range = start..start + part.size;
            let mut sites = module.sites.iter();
            let site =
                sites.find(|site| site.kind == SiteKind::Return && range.contains(&site.at.0));
            let at = site.expect("a trampoline that returns").at;
            let edits = module.edits[2].iter_mut();
            let mut returns = edits.filter(|edit| edit.slot == SlotKind::Return);
            returns.next().unwrap().at = at;
            None
        },
    ),
    case(
        Rule::Modules,
        "two instructions in one slot",
        "is not one whole instruction",
        |scene| {
            edit(scene, SlotKind::Return).put = Put::Bytes(vec![0x90, 0x90, 0x90, 0x90, 0xc3]);
            None
        },
    ),
    case(
        Rule::Modules,
        "a slot of another length",
        "replaces an instruction of 5 bytes by 6 bytes",
        |scene| {
            edit(scene, SlotKind::Return).put =
                Put::Bytes(vec![0x2e, 0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
            None
        },
    ),
    case(
        Rule::Modules,
        "a jump where a call was",
        "where Call(",
        |scene| {
            let edit = edit(scene, SlotKind::Indirect);
            match &mut edit.put {
                Put::Branch(before, _) => *before.last_mut().unwrap() = 0xe9,
                other => panic!("{other:?}"),
            }
            None
        },
    ),
    case(
        Rule::Modules,
        "a thunk out of reach",
        "branches too far",
        |scene| {
            match &mut edit(scene, SlotKind::Return).put {
                Put::Branch(_, thunk) => *thunk = LinkVa(0x1000_0000_0000),
                other => panic!("{other:?}"),
            }
            None
        },
    ),
    case(
        Rule::Modules,
        "a mitigation dropped in silence",
        "drops ReturnThunk, which the manifest does not say",
        |scene| {
            edit(scene, SlotKind::Return).put = Put::Bytes(vec![0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
            assert!(
                !scene.bundle.manifest.variants[2]
                    .drops
                    .contains(&Mitigation::ReturnThunk)
            );
            None
        },
    ),
    case(
        Rule::ThunkContract,
        "a module's return that goes to an indirect branch's thunk",
        "decides by something other than the checked address; 1 slots use it",
        |scene| {
            let other = scene.named("forward_cfi_rax");
            match &mut edit(scene, SlotKind::Return).put {
                Put::Branch(_, thunk) => *thunk = other,
                other => panic!("{other:?}"),
            }
            None
        },
    ),
    case(
        Rule::ThunkContract,
        "a module's return without saving where registers must be kept",
        "changed; 1 slots use it",
        |scene| {
            let (free, saving) = (scene.named("return_cfi"), scene.named("return_cfi_saving"));
            let edits = xfs(scene).edits[2].iter_mut();
            let thunk = edits.into_iter().find_map(|edit| match &mut edit.put {
                Put::Branch(_, thunk) if *thunk == saving => Some(thunk),
                _ => None,
            });
            *thunk.expect("a return that saves") = free;
            None
        },
    ),
];

/// Modules of kernels that keep code and data apart.
pub const APART: &[Case] = &[
    case(
        Rule::Modules,
        "a section in another memory",
        ", the loader makes Part",
        |scene| {
            let mut sections = xfs(scene).sections.iter_mut();
            let data = sections.find(|section| section.name == ".rodata");
            data.unwrap().place.memory = Memory::RoAfterInit;
            None
        },
    ),
    case(
        Rule::Modules,
        "more of a memory than sections take",
        "has other sizes than the loader gives it",
        |scene| {
            xfs(scene).sizes[Memory::Data] += 8;
            None
        },
    ),
    case(
        Rule::Modules,
        "what the text refers to in another memory",
        "its text differs from the file's at ",
        |scene| {
            let mut targets = xfs(scene).targets.iter_mut();
            let place = targets.find_map(|target| match target {
                Target::Own(place) if place.memory == Memory::Rodata => Some(place),
                _ => None,
            });
            place.unwrap().memory = Memory::Text;
            None
        },
    ),
    case(
        Rule::Modules,
        "an ENDBR64 that the kernel takes away left out",
        "lacks a Other site at ",
        |scene| {
            let sites = &mut xfs(scene).sites;
            let sealed = sites.iter().position(|site| site.kind == SiteKind::Other);
            sites.remove(sealed.unwrap());
            None
        },
    ),
    case(
        Rule::Modules,
        "an indirect call that becomes direct left out",
        "lacks a Paravirt site at ",
        |scene| {
            let mut modules = scene.bundle.modules.iter_mut();
            let module = modules.find(|module| module.name == "kvm").unwrap();
            let mut sites = module.sites.iter();
            let call = sites.position(|site| site.kind == SiteKind::Paravirt);
            module.sites.remove(call.unwrap());
            None
        },
    ),
    case(
        Rule::TrueToImage,
        "another number of the memory that has the text",
        "layout `mod_mem_type.MOD_TEXT` is 0x3, BTF has 0x0",
        |scene| {
            let layout = &mut scene.bundle.manifest.layout;
            *layout.get_mut("mod_mem_type.MOD_TEXT").unwrap() += 3;
            None
        },
    ),
];

/// A module with slots of every kind.
fn xfs(scene: &mut Scene) -> &mut Module {
    let modules = &mut scene.bundle.modules;
    let found = modules.iter_mut().find(|module| module.name == "xfs");
    found.expect("xfs is in the bundle")
}

/// One of its hardened edits: of a return, or of a call through a register.
fn edit(scene: &mut Scene, slot: SlotKind) -> &mut ModuleEdit {
    let edits = &mut xfs(scene).edits[2];
    let middle = edits.len() / 2;
    let call = |edit: &ModuleEdit| {
        let call = matches!(&edit.put, Put::Branch(before, _) if before[..] == [0xe8]);
        edit.slot == slot && (call || slot == SlotKind::Return)
    };
    let found = edits[middle..].iter_mut().find(|edit| call(edit));
    let found = found.expect("such an edit");
    assert!(found.at > TextOff(0));
    found
}
