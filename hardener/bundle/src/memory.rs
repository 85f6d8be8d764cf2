//! The memories that a kernel's loader allocates for a module, and where something is in them.

use crate::TextOff;
use serde::{Deserialize, Serialize};
use std::ops::{Index, IndexMut};

/// One of the memories of a module (include/linux/module.h).
///
/// From Linux 6.4 on each kind of section has its own (`enum mod_mem_type`). Before, there were two: what stays is all in
/// [`Memory::Text`] (`core_layout`), the code first, and what is freed after the init function is all in
/// [`Memory::InitText`] (`init_layout`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Memory {
    /// Code.
    Text,
    /// Data.
    Data,
    /// Data that is never written to.
    Rodata,
    /// Data that only the init function writes to.
    RoAfterInit,
    /// The init function's code.
    InitText,
    /// Its data.
    InitData,
    /// Its data that is never written to.
    InitRodata,
    /// An offset into each processor's memory.
    PerCpu,
}

impl Memory {
    /// All of them.
    pub const ALL: [Memory; 8] = [
        Memory::Text,
        Memory::Data,
        Memory::Rodata,
        Memory::RoAfterInit,
        Memory::InitText,
        Memory::InitData,
        Memory::InitRodata,
        Memory::PerCpu,
    ];

    /// Its name in the kernel's `enum mod_mem_type`; none for per-CPU memory, which is allocated elsewhere.
    pub fn kernel_name(self) -> Option<&'static str> {
        Some(match self {
            Memory::Text => "MOD_TEXT",
            Memory::Data => "MOD_DATA",
            Memory::Rodata => "MOD_RODATA",
            Memory::RoAfterInit => "MOD_RO_AFTER_INIT",
            Memory::InitText => "MOD_INIT_TEXT",
            Memory::InitData => "MOD_INIT_DATA",
            Memory::InitRodata => "MOD_INIT_RODATA",
            Memory::PerCpu => return None,
        })
    }

    /// Whether it is freed once the init function has returned.
    pub fn is_init(self) -> bool {
        matches!(
            self,
            Memory::InitText | Memory::InitData | Memory::InitRodata
        )
    }
}

/// Something of each memory.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct PerMemory<T>([T; Memory::ALL.len()]);

impl<T> PerMemory<T> {
    /// Makes one of each.
    pub fn new(of: impl FnMut(Memory) -> T) -> PerMemory<T> {
        PerMemory(Memory::ALL.map(of))
    }

    /// What each memory has.
    pub fn iter(&self) -> impl Iterator<Item = (Memory, &T)> {
        Memory::ALL.into_iter().zip(&self.0)
    }
}

impl<T> Index<Memory> for PerMemory<T> {
    type Output = T;

    fn index(&self, memory: Memory) -> &T {
        &self.0[memory as usize]
    }
}

impl<T> IndexMut<Memory> for PerMemory<T> {
    fn index_mut(&mut self, memory: Memory) -> &mut T {
        &mut self.0[memory as usize]
    }
}

/// Where something of a module is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Place {
    /// In which memory.
    pub memory: Memory,
    /// How many bytes into it.
    pub at: u32,
}

impl Place {
    /// So many bytes into a memory.
    pub fn new(memory: Memory, at: u32) -> Place {
        Place { memory, at }
    }

    /// Where it is in the text, if it is there.
    pub fn in_text(self, text_size: u32) -> Option<TextOff> {
        let inside = self.memory == Memory::Text && self.at < text_size;
        inside.then_some(TextOff(self.at))
    }
}

/// Where one guest has put a module.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Placement {
    /// Where each memory starts; of one that is freed or was never there any value will do, as long as nothing in the text
    /// refers to it.
    pub bases: PerMemory<u64>,
    /// The kernel's slide.
    pub slide: u64,
}

impl Placement {
    /// The address of a place in the module.
    pub fn address(&self, place: Place) -> u64 {
        self.bases[place.memory].wrapping_add(u64::from(place.at))
    }

    /// The address of a place in its text.
    pub fn text(&self, at: TextOff) -> u64 {
        self.address(Place::new(Memory::Text, at.0))
    }
}
