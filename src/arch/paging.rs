// SPDX-License-Identifier: GPL-2.0
//! Paging-structure entries and page-fault error codes. SDM "Paging" and "The Extended Page Table Mechanism (EPT)",
//! APM Vol. 2 "Page Translation and Protection" and "Nested Paging".
#![forbid(unsafe_code)]

use super::addr::PAGE_SHIFT;

/// log2 of the number of entries in a table of 64-bit entries.
pub const INDEX_BITS: u32 = 9;
/// Number of 64-bit entries in a 4 KiB table.
pub const ENTRIES: usize = 1 << INDEX_BITS;
/// Physical address in a 64-bit entry: bits 51 to 12. Where the CPU has fewer address bits, the rest are reserved.
pub const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// Bits of an ordinary paging-structure entry; the nested tables of AMD use the same ones.
pub mod entry {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const PWT: u64 = 1 << 3;
    pub const PCD: u64 = 1 << 4;
    pub const A: u64 = 1 << 5;
    /// Dirty: in an entry that maps a page.
    pub const D: u64 = 1 << 6;
    /// Maps a page above the lowest level.
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    /// Protection key, 0 to 15: bits 62 to 59.
    pub const PK_SHIFT: u32 = 59;
    pub const NX: u64 = 1 << 63;
}

/// Bits of an EPT paging-structure entry.
pub mod ept {
    pub const R: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const X: u64 = 1 << 2;
    /// Memory type of a page: bits 5 to 3.
    pub const TYPE_SHIFT: u32 = 3;
    pub const TYPE_UC: u64 = 0;
    pub const TYPE_WB: u64 = 6;
    /// The guest's PAT has no say.
    pub const IGNORE_PAT: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    /// Accessed and dirty, when bit 6 of the EPT pointer turns them on.
    pub const A: u64 = 1 << 8;
    pub const D: u64 = 1 << 9;
}

/// Page-fault error code bits. SDM "Page-Fault Exceptions".
pub mod fault {
    /// Clear: an entry was not present. Set: the access was refused.
    pub const P: u32 = 1 << 0;
    pub const W: u32 = 1 << 1;
    pub const U: u32 = 1 << 2;
    pub const RSVD: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
    pub const PK: u32 = 1 << 5;
    pub const SHADOW_STACK: u32 = 1 << 6;
}

/// Bits that a nested page fault adds to EXITINFO1. APM Vol. 2 "Nested versus Guest Page Faults, Fault Ordering".
pub mod nested_fault {
    /// While translating the guest's final physical address.
    pub const FINAL: u64 = 1 << 32;
    /// While walking the guest's own tables.
    pub const GUEST_TABLE: u64 = 1 << 33;
}

/// Which size of page an entry maps, by the level of the table that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    Page4K = 1,
    Page2M = 2,
    Page1G = 3,
}

impl Level {
    /// log2 of the size in 4 KiB pages: 0, 9 or 18.
    #[inline]
    pub const fn order(self) -> u32 {
        (self as u32 - 1) * INDEX_BITS
    }

    /// Size in 4 KiB pages.
    #[inline]
    pub const fn pages(self) -> u64 {
        1 << self.order()
    }

    /// Size in bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << (self.order() + PAGE_SHIFT)
    }
}
