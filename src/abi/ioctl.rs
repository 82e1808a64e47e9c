// SPDX-License-Identifier: GPL-2.0
//! KVM's ioctl numbers for x86, and one table that says which of them Krab answers.
//!
//! The table is the source of `uapi/README.md`. What it calls refused gets ENOTTY, as KVM gives for numbers it does
//! not know.
#![forbid(unsafe_code)]

use super::{irq::*, vcpu::*, vm::*};
use core::mem::size_of;

/// The type byte of every KVM ioctl.
pub const KVMIO: u32 = 0xAE;

const WRITE: u32 = 1;
const READ: u32 = 2;

/// An ioctl number: direction from userspace's view, bytes of the argument, type, ordinal. `asm-generic/ioctl.h`.
const fn number(direction: u32, nr: u32, size: usize) -> u32 {
    assert!(nr < 256 && size < 1 << 14);
    direction << 30 | (size as u32) << 16 | KVMIO << 8 | nr
}

const fn io(nr: u32) -> u32 {
    number(0, nr, 0)
}
const fn iow<T>(nr: u32) -> u32 {
    number(WRITE, nr, size_of::<T>())
}
const fn ior<T>(nr: u32) -> u32 {
    number(READ, nr, size_of::<T>())
}
const fn iowr<T>(nr: u32) -> u32 {
    number(READ | WRITE, nr, size_of::<T>())
}

/// Bytes of the argument structure (its head, where entries follow).
pub const fn argument_bytes(number: u32) -> usize {
    (number >> 16 & 0x3FFF) as usize
}

/// On which file descriptors an ioctl works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scope(u8);

impl Scope {
    /// `/dev/krab` itself.
    pub const SYSTEM: Self = Self(1);
    pub const VM: Self = Self(2);
    pub const VCPU: Self = Self(4);
    /// What KVM_CREATE_DEVICE returns.
    pub const DEVICE: Self = Self(8);

    /// Either of both.
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether every scope of `other` is among these.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Whether Krab answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Supported,
    /// ENOTTY for an ioctl; 0 from KVM_CHECK_EXTENSION for a capability.
    Refused,
}

/// One row of [`IOCTLS`].
#[derive(Clone, Copy, Debug)]
pub struct Ioctl {
    pub name: &'static str,
    pub number: u32,
    pub scope: Scope,
    pub state: State,
    /// What a reader of the table should know; may be empty.
    pub note: &'static str,
}

const S: Scope = Scope::SYSTEM;
const V: Scope = Scope::VM;
const C: Scope = Scope::VCPU;

/// Declares the constants, checks each against the number in Linux's headers, and collects the table.
macro_rules! ioctls {
    ($($name:ident = $value:expr, $literal:literal, $scope:expr, $state:ident $(, $note:literal)?;)*) => {
        $(
            pub const $name: u32 = $value;
            const _: () = assert!($name == $literal);
        )*

        /// Every KVM ioctl for x86 in Linux 7.2.
        pub const IOCTLS: &[Ioctl] = &[$(
            Ioctl {
                name: stringify!($name),
                number: $name,
                scope: $scope,
                state: State::$state,
                note: concat!($($note)?),
            },
        )*];
    };
}

ioctls! {
    KVM_GET_API_VERSION = io(0x00), 0xAE00, S, Supported, "12";
    KVM_CREATE_VM = io(0x01), 0xAE01, S, Supported, "type 0 only";
    KVM_GET_MSR_INDEX_LIST = iowr::<KvmMsrList>(0x02), 0xC004_AE02, S, Supported;
    KVM_CHECK_EXTENSION = io(0x03), 0xAE03, S.or(V), Supported;
    KVM_GET_VCPU_MMAP_SIZE = io(0x04), 0xAE04, S, Supported;
    KVM_GET_SUPPORTED_CPUID = iowr::<KvmCpuid2>(0x05), 0xC008_AE05, S, Supported;
    KVM_GET_EMULATED_CPUID = iowr::<KvmCpuid2>(0x09), 0xC008_AE09, S, Supported, "no feature is";
    KVM_GET_MSR_FEATURE_INDEX_LIST = iowr::<KvmMsrList>(0x0A), 0xC004_AE0A, S, Supported;

    KVM_CREATE_VCPU = io(0x41), 0xAE41, V, Supported;
    KVM_GET_DIRTY_LOG = iow::<KvmDirtyLog>(0x42), 0x4010_AE42, V, Supported;
    KVM_SET_NR_MMU_PAGES = io(0x44), 0xAE44, V, Supported, "accepted and not used";
    KVM_GET_NR_MMU_PAGES = io(0x45), 0xAE45, V, Refused, "deprecated in KVM";
    KVM_SET_USER_MEMORY_REGION = iow::<KvmUserspaceMemoryRegion>(0x46), 0x4020_AE46, V, Supported;
    KVM_SET_TSS_ADDR = io(0x47), 0xAE47, V, Supported, "accepted and not used";
    KVM_SET_IDENTITY_MAP_ADDR = iow::<u64>(0x48), 0x4008_AE48, V, Supported, "used on Intel without unrestricted guest";
    KVM_SET_USER_MEMORY_REGION2 = iow::<KvmUserspaceMemoryRegion2>(0x49), 0x40A0_AE49, V, Supported, "no guest_memfd";
    KVM_CREATE_IRQCHIP = io(0x60), 0xAE60, V, Supported;
    KVM_IRQ_LINE = iow::<KvmIrqLevel>(0x61), 0x4008_AE61, V, Supported;
    KVM_GET_IRQCHIP = iowr::<KvmIrqchip>(0x62), 0xC208_AE62, V, Supported;
    KVM_SET_IRQCHIP = ior::<KvmIrqchip>(0x63), 0x8208_AE63, V, Supported, "the number says read, the call writes";
    KVM_CREATE_PIT = io(0x64), 0xAE64, V, Refused, "use KVM_CREATE_PIT2";
    KVM_GET_PIT = iowr::<KvmPitState>(0x65), 0xC048_AE65, V, Refused, "use KVM_GET_PIT2";
    KVM_SET_PIT = ior::<KvmPitState>(0x66), 0x8048_AE66, V, Refused, "use KVM_SET_PIT2";
    KVM_IRQ_LINE_STATUS = iowr::<KvmIrqLevel>(0x67), 0xC008_AE67, V, Supported;
    KVM_REGISTER_COALESCED_MMIO = iow::<KvmCoalescedMmioZone>(0x67), 0x4010_AE67, V, Supported;
    KVM_UNREGISTER_COALESCED_MMIO = iow::<KvmCoalescedMmioZone>(0x68), 0x4010_AE68, V, Supported;
    KVM_SET_GSI_ROUTING = iow::<KvmIrqRouting>(0x6A), 0x4008_AE6A, V, Supported;
    KVM_REINJECT_CONTROL = io(0x71), 0xAE71, V, Supported;
    KVM_IRQFD = iow::<KvmIrqfd>(0x76), 0x4020_AE76, V, Supported;
    KVM_CREATE_PIT2 = iow::<KvmPitConfig>(0x77), 0x4040_AE77, V, Supported;
    KVM_SET_BOOT_CPU_ID = io(0x78), 0xAE78, V, Supported;
    KVM_IOEVENTFD = iow::<KvmIoeventfd>(0x79), 0x4040_AE79, V, Supported;
    KVM_XEN_HVM_CONFIG = number(WRITE, 0x7A, 56), 0x4038_AE7A, V, Refused;
    KVM_SET_CLOCK = iow::<KvmClockData>(0x7B), 0x4030_AE7B, V, Supported;
    KVM_GET_CLOCK = ior::<KvmClockData>(0x7C), 0x8030_AE7C, V, Supported;
    KVM_GET_PIT2 = ior::<KvmPitState2>(0x9F), 0x8070_AE9F, V, Supported;
    KVM_SET_PIT2 = iow::<KvmPitState2>(0xA0), 0x4070_AEA0, V, Supported;
    KVM_SET_TSC_KHZ = io(0xA2), 0xAEA2, V.or(C), Supported;
    KVM_GET_TSC_KHZ = io(0xA3), 0xAEA3, V.or(C), Supported;
    KVM_SIGNAL_MSI = iow::<KvmMsi>(0xA5), 0x4020_AEA5, V, Supported;
    KVM_SET_PMU_EVENT_FILTER = iow::<KvmPmuEventFilter>(0xB2), 0x4020_AEB2, V, Supported;

    KVM_RUN = io(0x80), 0xAE80, C, Supported;
    KVM_GET_REGS = ior::<KvmRegs>(0x81), 0x8090_AE81, C, Supported;
    KVM_SET_REGS = iow::<KvmRegs>(0x82), 0x4090_AE82, C, Supported;
    KVM_GET_SREGS = ior::<KvmSregs>(0x83), 0x8138_AE83, C, Supported;
    KVM_SET_SREGS = iow::<KvmSregs>(0x84), 0x4138_AE84, C, Supported;
    KVM_TRANSLATE = iowr::<KvmTranslation>(0x85), 0xC018_AE85, C, Supported;
    KVM_INTERRUPT = iow::<KvmInterrupt>(0x86), 0x4004_AE86, C, Supported, "without an interrupt controller in the kernel";
    KVM_GET_MSRS = iowr::<KvmMsrs>(0x88), 0xC008_AE88, S.or(C), Supported, "on the system: feature MSRs";
    KVM_SET_MSRS = iow::<KvmMsrs>(0x89), 0x4008_AE89, C, Supported;
    KVM_SET_CPUID = number(WRITE, 0x8A, 8), 0x4008_AE8A, C, Refused, "use KVM_SET_CPUID2";
    KVM_SET_SIGNAL_MASK = iow::<KvmSignalMask>(0x8B), 0x4004_AE8B, C, Supported;
    KVM_GET_FPU = ior::<KvmFpu>(0x8C), 0x81A0_AE8C, C, Supported;
    KVM_SET_FPU = iow::<KvmFpu>(0x8D), 0x41A0_AE8D, C, Supported;
    KVM_GET_LAPIC = ior::<KvmLapicState>(0x8E), 0x8400_AE8E, C, Supported;
    KVM_SET_LAPIC = iow::<KvmLapicState>(0x8F), 0x4400_AE8F, C, Supported;
    KVM_SET_CPUID2 = iow::<KvmCpuid2>(0x90), 0x4008_AE90, C, Supported;
    KVM_GET_CPUID2 = iowr::<KvmCpuid2>(0x91), 0xC008_AE91, C, Supported;
    KVM_TPR_ACCESS_REPORTING = iowr::<KvmTprAccessCtl>(0x92), 0xC028_AE92, C, Supported;
    KVM_SET_VAPIC_ADDR = iow::<KvmVapicAddr>(0x93), 0x4008_AE93, C, Supported;
    KVM_GET_MP_STATE = ior::<KvmMpState>(0x98), 0x8004_AE98, C, Supported;
    KVM_SET_MP_STATE = iow::<KvmMpState>(0x99), 0x4004_AE99, C, Supported;
    KVM_NMI = io(0x9A), 0xAE9A, C, Supported;
    KVM_SET_GUEST_DEBUG = iow::<KvmGuestDebug>(0x9B), 0x4048_AE9B, C, Supported;
    KVM_X86_SETUP_MCE = iow::<u64>(0x9C), 0x4008_AE9C, C, Supported;
    KVM_X86_GET_MCE_CAP_SUPPORTED = ior::<u64>(0x9D), 0x8008_AE9D, S, Supported;
    KVM_X86_SET_MCE = iow::<KvmX86Mce>(0x9E), 0x4040_AE9E, C, Supported;
    KVM_GET_VCPU_EVENTS = ior::<KvmVcpuEvents>(0x9F), 0x8040_AE9F, C, Supported;
    KVM_SET_VCPU_EVENTS = iow::<KvmVcpuEvents>(0xA0), 0x4040_AEA0, C, Supported;
    KVM_GET_DEBUGREGS = ior::<KvmDebugregs>(0xA1), 0x8080_AEA1, C, Supported;
    KVM_SET_DEBUGREGS = iow::<KvmDebugregs>(0xA2), 0x4080_AEA2, C, Supported;
    KVM_ENABLE_CAP = iow::<KvmEnableCap>(0xA3), 0x4068_AEA3, V.or(C), Supported;
    KVM_GET_XSAVE = ior::<KvmXsave>(0xA4), 0x9000_AEA4, C, Supported;
    KVM_SET_XSAVE = iow::<KvmXsave>(0xA5), 0x5000_AEA5, C, Supported;
    KVM_GET_XCRS = ior::<KvmXcrs>(0xA6), 0x8188_AEA6, C, Supported;
    KVM_SET_XCRS = iow::<KvmXcrs>(0xA7), 0x4188_AEA7, C, Supported;
    KVM_GET_ONE_REG = iow::<KvmOneReg>(0xAB), 0x4010_AEAB, C, Supported, "MSRs";
    KVM_SET_ONE_REG = iow::<KvmOneReg>(0xAC), 0x4010_AEAC, C, Supported, "MSRs";
    KVM_KVMCLOCK_CTRL = io(0xAD), 0xAEAD, C, Supported;
    KVM_GET_REG_LIST = iowr::<u64>(0xB0), 0xC008_AEB0, C, Supported, "of registers that are no MSRs: none";
    KVM_SMI = io(0xB7), 0xAEB7, C, Refused, "no system management mode";
    KVM_MEMORY_ENCRYPT_OP = iowr::<u64>(0xBA), 0xC008_AEBA, V.or(C), Refused;
    KVM_MEMORY_ENCRYPT_REG_REGION = number(READ, 0xBB, 16), 0x8010_AEBB, V, Refused;
    KVM_MEMORY_ENCRYPT_UNREG_REGION = number(READ, 0xBC, 16), 0x8010_AEBC, V, Refused;
    KVM_HYPERV_EVENTFD = number(WRITE, 0xBD, 24), 0x4018_AEBD, V, Refused;
    KVM_GET_NESTED_STATE = number(READ | WRITE, 0xBE, 128), 0xC080_AEBE, C, Refused, "no nested virtualization";
    KVM_SET_NESTED_STATE = number(WRITE, 0xBF, 128), 0x4080_AEBF, C, Refused, "no nested virtualization";
    KVM_CLEAR_DIRTY_LOG = iowr::<KvmClearDirtyLog>(0xC0), 0xC018_AEC0, V, Supported;
    KVM_GET_SUPPORTED_HV_CPUID = iowr::<KvmCpuid2>(0xC1), 0xC008_AEC1, S.or(C), Refused;
    KVM_X86_SET_MSR_FILTER = iow::<KvmMsrFilter>(0xC6), 0x4188_AEC6, V, Supported;
    KVM_RESET_DIRTY_RINGS = io(0xC7), 0xAEC7, V, Supported;
    KVM_XEN_HVM_GET_ATTR = number(READ | WRITE, 0xC8, 72), 0xC048_AEC8, V, Refused;
    KVM_XEN_HVM_SET_ATTR = number(WRITE, 0xC9, 72), 0x4048_AEC9, V, Refused;
    KVM_XEN_VCPU_GET_ATTR = number(READ | WRITE, 0xCA, 72), 0xC048_AECA, C, Refused;
    KVM_XEN_VCPU_SET_ATTR = number(WRITE, 0xCB, 72), 0x4048_AECB, C, Refused;
    KVM_GET_SREGS2 = ior::<KvmSregs2>(0xCC), 0x8140_AECC, C, Supported;
    KVM_SET_SREGS2 = iow::<KvmSregs2>(0xCD), 0x4140_AECD, C, Supported;
    KVM_GET_STATS_FD = io(0xCE), 0xAECE, V.or(C), Supported;
    KVM_GET_XSAVE2 = ior::<KvmXsave>(0xCF), 0x9000_AECF, C, Supported;
    KVM_XEN_HVM_EVTCHN_SEND = number(WRITE, 0xD0, 12), 0x400C_AED0, V, Refused;
    KVM_SET_MEMORY_ATTRIBUTES = iow::<KvmMemoryAttributes>(0xD2), 0x4020_AED2, V, Refused;
    KVM_CREATE_GUEST_MEMFD = iowr::<KvmCreateGuestMemfd>(0xD4), 0xC040_AED4, V, Refused;
    KVM_PRE_FAULT_MEMORY = iowr::<KvmPreFaultMemory>(0xD5), 0xC040_AED5, C, Supported;

    KVM_CREATE_DEVICE = iowr::<KvmCreateDevice>(0xE0), 0xC00C_AEE0, V, Refused;
    KVM_SET_DEVICE_ATTR = iow::<KvmDeviceAttr>(0xE1), 0x4018_AEE1, C, Supported, "the offset of the TSC; ENOTTY on other descriptors";
    KVM_GET_DEVICE_ATTR = iow::<KvmDeviceAttr>(0xE2), 0x4018_AEE2, S.or(C), Supported, "on the system: XCR0; of a vCPU: the offset of its TSC";
    KVM_HAS_DEVICE_ATTR = iow::<KvmDeviceAttr>(0xE3), 0x4018_AEE3, S.or(C), Supported, "likewise";
}

/// KVM ioctls of other architectures, refused like any unknown number.
pub const FOREIGN_IOCTLS: &[&str] = &[
    "KVM_ALLOCATE_RMA",
    "KVM_ARM_*",
    "KVM_CREATE_SPAPR_TCE",
    "KVM_CREATE_SPAPR_TCE_64",
    "KVM_DIRTY_TLB",
    "KVM_PPC_*",
    "KVM_S390_*",
];
