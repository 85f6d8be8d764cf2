//! Images that are damaged: one error with the file and the place, never a panic.

mod common;

use hardener::emit::emit;
use hardener::image::{Image, unpacked};
use hardener::recipe::Recipe;
use std::fs;

/// What `emit` says of `bytes`.
fn said(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmlinuz");
    fs::write(&path, bytes).unwrap();
    match emit(&path, &Recipe::default(), &mut |_| {}) {
        Ok(_) => "accepted".to_owned(),
        Err(error) => {
            let said = error.to_string();
            assert!(said.contains("vmlinuz: "), "{said}");
            assert!(!said.contains('\n'), "{said}");
            said
        }
    }
}

#[test]
fn a_truncated_vmlinuz_is_refused_wherever_it_ends() {
    let whole = fs::read(common::cloud()).unwrap();
    for end in [
        0,
        1,
        0x1f1,
        0x1ff,
        0x203,
        0x208,
        0x249,
        0x24e,
        0x300,
        0x52cc,
        0x5300,
        whole.len() / 2,
        whole.len() * 9 / 10,
    ] {
        let said = said(&whole[..end]);
        let expected = if end < 0x206 {
            "offset 0x202: there is no bzImage setup header"
        } else {
            "fetch it again"
        };
        assert!(said.contains(expected), "cut at {end:#x}: {said}");
    }
}

#[test]
fn a_payload_that_lies_about_its_size_is_refused() {
    let mut file = fs::read(common::cloud()).unwrap();
    let word =
        |file: &[u8], at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize;
    let start = (usize::from(file[0x1f1]) + 1) * 512 + word(&file, 0x248);
    let size_at = start + word(&file, 0x24c) - 4;
    for (size, expected) in [
        (0u32, "claims to unpack to 0 bytes"),
        (u32::MAX, "claims to unpack to 4294967295 bytes"),
        (4096, "lz4 stream does not unpack"),
        (200 << 20, "its end says 209715200"),
    ] {
        file[size_at..size_at + 4].copy_from_slice(&size.to_le_bytes());
        let said = said(&file);
        assert!(
            said.contains("payload: ") && said.contains(expected),
            "{size}: {said}"
        );
    }
}

#[test]
fn a_flipped_bit_in_the_stream_does_not_panic() {
    let file = fs::read(common::cloud()).unwrap();
    for at in [0x52d4, 0x6000, 0x10000, file.len() / 3] {
        let mut file = file.clone();
        file[at] ^= 0x10;
        // lz4 has no checksum: damage may only show later, or change a byte that nothing looks at.
        let _ = Image::parse(file).map(|image| image.tables().map(|_| ()));
    }
}

/// Each case: what is overwritten in the unpacked kernel, and a part of what must be said.
#[test]
fn a_damaged_vmlinux_is_refused_with_the_place() {
    let whole = unpacked(fs::read(common::cloud()).unwrap()).unwrap();
    let elf = goblin::elf::Elf::parse(&whole).unwrap();
    let section = |name: &str| {
        let named = |header: &&goblin::elf::SectionHeader| {
            elf.shdr_strtab.get_at(header.sh_name) == Some(name)
        };
        let header = elf.section_headers.iter().find(named).unwrap();
        header.sh_offset as usize..(header.sh_offset + header.sh_size) as usize
    };
    let (btf, notes, returns, alternatives) = (
        section(".BTF"),
        section(".notes"),
        section(".return_sites"),
        section(".altinstructions"),
    );
    let end = whole.len();
    let cases: [(&str, std::ops::Range<usize>, u8, &str); 8] = [
        (
            "BTF magic",
            btf.start..btf.start + 2,
            0,
            ".BTF: does not start with the BTF magic",
        ),
        (
            "BTF lengths",
            btf.start + 8..btf.start + 24,
            0xff,
            ".BTF: its ",
        ),
        (
            "BTF types",
            btf.start + 24..btf.start + 4096,
            0xff,
            ".BTF: type 1",
        ),
        (
            "notes",
            notes.start..notes.start + 4,
            0xff,
            ".notes: the note at",
        ),
        ("machine", 18..20, 3, "ELF header: is not for x86-64"),
        (
            "return sites",
            returns.start + 16..returns.start + 20,
            1,
            ".return_sites: ",
        ),
        (
            "alternatives",
            alternatives.start..alternatives.start + 64,
            0x41,
            ".altinstructions: ",
        ),
        ("relocations", end - 400_000..end, 0, "relocations: "),
    ];
    for (what, range, byte, expected) in cases {
        let mut damaged = whole.clone();
        damaged[range].fill(byte);
        let said = said(&damaged);
        assert!(said.contains(expected), "{what}: {said}");
    }
}

#[test]
fn a_vmlinux_without_relocations_is_refused_with_the_remedy() {
    let mut whole = unpacked(fs::read(common::cloud()).unwrap()).unwrap();
    let header = goblin::elf::Elf::parse(&whole).unwrap().header;
    let end =
        header.e_shoff as usize + usize::from(header.e_shnum) * usize::from(header.e_shentsize);
    whole.truncate(end);
    let said = said(&whole);
    assert!(
        said.contains("relocations: none follow the ELF file") && said.contains("give the vmlinuz"),
        "{said}"
    );
}

#[test]
fn all_that_a_kernel_lacks_is_said_at_once() {
    let mut whole = unpacked(fs::read(common::cloud()).unwrap()).unwrap();
    let header = goblin::elf::Elf::parse(&whole).unwrap().header;
    let end =
        header.e_shoff as usize + usize::from(header.e_shnum) * usize::from(header.e_shentsize);
    whole.truncate(end);
    // Built without BTF and without return thunks: no sections of these names.
    for name in ["\0.BTF\0", "\0.return_sites\0"] {
        let name = name.as_bytes();
        let at = whole
            .windows(name.len())
            .rposition(|bytes| bytes == name)
            .unwrap();
        whole[at + 1] = b'_';
    }
    let fault = Image::parse(whole).err().expect("a kernel that lacks much");
    let said = fault.to_string();
    let lines: Vec<&str> = said.lines().map(str::trim).collect();
    assert_eq!(lines[0], "the kernel: lacks 3 things:");
    for (line, start, why) in [
        (lines[1], "relocations: ", "give the vmlinuz"),
        (lines[2], ".BTF: ", "CONFIG_DEBUG_INFO_BTF"),
        (lines[3], ".return_sites: ", "return-cfi and no-rethunk"),
    ] {
        assert!(line.starts_with(start) && line.contains(why), "{said}");
    }
    assert_eq!(lines.len(), 4, "{said}");
}

/// Addresses at the very top: the end of what lies there is not a number of 64 bits.
#[test]
fn addresses_that_wrap_are_refused() {
    let whole = unpacked(fs::read(common::cloud()).unwrap()).unwrap();
    let elf = goblin::elf::Elf::parse(&whole).unwrap();
    let name = |header: &goblin::elf::SectionHeader| elf.shdr_strtab.get_at(header.sh_name);
    let index = elf
        .section_headers
        .iter()
        .position(|header| name(header) == Some("__ksymtab"))
        .unwrap();
    // sh_addr is the third field of a section header, e_shoff stands at 0x28 of the file.
    let address = elf.header.e_shoff as usize + index * 64 + 16;
    let mut damaged = whole.clone();
    damaged[address..address + 8].copy_from_slice(&(u64::MAX - 7).to_le_bytes());
    let said = said(&damaged);
    assert!(said.contains("ELF section __ksymtab: "), "{said}");

    let mut damaged = whole;
    damaged[0x28..0x30].copy_from_slice(&(u64::MAX - 7).to_le_bytes());
    assert!(Image::parse(damaged).is_err());
}
