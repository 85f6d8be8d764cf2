//! Real kernels for the tests.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Debian's cloud kernel: lz4.
pub fn cloud() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| find("PENUMBRA_VMLINUZ_CLOUD", "6.1.", "-cloud-amd64"))
}

/// Debian's kernel for machines: xz.
#[allow(dead_code, reason = "not every test program needs all")]
pub fn amd64() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| find("PENUMBRA_VMLINUZ_AMD64", "6.1.", "-amd64"))
}

/// The same with PREEMPT_RT.
#[allow(dead_code, reason = "not every test program needs all")]
pub fn rt() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| find("PENUMBRA_VMLINUZ_RT", "6.1.", "-rt-amd64"))
}

/// The cloud kernel of Debian's backports (6.12): IBT, call padding, no `.parainstructions`.
#[allow(dead_code, reason = "not every test program needs all")]
pub fn cloud_backports() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| find("PENUMBRA_VMLINUZ_CLOUD_BACKPORTS", "6.12.", "-cloud-amd64"))
}

/// The backports' kernel for machines.
#[allow(dead_code, reason = "not every test program needs all")]
pub fn amd64_backports() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| find("PENUMBRA_VMLINUZ_AMD64_BACKPORTS", "6.12.", "-amd64"))
}

/// From the environment, else what the lab unpacked: a release that starts with `series` and has only `flavour` behind its
/// numbers.
fn find(variable: &str, series: &str, flavour: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let trees = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab/trees");
    let mut found: Vec<PathBuf> = std::fs::read_dir(&trees)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|tree| {
            let name = tree.file_name().to_string_lossy().into_owned();
            let release = name.strip_prefix("linux-image-");
            let release = release.and_then(|release| release.strip_suffix(flavour));
            release.is_some_and(|numbers| {
                // What is left of another flavour's name ends in a word: `6.1.0-56-cloud`.
                let last = numbers.rsplit(['-', '.']).next().unwrap_or_default();
                numbers.starts_with(series)
                    && last.starts_with(|first: char| first.is_ascii_digit())
            })
        })
        .flat_map(|tree| {
            std::fs::read_dir(tree.path().join("boot"))
                .into_iter()
                .flatten()
                .flatten()
        })
        .map(|file| file.path())
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"))
        })
        .collect();
    found.sort();
    found.pop().unwrap_or_else(|| {
        panic!(
            "no kernel to test with: {variable} is not set and {} has none. Run tests/run, which fetches Debian's kernels, or set \
             {variable} to a vmlinuz",
            trees.display()
        )
    })
}

/// The modules of the cloud kernel.
#[allow(dead_code, reason = "not every test program needs them")]
pub fn modules() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| modules_of(cloud(), "PENUMBRA_MODULES_CLOUD"))
}

/// The modules of the backports' cloud kernel.
#[allow(dead_code, reason = "not every test program needs them")]
pub fn modules_backports() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| modules_of(cloud_backports(), "PENUMBRA_MODULES_CLOUD_BACKPORTS"))
}

/// The file of one module below `folder`, packed or not.
#[allow(dead_code, reason = "not every test program needs them")]
pub fn module(folder: &Path, name: &str) -> PathBuf {
    fn walk(folder: &Path, name: &str) -> Option<PathBuf> {
        let mut entries: Vec<PathBuf> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        entries.sort();
        entries.into_iter().find_map(|path| {
            if path.is_dir() {
                return walk(&path, name);
            }
            let rest = path.file_name()?.to_str()?.strip_prefix(name)?;
            rest.starts_with(".ko").then_some(path)
        })
    }
    walk(folder, name).unwrap_or_else(|| panic!("there is no {name} in {}", folder.display()))
}

fn modules_of(vmlinuz: &Path, variable: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let tree = vmlinuz
        .ancestors()
        .nth(2)
        .expect("a vmlinuz in a tree's boot");
    let mut found: Vec<PathBuf> = std::fs::read_dir(tree.join("lib/modules"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("kernel"))
        .collect();
    found.sort();
    found.pop().unwrap_or_else(|| {
        panic!(
            "{} has no modules to test with. Run tests/run, which fetches Debian's kernels, or set {variable} to the modules of \
             that kernel",
            tree.display()
        )
    })
}
