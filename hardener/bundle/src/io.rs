//! Reading and writing bundles: everything is checked before anything is used.

use crate::manifest::SCHEMA;
use crate::{
    BackwardSets, Edits, FileRef, ForwardSets, LinkVa, Manifest, Module, Offending, Reloc,
    RelocKind, RunTimeModel, SlotKind, Symbols, TextOff, VaRange, Watched,
};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};
use thiserror::Error;

/// The manifest's file name.
pub const MANIFEST: &str = "manifest.json";
/// The signer's envelope, which a bundle may carry.
pub const ENVELOPE: &str = "statement.dsse.json";

/// No text of a kernel that we know comes near; larger claims are refused before memory is asked for.
const MAX_TEXT: u64 = 256 << 20;
/// The largest file that [`Bundle::read_dir`] reads.
const MAX_FILE: u64 = 512 << 20;

/// Why a bundle cannot be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The file system said no.
    #[error("{path}: {source}; is this a bundle that `hardener emit` wrote?")]
    Io {
        /// What was being read.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that the manifest names is not there.
    #[error("{file}: missing from the bundle; emit it again")]
    Missing {
        /// The file.
        file: String,
    },
    /// A file is not what the manifest says.
    #[error(
        "{file}: SHA-256 is {found}, the manifest says {expected}; the bundle was edited or damaged, emit it again"
    )]
    Digest {
        /// The file.
        file: String,
        /// The manifest's digest.
        expected: String,
        /// The file's digest.
        found: String,
    },
    /// A file does not decode.
    #[error("{file}: {detail}; emit the bundle again with this version of hardener")]
    Malformed {
        /// The file.
        file: String,
        /// What and where.
        detail: String,
    },
}

/// Why a bundle cannot be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The directory is there already.
    #[error("{0}: exists; choose another directory or say --force")]
    Exists(PathBuf),
    /// The directory that `--force` would replace is not a bundle.
    #[error("{0}: exists and is not a bundle; it is left alone, choose another directory")]
    NotABundle(PathBuf),
    /// There is no directory to put the bundle in.
    #[error("{0}: no such directory; make it first")]
    NoParent(PathBuf),
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// What was being written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A bundle in memory.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// `manifest.json`.
    pub manifest: Manifest,
    /// `text.bin`: as many bytes as the manifest's text range.
    pub text: Vec<u8>,
    /// `model.postcard`.
    pub model: RunTimeModel,
    /// `symbols.postcard`.
    pub symbols: Symbols,
    /// `cave.elf`, not parsed.
    pub cave: Vec<u8>,
    /// `relocations.postcard`: the cave's. Sorted.
    pub relocs: Vec<Reloc>,
    /// Each variant's edits, in the manifest's order.
    pub edits: Vec<Edits>,
    /// `forward.postcard`, when the manifest names it.
    pub forward: Option<ForwardSets>,
    /// `backward.postcard`, when the manifest names it.
    pub backward: Option<BackwardSets>,
    /// `watched.postcard`, when the manifest names it.
    pub watched: Option<Watched>,
    /// `modules.postcard`: modules by name; empty when the bundle has none.
    pub modules: Vec<Module>,
}

impl Bundle {
    /// Reads the bundle in the directory `dir`, every file once.
    pub fn read_dir(dir: &Path) -> Result<Bundle, ReadError> {
        let manifest = read_file(dir, MANIFEST)?;
        let parsed = parse_manifest(&manifest)?;
        let mut files = BTreeMap::new();
        for file in file_refs(&parsed) {
            check_name(&file.name)?;
            files.insert(file.name.clone(), read_file(dir, &file.name)?);
        }
        files.insert(MANIFEST.to_owned(), manifest);
        Bundle::from_files(&files)
    }

    /// Reads a bundle from the bytes of its files by name (the signer's verified bytes).
    pub fn from_files(files: &BTreeMap<String, Vec<u8>>) -> Result<Bundle, ReadError> {
        let get = |name: &str| {
            files.get(name).ok_or_else(|| ReadError::Missing {
                file: name.to_owned(),
            })
        };
        let manifest = parse_manifest(get(MANIFEST)?)?;
        for file in file_refs(&manifest) {
            check_name(&file.name)?;
            let found = sha256_hex(get(&file.name)?);
            if found != file.sha256 {
                return Err(ReadError::Digest {
                    file: file.name.clone(),
                    expected: file.sha256.clone(),
                    found,
                });
            }
        }
        let edits = manifest
            .variants
            .iter()
            .map(|variant| decode::<Edits>(&variant.edits.name, get(&variant.edits.name)?))
            .collect::<Result<Vec<_>, _>>()?;
        let bundle = Bundle {
            text: get(&manifest.text.file.name)?.clone(),
            model: decode(&manifest.model.name, get(&manifest.model.name)?)?,
            symbols: decode(&manifest.symbols.name, get(&manifest.symbols.name)?)?,
            cave: get(&manifest.cave.file.name)?.clone(),
            relocs: decode(&manifest.cave.relocs.name, get(&manifest.cave.relocs.name)?)?,
            edits,
            forward: match &manifest.forward {
                Some(file) => Some(decode(&file.name, get(&file.name)?)?),
                None => None,
            },
            backward: match &manifest.backward {
                Some(file) => Some(decode(&file.name, get(&file.name)?)?),
                None => None,
            },
            watched: match &manifest.watched {
                Some(file) => Some(decode(&file.name, get(&file.name)?)?),
                None => None,
            },
            modules: match &manifest.modules {
                Some(set) => decode(&set.file.name, get(&set.file.name)?)?,
                None => Vec::new(),
            },
            manifest,
        };
        bundle.check_shape()?;
        Ok(bundle)
    }

    /// Writes the bundle as the directory `dir`: whole or not at all.
    ///
    /// The manifest's digests are computed here from the parts. `force` replaces a bundle that is there.
    pub fn write_dir(&mut self, dir: &Path, force: bool) -> Result<(), WriteError> {
        let files = self.seal();
        if dir.exists() {
            if !force {
                return Err(WriteError::Exists(dir.to_owned()));
            }
            if !dir.join(MANIFEST).is_file() {
                return Err(WriteError::NotABundle(dir.to_owned()));
            }
        }
        let parent = match dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        if !parent.is_dir() {
            return Err(WriteError::NoParent(parent.to_owned()));
        }
        let name = dir
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let name = name.unwrap_or_else(|| "bundle".to_owned());
        let staging = parent.join(format!(".{name}.{}.partial", std::process::id()));
        let fail = |path: &Path| {
            let path = path.to_owned();
            let staging = staging.clone();
            move |source| {
                // The staging directory is ours alone; failing to remove it loses nothing.
                let _ = fs::remove_dir_all(&staging);
                WriteError::Io { path, source }
            }
        };
        fs::create_dir(&staging).map_err(fail(&staging))?;
        for (name, bytes) in &files {
            let path = staging.join(name);
            fs::write(&path, bytes).map_err(fail(&path))?;
        }
        if dir.exists() {
            let old = parent.join(format!(".{name}.{}.old", std::process::id()));
            fs::rename(dir, &old).map_err(fail(dir))?;
            fs::rename(&staging, dir).map_err(fail(dir))?;
            fs::remove_dir_all(&old).map_err(fail(&old))?;
        } else {
            fs::rename(&staging, dir).map_err(fail(dir))?;
        }
        Ok(())
    }

    /// The bytes of every file, manifest included, after setting the manifest's digests.
    pub fn seal(&mut self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut put = |file: &mut FileRef, bytes: Vec<u8>| {
            file.sha256 = sha256_hex(&bytes);
            files.insert(file.name.clone(), bytes);
        };
        put(&mut self.manifest.text.file, self.text.clone());
        put(&mut self.manifest.model, encode(&self.model));
        put(&mut self.manifest.symbols, encode(&self.symbols));
        put(&mut self.manifest.cave.file, self.cave.clone());
        put(&mut self.manifest.cave.relocs, encode(&self.relocs));
        for (variant, edits) in self.manifest.variants.iter_mut().zip(&self.edits) {
            variant.edit_count = edits.0.len() as u64;
            put(&mut variant.edits, encode(edits));
        }
        if let (Some(file), Some(sets)) = (&mut self.manifest.forward, &self.forward) {
            put(file, encode(sets));
        }
        if let (Some(file), Some(sets)) = (&mut self.manifest.backward, &self.backward) {
            put(file, encode(sets));
        }
        if let (Some(file), Some(watched)) = (&mut self.manifest.watched, &self.watched) {
            put(file, encode(watched));
        }
        if let Some(set) = &mut self.manifest.modules {
            put(&mut set.file, encode(&self.modules));
        }
        let mut manifest =
            serde_json::to_vec_pretty(&self.manifest).expect("a manifest has string keys only");
        manifest.push(b'\n');
        files.insert(MANIFEST.to_owned(), manifest);
        files
    }

    /// The variant called `name`, with its edits.
    pub fn variant(&self, name: &str) -> Option<(&crate::Variant, &Edits)> {
        let index = self
            .manifest
            .variants
            .iter()
            .position(|variant| variant.name == name)?;
        Some((&self.manifest.variants[index], &self.edits[index]))
    }

    /// Where absolute addresses stand in the cave, and how each is relocated.
    pub fn cave_relocs(&self) -> impl Iterator<Item = (LinkVa, RelocKind)> {
        let start = self.manifest.text.start.0;
        let relocs = self.relocs.iter();
        relocs.map(move |reloc| (LinkVa(start + u64::from(reloc.at.0)), reloc.kind))
    }

    /// The file's bytes at `at`, `len` long; `None` when they leave the text.
    pub fn bytes_at(&self, at: TextOff, len: usize) -> Option<&[u8]> {
        let start = at.0 as usize;
        self.text.get(start..start.checked_add(len)?)
    }

    /// Checks what every user of a bundle relies on: sizes, ranges, order.
    fn check_shape(&self) -> Result<(), ReadError> {
        let manifest = &self.manifest;
        let fail = |file: &str, detail: String| {
            Err(ReadError::Malformed {
                file: file.to_owned(),
                detail,
            })
        };
        let text = manifest.text.range();
        if text.is_empty()
            || text.len() > MAX_TEXT
            || !text.start.0.is_multiple_of(4096)
            || !text.end.0.is_multiple_of(4096)
        {
            return fail(
                MANIFEST,
                format!(
                    "text range {} to {} is not whole pages",
                    text.start, text.end
                ),
            );
        }
        let text_len = self.text.len();
        if text_len as u64 != text.len() {
            return fail(
                &manifest.text.file.name,
                format!("{text_len} bytes, the text range has {}", text.len()),
            );
        }
        let (forward, backward) = (self.forward.as_ref(), self.backward.as_ref());
        let watched = self.watched.as_ref();
        for (file, sound) in [
            (
                &manifest.forward,
                forward.is_none_or(|sets| sets.is_sound(text_len)),
            ),
            (
                &manifest.backward,
                backward.is_none_or(|sets| sets.is_sound(text_len)),
            ),
            (
                &manifest.watched,
                watched.is_none_or(|lists| lists.is_sound(text_len)),
            ),
        ] {
            if let Some(file) = file.as_ref().filter(|_| !sound) {
                let detail = "its lists are unsorted or leave the text".to_owned();
                return fail(&file.name, detail);
            }
        }
        let mut ranges: Vec<(&str, VaRange)> = vec![("cave", manifest.cave.range)];
        ranges.extend(
            manifest
                .cave
                .tables
                .iter()
                .map(|table| (table.name.as_str(), table.range)),
        );
        for (name, range) in ranges {
            if !text.encloses(&range) {
                return fail(
                    MANIFEST,
                    format!("{name}: {} to {} leaves the text", range.start, range.end),
                );
            }
        }
        let ends = |reloc: &Reloc| reloc.at.0 as usize + reloc.kind.width();
        if !self.relocs.is_sorted_by_key(|reloc| reloc.at)
            || self.relocs.iter().any(|reloc| ends(reloc) > text_len)
        {
            let detail = "relocations are unsorted or leave the text".to_owned();
            return fail(&manifest.cave.relocs.name, detail);
        }
        let mut free = manifest.cave.range.start.0;
        for trap in &manifest.cave.traps {
            let register = match trap.offending {
                Offending::Register(number) => number,
                Offending::Stack(_) => 0,
            };
            // An `out imm8` has 2 bytes (SDM volume 2, OUT).
            if trap.at.0 < free || trap.at.0 >= manifest.cave.range.end.0 - 1 || register > 15 {
                return fail(
                    MANIFEST,
                    format!(
                        "the trap at {} overlaps, leaves the cave or names no register",
                        trap.at
                    ),
                );
            }
            free = trap.at.0 + 2;
        }
        if manifest
            .variants
            .first()
            .is_none_or(|variant| variant.name != "stock")
        {
            return fail(MANIFEST, "the first variant is not `stock`".to_owned());
        }
        for (index, (variant, edits)) in manifest.variants.iter().zip(&self.edits).enumerate() {
            let name = &variant.name;
            if name.is_empty()
                || !name
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            {
                return fail(
                    MANIFEST,
                    format!("variant name `{name}` is not lower-case letters, digits and dashes"),
                );
            }
            if manifest.variants[..index]
                .iter()
                .any(|other| other.name == *name)
            {
                return fail(MANIFEST, format!("variant `{name}` is there twice"));
            }
            let mut free = 0;
            for edit in &edits.0 {
                let (start, len) = (edit.at.0 as usize, edit.bytes.len());
                if start < free || !(5..=6).contains(&len) || start + len > text_len {
                    return fail(
                        &variant.edits.name,
                        format!(
                            "edit at text offset {start:#x} overlaps, leaves the text or is {len} bytes long"
                        ),
                    );
                }
                free = start + len;
            }
            // Calls tell the hypervisor what the kernel is about to do; nothing else of `stock` is changed.
            if index == 0 && edits.0.iter().any(|edit| edit.slot != SlotKind::Call) {
                let what = "`stock` has edits of returns or indirect branches";
                return fail(&variant.edits.name, what.to_owned());
            }
        }
        if let Some(set) = &manifest.modules {
            let said = set.modules.iter().map(|one| (&one.name, &one.build_id));
            let found = self.modules.iter().map(|one| (&one.name, &one.build_id));
            if !said.eq(found) || !set.modules.is_sorted_by(|a, b| a.name < b.name) {
                let what = "the modules are unsorted or not those that the manifest names";
                return fail(&set.file.name, what.to_owned());
            }
            let variants = manifest.variants.len();
            let broken = self
                .modules
                .iter()
                .find_map(|module| module.fault(variants));
            if let Some(what) = broken {
                return fail(&set.file.name, what);
            }
        }
        let model = &self.model;
        let name = &manifest.model.name;
        for (list, width) in [
            (&model.abs32, 4),
            (&model.inverse32, 4),
            (&model.abs64, 8),
            (&model.functions, 1),
            (&model.return_thunks, 1),
        ] {
            if !list.is_sorted()
                || list
                    .last()
                    .is_some_and(|last| last.0 as usize + width > text_len)
            {
                return fail(name, "a list is unsorted or leaves the text".to_owned());
            }
        }
        if !model.sites.is_sorted_by_key(|site| site.at) {
            return fail(name, "sites are unsorted".to_owned());
        }
        for site in &model.sites {
            let end = site.at.0 as usize + usize::from(site.len);
            if end > text_len || !site.has_sound_forms() {
                return fail(
                    name,
                    format!(
                        "site at text offset {:#x} leaves the text or has a form of another length",
                        site.at.0
                    ),
                );
            }
        }
        if !self.symbols.0.is_sorted_by_key(|symbol| symbol.at) {
            return fail(&manifest.symbols.name, "symbols are unsorted".to_owned());
        }
        Ok(())
    }
}

/// SHA-256 of `bytes`, in hexadecimal (FIPS 180-4).
fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn file_refs(manifest: &Manifest) -> impl Iterator<Item = &FileRef> {
    [
        &manifest.text.file,
        &manifest.model,
        &manifest.symbols,
        &manifest.cave.file,
        &manifest.cave.relocs,
    ]
    .into_iter()
    .chain(manifest.variants.iter().map(|variant| &variant.edits))
    .chain(&manifest.forward)
    .chain(&manifest.backward)
    .chain(&manifest.watched)
    .chain(manifest.modules.iter().map(|set| &set.file))
}

/// A file name from a manifest is hostile until it is known to stay in its directory.
fn check_name(name: &str) -> Result<(), ReadError> {
    let plain = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    if name.is_empty() || name.starts_with('.') || !plain || name == MANIFEST || name == ENVELOPE {
        return Err(ReadError::Malformed {
            file: MANIFEST.to_owned(),
            detail: format!("`{}` is no file name of a bundle", name.escape_default()),
        });
    }
    Ok(())
}

fn read_file(dir: &Path, name: &str) -> Result<Vec<u8>, ReadError> {
    let path = dir.join(name);
    let fail = |source| ReadError::Io {
        path: path.clone(),
        source,
    };
    let metadata = fs::metadata(&path).map_err(fail)?;
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return Err(fail(io::Error::other(
            "not a regular file of at most 512 MiB",
        )));
    }
    fs::read(&path).map_err(fail)
}

fn parse_manifest(bytes: &[u8]) -> Result<Manifest, ReadError> {
    let fail = |detail: String| ReadError::Malformed {
        file: MANIFEST.to_owned(),
        detail,
    };
    let manifest: Manifest =
        serde_json::from_slice(bytes).map_err(|error| fail(error.to_string()))?;
    if manifest.schema != SCHEMA {
        return Err(fail(format!(
            "schema is `{}`, this version reads `{SCHEMA}`",
            manifest.schema.escape_default()
        )));
    }
    Ok(manifest)
}

fn encode<T: serde::Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("plain data always encodes")
}

fn decode<T: DeserializeOwned>(file: &str, bytes: &[u8]) -> Result<T, ReadError> {
    let fail = |detail: String| ReadError::Malformed {
        file: file.to_owned(),
        detail,
    };
    let (value, rest) =
        postcard::take_from_bytes(bytes).map_err(|error| fail(error.to_string()))?;
    if !rest.is_empty() {
        return Err(fail(format!("{} bytes too many", rest.len())));
    }
    Ok(value)
}
