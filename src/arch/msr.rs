// SPDX-License-Identifier: GPL-2.0
//! MSR numbers. SDM Vol. 4, APM Vol. 2 "MSRs of the AMD64 Architecture", and the KVM paravirtual range.
#![forbid(unsafe_code)]

pub const TSC: u32 = 0x10;
pub const APIC_BASE: u32 = 0x1B;
pub const TSC_ADJUST: u32 = 0x3B;
pub const SPEC_CTRL: u32 = 0x48;
pub const PRED_CMD: u32 = 0x49;
pub const MTRR_CAP: u32 = 0xFE;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17A;
pub const MCG_CTL: u32 = 0x17B;
pub const MISC_ENABLE: u32 = 0x1A0;
pub const DEBUGCTL: u32 = 0x1D9;
pub const PAT: u32 = 0x277;
pub const MTRR_DEF_TYPE: u32 = 0x2FF;
pub const TSC_DEADLINE: u32 = 0x6E0;
/// First x2APIC register; register at MMIO offset N is at this plus N / 16.
pub const X2APIC_FIRST: u32 = 0x800;
pub const X2APIC_LAST: u32 = 0x8FF;
pub const XSS: u32 = 0xDA0;

pub const EFER: u32 = 0xC000_0080;
pub const STAR: u32 = 0xC000_0081;
pub const LSTAR: u32 = 0xC000_0082;
pub const CSTAR: u32 = 0xC000_0083;
pub const SFMASK: u32 = 0xC000_0084;
pub const FS_BASE: u32 = 0xC000_0100;
pub const GS_BASE: u32 = 0xC000_0101;
pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
pub const TSC_AUX: u32 = 0xC000_0103;
pub const VM_CR: u32 = 0xC001_0114;
pub const VM_HSAVE_PA: u32 = 0xC001_0117;
