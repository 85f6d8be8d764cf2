//! Symbols of a stripped image, from the kernel's own kallsyms tables (scripts/kallsyms.c writes them, kernel/kallsyms.c
//! reads them).
//!
//! Nothing says where the tables are. They are found by what must hold of them: `kallsyms_token_index` is 256 ascending
//! 16-bit offsets whose tokens all end where the next begins; before the tokens lie the number of symbols, the names and the
//! markers, in this order in every version; the addresses lie before that (to 6.3) or behind the index (from 6.4).

use super::read::Reader;
use super::{Fault, Image, KernelSymbol};
use penumbra_bundle::LinkVa;

/// More symbols than any kernel has; a bound on memory.
const MAX_SYMBOLS: usize = 1 << 21;
/// One marker for so many symbols.
const PER_MARKER: usize = 256;
/// No symbol name is longer when unpacked (`KSYM_NAME_LEN` is 512).
const MAX_NAME: usize = 1024;

/// Decodes all symbols.
pub fn read(image: &Image) -> Result<Vec<KernelSymbol>, Fault> {
    let rodata = image
        .section_bytes(".rodata")
        .ok_or_else(|| Fault::unsupported(".rodata", "the section is missing"))?;
    let missing = |what: &str| {
        Fault::unsupported(
            "kallsyms",
            format!(
                "{what}; Penumbra needs a kernel built with CONFIG_KALLSYMS, or a vmlinux with .symtab"
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
