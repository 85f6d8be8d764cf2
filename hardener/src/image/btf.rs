//! BTF, the kernel's own type information (Documentation/bpf/btf.rst): sizes of structures and offsets of their members.

use super::Fault;
use super::read::Reader;
use std::collections::HashMap;

const MAGIC: u16 = 0xeb9f;
const KIND_INT: u32 = 1;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
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

/// The parsed section: only composite types are kept.
#[derive(Default)]
pub struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
    composites: HashMap<u32, Composite>,
    by_name: HashMap<String, u32>,
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
        let mut composites = Vec::new();
        let mut id = 1;
        while reader.position() < btf.types.len() {
            let at = reader.position();
            let one = read_type(&mut reader).ok_or_else(|| {
                damaged(format!(
                    "type {id} at {at:#x} leaves the section or is of an unknown kind"
                ))
            })?;
            if let Some((name, composite)) = one {
                composites.push((id, name, composite));
            }
            id += 1;
        }
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

    /// The size in bytes of the structure called `name`.
    pub fn size_of(&self, name: &str) -> Option<u32> {
        Some(self.composites.get(self.by_name.get(name)?)?.size)
    }

    /// Where `member` stands in the structure called `name`, also through anonymous structures and unions.
    pub fn member(&self, name: &str, member: &str) -> Option<Member> {
        let id = *self.by_name.get(name)?;
        self.find(id, member, MAX_DEPTH).map(|bit| Member { bit })
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

/// Skips one type; a structure or union comes back with its name's offset.
fn read_type(reader: &mut Reader<'_>) -> Option<Option<(u32, Composite)>> {
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
    Some(matches!(kind, KIND_STRUCT | KIND_UNION).then_some((name, composite)))
}
