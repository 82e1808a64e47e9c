// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The port bus, the memory bus, and their devices.
//!
//! | ports         | device                                              |
//! |---------------|-----------------------------------------------------|
//! | 0x60, 0x64    | i8042, CPU reset only                               |
//! | 0x70, 0x71    | CMOS clock                                          |
//! | 0x3F8 - 0x3FF | COM1                                                |
//! | 0x501         | exit port: the byte written ends the run            |
//! | 0x505         | pvpanic                                             |
//! | 0x600 - 0x605 | ACPI PM1a event and control blocks                  |
//! | 0xCF9         | reset control, byte access only                     |
//!
//! On the memory bus there is only the exit register, at 0xFEB0_0000: the exit port for those who have no port
//! instructions, as a shell with busybox' `devmem 0xfeb00000 8 CODE`. The hypervisor's own APICs never reach us.
//!
//! What nobody claims reads as all ones, and writes there are dropped, as on a PC.

pub mod cmos;
pub mod ports;
pub mod serial;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use vm_superio::{I8042Device, Trigger};

use crate::exit::{Outcome, Stop};
use cmos::Cmos;
use ports::{DebugExit, Pm1, PvPanic, ResetControl};
use serial::Console;

/// Ports of the devices, where the ACPI tables must name them too.
pub const I8042_DATA: u16 = 0x60;
pub const I8042_COMMAND: u16 = 0x64;
pub const CMOS_BASE: u16 = 0x70;
pub const COM1_BASE: u16 = 0x3F8;
pub const DEBUG_EXIT: u16 = 0x501;
pub const PVPANIC: u16 = 0x505;
pub const PM1_BASE: u16 = 0x600;
pub const RESET_CONTROL: u16 = 0xCF9;
/// The exit register, in the hole that holds no RAM.
pub const EXIT_REGISTER: u64 = 0xFEB0_0000;
/// COM1's interrupt line.
pub const COM1_IRQ: u32 = 4;

const COM1_LAST: u16 = COM1_BASE + 7;
const PM1_LAST: u16 = PM1_BASE + ports::PM1_LEN - 1;

/// The i8042's reset line.
struct ResetLine(Arc<Stop>);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.request(Outcome::Reboot);
        Ok(())
    }
}

/// A lock that a panicking thread held is still good: every device is valid between two register accesses.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// All devices behind the port bus. Shared by all vCPUs.
pub struct Devices {
    pub console: Console,
    i8042: Mutex<I8042Device<ResetLine>>,
    cmos: Mutex<Cmos>,
    pm1: Mutex<Pm1>,
    reset_control: Mutex<ResetControl>,
    debug_exit: DebugExit,
    pvpanic: PvPanic,
}

impl Devices {
    /// `console` is COM1; all other devices report to `stop`.
    pub fn new(stop: &Arc<Stop>, console: Console) -> Self {
        Devices {
            console,
            i8042: Mutex::new(I8042Device::new(ResetLine(stop.clone()))),
            cmos: Mutex::new(Cmos::default()),
            pm1: Mutex::new(Pm1::new(stop.clone())),
            reset_control: Mutex::new(ResetControl::new(stop.clone())),
            debug_exit: DebugExit::new(stop.clone()),
            pvpanic: PvPanic::new(stop.clone()),
        }
    }

    /// One `IN`: fills `data` (1, 2 or 4 bytes).
    pub fn pio_read(&self, port: u16, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let port = port.wrapping_add(index as u16);
            *byte = match port {
                I8042_DATA | I8042_COMMAND => lock(&self.i8042).read((port - I8042_DATA) as u8),
                CMOS_BASE | 0x71 => lock(&self.cmos).read(port - CMOS_BASE),
                COM1_BASE..=COM1_LAST => self.console.read((port - COM1_BASE) as u8),
                PVPANIC => self.pvpanic.read(),
                PM1_BASE..=PM1_LAST => lock(&self.pm1).read(port - PM1_BASE),
                RESET_CONTROL => lock(&self.reset_control).read(),
                _ => 0xFF,
            };
        }
    }

    /// One `OUT` of `data` (1, 2 or 4 bytes).
    pub fn pio_write(&self, port: u16, data: &[u8]) {
        // PCI's configuration address is a dword at 0xCF8 that covers the reset register without meaning it.
        let is_byte = data.len() == 1;
        for (index, &value) in data.iter().enumerate() {
            let port = port.wrapping_add(index as u16);
            match port {
                I8042_DATA | I8042_COMMAND => {
                    let Ok(()) = lock(&self.i8042).write((port - I8042_DATA) as u8, value);
                }
                CMOS_BASE | 0x71 => lock(&self.cmos).write(port - CMOS_BASE, value),
                COM1_BASE..=COM1_LAST => self.console.write((port - COM1_BASE) as u8, value),
                DEBUG_EXIT => self.debug_exit.write(value),
                PVPANIC => self.pvpanic.write(value),
                PM1_BASE..=PM1_LAST => lock(&self.pm1).write(port - PM1_BASE, value),
                RESET_CONTROL if is_byte => lock(&self.reset_control).write(value),
                _ => {}
            }
        }
    }

    /// A write to memory that is no RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let (EXIT_REGISTER, Some(code)) = (address, data.first()) {
            self.debug_exit.write(*code);
        }
    }

    /// A read of memory that is no RAM.
    pub fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }

    /// Hands the terminal what the guest has written. Call after each exit, with no lock held.
    pub fn flush(&self) -> io::Result<()> {
        self.console.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;
    use vmm_sys_util::eventfd::EventFd;

    fn devices() -> (Devices, Arc<Stop>) {
        let stop = exit::tests::stop();
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let console = Console::new(event(), event(), Box::new(io::sink()));
        (Devices::new(&stop, console), stop)
    }

    fn read(devices: &Devices, port: u16, len: usize) -> u32 {
        let mut data = [0; 4];
        devices.pio_read(port, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    #[test]
    fn unclaimed_ports_read_all_ones() {
        let (devices, stop) = devices();
        for port in [0x00, 0x61, 0x278, DEBUG_EXIT, 0xCF8, 0xCFC, 0xFFFF] {
            assert_eq!(read(&devices, port, 1), 0xFF, "{port:#x}");
        }
        // A dword that runs over the end of the port space.
        assert_eq!(read(&devices, 0xFFFF, 4), 0xFFFF_FFFF);
        devices.pio_write(0xFFFF, &[0xFF; 4]);
        assert!(!stop.is_requested());
    }

    #[test]
    fn keyboard_controller_resets() {
        let (devices, stop) = devices();
        assert_eq!(read(&devices, I8042_COMMAND, 1) & 2, 0, "input buffer empty");
        devices.pio_write(I8042_COMMAND, &[0xD1]);
        devices.pio_write(I8042_DATA, &[0xFE]);
        assert!(!stop.is_requested());
        devices.pio_write(I8042_COMMAND, &[0xFE]);
        assert_eq!(stop.outcome(), Some(&Outcome::Reboot));
    }

    #[test]
    fn pci_probes_do_not_reset() {
        let (devices, stop) = devices();
        devices.pio_write(0xCF8, &0x8000_0600u32.to_le_bytes());
        devices.pio_write(RESET_CONTROL, &[6, 6]);
        assert!(!stop.is_requested());
        devices.pio_write(RESET_CONTROL, &[2]);
        assert!(!stop.is_requested());
        devices.pio_write(RESET_CONTROL, &[6]);
        assert_eq!(stop.outcome(), Some(&Outcome::Reboot));
    }

    #[test]
    fn s5_by_word_or_by_byte() {
        for (port, data) in [(PM1_BASE + 4, &[0x01, 0x34][..]), (PM1_BASE + 5, &[0x34][..])] {
            let (devices, stop) = devices();
            devices.pio_write(PM1_BASE + 4, &[0x01, 0x14]);
            devices.pio_write(PM1_BASE + 4, &[0x01, 0x20]);
            assert!(!stop.is_requested(), "sleep type alone, or another sleep type");
            devices.pio_write(port, data);
            assert_eq!(stop.outcome(), Some(&Outcome::PowerOff));
        }
    }

    #[test]
    fn exit_port_and_pvpanic() {
        let (devices, stop) = devices();
        devices.pio_write(PVPANIC, &[0]);
        devices.pio_write(PVPANIC, &[0x80]);
        assert!(!stop.is_requested());
        devices.pio_write(DEBUG_EXIT, &[5]);
        assert_eq!(stop.outcome(), Some(&Outcome::GuestCode(5)));

        let (devices, stop) = self::devices();
        let mut data = [0; 8];
        devices.mmio_read(EXIT_REGISTER, &mut data);
        assert_eq!(data, [0xFF; 8]);
        devices.mmio_write(EXIT_REGISTER + 1, &[1]);
        assert!(!stop.is_requested());
        devices.mmio_write(EXIT_REGISTER, &[6, 0, 0, 0]);
        assert_eq!(stop.outcome(), Some(&Outcome::GuestCode(6)));

        let (devices, stop) = self::devices();
        assert_eq!(read(&devices, PVPANIC, 1), 1);
        devices.pio_write(PVPANIC, &[1]);
        assert_eq!(stop.outcome().map(Outcome::code), Some(4));
    }
}
