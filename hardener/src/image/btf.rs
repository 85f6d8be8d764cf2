//! BTF, the kernel's own type information (Documentation/bpf/btf.rst): sizes of structures and offsets of their members.

use super::Fault;
use super::read::Reader;
use std::collections::{HashMap, HashSet};

const MAGIC: u16 = 0xeb9f;
const KIND_INT: u32 = 1;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_ENUM64: u32 = 19;
/// Anonymous structures nest a few deep; deeper is a cycle.
const MAX_DEPTH: u32 = 16;

/// Where a member stands in its structure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Member {
    /// Bits from the structure's start.
    pub bit: u32,
}

impl Member {
    /// Bytes from the structure's start; `None` for a bit-field that starts inside a byte.
    pub fn byte(self) -> Option<u32> {
        self.bit.is_multiple_of(8).then_some(self.bit / 8)
    }
}

/// A structure or union: its size and where its members are listed.
#[derive(Clone, Copy)]
struct Composite {
    size: u32,
    members: u32,
    count: u32,
    bitfields: bool,
}

/// The parsed section: structures, unions, enumerations and names of functions are kept.
#[derive(Default)]
pub struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
    composites: HashMap<u32, Composite>,
    by_name: HashMap<String, u32>,
    /// Enumerations of 32 bits by name: where their values are listed, and how many there are.
    enumerations: HashMap<String, (u32, u32)>,
    functions: HashSet<String>,
}

impl Btf {
    /// Parses the `.BTF` section.
    pub fn parse(section: &[u8]) -> Result<Btf, Fault> {
        let damaged = |detail: String| Fault::damaged(".BTF", detail);
        let mut header = Reader::new(section, 0);
        if header.u16() != Some(MAGIC) {
            return Err(damaged("does not start with the BTF magic".to_owned()));
        }
        let fields = || -> Option<[u32; 5]> {
            let mut reader = Reader::new(section, 4);
            Some([
                reader.u32()?,
                reader.u32()?,
                reader.u32()?,
                reader.u32()?,
                reader.u32()?,
            ])
        };
        let [header_len, type_off, type_len, str_off, str_len] =
            fields().ok_or_else(|| damaged("ends inside its header".to_owned()))?;
        let part = |what: &str, offset: u32, len: u32| {
            let start = u64::from(header_len) + u64::from(offset);
            let end = start + u64::from(len);
            let bytes =
                (end <= section.len() as u64).then(|| &section[start as usize..end as usize]);
            bytes.ok_or_else(|| damaged(format!("its {what} leave the section")))
        };
        let mut btf = Btf {
            types: part("types", type_off, type_len)?.to_vec(),
            strings: part("strings", str_off, str_len)?.to_vec(),
            ..Btf::default()
        };
        let mut reader = Reader::new(&btf.types, 0);
        let (mut composites, mut functions, mut enumerations) =
            (Vec::new(), Vec::new(), Vec::new());
        let mut id = 1;
        while reader.position() < btf.types.len() {
            let at = reader.position();
            let one = read_type(&mut reader).ok_or_else(|| {
                damaged(format!(
                    "type {id} at {at:#x} leaves the section or is of an unknown kind"
                ))
            })?;
            match one {
                Some((name, Kept::Composite(composite))) => composites.push((id, name, composite)),
                Some((name, Kept::Function)) => functions.push(name),
                Some((name, Kept::Enumeration(list))) => enumerations.push((name, list)),
                None => {}
            }
            id += 1;
        }
        let functions = functions.into_iter().filter_map(|name| btf.string(name));
        btf.functions = functions.map(str::to_owned).collect();
        let enumerations = enumerations.into_iter().filter_map(|(name, list)| {
            let name = btf.string(name).filter(|name| !name.is_empty())?;
            Some((name.to_owned(), list))
        });
        btf.enumerations = enumerations.collect();
        for (id, name, composite) in composites {
            btf.composites.insert(id, composite);
            // Structures come before forward declarations and never twice under one name in a kernel; the first wins.
            if let Some(name) = btf
                .string(name)
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
            {
                btf.by_name.entry(name).or_insert(id);
            }
        }
        Ok(btf)
    }

    fn string(&self, offset: u32) -> Option<&str> {
        let bytes = self.strings.get(offset as usize..)?;
        let len = bytes.iter().position(|byte| *byte == 0)?;
        std::str::from_utf8(&bytes[..len]).ok()
    }

    /// Whether a function of this name was compiled: assembly has no types.
    pub fn is_function(&self, name: &str) -> bool {
        self.functions.contains(name)
    }

    /// The size in bytes of the structure called `name`.
    pub fn size_of(&self, name: &str) -> Option<u32> {
        Some(self.composites.get(self.by_name.get(name)?)?.size)
    }

    /// Where `member` stands in the structure called `name`, also through anonymous structures and unions.
    pub fn member(&self, name: &str, member: &str) -> Option<Member> {
        let id = *self.by_name.get(name)?;
        self.find(id, member, MAX_DEPTH).map(|bit| Member { bit })
    }

    /// The names and values of the enumeration called `name`.
    pub fn enumeration(&self, name: &str) -> Option<Vec<(&str, u32)>> {
        let (start, count) = *self.enumerations.get(name)?;
        let mut reader = Reader::new(&self.types, start as usize);
        let values = (0..count).map(|_| {
            let (name, value) = (reader.u32()?, reader.u32()?);
            Some((self.string(name)?, value))
        });
        values.collect()
    }

    fn find(&self, id: u32, wanted: &str, depth: u32) -> Option<u32> {
        let composite = self.composites.get(&id)?;
        let mut reader = Reader::new(&self.types, composite.members as usize);
        let mut inner = Vec::new();
        for _ in 0..composite.count {
            let (name, kind, offset) = (reader.u32()?, reader.u32()?, reader.u32()?);
            // With bit-fields the upper eight bits are the width.
            let bit = if composite.bitfields {
                offset & 0xff_ffff
            } else {
                offset
            };
            match self.string(name) {
                Some("") | None => inner.push((kind, bit)),
                Some(name) if name == wanted => return Some(bit),
                Some(_) => {}
            }
        }
        let deeper = depth.checked_sub(1)?;
        inner
            .into_iter()
            .find_map(|(kind, bit)| self.find(kind, wanted, deeper)?.checked_add(bit))
    }
}

/// What is kept of a type.
enum Kept {
    Composite(Composite),
    Function,
    Enumeration((u32, u32)),
}

/// Skips one type; what is kept comes back with its name's offset.
fn read_type(reader: &mut Reader<'_>) -> Option<Option<(u32, Kept)>> {
    let (name, info, size) = (reader.u32()?, reader.u32()?, reader.u32()?);
    let (count, kind) = (info & 0xffff, info >> 24 & 0x1f);
    let members = reader.position() as u32;
    let each = match kind {
        KIND_STRUCT | KIND_UNION => 12 * count,
        KIND_ENUM | KIND_FUNC_PROTO => 8 * count,
        KIND_DATASEC | KIND_ENUM64 => 12 * count,
        KIND_ARRAY => 12,
        KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
        1..=19 => 0,
        _ => return None,
    };
    reader.take(each as usize)?;
    let composite = Composite {
        size,
        members,
        count,
        bitfields: info >> 31 == 1,
    };
    Some(match kind {
        KIND_STRUCT | KIND_UNION => Some((name, Kept::Composite(composite))),
        KIND_FUNC => Some((name, Kept::Function)),
        KIND_ENUM => Some((name, Kept::Enumeration((members, count)))),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::Btf;

    /// `struct outer { int a; union { struct { int b; int c:3; }; long d; }; }`, size 24, with its anonymous parts, and
    /// `enum kind { NONE = -1, ONE = 1 }`.
    fn section() -> Vec<u8> {
        let strings = b"\0int\0outer\0a\0b\0c\0d\0long\0kind\0NONE\0ONE\0";
        let name = |wanted: &str| {
            let wanted = [b"\0", wanted.as_bytes(), b"\0"].concat();
            strings
                .windows(wanted.len())
                .position(|window| window == wanted)
                .unwrap() as u32
                + 1
        };
        let (int, composite) = (1 << 24, |kind: u32, flag: u32, count: u32| {
            flag << 31 | kind << 24 | count
        });
        let types: Vec<u32> = [
            vec![name("int"), int, 4, 32],
            vec![name("long"), int, 8, 64],
            // 3: the inner structure, with bit-fields; 4: the union; 5: outer.
            vec![
                0,
                composite(4, 1, 2),
                8,
                name("b"),
                1,
                0,
                name("c"),
                1,
                3 << 24 | 35,
            ],
            vec![0, composite(5, 0, 2), 8, 0, 3, 0, name("d"), 2, 0],
            vec![
                name("outer"),
                composite(4, 0, 2),
                24,
                name("a"),
                1,
                0,
                0,
                4,
                64,
            ],
            vec![
                name("kind"),
                composite(6, 1, 2),
                4,
                name("NONE"),
                u32::MAX,
                name("ONE"),
                1,
            ],
        ]
        .concat();
        let mut out = vec![0x9f, 0xeb, 1, 0];
        let lengths = [
            24,
            0,
            types.len() as u32 * 4,
            types.len() as u32 * 4,
            strings.len() as u32,
        ];
        out.extend(
            lengths
                .iter()
                .chain(&types)
                .flat_map(|word| word.to_le_bytes()),
        );
        out.extend(strings);
        out
    }

    #[test]
    fn members_are_found_through_anonymous_parts() {
        let btf = Btf::parse(&section()).unwrap();
        assert_eq!(btf.size_of("outer"), Some(24));
        let byte = |member| btf.member("outer", member).map(|found| found.byte());
        assert_eq!(byte("a"), Some(Some(0)));
        assert_eq!(byte("b"), Some(Some(8)));
        assert_eq!(byte("d"), Some(Some(8)));
        assert_eq!(btf.member("outer", "c").unwrap().bit, 64 + 35);
        assert_eq!(byte("c"), Some(None), "a bit-field inside a byte");
        assert_eq!(byte("missing"), None);
        assert_eq!(btf.member("nobody", "a"), None);
        let kind = vec![("NONE", u32::MAX), ("ONE", 1)];
        assert_eq!(btf.enumeration("kind"), Some(kind));
        assert_eq!(btf.enumeration("outer"), None);
    }

    #[test]
    fn no_truncation_or_damaged_byte_panics() {
        let whole = section();
        for end in 0..whole.len() {
            assert!(Btf::parse(&whole[..end]).is_err(), "{end}");
        }
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut damaged = whole.clone();
                damaged[at] ^= 1 << bit;
                // A cycle of anonymous structures must end too.
                if let Ok(btf) = Btf::parse(&damaged) {
                    let _ = (btf.member("outer", "missing"), btf.enumeration("kind"));
                }
            }
        }
    }
}
