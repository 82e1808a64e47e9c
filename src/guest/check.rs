// SPDX-License-Identifier: GPL-2.0
//! Which register values a guest may have. SDM "Control Registers" and "Checks on the Guest State Area"; APM Vol. 2 "Canonicalization and
//! Consistency Checks".
#![forbid(unsafe_code)]

use super::regs::SystemRegs;
use crate::arch::{
    cr::{cr0, cr4, efer, rflags},
    segment::SegmentName,
};

/// What the guest's CPUID allows it to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    pub cr4: u64,
    pub efer: u64,
    /// Width of a guest physical address, in bits: 36 to 52.
    pub physical_bits: u32,
}

/// Whether CR0 may have this value.
pub fn cr0_valid(value: u64) -> bool {
    value & !cr0::DEFINED == 0
        && (value & cr0::PG == 0 || value & cr0::PE != 0)
        && (value & cr0::NW == 0 || value & cr0::CD != 0)
}

/// Whether CR3 may have this value in long mode with PCIDs (`pcide`) or without. Bit 63 of a MOV to CR3 is not part of the value.
pub fn cr3_valid(value: u64, physical_bits: u32) -> bool {
    value >> physical_bits.min(63) == 0
}

/// Whether the whole set is one that a CPU can be in.
pub fn system_regs_valid(regs: &SystemRegs, allowed: &Allowed) -> bool {
    let long = regs.efer & efer::LME != 0 && regs.cr0 & cr0::PG != 0;
    let cs = regs.segments[SegmentName::Cs as usize].attributes;
    let mode = if long {
        regs.cr4 & cr4::PAE != 0
            && regs.efer & efer::LMA != 0
            && !(cs.long() && cs.big())
            && cr3_valid(regs.cr3, allowed.physical_bits)
    } else {
        regs.efer & efer::LMA == 0 && !cs.long()
    };
    mode && cr0_valid(regs.cr0)
        && regs.cr4 & !allowed.cr4 == 0
        && regs.efer & !allowed.efer == 0
        && (regs.cr4 & cr4::PCIDE == 0 || regs.efer & efer::LMA != 0)
        && regs.cr8 <= 0xF
}

/// Whether the CPU checks the alignment of the guest's accesses because the guest wants it to. Another #AC is the host's detection of locked
/// accesses that cross cache lines.
pub const fn alignment_checked(cpl: u8, cr0: u64, rflags: u64) -> bool {
    cpl == 3 && cr0 & cr0::AM != 0 && rflags & rflags::AC != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::segment::{Segment, SegmentAttributes};

    const ALLOWED: Allowed =
        Allowed { cr4: cr4::PAE | cr4::PCIDE, efer: efer::LME | efer::LMA | efer::SCE, physical_bits: 40 };

    fn long_mode() -> SystemRegs {
        let mut regs =
            SystemRegs { cr0: cr0::PE | cr0::PG, cr4: cr4::PAE, efer: efer::LME | efer::LMA, ..SystemRegs::default() };
        regs.segments[1] = Segment { attributes: SegmentAttributes(SegmentAttributes::L), ..Segment::default() };
        regs
    }

    #[test]
    fn good_states_pass() {
        assert!(system_regs_valid(&long_mode(), &ALLOWED));
        assert!(system_regs_valid(&SystemRegs::default(), &ALLOWED));
        assert!(system_regs_valid(&SystemRegs { cr4: cr4::PCIDE | cr4::PAE, ..long_mode() }, &ALLOWED));
    }

    #[test]
    fn impossible_states_do_not() {
        let mut big = long_mode();
        big.segments[1].attributes.0 |= SegmentAttributes::DB;
        let mut long_code = SystemRegs::default();
        long_code.segments[1].attributes.0 = SegmentAttributes::L;
        for bad in [
            SystemRegs { cr0: cr0::PG, ..SystemRegs::default() },
            SystemRegs { cr0: cr0::NW, ..SystemRegs::default() },
            SystemRegs { cr0: 1 << 32, ..SystemRegs::default() },
            SystemRegs { cr0: 1 << 6, ..SystemRegs::default() },
            SystemRegs { cr4: cr4::SMEP, ..SystemRegs::default() },
            SystemRegs { cr4: cr4::PCIDE, ..SystemRegs::default() },
            SystemRegs { efer: efer::NXE, ..SystemRegs::default() },
            SystemRegs { efer: efer::LMA, ..SystemRegs::default() },
            SystemRegs { cr8: 16, ..SystemRegs::default() },
            SystemRegs { cr4: 0, ..long_mode() },
            SystemRegs { efer: efer::LME, ..long_mode() },
            SystemRegs { cr3: 1 << 40, ..long_mode() },
            big,
            long_code,
        ] {
            assert!(!system_regs_valid(&bad, &ALLOWED), "{bad:?}");
        }
    }

    #[test]
    fn alignment_is_checked_for_user_code_that_asks() {
        assert!(alignment_checked(3, cr0::AM | cr0::PE, rflags::AC));
        assert!(!alignment_checked(0, cr0::AM, rflags::AC));
        assert!(!alignment_checked(3, 0, rflags::AC));
        assert!(!alignment_checked(3, cr0::AM, 0));
    }
}
