// SPDX-License-Identifier: GPL-2.0
//! Segment registers and their cached descriptors.
#![forbid(unsafe_code)]

/// Segment register numbers as instructions encode them. SDM Vol. 2 "ModR/M and SIB Bytes".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SegmentName {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

/// Attributes of a cached descriptor in the packed 12-bit form of the VMCB: APM Vol. 2 "Segment State in the VMCB".
/// Bits 0-3 type, 4 S, 5-6 DPL, 7 P, 8 AVL, 9 L, 10 D/B, 11 G. All zero: an unusable (null) segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct SegmentAttributes(pub u16);

impl SegmentAttributes {
    pub const S: u16 = 1 << 4;
    pub const P: u16 = 1 << 7;
    pub const AVL: u16 = 1 << 8;
    pub const L: u16 = 1 << 9;
    pub const DB: u16 = 1 << 10;
    pub const G: u16 = 1 << 11;

    /// Type field, 0 to 15.
    pub const fn kind(self) -> u8 {
        (self.0 & 0xF) as u8
    }

    /// Descriptor privilege level, 0 to 3.
    pub const fn dpl(self) -> u8 {
        ((self.0 >> 5) & 3) as u8
    }

    /// Whether the descriptor is present; a null segment is not.
    pub const fn present(self) -> bool {
        self.0 & Self::P != 0
    }

    /// 64-bit code segment.
    pub const fn long(self) -> bool {
        self.0 & Self::L != 0
    }

    /// Default operation size is 32 bits (code), or the stack pointer is ESP (stack).
    pub const fn big(self) -> bool {
        self.0 & Self::DB != 0
    }
}

/// One segment register with its hidden part. `limit` is in bytes, already scaled by the granularity bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    pub base: u64,
    pub limit: u32,
    pub selector: u16,
    pub attributes: SegmentAttributes,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    pub base: u64,
    pub limit: u16,
}
