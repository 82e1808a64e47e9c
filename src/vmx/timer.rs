// SPDX-License-Identifier: GPL-2.0
//! The guest's TSC, and the VMX-preemption timer, which ends the guest's run at a deadline. SDM "Time-Stamp Counter Offset and Multiplier",
//! "VMX-Preemption Timer".
//!
//! The timer's control stays on, because a timer with its highest value is as good as none: it ends a run that lasts longer than ten seconds.
#![forbid(unsafe_code)]

use super::{insn::CurrentVmcs, vcpu::VmxVcpu};
use crate::{
    arch::vmcs::{
        control::{pin, secondary},
        Control64, Guest32,
    },
    glue::timer,
    policy::{tsc::Format, vmx::timer::timer_value},
};

/// A vCPU's timer.
#[derive(Clone, Copy)]
pub(super) struct RunTimer {
    /// It counts when this bit of the TSC changes; `None`: the CPU has no timer, or it is not to be used.
    shift: Option<u32>,
    /// Host TSC.
    deadline: Option<u64>,
    /// What the VMCS holds ends a run.
    set: bool,
}

impl RunTimer {
    pub(super) const fn new(shift: Option<u32>) -> Self {
        // As if there had been a deadline: the first entry takes it back.
        Self { shift, deadline: None, set: shift.is_some() }
    }

    pub(super) const fn exists(&self) -> bool {
        self.shift.is_some()
    }

    /// Pin-based controls for it.
    pub(super) const fn pin_control(&self) -> u32 {
        if self.exists() {
            pin::PREEMPTION_TIMER
        } else {
            0
        }
    }

    pub(super) fn set_deadline(&mut self, tsc: Option<u64>) {
        self.deadline = tsc;
    }

    /// Whether an entry has to set the timer: it starts anew with each.
    #[inline]
    pub(super) const fn is_wanted(&self) -> bool {
        self.set || self.deadline.is_some()
    }

    /// Sets the timer for the next entry.
    pub(super) fn write(&mut self, vmcs: CurrentVmcs<'_>) {
        let Some(shift) = self.shift else { return };
        self.set = self.deadline.is_some();
        let value = self.deadline.map_or(u32::MAX, |deadline| timer_value(deadline, timer::tsc(), shift));
        vmcs.write(Guest32::PreemptionTimer, value);
    }
}

impl VmxVcpu {
    /// Pin-based controls, with what comes and goes.
    pub(super) fn pin_controls(&self) -> u32 {
        self.machine.host.config.controls.pin | self.run_timer.pin_control() | self.apic.pin()
    }

    /// Secondary controls that the TSC needs.
    pub(super) fn tsc_control(&self) -> u32 {
        if self.tsc.ratio.is_one() {
            0
        } else {
            secondary::TSC_SCALING
        }
    }

    pub(super) fn write_tsc(&self, vmcs: CurrentVmcs<'_>) {
        vmcs.write(Control64::TscOffset, self.tsc.offset);
        if !self.tsc.ratio.is_one() {
            vmcs.write(Control64::TscMultiplier, self.tsc.ratio.raw(Format::VMX));
        }
    }
}
