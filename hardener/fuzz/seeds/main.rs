//! Seeds for the fuzz targets, cut from real kernels: `fuzz-seeds FOLDER MODULES VMLINUZ...` writes a folder for each target.
//!
//! What a target mutates has a few dozen KB, not 60 MB: the same structures as in the real thing, with fewer entries each.

mod btf;
mod bundle;
mod elf;
#[path = "../src/files.rs"]
mod files;
mod kernel;
mod symbols;

use hardener::emit::emit_with;
use hardener::image::Image;
use hardener::presets;
use hardener::recipe::Recipe;
use kernel::Small;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Modules, the smallest of the folder.
const MODULES: usize = 4;

fn main() {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(out), Some(modules)) = (arguments.next(), arguments.next()) else {
        panic!("usage: fuzz-seeds FOLDER MODULES VMLINUZ...");
    };
    let modules = smallest(&modules);
    for (n, vmlinuz) in arguments.enumerate() {
        let file = fs::read(&vmlinuz).expect("the kernel is readable");
        let image = Image::parse(file.clone())
            .unwrap_or_else(|fault| panic!("{}: {fault}", vmlinuz.display()));
        for late in [false, true] {
            let small = kernel::cut(&image, late);
            let name = format!("{n}-{}", if late { "late" } else { "early" });
            of_kernel(&out, &name, &small);
            put(
                &out,
                "kernel",
                &format!("{name}-symtab"),
                &small.with_symtab,
            );
            for (packing, packed) in packed(&small.vmlinux) {
                put(
                    &out,
                    "vmlinuz",
                    &format!("{name}-{packing}"),
                    &with_setup(&file, &packed),
                );
            }
            for module in &modules {
                let types = small.btf.clone();
                let name = format!(
                    "{name}-{}",
                    module.file_stem().unwrap_or_default().display()
                );
                put(
                    &out,
                    "module",
                    &name,
                    &join(&[types, fs::read(module).expect("it is readable")]),
                );
            }
        }
        let preset = presets::find("hardened").expect("a preset").text;
        // No preset has classes of returns.
        let narrow = preset.replace("[\"function\"", "[\"class\", \"function\"");
        let recipe = Recipe::parse("seed", narrow.as_bytes()).expect("it is sound");
        for (what, modules) in [
            ("plain", &modules[..0]),
            ("modules", if n == 0 { &modules[..1] } else { &[] }),
        ] {
            let made = emit_with(&vmlinuz, &recipe, modules, &mut |_| {});
            let made = made.unwrap_or_else(|error| panic!("{error}"));
            put(
                &out,
                "bundle",
                &format!("{n}-{what}"),
                &bundle::cut(made.bundle),
            );
        }
    }
    for preset in &presets::ALL {
        put(&out, "recipe", preset.name, preset.text.as_bytes());
    }
}

/// The seeds of the readers that take a part of a kernel.
fn of_kernel(out: &Path, name: &str, small: &Small) {
    put(out, "kernel", name, &small.vmlinux);
    put(out, "kallsyms", name, &small.rodata);
    put(out, "btf", name, &small.btf);
    let map = small
        .symbols
        .iter()
        .map(|(at, name)| format!("{at:016x} {} {}\n", &name[..1], &name[1..]));
    put(out, "system_map", name, map.collect::<String>().as_bytes());
    let code = small
        .symbols
        .iter()
        .filter(|(_, name)| name.starts_with('t'))
        .map(|(_, name)| &name[1..]);
    let code: Vec<&str> = code.take(40).collect();
    let lines = code
        .chunks_exact(2)
        .zip(1..)
        .map(|(pair, n)| format!("{}+{n:#x} {} {n}\n", pair[0], pair[1]));
    put(out, "profile", name, lines.collect::<String>().as_bytes());
}

fn put(out: &Path, target: &str, name: &str, bytes: &[u8]) {
    let folder = out.join(target);
    fs::create_dir_all(&folder).expect("the folder is ours");
    fs::write(folder.join(name), bytes).expect("the folder is ours");
}

/// An input of several parts, each behind its length.
fn join(parts: &[Vec<u8>]) -> Vec<u8> {
    let parts = parts
        .iter()
        .map(|part| [&(part.len() as u32).to_le_bytes()[..], part].concat());
    parts.collect::<Vec<_>>().concat()
}

/// A kernel packed in each way that is read.
fn packed(kernel: &[u8]) -> [(&'static str, Vec<u8>); 4] {
    let size = (kernel.len() as u32).to_le_bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(kernel).expect("memory takes all");
    let block = lz4_flex::block::compress(kernel);
    let lz4 = [
        &[2, 0x21, 0x4c, 0x18][..],
        &(block.len() as u32).to_le_bytes(),
        &block,
        &size,
    ]
    .concat();
    let zstd =
        ruzstd::encoding::compress_to_vec(kernel, ruzstd::encoding::CompressionLevel::Fastest);
    [
        ("gzip", gzip.finish().expect("memory takes all")),
        ("xz", [xz(kernel), size.to_vec()].concat()),
        ("lz4", lz4),
        ("zstd", [zstd, size.to_vec()].concat()),
    ]
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new("xz")
        .args(["--check=crc32", "--x86", "--lzma2=dict=1MiB", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("xz is installed");
    child
        .stdin
        .take()
        .expect("it is piped")
        .write_all(bytes)
        .expect("xz reads");
    child.wait_with_output().expect("xz ends").stdout
}

/// A payload behind the setup header of a real bzImage.
fn with_setup(vmlinuz: &[u8], payload: &[u8]) -> Vec<u8> {
    // Documentation/arch/x86/boot.rst: payload_offset and payload_length; one sector of setup.
    let mut file = vmlinuz[..1024].to_vec();
    file[0x1f1] = 1;
    file[0x248..0x24c].copy_from_slice(&0u32.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file.extend(payload);
    file
}

/// The smallest modules below `folder`.
fn smallest(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)
            .expect("the folder of modules")
            .flatten()
        {
            let metadata = entry.metadata().expect("it is there");
            if metadata.is_dir() {
                folders.push(entry.path());
            } else if entry.path().extension().is_some_and(|end| end == "ko") {
                found.push((metadata.len(), entry.path()));
            }
        }
    }
    found.sort();
    found
        .into_iter()
        .map(|(_, path)| path)
        .take(MODULES)
        .collect()
}
