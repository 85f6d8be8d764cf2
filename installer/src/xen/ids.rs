//! Addresses and ids of another domain. None proves anything about what it names.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// Bytes in a frame (SDM volume 3A, 4.3).
pub const PAGE: usize = 4096;

macro_rules! hex_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.strip_prefix("0x")
                    .and_then(|digits| u64::from_str_radix(digits, 16).ok())
                    .map($name)
                    .ok_or_else(|| {
                        serde::de::Error::custom(format!("`{text}` is not a number like 0x1000"))
                    })
            }
        }
    };
}

hex_newtype! {
    /// A virtual address in the guest.
    GuestVa
}
hex_newtype! {
    /// A guest-physical address.
    GuestPa
}
hex_newtype! {
    /// A guest frame number: a guest-physical address without its low 12 bits.
    Gfn
}
hex_newtype! {
    /// A page-table root as Xen compares it: CR3 without PCID, no-flush and other low bits. Names one address space.
    Root
}

impl GuestVa {
    /// This address plus `bytes`; wraps as the processor does, so that a hostile pointer faults instead of panicking.
    #[must_use]
    pub fn offset(self, bytes: u64) -> GuestVa {
        GuestVa(self.0.wrapping_add(bytes))
    }

    /// The first byte of its page.
    #[must_use]
    pub fn page(self) -> GuestVa {
        GuestVa(self.0 & !(PAGE as u64 - 1))
    }

    /// Bytes from the start of its page.
    pub fn in_page(self) -> usize {
        // Below 4096, so the cast keeps it.
        (self.0 & (PAGE as u64 - 1)) as usize
    }
}

impl GuestPa {
    /// Its frame.
    pub fn gfn(self) -> Gfn {
        Gfn(self.0 >> 12)
    }
}

impl Gfn {
    /// The first address in the frame.
    pub fn base(self) -> GuestPa {
        GuestPa(self.0 << 12)
    }
}

impl Root {
    /// The root that a CR3 value names: PCID, PWT and PCD (low 12 bits) and the no-flush bit 63 are not part of it
    /// (SDM volume 3A, 4.5).
    pub fn from_cr3(cr3: u64) -> Root {
        Root(cr3 & 0x000f_ffff_ffff_f000)
    }
}

/// A domain's id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DomId(pub u16);

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A view: 0 is the host's (stock), the others are alternate p2m tables.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct ViewId(pub u16);

impl ViewId {
    /// The host's own view.
    pub const HOST: ViewId = ViewId(0);
}

impl fmt::Display for ViewId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
