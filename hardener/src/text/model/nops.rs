//! Canonical NOPs as the kernel writes them (arch/x86/include/asm/nops.h; SDM volume 2, NOP, table 4-12).

/// How a version of Linux fills room (`add_nop`, `add_nops`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Padding {
    /// With NOPs of at most so many bytes: 8 to Linux 6.2, 11 (`ASM_NOP_MAX`) to 6.7.
    Nops(usize),
    /// As a NOP of at most 11 bytes, or else with a jump to its end and INT3s.
    NopOrJump,
}

/// All of them.
pub const PADDINGS: [Padding; 3] = [Padding::Nops(8), Padding::Nops(11), Padding::NopOrJump];

const INT3: u8 = 0xcc;

const NOPS: [&[u8]; 11] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[
        0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00,
    ],
];

impl Padding {
    /// Fills `room` with what does nothing.
    pub fn fill(self, room: &mut [u8]) {
        match self {
            Padding::Nops(longest) => fill(room, longest),
            Padding::NopOrJump if room.len() <= NOPS.len() => fill(room, NOPS.len()),
            Padding::NopOrJump => {
                let len = room.len();
                room.fill(INT3);
                // A site has at most 255 bytes.
                if let Ok(short @ ..128) = u8::try_from(len) {
                    room[..2].copy_from_slice(&[0xeb, short - 2]);
                } else {
                    room[0] = 0xe9;
                    room[1..5].copy_from_slice(&(len as u32 - 5).to_le_bytes());
                }
            }
        }
    }

    /// Fills what a jump leaves that became short: nothing runs there (`recompute_jump`, `__apply_relocation`).
    pub fn fill_dead(self, room: &mut [u8]) {
        match self {
            Padding::Nops(_) => fill(room, 8),
            Padding::NopOrJump => room.fill(INT3),
        }
    }
}

/// Fills `room` with NOPs of at most `longest` bytes.
pub fn fill(room: &mut [u8], longest: usize) {
    for part in room.chunks_mut(longest) {
        part.copy_from_slice(NOPS[part.len() - 1]);
    }
}

#[cfg(test)]
mod tests {
    use super::{Padding, fill};
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    #[test]
    fn every_length_is_filled_with_nops_and_nothing_else() {
        for longest in [8, 11] {
            for len in 1..40 {
                let mut room = vec![0xff; len];
                fill(&mut room, longest);
                let decoded: Vec<_> = Decoder::new(64, &room, DecoderOptions::NONE)
                    .iter()
                    .collect();
                assert!(
                    decoded.iter().all(|one| one.mnemonic() == Mnemonic::Nop),
                    "{room:02x?}"
                );
                assert_eq!(decoded.len(), len.div_ceil(longest));
            }
        }
    }

    #[test]
    fn from_linux_6_8_on_a_long_gap_is_jumped_over() {
        let mut room = [0x90; 12];
        Padding::NopOrJump.fill(&mut room[..11]);
        assert_eq!(room[..3], [0x66, 0x66, 0x2e]);
        Padding::NopOrJump.fill(&mut room);
        assert_eq!(room[..2], [0xeb, 10]);
        assert!(room[2..].iter().all(|byte| *byte == 0xcc));
        let mut room = [0x90; 200];
        Padding::NopOrJump.fill(&mut room);
        assert_eq!(room[..6], [0xe9, 195, 0, 0, 0, 0xcc]);
    }
}
