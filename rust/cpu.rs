// SPDX-License-Identifier: GPL-2.0
//! The CPU that code runs on: what must be off while it runs, its model-specific registers, its features.
use core::{
    arch::asm,
    cell::Cell,
    ffi::c_void,
    marker::PhantomData,
    sync::atomic::{AtomicU64, Ordering},
};

use kernel::prelude::*;

use super::bindings;
use crate::arch::msr;

pub(crate) use bindings::krab_host_features as HostFeatures;

/// Proof that interrupts are off on this CPU, for as long as the guard lives.
///
/// # Invariants
///
/// Interrupts were turned off by [`IrqsOff::new`] on this CPU and are not turned on before the drop. The type is neither `Send`
/// nor `Sync`.
pub(crate) struct IrqsOff {
    /// Whether the drop turns interrupts on.
    restore: bool,
    not_send: PhantomData<*mut ()>,
}

impl IrqsOff {
    /// Turns interrupts off. They must be on; nesting is not supported.
    #[inline]
    pub(crate) fn new() -> Self {
        // SAFETY: CLI has no memory effects; the guard's drop turns interrupts on again.
        unsafe { asm!("cli", options(nostack)) };
        // INVARIANT: interrupts are off now.
        Self { restore: true, not_send: PhantomData }
    }

    /// For a callback that the kernel runs with interrupts off.
    ///
    /// # Safety
    ///
    /// Interrupts are off and stay off until the value is dropped.
    pub(super) unsafe fn assume() -> Self {
        Self { restore: false, not_send: PhantomData }
    }
}

impl Drop for IrqsOff {
    #[inline]
    fn drop(&mut self) {
        if !self.restore {
            return;
        }
        // STI holds interrupts off for one more instruction, which must not be the CLI of the next guard.
        // SAFETY: by the type's invariant interrupts were on before, so they may be turned on.
        unsafe { asm!("sti", "nop", options(nostack)) };
    }
}

/// What this host's CPUs have.
pub(crate) fn host_features() -> HostFeatures {
    let mut features = HostFeatures::default();
    // SAFETY: `features` is valid for writing.
    unsafe { bindings::krab_host_features(&mut features) };
    features
}

/// Reads an MSR. `EIO` when the CPU does not have it.
#[inline]
pub(crate) fn read_msr(msr: u32) -> Result<u64> {
    let (mut low, mut high, mut failed) = (0_u32, 0_u32, 1_u32);
    // SAFETY: reading an MSR changes nothing. A fault is caught by the exception table, and leaves `failed` as it is.
    unsafe {
        asm!(
            "2: rdmsr",
            "movl $0, {failed:e}",
            "3:",
            ".pushsection \"__ex_table\", \"a\"",
            ".balign 4",
            ".long 2b - .",
            ".long 3b - .",
            ".long 1", // EX_TYPE_DEFAULT
            ".popsection",
            in("ecx") msr,
            inout("eax") low,
            inout("edx") high,
            failed = inout(reg) failed,
            options(att_syntax, nostack)
        );
    }
    match failed {
        0 => Ok(u64::from(high) << 32 | u64::from(low)),
        _ => Err(EIO),
    }
}

/// Reads an MSR: 0 when the CPU does not have it.
#[inline]
pub(crate) fn read_msr_or_zero(msr: u32) -> u64 {
    let (mut low, mut high) = (0_u32, 0_u32);
    // SAFETY: reading an MSR changes nothing. A fault is caught by the exception table, and leaves the registers as they are.
    unsafe {
        asm!(
            "2: rdmsr",
            "3:",
            ".pushsection \"__ex_table\", \"a\"",
            ".balign 4",
            ".long 2b - .",
            ".long 3b - .",
            ".long 1",
            ".popsection",
            in("ecx") msr,
            inout("eax") low,
            inout("edx") high,
            options(att_syntax, nostack)
        );
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR. `EIO` when the CPU refuses.
///
/// # Safety
///
/// The new value must not break what the kernel and other code on this CPU rely on.
#[inline]
pub(crate) unsafe fn write_msr(msr: u32, value: u64) -> Result {
    let mut failed = 1_u32;
    // SAFETY: a fault is caught by the exception table, and leaves `failed` as it is; the effect is the caller's promise.
    unsafe {
        asm!(
            "2: wrmsr",
            "movl $0, {failed:e}",
            "3:",
            ".pushsection \"__ex_table\", \"a\"",
            ".balign 4",
            ".long 2b - .",
            ".long 3b - .",
            ".long 1",
            ".popsection",
            in("ecx") msr,
            in("eax") value as u32,
            in("edx") (value >> 32) as u32,
            failed = inout(reg) failed,
            options(att_syntax, nostack)
        );
    }
    match failed {
        0 => Ok(()),
        _ => Err(EIO),
    }
}

/// CPUID on this CPU: EAX, EBX, ECX, EDX.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut out = [0; 4];
    // SAFETY: `out` has room for the four registers.
    unsafe { bindings::krab_cpuid(leaf, subleaf, out.as_mut_ptr()) };
    out
}

/// Number of the current CPU. Only a hint unless the caller cannot migrate.
#[inline]
pub(crate) fn current() -> usize {
    super::task::this_cpu() as usize
}

/// One more than the highest possible CPU number.
pub(crate) fn ids() -> usize {
    // SAFETY: set once at boot.
    unsafe { bindings::krab_cpu_ids() as usize }
}

/// SPEC_CTRL as the host wants it on this CPU.
#[inline]
pub(crate) fn host_spec_ctrl(_irqs: &IrqsOff) -> u64 {
    // SAFETY: a per-CPU read; interrupts are off, so the CPU does not change.
    unsafe { bindings::krab_host_spec_ctrl() }
}

/// This CPU ran a guest: no user code may run here before a barrier. For hosts that ask for it.
pub(crate) fn ibpb_before_user(_irqs: &IrqsOff) {
    // SAFETY: a per-CPU flag; interrupts are off, so the CPU does not change.
    unsafe { bindings::krab_ibpb_before_user() };
}

/// Hands a machine check that ended a guest's run to the host.
pub(crate) fn deliver_machine_check(_irqs: &IrqsOff) {
    // SAFETY: raises the host's own machine-check handler, which may run at any point.
    unsafe { bindings::krab_machine_check() };
}

/// Makes an interrupt pending on this CPU: a guest that is entered now exits before its first instruction, behind what the
/// entry injects.
pub(crate) fn interrupt_self(_irqs: &IrqsOff) {
    // SAFETY: the handler only looks whether the task is to be rescheduled.
    unsafe { bindings::krab_interrupt_self() };
}

/// Tells RCU that this CPU holds no reference at this point. The caller is in no read-side section.
#[inline]
pub(crate) fn rcu_quiescent(_irqs: &IrqsOff) {
    // SAFETY: interrupts are off, and no borrow of RCU-protected data is held by safe code across this call: guards are not `Send`
    // and the run loop has none.
    unsafe { bindings::krab_rcu_quiescent() };
}

/// Runs `f` on every online CPU with interrupts off and waits.
pub(crate) fn on_each<F: Fn(&IrqsOff) + Sync>(f: F) {
    unsafe extern "C" fn call<F: Fn(&IrqsOff) + Sync>(arg: *mut c_void) {
        // SAFETY: `arg` is the reference passed below, alive until every call is over.
        let f = unsafe { &*arg.cast::<F>() };
        // SAFETY: a cross-CPU call runs with interrupts off, on the calling CPU too.
        f(&unsafe { IrqsOff::assume() })
    }
    // SAFETY: the call waits until `f` ran on every CPU, so the borrow is long enough; `F: Sync` allows the sharing.
    unsafe { bindings::krab_on_each_cpu(Some(call::<F>), (&raw const f).cast_mut().cast()) };
}

/// Writes PRED_CMD: an indirect-branch prediction barrier, for a guest that asks for one. Ignored where the CPU has none.
pub(crate) fn write_pred_cmd(value: u64) {
    // SAFETY: a command register; a barrier only costs time.
    let _ = unsafe { write_msr(msr::PRED_CMD, value) };
}

/// What follows does not depend on branches that came before. For CPUs that have the barrier.
#[inline]
pub(crate) fn barrier() {
    /// PRED_CMD: a whole barrier.
    const IBPB: u64 = 1;
    write_pred_cmd(IBPB);
}

/// Writes FLUSH_CMD: an L1 data cache flush, for a guest that asks for one. Ignored where the CPU has none.
pub(crate) fn write_flush_cmd(value: u64) {
    // SAFETY: as above.
    let _ = unsafe { write_msr(msr::FLUSH_CMD, value) };
}

/// What tells a vCPU from every other one, ever.
pub(crate) struct VcpuId(u64);

impl VcpuId {
    /// One that nobody has.
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// The vCPU that ran on a CPU last; 0 for none.
#[derive(Default)]
pub(crate) struct LastVcpu(Cell<u64>);

impl LastVcpu {
    /// `vcpu` is about to run here: keeps what the host's mitigations promise about branch prediction. `shared`: another hypervisor's
    /// guest may have run here since.
    #[inline]
    pub(crate) fn separate(&self, vcpu: &VcpuId, shared: bool, features: &HostFeatures, irqs: &IrqsOff) {
        let changes = self.0.replace(vcpu.0) != vcpu.0;
        if (changes || shared) && features.ibpb {
            // Each vCPU is a prediction domain of its own.
            barrier();
        }
        if features.ibpb_exit_to_user {
            ibpb_before_user(irqs);
        }
    }
}
