// SPDX-License-Identifier: GPL-2.0
//! KVM_ENABLE_CAP: behaviour that userspace turns on or off for one VM or one vCPU. KVM API "KVM_ENABLE_CAP".
//!
//! What is set here is read on paths that are seldom taken. A capability that is not in the two `match`es gets EINVAL, as in KVM.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use kernel::prelude::*;

use crate::{
    abi::{
        cap::*,
        run::KVM_EXIT_HYPERCALL_VALID_MASK,
        vm::{
            KvmEnableCap, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
            KVM_MSR_EXIT_REASON_VALID_MASK, KVM_PMU_CAP_DISABLE, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
            KVM_X2APIC_API_USE_32BIT_IDS, KVM_X2APIC_API_VALID_FLAGS, KVM_X86_DISABLE_EXITS_APERFMPERF,
            KVM_X86_DISABLE_EXITS_CSTATE, KVM_X86_DISABLE_EXITS_HLT, KVM_X86_DISABLE_EXITS_MWAIT, SUPPORTED_QUIRKS,
        },
    },
    dev::MAX_VCPUS,
    dirty_ring::entries_of,
    glue::timer,
    guest::Unintercepted,
    irqchip::{lapic::BUS_CYCLE_NS, routing::MAX_ROUTES},
    policy::pmu::PmuCaps,
    vcpu::Core,
    vendor::Vendor,
    vm::Vm,
};

/// What userspace chose for a VM.
pub(crate) struct Enabled {
    /// `KVM_X86_QUIRK_*` that are off.
    quirks_off: AtomicU64,
    /// `KVM_MSR_EXIT_REASON_*` that go to userspace.
    user_space_msr: AtomicU32,
    /// Whether a guest may read PLATFORM_INFO.
    platform_info: AtomicBool,
    /// Whether an instruction that cannot be emulated always ends KVM_RUN.
    exit_on_emulation_failure: AtomicBool,
    /// Whether KVM_GET_VCPU_EVENTS tells pending exceptions and their payload from injected ones.
    exception_payload: AtomicBool,
    /// Whether KVM_GET_VCPU_EVENTS tells of a triple fault.
    triple_fault_event: AtomicBool,
    /// One more than the highest vCPU id, 0 if userspace did not say.
    max_vcpu_id: AtomicU32,
    /// The vCPU that starts at the reset vector.
    boot_cpu: AtomicU32,
    /// The local APICs' bus clock.
    bus_cycle_ns: AtomicU64,
    /// Frequency of new vCPUs' TSCs; 0: the host's.
    tsc_khz: AtomicU32,
    /// Guests may have performance counters.
    pmu: AtomicBool,
    /// `KVM_X86_DISABLE_EXITS_*` of new vCPUs.
    disabled_exits: AtomicU64,
    /// Hypercalls that userspace answers: one bit for each.
    hypercall_exits: AtomicU64,
}

impl Enabled {
    pub(crate) const fn new() -> Self {
        Self {
            quirks_off: AtomicU64::new(0),
            user_space_msr: AtomicU32::new(0),
            platform_info: AtomicBool::new(true),
            exit_on_emulation_failure: AtomicBool::new(false),
            exception_payload: AtomicBool::new(false),
            triple_fault_event: AtomicBool::new(false),
            max_vcpu_id: AtomicU32::new(0),
            boot_cpu: AtomicU32::new(0),
            bus_cycle_ns: AtomicU64::new(BUS_CYCLE_NS),
            tsc_khz: AtomicU32::new(0),
            pmu: AtomicBool::new(true),
            disabled_exits: AtomicU64::new(0),
            hypercall_exits: AtomicU64::new(0),
        }
    }

    /// Whether the behaviour `quirk`, one of `KVM_X86_QUIRK_*`, is on, as it is by default.
    pub(crate) fn has_quirk(&self, quirk: u64) -> bool {
        self.quirks_off.load(Relaxed) & quirk == 0
    }

    pub(crate) fn user_space_msr(&self) -> u32 {
        self.user_space_msr.load(Relaxed)
    }

    pub(crate) fn platform_info(&self) -> bool {
        self.platform_info.load(Relaxed)
    }

    pub(crate) fn exit_on_emulation_failure(&self) -> bool {
        self.exit_on_emulation_failure.load(Relaxed)
    }

    pub(crate) fn exception_payload(&self) -> bool {
        self.exception_payload.load(Relaxed)
    }

    pub(crate) fn triple_fault_event(&self) -> bool {
        self.triple_fault_event.load(Relaxed)
    }

    pub(crate) fn bus_cycle_ns(&self) -> u64 {
        self.bus_cycle_ns.load(Relaxed)
    }

    /// Frequency of new vCPUs' TSCs; 0: the host's.
    pub(crate) fn tsc_khz(&self) -> u32 {
        self.tsc_khz.load(Relaxed)
    }

    /// Whether guests may have performance counters.
    pub(crate) fn pmu(&self) -> bool {
        self.pmu.load(Relaxed)
    }

    /// What the guest does without an exit. Does not change once there is a vCPU.
    pub(crate) fn unintercepted(&self) -> Unintercepted {
        let has = |flag| self.disabled_exits.load(Relaxed) & flag != 0;
        Unintercepted {
            mwait: has(KVM_X86_DISABLE_EXITS_MWAIT),
            hlt: has(KVM_X86_DISABLE_EXITS_HLT),
            sleep_counters: has(KVM_X86_DISABLE_EXITS_CSTATE),
            frequency_counters: has(KVM_X86_DISABLE_EXITS_APERFMPERF),
        }
    }

    /// Whether userspace answers the hypercall with this number, below 64.
    pub(crate) fn has_hypercall_exit(&self, number: u64) -> bool {
        self.hypercall_exits.load(Relaxed) >> (number & 63) & 1 != 0
    }

    pub(crate) fn boot_cpu(&self) -> u32 {
        self.boot_cpu.load(Relaxed)
    }

    /// Whether a vCPU may have this id.
    pub(crate) fn takes_id(&self, id: usize) -> bool {
        let highest = match self.max_vcpu_id.load(Relaxed) {
            0 => MAX_VCPUS,
            limit => limit,
        };
        id < highest as usize
    }
}

impl<V: Vendor> Vm<V> {
    /// KVM_SET_TSC_KHZ on a VM: the frequency of its future vCPUs' TSCs; 0 is the host's. `EINVAL` when there are vCPUs, and for more than
    /// the CPU can make of its own. One that cannot be otherwise counts for nothing, as in KVM.
    pub(crate) fn set_tsc_khz(&self, khz: u32) -> Result {
        let format = self.host.owner.hardware().tsc_format();
        if format.is_some_and(|format| khz >= format.end_khz(timer::tsc_khz())) {
            return Err(EINVAL);
        }
        let _setup = self.setup.lock();
        if self.peers.len() > 0 {
            return Err(EINVAL);
        }
        self.enabled.tsc_khz.store(khz, Relaxed);
        Ok(())
    }

    /// KVM_ENABLE_CAP on a VM. `EINVAL` for a capability that cannot be enabled, and for arguments it does not know.
    pub(crate) fn enable_cap(&self, request: &KvmEnableCap) -> Result {
        let enabled = &self.enabled;
        let value = request.args[0];
        if request.flags != 0 {
            return Err(EINVAL);
        }
        match request.cap {
            KVM_CAP_DISABLE_QUIRKS2 if value & !SUPPORTED_QUIRKS != 0 => return Err(EINVAL),
            KVM_CAP_DISABLE_QUIRKS | KVM_CAP_DISABLE_QUIRKS2 => {
                enabled.quirks_off.fetch_or(value & SUPPORTED_QUIRKS, Relaxed);
            }
            KVM_CAP_X86_USER_SPACE_MSR if value & !u64::from(KVM_MSR_EXIT_REASON_VALID_MASK) != 0 => {
                return Err(EINVAL)
            }
            KVM_CAP_X86_USER_SPACE_MSR => enabled.user_space_msr.store(value as u32, Relaxed),
            KVM_CAP_MSR_PLATFORM_INFO => enabled.platform_info.store(value != 0, Relaxed),
            KVM_CAP_EXIT_ON_EMULATION_FAILURE if value > 1 => return Err(EINVAL),
            KVM_CAP_EXIT_ON_EMULATION_FAILURE => enabled.exit_on_emulation_failure.store(value != 0, Relaxed),
            KVM_CAP_EXCEPTION_PAYLOAD => enabled.exception_payload.store(value != 0, Relaxed),
            KVM_CAP_X86_TRIPLE_FAULT_EVENT => enabled.triple_fault_event.store(value != 0, Relaxed),
            KVM_CAP_EXIT_HYPERCALL if value & !KVM_EXIT_HYPERCALL_VALID_MASK != 0 => return Err(EINVAL),
            KVM_CAP_EXIT_HYPERCALL => enabled.hypercall_exits.store(value, Relaxed),
            KVM_CAP_MAX_VCPU_ID => return self.limit_vcpu_ids(value),
            KVM_CAP_PMU_CAPABILITY => {
                let _setup = self.setup.lock();
                if self.host.msr_config.pmu == PmuCaps::NONE
                    || value & !KVM_PMU_CAP_DISABLE != 0
                    || self.peers.len() > 0
                {
                    return Err(EINVAL);
                }
                enabled.pmu.store(value == 0, Relaxed);
            }
            KVM_CAP_X86_APIC_BUS_CYCLES_NS => {
                // Ticks of 32 bits and a divisor of 128 must not overflow.
                if value == 0 || value.checked_mul(u64::from(u32::MAX) * 128).is_none() {
                    return Err(EINVAL);
                }
                let _setup = self.setup.lock();
                if !self.has_irqchip() {
                    return Err(ENXIO);
                }
                if self.peers.len() > 0 {
                    return Err(EINVAL);
                }
                enabled.bus_cycle_ns.store(value, Relaxed);
            }
            KVM_CAP_X86_DISABLE_EXITS => {
                if value & !self.host.disable_exits() != 0 {
                    return Err(EINVAL);
                }
                let _setup = self.setup.lock();
                if self.peers.len() > 0 {
                    return Err(EINVAL);
                }
                enabled.disabled_exits.fetch_or(value, Relaxed);
            }
            KVM_CAP_DIRTY_LOG_RING | KVM_CAP_DIRTY_LOG_RING_ACQ_REL => {
                let entries = entries_of(value, self.host.owner.hardware().write_log_entries())?;
                let _setup = self.setup.lock();
                if self.peers.len() > 0 || self.peers.ring_entries() != 0 {
                    return Err(EINVAL);
                }
                self.peers.set_ring_entries(entries);
            }
            KVM_CAP_SPLIT_IRQCHIP => {
                let pins = u16::try_from(value).ok().filter(|&pins| usize::from(pins) <= MAX_ROUTES).ok_or(EINVAL)?;
                let _setup = self.setup.lock();
                if self.peers.len() > 0 {
                    return Err(EEXIST);
                }
                return self.irq.split(pins);
            }
            KVM_CAP_X2APIC_API if value & !u64::from(KVM_X2APIC_API_VALID_FLAGS) != 0 => return Err(EINVAL),
            KVM_CAP_X2APIC_API => {
                let has = |flag: u32| value & u64::from(flag) != 0;
                let wide_ids = has(KVM_X2APIC_API_USE_32BIT_IDS);
                self.irq.set_x2apic_api(wide_ids, has(KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK));
            }
            KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => {
                let enable = value & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
                let known = if enable { KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET } else { 0 };
                if value & !known != 0 {
                    return Err(EINVAL);
                }
                self.memory.set_manual_protect(enable, value & KVM_DIRTY_LOG_INITIALLY_SET != 0);
            }
            _ => return Err(EINVAL),
        }
        Ok(())
    }

    /// KVM_CAP_MAX_VCPU_ID: once, and the same value again.
    fn limit_vcpu_ids(&self, limit: u64) -> Result {
        let _setup = self.setup.lock();
        let limit = u32::try_from(limit).ok().filter(|limit| *limit <= MAX_VCPUS).ok_or(EINVAL)?;
        let now = match self.enabled.max_vcpu_id.load(Relaxed) {
            0 if self.peers.len() > 0 => MAX_VCPUS,
            now => now,
        };
        if self.enabled.boot_cpu() > limit || now != 0 && now != limit {
            return Err(EINVAL);
        }
        self.enabled.max_vcpu_id.store(limit, Relaxed);
        Ok(())
    }

    /// KVM_SET_BOOT_CPU_ID. `EBUSY` when there is a vCPU, `EINVAL` when no vCPU may have this id.
    pub(crate) fn set_boot_cpu(&self, id: usize) -> Result {
        let _setup = self.setup.lock();
        if self.peers.len() > 0 {
            return Err(EBUSY);
        }
        let limit = self.enabled.max_vcpu_id.load(Relaxed);
        if id > MAX_VCPUS as usize || limit != 0 && id > limit as usize {
            return Err(EINVAL);
        }
        self.enabled.boot_cpu.store(id as u32, Relaxed);
        Ok(())
    }
}

impl<V: Vendor> Core<V> {
    /// KVM_ENABLE_CAP on a vCPU.
    pub(crate) fn enable_cap(&mut self, request: &KvmEnableCap) -> Result {
        match request.cap {
            _ if request.flags != 0 => Err(EINVAL),
            KVM_CAP_ENFORCE_PV_FEATURE_CPUID => {
                self.state.enforce_pv = request.args[0] != 0;
                self.state.update_pv_features();
                Ok(())
            }
            _ => Err(EINVAL),
        }
    }
}
