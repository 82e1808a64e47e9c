// SPDX-License-Identifier: GPL-2.0
//! Structures of the VM ioctls that are not about interrupts: memory, dirty log, clock, capabilities, devices.
#![forbid(unsafe_code)]

layout! {
    /// `struct kvm_userspace_memory_region`: KVM_SET_USER_MEMORY_REGION.
    struct KvmUserspaceMemoryRegion: 32 {
        /// Slot number; bits 16 and up select the address space.
        0 slot: u32,
        4 flags: u32,
        8 guest_phys_addr: u64,
        /// In bytes; 0 deletes the slot.
        16 memory_size: u64,
        24 userspace_addr: u64,
    }

    /// `struct kvm_userspace_memory_region2`: KVM_SET_USER_MEMORY_REGION2.
    struct KvmUserspaceMemoryRegion2: 160 {
        0 slot: u32,
        4 flags: u32,
        8 guest_phys_addr: u64,
        16 memory_size: u64,
        24 userspace_addr: u64,
        32 guest_memfd_offset: u64,
        40 guest_memfd: u32,
        44 pad1: u32,
        48 pad2: [u64; 14],
    }

    /// `struct kvm_dirty_log`: KVM_GET_DIRTY_LOG.
    struct KvmDirtyLog: 16 {
        0 slot: u32,
        4 padding1: u32,
        /// User address; one bit per page, rounded up to 64 bits.
        8 dirty_bitmap: u64,
    }

    /// `struct kvm_clear_dirty_log`: KVM_CLEAR_DIRTY_LOG.
    struct KvmClearDirtyLog: 24 {
        0 slot: u32,
        4 num_pages: u32,
        8 first_page: u64,
        /// User address.
        16 dirty_bitmap: u64,
    }

    /// `struct kvm_coalesced_mmio_zone`.
    struct KvmCoalescedMmioZone: 16 {
        0 addr: u64,
        8 size: u32,
        /// 1: a range of ports. 0: a range of guest physical memory.
        12 pio: u32,
    }

    /// `struct kvm_coalesced_mmio`: one posted write.
    struct KvmCoalescedMmio: 24 {
        0 phys_addr: u64,
        8 len: u32,
        12 pio: u32,
        16 data: [u8; 8],
    }

    /// Head of `struct kvm_coalesced_mmio_ring`; entries of [`KvmCoalescedMmio`] fill the rest of its page.
    struct KvmCoalescedMmioRing: 8 {
        /// Next entry userspace reads.
        0 first: u32,
        /// Next entry the kernel writes.
        4 last: u32,
    }

    /// `struct kvm_clock_data`: KVM_GET_CLOCK, KVM_SET_CLOCK.
    struct KvmClockData: 48 {
        /// Nanoseconds of the guest's kvmclock.
        0 clock: u64,
        8 flags: u32,
        12 pad0: u32,
        16 realtime: u64,
        24 host_tsc: u64,
        32 pad: [u32; 4],
    }

    /// `struct kvm_enable_cap`: KVM_ENABLE_CAP.
    struct KvmEnableCap: 104 {
        0 cap: u32,
        4 flags: u32,
        8 args: [u64; 4],
        40 pad: [u8; 64],
    }

    /// `struct kvm_create_device`: KVM_CREATE_DEVICE.
    struct KvmCreateDevice: 12 {
        0 kind: u32,
        4 fd: u32,
        8 flags: u32,
    }

    /// `struct kvm_device_attr`: KVM_SET_DEVICE_ATTR and its two companions.
    struct KvmDeviceAttr: 24 {
        0 flags: u32,
        4 group: u32,
        8 attr: u64,
        16 addr: u64,
    }

    /// `struct kvm_memory_attributes`: KVM_SET_MEMORY_ATTRIBUTES.
    struct KvmMemoryAttributes: 32 {
        0 address: u64,
        8 size: u64,
        16 attributes: u64,
        24 flags: u64,
    }

    /// `struct kvm_create_guest_memfd`: KVM_CREATE_GUEST_MEMFD.
    struct KvmCreateGuestMemfd: 64 {
        0 size: u64,
        8 flags: u64,
        16 reserved: [u64; 6],
    }

    /// `struct kvm_msr_filter_range`: a part of KVM_X86_SET_MSR_FILTER.
    struct KvmMsrFilterRange: 24 {
        /// KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE.
        0 flags: u32,
        /// MSRs in the range; 0: no range.
        4 nmsrs: u32,
        8 base: u32,
        12 pad: u32,
        /// User address; one bit an MSR, rounded up to 64 bits; set: allowed.
        16 bitmap: u64,
    }

    /// `struct kvm_msr_filter`: KVM_X86_SET_MSR_FILTER.
    struct KvmMsrFilter: 392 {
        0 flags: u32,
        4 pad: u32,
        8 ranges: [KvmMsrFilterRange; 16],
    }

    /// `struct kvm_pmu_event_filter`: KVM_SET_PMU_EVENT_FILTER, followed by `nevents` words of 64 bits.
    struct KvmPmuEventFilter: 32 {
        0 action: u32,
        4 nevents: u32,
        8 fixed_counter_bitmap: u32,
        12 flags: u32,
        16 pad: [u32; 4],
    }

    /// `struct kvm_pre_fault_memory`: KVM_PRE_FAULT_MEMORY.
    struct KvmPreFaultMemory: 64 {
        0 gpa: u64,
        8 size: u64,
        16 flags: u64,
        24 padding: [u64; 5],
    }
}

pub const KVM_MEM_LOG_DIRTY_PAGES: u32 = 1 << 0;
pub const KVM_MEM_READONLY: u32 = 1 << 1;
pub const KVM_MEM_GUEST_MEMFD: u32 = 1 << 2;

pub const KVM_PMU_EVENT_ALLOW: u32 = 0;
pub const KVM_PMU_EVENT_DENY: u32 = 1;
pub const KVM_PMU_EVENT_FLAG_MASKED_EVENTS: u32 = 1 << 0;
/// KVM_CAP_PMU_CAPABILITY: no performance counters for this VM.
pub const KVM_PMU_CAP_DISABLE: u64 = 1 << 0;

/// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: KVM_GET_DIRTY_LOG does not write-protect, KVM_CLEAR_DIRTY_LOG does.
pub const KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE: u64 = 1 << 0;
pub const KVM_DIRTY_LOG_INITIALLY_SET: u64 = 1 << 1;

/// `struct kvm_dirty_gfn`, an entry of a dirty ring: flags, slot (32 bits each) and page in the slot (64 bits).
pub const KVM_DIRTY_GFN_BYTES: u32 = 16;
/// Flags: written by the kernel; done with by userspace.
pub const KVM_DIRTY_GFN_F_DIRTY: u32 = 1 << 0;
pub const KVM_DIRTY_GFN_F_RESET: u32 = 1 << 1;
pub const KVM_DIRTY_RING_MAX_ENTRIES: u32 = 65536;
/// Page of a vCPU's mapping where its dirty ring begins.
pub const KVM_DIRTY_LOG_PAGE_OFFSET: u64 = 64;

pub const KVM_MSR_FILTER_READ: u32 = 1 << 0;
pub const KVM_MSR_FILTER_WRITE: u32 = 1 << 1;
/// What no range says anything about is denied; otherwise it is allowed.
pub const KVM_MSR_FILTER_DEFAULT_DENY: u32 = 1 << 0;
/// Bytes that the bitmap of one range may have.
pub const KVM_MSR_FILTER_MAX_BITMAP_SIZE: usize = 0x600;

/// KVM_CAP_X86_USER_SPACE_MSR: which accesses that would raise #GP go to userspace.
pub const KVM_MSR_EXIT_REASON_INVAL: u32 = 1 << 0;
pub const KVM_MSR_EXIT_REASON_UNKNOWN: u32 = 1 << 1;
pub const KVM_MSR_EXIT_REASON_FILTER: u32 = 1 << 2;
pub const KVM_MSR_EXIT_REASON_VALID_MASK: u32 =
    KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER;

/// KVM_CAP_DISABLE_QUIRKS2: behaviour that is not the architecture's and that userspace may turn off.
pub const KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT: u64 = 1 << 4;
pub const KVM_X86_QUIRK_FIX_HYPERCALL_INSN: u64 = 1 << 5;
pub const KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS: u64 = 1 << 6;
pub const KVM_X86_QUIRK_STUFF_FEATURE_MSRS: u64 = 1 << 8;
/// Those that exist here.
pub const SUPPORTED_QUIRKS: u64 = KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
    | KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    | KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
    | KVM_X86_QUIRK_STUFF_FEATURE_MSRS;
/// KVM_CAP_X86_DISABLE_EXITS: what a guest may do without an exit.
pub const KVM_X86_DISABLE_EXITS_MWAIT: u64 = 1 << 0;
pub const KVM_X86_DISABLE_EXITS_HLT: u64 = 1 << 1;
pub const KVM_X86_DISABLE_EXITS_PAUSE: u64 = 1 << 2;
/// Reading the MSRs that count how long a core slept.
pub const KVM_X86_DISABLE_EXITS_CSTATE: u64 = 1 << 3;
/// Reading APERF and MPERF.
pub const KVM_X86_DISABLE_EXITS_APERFMPERF: u64 = 1 << 4;

/// KVM_CAP_X2APIC_API: APIC IDs in KVM_GET_LAPIC, in routes and in messages have 32 bits.
pub const KVM_X2APIC_API_USE_32BIT_IDS: u32 = 1 << 0;
/// A device's message to FFh goes to the CPU of that x2APIC ID, not to all.
pub const KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK: u32 = 1 << 1;
pub const KVM_X2APIC_API_VALID_FLAGS: u32 = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;

/// Do not use 1: old kernels returned it from KVM_CHECK_EXTENSION before there were flags.
pub const KVM_CLOCK_TSC_STABLE: u32 = 1 << 1;
pub const KVM_CLOCK_REALTIME: u32 = 1 << 2;
pub const KVM_CLOCK_HOST_TSC: u32 = 1 << 3;

/// Page of a vCPU's mapping that holds the coalesced MMIO ring.
pub const KVM_COALESCED_MMIO_PAGE_OFFSET: u32 = 2;
/// Entries in the coalesced MMIO ring's page.
pub const KVM_COALESCED_MMIO_MAX: u32 = (4096 - 8) / 24;
