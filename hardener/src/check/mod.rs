//! `hardener check`: proves a bundle against its image, sharing no analysis with what emitted it.
//!
//! Image and bundle are read afresh. From the emitter's side only decompression is used; symbols, tables, sweep, slots and
//! sets are derived here a second time, so that a mistake must be made twice to go unnoticed. What is proved, in the order
//! of the design's invariants:
//!
//! | rule | file | proves |
//! |---|---|---|
//! | same-boundaries | `slots.rs` | each edit is one whole instruction for one whole instruction |
//! | one-shared-cave | `cave.rs` | thunks and tables lie in filler, apart from one another |
//! | allowed-slots | `slots.rs`, `exposed.rs`, `changeable.rs` | no edit touches what the kernel pokes or depends on; no return is left unchecked without such a reason |
//! | allowed-slots | `self_checks.rs` | calls that are left out only check, and what stands for them gives back what they do |
//! | thunk-contract | `owed.rs`, `thunks.rs`, `exec/` | thunks keep what they must and pass exactly the members of their tables |
//! | thunk-contract | `dead.rs` | what returns clear is read by nobody who is returned to |
//! | thunk-contract | `stack.rs`, `stack/` | the stack is cleared before user mode as far down as it was used, and nothing else is |
//! | thunk-contract | `promoted.rs` | branches that compare with hot targets go where the target says |
//! | three of them | `watched.rs`, `large_frames.rs` | functions outside a profile are not entered, probed ones are reported, and large frames have room |
//! | thunk-contract | `violations.rs` | what they stop is reported as the manifest says, with all that the slot had in place |
//! | exact-sets | `tables.rs`, `sets.rs` | the tables hold exactly the legal addresses |
//! | exact-sets | `returns.rs`, `callers.rs` | returns by function go back to that function's callers |
//! | modules | `module/` | the same for modules: text, tables and edits, each loaded afresh at two places |
//! | exact-sets | `classes.rs` | branches that are checked by class let exactly that through |
//! | true-to-image | `image.rs` | text, relocations, layouts, names and counts are the image's |

mod callers;
mod cave;
mod changeable;
mod classes;
mod dead;
mod doubts;
mod exec;
mod exposed;
#[cfg(fuzzing)]
pub mod fuzzing;
mod image;
mod kernel;
mod large_frames;
mod module;
mod owed;
mod promoted;
mod report;
mod return_classes;
mod returns;
mod self_checks;
mod sets;
mod slots;
mod stack;
mod tables;
mod thunks;
mod violations;
mod watched;
mod wrong;

use kernel::Kernel;
pub use kernel::KernelError;
pub use report::{Outcome, Rule, RuleReport, Violation};

use crate::image::{ImageError, KernelFiles, unpacked};
use callers::Parts;
use cave::CaveImage;
use exec::memo::Memo;
use penumbra_bundle::{Bundle, Edit, LinkVa, ReadError, Variant};
use slots::{KernelThunks, Replacement};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, io};
use tables::decoded_tables;
use thiserror::Error;

/// Why nothing can be said about a bundle.
#[derive(Debug, Error)]
pub enum CheckError {
    /// The image file cannot be read.
    #[error("{path}: {source}; give the vmlinuz or vmlinux that the bundle was made from")]
    Io {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The image does not unpack.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image is no kernel that the checker understands.
    #[error("{path}: {source}")]
    Kernel {
        /// The image.
        path: PathBuf,
        /// What it lacks.
        source: KernelError,
    },
    /// The bundle is for another kernel.
    #[error(
        "{path}: its build-id is {found}, the bundle is for {said}; give the image that the bundle was made from"
    )]
    OtherKernel {
        /// The image.
        path: PathBuf,
        /// The bundle's build-id.
        said: String,
        /// The image's build-id.
        found: String,
    },
    /// A module's file cannot be found.
    #[error("{path}: {source}; give the modules that are in the bundle, or a folder of them")]
    Module {
        /// What was given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The bundle cannot be read.
    #[error(transparent)]
    Bundle(#[from] ReadError),
}

/// An image, read once; several bundles can be checked against it.
pub struct Checker {
    /// The file's SHA-256, in hexadecimal.
    digest: String,
    kernel: Kernel,
    path: PathBuf,
    reading: Duration,
    modules: module::Files,
    memo: Memo,
}

impl Checker {
    /// Reads the image: a `vmlinuz`, or an uncompressed `vmlinux`, with its `System.map` if there is one.
    pub fn open<'a>(files: impl Into<KernelFiles<'a>>) -> Result<Checker, CheckError> {
        let KernelFiles { image, system_map } = files.into();
        let started = Instant::now();
        let read = |path: &Path| {
            let path = path.to_owned();
            fs::read(&path).map_err(|source| CheckError::Io { path, source })
        };
        let file = read(image)?;
        let map = system_map.map(read).transpose()?;
        let digest = image::sha256(&file);
        let elf = unpacked(file).map_err(|fault| ImageError::Bad {
            file: image.display().to_string(),
            fault,
        })?;
        let kernel = Kernel::read(elf, map.as_deref()).map_err(|source| {
            let about_map = matches!(
                source,
                KernelError::SystemMap(..) | KernelError::OtherMap { .. }
            );
            let path = system_map.filter(|_| about_map).unwrap_or(image).to_owned();
            CheckError::Kernel { path, source }
        })?;
        Ok(Checker {
            digest,
            kernel,
            path: image.to_owned(),
            reading: started.elapsed(),
            modules: module::Files::new(),
            memo: Memo::default(),
        })
    }

    /// Adds the files against which a bundle's modules are proved: files, or folders of them.
    pub fn with_modules(mut self, paths: &[PathBuf]) -> Result<Checker, CheckError> {
        for path in paths {
            let found = module_files(path, &mut self.modules);
            found.map_err(|source| CheckError::Module {
                path: path.clone(),
                source,
            })?;
        }
        Ok(self)
    }

    /// Proves `bundle`, or says where it cannot.
    pub fn check(&self, bundle: &Bundle, json: bool) -> Result<Outcome, CheckError> {
        let rules = self.prove(bundle, &Rule::ALL)?;
        let release = bundle.manifest.kernel.release.clone();
        Ok(Outcome::new(release, rules, self.reading, json))
    }

    /// Proves some rules only, in the order of [`Rule::ALL`].
    pub fn prove(&self, bundle: &Bundle, wanted: &[Rule]) -> Result<Vec<RuleReport>, CheckError> {
        let fail = |source| CheckError::Kernel {
            path: self.path.clone(),
            source,
        };
        let (said, found) = (
            &bundle.manifest.kernel.build_id,
            image::own_build_id(&self.kernel),
        );
        if found.as_ref().is_some_and(|found| found != said) {
            return Err(CheckError::OtherKernel {
                path: self.path.clone(),
                said: said.clone(),
                found: found.unwrap_or_default(),
            });
        }
        let cave = CaveImage::read(&bundle.cave, &bundle.manifest.cave);
        let about_modules = wanted
            .iter()
            .any(|rule| matches!(rule, Rule::Modules | Rule::ThunkContract | Rule::ExactSets));
        let (modules, module_faults) = match about_modules {
            true => module::read(&self.kernel, bundle, &self.modules).map_err(fail)?,
            false => Default::default(),
        };
        let subject = Subject {
            modules: &modules,
            module_faults: &module_faults,
            memo: &self.memo,
            parts: Mutex::default(),
            kernel: &self.kernel,
            bundle,
            cave: &cave,
            thunks: &KernelThunks::find(&self.kernel, watched::claimed(bundle)).map_err(fail)?,
        };
        let asked = |rule: Rule| wanted.contains(&rule);
        // What the tables are for is what the thunks were proved to do with them; the others need nothing of each other.
        let about_thunks = || {
            let (contract, roles) = match asked(Rule::ThunkContract) || asked(Rule::ExactSets) {
                true => thunks::check(&subject),
                false => return (None, None),
            };
            let sets = asked(Rule::ExactSets).then(|| tables::check(&subject, &roles));
            (Some(Ok(contract)), sets)
        };
        let others = || {
            let done = |rule| match rule {
                Rule::SameBoundaries => Some(Ok(slots::boundaries(&subject))),
                Rule::OneSharedCave => Some(Ok(cave::check(&subject))),
                Rule::AllowedSlots => Some(slots::allowed(&subject)),
                Rule::ThunkContract | Rule::ExactSets => None,
                Rule::TrueToImage => Some(Ok(image::check(&subject, &self.digest))),
                Rule::Modules => Some(Ok(module::check(&subject))),
            };
            Rule::ALL.map(|rule| asked(rule).then(|| done(rule)).flatten())
        };
        let ((mut contract, mut sets), others) = rayon::join(about_thunks, others);
        let rules = Rule::ALL.into_iter().zip(others);
        let reports = rules.filter(|(rule, _)| asked(*rule));
        let reports = reports.filter_map(|(rule, other)| match rule {
            Rule::ThunkContract => contract.take(),
            Rule::ExactSets => sets.take(),
            _ => other,
        });
        reports.collect::<Result<_, _>>().map_err(fail)
    }
}

/// Checks the bundle in `bundle` against the image at `image` and the modules in `modules`.
pub fn run<'a>(
    bundle: &Path,
    image: impl Into<KernelFiles<'a>>,
    modules: &[PathBuf],
    json: bool,
) -> Result<Outcome, CheckError> {
    let image = image.into();
    let (bundle, checker) = rayon::join(|| Bundle::read_dir(bundle), || Checker::open(image));
    let bundle = bundle?;
    let checker = checker?.with_modules(modules)?;
    checker.check(&bundle, json)
}

/// Adds the module files at or below `path`, by the name that the kernel gives a module of that file name.
fn module_files(path: &Path, files: &mut module::Files) -> io::Result<()> {
    if fs::metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let packed = [".ko", ".ko.gz", ".ko.xz", ".ko.zst"];
            let file = packed.iter().any(|suffix| name.ends_with(suffix));
            if file || entry.file_type()?.is_dir() {
                module_files(&entry.path(), files)?;
            }
        }
        return Ok(());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.split(".ko").next().unwrap_or_default();
    files.insert(name.replace('-', "_"), path.to_owned());
    Ok(())
}

/// What all rules look at.
struct Subject<'a> {
    kernel: &'a Kernel,
    bundle: &'a Bundle,
    cave: &'a Result<CaveImage, String>,
    thunks: &'a KernelThunks,
    modules: &'a [module::Read<'a>],
    module_faults: &'a [String],
    memo: &'a Memo,
    /// Where functions return to, once somebody has asked.
    parts: Mutex<Option<Arc<Parts>>>,
}

impl<'a> Subject<'a> {
    /// Where functions return to; derived once for all rules.
    fn parts(&self) -> Result<Arc<Parts>, KernelError> {
        // Nothing panics while it holds the lock, or waits for other threads; what is there is whole.
        let mut known = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(parts) = &*known {
            return Ok(parts.clone());
        }
        let mut redirected = self_checks::left_out(self);
        redirected.extend(self.thunks.watched.keys());
        let parts = Arc::new(Parts::of(self.kernel, &redirected)?);
        *known = Some(parts.clone());
        Ok(parts)
    }

    /// The variants with their edits.
    fn variants(&self) -> impl Iterator<Item = (&'a Variant, &'a [Edit])> {
        let bundle = self.bundle;
        let edits = bundle.edits.iter().map(|edits| edits.0.as_slice());
        bundle.manifest.variants.iter().zip(edits)
    }

    /// All edits, with their variant's name.
    fn edits(&self) -> impl Iterator<Item = (&'a str, &'a Edit)> {
        self.variants()
            .flat_map(|(variant, edits)| edits.iter().map(|edit| (variant.name.as_str(), edit)))
    }

    /// What an edit puts there, seen past what its thunk does to the stack first (see `stack.rs`).
    fn check_of(&self, edit: &Edit) -> Option<Replacement> {
        let found = slots::replacement(&edit.bytes, self.place(edit))?;
        let Replacement::Jump(to) = found else {
            return Some(found);
        };
        let image = self.cave.as_ref().ok();
        let behind = image.and_then(|image| image.behind(&self.bundle.manifest.cave, to));
        Some(Replacement::Jump(behind.unwrap_or(to)))
    }

    /// Where an edit stands.
    fn place(&self, edit: &Edit) -> LinkVa {
        LinkVa(
            self.bundle
                .manifest
                .text
                .start
                .0
                .wrapping_add(u64::from(edit.at.0)),
        )
    }
}
