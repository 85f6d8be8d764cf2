//! What a line of the log says.

use crate::views::modules::News;
use crate::watch::Change;
use crate::xen::{DomId, Gfn, GuestPa, GuestVa, Root};
use serde::{Deserialize, Serialize};

/// The schema of every line.
pub const SCHEMA: &str = "penumbra.audit/v1";

/// One line.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// [`SCHEMA`].
    pub schema: String,
    /// Counts the log's lines from 0.
    pub seq: u64,
    /// When it was written: RFC 3339, UTC.
    pub time: String,
    /// The domain's number at that time.
    pub domain: DomId,
    /// Its name.
    pub name: String,
    /// What happened.
    #[serde(flatten)]
    pub body: Body,
    /// Records before this one that could not be written (no space, no permission).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub missed: u64,
    /// SHA-256 of the line before, without its newline; zeros in the first.
    pub prev: String,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// The process that a violation or a binding is about.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Subject {
    /// Process id (of the thread group); 0 if unknown.
    pub pid: u32,
    /// Thread id, where one thread is meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tid: Option<u32>,
    /// The name it gives itself.
    pub comm: String,
    /// Its executable, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exe: Option<String>,
}

/// What happened.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Body {
    /// The views were enabled, or taken over from a watcher that ended.
    Applied {
        /// `uname -r` of the guest.
        release: String,
        /// Its build-id.
        build_id: String,
        /// SHA-256 of the bundle's manifest.
        bundle: String,
        /// SHA-256 of the policy.
        policy: String,
        /// The default view.
        default: String,
        /// The views that there are.
        views: Vec<String>,
        /// An earlier watcher's views were found whole.
        taken_over: bool,
    },
    /// A process was bound to a view.
    Bound(Change),
    /// A process lost its view and runs on the default.
    Unbound(Change),
    /// Xen dropped a binding because its process was no longer what it was bound as.
    Lapsed {
        /// The page-table root.
        root: Root,
        /// Which witness failed, from 0.
        witness: u64,
        /// Who had it when the guest was last looked at.
        process: Subject,
    },
    /// A check in hardened text failed.
    Violation {
        /// What the guest does next: `kill`, `log` or `panic`.
        action: String,
        /// The pass whose check it was.
        pass: String,
        /// The slot that led to the check; a jump leaves no trace of where it was.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        site: Option<super::Site>,
        /// Where the guest was about to go.
        value: GuestVa,
        /// What lies there.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        target: Option<super::Site>,
        /// The word on top of the stack, if it is a place in the kernel: the caller, for what was jumped to.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        caller: Option<super::Site>,
        /// Who ran.
        process: Subject,
        /// The view it ran on.
        view: String,
        /// The vCPU.
        vcpu: u16,
        /// Its page-table root.
        root: Root,
        /// Xen's clock, nanoseconds since it started.
        xen_time: u64,
    },
    /// A task called a function that is probed (pass `probe`).
    Entered {
        /// The function.
        function: super::Site,
        /// The edited call; a jump leaves no trace of where it was.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        site: Option<super::Site>,
        /// Who ran.
        process: Subject,
        /// The view it ran on.
        view: String,
        /// The vCPU.
        vcpu: u16,
        /// Its page-table root.
        root: Root,
        /// Xen's clock, nanoseconds since it started.
        xen_time: u64,
    },
    /// A trap from an address that the bundle does not know: kernel code of the guest's own.
    UnknownTrap {
        /// Where.
        rip: GuestVa,
        /// The vCPU.
        vcpu: u16,
    },
    /// The guest tried to write to its text other than by its poking address space; the write was refused.
    Refused {
        /// Where it wrote.
        address: GuestPa,
        /// The instruction that wrote.
        rip: GuestVa,
        /// What lies there.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        writer: Option<super::Site>,
        /// The view it ran on.
        view: String,
        /// The vCPU.
        vcpu: u16,
    },
    /// A view lost a page.
    Lost {
        /// The frame.
        gfn: Gfn,
    },
    /// A module's text was mapped in the views.
    Mapped {
        /// Its name.
        module: String,
        /// Its build-id.
        build_id: String,
        /// Its `struct module`.
        at: GuestVa,
        /// Pages in all views.
        pages: usize,
    },
    /// A module stays on its own text.
    Stays {
        /// Its name, as the guest has it.
        module: String,
        /// Its `struct module`.
        at: GuestVa,
        /// Why.
        why: String,
    },
    /// The guest frees a module; it is in no view any more.
    Unmapped {
        /// Its `struct module`.
        at: GuestVa,
    },
    /// Xen had more to say than it could keep.
    Overflow {
        /// How many records it dropped.
        records: u64,
    },
    /// Everything was taken out.
    Removed {
        /// Views.
        views: usize,
        /// Frames given back.
        frames: u64,
    },
    /// The watcher was asked to end; every process runs on the default view.
    Stopped {
        /// Bindings dropped.
        dropped: usize,
    },
    /// The domain ended, and the views with it; or it runs another kernel, and the views were taken out.
    Ended {
        /// How.
        how: String,
    },
}

impl From<News> for Body {
    fn from(news: News) -> Body {
        match news {
            News::Mapped {
                module,
                name,
                build_id,
                pages,
            } => Body::Mapped {
                module: name,
                build_id,
                at: module,
                pages,
            },
            News::Stays { module, name, why } => Body::Stays {
                module: name,
                at: module,
                why,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Body, Record, SCHEMA, Subject};
    use crate::watch::Change;
    use crate::xen::{DomId, Gfn, GuestPa, GuestVa, Root};

    fn bodies() -> Vec<Body> {
        let change = Change {
            root: Root(0x1000),
            view: "fast".to_owned(),
            pid: 1,
            comm: "a".to_owned(),
            exe: Some("/a".to_owned()),
            rule: None,
        };
        vec![
            Body::Applied {
                release: "6.1".to_owned(),
                build_id: "ab".to_owned(),
                bundle: "cd".to_owned(),
                policy: "ef".to_owned(),
                default: "hardened".to_owned(),
                views: vec!["stock".to_owned()],
                taken_over: false,
            },
            Body::Bound(change.clone()),
            Body::Unbound(change),
            Body::Lapsed {
                root: Root(1),
                witness: 2,
                process: Subject::default(),
            },
            Body::Violation {
                action: "kill".to_owned(),
                pass: "return-cfi".to_owned(),
                site: None,
                value: GuestVa(3),
                target: None,
                caller: None,
                process: Subject::default(),
                view: "hardened".to_owned(),
                vcpu: 1,
                root: Root(0x1000),
                xen_time: 7,
            },
            Body::Entered {
                function: super::super::Site {
                    address: GuestVa(3),
                    symbol: "vfs_read".to_owned(),
                },
                site: None,
                process: Subject::default(),
                view: "hardened".to_owned(),
                vcpu: 1,
                root: Root(0x1000),
                xen_time: 7,
            },
            Body::UnknownTrap {
                rip: GuestVa(4),
                vcpu: 0,
            },
            Body::Refused {
                address: GuestPa(5),
                rip: GuestVa(6),
                writer: None,
                view: "stock".to_owned(),
                vcpu: 0,
            },
            Body::Lost { gfn: Gfn(7) },
            Body::Mapped {
                module: "overlay".to_owned(),
                build_id: "ab".to_owned(),
                at: GuestVa(8),
                pages: 9,
            },
            Body::Stays {
                module: "bug".to_owned(),
                at: GuestVa(8),
                why: "unknown".to_owned(),
            },
            Body::Unmapped { at: GuestVa(8) },
            Body::Overflow { records: 1 },
            Body::Removed {
                views: 3,
                frames: 4,
            },
            Body::Stopped { dropped: 2 },
            Body::Ended {
                how: "crashed".to_owned(),
            },
        ]
    }

    #[test]
    fn every_kind_of_record_reads_back_as_it_was_written() {
        for body in bodies() {
            let record = Record {
                schema: SCHEMA.to_owned(),
                seq: 1,
                time: "2026-01-01T00:00:00Z".to_owned(),
                domain: DomId(1),
                name: "web1".to_owned(),
                body,
                missed: 0,
                prev: String::new(),
            };
            let line = serde_json::to_string(&record).unwrap();
            let back: Record =
                serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
            assert_eq!(back, record);
        }
    }
}
