//! What the watcher does with the log: Xen's records and the watcher's own changes go in, in the order in which they are found.

use super::decode::Decoder;
use super::log::{Audit, AuditError};
use super::record::Body;
use crate::guest::ProcessList;
use crate::views::State;
use crate::watch::Change;
use crate::xen::Events;

/// The log, and what it takes to write Xen's records into it.
pub struct Trail<'a> {
    audit: Audit,
    decoder: Decoder<'a>,
    lost: u64,
    unsaid: Option<AuditError>,
}

impl<'a> Trail<'a> {
    /// Writes to `audit` what `decoder` makes of Xen's records.
    pub fn new(audit: Audit, decoder: Decoder<'a>) -> Trail<'a> {
        Trail {
            audit,
            decoder,
            lost: 0,
            unsaid: None,
        }
    }

    /// Writes one record. A log that cannot be written does not stop the watching: the guest would only lose by it. The
    /// error is kept for [`Trail::trouble`], the records are counted.
    pub fn write(&mut self, body: Body) {
        if let Err(error) = self.audit.write(body) {
            self.unsaid = Some(error);
        }
    }

    /// The last error since the last call.
    pub fn trouble(&mut self) -> Option<AuditError> {
        self.unsaid.take()
    }

    /// What a pass changed.
    pub fn changes(&mut self, bound: &[Change], unbound: &[Change]) {
        for change in unbound {
            self.write(Body::Unbound(change.clone()));
        }
        for change in bound {
            self.write(Body::Bound(change.clone()));
        }
    }

    /// Writes what Xen told; gives back what somebody at a terminal should see. `list` is the guest's processes as they were
    /// read in the same pass.
    pub fn events(&mut self, state: &State, events: &Events, list: &ProcessList) -> Vec<Body> {
        let mut seen = Vec::new();
        if events.lost > self.lost {
            self.write(Body::Overflow {
                records: events.lost - self.lost,
            });
        }
        // The count starts again when Xen is armed again.
        self.lost = events.lost;
        for event in &events.records {
            let body = self.decoder.decode(event, &state.view_name(event.view));
            if !matches!(body, Body::Lapsed { .. }) {
                seen.push(body.clone());
            }
            self.write(body);
        }
        // Only now: whoever was stopped may be gone from this list, and its root another's.
        self.decoder.learn(list);
        seen
    }
}
