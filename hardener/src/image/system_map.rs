//! `System.map` (scripts/mksysmap): what `nm -n` says of a `vmlinux`, a symbol a line: address, kind, name.

use super::elf::TOP;
use super::{Fault, KernelSymbol, MAX_NAME, MAX_SYMBOLS};
use penumbra_bundle::LinkVa;
use std::collections::HashMap;

/// The largest file that is read; Debian's have 6 MB.
pub const MAX_FILE: u64 = 256 << 20;

/// Reads all symbols.
pub fn read(file: &[u8]) -> Result<Vec<KernelSymbol>, Fault> {
    let mut symbols = Vec::new();
    for (number, line) in (1..).zip(file.split(|byte| *byte == b'\n')) {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        if symbols.len() >= MAX_SYMBOLS {
            let detail = format!("no kernel has more than {MAX_SYMBOLS} symbols");
            return Err(Fault::unsupported(format!("line {number}"), detail));
        }
        symbols.push(symbol(line).map_err(|what| {
            let what = format!("{what}; give the System.map that was built with this kernel");
            Fault::unsupported(format!("line {number}"), what)
        })?);
    }
    if symbols.is_empty() {
        return Err(Fault::unsupported("System.map", "has no symbols"));
    }
    Ok(symbols)
}

fn symbol(line: &[u8]) -> Result<KernelSymbol, &'static str> {
    let line = std::str::from_utf8(line).map_err(|_| "is not text")?;
    let mut words = line.split_ascii_whitespace();
    let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else {
        return Err("is no `ADDRESS KIND NAME`, as in `ffffffff81000000 T _stext`");
    };
    if line.contains("The real System.map is in") {
        return Err("says that this file stands in for one in a package of debugging symbols");
    }
    if words.next().is_some() {
        return Err("has more than address, kind and name");
    }
    let digits = address.len() <= 16 && address.bytes().all(|digit| digit.is_ascii_hexdigit());
    let va = u64::from_str_radix(address, 16).ok().filter(|_| digits);
    let va = va.ok_or("does not start with an address of 16 hexadecimal digits")?;
    if va > TOP {
        return Err("has an address that no kernel is linked to");
    }
    let [kind] = kind.as_bytes() else {
        return Err("has a kind that is no single letter");
    };
    if !kind.is_ascii_alphabetic() {
        return Err("has a kind that is no letter");
    }
    if name.len() > MAX_NAME || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("has a name that no symbol has");
    }
    Ok(KernelSymbol {
        va: LinkVa(va),
        kind: *kind,
        name: name.to_owned(),
    })
}

/// Refuses a map that puts a name elsewhere than the image's own symbols do: it is another kernel's.
pub fn agrees(map: &[KernelSymbol], own: &[KernelSymbol]) -> Result<(), Fault> {
    let mut places: HashMap<&str, Vec<LinkVa>> = HashMap::new();
    for symbol in map {
        places.entry(&symbol.name).or_default().push(symbol.va);
    }
    for symbol in own {
        let there = places.get(symbol.name.as_str());
        if let Some(there) = there.filter(|there| !there.contains(&symbol.va)) {
            let detail = format!(
                "is at {}, the image's own symbols have it at {}; give the System.map of this kernel, or none: the image names \
                 its symbols itself",
                there[0], symbol.va
            );
            return Err(Fault::unsupported(format!("`{}`", symbol.name), detail));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{agrees, read};

    #[test]
    fn a_line_is_a_symbol() {
        let found = read(b"0000000000000000 D __per_cpu_start\n\nffffffff81000000 T _stext\r\nffffffff81000000 t a.b$c\n");
        let found: Vec<(u64, char, String)> = found
            .unwrap()
            .into_iter()
            .map(|symbol| (symbol.va.0, char::from(symbol.kind), symbol.name))
            .collect();
        let stext = 0xffff_ffff_8100_0000;
        let expected = [
            (0, 'D', "__per_cpu_start"),
            (stext, 'T', "_stext"),
            (stext, 't', "a.b$c"),
        ];
        assert_eq!(
            found,
            expected.map(|(va, kind, name)| (va, kind, name.to_owned()))
        );
    }

    #[test]
    fn what_is_no_symbol_is_named_by_its_line() {
        let long = format!("ffffffff81000010 t {}", "x".repeat(5000));
        for (bad, why) in [
            ("ffffffff81000010 t", "is no `ADDRESS KIND NAME`"),
            ("ffffffff81000010 t a b", "has more than"),
            ("ffffffff8100001g t a", "hexadecimal"),
            ("+fffffff81000010 t a", "hexadecimal"),
            ("0ffffffff81000010 t a", "hexadecimal"),
            ("ffffffffffffffff A a", "linked to"),
            ("ffffffff81000010 tt a", "no single letter"),
            ("ffffffff81000010 5 a", "no letter"),
            ("ffffffff81000010 t a\u{e9}", "a name that no symbol has"),
            (long.as_str(), "a name that no symbol has"),
            // As Debian's package of the kernel has it in /boot.
            (
                "ffffffffffffffff B The real System.map is in the linux-image-6.1.0-56-cloud-amd64-dbg package",
                "stands in for one",
            ),
        ] {
            let said = read(format!("ffffffff81000000 T a\n{bad}\n").as_bytes());
            let said = said.unwrap_err().to_string();
            assert!(
                said.starts_with("line 2: ") && said.contains(why),
                "{bad}: {said}"
            );
        }
        assert!(
            read(b"\xff\xfe")
                .unwrap_err()
                .to_string()
                .contains("is not text")
        );
        assert!(read(b" \n").unwrap_err().to_string().contains("no symbols"));
    }

    #[test]
    fn another_kernels_map_is_told_by_the_symbol() {
        let own =
            read(b"ffffffff81000000 T a\nffffffff81000010 t b\nffffffff81000020 t b\n").unwrap();
        // More names, and fewer, are no contradiction.
        let more =
            read(b"ffffffff81000020 t b\nffffffff81000010 t b\nffffffff81000040 t c\n").unwrap();
        assert!(agrees(&more, &own).is_ok());
        let other = read(b"ffffffff81000000 T a\nffffffff81000010 t b\n").unwrap();
        let said = agrees(&other, &own).unwrap_err().to_string();
        assert!(
            said.starts_with("`b`: is at 0xffffffff81000010")
                && said.contains("0xffffffff81000020"),
            "{said}"
        );
    }
}
