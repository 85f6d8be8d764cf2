//! Writes the log.

use super::record::{Body, Record, SCHEMA};
use crate::exit::{Exit, Exits};
use crate::views::digest::sha256;
use crate::xen::{DomId, Domain};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Where logs are.
const LOG: &str = "/var/log/penumbra";
/// No line is longer; read from the end to find the last.
const LONGEST_LINE: u64 = 64 << 10;

/// The log cannot be opened or written.
#[derive(Debug, Error)]
#[error("{path}: the audit log cannot be written: {source}")]
pub struct AuditError {
    /// The file.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

impl Exits for AuditError {
    fn exit(&self) -> Exit {
        Exit::Cannot
    }
}

/// The directory of all logs; the environment variable `PENUMBRA_LOG` names another.
pub fn log_dir() -> PathBuf {
    std::env::var_os("PENUMBRA_LOG").map_or_else(|| PathBuf::from(LOG), PathBuf::from)
}

/// The log of one domain, open for writing by the holder of its journal.
#[derive(Debug)]
pub struct Audit {
    path: PathBuf,
    file: File,
    domain: DomId,
    name: String,
    seq: u64,
    prev: String,
    missed: u64,
}

impl Audit {
    /// Opens the log of `domain`, called `name`, in `dir`, and goes on where it ends.
    pub fn open(dir: &Path, domain: &Domain, name: &str) -> Result<Audit, AuditError> {
        let path = path_of(dir, &domain.uuid);
        let open = || {
            fs::create_dir_all(dir)?;
            let mut file = OpenOptions::new()
                .create(true)
                .read(true)
                .append(true)
                .open(&path)?;
            let last = last_line(&mut file)?;
            Ok((file, last))
        };
        let (file, last) = open().map_err(|source| AuditError {
            path: path.clone(),
            source,
        })?;
        let (seq, prev) = match &last {
            None => (0, "0".repeat(64)),
            Some(line) => {
                let seq = serde_json::from_slice::<Record>(line).map_or(0, |record| record.seq + 1);
                (seq, sha256(line))
            }
        };
        Ok(Audit {
            path,
            file,
            domain: domain.id,
            name: name.to_owned(),
            seq,
            prev,
            missed: 0,
        })
    }

    /// Writes one line, whole or not at all. What cannot be written is counted in the next line that can.
    pub fn write(&mut self, body: Body) -> Result<(), AuditError> {
        let record = Record {
            schema: SCHEMA.to_owned(),
            seq: self.seq,
            time: jiff::Timestamp::now().to_string(),
            domain: self.domain,
            name: self.name.clone(),
            body,
            missed: self.missed,
            prev: self.prev.clone(),
        };
        match self.append(&record) {
            Ok(digest) => {
                self.seq += 1;
                self.prev = digest;
                self.missed = 0;
                Ok(())
            }
            Err(source) => {
                self.missed += 1;
                Err(AuditError {
                    path: self.path.clone(),
                    source,
                })
            }
        }
    }

    fn append(&mut self, record: &Record) -> io::Result<String> {
        let mut line = serde_json::to_vec(record)?;
        let digest = sha256(&line);
        line.push(b'\n');
        let before = self.file.metadata()?.len();
        match self.file.write_all(&line) {
            Ok(()) => Ok(digest),
            Err(error) => {
                // Half a line would break the chain for good; if this fails too the next reader says where.
                let _ = self.file.set_len(before);
                Err(error)
            }
        }
    }
}

/// The log of the domain with this UUID.
pub fn path_of(dir: &Path, uuid: &str) -> PathBuf {
    dir.join(format!("{uuid}.jsonl"))
}

/// The last line without its newline. One that was cut off (the machine stopped) is ended first, so that the next stands
/// alone.
fn last_line(file: &mut File) -> io::Result<Option<Vec<u8>>> {
    let length = file.metadata()?.len();
    if length == 0 {
        return Ok(None);
    }
    file.seek(SeekFrom::Start(length.saturating_sub(LONGEST_LINE)))?;
    let mut tail = Vec::new();
    file.take(LONGEST_LINE).read_to_end(&mut tail)?;
    if tail.last() == Some(&b'\n') {
        tail.pop();
    } else {
        file.write_all(b"\n")?;
    }
    let start = tail
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    Ok(Some(tail.split_off(start)))
}

#[cfg(test)]
mod tests {
    use super::super::read::{Entry, Fault, Reader};
    use super::{Audit, path_of};
    use crate::audit::{Body, Subject};
    use crate::xen::{DomId, Domain, Life, Root};
    use std::fs;
    use std::path::Path;

    fn domain() -> Domain {
        Domain {
            id: DomId(3),
            uuid: "ab".repeat(16),
            max_vcpu: 1,
            pages: 1,
            max_pages: 1,
            address_bits: 40,
            hvm: true,
            hap: true,
            life: Life::Runs,
        }
    }

    fn lapsed(witness: u64) -> Body {
        Body::Lapsed {
            root: Root(0x1000),
            witness,
            process: Subject::default(),
        }
    }

    fn entries(dir: &Path) -> Vec<Entry> {
        Reader::open(dir, &domain().uuid)
            .unwrap()
            .new_entries()
            .unwrap()
    }

    fn faults(dir: &Path) -> Vec<(usize, Fault)> {
        let all = entries(dir);
        let faulty = all.into_iter().enumerate();
        faulty
            .filter_map(|(index, entry)| Some((index, entry.fault?)))
            .collect()
    }

    #[test]
    fn lines_are_chained_over_openings() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..3 {
            let mut audit = Audit::open(dir.path(), &domain(), "web1").unwrap();
            audit.write(lapsed(round)).unwrap();
            audit.write(lapsed(100 + round)).unwrap();
        }
        let all = entries(dir.path());
        let seqs: Vec<u64> = all
            .iter()
            .map(|entry| entry.record.as_ref().unwrap().seq)
            .collect();
        assert_eq!(seqs, [0, 1, 2, 3, 4, 5]);
        assert!(all.iter().all(|entry| entry.fault.is_none()));
        assert_eq!(all[5].record.as_ref().unwrap().body, lapsed(102));
    }

    #[test]
    fn a_changed_a_dropped_and_a_cut_line_show() {
        let dir = tempfile::tempdir().unwrap();
        let path = path_of(dir.path(), &domain().uuid);
        let mut audit = Audit::open(dir.path(), &domain(), "web1").unwrap();
        for witness in 0..4 {
            audit.write(lapsed(witness)).unwrap();
        }
        let good = fs::read_to_string(&path).unwrap();
        fs::write(&path, good.replacen("\"witness\":1", "\"witness\":7", 1)).unwrap();
        assert_eq!(faults(dir.path()), [(2, Fault::Chain)]);

        let lines: Vec<&str> = good.lines().collect();
        fs::write(&path, [lines[0], lines[1], lines[3], ""].join("\n")).unwrap();
        assert_eq!(faults(dir.path()), [(2, Fault::Chain)]);

        fs::write(&path, &good[..good.len() - 20]).unwrap();
        let mut audit = Audit::open(dir.path(), &domain(), "web1").unwrap();
        audit.write(lapsed(9)).unwrap();
        let found = faults(dir.path());
        assert_eq!(found, [(3, Fault::Malformed)]);
        assert_eq!(entries(dir.path()).len(), 5);
    }

    #[test]
    fn what_cannot_be_written_is_counted() {
        // /dev/full refuses every write with ENOSPC, as a full disk does.
        let dir = tempfile::tempdir().unwrap();
        let mut audit = Audit::open(dir.path(), &domain(), "web1").unwrap();
        let good = std::mem::replace(
            &mut audit.file,
            fs::OpenOptions::new()
                .write(true)
                .open("/dev/full")
                .unwrap(),
        );
        let error = audit.write(lapsed(0)).unwrap_err();
        assert!(error.to_string().contains("cannot be written"), "{error}");
        audit.write(lapsed(1)).unwrap_err();
        audit.file = good;
        audit.write(lapsed(2)).unwrap();
        let all = entries(dir.path());
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].record.as_ref().unwrap().missed, 2);
        assert!(all[0].fault.is_none());
    }
}
