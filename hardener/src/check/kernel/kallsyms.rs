//! Symbols from the kallsyms tables that the kernel carries for itself.
//!
//! Nothing says where the tables are, so they are found by their content and each find is proved by the others: 256 tokens
//! with their index, names that decode to exactly as many as the count says, and a marker for every 256th of them
//! (Linux, scripts/kallsyms.c and kernel/kallsyms.c).

use super::KernelError;
use super::elf::Vmlinux;
use memchr::memmem;
use penumbra_bundle::LinkVa;

/// A kernel symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSymbol {
    /// Its address.
    pub at: LinkVa,
    /// Its type letter, as `nm` has it.
    pub letter: u8,
    /// Its name; names repeat.
    pub name: String,
}

impl KernelSymbol {
    /// Whether it names code, weak ones among it (`nm`).
    pub fn is_code(&self) -> bool {
        b"tTwW".contains(&self.letter)
    }
}

/// Reads all symbols, by address.
pub fn read(vmlinux: &Vmlinux) -> Result<Vec<KernelSymbol>, KernelError> {
    let section = vmlinux.section(".rodata")?;
    let base = vmlinux.section(".text")?.range.start;
    decode(vmlinux.section_bytes(section), base)
}

/// Decodes all symbols from the bytes of `.rodata`; `base` is where `.text` starts, from which addresses count.
pub fn decode(data: &[u8], base: LinkVa) -> Result<Vec<KernelSymbol>, KernelError> {
    let tokens = Tokens::find(data).ok_or(KernelError::Kallsyms("token table"))?;
    let tables = after_names(data, &tokens, base)
        .or_else(|| before_names(data, &tokens, base))
        .ok_or(KernelError::Kallsyms("names and markers"))?;
    let mut symbols = Vec::with_capacity(tables.count);
    let mut at = tables.names;
    for index in 0..tables.count {
        let text = tokens
            .expand(data, &mut at)
            .ok_or(KernelError::Kallsyms("names"))?;
        let offset =
            word(data, tables.offsets + index * 4).ok_or(KernelError::Kallsyms("offsets"))?;
        let (letter, name) = text.split_first().ok_or(KernelError::Kallsyms("a name"))?;
        symbols.push(KernelSymbol {
            at: address(offset as i32, base),
            letter: *letter,
            name: String::from_utf8_lossy(name).into_owned(),
        });
    }
    symbols.sort_by_key(|symbol| symbol.at);
    Ok(symbols)
}

/// With `KALLSYMS_ABSOLUTE_PERCPU`, as on every SMP x86-64 kernel, an offset that is not negative is an absolute value and
/// any other counts down from the base (kernel/kallsyms.c, `kallsyms_sym_address`).
fn address(offset: i32, base: LinkVa) -> LinkVa {
    if offset >= 0 {
        return LinkVa(offset as u64);
    }
    LinkVa(
        base.0
            .wrapping_sub(1)
            .wrapping_add_signed(-i64::from(offset)),
    )
}

struct Tokens {
    /// Start of the 256 NUL-terminated tokens.
    start: usize,
    /// Start of each token.
    at: [usize; 256],
    /// First byte after the token index.
    end: usize,
}

impl Tokens {
    /// Digits are tokens of their own in every kernel, ten in a row; the index that follows proves the find.
    fn find(data: &[u8]) -> Option<Tokens> {
        let digits = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
        let mut from = 0;
        while let Some(hit) = memmem::find(&data[from..], digits) {
            let hit = from + hit;
            if let Some(tokens) = Tokens::around(data, hit) {
                return Some(tokens);
            }
            from = hit + 1;
        }
        None
    }

    fn around(data: &[u8], digit_zero: usize) -> Option<Tokens> {
        let mut start = digit_zero;
        for _ in 0..usize::from(b'0') {
            // The NUL before `start` ends the previous token, whose own start follows the NUL before that.
            let end = start.checked_sub(1)?;
            start = data[..end].iter().rposition(|byte| *byte == 0)? + 1;
        }
        let mut at = [0; 256];
        let mut next = start;
        for place in &mut at {
            *place = next;
            next += data.get(next..)?.iter().position(|byte| *byte == 0)? + 1;
        }
        let index = next.next_multiple_of(8);
        for (token, place) in at.iter().enumerate() {
            let bytes = data.get(index + token * 2..index + token * 2 + 2)?;
            if usize::from(u16::from_le_bytes(bytes.try_into().ok()?)) != place - start {
                return None;
            }
        }
        Some(Tokens {
            start,
            at,
            end: index + 512,
        })
    }

    /// The compressed name at `at`: a length (two bytes when the high bit is set), then token numbers.
    fn name<'a>(data: &'a [u8], at: &mut usize) -> Option<&'a [u8]> {
        let mut len = usize::from(*data.get(*at)?);
        *at += 1;
        if len & 0x80 != 0 {
            len = (len & 0x7f) | usize::from(*data.get(*at)?) << 7;
            *at += 1;
        }
        let name = data.get(*at..*at + len)?;
        *at += len;
        (len > 0).then_some(name)
    }

    fn expand(&self, data: &[u8], at: &mut usize) -> Option<Vec<u8>> {
        let mut text = Vec::new();
        for token in Tokens::name(data, at)? {
            let token = &data[self.at[usize::from(*token)]..];
            text.extend(token.iter().take_while(|byte| **byte != 0));
        }
        Some(text)
    }
}

/// Where the tables stand in `.rodata`.
struct Tables {
    offsets: usize,
    names: usize,
    count: usize,
}

/// Linux up to 6.4: offsets, base, count, names, markers, tokens.
fn before_names(data: &[u8], tokens: &Tokens, base: LinkVa) -> Option<Tables> {
    let mut from = 0;
    while let Some(hit) = memmem::find(&data[from..tokens.start], &base.0.to_le_bytes()) {
        let at = from + hit;
        from = at + 1;
        let Some(count) = word(data, at + 8).map(|count| count as usize) else {
            continue;
        };
        let names = at + 16;
        let offsets = (at % 8 == 0)
            .then(|| at.checked_sub((count * 4).next_multiple_of(8)))
            .flatten();
        if let Some(offsets) = offsets
            && names_reach_tokens(data, names, count, tokens)
        {
            return Some(Tables {
                offsets,
                names,
                count,
            });
        }
    }
    None
}

/// Linux from 6.5 on: count, names, markers, tokens, offsets, base.
fn after_names(data: &[u8], tokens: &Tokens, base: LinkVa) -> Option<Tables> {
    let offsets = tokens.end.next_multiple_of(8);
    let hit = memmem::find(data.get(offsets..)?, &base.0.to_le_bytes())?;
    // The base is aligned to 8, so the count is one of two.
    for count in [(hit / 4), (hit / 4).checked_sub(1)?] {
        let wanted = (count as u32).to_le_bytes();
        let mut from = 0;
        while let Some(hit) = memmem::find(&data[from..tokens.start], &wanted) {
            let names = from + hit + 8;
            from += hit + 1;
            if names.is_multiple_of(8) && names_reach_tokens(data, names, count, tokens) {
                return Some(Tables {
                    offsets,
                    names,
                    count,
                });
            }
        }
    }
    None
}

/// Whether `count` names from `names` on end where markers begin that hold each 256th name's offset, up to the tokens.
fn names_reach_tokens(data: &[u8], names: usize, count: usize, tokens: &Tokens) -> bool {
    if !(1000..10_000_000).contains(&count) {
        return false;
    }
    let mut marks = Vec::with_capacity(count / 256 + 1);
    let mut at = names;
    for index in 0..count {
        if index % 256 == 0 {
            marks.push(at - names);
        }
        if at >= tokens.start || Tokens::name(data, &mut at).is_none() {
            return false;
        }
    }
    let markers = at.next_multiple_of(8);
    marks
        .iter()
        .enumerate()
        .all(|(index, mark)| word(data, markers + index * 4) == Some(*mark as u32))
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}
