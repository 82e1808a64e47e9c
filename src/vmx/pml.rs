// SPDX-License-Identifier: GPL-2.0
//! Page-modification logging: the CPU notes the address of each page whose dirty bit it sets in the nested tables. SDM "Page-Modification
//! Logging".
//!
//! The log has 512 entries, filled from the last to the first. It is emptied after every run, so that what is noted is nowhere else while
//! the vCPU is outside of guest mode.
#![forbid(unsafe_code)]

use super::{
    entry::own,
    insn::{self, CurrentVmcs},
    vcpu::VmxVcpu,
};
use crate::{
    arch::{
        vmcs::{control::secondary, Control64, Guest16},
        Gfn,
    },
    glue::cpu::IrqsOff,
};

/// Entries of the log.
pub(super) const ENTRIES: u32 = 512;

/// The index of an empty log: of the entry that is written next.
const EMPTY: u16 = ENTRIES as u16 - 1;

impl VmxVcpu {
    /// Secondary controls that are on while the CPU logs.
    pub(super) fn pml_control(&self) -> u32 {
        if self.logs_writes {
            secondary::PML
        } else {
            0
        }
    }

    /// Turns logging on or off with the next entry. The log is empty then.
    pub(super) fn set_pml(&mut self, on: bool) {
        let on = on && self.write_log.is_some();
        if self.logs_writes != on {
            self.logs_writes = on;
            self.dirty |= own::SECONDARY;
        }
    }

    /// Writes the log's address and where it begins.
    pub(super) fn write_pml(&self, vmcs: CurrentVmcs<'_>) {
        if let (true, Some(log)) = (self.logs_writes, &self.write_log) {
            vmcs.write(Control64::PmlAddress, insn::address(log));
            vmcs.write(Guest16::PmlIndex, EMPTY);
        }
    }

    /// Empties the log: what was in it, in the order of the writes.
    #[inline]
    pub(super) fn empty_pml(&mut self, irqs: &IrqsOff) -> Option<impl Iterator<Item = Gfn> + '_> {
        let (log, vmcs) = (self.write_log.as_ref()?, self.machine.vmcs.current(irqs)?);
        let index = vmcs.read(Guest16::PmlIndex);
        if index == EMPTY {
            return None;
        }
        vmcs.write(Guest16::PmlIndex, EMPTY);
        // Behind the first entry the index goes on to 0xFFFF.
        Some(log.back_to(index.wrapping_add(1)))
    }
}
