// SPDX-License-Identifier: GPL-2.0
//! IA32_APIC_BASE: where the APIC is, and which mode it is in. SDM "x2APIC State Transitions".
#![forbid(unsafe_code)]

use super::regs::{BASE_ADDRESS, BASE_ENABLE, BASE_RESERVED, BASE_X2APIC};
use super::{Lapic, LapicWork, Mode};
use crate::arch::Gpa;
use crate::irqchip::Gp;

impl Lapic {
    /// IA32_APIC_BASE.
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// Guest physical address of the 4 KiB register window. It only answers in xAPIC mode.
    pub const fn base_gpa(&self) -> Gpa {
        Gpa(self.base & BASE_ADDRESS)
    }

    /// Writes IA32_APIC_BASE. `physical_bits`: the guest's physical address width. `by_host`: from KVM_SET_SREGS or
    /// KVM_SET_MSRS, which may jump between any two modes.
    ///
    /// #GP for reserved bits, x2APIC without the global enable, x2APIC mode to xAPIC mode, and disabled to x2APIC mode.
    pub fn write_base(&mut self, value: u64, physical_bits: u32, by_host: bool) -> Result<LapicWork, Gp> {
        if value == self.base {
            return Ok(LapicWork::default());
        }
        let above = u64::MAX.checked_shl(physical_bits).unwrap_or(0);
        let x2apic = if self.features.x2apic { 0 } else { BASE_X2APIC };
        if value & (above | BASE_RESERVED | x2apic) != 0 {
            return Err(Gp);
        }
        let mode = match value & (BASE_ENABLE | BASE_X2APIC) {
            0 => Mode::Disabled,
            BASE_ENABLE => Mode::XApic,
            BASE_X2APIC => return Err(Gp),
            _ => Mode::X2Apic,
        };
        let forbidden = matches!((self.mode, mode), (Mode::X2Apic, Mode::XApic) | (Mode::Disabled, Mode::X2Apic));
        if forbidden && !by_host {
            return Err(Gp);
        }
        self.base = value;
        self.image_stale = true;
        let old = core::mem::replace(&mut self.mode, mode);
        if old != mode && mode == Mode::XApic {
            self.xapic_id = self.id as u8;
        }
        if old == Mode::X2Apic && mode != Mode::X2Apic {
            // Its logical ID was x2APIC's own.
            self.logical_id = 0;
        }
        Ok(LapicWork { card_changed: old != mode, ..LapicWork::default() })
    }
}
