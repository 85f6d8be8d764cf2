//! A few types of a real `.BTF` section, with what they refer to, renumbered (Documentation/bpf/btf.rst).

use std::collections::{BTreeMap, BTreeSet};

/// How far references are followed; what lies beyond becomes `void`.
const DEPTH: u32 = 2;
/// Functions that are taken.
const FUNCTIONS: usize = 24;
const FUNCTION: u32 = 12;

struct Record {
    name: u32,
    info: u32,
    /// Its size, or the type that it refers to.
    third: u32,
    rest: Vec<u32>,
}

impl Record {
    fn kind(&self) -> u32 {
        self.info >> 24 & 0x1f
    }

    /// Every word that is the number of a type.
    fn types(&mut self) -> Vec<&mut u32> {
        let kind = self.kind();
        let mut found = Vec::new();
        if matches!(kind, 2 | 8..=14 | 17 | 18) {
            found.push(&mut self.third);
        }
        let every = |rest| -> Vec<&mut u32> {
            let numbered = <[u32]>::iter_mut(rest).enumerate();
            let wanted = |n: usize| match kind {
                3 => n < 2,
                4 | 5 => n % 3 == 1,
                13 => n % 2 == 1,
                15 => n.is_multiple_of(3),
                _ => false,
            };
            numbered
                .filter(|(n, _)| wanted(*n))
                .map(|(_, word)| word)
                .collect()
        };
        found.extend(every(&mut self.rest));
        found
    }

    /// Every word that is a name's offset.
    fn names(&mut self) -> Vec<&mut u32> {
        let step = match self.kind() {
            4 | 5 | 19 => 3,
            6 | 13 => 2,
            _ => usize::MAX,
        };
        let members = self
            .rest
            .iter_mut()
            .enumerate()
            .filter(|(n, _)| step < 4 && n.is_multiple_of(step));
        std::iter::once(&mut self.name)
            .chain(members.map(|(_, word)| word))
            .collect()
    }
}

/// The `structures` (and enumerations) of `section`, some functions, one of each kind, and what they refer to.
pub fn cut(section: &[u8], structures: &[&str]) -> Vec<u8> {
    let word = |at: usize| u32::from_le_bytes(section[at..at + 4].try_into().expect("four bytes"));
    let header = word(4) as usize;
    let (types, strings) = (header + word(8) as usize, header + word(16) as usize);
    let end = types + word(12) as usize;
    let string = |offset: u32| -> &[u8] {
        section[strings + offset as usize..]
            .split(|byte| *byte == 0)
            .next()
            .expect("a first part")
    };
    let mut records = vec![];
    let mut at = types;
    while at < end {
        let info = word(at + 4);
        let count = (info & 0xffff) as usize;
        let words = match info >> 24 & 0x1f {
            1 | 14 | 17 => 1,
            3 => 3,
            4 | 5 | 15 | 19 => 3 * count,
            6 | 13 => 2 * count,
            _ => 0,
        };
        let rest = (0..words).map(|n| word(at + 12 + 4 * n)).collect();
        records.push(Record {
            name: word(at),
            info,
            third: word(at + 8),
            rest,
        });
        at += 12 + 4 * words;
    }
    let (mut chosen, mut kinds, mut functions) = (BTreeSet::new(), BTreeSet::new(), 0);
    for (id, record) in (1u32..).zip(&records) {
        let kind = record.kind();
        let named = matches!(kind, 4..=6)
            && structures
                .iter()
                .any(|name| name.as_bytes() == string(record.name));
        let function = kind == FUNCTION && functions < FUNCTIONS;
        functions += usize::from(function);
        // The first data section lists thousands of variables.
        if named || function || kind != 15 && kinds.insert(kind) {
            chosen.insert(id);
        }
    }
    let mut border = chosen.clone();
    for _ in 0..DEPTH {
        let referred = border.iter().flat_map(|id| {
            records[*id as usize - 1]
                .types()
                .into_iter()
                .map(|to| *to)
                .collect::<Vec<_>>()
        });
        border = referred.filter(|id| *id != 0).collect::<BTreeSet<u32>>();
        chosen.extend(&border);
    }
    let renumbered: BTreeMap<u32, u32> = chosen.iter().copied().zip(1..).collect();
    let (mut body, mut text) = (Vec::new(), vec![0]);
    let mut offsets = BTreeMap::from([(0, 0)]);
    for id in &chosen {
        let record = &mut records[*id as usize - 1];
        for to in record.types() {
            *to = renumbered.get(to).copied().unwrap_or(0);
        }
        for name in record.names() {
            *name = *offsets.entry(*name).or_insert_with(|| {
                let at = text.len() as u32;
                text.extend(string(*name));
                text.push(0);
                at
            });
        }
        let words = [record.name, record.info, record.third];
        body.extend(
            words
                .iter()
                .chain(&record.rest)
                .flat_map(|word| word.to_le_bytes()),
        );
    }
    let lengths = [
        24,
        0,
        body.len() as u32,
        body.len() as u32,
        text.len() as u32,
    ];
    let mut out = section[..4].to_vec();
    out.extend(lengths.iter().flat_map(|word| word.to_le_bytes()));
    out.extend(body);
    out.extend(text);
    out
}
