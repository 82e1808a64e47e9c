// SPDX-License-Identifier: GPL-2.0
//! The SVM instructions and the registers that turn SVM on and off. One of the few files that may be unsafe.
#![allow(unsafe_code)]

use kernel::prelude::*;

use crate::{
    arch::{cr::efer, msr, vmcb::Vmcb, Hpa},
    glue::{
        cpu::{self, IrqsOff},
        fpu::Window,
        phys::{Bytes, PhysBox},
    },
    guest::Regs,
};

// SAFETY: every field is an integer or an array of integers.
unsafe impl Zeroable for Vmcb {}

extern "C" {
    // enter.S
    fn krab_svm_enter(
        regs: *mut Regs,
        vmcb_address: u64,
        host_save_address: u64,
        guest_spec_ctrl: u64,
        host_spec_ctrl: u64,
        vmcb: *mut Vmcb,
    ) -> u32;
    fn krab_svm_save_host(address: u64);
}

/// SVM was turned off under us: the host is going down.
pub(super) struct SvmIsOff;

/// Runs the guest until the next #VMEXIT. `regs` gets every register but RAX, RSP, RIP and RFLAGS, which are in the VMCB.
///
/// `host` is this CPU's host save area, filled by [`save_host`] in the same window.
#[inline]
pub(super) fn enter(
    regs: &mut Regs,
    vmcb: &mut PhysBox<Vmcb>,
    host: &PhysBox<Bytes<4096>>,
    guest_spec_ctrl: u64,
    _window: &Window<'_>,
    irqs: &IrqsOff,
) -> Result<(), SvmIsOff> {
    let address = vmcb.address().0;
    // SAFETY: interrupts are off and the guest's extended state is loaded, as the tokens say. The VMCB is a page that only this vCPU
    // uses; its permission maps and nested root are set by its owner to memory that outlives it, and every intercept that keeps the host
    // whole is set when it is made. The assembly restores all host state but the extended state, which is the window's.
    let off = unsafe {
        krab_svm_enter(regs, address, host.address().0, guest_spec_ctrl, cpu::host_spec_ctrl(irqs), &mut **vmcb)
    };
    match off {
        0 => Ok(()),
        _ => Err(SvmIsOff),
    }
}

/// Saves what VMRUN does not: FS, GS, TR, LDTR, KERNEL_GS_BASE and the system-call MSRs of the host.
#[inline]
pub(super) fn save_host(host: &PhysBox<Bytes<4096>>, _irqs: &IrqsOff) {
    // SAFETY: the address is of a page that belongs to this CPU and is used for nothing else. Nothing happens when SVM was turned off
    // under us, and then `enter` loads nothing.
    unsafe { krab_svm_save_host(host.address().0) };
}

/// Whether EFER.SVME is set on this CPU.
pub(super) fn is_on(_irqs: &IrqsOff) -> Result<bool> {
    Ok(cpu::read_msr(msr::EFER)? & efer::SVME != 0)
}

/// Sets the bit by which some CPUs keep guests' branch predictions from the host's returns: for as long as SVM is on.
fn reduce_speculation(on: bool) {
    /// MSRC001_102E, BpSpecReduce. Linux "Speculative Return Stack Overflow (SRSO)".
    const BP_SPEC_REDUCE: u64 = 1 << 4;
    if let Ok(old) = cpu::read_msr(msr::BP_CFG) {
        let new = if on { old | BP_SPEC_REDUCE } else { old & !BP_SPEC_REDUCE };
        // SAFETY: changes how far the CPU speculates and nothing else.
        let _ = unsafe { cpu::write_msr(msr::BP_CFG, new) };
    }
}

/// Sets how guests' TSCs on this CPU follow the host's.
pub(super) fn write_tsc_ratio(ratio: u64, _irqs: &IrqsOff) {
    // SAFETY: the register counts only for what guests read. APM Vol. 2 "TSC Ratio".
    let _ = unsafe { cpu::write_msr(msr::TSC_RATIO, ratio) };
}

/// Turns SVM on with `save_area` as the page in which the CPU keeps host state. `bp_spec_reduce`: the host relies on that bit.
pub(super) fn turn_on(save_area: Hpa, bp_spec_reduce: bool, _irqs: &IrqsOff) -> Result {
    if bp_spec_reduce {
        reduce_speculation(true);
    }
    let old = cpu::read_msr(msr::EFER)?;
    // SAFETY: SVME only adds instructions; the save area is a page of ours that lives until SVM is turned off.
    unsafe {
        cpu::write_msr(msr::EFER, old | efer::SVME)?;
        cpu::write_msr(msr::VM_HSAVE_PA, save_area.0)
    }
}

/// Turns SVM off and forgets the save area.
pub(super) fn turn_off(bp_spec_reduce: bool, _irqs: &IrqsOff) {
    if bp_spec_reduce {
        reduce_speculation(false);
    }
    // SAFETY: EFER is otherwise as it was; nothing of ours runs a guest on this CPU any more.
    unsafe {
        let _ = cpu::write_msr(msr::VM_HSAVE_PA, 0);
        if let Ok(old) = cpu::read_msr(msr::EFER) {
            let _ = cpu::write_msr(msr::EFER, old & !efer::SVME);
        }
    }
}
