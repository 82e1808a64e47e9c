// SPDX-License-Identifier: GPL-2.0
//! I/O APIC with 24 pins, after the 82093AA ("82093AA I/O Advanced Programmable Interrupt Controller") at version 11h.
//!
//! As in KVM: polarity is stored and ignored (a line is its logical level), the ID is only stored, an edge that arrives
//! while its pin is masked is lost, a pin's line is high while any of its sources holds it high.
//! Not supported: the EOI register of version 20h; delivery status (always idle); KVM's counting of RTC interrupts that
//! were not acknowledged yet, for userspace that replays lost ticks.
//!
//! A message that this model returns counts as accepted. If no local APIC takes it, say so with
//! [`Ioapic::not_accepted`].
#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

pub use crate::abi::irq::KvmIoapicState as IoapicState;

use super::bits::Bits256;
use super::message::{DeliveryMode, DestMode, Eoi, LineSource, LineStatus, Message, Shorthand, Trigger};
use crate::abi::FromZeros;
use crate::arch::Gpa;

/// Number of pins.
pub const PINS: u8 = 24;
/// Length of the register window, in bytes.
pub const WINDOW_BYTES: u64 = 0x100;
const DEFAULT_BASE: u64 = 0xFEC0_0000;
const VERSION: u32 = 0x11 | ((PINS as u32 - 1) << 16);
const ALL_PINS: u32 = (1 << PINS) - 1;

const SELECT: u32 = 0x00;
const WINDOW: u32 = 0x10;

/// How long a pin that interrupts again after every EOI is held back, in nanoseconds, and after how many in a row. Real
/// hardware is slower than this model: without a pause, a guest that cannot silence a device makes no progress at all.
pub const STORM_PAUSE_NS: u64 = 10_000_000;
const STORM_COUNT: u16 = 10_000;

/// One redirection table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry(u64);

impl Entry {
    const PENDING: u64 = 1 << 12;
    const REMOTE_IRR: u64 = 1 << 14;
    const LEVEL: u64 = 1 << 15;
    const MASKED: u64 = 1 << 16;

    const fn vector(self) -> u8 {
        self.0 as u8
    }

    const fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    fn message(self) -> Message {
        Message {
            dest: (self.0 >> 56) as u32,
            dest_mode: DestMode::from_logical(self.has(1 << 11)),
            shorthand: Shorthand::None,
            delivery: DeliveryMode::from_bits((self.0 >> 8) as u32),
            vector: self.vector(),
            trigger: Trigger::from_level(self.has(Self::LEVEL)),
            assert: true,
            redirection_hint: false,
        }
    }
}

/// Result of a change on a pin's line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct LineWork {
    pub message: Option<Message>,
    pub status: LineStatus,
}

/// Result of a guest's write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct WriteWork {
    /// A pin whose line was waiting now interrupts, with this message.
    pub message: Option<(u8, Message)>,
    /// This pin's line was high when it was unmasked, but its devices resample: signal their eventfds instead.
    pub resample: Option<u8>,
    /// This pin's mask changed, to that.
    pub mask_changed: Option<(u8, bool)>,
    /// An entry changed: look at [`Ioapic::eoi_vectors`] again.
    pub entry_changed: bool,
}

/// Result of an EOI. Pins are bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct EoiWork {
    /// These pins were acknowledged: signal their resample eventfds (the resampling sources have let go of the line in
    /// this model; let them go at the 8259A too), and tell the PIT.
    pub acknowledged: u32,
    /// Call [`Ioapic::service`] for these pins: their line is still high.
    pub again: u32,
    /// Some pin is held back: call [`Ioapic::resume`] after [`STORM_PAUSE_NS`].
    pub paused: bool,
}

/// The I/O APIC. Arrays by pin are 32 long, so that a masked index needs no check that a CPU could mispredict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ioapic {
    base: u64,
    select: u8,
    id: u32,
    /// Pins whose line is high.
    irr: u32,
    /// Edge-triggered pins of `irr` that have interrupted.
    delivered: u32,
    entries: [Entry; 32],
    /// Which sources hold each line high, a bit each.
    lines: [u8; 32],
    /// Interrupts in a row that followed an EOI at once.
    in_a_row: [u16; 32],
    /// Pins that are held back.
    paused: u32,
    /// Pins with resampling devices.
    resampling: u32,
}

impl Default for Ioapic {
    fn default() -> Self {
        Self::new()
    }
}

/// Array index of a pin.
const fn slot(pin: u8) -> usize {
    (pin & 31) as usize
}

impl Ioapic {
    /// After power-on: every pin masked.
    pub const fn new() -> Self {
        Self {
            base: DEFAULT_BASE,
            select: 0,
            id: 0,
            irr: 0,
            delivered: 0,
            entries: [Entry(Entry::MASKED); 32],
            lines: [0; 32],
            in_a_row: [0; 32],
            paused: 0,
            resampling: 0,
        }
    }

    /// Start of the register window, [`WINDOW_BYTES`] long.
    pub const fn base(&self) -> Gpa {
        Gpa(self.base)
    }

    /// Tells which pins (as bits) have devices that resample their line when it is acknowledged.
    pub fn set_resampling(&mut self, pins: u32) {
        self.resampling = pins & ALL_PINS;
    }

    /// The vectors whose EOI this model wants: those of level-triggered pins, and of the pins (as bits) that
    /// somebody listens to. Other EOIs need not come here.
    pub fn eoi_vectors(&self, listened: u32) -> Bits256 {
        let mut vectors = Bits256::EMPTY;
        for pin in 0..PINS {
            let entry = self.entries[slot(pin)];
            if entry.has(Entry::LEVEL) || (listened | self.resampling) & (1 << pin) != 0 {
                vectors.set(entry.vector());
            }
        }
        vectors
    }

    /// A source drives the line of `pin` (0 to 23; others are ignored).
    pub fn set_line(&mut self, pin: u8, source: LineSource, level: bool) -> LineWork {
        if pin >= PINS {
            return LineWork { message: None, status: LineStatus::Ignored };
        }
        let lines = &mut self.lines[slot(pin)];
        *lines = source.apply(*lines, level);
        let high = *lines != 0;
        self.drive(pin, high)
    }

    fn drive(&mut self, pin: u8, high: bool) -> LineWork {
        let bit = 1 << (pin & 31);
        if !high {
            self.irr &= !bit;
            return LineWork { message: None, status: LineStatus::Delivered };
        }
        let was_high = self.irr & bit != 0;
        self.irr |= bit;
        let entry = self.entries[slot(pin)];
        if !entry.has(Entry::LEVEL) {
            self.delivered &= !bit;
            if was_high {
                return LineWork { message: None, status: LineStatus::Coalesced };
            }
        }
        let message = self.service(pin);
        let status = if message.is_some() { LineStatus::Delivered } else { LineStatus::Ignored };
        LineWork { message, status }
    }

    /// Interrupts for `pin` if it may: unmasked, its line high, and not waiting for an EOI.
    pub fn service(&mut self, pin: u8) -> Option<Message> {
        let bit = 1 << (pin & 31);
        let entry = &mut self.entries[slot(pin)];
        let waits = entry.has(Entry::LEVEL) && entry.has(Entry::REMOTE_IRR);
        if pin >= PINS || entry.has(Entry::MASKED) || waits || self.irr & bit == 0 {
            return None;
        }
        if entry.has(Entry::LEVEL) {
            entry.0 |= Entry::REMOTE_IRR;
        } else {
            self.delivered |= bit;
        }
        Some(entry.message())
    }

    /// No local APIC took the message of `pin`: it waits for no EOI.
    pub fn not_accepted(&mut self, pin: u8) {
        self.entries[slot(pin)].0 &= !Entry::REMOTE_IRR;
    }

    /// A local APIC ended an interrupt.
    pub fn eoi(&mut self, eoi: Eoi) -> EoiWork {
        let mut work = EoiWork::default();
        for pin in 0..PINS {
            let bit = 1u32 << pin;
            if self.entries[slot(pin)].vector() != eoi.vector {
                continue;
            }
            work.acknowledged |= bit;
            if self.resampling & bit != 0 {
                let _ = self.set_line(pin, LineSource::Resampler, false);
            }
            if !eoi.level || !eoi.broadcast {
                continue;
            }
            let entry = &mut self.entries[slot(pin)];
            entry.0 &= !Entry::REMOTE_IRR;
            let in_a_row = &mut self.in_a_row[slot(pin)];
            if entry.has(Entry::MASKED) || self.irr & bit == 0 {
                *in_a_row = 0;
                continue;
            }
            *in_a_row = in_a_row.saturating_add(1);
            if *in_a_row >= STORM_COUNT {
                *in_a_row = 0;
                self.paused |= bit;
                work.paused = true;
            } else {
                work.again |= bit;
            }
        }
        work
    }

    /// The pause of a storm is over: call [`Ioapic::service`] for these pins.
    pub fn resume(&mut self) -> u32 {
        core::mem::take(&mut self.paused)
    }

    /// A read of `size_bytes` at `offset` into the register window. The value is in the low bytes.
    pub fn read(&self, offset: u32, size_bytes: u8) -> u64 {
        let value = match offset & 0xFF {
            SELECT => self.select as u32,
            WINDOW => self.read_register(),
            _ => 0,
        };
        match size_bytes {
            1 => value as u64 & 0xFF,
            2 => value as u64 & 0xFFFF,
            _ => value as u64,
        }
    }

    fn read_register(&self) -> u32 {
        match self.select {
            0 | 2 => (self.id & 0xF) << 24,
            1 => VERSION,
            select => match self.selected_pin() {
                Some(pin) => (self.entries[slot(pin)].0 >> ((select as u32 & 1) * 32)) as u32,
                None => !0,
            },
        }
    }

    /// The pin of redirection register 10h and up.
    fn selected_pin(&self) -> Option<u8> {
        let pin = self.select.wrapping_sub(0x10) >> 1;
        (pin < PINS).then_some(pin)
    }

    /// A write of `size_bytes` at `offset` into the register window. Odd sizes are ignored.
    pub fn write(&mut self, offset: u32, size_bytes: u8, value: u64) -> WriteWork {
        let value = match size_bytes {
            1 => value as u32 & 0xFF,
            2 => value as u32 & 0xFFFF,
            4 | 8 => value as u32,
            _ => return WriteWork::default(),
        };
        match (offset & 0xFF, self.select) {
            (SELECT, _) => self.select = value as u8,
            (WINDOW, 0) => self.id = (value >> 24) & 0xF,
            (WINDOW, 1 | 2) => {}
            (WINDOW, select) => {
                if let Some(pin) = self.selected_pin() {
                    return self.write_entry(pin, select & 1 != 0, value);
                }
            }
            _ => {}
        }
        WriteWork::default()
    }

    fn write_entry(&mut self, pin: u8, upper: bool, value: u32) -> WriteWork {
        const READ_ONLY: u64 = Entry::REMOTE_IRR | Entry::PENDING;
        let bit = 1 << (pin & 31);
        let entry = &mut self.entries[slot(pin)];
        let was_masked = entry.has(Entry::MASKED);
        if upper {
            entry.0 = (entry.0 & 0xFFFF_FFFF) | ((value as u64) << 32);
        } else {
            entry.0 = (entry.0 & ((0xFFFF_FFFF << 32) | READ_ONLY)) | (value as u64 & !READ_ONLY);
        }
        let level = entry.has(Entry::LEVEL);
        if !level {
            // Without an EOI register, switching to edge and back is how guests clear remote IRR.
            entry.0 &= !Entry::REMOTE_IRR;
        }
        let masked = entry.has(Entry::MASKED);
        let mut work = WriteWork {
            mask_changed: (masked != was_masked).then_some((pin, masked)),
            entry_changed: true,
            ..WriteWork::default()
        };
        let waiting = level && self.irr & bit != 0 && !masked && !entry.has(Entry::REMOTE_IRR);
        if waiting && self.resampling & bit != 0 {
            // The device may have let go of the line while it was masked; it is asked to raise it again if not.
            self.irr &= !bit;
            work.resample = Some(pin);
        } else if waiting && self.paused & bit == 0 {
            work.message = self.service(pin).map(|message| (pin, message));
        }
        work
    }

    /// KVM_GET_IRQCHIP.
    pub fn save(&self) -> IoapicState {
        let mut state = IoapicState {
            base_address: self.base,
            ioregsel: self.select as u32,
            id: self.id,
            irr: self.irr & !self.delivered,
            ..IoapicState::new_zeroed()
        };
        for (to, from) in state.redirtbl.iter_mut().zip(&self.entries) {
            *to = from.0;
        }
        state
    }

    /// KVM_SET_IRQCHIP. Returns pins, as bits: call [`Ioapic::service`] for each. Sources keep holding the
    /// lines that they hold.
    pub fn restore(&mut self, state: &IoapicState) -> u32 {
        self.base = state.base_address;
        self.select = state.ioregsel as u8;
        self.id = state.id & 0xF;
        self.irr = state.irr & ALL_PINS;
        self.delivered = 0;
        self.paused = 0;
        self.in_a_row = [0; 32];
        for (to, from) in self.entries.iter_mut().zip(&state.redirtbl) {
            *to = Entry(*from);
        }
        self.irr
    }
}
