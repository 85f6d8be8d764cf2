//! What Xen tells of an armed domain: `struct xen_hvm_altp2m_event` (xen-patches, public/hvm/hvm_op.h).

use super::{Root, ViewId};

/// Bytes of a record.
pub const RECORD: usize = 256;

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum EventKind {
    /// A check in a thunk failed; the process goes on.
    Violation,
    /// A check in a thunk failed; an oops or a panic follows.
    FatalViolation,
    /// A witness no longer held: the binding is gone.
    Lapsed,
    /// The guest wrote to protected text; nothing was written.
    Refused,
    /// A view lost a page, because the guest gave the frame away.
    Lost,
    /// A group of remaps was dropped, because the guest frees what they are of.
    Dropped,
    /// A kind that this version does not know.
    Unknown(u32),
}

impl EventKind {
    fn from_number(number: u32) -> EventKind {
        match number {
            1 => EventKind::Violation,
            2 => EventKind::FatalViolation,
            3 => EventKind::Lapsed,
            4 => EventKind::Refused,
            5 => EventKind::Lost,
            6 => EventKind::Dropped,
            other => EventKind::Unknown(other),
        }
    }
}

/// One record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The vCPU on which it happened.
    pub vcpu: u16,
    /// The view that it ran on.
    pub view: ViewId,
    /// Xen's time, nanoseconds since it booted.
    pub time: u64,
    /// The page-table root in use; of [`EventKind::Lapsed`], the binding's.
    pub root: Root,
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// [`EventKind::Refused`]: guest-physical address. [`EventKind::Lapsed`]: index of the witness.
    /// [`EventKind::Lost`]: guest frame number. [`EventKind::Dropped`]: the group's key.
    pub addr: u64,
    /// Registers by their x86 numbers: rax rcx rdx rbx rsp rbp rsi rdi r8 to r15.
    pub gpr: [u64; 16],
    /// The words at rsp, rsp+8 and rsp+16; 0 where they cannot be read.
    pub stack: [u64; 3],
    /// Thread id, if Xen was told where it is; else 0.
    pub pid: u32,
    /// Process id, in the same way.
    pub tgid: u32,
    /// The thread's name, in the same way; filled up with zeroes.
    pub comm: [u8; 16],
}

impl Event {
    /// Reads a record as Xen wrote it.
    pub fn from_bytes(bytes: &[u8; RECORD]) -> Event {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        // Truncations pick a field out of the word that holds it.
        let half = |at: usize| (word(at & !7) >> ((at & 7) * 8)) as u32;
        let mut comm = [0; 16];
        comm.copy_from_slice(&bytes[208..224]);
        Event {
            kind: EventKind::from_number(half(0)),
            vcpu: half(4) as u16,
            view: ViewId((half(4) >> 16) as u16),
            time: word(8),
            root: Root(word(16)),
            rip: word(24),
            rsp: word(32),
            addr: word(40),
            gpr: std::array::from_fn(|index| word(48 + index * 8)),
            stack: std::array::from_fn(|index| word(176 + index * 8)),
            pid: half(200),
            tgid: half(204),
            comm,
        }
    }

    /// The thread's name, as far as it is text.
    pub fn comm(&self) -> String {
        let name = self.comm.split(|byte| *byte == 0).next();
        String::from_utf8_lossy(name.unwrap_or_default()).into_owned()
    }
}

/// What was taken from Xen at once.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Events {
    /// The records, oldest first.
    pub records: Vec<Event>,
    /// Records that were overwritten before anybody took them, since the domain was armed.
    pub lost: u64,
    /// Bindings that lapsed, since the domain was armed.
    pub lapsed: u64,
    /// Text writes refused, since the domain was armed.
    pub refused: u64,
    /// Violations, since the domain was armed.
    pub violations: u64,
}

#[cfg(test)]
mod tests {
    use super::{Event, EventKind, RECORD};
    use crate::xen::{Root, ViewId};

    #[test]
    fn a_record_is_read_field_by_field() {
        // Every byte is its own offset, so that a field read from a wrong place shows.
        let mut bytes: [u8; RECORD] = std::array::from_fn(|at| at as u8);
        bytes[..4].copy_from_slice(&3_u32.to_le_bytes());
        let comm = b"payroll\0\0\0\0\0\0\0\0\0";
        bytes[208..224].copy_from_slice(comm);
        let event = Event::from_bytes(&bytes);
        assert_eq!(event.kind, EventKind::Lapsed);
        assert_eq!((event.vcpu, event.view), (0x0504, ViewId(0x0706)));
        assert_eq!(event.time, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!(event.root, Root(0x1716_1514_1312_1110));
        assert_eq!(event.rip, 0x1f1e_1d1c_1b1a_1918);
        assert_eq!(event.rsp, 0x2726_2524_2322_2120);
        assert_eq!(event.addr, 0x2f2e_2d2c_2b2a_2928);
        assert_eq!(event.gpr[0], 0x3736_3534_3332_3130);
        assert_eq!(event.gpr[15], 0xafae_adac_abaa_a9a8);
        assert_eq!(event.stack[2], 0xc7c6_c5c4_c3c2_c1c0);
        assert_eq!((event.pid, event.tgid), (0xcbca_c9c8, 0xcfce_cdcc));
        assert_eq!(event.comm(), "payroll");
        bytes[0] = 77;
        assert_eq!(Event::from_bytes(&bytes).kind, EventKind::Unknown(77));
    }
}
