//! Pins: roots that a storm has for itself, so that the watcher leaves their bindings alone.
//!
//! `pins/ROOT` holds the storm's process id and start time. A pin whose process is gone is none.

use crate::xen::Root;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A root that is ours until this is dropped.
#[derive(Debug)]
pub struct Pin(PathBuf);

impl Pin {
    /// Pins `root` in the journal's directory; fails when somebody else has it.
    pub fn new(journal_dir: &Path, root: Root) -> io::Result<Pin> {
        let dir = journal_dir.join("pins");
        fs::create_dir_all(&dir)?;
        let path = dir.join(root.to_string());
        if is_pinned(journal_dir, root) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "another storm has this process",
            ));
        }
        let id = std::process::id();
        let start = start_time(id)
            .ok_or_else(|| io::Error::other("/proc does not show this process; is it mounted?"))?;
        // Whole or not at all: the watcher reads it at any moment.
        let new = dir.join(format!(".{root}.{id}"));
        fs::write(&new, format!("{id} {start}\n"))?;
        fs::rename(&new, &path)?;
        Ok(Pin(path))
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // A pin that stays is none once this process is gone.
        let _ = fs::remove_file(&self.0);
    }
}

/// Whether a live process has pinned `root`.
pub fn is_pinned(journal_dir: &Path, root: Root) -> bool {
    let path = journal_dir.join("pins").join(root.to_string());
    let Ok(text) = fs::read_to_string(path) else {
        return false;
    };
    let mut words = text.split_whitespace();
    match (words.next().and_then(|id| id.parse().ok()), words.next()) {
        (Some(id), Some(start)) => start_time(id).as_deref() == Some(start),
        _ => false,
    }
}

/// When a process started, in clock ticks: field 22 of `/proc/ID/stat` (proc(5)), counted behind the name in brackets.
fn start_time(id: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::{Pin, is_pinned};
    use crate::xen::Root;
    use std::fs;

    #[test]
    fn a_pin_holds_while_its_process_lives() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root(0x1234_5000);
        assert!(!is_pinned(dir.path(), root));
        let pin = Pin::new(dir.path(), root).unwrap();
        assert!(is_pinned(dir.path(), root));
        assert!(!is_pinned(dir.path(), Root(0x1000)));
        assert!(Pin::new(dir.path(), root).is_err());
        drop(pin);
        assert!(!is_pinned(dir.path(), root));
    }

    #[test]
    fn a_pin_of_a_dead_or_another_process_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root(0x1000);
        fs::create_dir(dir.path().join("pins")).unwrap();
        let path = dir.path().join("pins").join(root.to_string());
        // Our own id with another start time: the id was used again.
        fs::write(&path, format!("{} 1\n", std::process::id())).unwrap();
        assert!(!is_pinned(dir.path(), root));
        fs::write(&path, "garbage").unwrap();
        assert!(!is_pinned(dir.path(), root));
        assert!(Pin::new(dir.path(), root).is_ok());
    }
}
