// SPDX-License-Identifier: GPL-2.0
//! Page-directory-pointer-table entries of PAE guests. SDM "PDPTE Registers", "Checks on Guest Page-Directory-Pointer-Table Entries".
//!
//! With EPT, VM entry loads them from the VMCS and not from memory. The CPU keeps the fields while the guest itself moves to CR3; whoever
//! changes CR0, CR3, CR4 or EFER from outside, or emulates that change, must fill them from guest memory.
#![forbid(unsafe_code)]

use crate::arch::{
    cr::{cr0, cr4, efer},
    paging::{entry, ADDRESS},
};

/// Whether a guest with these registers has the four entries.
#[inline]
pub const fn in_use(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && efer & efer::LMA == 0
}

/// Whether an entry may be loaded: one that is not present may hold anything.
pub const fn valid(entry: u64, physical_bits: u32) -> bool {
    const ALLOWED: u64 = entry::P | entry::PWT | entry::PCD | 7 << 9;
    let beyond = match 1u64.checked_shl(physical_bits) {
        Some(limit) => !(limit - 1),
        None => 0,
    };
    entry & entry::P == 0 || entry & (!(ALLOWED | ADDRESS) | beyond & ADDRESS) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_them() {
        let (pg, pae, lma) = (cr0::PE | cr0::PG, cr4::PAE, efer::LME | efer::LMA);
        assert!(in_use(pg, pae, 0) && in_use(pg, pae, efer::NXE));
        assert!(!in_use(cr0::PE, pae, 0) && !in_use(pg, cr4::PSE, 0) && !in_use(pg, pae, lma));
    }

    #[test]
    fn entries() {
        for good in [0, 0x1001, 0x7F_FFFF_F001, 0x1019, 0x1E01, u64::MAX - 1, 0x8000_0000_0000_0006] {
            assert!(valid(good, 39), "{good:#x}");
        }
        for bad in [0x1003, 0x1005, 0x1021, 0x1041, 0x1081, 0x1101, 0x80_0000_1001, 1 << 52 | 1, 1 << 63 | 1] {
            assert!(!valid(bad, 39), "{bad:#x}");
        }
        assert!(valid(0x000F_FFFF_FFFF_F001, 52) && valid(0x000F_FFFF_FFFF_F001, 64));
    }
}
