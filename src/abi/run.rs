// SPDX-License-Identifier: GPL-2.0
//! `struct kvm_run`, the page a vCPU shares with userspace.
//!
//! Userspace may change it at any time, so the kernel side reads and writes single fields by their offset and never
//! forms a reference into it. What an exit reports is one of the `Exit*` structures at [`EXIT_UNION`].
#![forbid(unsafe_code)]

use super::vcpu::{KvmRegs, KvmSregs};
use core::mem::size_of;

/// `u8`, in: wants KVM_EXIT_IRQ_WINDOW_OPEN (interrupt controller in userspace).
pub const REQUEST_INTERRUPT_WINDOW: usize = 0;
/// `u8`, in: KVM_RUN returns EINTR at once.
pub const IMMEDIATE_EXIT: usize = 1;
/// `u32`, out: one of `KVM_EXIT_*`.
pub const EXIT_REASON: usize = 8;
/// `u8`, out.
pub const READY_FOR_INTERRUPT_INJECTION: usize = 12;
/// `u8`, out: RFLAGS.IF.
pub const IF_FLAG: usize = 13;
/// `u16`, out: `KVM_RUN_X86_*`.
pub const FLAGS: usize = 14;
/// `u64`, in and out (interrupt controller in userspace).
pub const CR8: usize = 16;
/// `u64`, in and out.
pub const APIC_BASE: usize = 24;
/// 256 bytes: what the exit reports.
pub const EXIT_UNION: usize = 32;
/// `u64`, in: which parts of the sync area to fill at an exit.
pub const KVM_VALID_REGS: usize = 288;
/// `u64`, in: which parts of the sync area userspace changed.
pub const KVM_DIRTY_REGS: usize = 296;
/// `kvm_regs`, `kvm_sregs` and `kvm_vcpu_events`, one after another.
pub const SYNC_REGS: usize = 304;
/// The second of them, and the third.
pub const SYNC_SREGS: usize = SYNC_REGS + size_of::<KvmRegs>();
pub const SYNC_EVENTS: usize = SYNC_SREGS + size_of::<KvmSregs>();
/// Bytes in the structure.
pub const SIZE: usize = 2352;

/// Page of the mapping that holds the data of KVM_EXIT_IO.
pub const KVM_PIO_PAGE_OFFSET: u32 = 1;

layout! {
    /// KVM_EXIT_UNKNOWN.
    struct ExitUnknown: 8 {
        0 hardware_exit_reason: u64,
    }

    /// KVM_EXIT_FAIL_ENTRY.
    struct ExitFailEntry: 16 {
        0 hardware_entry_failure_reason: u64,
        8 cpu: u32,
        12 pad: u32,
    }

    /// KVM_EXIT_IO.
    struct ExitIo: 16 {
        /// `KVM_EXIT_IO_IN` or `KVM_EXIT_IO_OUT`.
        0 direction: u8,
        /// 1, 2 or 4 bytes.
        1 size: u8,
        2 port: u16,
        /// Items of `size` bytes in the data page.
        4 count: u32,
        /// In bytes, from the start of `kvm_run`.
        8 data_offset: u64,
    }

    /// KVM_EXIT_DEBUG.
    struct ExitDebug: 32 {
        0 exception: u32,
        4 pad: u32,
        8 pc: u64,
        16 dr6: u64,
        24 dr7: u64,
    }

    /// KVM_EXIT_MMIO.
    struct ExitMmio: 24 {
        0 phys_addr: u64,
        8 data: [u8; 8],
        /// 1 to 8 bytes.
        16 len: u32,
        20 is_write: u8,
        21 pad: [u8; 3],
    }

    /// KVM_EXIT_HYPERCALL.
    struct ExitHypercall: 72 {
        0 nr: u64,
        8 args: [u64; 6],
        56 ret: u64,
        64 flags: u64,
    }

    /// KVM_EXIT_TPR_ACCESS.
    struct ExitTprAccess: 16 {
        0 rip: u64,
        8 is_write: u32,
        12 pad: u32,
    }

    /// KVM_EXIT_INTERNAL_ERROR.
    struct ExitInternalError: 136 {
        0 suberror: u32,
        /// Valid entries of `data`.
        4 ndata: u32,
        8 data: [u64; 16],
    }

    /// KVM_EXIT_INTERNAL_ERROR with KVM_INTERNAL_ERROR_EMULATION: an overlay of [`ExitInternalError`].
    struct ExitEmulationFailure: 32 {
        0 suberror: u32,
        /// In units of 8 bytes after this field: 3, or 0 if there are no bytes to show.
        4 ndata: u32,
        8 flags: u64,
        16 insn_size: u8,
        17 insn_bytes: [u8; 15],
    }

    /// KVM_EXIT_SYSTEM_EVENT.
    struct ExitSystemEvent: 136 {
        0 kind: u32,
        4 ndata: u32,
        8 data: [u64; 16],
    }

    /// KVM_EXIT_IOAPIC_EOI.
    struct ExitIoapicEoi: 1 {
        0 vector: u8,
    }

    /// KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR.
    struct ExitMsr: 24 {
        /// From userspace: not 0 raises #GP in the guest.
        0 error: u8,
        1 pad: [u8; 7],
        8 reason: u32,
        12 index: u32,
        16 data: u64,
    }

    /// KVM_EXIT_MEMORY_FAULT.
    struct ExitMemoryFault: 24 {
        0 flags: u64,
        8 gpa: u64,
        16 size: u64,
    }
}

pub const KVM_EXIT_UNKNOWN: u32 = 0;
pub const KVM_EXIT_EXCEPTION: u32 = 1;
pub const KVM_EXIT_IO: u32 = 2;
pub const KVM_EXIT_HYPERCALL: u32 = 3;
pub const KVM_EXIT_DEBUG: u32 = 4;
pub const KVM_EXIT_HLT: u32 = 5;
pub const KVM_EXIT_MMIO: u32 = 6;
pub const KVM_EXIT_IRQ_WINDOW_OPEN: u32 = 7;
pub const KVM_EXIT_SHUTDOWN: u32 = 8;
pub const KVM_EXIT_FAIL_ENTRY: u32 = 9;
pub const KVM_EXIT_INTR: u32 = 10;
pub const KVM_EXIT_SET_TPR: u32 = 11;
pub const KVM_EXIT_TPR_ACCESS: u32 = 12;
pub const KVM_EXIT_NMI: u32 = 16;
pub const KVM_EXIT_INTERNAL_ERROR: u32 = 17;
pub const KVM_EXIT_SYSTEM_EVENT: u32 = 24;
pub const KVM_EXIT_IOAPIC_EOI: u32 = 26;
pub const KVM_EXIT_X86_RDMSR: u32 = 29;
pub const KVM_EXIT_X86_WRMSR: u32 = 30;
pub const KVM_EXIT_DIRTY_RING_FULL: u32 = 31;
pub const KVM_EXIT_X86_BUS_LOCK: u32 = 33;
pub const KVM_EXIT_NOTIFY: u32 = 37;
pub const KVM_EXIT_MEMORY_FAULT: u32 = 39;

/// The one hypercall that KVM_CAP_EXIT_HYPERCALL can send to userspace, and its bit there.
pub const KVM_HC_MAP_GPA_RANGE: u64 = 12;
pub const KVM_EXIT_HYPERCALL_VALID_MASK: u64 = 1 << KVM_HC_MAP_GPA_RANGE;
/// Flag of [`ExitHypercall`]: from 64-bit code.
pub const KVM_EXIT_HYPERCALL_LONG_MODE: u64 = 1 << 0;

pub const KVM_EXIT_IO_IN: u8 = 0;
pub const KVM_EXIT_IO_OUT: u8 = 1;

pub const KVM_INTERNAL_ERROR_EMULATION: u32 = 1;
pub const KVM_INTERNAL_ERROR_SIMUL_EX: u32 = 2;
pub const KVM_INTERNAL_ERROR_DELIVERY_EV: u32 = 3;
pub const KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: u32 = 4;
pub const KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: u64 = 1 << 0;

pub const KVM_RUN_X86_SMM: u16 = 1 << 0;
pub const KVM_RUN_X86_BUS_LOCK: u16 = 1 << 1;
pub const KVM_RUN_X86_GUEST_MODE: u16 = 1 << 2;

pub const KVM_SYNC_X86_REGS: u64 = 1 << 0;
pub const KVM_SYNC_X86_SREGS: u64 = 1 << 1;
pub const KVM_SYNC_X86_EVENTS: u64 = 1 << 2;
pub const KVM_SYNC_X86_VALID_FIELDS: u64 = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;

pub const KVM_SYSTEM_EVENT_SHUTDOWN: u32 = 1;
pub const KVM_SYSTEM_EVENT_RESET: u32 = 2;
pub const KVM_SYSTEM_EVENT_CRASH: u32 = 3;
