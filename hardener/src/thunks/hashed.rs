//! A set of offsets in three hashed parts: whatever is in it stands at one of three places (cuckoo hashing), so a thunk looks
//! at three words and needs no more than two registers.

use super::Named;
use penumbra_bundle::{LinkVa, Table, TableKind, TextOff, VaRange};

/// No text offset is so large.
const NONE: u32 = u32::MAX;
/// Multipliers of the three hashes: odd, their bits mixed (the fractions of the square roots of 2, 5 and 19), and none like an
/// address of the kernel, so that nobody takes one for something to relocate.
const MULTIPLIERS: [u32; 3] = [0x6a09_e667, 0x3c6e_f373, 0x5be0_cd19];
/// Three places for each member let a table be filled to 91 %; a little less is found without a search.
const FILL_PERCENT: usize = 80;

/// The encoded set, placed.
pub struct HashedTable {
    table: Table,
    words: Vec<u32>,
    bits: u32,
}

/// What a thunk needs to know about it.
#[derive(Clone, Copy, Debug)]
pub struct Hashed {
    start: LinkVa,
    bits: u32,
    /// How far a product is shifted down to be an index.
    pub shift: u32,
}

impl Hashed {
    /// The three parts: where each lies, and its multiplier.
    pub fn parts(&self) -> [(LinkVa, u32); 3] {
        let part = |index: usize| {
            let before = (index as u64) << (self.bits + 2);
            (LinkVa(self.start.0 + before), MULTIPLIERS[index])
        };
        [part(0), part(1), part(2)]
    }
}

impl HashedTable {
    /// Encodes `members`, offsets in `covers`, and places the table at `at`.
    pub fn build(name: &str, members: &[TextOff], covers: VaRange, at: LinkVa) -> HashedTable {
        let room = members.len() * 100 / FILL_PERCENT / 3 + 1;
        let mut bits = room.next_power_of_two().trailing_zeros().max(4);
        let words = loop {
            match fill(members, bits) {
                Some(words) => break words,
                None => bits += 1,
            }
        };
        let end = LinkVa(at.0 + words.len() as u64 * 4);
        HashedTable {
            table: Table {
                name: name.to_owned(),
                kind: TableKind::HashedOffsets,
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
            shift: 32 - self.bits,
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

fn place(member: u32, part: usize, bits: u32) -> usize {
    let index = member.wrapping_mul(MULTIPLIERS[part]) >> (32 - bits);
    (part << bits) + index as usize
}

/// Puts every member somewhere, moving others on where there is no room; none when they go round in circles.
fn fill(members: &[TextOff], bits: u32) -> Option<Vec<u32>> {
    let mut words = vec![NONE; 3 << bits];
    for member in members {
        let (mut member, mut part) = (member.0, 0);
        let mut moves = 0;
        while member != NONE {
            let free = (0..3).map(|part| place(member, part, bits));
            if let Some(at) = free.into_iter().find(|at| words[*at] == NONE) {
                words[at] = member;
                break;
            }
            let at = place(member, part, bits);
            member = std::mem::replace(&mut words[at], member);
            // Not back to where it comes from.
            part = (part + 1 + (moves & 1)) % 3;
            moves += 1;
            if moves > members.len().max(64) {
                return None;
            }
        }
    }
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::{HashedTable, NONE, place};
    use penumbra_bundle::{LinkVa, TextOff, VaRange};

    #[test]
    fn every_member_stands_at_one_of_its_three_places_and_nothing_else_anywhere() {
        let start = LinkVa(0xffff_ffff_8100_0000);
        let covers = VaRange {
            start,
            end: LinkVa(start.0 + 0x100_0000),
        };
        let members: Vec<TextOff> = (0..20_000).map(|n| TextOff(n * 613 + n % 7)).collect();
        let table = HashedTable::build("x", &members, covers, start);
        for member in &members {
            let mut places = (0..3).map(|part| place(member.0, part, table.bits));
            assert!(places.any(|at| table.words[at] == member.0), "{member:?}");
        }
        let held = table.words.iter().filter(|word| **word != NONE).count();
        assert_eq!(held, members.len());
        assert!(table.words.len() <= 3 << 14, "{}", table.words.len());
    }
}
