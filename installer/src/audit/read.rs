//! Reads the log, checking the chain.

use super::log::path_of;
use super::record::{Record, SCHEMA};
use crate::views::digest::sha256;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::path::Path;

/// What is wrong with a line.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// It is no record of this schema: cut off, or not ours.
    Malformed,
    /// It does not follow the line before it: something was changed, dropped or put in.
    Chain,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Fault::Malformed => "this line is no record: it was cut off or is not the installer's",
            Fault::Chain => {
                "this line does not follow the one before it: lines were changed, dropped or put in"
            }
        })
    }
}

/// One line as it was found.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its number in the file, from 1.
    pub line: u64,
    /// The line itself.
    pub text: String,
    /// What it says, if it says something.
    pub record: Option<Record>,
    /// What is wrong with it.
    pub fault: Option<Fault>,
}

/// A log being read, from its start and on as it grows.
#[derive(Debug)]
pub struct Reader {
    file: BufReader<File>,
    line: u64,
    prev: Option<String>,
    part: Vec<u8>,
}

impl Reader {
    /// Opens the log of the domain with this UUID.
    pub fn open(dir: &Path, uuid: &str) -> io::Result<Reader> {
        Ok(Reader {
            file: BufReader::new(File::open(path_of(dir, uuid))?),
            line: 0,
            prev: None,
            part: Vec::new(),
        })
    }

    /// Whole lines that came since the last call.
    pub fn new_entries(&mut self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        loop {
            self.file.read_until(b'\n', &mut self.part)?;
            // A line under way is kept until its end is there.
            if self.part.pop_if(|last| *last == b'\n').is_none() {
                return Ok(entries);
            }
            let line = std::mem::take(&mut self.part);
            entries.push(self.entry(&line));
        }
    }

    fn entry(&mut self, line: &[u8]) -> Entry {
        self.line += 1;
        let record: Option<Record> = serde_json::from_slice(line)
            .ok()
            .filter(|record: &Record| record.schema == SCHEMA);
        let first = "0".repeat(64);
        let expected = self.prev.as_ref().unwrap_or(&first);
        let fault = match &record {
            None => Some(Fault::Malformed),
            Some(record) if record.prev != *expected => Some(Fault::Chain),
            Some(_) => None,
        };
        self.prev = Some(sha256(line));
        Entry {
            line: self.line,
            text: String::from_utf8_lossy(line).into_owned(),
            record,
            fault,
        }
    }
}
