// SPDX-License-Identifier: GPL-2.0
//! Guest registers as VM entry accepts them. SDM "Checks on the Guest State Area".
//!
//! KVM's users set registers that other virtualization extensions take as they come: segments without the accessed bit, a task register
//! that is not busy, a limit that its granularity cannot express. An entry with those would fail, so they become the nearest state that a CPU
//! can be in. A state that a CPU is in already is not changed. Unrestricted guest is on, as negotiation demands.
//!
//! Not here: what the ioctls refuse ([`check`](crate::guest::check), MSR policy), the PDPTEs of a PAE guest.
#![forbid(unsafe_code)]

use crate::{
    arch::{
        cr::{cr0, efer, rflags},
        segment::{DescriptorTable, Segment, SegmentAttributes, SegmentName},
        vmcs::AccessRights,
    },
    guest::SystemRegs,
};

/// One guest segment register's VMCS fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawSegment {
    pub selector: u16,
    pub base: u64,
    pub limit: u32,
    pub access_rights: AccessRights,
}

impl RawSegment {
    /// In neutral words.
    #[inline]
    pub const fn segment(&self) -> Segment {
        Segment {
            base: self.base,
            limit: self.limit,
            selector: self.selector,
            attributes: self.access_rights.attributes(),
        }
    }
}

/// How the guest runs, as far as the rules for its registers go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Real,
    Virtual8086,
    /// Without IA-32e mode.
    Protected,
    /// IA-32e mode, compatibility mode too.
    Long,
}

/// What the rules for one register need to know of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    pub mode: Mode,
    /// Privilege level: SS's descriptor privilege level, where that counts.
    pub cpl: u8,
    /// Bits of a linear address that this CPU has: 48 or 57.
    pub linear_bits: u32,
}

/// RFLAGS bits that are not reserved.
const RFLAGS_DEFINED: u64 = 0x003F_7FD7;

impl Context {
    /// Of a set of registers.
    pub fn new(regs: &SystemRegs, flags: u64, linear_bits: u32) -> Self {
        let stack = regs.segments[SegmentName::Ss as usize].attributes;
        Self::of(regs.cr0, regs.efer, flags, stack, linear_bits)
    }

    /// Of the registers that count.
    #[inline]
    pub const fn of(cr0: u64, efer: u64, flags: u64, stack: SegmentAttributes, linear_bits: u32) -> Self {
        let mode = if efer & efer::LMA != 0 {
            Mode::Long
        } else if cr0 & cr0::PE == 0 {
            Mode::Real
        } else if flags & rflags::VM != 0 {
            Mode::Virtual8086
        } else {
            Mode::Protected
        };
        let cpl = match mode {
            Mode::Real => 0,
            Mode::Virtual8086 => 3,
            Mode::Protected | Mode::Long => stack.dpl(),
        };
        Self { mode, cpl, linear_bits }
    }

    /// The "IA-32e mode guest" entry control.
    pub const fn ia32e(&self) -> bool {
        matches!(self.mode, Mode::Long)
    }

    /// A code, stack or data segment.
    pub const fn segment(&self, name: SegmentName, segment: &Segment) -> RawSegment {
        if matches!(self.mode, Mode::Virtual8086) {
            return RawSegment {
                selector: segment.selector,
                base: (segment.selector as u64) << 4,
                limit: 0xFFFF,
                access_rights: AccessRights(0xF3),
            };
        }
        let attributes = segment.attributes.0;
        let kind = segment.attributes.kind() as u16;
        let usable = segment.attributes.present();
        let keep = attributes & (DPL | SegmentAttributes::AVL | SegmentAttributes::L | SegmentAttributes::DB)
            | attributes & SegmentAttributes::G;
        let cpl = (self.cpl as u16) << DPL_SHIFT;
        let attributes = match name {
            SegmentName::Cs => {
                // A data segment is left from real mode, and only the highest privilege can have it.
                let (kind, dpl) = match (kind & CODE != 0, kind & CONFORMING != 0) {
                    (true, true) if keep & DPL < cpl => (kind | ACCESSED, keep & DPL),
                    (true, _) => (kind | ACCESSED, cpl),
                    (false, _) if cpl == 0 => (DATA, 0),
                    (false, _) => (CODE | DATA, cpl),
                };
                let both = SegmentAttributes::L | SegmentAttributes::DB;
                let big = if self.ia32e() && keep & both == both { SegmentAttributes::DB } else { 0 };
                keep & !(DPL | big) | dpl | kind | SegmentAttributes::S | SegmentAttributes::P
            }
            SegmentName::Ss if usable => {
                let down = if kind & CODE == 0 { kind & CONFORMING } else { 0 };
                keep & !DPL | cpl | DATA | down | SegmentAttributes::S | SegmentAttributes::P
            }
            // The privilege level is in the descriptor of a null stack segment, too.
            SegmentName::Ss => attributes & !DPL | cpl,
            _ if usable => {
                let readable = if kind & CODE != 0 { READABLE } else { 0 };
                keep | kind | readable | ACCESSED | SegmentAttributes::S | SegmentAttributes::P
            }
            _ => attributes,
        };
        let base = match name {
            SegmentName::Fs | SegmentName::Gs => self.canonical(segment.base),
            // 64-bit mode has no use for these, and other modes have no more bits.
            _ => segment.base & 0xFFFF_FFFF,
        };
        limited(RawSegment {
            selector: segment.selector,
            base,
            limit: segment.limit,
            access_rights: AccessRights::from_attributes(SegmentAttributes(attributes)),
        })
    }

    /// The local descriptor table register.
    pub const fn ldtr(&self, segment: &Segment) -> RawSegment {
        let usable = segment.attributes.present();
        let kept = segment.attributes.0 & !(KIND | SegmentAttributes::S);
        let attributes = if usable { kept | LDT } else { segment.attributes.0 };
        limited(RawSegment {
            selector: if usable { segment.selector & !TABLE_INDICATOR } else { segment.selector },
            base: self.canonical(segment.base),
            limit: segment.limit,
            access_rights: AccessRights::from_attributes(SegmentAttributes(attributes)),
        })
    }

    /// The task register: always usable, and busy.
    pub const fn tr(&self, segment: &Segment) -> RawSegment {
        let kind = match segment.attributes.kind() {
            1 | 3 if !self.ia32e() => BUSY_16,
            _ => BUSY,
        };
        let attributes = segment.attributes.0 & !(KIND | SegmentAttributes::S) | kind | SegmentAttributes::P;
        limited(RawSegment {
            selector: segment.selector & !TABLE_INDICATOR,
            base: self.canonical(segment.base),
            limit: segment.limit,
            access_rights: AccessRights::from_attributes(SegmentAttributes(attributes)),
        })
    }

    /// GDTR or IDTR.
    pub const fn table(&self, table: DescriptorTable) -> DescriptorTable {
        DescriptorTable { base: self.canonical(table.base), limit: table.limit }
    }

    /// RFLAGS: reserved bits as they are in every CPU, and no virtual-8086 mode where there is none.
    #[inline]
    pub const fn rflags(&self, flags: u64) -> u64 {
        let vm = match self.mode {
            Mode::Real | Mode::Long => rflags::VM,
            Mode::Virtual8086 | Mode::Protected => 0,
        };
        flags & RFLAGS_DEFINED & !vm | rflags::FIXED
    }

    /// CR3: outside IA-32e mode it has 32 bits.
    #[inline]
    pub const fn cr3(&self, value: u64) -> u64 {
        if self.ia32e() {
            value
        } else {
            value & 0xFFFF_FFFF
        }
    }

    /// RIP, with `long_code` in a 64-bit code segment. `None`: no CPU can be there, and the entry would fail.
    #[inline]
    pub const fn rip(&self, value: u64, long_code: bool) -> Option<u64> {
        if !(self.ia32e() && long_code) {
            return Some(value & 0xFFFF_FFFF);
        }
        // The bits that an address does not have must agree with each other, not with those that it has.
        let upper = (value as i64) >> self.linear_bits;
        if upper == 0 || upper == -1 {
            Some(value)
        } else {
            None
        }
    }

    /// The nearest canonical address, as the other vendor's entry makes it: sign-extended.
    const fn canonical(&self, address: u64) -> u64 {
        let shift = 64 - self.linear_bits;
        (((address << shift) as i64) >> shift) as u64
    }
}

/// Type bits of segment attributes, and their privilege level.
const ACCESSED: u16 = 1;
const READABLE: u16 = 1 << 1;
const CONFORMING: u16 = 1 << 2;
const CODE: u16 = 1 << 3;
const KIND: u16 = 0xF;
/// Read and write, accessed.
const DATA: u16 = 3;
const LDT: u16 = 2;
const BUSY_16: u16 = 3;
const BUSY: u16 = 11;
const DPL_SHIFT: u32 = 5;
const DPL: u16 = 3 << DPL_SHIFT;
/// Of a selector: the local descriptor table.
const TABLE_INDICATOR: u16 = 1 << 2;

/// Makes limit and granularity agree. The limit is in bytes in both forms.
const fn limited(segment: RawSegment) -> RawSegment {
    let RawSegment { mut limit, access_rights: AccessRights(mut bits), .. } = segment;
    if limit >> 20 != 0 {
        // Only pages reach this far.
        limit |= 0xFFF;
        bits |= AccessRights::G;
    } else if limit & 0xFFF != 0xFFF {
        bits &= !AccessRights::G;
    }
    RawSegment { limit, access_rights: AccessRights(bits), ..segment }
}
