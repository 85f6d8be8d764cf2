//! Files: reading is bounded and never blocks on a pipe or device; writing is whole or not at all.

use rustix::fs::{Dir, FileType, Mode, OFlags, fstat, openat};
use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The largest policy file.
pub(crate) const MAX_POLICY: u64 = 1 << 20;
/// The largest envelope. A statement of [`crate::statement::MAX_SUBJECTS`] files is a tenth of it.
pub(crate) const MAX_ENVELOPE: u64 = 1 << 20;
/// The largest key file.
pub(crate) const MAX_KEY: u64 = 16 << 10;
/// The most that all files of a bundle may hold together: the installer keeps them in dom0's memory.
pub(crate) const MAX_BUNDLE: u64 = 512 << 20;

/// Why a file cannot be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FileError {
    /// The system said no.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A link, directory, pipe or device where a file should be.
    #[error("{}: is {what}, not a regular file; put the file itself there", path.display())]
    NotRegular {
        /// What was opened.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// More bytes than any honest file of its kind has.
    #[error("{}: larger than {limit} bytes, the most that is read here; is it the right file?", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The most that is read.
        limit: u64,
    },
}

impl FileError {
    fn io(path: &Path, source: impl Into<io::Error>) -> FileError {
        FileError::Io {
            path: path.to_owned(),
            source: source.into(),
        }
    }

    /// Whether the file is not there.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, FileError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Reads a file that the operator named. Links are followed: the name is the operator's own.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    Ok(read_with_mode(path, limit)?.0)
}

/// Reads a file that the operator named, and its permission bits as they were when it was opened.
pub(crate) fn read_with_mode(path: &Path, limit: u64) -> Result<(Vec<u8>, u32), FileError> {
    read_at(rustix::fs::CWD, path, path, OFlags::empty(), limit)
}

/// A directory held open: whatever happens to its name afterwards, its files are looked up in this one.
pub(crate) struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

impl Directory {
    pub(crate) fn open(path: &Path) -> Result<Directory, FileError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty());
        Ok(Directory {
            fd: fd.map_err(|error| FileError::io(path, error))?,
            path: path.to_owned(),
        })
    }

    /// The names of all entries, sorted; at most `limit` of them, so that a huge directory costs nothing.
    ///
    /// Bytes that a terminal should not see come back escaped; no statement can name such a file.
    pub(crate) fn names(&self, limit: usize) -> Result<Vec<String>, FileError> {
        let fail = |error| FileError::io(&self.path, error);
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.fd).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            if names.len() == limit {
                let what =
                    io::Error::other(format!("more than {limit} entries; no bundle has so many"));
                return Err(FileError::io(&self.path, what));
            }
            names.push(name.escape_ascii().to_string());
        }
        names.sort();
        Ok(names)
    }

    /// Reads the file called `name`, which must be a plain name; a link is refused, wherever it points.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, FileError> {
        let shown = self.path.join(name);
        Ok(read_at(
            self.fd.as_fd(),
            Path::new(name),
            &shown,
            OFlags::NOFOLLOW,
            limit,
        )?
        .0)
    }
}

fn read_at(
    dir: BorrowedFd<'_>,
    name: &Path,
    shown: &Path,
    extra: OFlags,
    limit: u64,
) -> Result<(Vec<u8>, u32), FileError> {
    let fail = |error| FileError::io(shown, error);
    let not_regular = |what| FileError::NotRegular {
        path: shown.to_owned(),
        what,
    };
    // NONBLOCK: opening a pipe must not wait for a writer. It changes nothing for regular files.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | extra;
    let fd = match openat(dir, name, flags, Mode::empty()) {
        Err(rustix::io::Errno::LOOP) => return Err(not_regular("a symbolic link")),
        // A socket cannot be opened at all.
        Err(rustix::io::Errno::NXIO) => return Err(not_regular("a socket or device")),
        other => other.map_err(fail)?,
    };
    let stat = fstat(&fd).map_err(fail)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Directory => return Err(not_regular("a directory")),
        FileType::Fifo => return Err(not_regular("a pipe")),
        _ => return Err(not_regular("a device")),
    }
    let too_large = || FileError::TooLarge {
        path: shown.to_owned(),
        limit,
    };
    // Before memory is asked for.
    let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
    if size > limit {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    // The file may grow while it is read.
    let read = File::from(fd).take(limit + 1).read_to_end(&mut bytes);
    read.map_err(|error| FileError::io(shown, error))?;
    if bytes.len() as u64 > limit {
        return Err(too_large());
    }
    Ok((bytes, stat.st_mode & 0o7777))
}

/// Writes `path` with the permission bits `mode` (less the umask): whole or not at all, also when power is lost.
///
/// Without `replace`, a file that is there stays and the result is an `AlreadyExists` error.
pub(crate) fn write(path: &Path, bytes: &[u8], mode: u32, replace: bool) -> Result<(), FileError> {
    let fail = |error| FileError::io(path, error);
    let dir = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut temporary = tempfile::Builder::new()
        .prefix(".signer-")
        .permissions(Permissions::from_mode(mode))
        .tempfile_in(dir)
        .map_err(fail)?;
    temporary.write_all(bytes).map_err(fail)?;
    temporary.as_file().sync_all().map_err(fail)?;
    let placed = if replace {
        temporary.persist(path)
    } else {
        temporary.persist_noclobber(path)
    };
    placed.map_err(|error| fail(error.error))?;
    // The name itself is in the directory.
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(fail)
}
