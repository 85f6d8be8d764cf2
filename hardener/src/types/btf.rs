//! The types of one kernel as its BTF has them (Linux, Documentation/bpf/btf.rst), dense: one record for each id.

use crate::image::Image;
use crate::image::{Fault, Reader};
use rustc_hash::FxHashMap;

/// The id of `void`.
pub const VOID: u32 = 0;

/// One type. Ids name others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Type {
    /// No type at all.
    Void,
    /// Integer, boolean, floating point or enumeration of so many bytes.
    Scalar(u32),
    /// A pointer.
    Pointer(u32),
    /// Elements of a type, and how many.
    Array(u32, u32),
    /// A structure or union: its size in bytes, its members in [`Btf::members`].
    Composite {
        /// Bytes.
        size: u32,
        /// Index of its first member.
        first: u32,
        /// How many it has.
        count: u32,
        /// Whether its members share their place.
        union: bool,
    },
    /// A structure that is declared only.
    Forward,
    /// A typedef or a qualifier of another type.
    Alias(u32),
    /// What a function takes and gives: return type, first parameter in [`Btf::parameters`], how many.
    Prototype {
        /// The return type.
        returns: u32,
        /// Index of its first parameter.
        first: u32,
        /// How many it has.
        count: u32,
    },
    /// A function of a prototype.
    Function(u32),
    /// A variable of a type.
    Variable(u32),
    /// A section of variables: entries in [`Btf::variables`].
    Section,
    /// A tag; no type.
    Tag,
}

/// A member of a structure or union.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Member {
    /// Its type.
    pub ty: u32,
    /// Bits from the start.
    pub bit: u32,
    /// Whether it is a bit-field.
    pub bitfield: bool,
}

/// A variable in a data section.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Variable {
    /// Its type.
    pub ty: u32,
    /// Bytes from the section's start: for per-cpu data the address that code uses.
    pub offset: u32,
}

/// All types.
#[derive(Default)]
pub struct Btf {
    types: Vec<Type>,
    names: Vec<u32>,
    strings: Vec<u8>,
    /// Members of structures and unions.
    pub members: Vec<Member>,
    /// Parameter types of prototypes; a last [`VOID`] stands for `...`.
    pub parameters: Vec<u32>,
    /// Variables of all data sections.
    pub variables: Vec<Variable>,
    /// Functions' prototypes by name, in the order of ids; names of static functions repeat.
    pub functions: FxHashMap<String, Vec<u32>>,
    full: FxHashMap<u32, u32>,
    /// What each id is without typedefs and qualifiers.
    plain: Vec<u32>,
    pointers: FxHashMap<u32, u32>,
}

impl Btf {
    /// That of `image`.
    pub fn of(image: &Image) -> Result<Btf, Fault> {
        Btf::parse(image.section_bytes(".BTF").unwrap_or_default())
    }

    /// Parses the `.BTF` section.
    pub fn parse(section: &[u8]) -> Result<Btf, Fault> {
        Btf::read(section).ok_or_else(|| Fault::damaged(".BTF", "does not decode"))
    }

    fn read(section: &[u8]) -> Option<Btf> {
        let mut header = Reader::new(section, 4);
        let start = header.u32()? as usize;
        let (types, types_len) = (header.u32()? as usize, header.u32()? as usize);
        let (strings, strings_len) = (header.u32()? as usize, header.u32()? as usize);
        let part = |at: usize, len: usize| {
            let from = start.checked_add(at)?;
            section.get(from..from.checked_add(len)?)
        };
        let mut btf = Btf {
            types: vec![Type::Void],
            names: vec![0],
            strings: part(strings, strings_len)?.to_vec(),
            ..Btf::default()
        };
        let bytes = part(types, types_len)?;
        let mut reader = Reader::new(bytes, 0);
        while reader.position() < bytes.len() {
            let one = btf.record(&mut reader)?;
            btf.types.push(one);
        }
        for id in 0..btf.types.len() as u32 {
            if let Type::Pointer(to) = btf.types[id as usize] {
                let to = btf.stripped(to);
                btf.pointers.entry(to).or_insert(id);
            }
            match btf.types[id as usize] {
                Type::Function(prototype) => {
                    let name = btf.name(id).to_owned();
                    btf.functions.entry(name).or_default().push(prototype);
                }
                Type::Composite { .. } if btf.names[id as usize] != 0 => {
                    btf.full.entry(btf.names[id as usize]).or_insert(id);
                }
                _ => {}
            }
        }
        btf.plain = btf.ids().map(|id| btf.stripped(id)).collect();
        Some(btf)
    }

    /// Reads one record; the kinds are numbered as in include/uapi/linux/btf.h.
    fn record(&mut self, reader: &mut Reader<'_>) -> Option<Type> {
        let (name, info, size) = (reader.u32()?, reader.u32()?, reader.u32()?);
        self.names.push(name);
        let (kind, count, flag) = (info >> 24 & 0x1f, info & 0xffff, info >> 31 == 1);
        Some(match kind {
            1 => {
                reader.u32()?;
                Type::Scalar(size)
            }
            2 => Type::Pointer(size),
            3 => {
                let (element, _, count) = (reader.u32()?, reader.u32()?, reader.u32()?);
                Type::Array(element, count)
            }
            4 | 5 => {
                let first = self.members.len() as u32;
                for _ in 0..count {
                    let (_, ty, offset) = (reader.u32()?, reader.u32()?, reader.u32()?);
                    self.members.push(Member {
                        ty,
                        bit: if flag { offset & 0xff_ffff } else { offset },
                        bitfield: flag && offset >> 24 != 0,
                    });
                }
                Type::Composite {
                    size,
                    first,
                    count,
                    union: kind == 5,
                }
            }
            6 => {
                reader.take(count as usize * 8)?;
                Type::Scalar(size)
            }
            7 => Type::Forward,
            8..=11 | 18 => Type::Alias(size),
            12 => Type::Function(size),
            13 => {
                let first = self.parameters.len() as u32;
                for _ in 0..count {
                    reader.u32()?;
                    self.parameters.push(reader.u32()?);
                }
                Type::Prototype {
                    returns: size,
                    first,
                    count,
                }
            }
            14 => {
                reader.u32()?;
                Type::Variable(size)
            }
            15 => {
                for _ in 0..count {
                    let (ty, offset, _) = (reader.u32()?, reader.u32()?, reader.u32()?);
                    self.variables.push(Variable { ty, offset });
                }
                Type::Section
            }
            16 => Type::Scalar(size),
            17 => {
                reader.u32()?;
                Type::Tag
            }
            19 => {
                reader.take(count as usize * 12)?;
                Type::Scalar(size)
            }
            _ => return None,
        })
    }

    /// All ids, `void` first.
    pub fn ids(&self) -> std::ops::Range<u32> {
        0..self.types.len() as u32
    }

    /// The record of `id`; ids that there are not are void.
    pub fn at(&self, id: u32) -> Type {
        self.types.get(id as usize).copied().unwrap_or(Type::Void)
    }

    /// The name of `id`; empty when it has none.
    pub fn name(&self, id: u32) -> &str {
        let at = self.names.get(id as usize).copied().unwrap_or(0) as usize;
        let bytes = self.strings.get(at..).unwrap_or_default();
        let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(0);
        std::str::from_utf8(&bytes[..len]).unwrap_or_default()
    }

    /// What `id` is without typedefs and qualifiers; of a structure that is declared only, the full one of its name.
    pub fn plain(&self, id: u32) -> u32 {
        self.plain.get(id as usize).copied().unwrap_or(id)
    }

    fn stripped(&self, mut id: u32) -> u32 {
        // Typedefs nest a few deep; more is a cycle.
        for _ in 0..32 {
            match self.at(id) {
                Type::Alias(of) | Type::Variable(of) => id = of,
                Type::Forward => {
                    let name = self.names[id as usize];
                    return self.full.get(&name).copied().unwrap_or(id);
                }
                _ => return id,
            }
        }
        VOID
    }

    /// A pointer type to the plain type `id`.
    pub fn pointer_to(&self, id: u32) -> Option<u32> {
        self.pointers.get(&id).copied()
    }

    /// The size of a plain type in bytes; 0 when it has none.
    pub fn size(&self, id: u32) -> u32 {
        match self.at(id) {
            Type::Scalar(size) | Type::Composite { size, .. } => size,
            Type::Pointer(_) => 8,
            Type::Array(element, count) => {
                let element = self.plain(element);
                match self.at(element) {
                    Type::Array(inner, _) if self.plain(inner) == id => 0,
                    _ => self.size(element).saturating_mul(count),
                }
            }
            _ => 0,
        }
    }

    /// The members of a plain structure or union.
    pub fn members_of(&self, id: u32) -> &[Member] {
        match self.at(id) {
            Type::Composite { first, count, .. } => {
                &self.members[first as usize..(first + count) as usize]
            }
            _ => &[],
        }
    }

    /// Where `delta` bytes from a structure's start are in the first element of its last array, which has no length.
    pub fn in_last_array(&self, id: u32, delta: i32) -> Option<i32> {
        let last = self.members_of(id).last()?;
        let Type::Array(element, 0) = self.at(self.plain(last.ty)) else {
            return None;
        };
        let size = self.size(self.plain(element));
        let from = delta.checked_sub_unsigned(last.bit / 8)?;
        (size > 0 && from >= 0).then(|| from % size as i32 + (last.bit / 8) as i32)
    }

    /// Return type and parameters of a prototype, and whether more may follow.
    pub fn prototype(&self, id: u32) -> Option<(u32, &[u32], bool)> {
        let Type::Prototype {
            returns,
            first,
            count,
        } = self.at(id)
        else {
            return None;
        };
        let all = &self.parameters[first as usize..(first + count) as usize];
        // A last parameter without a type is `...`.
        Some(match all.split_last() {
            Some((&VOID, named)) => (returns, named, true),
            _ => (returns, all, false),
        })
    }
}
