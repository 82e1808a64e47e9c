// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Small devices that end the run: ACPI PM1a block, reset control register, exit port, pvpanic.
//!
//! Layouts: ACPI Specification "PM1 Event Grouping" and "PM1 Control Grouping"; the PC chipsets' RST_CNT at 0xCF9;
//! QEMU's specification "PVPANIC DEVICE". Not supported: wake-up and power-button events, sleep states but S5.

use std::sync::Arc;

use crate::exit::{Outcome, Stop};

/// Bytes of the PM1a block: status (2), enable (2), control (2).
pub const PM1_LEN: u16 = 6;
/// Offset of the control register in the block.
pub const PM1_CONTROL: u16 = 4;
/// SLP_TYP of S5, as the DSDT's `_S5_` says.
pub const SLEEP_TYPE_S5: u8 = 5;

/// PM1 control bit 0: the platform is in ACPI mode, always.
const SCI_EN: u8 = 1;
/// In the control register's upper byte: SLP_TYP at bit 10, SLP_EN at bit 13 of the word.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;

/// ACPI PM1a event and control registers.
pub struct Pm1 {
    registers: [u8; PM1_LEN as usize],
    stop: Arc<Stop>,
}

impl Pm1 {
    pub fn new(stop: Arc<Stop>) -> Self {
        let mut registers = [0; PM1_LEN as usize];
        registers[PM1_CONTROL as usize] = SCI_EN;
        Pm1 { registers, stop }
    }

    pub fn read(&self, offset: u16) -> u8 {
        self.registers.get(usize::from(offset)).copied().unwrap_or(0xFF)
    }

    pub fn write(&mut self, offset: u16, value: u8) {
        let Some(register) = self.registers.get_mut(usize::from(offset)) else { return };
        match offset {
            // Status: a one clears. Nothing ever sets these.
            0 | 1 => *register &= !value,
            PM1_CONTROL => *register = value | SCI_EN,
            5 => {
                // SLP_EN reads as zero.
                *register = value & !SLEEP_ENABLE;
                let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
                if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5 {
                    self.stop.request(Outcome::PowerOff);
                }
            }
            _ => *register = value,
        }
    }
}

/// Reset control register: bit 2 starts the reset of the kind that bit 1 chose.
pub struct ResetControl {
    value: u8,
    stop: Arc<Stop>,
}

impl ResetControl {
    /// What starts a full reset, for the FADT.
    pub const RESET_VALUE: u8 = 0x06;
    const RESET_CPU: u8 = 0x04;

    pub fn new(stop: Arc<Stop>) -> Self {
        ResetControl { value: 0, stop }
    }

    pub fn read(&self) -> u8 {
        self.value
    }

    pub fn write(&mut self, value: u8) {
        self.value = value & !Self::RESET_CPU;
        if value & Self::RESET_CPU != 0 {
            self.stop.request(Outcome::Reboot);
        }
    }
}

/// The guest's way to give an exit code.
pub struct DebugExit(Arc<Stop>);

impl DebugExit {
    pub fn new(stop: Arc<Stop>) -> Self {
        DebugExit(stop)
    }

    pub fn write(&self, value: u8) {
        self.0.request(Outcome::GuestCode(value));
    }
}

/// pvpanic: the guest's kernel says that it panicked.
pub struct PvPanic(Arc<Stop>);

impl PvPanic {
    /// The guest panicked and nobody in it will deal with that.
    const PANICKED: u8 = 1;

    pub fn new(stop: Arc<Stop>) -> Self {
        PvPanic(stop)
    }

    /// The events that this device knows.
    pub fn read(&self) -> u8 {
        Self::PANICKED
    }

    pub fn write(&self, value: u8) {
        if value & Self::PANICKED != 0 {
            self.0.request(Outcome::Crash { reason: "its kernel reported a panic".into(), dump: String::new() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;

    #[test]
    fn pm1_registers() {
        let mut pm1 = Pm1::new(exit::tests::stop());
        assert_eq!(pm1.read(PM1_CONTROL), SCI_EN);
        pm1.write(PM1_CONTROL, 0);
        assert_eq!(pm1.read(PM1_CONTROL), SCI_EN, "there is no legacy mode to go back to");
        pm1.write(0, 0xFF);
        assert_eq!(pm1.read(0), 0);
        pm1.write(2, 0x21);
        assert_eq!(pm1.read(2), 0x21);
        pm1.write(PM1_LEN, 0xFF);
        assert_eq!(pm1.read(PM1_LEN), 0xFF);
    }
}
