//! Symbols from a `System.map`, for an image that has none of its own: lines of `nm -n` (Linux, scripts/mksysmap).

use super::KernelError;
use super::kallsyms::KernelSymbol;
use penumbra_bundle::LinkVa;
use std::collections::{BTreeMap, BTreeSet};

/// More lines than any kernel's map has.
const MAX_LINES: usize = 4_000_000;

/// Reads all symbols, by address.
pub fn read(map: &[u8]) -> Result<Vec<KernelSymbol>, KernelError> {
    let text = std::str::from_utf8(map).map_err(|_| KernelError::SystemMap(1, "is not text"))?;
    let mut symbols = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let wrong = |what| KernelError::SystemMap(index + 1, what);
        if index >= MAX_LINES {
            return Err(wrong("is more than a kernel has symbols"));
        }
        if line.trim().is_empty() {
            continue;
        }
        let (address, rest) = line
            .split_once(' ')
            .ok_or_else(|| wrong("has no kind and name"))?;
        let (letter, name) = rest.split_once(' ').ok_or_else(|| wrong("has no name"))?;
        let mut at = 0u64;
        for digit in address.chars() {
            let digit = digit
                .to_digit(16)
                .ok_or_else(|| wrong("has no hexadecimal address"))?;
            let more = at
                .checked_mul(16)
                .and_then(|at| at.checked_add(u64::from(digit)));
            at = more.ok_or_else(|| wrong("has an address of more than 64 bits"))?;
        }
        let name = name.trim_end();
        if address.is_empty() || name.is_empty() || name.contains(char::is_whitespace) {
            return Err(wrong("is not an address, a letter and a name"));
        }
        // Error codes, no addresses (include/linux/err.h).
        if at >= u64::MAX - 0xffff {
            return Err(wrong("has an address where no kernel is"));
        }
        match letter.as_bytes() {
            [letter] if letter.is_ascii_alphabetic() => symbols.push(KernelSymbol {
                at: LinkVa(at),
                letter: *letter,
                name: name.to_owned(),
            }),
            _ => return Err(wrong("has no letter for a kind")),
        }
    }
    if symbols.is_empty() {
        return Err(KernelError::SystemMap(
            1,
            "does not exist: the file is empty",
        ));
    }
    symbols.sort_by_key(|symbol| symbol.at);
    Ok(symbols)
}

/// Fails with the first name that the map has elsewhere than the image's own symbols.
pub fn compare(map: &[KernelSymbol], own: &[KernelSymbol]) -> Result<(), KernelError> {
    let mapped: BTreeSet<(&str, LinkVa)> =
        map.iter().map(|one| (one.name.as_str(), one.at)).collect();
    let first: BTreeMap<&str, LinkVa> = mapped.iter().rev().copied().collect();
    let differs = own.iter().find_map(|one| {
        let said = first.get(one.name.as_str())?;
        (!mapped.contains(&(one.name.as_str(), one.at))).then_some((one, *said))
    });
    match differs {
        None => Ok(()),
        Some((one, said)) => Err(KernelError::OtherMap {
            name: one.name.clone(),
            said,
            found: one.at,
        }),
    }
}
