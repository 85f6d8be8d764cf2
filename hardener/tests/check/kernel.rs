//! Faults of what the bundle says about the kernel.

use crate::cases::{Case, case};
use hardener::check::Rule;
use penumbra_bundle::{SiteKind, TextOff};

/// What the bundle says about the kernel.
pub const IMAGE: &[Case] = &[
    case(
        Rule::TrueToImage,
        "a byte of text flipped",
        "text.bin has ",
        |scene| {
            scene.bundle.text[0x12345] ^= 1;
            Some(scene.va(TextOff(0x12345)))
        },
    ),
    case(
        Rule::TrueToImage,
        "a relocation of the text left out",
        "model.abs32 lacks a relocation",
        |scene| {
            let at = scene.bundle.model.abs32.remove(1000);
            Some(scene.va(at))
        },
    ),
    case(
        Rule::TrueToImage,
        "a relocation of the text made up",
        "model.abs64 has a relocation that the image lacks",
        |scene| {
            scene.bundle.model.abs64.insert(0, TextOff(1));
            Some(scene.va(TextOff(1)))
        },
    ),
    case(
        Rule::TrueToImage,
        "a poke site made up",
        "has a JumpLabel site that no table of the image names",
        |scene| {
            let sites = &mut scene.bundle.model.sites;
            let index = sites
                .iter()
                .position(|site| site.kind == SiteKind::JumpLabel)
                .unwrap();
            sites[index].at = TextOff(sites[index].at.0 + 1);
            let at = sites[index].at;
            Some(scene.va(at))
        },
    ),
    case(
        Rule::TrueToImage,
        "a poke site left out",
        "lacks a Fentry site",
        |scene| {
            let sites = &mut scene.bundle.model.sites;
            let index = sites
                .iter()
                .position(|site| site.kind == SiteKind::Fentry)
                .unwrap();
            let at = sites.remove(index).at;
            Some(scene.va(at))
        },
    ),
    case(
        Rule::TrueToImage,
        "a structure offset off by eight",
        "layout `task_struct.mm` is ",
        |scene| {
            *scene
                .bundle
                .manifest
                .layout
                .get_mut("task_struct.mm")
                .unwrap() += 8;
            None
        },
    ),
    case(
        Rule::TrueToImage,
        "a data symbol elsewhere",
        "data `poking_mm` is not where the image has it",
        |scene| {
            let at = scene.bundle.manifest.data.get_mut("poking_mm").unwrap();
            at.0 += 8;
            Some(*at)
        },
    ),
    case(
        Rule::TrueToImage,
        "the system call entry elsewhere",
        "kernel.syscall_entry is ",
        |scene| {
            scene.bundle.manifest.kernel.syscall_entry.0 += 16;
            None
        },
    ),
    case(
        Rule::TrueToImage,
        "the digest of another image file",
        "kernel.image_sha256 is ",
        |scene| {
            scene.bundle.manifest.kernel.image_sha256 = "00".repeat(32);
            None
        },
    ),
    case(
        Rule::TrueToImage,
        "a symbol renamed",
        "is not in the image",
        |scene| {
            let symbol = &mut scene.bundle.symbols.0[500];
            symbol.name.push('x');
            let at = symbol.at;
            Some(scene.va(at))
        },
    ),
    case(
        Rule::TrueToImage,
        "a slot that no pass accounts for",
        "pass return-cfi accounts for ",
        |scene| {
            let pass = &mut scene.bundle.manifest.variants[2].passes[0];
            *pass.left.values_mut().next().unwrap() += 1;
            None
        },
    ),
    case(
        Rule::TrueToImage,
        "an edit fewer than the manifest says",
        "edits; the manifest says ",
        |scene| {
            scene.edits("fast").pop();
            None
        },
    ),
];
