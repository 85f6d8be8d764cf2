//! Canonical NOPs as the kernel writes them (arch/x86/include/asm/nops.h; SDM volume 2, NOP, table 4-12).

/// The longest NOP that the kernel uses: 8 bytes to Linux 6.2, 11 later (`ASM_NOP_MAX`).
pub const LONGEST: [usize; 2] = [8, 11];

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

/// Fills `room` with NOPs of at most `longest` bytes (`add_nops`).
pub fn fill(room: &mut [u8], longest: usize) {
    for part in room.chunks_mut(longest) {
        part.copy_from_slice(NOPS[part.len() - 1]);
    }
}

#[cfg(test)]
mod tests {
    use super::fill;
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    #[test]
    fn every_length_is_filled_with_nops_and_nothing_else() {
        for longest in super::LONGEST {
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
}
