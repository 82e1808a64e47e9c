// SPDX-License-Identifier: GPL-2.0
//! Structures of the interrupt ioctls: PIC, IOAPIC, PIT, lines, routing, MSI, irqfd and ioeventfd.
#![forbid(unsafe_code)]

layout! {
    /// `struct kvm_irq_level`: KVM_IRQ_LINE, KVM_IRQ_LINE_STATUS.
    struct KvmIrqLevel: 8 {
        /// In: the GSI. Out (KVM_IRQ_LINE_STATUS): how it was delivered, -1, 0 or more.
        0 irq: u32,
        4 level: u32,
    }

    /// `struct kvm_irqchip`: KVM_GET_IRQCHIP, KVM_SET_IRQCHIP.
    struct KvmIrqchip: 520 {
        0 chip_id: u32,
        4 pad: u32,
        /// [`KvmPicState`] or [`KvmIoapicState`] at its start.
        8 chip: [u8; 512],
    }

    /// `struct kvm_pic_state`: one i8259.
    struct KvmPicState: 16 {
        0 last_irr: u8,
        1 irr: u8,
        2 imr: u8,
        3 isr: u8,
        4 priority_add: u8,
        5 irq_base: u8,
        6 read_reg_select: u8,
        7 poll: u8,
        8 special_mask: u8,
        9 init_state: u8,
        10 auto_eoi: u8,
        11 rotate_on_auto_eoi: u8,
        12 special_fully_nested_mode: u8,
        13 init4: u8,
        14 elcr: u8,
        15 elcr_mask: u8,
    }

    /// `struct kvm_ioapic_state`.
    struct KvmIoapicState: 216 {
        0 base_address: u64,
        8 ioregsel: u32,
        12 id: u32,
        16 irr: u32,
        20 pad: u32,
        /// Redirection entries as the 82093AA data sheet lays out their 64 bits.
        24 redirtbl: [u64; 24],
    }

    /// `struct kvm_pit_config`: KVM_CREATE_PIT2.
    struct KvmPitConfig: 64 {
        0 flags: u32,
        4 pad: [u32; 15],
    }

    /// `struct kvm_pit_channel_state`.
    struct KvmPitChannelState: 24 {
        /// 1 to 65,536.
        0 count: u32,
        4 latched_count: u16,
        6 count_latched: u8,
        7 status_latched: u8,
        8 status: u8,
        9 read_state: u8,
        10 write_state: u8,
        11 write_latch: u8,
        12 rw_mode: u8,
        13 mode: u8,
        14 bcd: u8,
        15 gate: u8,
        /// Nanoseconds of the host's monotonic clock.
        16 count_load_time: i64,
    }

    /// `struct kvm_pit_state`: KVM_GET_PIT, KVM_SET_PIT.
    struct KvmPitState: 72 {
        0 channels: [KvmPitChannelState; 3],
    }

    /// `struct kvm_pit_state2`: KVM_GET_PIT2, KVM_SET_PIT2.
    struct KvmPitState2: 112 {
        0 channels: [KvmPitChannelState; 3],
        72 flags: u32,
        76 reserved: [u32; 9],
    }

    /// `struct kvm_reinject_control`: KVM_REINJECT_CONTROL.
    struct KvmReinjectControl: 32 {
        0 pit_reinject: u8,
        1 reserved: [u8; 31],
    }

    /// `struct kvm_irq_routing_irqchip`.
    struct KvmIrqRoutingIrqchip: 8 {
        0 irqchip: u32,
        4 pin: u32,
    }

    /// `struct kvm_irq_routing_msi`.
    struct KvmIrqRoutingMsi: 16 {
        0 address_lo: u32,
        4 address_hi: u32,
        8 data: u32,
        12 devid: u32,
    }

    /// `struct kvm_irq_routing_entry`.
    struct KvmIrqRoutingEntry: 48 {
        0 gsi: u32,
        4 kind: u32,
        8 flags: u32,
        12 pad: u32,
        /// [`KvmIrqRoutingIrqchip`] or [`KvmIrqRoutingMsi`] at its start.
        16 u: [u8; 32],
    }

    /// Head of `struct kvm_irq_routing`; `nr` entries of [`KvmIrqRoutingEntry`] follow.
    struct KvmIrqRouting: 8 {
        0 nr: u32,
        4 flags: u32,
    }

    /// `struct kvm_msi`: KVM_SIGNAL_MSI.
    struct KvmMsi: 32 {
        0 address_lo: u32,
        4 address_hi: u32,
        8 data: u32,
        12 flags: u32,
        16 devid: u32,
        20 pad: [u8; 12],
    }

    /// `struct kvm_irqfd`: KVM_IRQFD.
    struct KvmIrqfd: 32 {
        0 fd: u32,
        4 gsi: u32,
        8 flags: u32,
        12 resamplefd: u32,
        16 pad: [u8; 16],
    }

    /// `struct kvm_ioeventfd`: KVM_IOEVENTFD.
    struct KvmIoeventfd: 64 {
        0 datamatch: u64,
        8 addr: u64,
        /// 1, 2, 4 or 8 bytes; 0 matches any length.
        16 len: u32,
        20 fd: i32,
        24 flags: u32,
        28 pad: [u8; 36],
    }
}

pub const KVM_IRQCHIP_PIC_MASTER: u32 = 0;
pub const KVM_IRQCHIP_PIC_SLAVE: u32 = 1;
pub const KVM_IRQCHIP_IOAPIC: u32 = 2;
pub const KVM_IOAPIC_NUM_PINS: u32 = 24;

pub const KVM_PIT_SPEAKER_DUMMY: u32 = 1;
pub const KVM_PIT_FLAGS_HPET_LEGACY: u32 = 1 << 0;
pub const KVM_PIT_FLAGS_SPEAKER_DATA_ON: u32 = 1 << 1;

pub const KVM_IRQ_ROUTING_IRQCHIP: u32 = 1;
pub const KVM_IRQ_ROUTING_MSI: u32 = 2;
/// Most entries of a routing table, as in KVM.
pub const KVM_MAX_IRQ_ROUTES: u32 = 4096;

pub const KVM_MSI_VALID_DEVID: u32 = 1 << 0;

pub const KVM_IRQFD_FLAG_DEASSIGN: u32 = 1 << 0;
pub const KVM_IRQFD_FLAG_RESAMPLE: u32 = 1 << 1;

pub const KVM_IOEVENTFD_FLAG_DATAMATCH: u32 = 1 << 0;
pub const KVM_IOEVENTFD_FLAG_PIO: u32 = 1 << 1;
pub const KVM_IOEVENTFD_FLAG_DEASSIGN: u32 = 1 << 2;
pub const KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY: u32 = 1 << 3;
pub const KVM_IOEVENTFD_FLAG_FAST_MMIO: u32 = 1 << 4;
pub const KVM_IOEVENTFD_VALID_FLAG_MASK: u32 = (1 << 5) - 1;
