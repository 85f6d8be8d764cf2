//! Modules for a bundle: found in folders, read, analysed, told apart from those that cannot be taken.

use crate::image::module::{self, Arrangement, Host};
use crate::image::{Fault, Image, unpacked_module};
use crate::passes::{self, PassError};
use crate::recipe::Recipe;
use crate::text::module::ModuleText;
use crate::text::self_checks::{self, SelfChecks};
use crate::text::{Slots, TextError, inline_asm_is_plain};
use crate::thunks::{CaveContents, KernelThunks};
use penumbra_bundle::Module;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The largest file that is read.
const MAX_FILE: u64 = 128 << 20;
/// How a module's file name ends, packed or not (kmod).
const SUFFIXES: [&str; 4] = [".ko", ".ko.gz", ".ko.xz", ".ko.zst"];

/// Why a module cannot be taken. In a guest its text then stays stock.
#[derive(Debug, Error)]
pub enum ModuleError {
    /// The file system said no.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is damaged, or uses what is not known.
    #[error("{0}")]
    Bad(#[from] Fault),
    /// Its text cannot be taken.
    #[error("{0}")]
    Text(#[from] TextError),
    /// It is for another kernel.
    #[error(
        "is for kernel `{found}`, the bundle is for `{wanted}`; give the modules of that kernel"
    )]
    OtherKernel {
        /// What its `vermagic` says.
        found: String,
        /// The bundle's kernel.
        wanted: String,
    },
    /// There are two of one name.
    #[error("is the second module called `{0}`; give one of them")]
    Twice(String),
    /// A folder without modules.
    #[error("holds no module (.ko, .ko.gz, .ko.xz, .ko.zst)")]
    None,
}

/// A file that is left out, and why.
#[derive(Debug, Error)]
#[error("{path}: {source}")]
pub struct Refused {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub source: ModuleError,
}

/// A module that is taken, without its edits.
pub struct Taken {
    /// All that does not depend on thunks.
    pub module: Module,
    /// What passes may edit.
    pub slots: Slots,
}

/// All modules, by name, and what was left out of folders.
#[derive(Default)]
pub struct Modules {
    /// Those that are taken.
    pub taken: Vec<Taken>,
    /// Those that are not.
    pub refused: Vec<Refused>,
}

impl Modules {
    /// Reads the modules in `paths`, files or folders of them, for the kernel `image`. A file that cannot be taken is an
    /// error when it was named, and left out when it was found in a folder.
    pub fn read(
        image: &Image,
        thunks: &KernelThunks,
        paths: &[PathBuf],
    ) -> Result<Modules, Refused> {
        let mut modules = Modules::default();
        if paths.is_empty() {
            return Ok(modules);
        }
        let whole = |source: Fault| Refused {
            path: PathBuf::from("kernel"),
            source: source.into(),
        };
        let arrangement = Arrangement::of(&image.btf).map_err(whole)?;
        let exports = image.exports().map_err(whole)?;
        let banner = image.banner().map_err(whole)?;
        let release = banner.split(' ').nth(2).unwrap_or_default();
        let thunks = thunks.named();
        let host = Host {
            exports: &exports,
            btf: &image.btf,
            arrangement,
            thunks: &thunks,
        };
        let known = Known {
            host: &host,
            release,
            checks: &self_checks::find(image),
            inline_asm_plain: inline_asm_is_plain(image),
        };
        let mut by_name: BTreeMap<String, Taken> = BTreeMap::new();
        for path in paths {
            let fail = |source| Refused {
                path: path.clone(),
                source,
            };
            let folder = path.is_dir();
            let files = if folder {
                let mut files = Vec::new();
                find(path, &mut files).map_err(|error| fail(error.into()))?;
                if files.is_empty() {
                    return Err(fail(ModuleError::None));
                }
                files.sort();
                files
            } else {
                vec![path.clone()]
            };
            for path in files {
                let taken = take(&path, &known).and_then(|taken| {
                    match by_name.contains_key(&taken.module.name) {
                        true => Err(ModuleError::Twice(taken.module.name)),
                        false => Ok(taken),
                    }
                });
                match taken {
                    Ok(taken) => {
                        by_name.insert(taken.module.name.clone(), taken);
                    }
                    Err(source) if folder => modules.refused.push(Refused { path, source }),
                    Err(source) => return Err(Refused { path, source }),
                }
            }
        }
        modules.taken = by_name.into_values().collect();
        Ok(modules)
    }

    /// The slots of all modules.
    pub fn slots(&self) -> Vec<&Slots> {
        self.taken.iter().map(|taken| &taken.slots).collect()
    }

    /// The modules with the edits of each variant.
    pub fn finish(self, cave: &CaveContents, recipe: &Recipe) -> Result<Vec<Module>, PassError> {
        let taken = self.taken.into_iter();
        let modules = taken.map(|Taken { mut module, slots }| {
            module.edits = passes::run_module(&slots, cave, recipe)?;
            Ok(module)
        });
        modules.collect()
    }
}

/// Module files below `folder`. Links are not followed: `build` and `source` lead elsewhere.
fn find(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let (kind, path) = (entry.file_type()?, entry.path());
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if kind.is_dir() {
            find(&path, files)?;
        } else if kind.is_file() && SUFFIXES.iter().any(|suffix| name.ends_with(suffix)) {
            files.push(path);
        }
    }
    Ok(())
}

/// What is known of the kernel that modules are for.
struct Known<'a> {
    host: &'a Host<'a>,
    /// `uname -r`.
    release: &'a str,
    checks: &'a SelfChecks,
    /// See [`inline_asm_is_plain`].
    inline_asm_plain: bool,
}

fn take(path: &Path, kernel: &Known<'_>) -> Result<Taken, ModuleError> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MAX_FILE + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::Error::other("larger than 128 MiB").into());
    }
    let image = module::read(&unpacked_module(bytes)?, kernel.host)?;
    let vermagic = image.info.get("vermagic").cloned().unwrap_or_default();
    let found = vermagic.split(' ').next().unwrap_or_default();
    if found != kernel.release {
        return Err(ModuleError::OtherKernel {
            found: found.escape_default().to_string(),
            wanted: kernel.release.to_owned(),
        });
    }
    let text = ModuleText::analyse(image, kernel.checks, kernel.inline_asm_plain)?;
    let symbols = text.symbols();
    let ModuleText {
        module,
        slots,
        sites,
        form_relocs,
    } = text;
    let mut left = slots.returns_left.clone();
    for (reason, count) in &slots.indirect_left {
        *left.entry(reason.clone()).or_default() += count;
    }
    let build_id = module.image.build_id.hex.clone();
    Ok(Taken {
        module: Module {
            name: module.name,
            build_id,
            srcversion: module.info.get("srcversion").cloned(),
            vermagic,
            file_sha256: module.sha256,
            sections: module.sections,
            text_size: module.text_size,
            sizes: module.sizes,
            text: module.text,
            targets: module.targets,
            relocs: module.relocs,
            sites,
            form_relocs,
            symbols,
            exports: module.exports,
            edits: Vec::new(),
            left,
        },
        slots,
    })
}
