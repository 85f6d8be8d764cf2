//! The tables of kallsyms for a few symbols, as scripts/kallsyms.c writes them, with one token a letter.

/// A symbol: where, and its name behind its kind's letter.
pub type Named = (u64, String);

/// Tables for symbols in the order of their addresses, which count from `base`; `late`: as from Linux 6.4 on, where the
/// addresses stand behind the tokens.
pub fn tables(symbols: &[Named], base: u64, late: bool) -> Vec<u8> {
    let mut offsets = Vec::new();
    for (at, _) in symbols {
        // CONFIG_KALLSYMS_ABSOLUTE_PERCPU
        let offset = if *at < base {
            *at as i32
        } else {
            base.wrapping_sub(1).wrapping_sub(*at) as i32
        };
        offsets.extend(offset.to_le_bytes());
    }
    pad(&mut offsets);
    offsets.extend(base.to_le_bytes());
    let mut out = Vec::new();
    if !late {
        out.extend(&offsets);
    }
    out.extend((symbols.len() as u64).to_le_bytes());
    let (names, mut markers) = (out.len(), Vec::new());
    for (n, (_, name)) in symbols.iter().enumerate() {
        if n % 256 == 0 {
            markers.extend(((out.len() - names) as u32).to_le_bytes());
        }
        if name.len() >= 0x80 {
            out.extend([0x80 | (name.len() & 0x7f) as u8, (name.len() >> 7) as u8]);
        } else {
            out.push(name.len() as u8);
        }
        out.extend(name.bytes());
    }
    pad(&mut out);
    out.extend(markers);
    pad(&mut out);
    let (mut index, mut at) = (Vec::new(), 0u16);
    for byte in 0u8..=255 {
        let token = if byte.is_ascii_graphic() {
            vec![byte]
        } else {
            format!("t{byte}").into_bytes()
        };
        index.extend(at.to_le_bytes());
        at += token.len() as u16 + 1;
        out.extend(token);
        out.push(0);
    }
    pad(&mut out);
    out.extend(index);
    if late {
        out.extend(&offsets);
    }
    // Something always follows in a kernel.
    out.extend([0; 8]);
    out
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(8), 0);
}
