//! The guest's page tables, 4 and 5 levels (SDM volume 3A, 4.5; APM volume 2, 5.3).

use crate::xen::{Gfn, GuestPa, GuestVa, Hypervisor, PAGE, XenError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Bits 12 to 51: where an entry points.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1;
/// A level-2 or level-3 entry that maps a large page.
const LARGE: u64 = 1 << 7;

/// How many levels the tables have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Levels {
    /// 48-bit addresses.
    Four,
    /// 57-bit addresses (CR4.LA57).
    Five,
}

impl Levels {
    /// What CR4 says (bit 12, LA57).
    pub fn from_cr4(cr4: u64) -> Levels {
        if cr4 & (1 << 12) != 0 {
            Levels::Five
        } else {
            Levels::Four
        }
    }

    fn count(self) -> u32 {
        match self {
            Levels::Four => 4,
            Levels::Five => 5,
        }
    }
}

/// Why an address does not translate.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum WalkError {
    /// Bits above the translated ones are not a sign extension.
    #[error("{0} is not a canonical address")]
    NonCanonical(GuestVa),
    /// An entry is not present.
    #[error("{va} is not mapped (level {level} entry)")]
    NotPresent {
        /// The address.
        va: GuestVa,
        /// The level whose entry is empty; 1 is the page table.
        level: u32,
    },
    /// A table is not where an entry says.
    #[error("page table of level {level} for {va}: {source}")]
    Table {
        /// The address.
        va: GuestVa,
        /// The table's level.
        level: u32,
        /// What Xen said.
        source: XenError,
    },
}

/// Translates `va` by the tables at `root`. Reads at most five entries, whatever they hold.
pub fn translate(
    hypervisor: &dyn Hypervisor,
    root: GuestPa,
    levels: Levels,
    va: GuestVa,
) -> Result<GuestPa, WalkError> {
    let width = 12 + 9 * levels.count();
    // Shift as signed, so that the top bits become copies of the highest translated one.
    let extended = ((va.0 << (64 - width)).cast_signed() >> (64 - width)).cast_unsigned();
    if extended != va.0 {
        return Err(WalkError::NonCanonical(va));
    }
    let mut table = Gfn((root.0 & ADDRESS) >> 12);
    for level in (1..=levels.count()).rev() {
        let shift = 12 + 9 * (level - 1);
        let index = (va.0 >> shift) & 0x1ff;
        let mut entry = [0; 8];
        // The index is below 512, so the entry lies in the frame.
        let offset = usize::try_from(index * 8).unwrap_or(PAGE - 8);
        hypervisor
            .read(table, offset, &mut entry)
            .map_err(|source| WalkError::Table { va, level, source })?;
        let entry = u64::from_le_bytes(entry);
        if entry & PRESENT == 0 {
            return Err(WalkError::NotPresent { va, level });
        }
        let large = entry & LARGE != 0 && (level == 2 || level == 3);
        if level == 1 || large {
            // In a large page's entry the bits below its size are flags (PAT is bit 12) or reserved.
            let inside = (1 << shift) - 1;
            return Ok(GuestPa((entry & ADDRESS & !inside) | (va.0 & inside)));
        }
        table = Gfn((entry & ADDRESS) >> 12);
    }
    unreachable!("level 1 always returns")
}

#[cfg(test)]
mod tests {
    use super::{Levels, WalkError, translate};
    use crate::xen::fake::Fake;
    use crate::xen::{GuestPa, GuestVa};

    const RW: u64 = 3;

    fn put(fake: &Fake, at: u64, value: u64) {
        fake.poke(GuestPa(at), &value.to_le_bytes());
    }

    #[test]
    fn small_page_on_four_levels() {
        let fake = Fake::with_ram(16);
        let va = GuestVa(0xffff_ffff_8120_3456);
        put(&fake, 0x1000 + 511 * 8, 0x2000 | RW);
        put(&fake, 0x2000 + 510 * 8, 0x3000 | RW);
        put(&fake, 0x3000 + 9 * 8, 0x4000 | RW);
        put(&fake, 0x4000 + 3 * 8, (1 << 63) | 0x7000 | RW);
        assert_eq!(
            translate(&fake, GuestPa(0x1000), Levels::Four, va),
            Ok(GuestPa(0x7456))
        );
    }

    #[test]
    fn large_pages_ignore_pat_and_low_bits() {
        let fake = Fake::with_ram(16);
        put(&fake, 0x1000, 0x2000 | RW);
        put(&fake, 0x2000, 0x3000 | RW);
        // 2 MiB page with PAT (bit 12) set.
        put(&fake, 0x3000 + 8, 0x4000_0000 | 0x1000 | 0x80 | RW);
        // 1 GiB page.
        put(&fake, 0x2000 + 8, 0x8000_0000 | 0x80 | RW);
        let at = |va| translate(&fake, GuestPa(0x1fff), Levels::Four, GuestVa(va));
        assert_eq!(at(0x0020_1234), Ok(GuestPa(0x4000_1234)));
        assert_eq!(at(0x4012_3456), Ok(GuestPa(0x8012_3456)));
    }

    #[test]
    fn five_levels_translate_addresses_that_four_refuse() {
        let fake = Fake::with_ram(16);
        let va = GuestVa(0x00ff_8000_0000_0123);
        put(&fake, 0x1000 + 255 * 8, 0x2000 | RW);
        put(&fake, 0x2000 + 256 * 8, 0x3000 | RW);
        put(&fake, 0x3000, 0x4000 | RW);
        put(&fake, 0x4000, 0x5000 | RW);
        put(&fake, 0x5000, 0x6000 | RW);
        assert_eq!(
            translate(&fake, GuestPa(0x1000), Levels::Five, va),
            Ok(GuestPa(0x6123))
        );
        assert_eq!(
            translate(&fake, GuestPa(0x1000), Levels::Four, va),
            Err(WalkError::NonCanonical(va))
        );
    }

    #[test]
    fn hostile_tables_end() {
        let fake = Fake::with_ram(16);
        // A root that is its own table at every level: ends at level 1.
        put(&fake, 0x1000, 0x1000 | RW);
        assert_eq!(
            translate(&fake, GuestPa(0x1000), Levels::Four, GuestVa(0)),
            Ok(GuestPa(0x1000))
        );
        // A table far outside memory.
        put(&fake, 0x1000, 0x000f_ffff_ffff_f000 | RW);
        assert!(matches!(
            translate(&fake, GuestPa(0x1000), Levels::Four, GuestVa(0)),
            Err(WalkError::Table { level: 3, .. })
        ));
        put(&fake, 0x1000, 0);
        assert_eq!(
            translate(&fake, GuestPa(0x1000), Levels::Four, GuestVa(0x55)),
            Err(WalkError::NotPresent {
                va: GuestVa(0x55),
                level: 4
            })
        );
    }
}
