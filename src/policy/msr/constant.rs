// SPDX-License-Identifier: GPL-2.0
//! MSRs that read as a constant: what kernels of old read without asking CPUID first. Nothing here is state.
#![forbid(unsafe_code)]

use super::Context;
use crate::arch::msr;

/// What a write does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OnWrite {
    /// #GP.
    Refuse,
    /// Nothing.
    Ignore,
    /// Nothing, but only 0 may be written.
    Zero,
}
use OnWrite::{Ignore, Refuse, Zero};

/// On whose CPUs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    Any,
    Amd,
}
use On::{Amd, Any};

/// First, last, what they read as (`None`: #GP), what a write does, where.
const CONSTANTS: &[(u32, u32, Option<u64>, OnWrite, On)] = &[
    (msr::PLATFORM_ID, msr::PLATFORM_ID, Some(0), Refuse, Any),
    (msr::EBL_CR_POWERON, msr::EBL_CR_POWERON, Some(0), Refuse, Any),
    // A ratio of 1 between core and bus clock: some kernels divide by it.
    (msr::EBC_FREQUENCY_ID, msr::EBC_FREQUENCY_ID, Some(1 << 24), Refuse, Any),
    (msr::UCODE_WRITE, msr::UCODE_WRITE, None, Ignore, Any),
    (msr::P6_PERFCTR0, msr::P6_PERFCTR1, Some(0), Ignore, Any),
    (msr::P6_EVNTSEL0, msr::P6_EVNTSEL1, Some(0), Ignore, Any),
    // 100 MHz.
    (msr::FSB_FREQ, msr::FSB_FREQ, Some(3), Refuse, Any),
    // L2 cache: configured, enabled, 256 KiB, 64 GiB range. Windows XP sets a reserved bit in it.
    (msr::BBL_CR_CTL3, msr::BBL_CR_CTL3, Some(0xBE70_2111), Ignore, Any),
    // One TSC tick per clock, multiplier 4.
    (msr::PERF_STATUS, msr::PERF_STATUS, Some(4 << 40 | 1000), Refuse, Any),
    (msr::PERF_CTL, msr::PERF_CTL, Some(0), Refuse, Any),
    (msr::LAST_BRANCH_FROM_IP, msr::LAST_INT_TO_IP, Some(0), Refuse, Any),
    (msr::RAPL_POWER_UNIT, msr::RAPL_POWER_UNIT, Some(0), Refuse, Any),
    (msr::PKG_ENERGY_STATUS, msr::PKG_ENERGY_STATUS, Some(0), Refuse, Any),
    (msr::DRAM_ENERGY_STATUS, msr::DRAM_ENERGY_STATUS, Some(0), Refuse, Any),
    (msr::PP0_ENERGY_STATUS, msr::PP0_ENERGY_STATUS, Some(0), Refuse, Any),
    (msr::PP1_ENERGY_STATUS, msr::PP1_ENERGY_STATUS, Some(0), Refuse, Any),
    (msr::K7_EVNTSEL0, msr::K7_PERFCTR3, Some(0), Ignore, Amd),
    (msr::SYSCFG, msr::SYSCFG, Some(0), Refuse, Amd),
    (msr::TOP_MEM, msr::TOP_MEM, Some(0), Refuse, Amd),
    (msr::TOP_MEM2, msr::TOP_MEM2, Some(0), Refuse, Amd),
    // The ramp-up count that K7 kernels expect.
    (msr::K7_CLK_CTL, msr::K7_CLK_CTL, Some(0x2000_0000), Ignore, Amd),
    (msr::NB_CFG, msr::NB_CFG, Some(0), Ignore, Amd),
    (msr::PATCH_LOADER, msr::PATCH_LOADER, None, Ignore, Amd),
    (msr::INT_PENDING, msr::INT_PENDING, Some(0), Refuse, Amd),
    (msr::MMIO_CONF_BASE, msr::MMIO_CONF_BASE, Some(0), Zero, Amd),
    (msr::SMM_TSEG_ADDR, msr::SMM_TSEG_MASK, Some(0), Refuse, Amd),
    (msr::IC_CFG, msr::IC_CFG, Some(0), Refuse, Amd),
    (msr::DC_CFG, msr::TW_CFG, Some(0), Ignore, Amd),
    (msr::BU_CFG2, msr::BU_CFG2, Some(0), Ignore, Amd),
    (msr::F15H_EX_CFG, msr::F15H_EX_CFG, Some(0), Ignore, Amd),
];

fn find(index: u32, cx: &Context<'_>) -> Option<(Option<u64>, OnWrite)> {
    let found = CONSTANTS.iter().find(|row| (row.0..=row.1).contains(&index))?;
    (found.4 == Any || cx.amd()).then_some((found.2, found.3))
}

/// `None` is #GP.
pub fn read(index: u32, cx: &Context<'_>) -> Option<u64> {
    find(index, cx)?.0
}

/// Whether the write is taken; if not, #GP.
pub fn write(index: u32, value: u64, cx: &Context<'_>) -> bool {
    match find(index, cx) {
        Some((_, Ignore)) => true,
        Some((_, Zero)) => value == 0,
        Some((_, Refuse)) | None => false,
    }
}
