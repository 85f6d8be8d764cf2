//! Structure layouts from the image's BTF (Linux, Documentation/bpf/btf.rst).

use super::KernelError;
use super::elf::Vmlinux;
use rustc_hash::FxHashMap;

const MAGIC: u16 = 0xeb9f;
const KIND_INTEGER: u32 = 1;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUMERATION: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_FUNCTION: u32 = 12;
const KIND_PROTOTYPE: u32 = 13;

/// What a function gives back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GivesBack {
    /// Nothing.
    Void,
    /// `bool`.
    Bool,
    /// A value of its first argument's type.
    FirstArgument,
    /// Something else.
    Other,
}

/// The types of one image.
pub struct Btf<'a> {
    data: &'a [u8],
    strings: usize,
    /// Where each type's record stands, by id; id 0 is void.
    types: Vec<usize>,
    /// Structures and unions by name.
    named: FxHashMap<&'a [u8], usize>,
}

impl<'a> Btf<'a> {
    /// Reads the image's `.BTF` section.
    pub fn read(vmlinux: &'a Vmlinux) -> Result<Btf<'a>, KernelError> {
        let data = vmlinux.section_bytes(vmlinux.section(".BTF")?);
        Btf::parse(data).ok_or(KernelError::Btf)
    }

    /// Reads the bytes of a `.BTF` section.
    pub fn parse(data: &'a [u8]) -> Option<Btf<'a>> {
        if half(data, 0)? != MAGIC {
            return None;
        }
        let header = word(data, 4)? as usize;
        let start = header + word(data, 8)? as usize;
        let end = start + word(data, 12)? as usize;
        let mut btf = Btf {
            data,
            strings: header + word(data, 16)? as usize,
            types: vec![usize::MAX],
            named: FxHashMap::default(),
        };
        let mut at = start;
        while at < end {
            let info = word(data, at + 4)?;
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let extra = match kind {
                // Integers, variables, declaration tags
                1 | 14 | 17 => 4,
                // Pointers, forwards, typedefs, qualifiers, functions, floats, type tags
                2 | 7..=12 | 16 | 18 => 0,
                3 => 12,
                // Structures, unions, data sections, 64-bit enumerations
                4 | 5 | 15 | 19 => 12 * count,
                // Enumerations, prototypes
                6 | 13 => 8 * count,
                _ => return None,
            };
            if kind == KIND_STRUCT || kind == KIND_UNION {
                let name = btf.string(word(data, at)? as usize)?;
                if !name.is_empty() {
                    btf.named.entry(name).or_insert(at);
                }
            }
            btf.types.push(at);
            at += 12 + extra;
        }
        (at == end && end <= data.len()).then_some(btf)
    }

    /// The names of functions, which are all compiled ones.
    pub fn functions(&self) -> impl Iterator<Item = &'a [u8]> {
        let records = self.types.iter().filter(|at| **at != usize::MAX);
        records.filter_map(|at| {
            let kind = word(self.data, at + 4)? >> 24 & 0x1f;
            let name = self.string(word(self.data, *at)? as usize)?;
            (kind == KIND_FUNCTION).then_some(name)
        })
    }

    /// How many argument registers each function reads at least, by name; of several with one name the fewest. What is
    /// passed as a structure may be in memory, and does not count.
    pub fn least_arities(&self) -> FxHashMap<&'a [u8], u8> {
        let mut least = FxHashMap::default();
        for at in self.types.iter().filter(|at| **at != usize::MAX) {
            let Some((name, arity)) = self.least_arity(*at) else {
                continue;
            };
            let known = least.entry(name).or_insert(arity);
            *known = arity.min(*known);
        }
        least
    }

    fn least_arity(&self, function: usize) -> Option<(&'a [u8], u8)> {
        let kind = |at: usize| Some(word(self.data, at + 4)? >> 24 & 0x1f);
        if kind(function)? != KIND_FUNCTION {
            return None;
        }
        let name = self.string(word(self.data, function)? as usize)?;
        let prototype = word(self.data, function + 8)?;
        let prototype = *self.types.get(prototype as usize)?;
        if prototype == usize::MAX || kind(prototype)? != KIND_PROTOTYPE {
            return None;
        }
        let count = word(self.data, prototype + 4)? & 0xffff;
        let mut arity = 0u8;
        for index in 0..count as usize {
            // Without a type it is the rest of the arguments.
            let ty = word(self.data, prototype + 12 + 8 * index + 4)?;
            arity = arity.saturating_add(u8::from(ty != 0 && self.aggregate(ty).is_none()));
        }
        Some((name, arity.min(6)))
    }

    /// What the function of this name gives back; none where no prototype, or more than one, tells.
    pub fn result(&self, function: &str) -> Option<GivesBack> {
        let records = self.types.iter().filter(|at| **at != usize::MAX);
        let mut found = records.filter_map(|at| {
            let is_function = word(self.data, at + 4)? >> 24 & 0x1f == KIND_FUNCTION;
            let name = self.string(word(self.data, *at)? as usize)?;
            (is_function && name == function.as_bytes()).then_some(at)
        });
        let at = found.next()?;
        if found.next().is_some() {
            return None;
        }
        let prototype = *self.types.get(word(self.data, at + 8)? as usize)?;
        let info = word(self.data, prototype.checked_add(4)?)?;
        if info >> 24 & 0x1f != KIND_PROTOTYPE {
            return None;
        }
        let own = word(self.data, prototype + 8)?;
        let first = match info & 0xffff {
            0 => None,
            _ => word(self.data, prototype + 12 + 4),
        };
        Some(match own {
            0 => GivesBack::Void,
            _ if self.is_bool(own)? => GivesBack::Bool,
            _ if first == Some(own) => GivesBack::FirstArgument,
            _ => GivesBack::Other,
        })
    }

    /// Whether a type is `_Bool` or a name for it.
    fn is_bool(&self, mut ty: u32) -> Option<bool> {
        for _ in 0..8 {
            let at = *self.types.get(ty as usize)?;
            let info = word(self.data, at.checked_add(4)?)?;
            match info >> 24 & 0x1f {
                KIND_TYPEDEF => ty = word(self.data, at + 8)?,
                KIND_INTEGER => {
                    let name = self.string(word(self.data, at)? as usize)?;
                    return Some(name == b"_Bool");
                }
                _ => return Some(false),
            }
        }
        Some(false)
    }

    /// `sizeof(struct name)`.
    pub fn size(&self, name: &str) -> Option<u32> {
        word(self.data, *self.named.get(name.as_bytes())? + 8)
    }

    /// `offsetof(struct name, member)` in bytes; members of anonymous structures and unions count as the outer one's.
    pub fn offset(&self, name: &str, member: &str) -> Option<u32> {
        let bits = self.member(*self.named.get(name.as_bytes())?, member.as_bytes(), 0)?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// Whether `struct name` has a member of this name, bit-fields too.
    pub fn has_member(&self, name: &str, member: &str) -> bool {
        let at = self.named.get(name.as_bytes());
        at.is_some_and(|at| self.member(*at, member.as_bytes(), 0).is_some())
    }

    /// The value called `name` of the enumeration `of`.
    pub fn enumerator(&self, of: &str, name: &str) -> Option<u32> {
        let mut records = self.types.iter().filter(|at| **at != usize::MAX);
        let named = |at: &&usize| {
            let kind = word(self.data, **at + 4)? >> 24 & 0x1f;
            let own = self.string(word(self.data, **at)? as usize)?;
            (kind == KIND_ENUMERATION && own == of.as_bytes()).then_some(())
        };
        let at = *records.find(|at| named(at).is_some())?;
        let count = word(self.data, at + 4)? as usize & 0xffff;
        (0..count).find_map(|index| {
            let value = at + 12 + 8 * index;
            let own = self.string(word(self.data, value)? as usize)?;
            (own == name.as_bytes()).then(|| word(self.data, value + 4))?
        })
    }

    fn member(&self, at: usize, wanted: &[u8], depth: u32) -> Option<u32> {
        if depth > 8 {
            return None;
        }
        let info = word(self.data, at + 4)?;
        let bitfields = info >> 31 == 1;
        for index in 0..(info & 0xffff) as usize {
            let member = at + 12 + index * 12;
            let name = self.string(word(self.data, member)? as usize)?;
            let offset = word(self.data, member + 8)?;
            let offset = if bitfields {
                offset & 0xff_ffff
            } else {
                offset
            };
            if name == wanted {
                return Some(offset);
            }
            if name.is_empty()
                && let Some(inner) = self.aggregate(word(self.data, member + 4)?)
                && let Some(inside) = self.member(inner, wanted, depth + 1)
            {
                return Some(offset + inside);
            }
        }
        None
    }

    /// The record of structure or union `id`, through qualifiers and typedefs.
    fn aggregate(&self, mut id: u32) -> Option<usize> {
        for _ in 0..16 {
            let at = *self
                .types
                .get(id as usize)
                .filter(|at| **at != usize::MAX)?;
            match word(self.data, at + 4)? >> 24 & 0x1f {
                KIND_STRUCT | KIND_UNION => return Some(at),
                8..=11 | 18 => id = word(self.data, at + 8)?,
                _ => return None,
            }
        }
        None
    }

    fn string(&self, at: usize) -> Option<&'a [u8]> {
        let from = self.data.get(self.strings + at..)?;
        Some(&from[..from.iter().position(|byte| *byte == 0)?])
    }
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn half(data: &[u8], at: usize) -> Option<u16> {
    let bytes = data.get(at..at.checked_add(2)?)?;
    Some(u16::from_le_bytes(bytes.try_into().ok()?))
}
