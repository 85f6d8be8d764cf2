//! Addresses as newtypes, so that a link address, an offset and a guest address cannot be mixed up.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use std::fmt;

/// A kernel virtual address as linked, before KASLR; written as a hexadecimal string in JSON.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkVa(pub u64);

impl LinkVa {
    /// This address plus `bytes`; `None` when it wraps.
    pub fn checked_add(self, bytes: u64) -> Option<LinkVa> {
        self.0.checked_add(bytes).map(LinkVa)
    }
}

impl fmt::Display for LinkVa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

impl fmt::Debug for LinkVa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for LinkVa {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LinkVa {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.strip_prefix("0x")
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .map(LinkVa)
            .ok_or_else(|| {
                D::Error::custom(format!(
                    "`{text}` is not an address like 0xffffffff81000000"
                ))
            })
    }
}

/// A byte offset from the start of the bundle's text ([`crate::Text::start`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TextOff(pub u32);

/// A half-open range of link addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VaRange {
    /// First address inside.
    pub start: LinkVa,
    /// First address after.
    pub end: LinkVa,
}

impl VaRange {
    /// Length in bytes; 0 when the range is empty or inverted.
    pub fn len(&self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Whether the range holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether `va` lies inside.
    pub fn contains(&self, va: LinkVa) -> bool {
        self.start <= va && va < self.end
    }

    /// Whether `other` lies wholly inside.
    pub fn encloses(&self, other: &VaRange) -> bool {
        self.start <= other.start && other.end <= self.end && other.start <= other.end
    }
}
