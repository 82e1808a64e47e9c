// SPDX-License-Identifier: GPL-2.0
//! Nested page tables of AMD SVM: ordinary long-mode entries. APM Vol. 2 "Nested Paging".
//!
//! A nested walk counts as a user access, so every entry has U set. The depth follows the host's own paging: four
//! levels, or five when the host runs with CR4.LA57; EFER.NXE of the host must be on, as Linux has it.
//! Not supported: hosts with memory encryption (SME), whose C bit would be part of every address.
#![forbid(unsafe_code)]

use super::format::{Format, MemoryType, Prot};
use crate::arch::paging::{entry, Level, ADDRESS};
use crate::arch::Hpa;

/// The entry format of AMD's nested tables.
#[derive(Clone, Copy, Debug)]
pub struct Npt;

impl Format for Npt {
    const WRITABLE: u64 = entry::W;
    const ACCESSED: u64 = entry::A;
    const DIRTY: u64 = entry::D;

    #[inline]
    fn table(table: Hpa) -> u64 {
        (table.0 & ADDRESS) | entry::P | entry::W | entry::U | entry::A
    }

    #[inline]
    fn leaf(page: Hpa, level: Level, prot: Prot) -> u64 {
        let mut bits = (page.0 & ADDRESS) | entry::P | entry::U;
        for (wanted, bit) in [
            (level > Level::Page4K, Self::LARGE),
            (prot.write, entry::W),
            (!prot.execute, entry::NX),
            (prot.accessed, entry::A),
            (prot.write && prot.dirty, entry::D),
            // Index 3 of the host's PAT: UC after reset and under Linux.
            (prot.memory_type == MemoryType::Uncached, entry::PCD | entry::PWT),
        ] {
            if wanted {
                bits |= bit;
            }
        }
        bits
    }

    #[inline]
    fn present(bits: u64) -> bool {
        bits & entry::P != 0
    }

    #[inline]
    fn executable(bits: u64) -> bool {
        bits & entry::NX == 0
    }

    #[inline]
    fn write_back(bits: u64) -> bool {
        bits & (entry::PCD | entry::PWT) == 0
    }

    #[inline]
    fn widen(bits: u64, other: u64) -> u64 {
        (bits | (other & (entry::W | entry::A | entry::D))) & !(!other & entry::NX)
    }
}
