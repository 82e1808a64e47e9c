// SPDX-License-Identifier: GPL-2.0
//! Two cascaded 8259A interrupt controllers, and their edge/level control registers. Intel "8259A Programmable
//! Interrupt Controller" data sheet; ELCR as in the PIIX4.
//!
//! As in KVM: ICW1's "level triggered" and "single" bits are ignored (the ELCR decides), ICW3 is ignored (the slave is
//! on pin 2), ICW2 keeps its upper five bits, an access of other than one byte reads 0 or does nothing. Beyond KVM,
//! from the data sheet: a poll sets the in-service bit as an acknowledge does, and special mask mode works. ICW1 clears
//! the ISR, as in QEMU and Bochs; a guest that restarts in the middle of a handler would never see an interrupt again.
#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

pub use crate::abi::irq::KvmPicState as PicState;

use super::message::{LineSource, LineStatus};
use crate::abi::FromZeros;

/// The cascade's pin on the master.
const CASCADE: u8 = 2;
/// Pins that can be level-triggered.
const ELCR_MASKS: [u8; 2] = [0xF8, 0xDE];

/// A chip is kept in the form that it is saved in. `priority_add` is the pin of highest priority; `init_state` is 0
/// when ready, else it says which of ICW2 to ICW4 comes; `last_irr` are the lines, for edge detection.
impl PicState {
    /// Position of the set bit with the highest priority, counted from that priority; 8 if there is none.
    fn first(&self, bits: u8) -> u32 {
        bits.rotate_right(self.priority_add as u32 & 7).trailing_zeros()
    }

    const fn pin_at(&self, position: u32) -> u8 {
        (position as u8).wrapping_add(self.priority_add) & 7
    }

    /// The pin that this chip wants served.
    fn request(&self, is_master: bool) -> Option<u8> {
        let wanted = self.first(self.irr & !self.imr);
        let mut in_service = self.isr;
        if self.special_mask != 0 {
            in_service &= !self.imr;
        }
        if self.special_fully_nested_mode != 0 && is_master {
            // The slave's own priorities decide.
            in_service &= !(1 << CASCADE);
        }
        (wanted < self.first(in_service)).then_some(self.pin_at(wanted))
    }

    fn set_line(&mut self, pin: u8, high: bool) -> LineStatus {
        let bit = 1 << (pin & 7);
        let was_high = self.last_irr & bit != 0;
        let was_requested = self.irr & bit != 0;
        let mut status = LineStatus::Delivered;
        if high {
            if self.elcr & bit != 0 || !was_high {
                self.irr |= bit;
                if was_requested {
                    status = LineStatus::Coalesced;
                }
            }
            self.last_irr |= bit;
        } else {
            self.last_irr &= !bit;
            if self.elcr & bit != 0 {
                self.irr &= !bit;
            }
        }
        if self.imr & bit != 0 {
            return LineStatus::Ignored;
        }
        status
    }
}

/// What the owner must do after an access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct PicWork {
    /// Pins (0 to 15, as bits) that were acknowledged: signal their resample eventfds, tell the PIT.
    pub acknowledged: u16,
    /// Pins whose mask changed.
    pub mask_changed: u16,
    /// The output to the CPUs rose: wake a CPU that takes it.
    pub raised: bool,
}

/// Both chips.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pic {
    /// Master, slave.
    chips: [PicState; 2],
    /// Which sources hold each line high, a bit each.
    lines: [u8; 16],
    output: bool,
}

impl Default for Pic {
    fn default() -> Self {
        Self::new()
    }
}

impl Pic {
    /// After power-on.
    pub fn new() -> Self {
        let chip = |elcr_mask| PicState { elcr_mask, ..PicState::new_zeroed() };
        Self { chips: [chip(ELCR_MASKS[0]), chip(ELCR_MASKS[1])], lines: [0; 16], output: false }
    }

    /// The INTR output to the CPUs.
    #[inline]
    pub const fn output(&self) -> bool {
        self.output
    }

    /// Interrupt masks of pins 0 to 15.
    pub const fn masks(&self) -> u16 {
        self.chips[0].imr as u16 | ((self.chips[1].imr as u16) << 8)
    }

    /// A source drives the line of `pin` (0 to 15 but for the cascade's 2; others are ignored). True: the output rose.
    pub fn set_line(&mut self, pin: u8, source: LineSource, level: bool) -> (LineStatus, bool) {
        let lines = match self.lines.get_mut(pin as usize) {
            Some(lines) if pin != CASCADE => lines,
            _ => return (LineStatus::Ignored, false),
        };
        *lines = source.apply(*lines, level);
        let high = *lines != 0;
        let chip = &mut self.chips[(pin >> 3) as usize & 1];
        let before = chip.irr;
        let status = chip.set_line(pin & 7, high);
        // Without another request the output is what it was: most edges go down, or come again.
        let rose = chip.irr != before && self.update();
        (status, rose)
    }

    /// Works out the output again. True: it rose.
    pub fn update(&mut self) -> bool {
        if self.chips[1].request(false).is_some() {
            // The slave's output goes low between two requests, so that each is an edge.
            self.chips[0].set_line(CASCADE, true);
            self.chips[0].set_line(CASCADE, false);
        }
        let output = self.chips[0].request(true).is_some();
        let rose = output && !self.output;
        self.output = output;
        rose
    }

    /// The CPU takes the interrupt: returns its vector. Without a request it is the spurious one of pin 7 or 15.
    pub fn acknowledge(&mut self) -> (u8, PicWork) {
        let mut work = PicWork::default();
        let mut chip = 0;
        let mut pin = self.chips[0].request(true);
        if let Some(pin) = pin {
            self.take(0, pin, &mut work);
        }
        if pin == Some(CASCADE) {
            chip = 1;
            pin = self.chips[1].request(false);
            if let Some(pin) = pin {
                self.take(1, pin, &mut work);
            }
        }
        let vector = self.chips[chip].irq_base.wrapping_add(pin.unwrap_or(7));
        // A CPU is taking one just now: that the output is high again is news.
        self.output = false;
        work.raised = self.update();
        (vector, work)
    }

    fn take(&mut self, chip: usize, pin: u8, work: &mut PicWork) {
        let state = &mut self.chips[chip & 1];
        let bit = 1 << pin;
        state.isr |= bit;
        if state.elcr & bit == 0 {
            state.irr &= !bit;
        }
        if state.auto_eoi != 0 {
            if state.rotate_on_auto_eoi != 0 {
                state.priority_add = (pin + 1) & 7;
            }
            self.end(chip, pin, work);
        }
    }

    fn end(&mut self, chip: usize, pin: u8, work: &mut PicWork) {
        self.chips[chip & 1].isr &= !(1 << pin);
        work.acknowledged |= 1 << (pin as u32 + 8 * (chip as u32 & 1));
    }

    /// IN from 20h, 21h, A0h, A1h, 4D0h or 4D1h; another port reads 0. A poll is an acknowledge.
    pub fn read(&mut self, port: u16, size_bytes: u8) -> (u32, PicWork) {
        let mut work = PicWork::default();
        if size_bytes != 1 {
            return (0, work);
        }
        let chip = match port {
            0x20 | 0x21 => 0,
            0xA0 | 0xA1 => 1,
            0x4D0 | 0x4D1 => return (self.chips[port as usize & 1].elcr as u32, work),
            _ => return (0, work),
        };
        let state = &mut self.chips[chip];
        let value = if core::mem::take(&mut state.poll) != 0 {
            let pin = state.request(chip == 0);
            if let Some(pin) = pin {
                self.take(chip, pin, &mut work);
            }
            if chip == 1 {
                // Its request is served; another one raises the cascade again.
                self.chips[0].irr &= !(1 << CASCADE);
            }
            work.raised = self.update();
            pin.map_or(7, |pin| 0x80 | pin)
        } else if port & 1 != 0 {
            state.imr
        } else if state.read_reg_select != 0 {
            state.isr
        } else {
            state.irr
        };
        (value as u32, work)
    }

    /// OUT to one of the ports of [`Pic::read`].
    pub fn write(&mut self, port: u16, size_bytes: u8, value: u32) -> PicWork {
        let mut work = PicWork::default();
        if size_bytes != 1 {
            return work;
        }
        let value = value as u8;
        match port {
            0x20 => self.write_command(0, value, &mut work),
            0xA0 => self.write_command(1, value, &mut work),
            0x21 => self.write_data(0, value, &mut work),
            0xA1 => self.write_data(1, value, &mut work),
            0x4D0 | 0x4D1 => {
                let chip = &mut self.chips[port as usize & 1];
                chip.elcr = value & chip.elcr_mask;
                return work;
            }
            _ => return work,
        }
        work.raised = self.update();
        work
    }

    /// ICW1, OCW2 and OCW3.
    fn write_command(&mut self, chip: usize, value: u8, work: &mut PicWork) {
        let state = &mut self.chips[chip & 1];
        if value & 0x10 != 0 {
            self.initialize(chip, value & 1, work);
        } else if value & 0x08 != 0 {
            if value & 0x04 != 0 {
                state.poll = 1;
            }
            if value & 0x02 != 0 {
                state.read_reg_select = value & 1;
            }
            if value & 0x40 != 0 {
                state.special_mask = (value >> 5) & 1;
            }
        } else {
            self.write_ocw2(chip, value >> 5, value & 7, work);
        }
    }

    fn write_ocw2(&mut self, chip: usize, command: u8, level: u8, work: &mut PicWork) {
        let state = &mut self.chips[chip & 1];
        match command {
            0 | 4 => state.rotate_on_auto_eoi = command >> 2,
            1 | 5 => {
                let position = state.first(state.isr);
                if position < 8 {
                    let pin = state.pin_at(position);
                    if command == 5 {
                        state.priority_add = (pin + 1) & 7;
                    }
                    self.end(chip, pin, work);
                }
            }
            3 => self.end(chip, level, work),
            6 => state.priority_add = (level + 1) & 7,
            7 => {
                state.priority_add = (level + 1) & 7;
                self.end(chip, level, work);
            }
            _ => {}
        }
    }

    /// ICW1. What was pending by edge or in service counts as acknowledged, because nobody else will do that.
    fn initialize(&mut self, chip: usize, init4: u8, work: &mut PicWork) {
        let state = &mut self.chips[chip & 1];
        let lost = state.irr & !state.elcr | state.isr;
        state.last_irr = 0;
        state.irr &= state.elcr;
        state.imr = 0;
        state.isr = 0;
        state.priority_add = 0;
        state.special_mask = 0;
        state.read_reg_select = 0;
        state.init4 = init4;
        if init4 == 0 {
            state.special_fully_nested_mode = 0;
            state.auto_eoi = 0;
        }
        state.init_state = 1;
        work.acknowledged |= (lost as u16) << (8 * (chip & 1));
    }

    /// OCW1, and ICW2 to ICW4.
    fn write_data(&mut self, chip: usize, value: u8, work: &mut PicWork) {
        let state = &mut self.chips[chip & 1];
        match state.init_state {
            1 => {
                state.irq_base = value & 0xF8;
                state.init_state = 2;
            }
            2 => state.init_state = if state.init4 != 0 { 3 } else { 0 },
            3 => {
                state.special_fully_nested_mode = (value >> 4) & 1;
                state.auto_eoi = (value >> 1) & 1;
                state.init_state = 0;
            }
            _ => {
                work.mask_changed |= ((state.imr ^ value) as u16) << (8 * (chip & 1));
                state.imr = value;
            }
        }
    }

    /// KVM_GET_IRQCHIP of the master (0) or the slave (1).
    pub const fn save(&self, chip: usize) -> PicState {
        self.chips[chip & 1]
    }

    /// KVM_SET_IRQCHIP of the master (0) or the slave (1). True: the output rose.
    pub fn restore(&mut self, chip: usize, state: &PicState) -> bool {
        let elcr_mask = state.elcr_mask & ELCR_MASKS[chip & 1];
        self.chips[chip & 1] = PicState {
            priority_add: state.priority_add & 7,
            init_state: state.init_state & 3,
            elcr: state.elcr & elcr_mask,
            elcr_mask,
            ..*state
        };
        self.update()
    }
}
