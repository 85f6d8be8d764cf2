//! Turns Xen's records into the log's: addresses into symbols, traps into the checks that they belong to.

use super::record::{Body, Subject};
use crate::guest::kernel::Slide;
use crate::guest::{Process, ProcessList};
use crate::xen::{Event, EventKind, Gfn, GuestPa, GuestVa, Root};
use penumbra_bundle::{Bundle, LinkVa, Offending, TextOff, Trap};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// The pass whose traps say that a function was called, and nothing else.
const PROBE: &str = "probe";
/// Names that the guest gives itself are cut to this many bytes (`TASK_COMM_LEN`).
const COMM: usize = 16;
/// Roots whose last process is remembered after it has gone: a killed process is not in the list any more when its
/// violation is read.
const REMEMBERED: usize = 8192;

/// A place in the kernel's text.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Site {
    /// Its address.
    pub address: GuestVa,
    /// `symbol+0x12`.
    pub symbol: String,
}

/// Knows the bundle and who ran on which root.
pub struct Decoder<'a> {
    bundle: &'a Bundle,
    slide: Slide,
    who: HashMap<Root, Subject>,
    /// What a process ran when it was last looked at, and on which root: with another one it runs something else.
    executables: HashMap<u32, (Root, String)>,
}

impl<'a> Decoder<'a> {
    /// A decoder for a guest that runs the bundle's kernel.
    pub fn new(bundle: &'a Bundle, slide: Slide) -> Decoder<'a> {
        Decoder {
            bundle,
            slide,
            who: HashMap::new(),
            executables: HashMap::new(),
        }
    }

    /// Remembers who runs on which root.
    pub fn learn(&mut self, list: &ProcessList) {
        if self.who.len() > REMEMBERED {
            self.who.clear();
            self.executables.clear();
        }
        for process in &list.processes {
            let identity = &process.identity;
            self.who.insert(identity.root, subject(process));
            if let Some(exe) = &identity.exe {
                let known = (identity.root, exe.clone());
                self.executables.insert(identity.pid, known);
            }
        }
    }

    /// What the log says of one of Xen's records. `view` names the view.
    pub fn decode(&self, event: &Event, view: &str) -> Body {
        match event.kind {
            EventKind::Violation | EventKind::FatalViolation => self.violation(event, view),
            EventKind::Lapsed => Body::Lapsed {
                root: event.root,
                witness: event.addr,
                process: self.who.get(&event.root).cloned().unwrap_or_default(),
            },
            EventKind::Refused => Body::Refused {
                address: GuestPa(event.addr),
                rip: GuestVa(event.rip),
                writer: self.site(event.rip),
                view: view.to_owned(),
                vcpu: event.vcpu,
            },
            EventKind::Lost => Body::Lost {
                gfn: Gfn(event.addr),
            },
            EventKind::Dropped => Body::Unmapped {
                at: GuestVa(event.addr),
            },
            EventKind::Unknown(_) => Body::UnknownTrap {
                rip: GuestVa(event.rip),
                vcpu: event.vcpu,
            },
        }
    }

    fn violation(&self, event: &Event, view: &str) -> Body {
        let Some(trap) = self.trap(event.rip) else {
            return Body::UnknownTrap {
                rip: GuestVa(event.rip),
                vcpu: event.vcpu,
            };
        };
        let value = match trap.offending {
            Offending::Register(number) => event.gpr[usize::from(number & 15)],
            Offending::Stack(word) => event.stack.get(word as usize).copied().unwrap_or(0),
        };
        // The word on top is the slot's return address when the slot was a call; a jump left its caller's there.
        let top = event.stack[0];
        let site = self.called_from(top);
        if let (PROBE, Some(function)) = (trap.pass.as_str(), self.site(value)) {
            return Body::Entered {
                function,
                site,
                process: self.subject(event),
                view: view.to_owned(),
                vcpu: event.vcpu,
                root: event.root,
                xen_time: event.time,
            };
        }
        let caller = match trap.offending {
            Offending::Register(_) if site.is_none() => self.site(top),
            _ => None,
        };
        Body::Violation {
            action: trap.action.name().to_owned(),
            pass: trap.pass.clone(),
            site: match trap.offending {
                Offending::Register(_) => site,
                // A return leaves no trace of where it was.
                Offending::Stack(_) => None,
            },
            value: GuestVa(value),
            target: self.site(value),
            caller,
            process: self.subject(event),
            view: view.to_owned(),
            vcpu: event.vcpu,
            root: event.root,
            xen_time: event.time,
        }
    }

    fn trap(&self, rip: u64) -> Option<&Trap> {
        let at = LinkVa(rip.wrapping_sub(self.slide.0));
        self.bundle.manifest.cave.trap_at(at)
    }

    /// The edited call whose return address this is.
    fn called_from(&self, address: u64) -> Option<Site> {
        let after = self.offset(address)?;
        let is_call = |edit: &penumbra_bundle::Edit| {
            let end = edit.at.0 as usize + edit.bytes.len();
            end == after.0 as usize && edit.bytes.iter().rev().nth(4) == Some(&0xe8)
        };
        let slot = self.bundle.edits.iter().find_map(|edits| {
            let index = edits.0.partition_point(|edit| edit.at < after);
            edits.0[..index].last().filter(|edit| is_call(edit))
        })?;
        let length = u64::from(after.0 - slot.at.0);
        self.site(address.wrapping_sub(length))
    }

    fn offset(&self, address: u64) -> Option<TextOff> {
        let text = self.bundle.manifest.text.range();
        let at = LinkVa(address.wrapping_sub(self.slide.0));
        if !text.contains(at) {
            return None;
        }
        u32::try_from(at.0 - text.start.0).ok().map(TextOff)
    }

    fn site(&self, address: u64) -> Option<Site> {
        let offset = self.offset(address)?;
        let (name, inside) = self.bundle.symbols.lookup(offset)?;
        Some(Site {
            address: GuestVa(address),
            symbol: if inside == 0 {
                name.to_owned()
            } else {
                format!("{name}+{inside:#x}")
            },
        })
    }

    /// Who it was: what Xen read from the guest at that moment, else who ran on that root when it was last looked at.
    fn subject(&self, event: &Event) -> Subject {
        if event.pid == 0 && event.tgid == 0 {
            return self.who.get(&event.root).cloned().unwrap_or_default();
        }
        let comm = event.comm.split(|byte| *byte == 0).next();
        let comm = printable(&String::from_utf8_lossy(comm.unwrap_or_default()));
        let known = self.executables.get(&event.tgid);
        let same = known.filter(|(root, _)| *root == event.root);
        Subject {
            pid: event.tgid,
            tid: Some(event.pid),
            exe: same.map(|(_, exe)| exe.clone()),
            comm,
        }
    }
}

fn subject(process: &Process) -> Subject {
    Subject {
        pid: process.identity.pid,
        tid: None,
        comm: printable(&process.comm),
        exe: process.identity.exe.clone(),
    }
}

/// A name of the guest's choosing, fit for a terminal.
fn printable(name: &str) -> String {
    name.chars()
        .take(COMM)
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Decoder, Site, Subject};
    use crate::audit::Body;
    use crate::guest::kernel::Slide;
    use crate::guest::processes::{Anchors, Identity, Process, ProcessList};
    use crate::views::testkit;
    use crate::xen::{Event, EventKind, GuestVa, Root};
    use penumbra_bundle::{
        Bundle, LinkVa, Offending, Symbol, Symbols, TextOff, Trap, ViolationAction,
    };

    const SLIDE: u64 = 0x20_0000;

    fn bundle() -> Bundle {
        let mut bundle = testkit::bundle();
        let start = bundle.manifest.text.start.0;
        bundle.symbols = Symbols(
            [(0, "first"), (0x1000, "second"), (0x2000, "cave")]
                .map(|(at, name)| Symbol {
                    at: TextOff(at),
                    name: name.to_owned(),
                })
                .to_vec(),
        );
        let trap = |at: u64, pass: &str, offending, action| Trap {
            at: LinkVa(start + at),
            pass: pass.to_owned(),
            offending,
            action,
        };
        bundle.manifest.cave.traps = vec![
            trap(
                0x2030,
                "forward-cfi",
                Offending::Register(3),
                ViolationAction::Kill,
            ),
            trap(
                0x2050,
                "return-cfi",
                Offending::Stack(0),
                ViolationAction::Log,
            ),
        ];
        bundle
    }

    #[test]
    fn a_probe_says_which_function_and_who_called_it() {
        let mut bundle = bundle();
        let start = bundle.manifest.text.start.0;
        bundle.manifest.cave.traps.push(Trap {
            at: LinkVa(start + 0x2070),
            pass: "probe".to_owned(),
            offending: Offending::Register(11),
            action: ViolationAction::Log,
        });
        let mut event = event(&bundle, 0x2070, 0x1005, 0);
        event.gpr[11] = start + SLIDE + 0x1000;
        let decoder = Decoder::new(&bundle, Slide(SLIDE));
        let Body::Entered { function, view, .. } = decoder.decode(&event, "hardened") else {
            panic!("the trap is a probe's");
        };
        assert_eq!(
            (function.symbol.as_str(), view.as_str()),
            ("second", "hardened")
        );
    }

    /// An event with `rip` and stack top as offsets into the text, and `value` in rbx.
    fn event(bundle: &Bundle, rip: u64, top: u64, value: u64) -> Event {
        let at = |offset: u64| bundle.manifest.text.start.0 + SLIDE + offset;
        let mut event = Event::from_bytes(&[0; 256]);
        event.kind = EventKind::FatalViolation;
        event.root = Root(0x5000);
        event.rip = at(rip);
        event.stack[0] = at(top);
        event.gpr[3] = value;
        event
    }

    fn named(bundle: &Bundle, offset: u64, symbol: &str) -> Option<Site> {
        Some(Site {
            address: GuestVa(bundle.manifest.text.start.0 + SLIDE + offset),
            symbol: symbol.to_owned(),
        })
    }

    #[test]
    fn a_call_names_its_slot_and_a_jump_its_caller() {
        let bundle = bundle();
        let decoder = Decoder::new(&bundle, Slide(SLIDE));
        // 0x1020 is an edited call of 5 bytes.
        let Body::Violation {
            site,
            caller,
            value,
            target,
            action,
            pass,
            ..
        } = decoder.decode(&event(&bundle, 0x2030, 0x1025, 0x4141), "hardened")
        else {
            panic!("a violation");
        };
        assert_eq!(site, named(&bundle, 0x1020, "second+0x20"));
        assert_eq!((caller, target), (None, None));
        assert_eq!(
            (value, action.as_str(), pass.as_str()),
            (GuestVa(0x4141), "kill", "forward-cfi")
        );

        let inside = bundle.manifest.text.start.0 + SLIDE + 0x33;
        let Body::Violation {
            site,
            caller,
            target,
            ..
        } = decoder.decode(&event(&bundle, 0x2030, 0x1026, inside), "hardened")
        else {
            panic!("a violation");
        };
        assert_eq!(site, None);
        assert_eq!(caller, named(&bundle, 0x1026, "second+0x26"));
        assert_eq!(target, named(&bundle, 0x33, "first+0x33"));
    }

    #[test]
    fn a_return_reports_the_word_it_would_have_gone_to() {
        let bundle = bundle();
        let decoder = Decoder::new(&bundle, Slide(SLIDE));
        let Body::Violation {
            site,
            caller,
            value,
            target,
            action,
            ..
        } = decoder.decode(&event(&bundle, 0x2050, 0x1025, 0), "hardened")
        else {
            panic!("a violation");
        };
        // An address behind an edited call is a good return address: it says nothing about where the return was.
        assert_eq!((site, caller), (None, None));
        assert_eq!(action, "log");
        assert_eq!(value.0, bundle.manifest.text.start.0 + SLIDE + 0x1025);
        assert_eq!(target, named(&bundle, 0x1025, "second+0x25"));
    }

    #[test]
    fn a_trap_that_is_not_the_bundles_is_no_violation() {
        let bundle = bundle();
        let decoder = Decoder::new(&bundle, Slide(SLIDE));
        for rip in [0x2031, 0x10] {
            let body = decoder.decode(&event(&bundle, rip, 0, 0), "hardened");
            assert!(matches!(body, Body::UnknownTrap { .. }), "{body:?}");
        }
        let mut user = event(&bundle, 0x2030, 0, 0);
        user.rip = 0x40_1000;
        assert!(matches!(
            decoder.decode(&user, "fast"),
            Body::UnknownTrap { .. }
        ));
    }

    #[test]
    fn who_it_was_comes_from_xen_else_from_the_last_look() {
        let bundle = bundle();
        let mut decoder = Decoder::new(&bundle, Slide(SLIDE));
        let subject_of =
            |decoder: &Decoder<'_>, event: &Event| match decoder.decode(event, "hardened") {
                Body::Violation { process, .. } => process,
                other => panic!("{other:?}"),
            };
        let mut event = event(&bundle, 0x2030, 0x1025, 1);
        assert_eq!(subject_of(&decoder, &event), Subject::default());
        decoder.learn(&ProcessList {
            processes: vec![Process {
                task: GuestVa(1),
                identity: Identity {
                    pid: 77,
                    start: 5,
                    mm: GuestVa(2),
                    root: Root(0x5000),
                    exe: Some("/usr/bin/guestbook".to_owned()),
                    uid: None,
                },
                leader: GuestVa(1),
                anchors: Anchors {
                    start: 5,
                    pgd: GuestVa(3),
                    exe: None,
                    cred: None,
                },
                comm: "guest\u{1b}book".to_owned(),
                shown_exe: None,
            }],
            ..ProcessList::default()
        });
        let known = subject_of(&decoder, &event);
        assert_eq!(
            (known.pid, known.tid, known.comm.as_str()),
            (77, None, "guest?book")
        );
        assert_eq!(known.exe.as_deref(), Some("/usr/bin/guestbook"));
        // What Xen read at that moment counts more.
        (event.pid, event.tgid) = (79, 77);
        event.comm[..5].copy_from_slice(b"other");
        let read = subject_of(&decoder, &event);
        assert_eq!(
            (read.pid, read.tid, read.comm.as_str()),
            (77, Some(79), "other")
        );
        assert_eq!(read.exe.as_deref(), Some("/usr/bin/guestbook"));
        // It has executed something else since.
        event.root = Root(0x7000);
        assert_eq!(subject_of(&decoder, &event).exe, None);
    }
}
