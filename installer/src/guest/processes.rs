//! The guest's processes, from `init_task`'s list.

use super::kernel::{Kernel, Slide};
use super::layout::{self, Layout, MissingName};
use super::memory::{GuestMemory, ReadError};
use super::{orc, path};
use crate::xen::{GuestVa, Root};
use penumbra_bundle::Manifest;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// More processes than this are not read; those not read stay on the default view.
const MAX_PROCESSES: usize = 1 << 16;
/// Walks over the list before a broken one is taken for what it is.
const WALKS: u32 = 3;
/// Threads of one process that ended before the one that stands for it.
const MAX_ENDED_THREADS: usize = 1 << 10;
/// `TASK_COMM_LEN`.
const COMM: usize = 16;
/// `PF_KTHREAD` (include/linux/sched.h).
const PF_KTHREAD: u32 = 0x0020_0000;

/// What names one address space of one process: if any of it changes, it is another process.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    /// Start time, nanoseconds since boot.
    pub start: u64,
    /// `mm_struct`.
    pub mm: GuestVa,
    /// Page-table root.
    pub root: Root,
    /// Executable, if it can be read and its path means what it says.
    pub exe: Option<String>,
    /// Real and effective user id, if they can be read.
    pub uid: Option<(u32, u32)>,
}

/// Pointers that stay as they are for as long as the process is what it was read as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Anchors {
    /// The thread's own start time.
    pub start: u64,
    /// `mm->pgd`.
    pub pgd: GuestVa,
    /// `mm->exe_file` and its directory entry, where the path was read.
    pub exe: Option<(GuestVa, GuestVa)>,
    /// `task->real_cred`, where the user ids were read.
    pub cred: Option<GuestVa>,
}

/// A process as the guest shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Process {
    /// `task_struct` of its first thread, which names it.
    pub leader: GuestVa,
    /// `task_struct` of the thread that stands for it: the first, unless that one ended and others live on.
    pub task: GuestVa,
    /// What was read on the way.
    pub anchors: Anchors,
    /// What names it.
    pub identity: Identity,
    /// The name it gives itself.
    pub comm: String,
    /// Its executable's path as its own mount namespace has it; for people, not for decisions.
    pub shown_exe: Option<String>,
}

/// What one walk over the list found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ProcessList {
    /// Processes with an address space.
    pub processes: Vec<Process>,
    /// Kernel threads and exiting processes passed over: they have no address space.
    pub kernel_threads: usize,
    /// The mount at which believed paths end: process 1's.
    pub top: Option<GuestVa>,
    /// Entries that could not be read, and why the walk ended early if it did.
    pub trouble: Vec<String>,
}

/// Reads processes of one guest. The journal keeps it, so that `ps` and `remove` need no bundle.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Reader {
    layout: Layout,
    init_task: GuestVa,
    kernel: Kernel,
    orc: Option<orc::Place>,
}

/// A path, if it was walked in the mount tree in which paths mean what they say.
fn believed(walked: Option<path::Walked>, top: Option<GuestVa>) -> Option<String> {
    walked
        .filter(|walked| top == Some(walked.top))
        .map(|walked| walked.path)
}

impl Reader {
    /// Takes offsets and the list's head from the manifest.
    pub fn new(manifest: &Manifest, kernel: Kernel) -> Result<Reader, MissingName> {
        Ok(Reader {
            layout: Layout::new(manifest)?,
            init_task: layout::data(manifest, kernel.slide, "init_task")?,
            orc: orc::Place::new(manifest, &kernel)?,
            kernel,
        })
    }

    /// The offsets.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The head of the list.
    pub fn init_task(&self) -> GuestVa {
        self.init_task
    }

    /// Where the table for unwinding is, if the kernel has one.
    pub fn orc(&self) -> Option<orc::Place> {
        self.orc
    }

    /// The slide.
    pub fn slide(&self) -> Slide {
        self.kernel.slide
    }

    /// Every thread-group leader's `task_struct`, `init_task` first, and what went wrong.
    ///
    /// The list is walked while the guest changes it. It ends at its head, at a second visit of any entry, at an
    /// unreadable entry or at the limit.
    pub fn leaders(&self, memory: &GuestMemory<'_>) -> (Vec<GuestVa>, Option<String>) {
        let mut seen = HashSet::from([self.init_task]);
        let mut found = vec![self.init_task];
        let mut at = self.init_task;
        while found.len() < MAX_PROCESSES {
            let next = match memory.pointer(at.offset(self.layout.task_tasks)) {
                Ok(next) => GuestVa(next.0.wrapping_sub(self.layout.task_tasks)),
                Err(error) => {
                    return (found, Some(format!("the process list breaks off: {error}")));
                }
            };
            if next == self.init_task {
                return (found, None);
            }
            if !seen.insert(next) {
                return (
                    found,
                    Some(format!("the process list runs in a circle at {next}")),
                );
            }
            found.push(next);
            at = next;
        }
        (
            found,
            Some(format!(
                "more than {MAX_PROCESSES} processes; the rest are not read"
            )),
        )
    }

    /// Whether the first process runs a program. It is the first on the list, always (rest_init, init/main.c).
    pub fn has_started(&self, memory: &GuestMemory<'_>) -> Result<bool, ReadError> {
        let next = memory.pointer(self.init_task.offset(self.layout.task_tasks))?;
        let first = GuestVa(next.0.wrapping_sub(self.layout.task_tasks));
        Ok(memory.u32(first.offset(self.layout.task_pid))? == 1
            && memory.pointer(first.offset(self.layout.task_mm))? != GuestVa(0))
    }

    /// Reads all processes.
    pub fn list(&self, memory: &GuestMemory<'_>) -> ProcessList {
        // The list is walked without the guest's locks: an entry that is freed under the walk leads nowhere. Once more then.
        let mut tries = 1;
        let (leaders, trouble) = loop {
            let (leaders, trouble) = self.leaders(memory);
            if trouble.is_none() || tries == WALKS {
                break (leaders, trouble);
            }
            tries += 1;
        };
        let mut list = ProcessList {
            trouble: trouble.into_iter().collect(),
            ..ProcessList::default()
        };
        let mut exes = Vec::new();
        let mut unread = Vec::new();
        let mut read = |task| match self.read(memory, task) {
            Ok(Some((process, walked))) => {
                list.processes.push(process);
                exes.push(walked);
                None
            }
            Ok(None) => {
                list.kernel_threads += 1;
                None
            }
            Err(error) => Some(error),
        };
        for task in leaders {
            if read(task).is_some() {
                unread.push(task);
            }
        }
        // One that ended meanwhile has left the list; what is still there is read once more.
        if !unread.is_empty() {
            let (there, _) = self.leaders(memory);
            unread.retain(|task| there.contains(task));
        }
        let errors: Vec<String> = unread
            .into_iter()
            .filter_map(|task| {
                read(task).map(|error| format!("the process at {task} cannot be read: {error}"))
            })
            .collect();
        list.trouble.extend(errors);
        // The mount tree that paths are believed in is process 1's.
        let top = list
            .processes
            .iter()
            .zip(&exes)
            .find(|(process, _)| process.identity.pid == 1)
            .and_then(|(_, walked)| walked.as_ref().map(|walked| walked.top));
        list.top = top;
        for (process, walked) in list.processes.iter_mut().zip(exes) {
            process.identity.exe = believed(walked, top);
        }
        list
    }

    /// Reads one process; `None` for a kernel thread or one without an address space (exiting). The identity's `exe` is
    /// not set: it takes process 1 to believe a path.
    fn read(
        &self,
        memory: &GuestMemory<'_>,
        leader: GuestVa,
    ) -> Result<Option<(Process, Option<path::Walked>)>, ReadError> {
        let layout = &self.layout;
        let flags = memory.u32(leader.offset(layout.task_flags))?;
        if flags & PF_KTHREAD != 0 {
            return Ok(None);
        }
        let Some((task, mm)) = self.with_memory(memory, leader)? else {
            return Ok(None);
        };
        let pid = memory.u32(leader.offset(layout.task_pid))?;
        let pgd = memory.pointer(mm.offset(layout.mm_pgd))?;
        let comm = memory.bytes(leader.offset(layout.task_comm), COMM)?;
        let comm = comm.split(|byte| *byte == 0).next().unwrap_or_default();
        let (cred, uid) = self.uid(memory, task).ok().unzip();
        let (exe, walked) = self.exe(memory, mm).unzip();
        Ok(Some((
            Process {
                leader,
                task,
                anchors: Anchors {
                    start: memory.u64(task.offset(layout.task_start_time))?,
                    pgd,
                    exe,
                    cred,
                },
                identity: Identity {
                    pid,
                    start: memory.u64(leader.offset(layout.task_start_time))?,
                    mm,
                    root: Root(memory.translate(pgd)?.0),
                    exe: None,
                    uid,
                },
                comm: String::from_utf8_lossy(comm).into_owned(),
                shown_exe: walked.as_ref().map(|walked| walked.path.clone()),
            },
            walked,
        )))
    }

    /// The thread that stands for `leader`'s process, and its address space. A first thread that calls pthread_exit(3)
    /// stays behind as a zombie without one while the others run on.
    fn with_memory(
        &self,
        memory: &GuestMemory<'_>,
        leader: GuestVa,
    ) -> Result<Option<(GuestVa, GuestVa)>, ReadError> {
        let layout = &self.layout;
        let mm = memory.pointer(leader.offset(layout.task_mm))?;
        if mm != GuestVa(0) {
            return Ok(Some((leader, mm)));
        }
        let signal = memory.pointer(leader.offset(layout.task_signal))?;
        let head = signal.offset(layout.signal_thread_head);
        let mut at = memory.pointer(head)?;
        // A list that is being changed may lead anywhere; then the process is as one that exits.
        for _ in 0..MAX_ENDED_THREADS {
            if at == head {
                break;
            }
            let task = GuestVa(at.0.wrapping_sub(layout.task_thread_node));
            let mm = memory.pointer(task.offset(layout.task_mm))?;
            if mm != GuestVa(0) {
                return Ok(Some((task, mm)));
            }
            at = memory.pointer(at)?;
        }
        Ok(None)
    }

    /// Where the ids are and what they are.
    fn uid(
        &self,
        memory: &GuestMemory<'_>,
        task: GuestVa,
    ) -> Result<(GuestVa, (u32, u32)), ReadError> {
        let cred = memory.pointer(task.offset(self.layout.task_real_cred))?;
        let real = memory.u32(cred.offset(self.layout.cred_uid))?;
        let effective = memory.u32(cred.offset(self.layout.cred_euid))?;
        Ok((cred, (real, effective)))
    }

    /// The executable's file, directory entry and path, read twice: a rename under way must not make a path that never was.
    fn exe(
        &self,
        memory: &GuestMemory<'_>,
        mm: GuestVa,
    ) -> Option<((GuestVa, GuestVa), path::Walked)> {
        let layout = &self.layout;
        let read = || {
            let file = memory.pointer(mm.offset(layout.mm_exe_file)).ok()?;
            if file == GuestVa(0) {
                return None;
            }
            let path = file.offset(layout.file_f_path);
            let dentry = memory.pointer(path.offset(layout.path_dentry)).ok()?;
            Some(((file, dentry), path::walk(memory, layout, path).ok()?))
        };
        let first = read()?;
        (read()? == first).then_some(first)
    }
}
