//! Symbols of a stripped image, from the kernel's own kallsyms tables (scripts/kallsyms.c writes them, kernel/kallsyms.c
//! reads them).
//!
//! Nothing says where the tables are. They are found by what must hold of them: `kallsyms_token_index` is 256 ascending
//! 16-bit offsets whose tokens all end where the next begins; before the tokens lie the number of symbols, the names and the
//! markers, in this order in every version; the addresses lie before that (to 6.3) or behind the index (from 6.4).

use super::read::Reader;
use super::{Fault, KernelSymbol, MAX_NAME, MAX_SYMBOLS};
use penumbra_bundle::LinkVa;

/// One marker for so many symbols.
const PER_MARKER: usize = 256;

/// Decodes all symbols from the bytes of `.rodata`.
pub fn read(rodata: &[u8]) -> Result<Vec<KernelSymbol>, Fault> {
    let missing = |what: &str| {
        Fault::unsupported(
            "kallsyms",
            format!(
                "{what}; Penumbra needs a kernel built with CONFIG_KALLSYMS, or a vmlinux with .symtab, or a System.map"
            ),
        )
    };
    let mut near_miss = "no token table in .rodata";
    for index in token_indexes(rodata) {
        let Some(tokens) = Tokens::before(rodata, index) else {
            continue;
        };
        near_miss = "a token table in .rodata, but no names before it";
        let Some(names) = Names::before(rodata, &tokens) else {
            continue;
        };
        near_miss = "tokens and names in .rodata, but no addresses beside them";
        let Some(addresses) = addresses(rodata, &tokens, &names) else {
            continue;
        };
        return names.decode(&tokens, &addresses);
    }
    Err(missing(near_miss))
}

/// Offsets that may hold `kallsyms_token_index`.
fn token_indexes(rodata: &[u8]) -> impl Iterator<Item = usize> + '_ {
    let word = move |at: usize| u16::from_le_bytes([rodata[at], rodata[at + 1]]);
    (0..rodata.len().saturating_sub(512))
        .step_by(8)
        .filter(move |&at| {
            let mut last = word(at);
            // A token has one byte or more, and its NUL.
            last == 0
                && (1..256).all(|n| {
                    let next = word(at + 2 * n);
                    let step = next.wrapping_sub(last);
                    last = next;
                    (2..=MAX_NAME as u16).contains(&step)
                })
        })
}

/// `kallsyms_token_table` and `kallsyms_token_index`.
struct Tokens<'a> {
    start: usize,
    index: usize,
    text: Vec<&'a [u8]>,
}

impl<'a> Tokens<'a> {
    fn before(rodata: &'a [u8], index: usize) -> Option<Tokens<'a>> {
        let offsets: Vec<usize> = rodata[index..index + 512]
            .chunks_exact(2)
            .map(|pair| usize::from(u16::from_le_bytes([pair[0], pair[1]])))
            .collect();
        // Tables start at multiples of 8 (4 in old kernels); the last token's length is not known.
        let latest = index.checked_sub(offsets[255] + 2)?;
        let earliest = latest.saturating_sub(MAX_NAME);
        (earliest..=latest)
            .rev()
            .filter(|start| start % 4 == 0)
            .find_map(|start| {
                let ends = |n: usize| rodata[start + offsets[n] - 1] == 0;
                if !(1..256).all(ends) {
                    return None;
                }
                let text = (0..256)
                    .map(|n| {
                        let token = &rodata[start + offsets[n]..index];
                        let len = token.iter().position(|byte| *byte == 0)?;
                        let fits = n == 255 || offsets[n] + len + 1 == offsets[n + 1];
                        (len > 0 && fits && token[..len].iter().all(u8::is_ascii_graphic))
                            .then_some(&token[..len])
                    })
                    .collect::<Option<Vec<_>>>()?;
                let end = start + offsets[255] + text[255].len() + 1;
                // Only padding may follow.
                (end.next_multiple_of(8) >= index
                    && rodata[end..index].iter().all(|byte| *byte == 0))
                .then_some(Tokens { start, index, text })
            })
    }
}

/// `kallsyms_num_syms` and `kallsyms_names`, checked against `kallsyms_markers`.
struct Names<'a> {
    /// Where `kallsyms_num_syms` stands.
    start: usize,
    count: usize,
    bytes: &'a [u8],
}

impl<'a> Names<'a> {
    /// The nearest place before the tokens where a count is followed by so many names and by markers that fit them.
    fn before(rodata: &'a [u8], tokens: &Tokens<'_>) -> Option<Names<'a>> {
        let word = |at: usize| Reader::new(rodata, at).u32().map(|word| word as usize);
        (0..tokens.start)
            .rev()
            .filter(|at| at % 8 == 0)
            .find_map(|start| {
                let count =
                    word(start).filter(|count| (PER_MARKER..MAX_SYMBOLS).contains(count))?;
                if word(start + 4)? != 0 {
                    return None;
                }
                let names = Names {
                    start,
                    count,
                    bytes: &rodata[start + 8..tokens.start],
                };
                let mut markers = Vec::new();
                let mut at = 0;
                for n in 0..count {
                    if n % PER_MARKER == 0 {
                        markers.push(at);
                    }
                    let (packed, next) = names.entry(at)?;
                    // The first letter of a name is its kind.
                    if !tokens.text[usize::from(packed[0])][0].is_ascii_alphabetic() {
                        return None;
                    }
                    at = next;
                }
                let table = start + 8 + at.next_multiple_of(8);
                (0..)
                    .zip(markers)
                    .all(|(n, marker)| word(table + 4 * n) == Some(marker))
                    .then_some(names)
            })
    }

    /// The packed name at `at`, and where the next one is.
    fn entry(&self, at: usize) -> Option<(&'a [u8], usize)> {
        let mut reader = Reader::new(self.bytes, at);
        let mut len = usize::from(reader.u8()?);
        // Names of 128 tokens or more have a second length byte ("big" symbols, from 6.1).
        if len & 0x80 != 0 {
            len = len & 0x7f | usize::from(reader.u8()?) << 7;
        }
        let packed = reader.take(len).filter(|packed| !packed.is_empty())?;
        Some((packed, reader.position()))
    }

    fn decode(
        &self,
        tokens: &Tokens<'_>,
        addresses: &[LinkVa],
    ) -> Result<Vec<KernelSymbol>, Fault> {
        let mut symbols = Vec::with_capacity(self.count);
        let mut at = 0;
        for (n, va) in addresses.iter().enumerate() {
            let broken = || {
                Fault::damaged(
                    "kallsyms",
                    format!("name {n} of {} does not decode", self.count),
                )
            };
            let (packed, next) = self.entry(at).ok_or_else(broken)?;
            at = next;
            let mut text = Vec::with_capacity(32);
            for token in packed {
                text.extend_from_slice(tokens.text[usize::from(*token)]);
                if text.len() > MAX_NAME {
                    return Err(broken());
                }
            }
            let kind = text.remove(0);
            let name = String::from_utf8(text).map_err(|_| broken())?;
            symbols.push(KernelSymbol {
                va: *va,
                kind,
                name,
            });
        }
        Ok(symbols)
    }
}

/// The addresses: `kallsyms_offsets` and `kallsyms_relative_base`, before the names or behind the token index.
fn addresses(rodata: &[u8], tokens: &Tokens<'_>, names: &Names<'_>) -> Option<Vec<LinkVa>> {
    let size = names.count * 4;
    let behind = (tokens.index + 512).next_multiple_of(8);
    let places = [
        // offsets, relative_base, num_syms
        names
            .start
            .checked_sub(8)
            .and_then(|base| Some((base.checked_sub(size.next_multiple_of(8))?, base))),
        // token_index, offsets, relative_base
        Some((behind, behind + size.next_multiple_of(8))),
    ];
    places.into_iter().flatten().find_map(|(offsets, base)| {
        let base = Reader::new(rodata, base)
            .u64()
            .filter(|base| base >> 31 == 0x1_ffff_ffff)?;
        let offsets: Vec<i32> = rodata
            .get(offsets..offsets + size)?
            .chunks_exact(4)
            .map(|word| i32::from_le_bytes(word.try_into().expect("four bytes")))
            .collect();
        // CONFIG_KALLSYMS_ABSOLUTE_PERCPU: not negative means absolute, negative counts from the base.
        let percpu = |offset: i32| match offset {
            0.. => offset as u64,
            _ => base.wrapping_sub(1).wrapping_sub(i64::from(offset) as u64),
        };
        let plain = |offset: i32| base.wrapping_add(u64::from(offset as u32));
        let ascending = |map: &dyn Fn(i32) -> u64| {
            let list: Vec<LinkVa> = offsets.iter().map(|offset| LinkVa(map(*offset))).collect();
            list.is_sorted().then_some(list)
        };
        ascending(&percpu).or_else(|| ascending(&plain))
    })
}

#[cfg(test)]
mod tests {
    use super::read;

    const BASE: u64 = 0xffff_ffff_8100_0000;

    /// One token for each byte that names use, as kallsyms leaves rarely used ones.
    fn tokens() -> Vec<Vec<u8>> {
        (0u8..=255)
            .map(|n| {
                if n.is_ascii_graphic() {
                    vec![n]
                } else {
                    format!("t{n}").into_bytes()
                }
            })
            .collect()
    }

    fn pad(out: &mut Vec<u8>) {
        out.resize(out.len().next_multiple_of(8), 0);
    }

    /// Tables as scripts/kallsyms.c writes them; `late`: as from 6.4 on, addresses behind the token index.
    fn tables(symbols: &[(u64, String)], late: bool) -> Vec<u8> {
        let mut offsets = Vec::new();
        for (va, _) in symbols {
            // CONFIG_KALLSYMS_ABSOLUTE_PERCPU: small addresses are absolute, others negative.
            let offset = if *va < BASE {
                *va as i32
            } else {
                (BASE.wrapping_sub(1).wrapping_sub(*va)) as i32
            };
            offsets.extend(offset.to_le_bytes());
        }
        pad(&mut offsets);
        offsets.extend(BASE.to_le_bytes());
        let mut out = vec![0xa5; 4096];
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
        // kallsyms_seqs_of_names, from 6.2 on and in stable 6.1.
        out.extend(symbols.iter().flat_map(|_| [1, 2, 3]));
        pad(&mut out);
        let (mut index, mut at) = (Vec::new(), 0u16);
        for token in tokens() {
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
        out.extend([0x5a; 1024]);
        out
    }

    fn symbols() -> Vec<(u64, String)> {
        let percpu = (0..3).map(|n| (0x1000 * n, format!("Apercpu_{n}")));
        let code = (0..700).map(|n| (BASE + 16 * n, format!("tfunction_{n}")));
        let long = std::iter::once((BASE + 0x10_0000, format!("T{}", "x".repeat(300))));
        percpu.chain(code).chain(long).collect()
    }

    #[test]
    fn both_orders_of_tables_decode() {
        for late in [false, true] {
            let found = read(&tables(&symbols(), late)).unwrap();
            let found: Vec<(u64, String)> = found
                .into_iter()
                .map(|symbol| {
                    (
                        symbol.va.0,
                        format!("{}{}", char::from(symbol.kind), symbol.name),
                    )
                })
                .collect();
            assert_eq!(found, symbols(), "late: {late}");
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let whole = tables(&symbols(), true);
        for end in (0..whole.len() - 1024).step_by(97) {
            assert!(read(&whole[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn no_damaged_byte_panics() {
        let whole = tables(&symbols(), false);
        for at in (4096..whole.len()).step_by(13) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0xff;
            let _ = read(&damaged);
        }
    }
}
