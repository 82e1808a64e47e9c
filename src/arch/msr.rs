// SPDX-License-Identifier: GPL-2.0
//! MSR numbers. SDM Vol. 4, APM Vol. 2 "MSRs of the AMD64 Architecture", and the KVM paravirtual range.
#![forbid(unsafe_code)]

pub const P5_MC_ADDR: u32 = 0x0;
pub const P5_MC_TYPE: u32 = 0x1;
pub const TSC: u32 = 0x10;
pub const PLATFORM_ID: u32 = 0x17;
pub const APIC_BASE: u32 = 0x1B;
pub const EBL_CR_POWERON: u32 = 0x2A;
pub const EBC_FREQUENCY_ID: u32 = 0x2C;
pub const SMI_COUNT: u32 = 0x34;
pub const FEATURE_CONTROL: u32 = 0x3A;
pub const TSC_ADJUST: u32 = 0x3B;
pub const SPEC_CTRL: u32 = 0x48;
pub const PRED_CMD: u32 = 0x49;
pub const UCODE_WRITE: u32 = 0x79;
/// AMD calls it PATCH_LEVEL.
pub const UCODE_REV: u32 = 0x8B;
pub const P6_PERFCTR0: u32 = 0xC1;
pub const P6_PERFCTR1: u32 = 0xC2;
pub const FSB_FREQ: u32 = 0xCD;
pub const PLATFORM_INFO: u32 = 0xCE;
pub const MPERF: u32 = 0xE7;
pub const APERF: u32 = 0xE8;
pub const MTRR_CAP: u32 = 0xFE;
pub const ARCH_CAPABILITIES: u32 = 0x10A;
pub const FLUSH_CMD: u32 = 0x10B;
pub const BBL_CR_CTL3: u32 = 0x11E;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17A;
pub const MCG_CTL: u32 = 0x17B;
pub const P6_EVNTSEL0: u32 = 0x186;
pub const P6_EVNTSEL1: u32 = 0x187;
pub const PERF_STATUS: u32 = 0x198;
pub const PERF_CTL: u32 = 0x199;
pub const MISC_ENABLE: u32 = 0x1A0;
pub const DEBUGCTL: u32 = 0x1D9;
pub const LAST_BRANCH_FROM_IP: u32 = 0x1DB;
pub const LAST_INT_TO_IP: u32 = 0x1DE;
pub const POWER_CTL: u32 = 0x1FC;
/// First of the variable-range MTRRs: base and mask of range N at this plus 2 N and plus 2 N + 1.
pub const MTRR_PHYSBASE0: u32 = 0x200;
pub const MTRR_FIX64K_00000: u32 = 0x250;
pub const MTRR_FIX16K_80000: u32 = 0x258;
pub const MTRR_FIX16K_A0000: u32 = 0x259;
pub const MTRR_FIX4K_C0000: u32 = 0x268;
pub const MTRR_FIX4K_F8000: u32 = 0x26F;
pub const PAT: u32 = 0x277;
/// CTL2 of machine-check bank N is at this plus N.
pub const MC0_CTL2: u32 = 0x280;
pub const MTRR_DEF_TYPE: u32 = 0x2FF;
/// First of the fixed performance counters.
pub const FIXED_CTR0: u32 = 0x309;
pub const FIXED_CTR_CTRL: u32 = 0x38D;
pub const PERF_GLOBAL_STATUS: u32 = 0x38E;
pub const PERF_GLOBAL_CTRL: u32 = 0x38F;
pub const PERF_GLOBAL_OVF_CTRL: u32 = 0x390;
/// How long a core slept, by depth of sleep.
pub const CORE_C3_RESIDENCY: u32 = 0x3FC;
pub const CORE_C6_RESIDENCY: u32 = 0x3FD;
pub const CORE_C7_RESIDENCY: u32 = 0x3FE;
/// CTL, STATUS, ADDR, MISC of machine-check bank N are at this plus 4 N and up.
pub const MC0_CTL: u32 = 0x400;
pub const VMX_BASIC: u32 = 0x480;
pub const VMX_PINBASED_CTLS: u32 = 0x481;
pub const VMX_PROCBASED_CTLS: u32 = 0x482;
pub const VMX_EXIT_CTLS: u32 = 0x483;
pub const VMX_ENTRY_CTLS: u32 = 0x484;
pub const VMX_MISC: u32 = 0x485;
pub const VMX_CR0_FIXED0: u32 = 0x486;
pub const VMX_CR0_FIXED1: u32 = 0x487;
pub const VMX_CR4_FIXED0: u32 = 0x488;
pub const VMX_CR4_FIXED1: u32 = 0x489;
pub const VMX_VMCS_ENUM: u32 = 0x48A;
pub const VMX_PROCBASED_CTLS2: u32 = 0x48B;
pub const VMX_EPT_VPID_CAP: u32 = 0x48C;
pub const VMX_TRUE_PINBASED_CTLS: u32 = 0x48D;
pub const VMX_TRUE_PROCBASED_CTLS: u32 = 0x48E;
pub const VMX_TRUE_EXIT_CTLS: u32 = 0x48F;
pub const VMX_TRUE_ENTRY_CTLS: u32 = 0x490;
pub const VMX_VMFUNC: u32 = 0x491;
pub const VMX_PROCBASED_CTLS3: u32 = 0x492;
pub const VMX_EXIT_CTLS2: u32 = 0x493;
pub const RAPL_POWER_UNIT: u32 = 0x606;
pub const PKG_ENERGY_STATUS: u32 = 0x611;
pub const DRAM_ENERGY_STATUS: u32 = 0x619;
pub const PP0_ENERGY_STATUS: u32 = 0x639;
pub const PP1_ENERGY_STATUS: u32 = 0x641;
pub const CORE_C1_RESIDENCY: u32 = 0x660;
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
/// How the TSC of SVM guests follows the host's.
pub const TSC_RATIO: u32 = 0xC000_0104;
pub const K7_EVNTSEL0: u32 = 0xC001_0000;
pub const K7_PERFCTR3: u32 = 0xC001_0007;
pub const SYSCFG: u32 = 0xC001_0010;
pub const HWCR: u32 = 0xC001_0015;
pub const TOP_MEM: u32 = 0xC001_001A;
pub const K7_CLK_CTL: u32 = 0xC001_001B;
pub const TOP_MEM2: u32 = 0xC001_001D;
pub const NB_CFG: u32 = 0xC001_001F;
pub const PATCH_LOADER: u32 = 0xC001_0020;
pub const INT_PENDING: u32 = 0xC001_0055;
pub const MMIO_CONF_BASE: u32 = 0xC001_0058;
pub const SMM_TSEG_ADDR: u32 = 0xC001_0112;
pub const SMM_TSEG_MASK: u32 = 0xC001_0113;
pub const OSVW_ID_LENGTH: u32 = 0xC001_0140;
pub const OSVW_STATUS: u32 = 0xC001_0141;
pub const IC_CFG: u32 = 0xC001_1021;
pub const DC_CFG: u32 = 0xC001_1022;
pub const TW_CFG: u32 = 0xC001_1023;
pub const DE_CFG: u32 = 0xC001_1029;
pub const BU_CFG2: u32 = 0xC001_102A;
pub const F15H_EX_CFG: u32 = 0xC001_102C;
/// Branch prediction of Zen 4 and later.
pub const BP_CFG: u32 = 0xC001_102E;
pub const VM_CR: u32 = 0xC001_0114;
pub const VM_HSAVE_PA: u32 = 0xC001_0117;

/// Paravirtual MSRs. Linux "Documentation/virt/kvm/x86/msr.rst".
pub const KVM_WALL_CLOCK: u32 = 0x11;
pub const KVM_SYSTEM_TIME: u32 = 0x12;
pub const KVM_WALL_CLOCK_NEW: u32 = 0x4B56_4D00;
pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4B56_4D01;
pub const KVM_STEAL_TIME: u32 = 0x4B56_4D03;
pub const KVM_PV_EOI_EN: u32 = 0x4B56_4D04;
