// SPDX-License-Identifier: GPL-2.0
//! Which MSRs userspace denies the guest. KVM API "KVM_X86_SET_MSR_FILTER".
#![forbid(unsafe_code)]

use crate::arch::msr;

/// RDMSR or WRMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

/// A range of MSRs with one bit each: set means allowed. `B` is the storage of the bits, lowest bit of the first byte first.
#[derive(Clone, Copy, Debug)]
pub struct Range<B> {
    pub reads: bool,
    pub writes: bool,
    pub base: u32,
    /// Number of MSRs; the bitmap has as many bits or more.
    pub count: u32,
    pub bitmap: B,
}

impl<B: core::ops::Deref<Target = [u8]>> Range<B> {
    /// What the range says about this access, if anything. As in KVM the range does not wrap around: it is empty then.
    fn verdict(&self, index: u32, access: Access) -> Option<bool> {
        let meant = match access {
            Access::Read => self.reads,
            Access::Write => self.writes,
        };
        let end = self.base.wrapping_add(self.count);
        if !meant || !(self.base..end).contains(&index) {
            return None;
        }
        let bit = index.wrapping_sub(self.base);
        let byte = self.bitmap.get((bit / 8) as usize).copied().unwrap_or(0);
        Some(byte >> (bit % 8) & 1 != 0)
    }
}

/// Whether the guest may do this: the first range that speaks about it decides, else `default_allow`. The x2APIC's registers are never denied.
pub fn allowed<B: core::ops::Deref<Target = [u8]>>(
    ranges: &[Range<B>],
    default_allow: bool,
    index: u32,
    access: Access,
) -> bool {
    let x2apic = (msr::X2APIC_FIRST..=msr::X2APIC_LAST).contains(&index);
    x2apic || ranges.iter().find_map(|range| range.verdict(index, access)).unwrap_or(default_allow)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_range_that_speaks_decides() {
        let range = |reads, writes, base, count, bitmap: &'static [u8]| Range { reads, writes, base, count, bitmap };
        let ranges = [
            range(true, false, 0x10, 10, &[0b0000_0101, 0b10]),
            range(true, true, 0x10, 1, &[0]),
            range(true, true, 0xFFFF_FFFF, 1, &[0]),
            range(true, true, 0x800, 256, &[0]),
        ];
        let ask = |index, access| allowed(&ranges, true, index, access);
        assert!(ask(0x10, Access::Read) && !ask(0x11, Access::Read) && ask(0x12, Access::Read));
        assert!(!ask(0x18, Access::Read) && ask(0x19, Access::Read), "second byte");
        assert!(!ask(0x10, Access::Write), "the first range is for reads");
        assert!(ask(0x1A, Access::Read) && ask(0xF, Access::Read), "outside");
        assert!(ask(0xFFFF_FFFF, Access::Read), "a range that wraps is empty");
        assert!(ask(0x830, Access::Write), "x2APIC");
        assert!(!allowed(&ranges, false, 0x1A, Access::Read) && allowed(&ranges, false, 0x8FF, Access::Read));
        assert!(!allowed(&[range(true, true, 0, 100, &[])], true, 5, Access::Read), "too few bits");
    }
}
