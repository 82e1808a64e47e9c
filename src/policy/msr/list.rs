// SPDX-License-Identifier: GPL-2.0
//! What KVM_GET_MSR_INDEX_LIST and KVM_GET_MSR_FEATURE_INDEX_LIST return. Clients save and restore what the first lists,
//! so each of those can be read by the host and written back with what was read.
#![forbid(unsafe_code)]

use super::MsrConfig;
use crate::arch::cpuid::{kvm_eax, Vendor};
use crate::arch::msr;
use crate::policy::pmu;

/// Where an MSR is listed.
#[derive(Clone, Copy)]
enum When {
    Always,
    Amd,
    Intel,
    SpecCtrl,
    TscAux,
    ArchCapabilities,
    Pv(u32),
}
use When::{Always, Amd, ArchCapabilities, Intel, Pv, SpecCtrl, TscAux};

/// MTRRs, PAT's neighbours and machine-check banks are not listed by KVM either: clients know their numbers.
const SAVED: &[(u32, When)] = &[
    (msr::SYSENTER_CS, Always),
    (msr::SYSENTER_ESP, Always),
    (msr::SYSENTER_EIP, Always),
    (msr::STAR, Always),
    (msr::CSTAR, Always),
    (msr::KERNEL_GS_BASE, Always),
    (msr::SFMASK, Always),
    (msr::LSTAR, Always),
    (msr::TSC, Always),
    (msr::PAT, Always),
    (msr::FEATURE_CONTROL, Intel),
    (msr::TSC_AUX, TscAux),
    (msr::SPEC_CTRL, SpecCtrl),
    (msr::DEBUGCTL, Always),
    (msr::KVM_SYSTEM_TIME, Pv(kvm_eax::CLOCKSOURCE)),
    (msr::KVM_WALL_CLOCK, Pv(kvm_eax::CLOCKSOURCE)),
    (msr::KVM_SYSTEM_TIME_NEW, Pv(kvm_eax::CLOCKSOURCE2)),
    (msr::KVM_WALL_CLOCK_NEW, Pv(kvm_eax::CLOCKSOURCE2)),
    (msr::KVM_STEAL_TIME, Pv(kvm_eax::STEAL_TIME)),
    (msr::KVM_PV_EOI_EN, Pv(kvm_eax::PV_EOI)),
    (msr::TSC_ADJUST, Always),
    (msr::TSC_DEADLINE, Always),
    (msr::ARCH_CAPABILITIES, ArchCapabilities),
    (msr::MISC_ENABLE, Always),
    (msr::MCG_STATUS, Always),
    (msr::MCG_CTL, Always),
    (msr::SMI_COUNT, Always),
    (msr::PLATFORM_INFO, Always),
    (msr::POWER_CTL, Always),
    (msr::UCODE_REV, Always),
    (msr::HWCR, Always),
];

const FEATURES: &[(u32, When)] = &[
    (msr::DE_CFG, Amd),
    (msr::UCODE_REV, Always),
    (msr::ARCH_CAPABILITIES, ArchCapabilities),
    (msr::PLATFORM_INFO, Always),
];

impl When {
    fn holds(self, config: &MsrConfig) -> bool {
        let caps = &config.supported;
        match self {
            Always => true,
            Amd => caps.vendor == Vendor::Amd,
            Intel => caps.vendor == Vendor::Intel,
            SpecCtrl => caps.spec_ctrl != 0,
            TscAux => caps.tsc_aux,
            ArchCapabilities => caps.arch_capabilities,
            Pv(feature) => config.pv_features & feature != 0,
        }
    }
}

fn listed<'a>(table: &'static [(u32, When)], config: &'a MsrConfig) -> impl Iterator<Item = u32> + 'a {
    table.iter().filter(|(_, when)| when.holds(config)).map(|(index, _)| *index)
}

/// KVM_GET_MSR_INDEX_LIST.
pub fn index_list(config: &MsrConfig) -> impl Iterator<Item = u32> + '_ {
    listed(SAVED, config).chain(pmu::index_list(&config.pmu))
}

/// KVM_GET_MSR_FEATURE_INDEX_LIST.
pub fn feature_list(config: &MsrConfig) -> impl Iterator<Item = u32> + '_ {
    listed(FEATURES, config)
}

/// KVM_GET_MSRS on the system: the value of a feature MSR, `None` if it is not one here.
pub fn feature_value(config: &MsrConfig, index: u32) -> Option<u64> {
    feature_list(config).find(|listed| *listed == index)?;
    match index {
        msr::DE_CFG => Some(config.de_cfg()),
        msr::UCODE_REV => Some(config.microcode),
        msr::ARCH_CAPABILITIES => Some(config.arch_capabilities),
        msr::PLATFORM_INFO => Some(0),
        _ => None,
    }
}
