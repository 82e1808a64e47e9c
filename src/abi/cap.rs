// SPDX-License-Identifier: GPL-2.0
//! KVM's capabilities for x86 and what KVM_CHECK_EXTENSION answers for each.
//!
//! One table, also the source of `uapi/README.md`. A capability is announced when what it stands for works, never
//! before: clients rely on it without further checks.
#![forbid(unsafe_code)]

use super::irq::KVM_MAX_IRQ_ROUTES;
use super::run::{KVM_EXIT_HYPERCALL_VALID_MASK, KVM_SYNC_X86_VALID_FIELDS};
use super::vcpu::KVM_GUESTDBG_VALID_MASK;
use super::vm::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_DIRTY_GFN_BYTES,
    KVM_DIRTY_RING_MAX_ENTRIES, KVM_PMU_CAP_DISABLE, KVM_X2APIC_API_VALID_FLAGS, SUPPORTED_QUIRKS,
};

/// Machine-check banks a vCPU may be given.
pub const MCE_BANKS: u32 = 32;

/// What KVM_CHECK_EXTENSION answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// 0.
    No,
    Value(u32),
    RecommendedVcpus,
    MaxVcpus,
    MaxVcpuId,
    MemorySlots,
    /// 1 where the host has XSAVE.
    Xsave,
    /// 1 where the CPU scales guests' TSCs.
    TscScaling,
    /// What userspace may choose about performance counters, where guests can have them.
    PmuCapability,
    /// Bytes of `kvm_xsave` with every component a guest may have.
    XsaveBytes,
    /// `KVM_X86_DISABLE_EXITS_*` that this host allows.
    DisableExits,
}

/// What the module knows at run time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub recommended_vcpus: u32,
    pub max_vcpus: u32,
    /// Highest vCPU id plus 1.
    pub max_vcpu_id: u32,
    pub memory_slots: u32,
    pub xsave: bool,
    pub tsc_scaling: bool,
    /// Guests can have performance counters.
    pub pmu: bool,
    /// At least 4,096.
    pub xsave_bytes: u32,
    pub disable_exits: u64,
}

impl Answer {
    /// The number for userspace.
    pub const fn value(self, limits: &Limits) -> u32 {
        match self {
            Self::No => 0,
            Self::Value(value) => value,
            Self::RecommendedVcpus => limits.recommended_vcpus,
            Self::MaxVcpus => limits.max_vcpus,
            Self::MaxVcpuId => limits.max_vcpu_id,
            Self::MemorySlots => limits.memory_slots,
            Self::Xsave => limits.xsave as u32,
            Self::TscScaling => limits.tsc_scaling as u32,
            Self::PmuCapability => limits.pmu as u32 * KVM_PMU_CAP_DISABLE as u32,
            Self::XsaveBytes => limits.xsave_bytes,
            Self::DisableExits => limits.disable_exits as u32,
        }
    }
}

/// One row of [`CAPABILITIES`].
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    pub name: &'static str,
    pub number: u32,
    pub answer: Answer,
    pub note: &'static str,
}

/// What KVM_CHECK_EXTENSION returns for `number`: 0 for whatever is not in the table.
pub fn check_extension(number: u64, limits: &Limits) -> u32 {
    let found = CAPABILITIES.iter().find(|capability| u64::from(capability.number) == number);
    found.map_or(0, |capability| capability.answer.value(limits))
}

macro_rules! capabilities {
    ($($name:ident = $number:literal, $answer:ident $(($value:expr))? $(, $note:literal)?;)*) => {
        $(pub const $name: u32 = $number;)*

        /// Every KVM capability that concerns x86 in Linux 7.2.
        pub const CAPABILITIES: &[Capability] = &[$(
            Capability {
                name: stringify!($name),
                number: $name,
                answer: Answer::$answer $(($value))?,
                note: concat!($($note)?),
            },
        )*];
    };
}

capabilities! {
    KVM_CAP_IRQCHIP = 0, Value(1);
    KVM_CAP_HLT = 1, Value(1);
    KVM_CAP_MMU_SHADOW_CACHE_CONTROL = 2, Value(1);
    KVM_CAP_USER_MEMORY = 3, Value(1);
    KVM_CAP_SET_TSS_ADDR = 4, Value(1);
    KVM_CAP_VAPIC = 6, Value(1);
    KVM_CAP_EXT_CPUID = 7, Value(1);
    KVM_CAP_CLOCKSOURCE = 8, Value(1);
    KVM_CAP_NR_VCPUS = 9, RecommendedVcpus, "CPUs online";
    KVM_CAP_NR_MEMSLOTS = 10, MemorySlots;
    KVM_CAP_PIT = 11, No;
    KVM_CAP_NOP_IO_DELAY = 12, Value(1);
    KVM_CAP_PV_MMU = 13, No;
    KVM_CAP_MP_STATE = 14, Value(1);
    KVM_CAP_COALESCED_MMIO = 15, Value(KVM_COALESCED_MMIO_PAGE_OFFSET), "page of the ring";
    KVM_CAP_SYNC_MMU = 16, Value(1);
    KVM_CAP_IOMMU = 18, No;
    KVM_CAP_DESTROY_MEMORY_REGION_WORKS = 21, Value(1);
    KVM_CAP_USER_NMI = 22, Value(1);
    KVM_CAP_SET_GUEST_DEBUG = 23, Value(1);
    KVM_CAP_REINJECT_CONTROL = 24, Value(1);
    KVM_CAP_IRQ_ROUTING = 25, Value(KVM_MAX_IRQ_ROUTES), "entries of a table";
    KVM_CAP_IRQ_INJECT_STATUS = 26, Value(1);
    KVM_CAP_ASSIGN_DEV_IRQ = 29, No;
    KVM_CAP_JOIN_MEMORY_REGIONS_WORKS = 30, Value(1);
    KVM_CAP_MCE = 31, Value(MCE_BANKS), "banks";
    KVM_CAP_IRQFD = 32, Value(1);
    KVM_CAP_PIT2 = 33, Value(1);
    KVM_CAP_SET_BOOT_CPU_ID = 34, Value(1);
    KVM_CAP_PIT_STATE2 = 35, Value(1);
    KVM_CAP_IOEVENTFD = 36, Value(1);
    KVM_CAP_SET_IDENTITY_MAP_ADDR = 37, Value(1);
    KVM_CAP_XEN_HVM = 38, No;
    KVM_CAP_ADJUST_CLOCK = 39, Value(KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC), "flags";
    KVM_CAP_INTERNAL_ERROR_DATA = 40, Value(1);
    KVM_CAP_VCPU_EVENTS = 41, Value(1);
    KVM_CAP_HYPERV = 44, No;
    KVM_CAP_HYPERV_VAPIC = 45, No;
    KVM_CAP_HYPERV_SPIN = 46, No;
    KVM_CAP_PCI_SEGMENT = 47, No;
    KVM_CAP_INTR_SHADOW = 49, Value(1);
    KVM_CAP_DEBUGREGS = 50, Value(1);
    KVM_CAP_X86_ROBUST_SINGLESTEP = 51, Value(1);
    KVM_CAP_ENABLE_CAP = 54, Value(1);
    KVM_CAP_XSAVE = 55, Value(1);
    KVM_CAP_XCRS = 56, Xsave, "1 where the host has XSAVE";
    KVM_CAP_ASYNC_PF = 59, No;
    KVM_CAP_TSC_CONTROL = 60, TscScaling, "where the CPU scales";
    KVM_CAP_GET_TSC_KHZ = 61, Value(1);
    KVM_CAP_MAX_VCPUS = 66, MaxVcpus;
    KVM_CAP_ONE_REG = 70, Value(1), "MSRs";
    KVM_CAP_TSC_DEADLINE_TIMER = 72, Value(1);
    KVM_CAP_SYNC_REGS = 74, Value(KVM_SYNC_X86_VALID_FIELDS as u32), "registers, sregs, events";
    KVM_CAP_PCI_2_3 = 75, No;
    KVM_CAP_KVMCLOCK_CTRL = 76, Value(1);
    KVM_CAP_SIGNAL_MSI = 77, Value(1);
    KVM_CAP_READONLY_MEM = 81, Value(1);
    KVM_CAP_IRQFD_RESAMPLE = 82, Value(1);
    KVM_CAP_DEVICE_CTRL = 89, No;
    KVM_CAP_EXT_EMUL_CPUID = 95, Value(1);
    KVM_CAP_HYPERV_TIME = 96, No;
    KVM_CAP_IOAPIC_POLARITY_IGNORED = 97, Value(1);
    KVM_CAP_ENABLE_CAP_VM = 98, Value(1);
    KVM_CAP_IOEVENTFD_NO_LENGTH = 100, Value(1);
    KVM_CAP_VM_ATTRIBUTES = 101, No;
    KVM_CAP_CHECK_EXTENSION_VM = 105, Value(1);
    KVM_CAP_DISABLE_QUIRKS = 116, Value(1);
    KVM_CAP_X86_SMM = 117, No;
    KVM_CAP_MULTI_ADDRESS_SPACE = 118, No;
    KVM_CAP_GUEST_DEBUG_HW_BPS = 119, No;
    KVM_CAP_GUEST_DEBUG_HW_WPS = 120, No;
    KVM_CAP_SPLIT_IRQCHIP = 121, Value(1);
    KVM_CAP_IOEVENTFD_ANY_LENGTH = 122, Value(1);
    KVM_CAP_HYPERV_SYNIC = 123, No;
    KVM_CAP_VCPU_ATTRIBUTES = 127, Value(1);
    KVM_CAP_MAX_VCPU_ID = 128, MaxVcpuId;
    KVM_CAP_X2APIC_API = 129, Value(KVM_X2APIC_API_VALID_FLAGS), "flags";
    KVM_CAP_IMMEDIATE_EXIT = 136, Value(1);
    KVM_CAP_X86_DISABLE_EXITS = 143, DisableExits, "flags; PAUSE, and what the CPU allows";
    KVM_CAP_HYPERV_SYNIC2 = 148, No;
    KVM_CAP_HYPERV_VP_INDEX = 149, No;
    KVM_CAP_GET_MSR_FEATURES = 153, Value(1);
    KVM_CAP_HYPERV_EVENTFD = 154, No;
    KVM_CAP_HYPERV_TLBFLUSH = 155, No;
    KVM_CAP_NESTED_STATE = 157, No;
    KVM_CAP_MSR_PLATFORM_INFO = 159, Value(1);
    KVM_CAP_HYPERV_SEND_IPI = 161, No;
    KVM_CAP_COALESCED_PIO = 162, Value(1);
    KVM_CAP_HYPERV_ENLIGHTENED_VMCS = 163, No;
    KVM_CAP_EXCEPTION_PAYLOAD = 164, Value(1);
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT = 166, No;
    KVM_CAP_HYPERV_CPUID = 167, No;
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168, Value(3), "flags";
    KVM_CAP_PMU_EVENT_FILTER = 173, Value(1);
    KVM_CAP_HYPERV_DIRECT_TLBFLUSH = 175, No;
    KVM_CAP_HALT_POLL = 182, No;
    KVM_CAP_ASYNC_PF_INT = 183, No;
    KVM_CAP_LAST_CPU = 184, Value(1);
    KVM_CAP_SMALLER_MAXPHYADDR = 185, No;
    KVM_CAP_STEAL_TIME = 187, Value(1);
    KVM_CAP_X86_USER_SPACE_MSR = 188, Value(1);
    KVM_CAP_X86_MSR_FILTER = 189, Value(1);
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID = 190, Value(1);
    KVM_CAP_SYS_HYPERV_CPUID = 191, No;
    KVM_CAP_DIRTY_LOG_RING = 192, Value(KVM_DIRTY_RING_MAX_ENTRIES * KVM_DIRTY_GFN_BYTES), "bytes of a ring";
    KVM_CAP_X86_BUS_LOCK_EXIT = 193, No;
    KVM_CAP_SET_GUEST_DEBUG2 = 195, Value(KVM_GUESTDBG_VALID_MASK), "control bits";
    KVM_CAP_SGX_ATTRIBUTE = 196, No;
    KVM_CAP_VM_COPY_ENC_CONTEXT_FROM = 197, No;
    KVM_CAP_HYPERV_ENFORCE_CPUID = 199, No;
    KVM_CAP_SREGS2 = 200, Value(1);
    KVM_CAP_EXIT_HYPERCALL = 201, Value(KVM_EXIT_HYPERCALL_VALID_MASK as u32), "bit mask: MAP_GPA_RANGE";
    KVM_CAP_BINARY_STATS_FD = 203, Value(1);
    KVM_CAP_EXIT_ON_EMULATION_FAILURE = 204, Value(1);
    KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM = 206, No;
    KVM_CAP_VM_GPA_BITS = 207, No;
    KVM_CAP_XSAVE2 = 208, XsaveBytes, "bytes, 4,096 or more";
    KVM_CAP_SYS_ATTRIBUTES = 209, Value(1);
    KVM_CAP_PMU_CAPABILITY = 212, PmuCapability, "flags, where guests can have counters";
    KVM_CAP_DISABLE_QUIRKS2 = 213, Value(SUPPORTED_QUIRKS as u32), "quirks that can be turned off";
    KVM_CAP_VM_TSC_CONTROL = 214, TscScaling, "where the CPU scales";
    KVM_CAP_SYSTEM_EVENT_DATA = 215, No;
    KVM_CAP_X86_TRIPLE_FAULT_EVENT = 218, Value(1);
    KVM_CAP_X86_NOTIFY_VMEXIT = 219, No;
    KVM_CAP_VM_DISABLE_NX_HUGE_PAGES = 220, No;
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL = 223, Value(KVM_DIRTY_RING_MAX_ENTRIES * KVM_DIRTY_GFN_BYTES), "bytes of a ring";
    KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP = 225, No;
    KVM_CAP_PMU_EVENT_MASKED_EVENTS = 226, Value(1);
    KVM_CAP_USER_MEMORY2 = 231, Value(1);
    KVM_CAP_MEMORY_FAULT_INFO = 232, Value(1);
    KVM_CAP_MEMORY_ATTRIBUTES = 233, No;
    KVM_CAP_GUEST_MEMFD = 234, No;
    KVM_CAP_VM_TYPES = 235, Value(1), "bit mask: type 0 only";
    KVM_CAP_PRE_FAULT_MEMORY = 236, Value(1);
    KVM_CAP_X86_APIC_BUS_CYCLES_NS = 237, Value(1), "nanoseconds; of a VM what it was set to";
    KVM_CAP_X86_GUEST_MODE = 238, Value(1), "KVM_RUN_X86_GUEST_MODE, which is never set";
    KVM_CAP_GUEST_MEMFD_FLAGS = 244, No;
}
