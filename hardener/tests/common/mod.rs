//! Real kernels for the tests.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Debian's cloud kernel: lz4.
pub fn cloud() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| find("PENUMBRA_VMLINUZ_CLOUD", true))
}

/// Debian's kernel for machines: xz.
#[allow(dead_code, reason = "not every test program needs both")]
pub fn amd64() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| find("PENUMBRA_VMLINUZ_AMD64", false))
}

/// From the environment, else what the lab unpacked.
fn find(variable: &str, cloud: bool) -> PathBuf {
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
            name.starts_with("linux-image-")
                && name.ends_with("-amd64")
                && name.contains("-cloud-") == cloud
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
    FOUND.get_or_init(|| {
        if let Some(path) = std::env::var_os("PENUMBRA_MODULES_CLOUD") {
            return path.into();
        }
        let tree = cloud().ancestors().nth(2).expect("a vmlinuz in a tree's boot");
        let mut found: Vec<PathBuf> = std::fs::read_dir(tree.join("lib/modules"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path().join("kernel"))
            .collect();
        found.sort();
        found.pop().unwrap_or_else(|| {
            panic!(
                "{} has no modules to test with. Run tests/run, which fetches Debian's kernels, or set PENUMBRA_MODULES_CLOUD \
                 to the modules of PENUMBRA_VMLINUZ_CLOUD",
                tree.display()
            )
        })
    })
}
