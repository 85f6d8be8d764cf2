//! Where structure members and symbols are, from the bundle's manifest.

use crate::xen::GuestVa;
use penumbra_bundle::Manifest;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The manifest lacks a name.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error(
    "manifest.json: no `{0}`; emit the bundle again with the hardener of this installer's version"
)]
pub struct MissingName(pub String);

macro_rules! layout {
    ($($(#[$doc:meta])* $field:ident = $key:literal),* $(,)?) => {
        /// Byte offsets of the structure members that the installer reads (Linux, include/linux/sched.h and others).
        #[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
        pub struct Layout {
            $($(#[$doc])* pub $field: u64,)*
            /// `task_struct.thread` plus `thread_struct.sp`: where a sleeping task's stack pointer is.
            pub task_saved_sp: u64,
        }

        impl Layout {
            /// Takes every offset from the manifest, or names the first that is missing.
            pub fn new(manifest: &Manifest) -> Result<Layout, MissingName> {
                let get = |key: &str| {
                    manifest
                        .layout
                        .get(key)
                        .map(|offset| u64::from(*offset))
                        .ok_or_else(|| MissingName(key.to_owned()))
                };
                let task_saved_sp = get("task_struct.thread")? + get("thread_struct.sp")?;
                Ok(Layout { $($field: get($key)?,)* task_saved_sp })
            }
        }
    };
}

layout! {
    /// List of thread-group leaders.
    task_tasks = "task_struct.tasks",
    /// Address space; null for kernel threads.
    task_mm = "task_struct.mm",
    /// Thread id; a leader's is the process id.
    task_pid = "task_struct.pid",
    /// Name, 16 bytes.
    task_comm = "task_struct.comm",
    /// Objective credentials.
    task_real_cred = "task_struct.real_cred",
    /// When it started.
    task_start_time = "task_struct.start_time",
    /// Kernel stack.
    task_stack = "task_struct.stack",
    /// PF_ flags.
    task_flags = "task_struct.flags",
    /// Shared by the threads of a process.
    task_signal = "task_struct.signal",
    /// Links the threads of a process.
    task_thread_node = "task_struct.thread_node",
    /// Head of the threads' list.
    signal_thread_head = "signal_struct.thread_head",
    /// Page-table root, as a kernel address.
    mm_pgd = "mm_struct.pgd",
    /// The executable.
    mm_exe_file = "mm_struct.exe_file",
    /// Path of an open file.
    file_f_path = "file.f_path",
    /// Mount part of a path.
    path_mnt = "path.mnt",
    /// Directory entry part of a path.
    path_dentry = "path.dentry",
    /// Name.
    dentry_name = "dentry.d_name",
    /// Directory that holds the entry.
    dentry_parent = "dentry.d_parent",
    /// Length of a name.
    qstr_len = "qstr.len",
    /// Characters of a name.
    qstr_name = "qstr.name",
    /// Root of a mount.
    vfsmount_root = "vfsmount.mnt_root",
    /// The vfsmount in its mount.
    mount_mnt = "mount.mnt",
    /// The mount below.
    mount_parent = "mount.mnt_parent",
    /// Where on it.
    mount_mountpoint = "mount.mnt_mountpoint",
    /// Real user id.
    cred_uid = "cred.uid",
    /// Effective user id.
    cred_euid = "cred.euid",
    /// Bytes of a kernel stack.
    thread_size = "const.THREAD_SIZE",
}

/// The guest's address of the data symbol `name`.
pub fn data(manifest: &Manifest, slide: super::Slide, name: &str) -> Result<GuestVa, MissingName> {
    manifest
        .data
        .get(name)
        .map(|va| slide.guest(*va))
        .ok_or_else(|| MissingName(name.to_owned()))
}
