// SPDX-License-Identifier: GPL-2.0
//! Host state around a VMX guest: what VM exits load, and what they lose and somebody must bring back.
//! SDM "Loading Host State".
use core::arch::asm;

use kernel::prelude::*;

use super::{
    bindings,
    cpu::{self, IrqsOff},
    phys::{Bytes, PhysBox},
};
use crate::arch::msr;

/// What does not change on one CPU while it is online.
pub(crate) use bindings::krab_vmx_host as HostState;

/// Reads this CPU's.
pub(crate) fn host_state(_irqs: &IrqsOff) -> HostState {
    let mut host = HostState::default();
    // SAFETY: `host` is valid for writing, and the CPU does not change.
    unsafe { bindings::krab_vmx_read_host(&mut host) };
    host
}

/// What of the current task's state is not in place while guests may run: data segment selectors and the base that SWAPGS
/// brings in. It is kept here from [`save`](Self::save) to [`restore`](Self::restore), with preemption off all the time: the kernel itself
/// uses none of it.
pub(crate) struct TaskState(bindings::krab_vmx_task);

impl TaskState {
    /// Saves it.
    pub(crate) fn save(_irqs: &IrqsOff) -> Self {
        let mut task = bindings::krab_vmx_task::default();
        // SAFETY: `task` is valid for writing.
        unsafe { bindings::krab_vmx_save_task(&mut task) };
        task.kernel_gs_base = cpu::read_msr_or_zero(msr::KERNEL_GS_BASE);
        Self(task)
    }

    /// FS base, which VM exits load.
    pub(crate) fn fs_base(&self) -> u64 {
        self.0.fs_base
    }

    /// The guest's KERNEL_GS_BASE, which is in the CPU now.
    pub(crate) fn guest_kernel_gs_base(&self) -> u64 {
        cpu::read_msr_or_zero(msr::KERNEL_GS_BASE)
    }

    /// Brings it back, with the limits of GDT and task segment that VM exits changed. On the CPU of [`save`](Self::save), before preemption
    /// is on again. Returns the guest's KERNEL_GS_BASE.
    pub(crate) fn restore(&self) -> u64 {
        let guest = self.guest_kernel_gs_base();
        // SAFETY: the values are what the current task had on this CPU, by this method's contract.
        unsafe { bindings::krab_vmx_restore_task(&self.0) };
        write_syscall_msr(msr::KERNEL_GS_BASE, self.0.kernel_gs_base);
        guest
    }
}

/// Lets the host handle the NMI that ended a guest's run.
pub(crate) fn deliver_host_nmi(_irqs: &IrqsOff) {
    // SAFETY: runs the host's own NMI handler, which may run at any point.
    unsafe { bindings::krab_vmx_host_nmi() };
}

/// The vector that tells a CPU of posted interrupts, and that the host is not disturbed by. `None`: there is none on this host.
pub(crate) fn notification_vector() -> Option<u8> {
    // SAFETY: no preconditions.
    match unsafe { bindings::krab_vmx_notification_vector() } {
        0 => None,
        vector => Some(vector),
    }
}

/// Lets the host handle the interrupt that ended a guest's run and that the exit acknowledged. Interrupts are on in between, and softirqs
/// run: VMX operation is over, the guest's extended state is saved, and [`TaskState`] is restored.
pub(crate) fn deliver_host_interrupt(vector: u8, _irqs: &IrqsOff) {
    // SAFETY: the CPU has acknowledged the interrupt, so its handler is what has to run now, and preemption is off.
    unsafe { bindings::krab_vmx_host_interrupt(vector) };
}

/// Sets one of the MSRs that the CPU does not switch and that only SYSCALL and SWAPGS in user mode use.
fn write_syscall_msr(msr: u32, value: u64) {
    // SAFETY: no user code runs on this CPU before the host's values are back: preemption is off.
    let _ = unsafe { cpu::write_msr(msr, value) };
}

/// STAR, LSTAR, CSTAR and SFMASK on this CPU, of a guest or of the host.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct SyscallMsrs(pub(crate) [u64; 4]);

impl SyscallMsrs {
    const NUMBERS: [u32; 4] = [msr::STAR, msr::LSTAR, msr::CSTAR, msr::SFMASK];

    /// What is loaded now. Not always the host's: KVM leaves its guest's values until the next return to user mode, and must find
    /// them again.
    pub(crate) fn read(_irqs: &IrqsOff) -> Self {
        Self(Self::NUMBERS.map(|number| cpu::read_msr_or_zero(number)))
    }

    /// Replaces `self`, which is loaded, with `other`. With preemption off, and the host's must be back before it is on.
    pub(crate) fn replace(&mut self, other: &Self) {
        for ((number, now), wanted) in Self::NUMBERS.into_iter().zip(&mut self.0).zip(other.0) {
            if *now != wanted {
                write_syscall_msr(number, wanted);
                *now = wanted;
            }
        }
    }
}

/// Loads a guest's KERNEL_GS_BASE, between [`TaskState::save`] and [`TaskState::restore`].
pub(crate) fn load_kernel_gs_base(guest: u64, _saved: &TaskState) {
    write_syscall_msr(msr::KERNEL_GS_BASE, guest);
}

/// IA32_DEBUGCTL of the host, which exits clear.
#[derive(Clone, Copy, Default)]
pub(crate) struct DebugControl(u64);

impl DebugControl {
    /// Reads it, before the first entry with interrupts off.
    #[inline]
    pub(crate) fn read(_irqs: &IrqsOff) -> Self {
        Self(cpu::read_msr_or_zero(msr::DEBUGCTL))
    }

    /// Brings it back, before interrupts are on.
    #[inline]
    pub(crate) fn restore(self, _irqs: &IrqsOff) {
        if self.0 != 0 {
            // SAFETY: the host's own value.
            let _ = unsafe { cpu::write_msr(msr::DEBUGCTL, self.0) };
        }
    }
}

/// How the L1 data cache is emptied before a guest runs, where the CPU would let it read what is there (L1TF).
pub(crate) enum CacheFlush {
    Unneeded,
    /// By FLUSH_CMD.
    Command,
    /// By reading more than the cache holds, for CPUs without the command. Linux "L1TF - L1 Terminal Fault".
    Reading(PhysBox<Bytes<{ 64 * 1024 }>>),
}

impl CacheFlush {
    /// The way of this host.
    pub(crate) fn new(features: &cpu::HostFeatures) -> Result<Self> {
        /// ARCH_CAPABILITIES: an outer hypervisor flushes.
        const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
        if !features.l1tf || cpu::read_msr_or_zero(msr::ARCH_CAPABILITIES) & SKIP_L1DFL_VMENTRY != 0 {
            Ok(Self::Unneeded)
        } else if features.flush_l1d {
            Ok(Self::Command)
        } else {
            Ok(Self::Reading(PhysBox::new()?))
        }
    }

    /// Empties it.
    #[inline]
    pub(crate) fn flush(&self) {
        /// FLUSH_CMD: the L1 data cache.
        const L1D_FLUSH: u64 = 1;
        match self {
            Self::Unneeded => {}
            Self::Command => cpu::write_flush_cmd(L1D_FLUSH),
            Self::Reading(buffer) => read_through(&buffer.0),
        }
    }
}

/// Reads every cache line of `buffer`. Its pages are in the TLB by then, so no page walk brings anything else in.
#[cold]
fn read_through(buffer: &[u8; 64 * 1024]) {
    // SAFETY: reads one byte of each of the 16 pages, then of each of the 64 lines of every page, two pages a turn, all in the buffer.
    unsafe {
        asm!(
            ".set krab_at, 0",
            ".rept 16",
            "movzbl krab_at({pages}), {byte:e}",
            ".set krab_at, krab_at + 4096",
            ".endr",
            "lfence",
            "2:",
            ".set krab_at, 0",
            ".rept 128",
            "movzbl krab_at({pages}), {byte:e}",
            ".set krab_at, krab_at + 64",
            ".endr",
            "addq $8192, {pages}",
            "decl {pairs:e}",
            "jnz 2b",
            "lfence",
            pages = inout(reg) buffer.as_ptr() => _,
            pairs = inout(reg) 8 => _,
            byte = out(reg) _,
            options(att_syntax, nostack, readonly)
        );
    }
}
