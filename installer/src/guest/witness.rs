//! What holds for as long as a process is what it was read as, in words that Xen can look at.
//!
//! A binding names a page-table root, and roots are used again. So each binding carries words of the guest's memory that the
//! guest's kernel changes before the root can serve anybody else: an ending thread clears `task->mm` before it gives up its
//! address space (exit_mm, kernel/exit.c), a new program comes with a new `mm` and `exe_file` (begin_new_exec, fs/exec.c),
//! other user ids come with another `real_cred` (commit_creds, kernel/cred.c). Xen compares them whenever the root is
//! loaded, before its view is granted.

use super::memory::{GuestMemory, ReadError};
use super::processes::{Process, Reader};
use crate::xen::{GuestPa, GuestVa, PAGE, Root, Witness};

/// `_PAGE_PRESENT | _PAGE_USER`.
const USER: u64 = 5;
/// `_PAGE_NX`.
const NX: u64 = 1 << 63;
/// Entries of a top-level table that map the user's half of the address space.
const USER_ENTRIES: usize = 256;

/// The words for `process`: seven, less those that could not be read and so decide nothing.
pub fn witnesses(
    reader: &Reader,
    memory: &GuestMemory<'_>,
    process: &Process,
) -> Result<Vec<Witness>, ReadError> {
    let layout = reader.layout();
    let (task, mm, anchors) = (process.task, process.identity.mm, &process.anchors);
    let mut words = vec![
        (task.offset(layout.task_mm), mm.0),
        (task.offset(layout.task_start_time), anchors.start),
        (mm.offset(layout.mm_pgd), anchors.pgd.0),
    ];
    if let Some((file, dentry)) = anchors.exe {
        words.push((mm.offset(layout.mm_exe_file), file.0));
        let path = file.offset(layout.file_f_path);
        words.push((path.offset(layout.path_dentry), dentry.0));
    }
    let mut witnesses = words
        .into_iter()
        .map(|(at, value)| {
            Ok(Witness {
                gpa: memory.locate(at)?,
                mask: u64::MAX,
                value,
            })
        })
        .collect::<Result<Vec<Witness>, ReadError>>()?;
    if let (Some(cred), Some((uid, _))) = (anchors.cred, process.identity.uid) {
        witnesses.push(Witness {
            gpa: memory.locate(task.offset(layout.task_real_cred))?,
            mask: u64::MAX,
            value: cred.0,
        });
        witnesses.push(half(memory, cred.offset(layout.cred_uid), uid)?);
    }
    Ok(witnesses)
}

/// A 32-bit word, in the 64-bit one that holds it.
fn half(memory: &GuestMemory<'_>, at: GuestVa, value: u32) -> Result<Witness, ReadError> {
    let shift = (at.0 & 4) * 8;
    Ok(Witness {
        gpa: memory.locate(GuestVa(at.0 & !7))?,
        mask: u64::from(u32::MAX) << shift,
        value: u64::from(value) << shift,
    })
}

/// Whether the address space at `root` has a second table for user mode, 4096 bytes behind: page-table isolation is on.
///
/// Asked of the tables themselves, for they cannot be wrong about it: with isolation, and only then, the kernel puts each
/// user entry into both tables and marks it no-execute in its own (__pti_set_user_pgtbl, arch/x86/mm/pti.c). No process
/// can write either. "No" is always safe: the user half is then on the default view.
pub fn has_user_half(memory: &GuestMemory<'_>, root: Root) -> bool {
    if root.0 & PAGE as u64 != 0 {
        return false;
    }
    let table = |at: GuestPa| -> Option<Vec<u64>> {
        let bytes = memory.frame_bytes(at.gfn()).ok()?;
        let words = bytes.chunks_exact(8).take(USER_ENTRIES);
        words
            .map(|word| word.try_into().ok().map(u64::from_le_bytes))
            .collect()
    };
    let (Some(kernel), Some(user)) = (table(GuestPa(root.0)), table(GuestPa(root.0 + PAGE as u64)))
    else {
        return false;
    };
    let mut entries = kernel
        .iter()
        .zip(&user)
        .filter(|(kernel, _)| **kernel & USER == USER)
        .peekable();
    entries.peek().is_some()
        && entries.all(|(kernel, user)| {
            // The processor sets the accessed bit (bit 5) in whichever it walks.
            let same = (kernel ^ user) & !(NX | 0x20) == 0;
            kernel & NX != 0 && user & NX == 0 && same
        })
}
