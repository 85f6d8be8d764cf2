//! The audit log: what was applied, who was bound to what, what was stopped. One JSON object per line.
//!
//! Each line holds the SHA-256 of the line before it, so that a line that was changed, dropped or put in shows (it shows
//! to whoever has the last line's digest from elsewhere; root in dom0 can rewrite the whole file).
//! A log is one domain's, by UUID, over reboots: `/var/log/penumbra/UUID.jsonl`.

mod decode;
mod log;
mod read;
mod record;
mod trail;

pub use decode::{Decoder, Site};
pub use log::{Audit, AuditError, log_dir};
pub use read::{Entry, Fault, Reader};
pub use record::{Body, Record, SCHEMA, Subject};
pub use trail::Trail;
