//! ORC, the kernel's own table of where each frame ends, by which it unwinds its stacks
//! (Documentation/arch/x86/orc-unwinder.rst; arch/x86/kernel/unwind_orc.c).
//!
//! By it the words of a stack that will be used again are told from those that only lie there: what calls that are over
//! left in holes of a frame, and what a system call copied in. Without it any process could keep words that look like
//! anything on its stack for as long as it sleeps.

use super::kernel::Kernel;
use super::layout::{self, MissingName};
use super::memory::{GuestMemory, ReadError};
use crate::xen::GuestVa;
use penumbra_bundle::Manifest;
use serde::{Deserialize, Serialize};

/// Kernels have some 400,000 entries.
const MAX_ENTRIES: u64 = 1 << 22;
/// `sizeof(struct orc_entry)` (arch/x86/include/asm/orc_types.h).
const ENTRY: usize = 6;

/// `struct inactive_task_frame` (arch/x86/include/asm/switch_to.h): r15, r14, r13, r12, rbx, rbp, return address.
mod inactive {
    pub const BP: u64 = 40;
    pub const RETURN: u64 = 48;
    pub const SIZE: u64 = 56;
}

/// `struct pt_regs` (arch/x86/include/asm/ptrace.h).
mod regs {
    pub const BP: u64 = 32;
    pub const IP: u64 = 128;
    pub const SIZE: u64 = 168;
}

/// What the processor pushes for an interrupt (Intel SDM volume 3, 6.14.2): the end of `struct pt_regs`.
mod iret {
    pub const CS: u64 = 8;
    pub const SP: u64 = 24;
    pub const SIZE: u64 = 40;
}

/// Where a guest has its table. The journal keeps it, for `remove` needs no bundle.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Place {
    /// `__start_orc_unwind_ip`: for each entry 32 bits, its first address relative to where they stand; ascending.
    ips: GuestVa,
    /// `__start_orc_unwind`: the entries.
    entries: GuestVa,
    /// How many.
    count: u64,
    /// The text that they describe: what comes after it would get the last one.
    text: (GuestVa, GuestVa),
    /// Bits of an entry's type.
    type_bits: u32,
}

impl Place {
    /// From a manifest; `None` for a kernel without ORC, or with another one.
    pub fn new(manifest: &Manifest, kernel: &Kernel) -> Result<Option<Place>, MissingName> {
        let type_bits = manifest.layout.get("const.ORC_TYPE_BITS");
        let Some(type_bits) = type_bits.filter(|bits| matches!(bits, 2 | 3)) else {
            return Ok(None);
        };
        let at = |name| layout::data(manifest, kernel.slide, name);
        let (ips, end) = (at("__start_orc_unwind_ip")?, at("__stop_orc_unwind_ip")?);
        let text = &manifest.text;
        Ok(Some(Place {
            ips,
            entries: at("__start_orc_unwind")?,
            count: end.0.saturating_sub(ips.0) / 4,
            text: (kernel.slide.guest(text.start), kernel.slide.guest(text.end)),
            type_bits: *type_bits,
        }))
    }
}

/// How a frame's end is found, and what stands there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    sp_offset: i16,
    bp_offset: i16,
    sp: u8,
    bp: u8,
    kind: Kind,
}

/// What stands at a frame's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// A return address.
    Call,
    /// `struct pt_regs`.
    Regs,
    /// Its end only.
    Iret,
    /// The end of the stack, or nothing that is known.
    Unknown,
}

/// A part of a stack as it was at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Words<'a> {
    /// The first word's address.
    pub from: GuestVa,
    /// Whole words.
    pub bytes: &'a [u8],
}

impl<'a> Words<'a> {
    /// Each word and where it is.
    pub fn iter(self) -> impl Iterator<Item = (GuestVa, u64)> + 'a {
        let words = self.bytes.chunks_exact(8).zip(0_u64..);
        words.map(move |(word, index)| {
            let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            (self.from.offset(index * 8), word)
        })
    }

    /// Those from an address among them on.
    pub fn above(self, from: GuestVa) -> Words<'a> {
        let below = from.0.saturating_sub(self.from.0);
        let below =
            usize::try_from(below).map_or(self.bytes.len(), |len| len.min(self.bytes.len()));
        Words {
            from,
            bytes: &self.bytes[below..],
        }
    }

    /// The word at an address; `None` outside.
    fn at(&self, at: u64) -> Option<u64> {
        let offset = usize::try_from(at.checked_sub(self.from.0)?).ok()?;
        let word = self.bytes.get(offset..offset.checked_add(8)?)?;
        Some(u64::from_le_bytes(word.try_into().ok()?))
    }
}

/// What is known of one frame.
#[derive(Clone, Copy, Debug)]
struct Frame {
    ip: u64,
    sp: u64,
    bp: u64,
    /// `ip` is where it was interrupted; else the one behind a call, which may be the next function's.
    interrupted: bool,
}

/// A guest's table.
#[derive(Debug)]
pub struct Orc {
    place: Place,
    ips: Vec<u64>,
    entries: Vec<u8>,
}

impl Orc {
    /// Reads it.
    pub fn read(memory: &GuestMemory<'_>, place: Place) -> Result<Orc, ReadError> {
        let count = place.count.min(MAX_ENTRIES) as usize;
        let ips = memory.bytes(place.ips, count * 4)?;
        let ips = ips.chunks_exact(4).zip(0_u64..).map(|(field, index)| {
            let field = i32::from_le_bytes(field.try_into().expect("four bytes"));
            let at = place.ips.0.wrapping_add(index * 4);
            at.wrapping_add_signed(i64::from(field))
        });
        Ok(Orc {
            place,
            ips: ips.collect(),
            entries: memory.bytes(place.entries, count * ENTRY)?,
        })
    }

    fn entry(&self, ip: u64) -> Option<Entry> {
        if ip < self.place.text.0.0 || ip >= self.place.text.1.0 {
            return None;
        }
        let index = self.ips.partition_point(|at| *at <= ip).checked_sub(1)?;
        let entry = self.entries.get(index * ENTRY..(index + 1) * ENTRY)?;
        // Linux 6.4 put UNDEFINED and END_OF_STACK before the types that were there.
        let kind = u32::from(entry[5]) & ((1 << self.place.type_bits) - 1);
        let kind = match kind.checked_sub(if self.place.type_bits > 2 { 2 } else { 0 }) {
            Some(0) => Kind::Call,
            Some(1) => Kind::Regs,
            Some(2) => Kind::Iret,
            _ => Kind::Unknown,
        };
        Some(Entry {
            sp_offset: i16::from_le_bytes([entry[0], entry[1]]),
            bp_offset: i16::from_le_bytes([entry[2], entry[3]]),
            sp: entry[4] & 15,
            bp: entry[4] >> 4,
            kind,
        })
    }

    /// Follows the frames of a thread that sleeps, whose saved stack pointer is the first of `words`: where execution
    /// will go on in each, and the address from which on nothing is known. All below that, but for what is returned, lies
    /// there for nothing.
    pub fn follow(&self, words: Words<'_>) -> (Vec<GuestVa>, GuestVa) {
        let mut found = Vec::new();
        let start = words.from.0;
        let end = start.saturating_add(words.bytes.len() as u64);
        let Some((bp, ip)) = words
            .at(start.wrapping_add(inactive::BP))
            .zip(words.at(start.wrapping_add(inactive::RETURN)))
        else {
            return (found, words.from);
        };
        let mut frame = Frame {
            ip,
            sp: start.wrapping_add(inactive::SIZE),
            bp,
            interrupted: false,
        };
        loop {
            found.push(GuestVa(frame.ip));
            match self.above(words, frame) {
                // Each frame is above the one before: this ends. One on another stack says nothing about the rest of this one.
                Some(Above::Frame(above)) if above.sp > frame.sp && above.sp <= end => {
                    frame = above;
                }
                Some(Above::User(end)) if end > frame.sp => return (found, GuestVa(end)),
                _ => return (found, GuestVa(frame.sp)),
            }
        }
    }

    fn above(&self, words: Words<'_>, frame: Frame) -> Option<Above> {
        let behind_call = u64::from(!frame.interrupted);
        let entry = self.entry(frame.ip.wrapping_sub(behind_call))?;
        let plus = |base: u64, offset: i16| base.wrapping_add_signed(i64::from(offset));
        // ORC_REG_BP, ORC_REG_SP, ORC_REG_BP_INDIRECT, ORC_REG_SP_INDIRECT. The others hold a stack pointer only for some
        // instructions of an entry.
        let sp = match entry.sp {
            4 => plus(frame.bp, entry.sp_offset),
            5 => plus(frame.sp, entry.sp_offset),
            8 => words.at(plus(frame.bp, entry.sp_offset))?,
            9 => plus(words.at(frame.sp)?, entry.sp_offset),
            _ => return None,
        };
        // ORC_REG_UNDEFINED (unchanged), ORC_REG_PREV_SP, ORC_REG_BP.
        let bp = match entry.bp {
            0 => frame.bp,
            1 => words.at(plus(sp, entry.bp_offset))?,
            4 => words.at(plus(frame.bp, entry.bp_offset))?,
            _ => return None,
        };
        let (bp, iret) = match entry.kind {
            Kind::Call => {
                return Some(Above::Frame(Frame {
                    ip: words.at(sp.wrapping_sub(8))?,
                    sp,
                    bp,
                    interrupted: false,
                }));
            }
            Kind::Regs => (
                words.at(sp.wrapping_add(regs::BP))?,
                sp.wrapping_add(regs::IP),
            ),
            Kind::Iret => (bp, sp),
            Kind::Unknown => return None,
        };
        // CS.RPL: user mode was interrupted, and only at the stack's start.
        if words.at(iret.wrapping_add(iret::CS))? & 3 != 0 {
            return Some(Above::User(iret.wrapping_add(iret::SIZE)));
        }
        Some(Above::Frame(Frame {
            ip: words.at(iret)?,
            sp: words.at(iret.wrapping_add(iret::SP))?,
            bp,
            interrupted: true,
        }))
    }
}

/// What is above a frame.
enum Above {
    Frame(Frame),
    /// Saved registers of user mode, which end here.
    User(u64),
}

const _: () = assert!(regs::IP + iret::SIZE == regs::SIZE);

#[cfg(test)]
mod tests {
    use super::{Orc, Place, Words};
    use crate::xen::GuestVa;

    const TEXT: u64 = 0xffff_ffff_8100_0000;
    const STACK: u64 = 0xffff_c900_0000_3f00;
    const SP: u8 = 5;
    const BP: u8 = 4;
    const CALL: u8 = 0;
    const REGS: u8 = 1;
    const IRET: u8 = 2;

    /// A table of Linux before 6.4: first address, offset of the stack pointer, registers, offset of RBP, type.
    fn orc(entries: &[(u64, i16, u8, i16, u8)]) -> Orc {
        let bytes = entries.iter().flat_map(|(_, sp, registers, bp, kind)| {
            let [a, b] = sp.to_le_bytes();
            let [c, d] = bp.to_le_bytes();
            [a, b, c, d, *registers, *kind]
        });
        Orc {
            place: Place {
                ips: GuestVa(0),
                entries: GuestVa(0),
                count: entries.len() as u64,
                text: (GuestVa(TEXT), GuestVa(TEXT + 0x10_0000)),
                type_bits: 2,
            },
            ips: entries.iter().map(|entry| TEXT + entry.0).collect(),
            entries: bytes.collect(),
        }
    }

    /// A sleeping thread's stack of 0x100 bytes: saved RBP, where it goes on, and other words by their offset.
    fn stack(bp: u64, ip: u64, words: &[(usize, u64)]) -> Vec<u8> {
        let mut bytes = vec![0; 0x100];
        for (at, word) in [(40, bp), (48, ip)].iter().chain(words) {
            bytes[*at..*at + 8].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn follow(orc: &Orc, bytes: &[u8]) -> (Vec<u64>, u64) {
        let words = Words {
            from: GuestVa(STACK),
            bytes,
        };
        let (found, known) = orc.follow(words);
        (found.iter().map(|ip| ip.0).collect(), known.0 - STACK)
    }

    #[test]
    fn frames_are_followed_to_user_mode() {
        let orc = orc(&[
            // One that pushes RBP and keeps it: its frame ends 16 above RBP.
            (0x100, 16, BP | BP << 4, 0, CALL),
            // RBP is 16 below this one's end.
            (0x200, 0x20, SP | 1 << 4, -16, CALL),
            (0x300, 0, SP, 0, REGS),
        ]);
        let (first, second, entry) = (TEXT + 0x140, TEXT + 0x240, TEXT + 0x340);
        let at = |offset: u64| STACK + offset;
        let regs = 0x38 + 0x20 + 0x20;
        let bytes = stack(
            at(0x48),
            first,
            &[
                // first: RBP at 0x48, and there the RBP before it.
                (0x48, 0x77),
                (0x50, second),
                (0x68, 0x99),
                (0x70, entry),
                // Registers of user mode.
                (regs + 136 - 0x40, 0x33),
            ],
        );
        // Registers of which only the end is on this stack do not fit: nothing above is known.
        assert_eq!(follow(&orc, &bytes), (vec![first, second, entry], 0x78));
        let mut whole = bytes.clone();
        whole.resize(0x78 + 168, 0);
        whole[0x78 + 136] = 0x33;
        assert_eq!(
            follow(&orc, &whole),
            (vec![first, second, entry], 0x78 + 168),
            "all is known"
        );
        // An interrupted kernel goes on where it was, not behind a call.
        whole[0x78 + 136] = 0x10;
        whole[0x78 + 128..][..8].copy_from_slice(&(TEXT + 0x200).to_le_bytes());
        whole[0x78 + 152..][..8].copy_from_slice(&at(0x120).to_le_bytes());
        whole.resize(0x180, 0);
        whole[0x138..0x140].copy_from_slice(&0x1234_u64.to_le_bytes());
        assert_eq!(
            follow(&orc, &whole),
            (vec![first, second, entry, TEXT + 0x200, 0x1234], 0x140)
        );
        // Where it was on another stack, the rest of this one is not known.
        whole[0x78 + 152..][..8].copy_from_slice(&at(0x4000).to_le_bytes());
        assert_eq!(follow(&orc, &whole), (vec![first, second, entry], 0x78));
    }

    #[test]
    fn what_is_not_known_ends_it_where_it_stands() {
        let orc = orc(&[
            (0x100, 0x10, SP, 0, CALL),
            // RDX, and an entry that leads down.
            (0x200, 0, 2, 0, CALL),
            (0x300, -8, SP, 0, CALL),
            (0x400, 0, SP, 0, IRET),
            (0x500, 0x4000, SP, 0, CALL),
        ]);
        for (next, known) in [
            // Not of the text; unknown register; down; to user mode; out of the stack.
            (0x1234, 0x48),
            (TEXT + 0x210, 0x48),
            (TEXT + 0x310, 0x48),
            (TEXT + 0x510, 0x48),
            (TEXT + 0x10_0000, 0x48),
        ] {
            let bytes = stack(0, TEXT + 0x110, &[(0x40, next)]);
            assert_eq!(
                follow(&orc, &bytes),
                (vec![TEXT + 0x110, next], known),
                "{next:#x}"
            );
        }
        let bytes = stack(0, TEXT + 0x410, &[(0x40, 0x33)]);
        assert_eq!(follow(&orc, &bytes), (vec![TEXT + 0x410], 0x38 + 40));
        // No room for where it goes on.
        let words = Words {
            from: GuestVa(STACK),
            bytes: &bytes[..40],
        };
        assert_eq!(orc.follow(words), (Vec::new(), GuestVa(STACK)));
    }
    #[test]
    fn any_table_and_any_stack_end_it() {
        // Numerical Recipes' linear congruential generator: the same numbers in every run.
        let mut seed = 1_u64;
        let mut next = move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed >> 16
        };
        let mut known = 0;
        for _ in 0..20_000 {
            let entries: Vec<(u64, i16, u8, i16, u8)> = (0..16)
                .map(|at| {
                    let offset = ((next() % 64) * 8) as i16 - 64;
                    let registers = [5, 4, 8, 9, 0x15, 0x45][next() as usize % 6];
                    let kind = (next() % 4) as u8;
                    (at * 0x100, offset, registers, -16, kind)
                })
                .collect();
            let orc = orc(&entries);
            let mut bytes = vec![0; (next() % 0x400) as usize];
            for word in bytes.chunks_exact_mut(8) {
                let value = match next() % 4 {
                    0 | 3 => TEXT + next() % 0x1000,
                    1 => STACK + (next() % 0x80) * 8,
                    _ => next(),
                };
                word.copy_from_slice(&value.to_le_bytes());
            }
            let words = Words {
                from: GuestVa(STACK),
                bytes: &bytes,
            };
            let (found, end) = orc.follow(words);
            assert!(found.len() <= bytes.len() + 1 && end >= words.from);
            known += found.len();
        }
        assert!(known > 10_000, "frames were followed: {known}");
    }
}
