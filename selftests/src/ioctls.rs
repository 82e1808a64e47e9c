// SPDX-License-Identifier: GPL-2.0
//! The ioctl numbers of the KVM API ("The Definitive KVM API Documentation"), and a table of them for the fuzzer.

use kvm_bindings::*;
use std::mem::size_of;

/// Which of the three kinds of descriptor a call belongs to. A few belong to two; the table names the first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    System,
    Vm,
    Vcpu,
}

#[derive(Clone, Copy, Debug)]
pub struct Ioctl {
    pub name: &'static str,
    pub kind: Kind,
    pub nr: u32,
}

impl Ioctl {
    /// Bytes of the argument structure, without a flexible array behind it.
    pub fn size(&self) -> usize {
        (self.nr >> 16) as usize & 0x3fff
    }
}

/// An ioctl number of KVM's type. `dir`: 0 none, 1 user writes (`_IOW`), 2 user reads (`_IOR`), 3 both.
pub const fn number(dir: u32, nr: u32, size: usize) -> u32 {
    dir << 30 | (size as u32) << 16 | KVMIO << 8 | nr
}

const KVMIO: u32 = 0xae;
const N: u32 = 0;
const W: u32 = 1;
const R: u32 = 2;
const RW: u32 = 3;

macro_rules! ioctls {
    ($($kind:ident { $($name:ident = $dir:ident $nr:literal $ty:ty;)* })*) => {
        $($(pub const $name: u32 = number($dir, $nr, size_of::<$ty>());)*)*
        pub const ALL: &[Ioctl] = &[
            $($(Ioctl { name: stringify!($name), kind: Kind::$kind, nr: $name },)*)*
        ];
    };
}

ioctls! {
    System {
        KVM_GET_API_VERSION = N 0x00 ();
        KVM_CREATE_VM = N 0x01 ();
        KVM_GET_MSR_INDEX_LIST = RW 0x02 kvm_msr_list;
        KVM_CHECK_EXTENSION = N 0x03 ();
        KVM_GET_VCPU_MMAP_SIZE = N 0x04 ();
        KVM_GET_SUPPORTED_CPUID = RW 0x05 kvm_cpuid2;
        KVM_GET_EMULATED_CPUID = RW 0x09 kvm_cpuid2;
        KVM_GET_MSR_FEATURE_INDEX_LIST = RW 0x0a kvm_msr_list;
        KVM_X86_GET_MCE_CAP_SUPPORTED = R 0x9d u64;
    }
    Vm {
        KVM_CREATE_VCPU = N 0x41 ();
        KVM_GET_DIRTY_LOG = W 0x42 kvm_dirty_log;
        KVM_SET_NR_MMU_PAGES = N 0x44 ();
        KVM_GET_NR_MMU_PAGES = N 0x45 ();
        KVM_SET_USER_MEMORY_REGION = W 0x46 kvm_userspace_memory_region;
        KVM_SET_TSS_ADDR = N 0x47 ();
        KVM_SET_IDENTITY_MAP_ADDR = W 0x48 u64;
        KVM_SET_USER_MEMORY_REGION2 = W 0x49 kvm_userspace_memory_region2;
        KVM_CREATE_IRQCHIP = N 0x60 ();
        KVM_IRQ_LINE = W 0x61 kvm_irq_level;
        KVM_GET_IRQCHIP = RW 0x62 kvm_irqchip;
        KVM_SET_IRQCHIP = R 0x63 kvm_irqchip;
        KVM_CREATE_PIT = N 0x64 ();
        KVM_GET_PIT = RW 0x65 kvm_pit_state;
        KVM_SET_PIT = R 0x66 kvm_pit_state;
        KVM_IRQ_LINE_STATUS = RW 0x67 kvm_irq_level;
        KVM_REGISTER_COALESCED_MMIO = W 0x67 kvm_coalesced_mmio_zone;
        KVM_UNREGISTER_COALESCED_MMIO = W 0x68 kvm_coalesced_mmio_zone;
        KVM_SET_GSI_ROUTING = W 0x6a kvm_irq_routing;
        KVM_REINJECT_CONTROL = N 0x71 ();
        KVM_IRQFD = W 0x76 kvm_irqfd;
        KVM_CREATE_PIT2 = W 0x77 kvm_pit_config;
        KVM_SET_BOOT_CPU_ID = N 0x78 ();
        KVM_IOEVENTFD = W 0x79 kvm_ioeventfd;
        KVM_SET_CLOCK = W 0x7b kvm_clock_data;
        KVM_GET_CLOCK = R 0x7c kvm_clock_data;
        KVM_GET_PIT2 = R 0x9f kvm_pit_state2;
        KVM_SET_PIT2 = W 0xa0 kvm_pit_state2;
        KVM_SIGNAL_MSI = W 0xa5 kvm_msi;
        KVM_CLEAR_DIRTY_LOG = RW 0xc0 kvm_clear_dirty_log;
        KVM_X86_SET_MSR_FILTER = W 0xc6 kvm_msr_filter;
        KVM_RESET_DIRTY_RINGS = N 0xc7 ();
        KVM_CREATE_DEVICE = RW 0xe0 kvm_create_device;
        KVM_SET_DEVICE_ATTR = W 0xe1 kvm_device_attr;
        KVM_GET_DEVICE_ATTR = W 0xe2 kvm_device_attr;
        KVM_HAS_DEVICE_ATTR = W 0xe3 kvm_device_attr;
        KVM_GET_STATS_FD = N 0xce ();
        KVM_ENABLE_CAP = W 0xa3 kvm_enable_cap;
    }
    Vcpu {
        KVM_RUN = N 0x80 ();
        KVM_GET_REGS = R 0x81 kvm_regs;
        KVM_SET_REGS = W 0x82 kvm_regs;
        KVM_GET_SREGS = R 0x83 kvm_sregs;
        KVM_SET_SREGS = W 0x84 kvm_sregs;
        KVM_TRANSLATE = RW 0x85 kvm_translation;
        KVM_INTERRUPT = W 0x86 kvm_interrupt;
        KVM_GET_MSRS = RW 0x88 kvm_msrs;
        KVM_SET_MSRS = W 0x89 kvm_msrs;
        KVM_SET_CPUID = W 0x8a kvm_cpuid;
        KVM_SET_SIGNAL_MASK = W 0x8b kvm_signal_mask;
        KVM_GET_FPU = R 0x8c kvm_fpu;
        KVM_SET_FPU = W 0x8d kvm_fpu;
        KVM_GET_LAPIC = R 0x8e kvm_lapic_state;
        KVM_SET_LAPIC = W 0x8f kvm_lapic_state;
        KVM_SET_CPUID2 = W 0x90 kvm_cpuid2;
        KVM_GET_CPUID2 = RW 0x91 kvm_cpuid2;
        KVM_TPR_ACCESS_REPORTING = RW 0x92 kvm_tpr_access_ctl;
        KVM_SET_VAPIC_ADDR = W 0x93 kvm_vapic_addr;
        KVM_GET_MP_STATE = R 0x98 kvm_mp_state;
        KVM_SET_MP_STATE = W 0x99 kvm_mp_state;
        KVM_NMI = N 0x9a ();
        KVM_SET_GUEST_DEBUG = W 0x9b kvm_guest_debug;
        KVM_X86_SETUP_MCE = W 0x9c u64;
        KVM_X86_SET_MCE = W 0x9e kvm_x86_mce;
        KVM_GET_VCPU_EVENTS = R 0x9f kvm_vcpu_events;
        KVM_SET_VCPU_EVENTS = W 0xa0 kvm_vcpu_events;
        KVM_GET_DEBUGREGS = R 0xa1 kvm_debugregs;
        KVM_SET_DEBUGREGS = W 0xa2 kvm_debugregs;
        KVM_SET_TSC_KHZ = N 0xa2 ();
        KVM_GET_TSC_KHZ = N 0xa3 ();
        KVM_GET_XSAVE = R 0xa4 kvm_xsave;
        KVM_SET_XSAVE = W 0xa5 kvm_xsave;
        KVM_GET_XCRS = R 0xa6 kvm_xcrs;
        KVM_SET_XCRS = W 0xa7 kvm_xcrs;
        KVM_GET_ONE_REG = W 0xab kvm_one_reg;
        KVM_SET_ONE_REG = W 0xac kvm_one_reg;
        KVM_KVMCLOCK_CTRL = N 0xad ();
        KVM_GET_REG_LIST = RW 0xb0 u64;
        KVM_SMI = N 0xb7 ();
        KVM_GET_SREGS2 = R 0xcc kvm_sregs2;
        KVM_SET_SREGS2 = W 0xcd kvm_sregs2;
        KVM_GET_XSAVE2 = R 0xcf kvm_xsave;
        KVM_GET_NESTED_STATE = RW 0xbe kvm_nested_state;
        KVM_SET_NESTED_STATE = W 0xbf kvm_nested_state;
        KVM_PRE_FAULT_MEMORY = RW 0xd5 kvm_pre_fault_memory;
    }
}

// Flags of KVM_IOEVENTFD, which kvm-bindings has as bit numbers only.
pub const KVM_IOEVENTFD_FLAG_DATAMATCH: u32 = 1;
pub const KVM_IOEVENTFD_FLAG_PIO: u32 = 2;
pub const KVM_IOEVENTFD_FLAG_DEASSIGN: u32 = 4;
