// SPDX-License-Identifier: GPL-2.0
//! Register offsets and bits of the local APIC. SDM "Local APIC Register Address Map".
#![forbid(unsafe_code)]

pub const ID: u32 = 0x20;
pub const VERSION: u32 = 0x30;
pub const TPR: u32 = 0x80;
pub const APR: u32 = 0x90;
pub const PPR: u32 = 0xA0;
pub const EOI: u32 = 0xB0;
pub const LDR: u32 = 0xD0;
pub const DFR: u32 = 0xE0;
pub const SVR: u32 = 0xF0;
pub const ISR: u32 = 0x100;
pub const ISR_LAST: u32 = 0x170;
pub const TMR: u32 = 0x180;
pub const TMR_LAST: u32 = 0x1F0;
pub const IRR: u32 = 0x200;
pub const IRR_LAST: u32 = 0x270;
pub const ESR: u32 = 0x280;
pub const LVT_CMCI: u32 = 0x2F0;
pub const ICR: u32 = 0x300;
pub const ICR2: u32 = 0x310;
pub const LVT_TIMER: u32 = 0x320;
pub const LVT_ERROR: u32 = 0x370;
pub const TIMER_INITIAL: u32 = 0x380;
pub const TIMER_CURRENT: u32 = 0x390;
pub const TIMER_DIVIDE: u32 = 0x3E0;
pub const SELF_IPI: u32 = 0x3F0;

/// Integrated APIC, as of the Pentium 4.
pub const VERSION_ID: u32 = 0x14;
pub const VERSION_DIRECTED_EOI: u32 = 1 << 24;

pub const SVR_ENABLE: u32 = 1 << 8;
pub const SVR_FOCUS: u32 = 1 << 9;
pub const SVR_DIRECTED_EOI: u32 = 1 << 12;
pub const SVR_RESET: u32 = 0xFF;

pub const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
pub const ESR_RECEIVED_ILLEGAL_VECTOR: u32 = 1 << 6;
pub const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

pub const ICR_BUSY: u64 = 1 << 12;
/// Bits 31:20, 17:16 and 13: reserved in x2APIC mode.
pub const X2APIC_ICR_RESERVED: u64 = 0xFFF0_0000 | (3 << 16) | (1 << 13);

pub const DFR_FLAT: u32 = 0xFFFF_FFFF;
pub const DFR_CLUSTER: u32 = 0x0FFF_FFFF;
/// DFR bits that always read as 1.
pub const DFR_FIXED: u32 = 0x0FFF_FFFF;

pub const LVT_VECTOR: u32 = 0xFF;
pub const LVT_MODE: u32 = 7 << 8;
pub const LVT_PENDING: u32 = 1 << 12;
pub const LVT_POLARITY: u32 = 1 << 13;
pub const LVT_REMOTE_IRR: u32 = 1 << 14;
pub const LVT_LEVEL: u32 = 1 << 15;
pub const LVT_MASKED: u32 = 1 << 16;
pub const LVT_PERIODIC: u32 = 1 << 17;
pub const LVT_TSC_DEADLINE: u32 = 2 << 17;
pub const LVT_EXTINT: u32 = 7 << 8;
/// Any bit that some LVT entry has: a write of another one is #GP in x2APIC mode.
pub const LVT_DEFINED: u32 = 0x7_F7FF;

pub const DIVIDE_DEFINED: u32 = 0xB;

/// IA32_APIC_BASE bits.
pub const BASE_BSP: u64 = 1 << 8;
pub const BASE_X2APIC: u64 = 1 << 10;
pub const BASE_ENABLE: u64 = 1 << 11;
pub const BASE_ADDRESS: u64 = !0xFFF;
/// Bits 7:0 and 9.
pub const BASE_RESERVED: u64 = 0x2FF;
pub const BASE_DEFAULT: u64 = 0xFEE0_0000;

/// The local vector table entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Lvt {
    Timer = 0,
    Thermal = 1,
    Performance = 2,
    Lint0 = 3,
    Lint1 = 4,
    Error = 5,
    /// Only with `LapicFeatures::cmci`.
    Cmci = 6,
}

impl Lvt {
    /// All of them, as in the table.
    pub const ALL: [Self; 7] =
        [Self::Timer, Self::Thermal, Self::Performance, Self::Lint0, Self::Lint1, Self::Error, Self::Cmci];

    /// The entry at a register offset.
    pub const fn at(offset: u32) -> Option<Self> {
        Some(match offset {
            0x320 => Self::Timer,
            0x330 => Self::Thermal,
            0x340 => Self::Performance,
            0x350 => Self::Lint0,
            0x360 => Self::Lint1,
            0x370 => Self::Error,
            LVT_CMCI => Self::Cmci,
            _ => return None,
        })
    }

    /// Its register offset.
    pub const fn offset(self) -> u32 {
        match self {
            Self::Cmci => LVT_CMCI,
            _ => LVT_TIMER + 0x10 * self as u32,
        }
    }

    /// The bits that software may set. `timer_modes`: the timer mode bits that exist.
    pub const fn writable(self, timer_modes: u32) -> u32 {
        let common = LVT_VECTOR | LVT_PENDING | LVT_MASKED;
        match self {
            Self::Timer => common | timer_modes,
            Self::Error => common,
            Self::Lint0 | Self::Lint1 => common | LVT_MODE | LVT_POLARITY | LVT_REMOTE_IRR | LVT_LEVEL,
            Self::Thermal | Self::Performance | Self::Cmci => common | LVT_MODE,
        }
    }
}
