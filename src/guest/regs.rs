// SPDX-License-Identifier: GPL-2.0
//! Registers of a guest, as both vendors and the emulator see them.
#![forbid(unsafe_code)]

use crate::arch::{
    cr::cr0,
    segment::{DescriptorTable, Segment, SegmentAttributes},
};

/// General-purpose register numbers as instructions encode them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Gpr {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rsp = 4,
    Rbp = 5,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

/// General-purpose registers (indexed by [`Gpr`]), instruction pointer and flags. The world switch knows the layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Regs {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
}

/// Segments, tables and control registers: what KVM_GET_SREGS moves, less the interrupt bitmap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SystemRegs {
    /// ES, CS, SS, DS, FS, GS, by [`SegmentName`](crate::arch::segment::SegmentName).
    pub segments: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    /// Current privilege level, 0 to 3. The VMCB keeps it beside the segments.
    pub cpl: u8,
}

impl SystemRegs {
    /// After RESET, and after INIT but for what of CR0 the latter keeps. SDM "Processor State After Reset".
    pub const AT_RESET: Self = {
        let data = Segment { base: 0, limit: 0xFFFF, selector: 0, attributes: SegmentAttributes(0x93) };
        let code = Segment { base: 0xFFFF_0000, selector: 0xF000, attributes: SegmentAttributes(0x9B), ..data };
        let table = DescriptorTable { base: 0, limit: 0xFFFF };
        Self {
            segments: [data, code, data, data, data, data],
            ldtr: Segment { attributes: SegmentAttributes(0x82), ..data },
            tr: Segment { attributes: SegmentAttributes(0x8B), ..data },
            gdtr: table,
            idtr: table,
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            cpl: 0,
        }
    };
}
