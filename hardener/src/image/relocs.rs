//! KASLR relocations: lists of 32-bit addresses behind the ELF file (arch/x86/tools/relocs.c, `emit_relocs`; read as
//! arch/x86/boot/compressed/misc.c, `handle_relocations`, reads them: backwards from the end).

use super::Fault;
use penumbra_bundle::LinkVa;

/// Places that the decompressor changes by the slide. Each list is sorted.
#[derive(Clone, Debug, Default)]
pub struct Relocs {
    /// 32-bit sign-extended absolute addresses: the slide is added.
    pub abs32: Vec<LinkVa>,
    /// 32-bit offsets to zero-based per-cpu data: the slide is subtracted.
    pub inverse32: Vec<LinkVa>,
    /// 64-bit absolute addresses: the slide is added.
    pub abs64: Vec<LinkVa>,
}

/// Reads the relocations that follow offset `end` of `bytes`.
pub fn read(bytes: &[u8], end: usize) -> Result<Relocs, Fault> {
    let missing = || {
        Fault::unsupported(
            "relocations",
            "none follow the ELF file, so which functions have their address taken is not known; give the vmlinuz, or the vmlinux inside it as it is unpacked",
        )
    };
    let tail = bytes
        .get(end..)
        .filter(|tail| tail.len() >= 12)
        .ok_or_else(missing)?;
    // Section headers end on a multiple of 8, lists hold words of 4.
    let words = tail
        .rchunks_exact(4)
        .map(|word| i32::from_le_bytes(word.try_into().expect("four bytes")));
    let mut lists: Vec<Vec<LinkVa>> = vec![Vec::new()];
    for word in words {
        if word == 0 {
            lists.push(Vec::new());
            if lists.len() > 3 {
                break;
            }
        } else {
            let list = lists.last_mut().expect("never empty");
            list.push(LinkVa(i64::from(word) as u64));
        }
    }
    // Three lists, each ended by a zero; the fourth, empty one shows that the third was ended too.
    if lists.len() != 4 {
        return Err(Fault::damaged(
            "relocations",
            format!("{} of 3 lists are ended by a zero", lists.len() - 1),
        ));
    }
    for list in &mut lists {
        list.sort_unstable();
        if list
            .first()
            .is_some_and(|first| first.0 >> 31 != 0x1_ffff_ffff)
        {
            return Err(Fault::damaged(
                "relocations",
                format!("{} is no kernel address", list[0]),
            ));
        }
    }
    lists.pop();
    let abs64 = lists.pop().unwrap_or_default();
    let inverse32 = lists.pop().unwrap_or_default();
    let abs32 = lists.pop().unwrap_or_default();
    if abs32.is_empty() || abs64.is_empty() {
        return Err(missing());
    }
    Ok(Relocs {
        abs32,
        inverse32,
        abs64,
    })
}

#[cfg(test)]
mod tests {
    use super::read;
    use penumbra_bundle::LinkVa;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn three_lists_are_read_from_the_end() {
        let bytes = words(&[
            0xeeee_eeee,
            0,
            0x8100_0040,
            0,
            0x8100_0030,
            0,
            0x8100_0020,
            0x8100_0010,
        ]);
        let relocs = read(&bytes, 4).unwrap();
        let va = |low: u64| LinkVa(0xffff_ffff_0000_0000 | low);
        assert_eq!(relocs.abs64, [va(0x8100_0040)]);
        assert_eq!(relocs.inverse32, [va(0x8100_0030)]);
        assert_eq!(relocs.abs32, [va(0x8100_0010), va(0x8100_0020)]);
    }

    #[test]
    fn what_is_no_relocation_list_is_refused() {
        let cases: [(&[u32], &str); 4] = [
            (&[], "none follow"),
            (&[0x8100_0010, 0x8100_0020, 0x8100_0030], "0 of 3 lists"),
            (
                &[0, 0x8100_0040, 0, 0x8100_0030, 0, 0x1000],
                "is no kernel address",
            ),
            (&[0, 0, 0, 0x8100_0010], "none follow"),
        ];
        for (list, expected) in cases {
            let said = read(&words(list), 0).unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        }
    }
}
