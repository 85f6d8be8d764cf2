//! The path of a process's executable, by its directory entries and mounts.
//!
//! A path names a file only within a mount namespace: any user can make one of their own and mount a program at
//! `/usr/bin/anything` in it. So the walk also returns the mount at which it ended, and a path is believed only if that is
//! the mount at which process 1's path ends.

use super::layout::Layout;
use super::memory::{GuestMemory, ReadError};
use crate::xen::GuestVa;
use thiserror::Error;

/// Components and mount crossings followed.
const MAX_STEPS: usize = 512;
/// `NAME_MAX`.
const MAX_NAME: usize = 255;
/// `PATH_MAX`.
const MAX_PATH: usize = 4096;

/// Why a path cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum PathError {
    /// Memory cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The walk does not end or a name is longer than Linux allows.
    #[error("directory entries at {0} do not end in a root")]
    Endless(GuestVa),
    /// A name is not text.
    #[error("a name at {0} is not UTF-8")]
    NotText(GuestVa),
}

/// A path and the mount on which its root lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Walked {
    /// Absolute, `/` separated.
    pub path: String,
    /// The mount that is its own parent.
    pub top: GuestVa,
}

/// Walks from the `struct path` at `path` to the root (Linux, fs/d_path.c, prepend_path).
pub fn walk(memory: &GuestMemory<'_>, layout: &Layout, path: GuestVa) -> Result<Walked, PathError> {
    let vfsmount = memory.pointer(path.offset(layout.path_mnt))?;
    let mut mount = GuestVa(vfsmount.0.wrapping_sub(layout.mount_mnt));
    let mut dentry = memory.pointer(path.offset(layout.path_dentry))?;
    let mut names: Vec<String> = Vec::new();
    let mut length = 0;
    for _ in 0..MAX_STEPS {
        let root = memory.pointer(mount.offset(layout.mount_mnt + layout.vfsmount_root))?;
        let parent = memory.pointer(dentry.offset(layout.dentry_parent))?;
        if dentry == root || dentry == parent {
            let below = memory.pointer(mount.offset(layout.mount_parent))?;
            if below == mount {
                let mut path = String::new();
                for name in names.iter().rev() {
                    path.push('/');
                    path.push_str(name);
                }
                return Ok(Walked { path, top: mount });
            }
            dentry = memory.pointer(mount.offset(layout.mount_mountpoint))?;
            mount = below;
            continue;
        }
        let name = name(memory, layout, dentry)?;
        length += name.len() + 1;
        if length > MAX_PATH {
            break;
        }
        names.push(name);
        dentry = parent;
    }
    Err(PathError::Endless(path))
}

fn name(memory: &GuestMemory<'_>, layout: &Layout, dentry: GuestVa) -> Result<String, PathError> {
    let qstr = dentry.offset(layout.dentry_name);
    let len = memory.u32(qstr.offset(layout.qstr_len))?;
    let len = usize::try_from(len)
        .ok()
        .filter(|len| (1..=MAX_NAME).contains(len))
        .ok_or(PathError::Endless(dentry))?;
    let characters = memory.pointer(qstr.offset(layout.qstr_name))?;
    let bytes = memory.bytes(characters, len)?;
    // A slash or a zero in a name would be read as something else than it is.
    if bytes.iter().any(|byte| matches!(byte, 0 | b'/')) {
        return Err(PathError::NotText(dentry));
    }
    String::from_utf8(bytes).map_err(|_| PathError::NotText(dentry))
}
