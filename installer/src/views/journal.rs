//! The journal: what was done to a domain, written before it is done.
//!
//! `/run/penumbra/DOMID/state.json`, beside `lock` (held while something changes the domain), `stop` (asks the watcher to
//! end), `policy.toml` (for `ps`) and `pins/`. /run does not outlive dom0, and neither do its guests.

use crate::exit::{Exit, Exits};
use crate::guest::processes::Reader;
use crate::xen::{DomId, Domain, Gfn, GuestVa, Root, ViewId};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Where journals are, unless `PENUMBRA_RUN` says otherwise.
const RUN: &str = "/run/penumbra";
/// The only schema that this version reads and writes.
const SCHEMA: &str = "penumbra.state/v3";
/// The verified policy's copy beside the journal, for `ps`.
pub const POLICY_COPY: &str = "policy.toml";

/// A failed journal operation.
#[derive(Debug, Error)]
pub enum JournalError {
    /// The file system said no.
    #[error("{path}: {source}; the journal must be writable before a guest is touched")]
    Io {
        /// What was being used.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file does not decode.
    #[error("{path}: {detail}; `installer remove` cleans what Xen itself knows of")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// Another installer works on the domain.
    #[error(
        "another installer works on this domain{0}; wait for it, or stop it with `installer remove`"
    )]
    Busy(String),
    /// There is none.
    #[error("nothing is applied to this domain; `installer apply` does it")]
    NotApplied,
}

impl Exits for JournalError {
    fn exit(&self) -> Exit {
        match self {
            JournalError::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Exit::NoXen
            }
            _ => Exit::Cannot,
        }
    }
}

/// How far an apply got. Each value is written before its step is taken.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// altp2m is being turned on.
    Start,
    /// CR3 writes are being intercepted.
    Arm,
    /// The cave is being written.
    Cave,
    /// Frames for the copies are being added.
    Copies,
    /// Views are being made and mapped.
    Views,
    /// The default view is being set.
    Enable,
    /// All is in place.
    Applied,
    /// All is being taken out.
    Remove,
}

/// One view.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ViewState {
    /// The variant's name.
    pub name: String,
    /// Xen's number, once known.
    pub view: Option<ViewId>,
    /// Leaves out a speculation mitigation.
    pub drops_mitigation: bool,
    /// Text pages that it has a copy of, ascending.
    pub pages: Vec<u32>,
    /// The copy of the first of them; the others follow.
    pub first_copy: Gfn,
}

/// The frames added for copies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Copies {
    /// The first.
    pub first: Gfn,
    /// How many.
    pub count: u64,
    /// Pages that the domain may have without them.
    pub max_pages_before: u64,
}

impl Copies {
    /// Pages that the domain may have with them. Any other limit has been set by somebody who does not know of them.
    pub fn max_pages(&self) -> u64 {
        self.max_pages_before.saturating_add(self.count)
    }
}

/// One module in the views.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ModuleState {
    /// Its `struct module`: the key under which Xen drops it.
    pub module: GuestVa,
    /// Its name in the bundle.
    pub name: String,
    /// Where its text starts.
    pub base: GuestVa,
    /// For each view, in the state's order: its page of the text, the guest's frame there, the copy if the view has one.
    pub views: Vec<Vec<(u32, Gfn, Option<Gfn>)>>,
}

/// The cave in the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CaveState {
    /// Where, in the guest.
    pub start: GuestVa,
    /// How many bytes are in use.
    pub len: u64,
    /// What was there.
    pub filler: u8,
}

/// What `state.json` holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct State {
    /// [`SCHEMA`].
    pub schema: String,
    /// The domain.
    pub domain: DomId,
    /// Its UUID: another domain of the same id is not this one.
    pub uuid: String,
    /// Its name when it was applied.
    pub name: String,
    /// How far.
    pub step: Step,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// SHA-256 of its manifest, which names every other digest.
    pub manifest_sha256: String,
    /// The policy's file.
    pub policy: PathBuf,
    /// The kernel's release.
    pub release: String,
    /// The kernel's build-id.
    pub build_id: String,
    /// How to read the guest.
    pub reader: Reader,
    /// The poking address space's root.
    pub poking_root: Root,
    /// The default view's name.
    pub default: String,
    /// stock and every other view.
    pub views: Vec<ViewState>,
    /// Frames added.
    pub copies: Option<Copies>,
    /// The cave, from when it is being written.
    pub cave: Option<CaveState>,
    /// Frames among the copies that are kept for modules.
    #[serde(default)]
    pub spare: Option<(Gfn, u64)>,
    /// Modules whose text has views.
    #[serde(default)]
    pub modules: Vec<ModuleState>,
    /// Process id of the installer that watches, 0 if none does.
    pub watcher: u32,
}

impl State {
    /// A state in which nothing was done.
    pub fn new(domain: &Domain, name: &str, reader: Reader) -> State {
        State {
            schema: SCHEMA.to_owned(),
            domain: domain.id,
            uuid: domain.uuid.clone(),
            name: name.to_owned(),
            step: Step::Start,
            bundle: PathBuf::new(),
            manifest_sha256: String::new(),
            policy: PathBuf::new(),
            release: String::new(),
            build_id: String::new(),
            reader,
            poking_root: Root(0),
            default: String::new(),
            views: Vec::new(),
            copies: None,
            cave: None,
            spare: None,
            modules: Vec::new(),
            watcher: 0,
        }
    }

    /// Whether all is out of the guest but the hook code, which something may still run in.
    pub fn is_cave_only(&self) -> bool {
        self.step == Step::Remove && self.views.is_empty() && self.cave.is_some()
    }

    /// Xen's number of the view called `name`.
    pub fn view(&self, name: &str) -> Option<ViewId> {
        let view = self.views.iter().find(|view| view.name == name)?;
        view.view
    }

    /// The name of a view.
    pub fn view_name(&self, id: ViewId) -> String {
        self.views
            .iter()
            .find(|view| view.view == Some(id))
            .map_or_else(|| format!("view {id}"), |view| view.name.clone())
    }
}

/// The journal of one domain.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    /// Held for the journal's life by whoever changes the domain.
    lock: Option<File>,
}

/// The directory of all journals.
pub fn run_dir() -> PathBuf {
    std::env::var_os("PENUMBRA_RUN").map_or_else(|| PathBuf::from(RUN), PathBuf::from)
}

impl Journal {
    /// The journal of `domain` under `run`, for reading.
    pub fn reader(run: &Path, domain: DomId) -> Journal {
        Journal {
            dir: run.join(domain.to_string()),
            lock: None,
        }
    }

    /// The same, for changing the domain; fails when somebody else holds it.
    pub fn writer(run: &Path, domain: DomId) -> Result<Journal, JournalError> {
        let mut journal = Journal::reader(run, domain);
        fs::create_dir_all(&journal.dir).map_err(|source| journal.io("", source))?;
        let path = journal.dir.join("lock");
        let lock = File::create(&path).map_err(|source| journal.io("lock", source))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                journal.lock = Some(lock);
                Ok(journal)
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let watcher = journal
                    .load()
                    .ok()
                    .flatten()
                    .map_or(0, |state| state.watcher);
                Err(JournalError::Busy(if watcher == 0 {
                    String::new()
                } else {
                    format!(" (process {watcher} watches it)")
                }))
            }
            Err(error) => Err(journal.io("lock", error.into())),
        }
    }

    fn io(&self, name: &str, source: io::Error) -> JournalError {
        JournalError::Io {
            path: self.dir.join(name),
            source,
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it holds; `None` when nothing was done.
    pub fn load(&self) -> Result<Option<State>, JournalError> {
        let path = self.dir.join("state.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.io("state.json", error)),
        };
        let malformed = |detail: String| JournalError::Malformed {
            path: path.clone(),
            detail,
        };
        let state: State =
            serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
        if state.schema != SCHEMA {
            return Err(malformed(format!(
                "schema `{}`, this version reads `{SCHEMA}`",
                state.schema.escape_default()
            )));
        }
        Ok(Some(state))
    }

    /// Writes it: whole or not at all, and on disk before this returns.
    pub fn save(&self, state: &State) -> Result<(), JournalError> {
        assert!(self.lock.is_some(), "only the holder of the lock writes");
        let new = self.dir.join("state.json.new");
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec(state)?)?;
            file.sync_all()?;
            fs::rename(&new, self.dir.join("state.json"))?;
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(|source| self.io("state.json", source))
    }

    /// Drops it with all that lies beside it. The lock's file stays: two holders of one name must hold one file.
    pub fn erase(&self) -> Result<(), JournalError> {
        // The journal itself last: what is half erased is still known.
        self.erase_beside()?;
        self.drop_file("state.json")
    }

    /// Drops what only those need who watch.
    pub fn erase_beside(&self) -> Result<(), JournalError> {
        match fs::remove_dir_all(self.dir.join("pins")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(self.io("pins", error));
            }
            _ => {}
        }
        self.drop_file("stop")?;
        self.drop_file(POLICY_COPY)
    }

    fn drop_file(&self, name: &str) -> Result<(), JournalError> {
        match fs::remove_file(self.dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.io(name, error)),
            _ => Ok(()),
        }
    }

    /// Asks the watcher to stop.
    pub fn ask_to_stop(&self) -> Result<(), JournalError> {
        fs::write(self.dir.join("stop"), b"").map_err(|source| self.io("stop", source))
    }

    /// Whether somebody asked.
    pub fn asked_to_stop(&self) -> bool {
        self.dir.join("stop").exists()
    }

    /// Forgets that somebody asked: by the one who obeyed or came after.
    pub fn clear_stop(&self) -> Result<(), JournalError> {
        self.drop_file("stop")
    }
}

#[cfg(test)]
mod tests {
    use super::{Journal, JournalError, Step};
    use crate::views::{apply, testkit};
    use crate::xen::DomId;
    use std::fs;

    #[test]
    fn one_writer_at_a_time_and_readers_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = testkit::bundle();
        let fake = testkit::guest(&bundle);
        let writer = testkit::journal(&dir);
        let mut state = apply(&fake, &writer, &testkit::request(&bundle))
            .unwrap()
            .state;
        state.watcher = 4711;
        writer.save(&state).unwrap();
        let busy = Journal::writer(dir.path(), DomId(1)).unwrap_err();
        assert!(matches!(busy, JournalError::Busy(_)));
        assert!(
            busy.to_string().contains("process 4711 watches it"),
            "{busy}"
        );
        // Another domain is another journal.
        assert!(Journal::writer(dir.path(), DomId(2)).is_ok());
        let reader = Journal::reader(dir.path(), DomId(1));
        assert_eq!(reader.load().unwrap().unwrap(), state);
        // How `remove` ends a watcher.
        assert!(!writer.asked_to_stop());
        reader.ask_to_stop().unwrap();
        assert!(writer.asked_to_stop());
        drop(writer);
        let next = Journal::writer(dir.path(), DomId(1)).unwrap();
        next.clear_stop().unwrap();
        assert!(!next.asked_to_stop());
        next.erase().unwrap();
        next.erase().unwrap();
        assert!(reader.load().unwrap().is_none());
    }

    #[test]
    fn a_damaged_or_foreign_journal_is_named_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let reader = Journal::reader(dir.path(), DomId(1));
        assert!(reader.load().unwrap().is_none());
        fs::create_dir(reader.dir()).unwrap();
        let path = reader.dir().join("state.json");
        for text in ["", "{", "{\"schema\":\"penumbra.state/v3\"}"] {
            fs::write(&path, text).unwrap();
            let error = reader.load().unwrap_err();
            assert!(error.to_string().contains("state.json"), "{error}");
        }
        let bundle = testkit::bundle();
        let journal = testkit::journal(&dir);
        let fake = testkit::guest(&bundle);
        let state = apply(&fake, &journal, &testkit::request(&bundle))
            .unwrap()
            .state;
        let text = serde_json::to_string(&state).unwrap();
        fs::write(&path, text.replace("state/v3", "state/v9")).unwrap();
        assert!(
            reader
                .load()
                .unwrap_err()
                .to_string()
                .contains("penumbra.state/v9")
        );
    }

    #[test]
    fn every_step_is_written_before_it_is_taken() {
        let bundle = testkit::bundle();
        let dir = tempfile::tempdir().unwrap();
        let fake = testkit::guest(&bundle);
        let reader = Journal::reader(dir.path(), DomId(1));
        // What the journal must say when Xen gets the call.
        *fake.hook.borrow_mut() = Some(Box::new(move |_, call| {
            let state = reader.load().unwrap().expect("the journal comes first");
            let word = call.split(' ').next().unwrap_or_default();
            let least = match word {
                "altp2m_set" => Step::Start,
                "Arm" => Step::Arm,
                "write" => Step::Cave,
                "set_max_pages" | "populate" | "Hide" => Step::Copies,
                "create_view" | "Protect" | "Remap" | "Flags" => Step::Views,
                "Enable" => Step::Enable,
                other => panic!("a call that this test does not know: {other}"),
            };
            assert!(state.step >= least, "{call} at step {:?}", state.step);
            assert_eq!(state.cave.is_some(), state.step >= Step::Cave, "{call}");
            assert_eq!(state.copies.is_some(), state.step >= Step::Copies, "{call}");
        }));
        apply(&fake, &testkit::journal(&dir), &testkit::request(&bundle)).unwrap();
    }
}
