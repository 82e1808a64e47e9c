// SPDX-License-Identifier: GPL-2.0
//! Segment access rights as the VMCS has them. SDM "Guest Register State", table "Format of Access Rights".
#![forbid(unsafe_code)]

use crate::arch::segment::SegmentAttributes;

/// Bits 0-3 type, 4 S, 5-6 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G, 16 unusable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct AccessRights(pub u32);

impl AccessRights {
    pub const ACCESSED: u32 = 1 << 0;
    /// Of data: writable. Of code: readable. Of a task segment: busy.
    pub const WRITABLE: u32 = 1 << 1;
    /// Of data: expands down. Of code: conforming.
    pub const CONFORMING: u32 = 1 << 2;
    pub const CODE: u32 = 1 << 3;
    pub const S: u32 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const P: u32 = 1 << 7;
    pub const AVL: u32 = 1 << 12;
    pub const L: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;
    pub const RESERVED: u32 = 0xFFFE_0F00;

    /// From the packed form. A segment that is not present is unusable, as a null one is: VMX knows no other absence.
    #[inline]
    pub const fn from_attributes(attributes: SegmentAttributes) -> Self {
        let bits = attributes.0 as u32;
        let unusable = if attributes.present() { 0 } else { Self::UNUSABLE };
        Self(bits & 0xFF | (bits & 0xF00) << 4 | unusable)
    }

    /// Back to the packed form. What is unusable is not present; its other bits stay as they are.
    #[inline]
    pub const fn attributes(self) -> SegmentAttributes {
        let bits = self.0 & 0xFF | self.0 >> 4 & 0xF00;
        let present = if self.unusable() { !(SegmentAttributes::P as u32) } else { u32::MAX };
        SegmentAttributes((bits & present) as u16)
    }

    #[inline]
    pub const fn unusable(self) -> bool {
        self.0 & Self::UNUSABLE != 0
    }

    /// Type field, 0 to 15.
    #[inline]
    pub const fn kind(self) -> u32 {
        self.0 & 0xF
    }

    /// Descriptor privilege level, 0 to 3.
    #[inline]
    pub const fn dpl(self) -> u8 {
        (self.0 >> Self::DPL_SHIFT & 3) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_say_the_same() {
        for (packed, rights) in [
            (0xA9B, 0xA09B),
            (0xC93, 0xC093),
            (0x09B, 0x009B),
            (0x08B, 0x008B),
            (0x1F3, 0x10F3),
            (0x000, 0x1_0000),
            (0x002, 0x1_0002),
        ] {
            assert_eq!(AccessRights::from_attributes(SegmentAttributes(packed)).0, rights);
            assert_eq!(AccessRights(rights).attributes().0, packed);
        }
    }

    #[test]
    fn every_packed_form_survives() {
        for packed in 0..0x1000 {
            let rights = AccessRights::from_attributes(SegmentAttributes(packed));
            assert_eq!(rights.attributes().0, packed);
            assert_eq!(rights.0 & AccessRights::RESERVED, 0);
            assert_eq!(rights.unusable(), !SegmentAttributes(packed).present());
        }
    }

    #[test]
    fn unusable_wins_over_present() {
        // What a CPU may leave in a segment that it loaded with a null selector.
        assert_eq!(AccessRights(0x1_0093).attributes().0, 0x013);
    }
}
