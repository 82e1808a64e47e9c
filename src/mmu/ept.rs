// SPDX-License-Identifier: GPL-2.0
//! Extended page tables of Intel VMX. SDM "The Extended Page Table Mechanism (EPT)".
//!
//! Four levels. Where the CPU has no accessed and dirty bits (bit 6 of the EPT pointer is 0 then) it ignores those of the entries.
//! Execute-only pages, mode-based execute control and suppression of #VE are not used.
#![forbid(unsafe_code)]

use super::format::{Format, MemoryType, Prot};
use crate::arch::paging::{ept, Level, ADDRESS};
use crate::arch::Hpa;

/// The entry format of Intel's nested tables.
#[derive(Clone, Copy, Debug)]
pub struct Ept;

impl Format for Ept {
    const WRITABLE: u64 = ept::W;
    const ACCESSED: u64 = ept::A;
    const DIRTY: u64 = ept::D;

    #[inline]
    fn table(table: Hpa) -> u64 {
        (table.0 & ADDRESS) | ept::R | ept::W | ept::X | ept::A
    }

    #[inline]
    fn leaf(page: Hpa, level: Level, prot: Prot) -> u64 {
        // Ordinary memory stays write-back whatever the guest's PAT says: nothing snoops past the host's caches.
        let memory_type = match prot.memory_type {
            MemoryType::WriteBack => (ept::TYPE_WB << ept::TYPE_SHIFT) | ept::IGNORE_PAT,
            MemoryType::Uncached => ept::TYPE_UC << ept::TYPE_SHIFT,
        };
        let mut bits = (page.0 & ADDRESS) | ept::R | memory_type;
        for (wanted, bit) in [
            (level > Level::Page4K, Self::LARGE),
            (prot.write, ept::W),
            (prot.execute, ept::X),
            (prot.accessed, ept::A),
            (prot.write && prot.dirty, ept::D),
        ] {
            if wanted {
                bits |= bit;
            }
        }
        bits
    }

    #[inline]
    fn present(bits: u64) -> bool {
        bits & (ept::R | ept::W | ept::X) != 0
    }

    #[inline]
    fn executable(bits: u64) -> bool {
        bits & ept::X != 0
    }

    #[inline]
    fn write_back(bits: u64) -> bool {
        (bits >> ept::TYPE_SHIFT) & 7 == ept::TYPE_WB
    }

    #[inline]
    fn widen(bits: u64, other: u64) -> u64 {
        bits | (other & (ept::W | ept::X | ept::A | ept::D))
    }
}
