//! Sets in three hashed parts: whatever is in one stands at one of three places (cuckoo hashing), so a thunk looks at three
//! words and needs no more than two registers.

use super::Named;
use super::assembler::{Thunk, imm32};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use penumbra_bundle::{LinkVa, Table, TableKind, TextOff, VaRange};

/// Stands where nothing stands: no word of a set is so large.
const NONE: u32 = u32::MAX;
/// Multipliers of the three hashes: odd, their bits mixed (the fractions of the square roots of 2, 5 and 19), and none like an
/// address of the kernel, so that nobody takes one for something to relocate.
const MULTIPLIERS: [u32; 3] = [0x6a09_e667, 0x3c6e_f373, 0x5be0_cd19];
/// Three places for each member let a table be filled to 91 %; a little less is found without a search.
const FILL_PERCENT: usize = 80;
/// How far an offset is moved up to make room for a number of argument registers.
pub const ARITY_BITS: u32 = 3;
/// The fewest bits of an index.
const LEAST_BITS: u32 = 4;

/// How many bits of a word in a table of classes of offsets in `covers` are an offset, and the numbers that classes may have, which
/// the rest holds: the last is that of no word, and with 10 in its upmost bits a constant would look like an address.
pub fn class_numbers(covers: VaRange) -> (u32, Vec<u32>) {
    let offset_bits = u64::BITS - (covers.len() - 1).leading_zeros();
    let free = 0..(1u32 << (u32::BITS - offset_bits)) - 1;
    let free = free.filter(|number| (number << offset_bits) >> 30 != 0b10);
    (offset_bits, free.collect())
}

/// A member: what its place is made from, and the word that stands there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Member {
    key: u32,
    word: u32,
}

/// The encoded set, placed.
pub struct HashedTable {
    table: Table,
    words: Vec<u32>,
    bits: [u32; 3],
}

/// What a thunk needs to know about it.
#[derive(Clone, Copy, Debug)]
pub struct Hashed {
    start: LinkVa,
    bits: [u32; 3],
}

/// One of the three parts.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Where it lies.
    start: LinkVa,
    /// What keys are multiplied with, modulo 2^32.
    multiplier: u32,
    /// How far a product is shifted down to be an index.
    shift: u32,
}

impl Part {
    /// Makes `index` the index of `key`.
    pub fn index(
        &self,
        a: &mut CodeAssembler,
        index: AsmRegister32,
        key: AsmRegister32,
    ) -> Result<(), IcedError> {
        a.imul_3(index, key, self.multiplier as i32)?;
        a.shr(index, self.shift)
    }

    /// Compares the word at `index`, made by [`Part::index`], with `word`: they are equal or not.
    pub fn compare(
        &self,
        thunk: &mut Thunk,
        word: AsmRegister32,
        index: AsmRegister64,
    ) -> Result<(), IcedError> {
        let start = i64::from(imm32(self.start));
        thunk.asm.cmp(word, dword_ptr(index * 4 + start))?;
        thunk.absolute();
        Ok(())
    }

    /// Goes to `found` when the word at `index`, made by [`Part::index`], is that of `key` with at most `arity` registers.
    /// Changes `index`.
    pub fn compare_arity(
        &self,
        thunk: &mut Thunk,
        key: AsmRegister32,
        index: (AsmRegister64, AsmRegister32),
        arity: u8,
        found: CodeLabel,
    ) -> Result<(), IcedError> {
        let start = i64::from(imm32(self.start));
        thunk.asm.mov(index.1, dword_ptr(index.0 * 4 + start))?;
        thunk.absolute();
        let a = &mut thunk.asm;
        a.sub(index.1, key)?;
        a.cmp(index.1, i32::from(arity) + 1)?;
        a.jb(found)
    }
}

impl Hashed {
    /// The three parts.
    pub fn parts(&self) -> [Part; 3] {
        let mut start = self.start;
        std::array::from_fn(|index| {
            let part = Part {
                start,
                multiplier: MULTIPLIERS[index],
                shift: 32 - self.bits[index],
            };
            start = LinkVa(start.0 + (4 << self.bits[index]));
            part
        })
    }
}

impl HashedTable {
    /// Encodes `members`, offsets in `covers`, and places the table at `at`.
    pub fn build(name: &str, members: &[TextOff], covers: VaRange, at: LinkVa) -> HashedTable {
        let members = members.iter().map(|at| Member {
            key: at.0,
            word: at.0,
        });
        HashedTable::of(
            name,
            TableKind::HashedOffsets,
            members.collect(),
            covers,
            at,
        )
    }

    /// Encodes classes of offsets in `covers`: the word of an offset in class `n` has `n` in the bits from `offset_bits` on.
    pub fn of_classes(
        name: &str,
        classes: &[(u32, &[TextOff])],
        offset_bits: u32,
        covers: VaRange,
        at: LinkVa,
    ) -> HashedTable {
        let members = classes.iter().flat_map(|(class, members)| {
            let words = members.iter().map(move |at| class << offset_bits | at.0);
            words.map(|word| Member { key: word, word })
        });
        let kind = TableKind::HashedClasses { offset_bits };
        HashedTable::of(name, kind, members.collect(), covers, at)
    }

    /// Encodes entries in `covers` with the number of argument registers that each reads at least.
    pub fn of_arities(
        name: &str,
        entries: &[(TextOff, u8)],
        covers: VaRange,
        at: LinkVa,
    ) -> HashedTable {
        let members = entries.iter().map(|(at, arity)| {
            let key = at.0 << ARITY_BITS;
            let word = key | u32::from(*arity);
            Member { key, word }
        });
        let kind = TableKind::HashedArities;
        HashedTable::of(name, kind, members.collect(), covers, at)
    }

    fn of(
        name: &str,
        kind: TableKind,
        members: Vec<Member>,
        covers: VaRange,
        at: LinkVa,
    ) -> HashedTable {
        let room = members.len() * 100 / FILL_PERCENT;
        let mut sizes = (LEAST_BITS..).flat_map(|bits| {
            // Twice a power of two, two and a half times, three times; the last with as much as can be where thunks look first.
            [[1, 0, 0], [1, 1, 0], [2, 0, 0], [1, 1, 1]].map(|more| more.map(|more| bits + more))
        });
        let (bits, words) = sizes
            .by_ref()
            .filter(|bits| capacity(*bits) > room)
            .find_map(|bits| Some((bits, fill(&members, bits)?)))
            .expect("sizes grow without end");
        let end = LinkVa(at.0 + words.len() as u64 * 4);
        HashedTable {
            table: Table {
                name: name.to_owned(),
                kind,
                range: VaRange { start: at, end },
                covers,
                count: members.len() as u64,
            },
            words,
            bits,
        }
    }

    /// The first address behind it.
    pub fn end(&self) -> LinkVa {
        self.table.range.end
    }

    /// What thunks need.
    pub fn hashed(&self) -> Hashed {
        Hashed {
            start: self.table.range.start,
            bits: self.bits,
        }
    }

    /// Appends its bytes, symbol and description.
    pub fn append(
        self,
        start: LinkVa,
        bytes: &mut Vec<u8>,
        named: &mut Vec<Named>,
        tables: &mut Vec<Table>,
    ) {
        bytes.resize((self.table.range.start.0 - start.0) as usize, 0);
        bytes.extend(self.words.iter().flat_map(|word| word.to_le_bytes()));
        named.push(Named {
            name: self.table.name.clone(),
            range: self.table.range,
        });
        tables.push(self.table);
    }
}

/// How many words the parts have together.
fn capacity(bits: [u32; 3]) -> usize {
    bits.iter().map(|bits| 1 << bits).sum()
}

fn place(key: u32, part: usize, bits: [u32; 3]) -> usize {
    let before: usize = bits[..part].iter().map(|bits| 1 << bits).sum();
    before + (key.wrapping_mul(MULTIPLIERS[part]) >> (32 - bits[part])) as usize
}

fn fill(members: &[Member], bits: [u32; 3]) -> Option<Vec<u32>> {
    let place = |member: &Member, part| place(member.key, part, bits);
    let places = settle(members, 3, capacity(bits), place)?;
    let word = |place: &Option<Member>| place.map_or(NONE, |member| member.word);
    Some(places.iter().map(word).collect())
}

/// Puts every member at one of its places, moving others on where there is no room (cuckoo hashing); none when they go round in
/// circles.
pub fn settle<T: Copy>(
    members: &[T],
    parts: usize,
    capacity: usize,
    place: impl Fn(&T, usize) -> usize,
) -> Option<Vec<Option<T>>> {
    let mut places: Vec<Option<T>> = vec![None; capacity];
    for member in members {
        let (mut next, mut part) = (Some(*member), 0);
        let mut moves = 0;
        while let Some(member) = next {
            let own = (0..parts).map(|part| place(&member, part));
            if let Some(at) = own.into_iter().find(|at| places[*at].is_none()) {
                places[at] = Some(member);
                break;
            }
            let at = place(&member, part);
            next = places[at].replace(member);
            // Not back to where it comes from.
            part = (part + 1 + moves % (parts - 1)) % parts;
            moves += 1;
            if moves > members.len().max(64) {
                return None;
            }
        }
    }
    Some(places)
}

#[cfg(test)]
mod tests {
    use super::{HashedTable, NONE, place};
    use penumbra_bundle::{LinkVa, TextOff, VaRange};

    fn covers() -> VaRange {
        let start = LinkVa(0xffff_ffff_8100_0000);
        let end = LinkVa(start.0 + 0x100_0000);
        VaRange { start, end }
    }

    fn stands(table: &HashedTable, word: u32) -> bool {
        let mut places = (0..3).map(|part| place(word, part, table.bits));
        places.any(|at| table.words[at] == word)
    }

    #[test]
    fn every_member_stands_at_one_of_its_three_places_and_nothing_else_anywhere() {
        let members: Vec<TextOff> = (0..20_000).map(|n| TextOff(n * 613 + n % 7)).collect();
        let table = HashedTable::build("x", &members, covers(), covers().start);
        for member in &members {
            assert!(stands(&table, member.0), "{member:?}");
        }
        let held = table.words.iter().filter(|word| **word != NONE).count();
        assert_eq!(held, members.len());
        assert!(table.words.len() <= 1 << 15, "{}", table.words.len());
    }

    #[test]
    fn an_offset_stands_once_for_each_class_that_it_is_in() {
        let one: Vec<TextOff> = (0..9_000).map(|n| TextOff(n * 1616)).collect();
        let other: Vec<TextOff> = (0..3_000).map(|n| TextOff(n * 4848)).collect();
        let classes = [(0, &one[..]), (200, &other[..]), (7, &[])];
        let table = HashedTable::of_classes("x", &classes, 24, covers(), covers().start);
        for (class, members) in classes {
            for at in &one {
                let holds = stands(&table, class << 24 | at.0);
                assert_eq!(holds, members.contains(at), "{class} {at:?}");
            }
        }
        let held = table.words.iter().filter(|word| **word != NONE).count();
        assert_eq!(held, one.len() + other.len());
    }
}
