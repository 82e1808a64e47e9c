// SPDX-License-Identifier: GPL-2.0
//! 8254 timer: three channels, and port 61h's gate and speaker bits. Intel "8254 Programmable Interval Timer" data
//! sheet.
//!
//! Channel 0 interrupts by a short pulse on GSI 0. Its schedule is exact: the nth interrupt of a periodic mode is
//! computed from the load, so nothing drifts; periods below [`MIN_TIMER_PERIOD_NS`] are lengthened. With reinjection
//! (the default), a tick that comes before the last one was acknowledged waits and follows that acknowledgement;
//! without, it is dropped.
//!
//! As in KVM: BCD counting is stored and ignored, a new count takes effect at once in every mode, restoring restarts
//! all counts. A control word stops the channel until its count is loaded, and modes 1 and 5 wait for the gate's edge:
//! channel 0, whose gate is wired high, never fires in these.
#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

pub use crate::abi::irq::{KvmPitChannelState as PitChannelState, KvmPitState2 as PitState};

use super::MIN_TIMER_PERIOD_NS;
use crate::abi::FromZeros;

/// Input clock, in Hz.
pub const FREQUENCY_HZ: u64 = 1_193_182;
const NS: u64 = 1_000_000_000;
const MIN_PERIOD_TICKS: u64 = ns_to_ticks(MIN_TIMER_PERIOD_NS) + 1;

/// Flag of [`PitState`]: an HPET has taken channel 0's interrupt over.
pub const FLAG_HPET_LEGACY: u32 = 1;
/// Flag of [`PitState`]: the speaker data bit of port 61h.
pub const FLAG_SPEAKER_DATA_ON: u32 = 2;

/// Whole clock ticks in `ns` nanoseconds; exact.
const fn ns_to_ticks(ns: u64) -> u64 {
    // The second product is below 10^9 * 2^21.
    (ns / NS).wrapping_mul(FREQUENCY_HZ).wrapping_add((ns % NS) * FREQUENCY_HZ / NS)
}

/// The first nanosecond at which `ticks` ticks are over; exact.
const fn ticks_to_ns(ticks: u64) -> u64 {
    let part = ((ticks % FREQUENCY_HZ) * NS).div_ceil(FREQUENCY_HZ);
    (ticks / FREQUENCY_HZ).saturating_mul(NS).saturating_add(part)
}

// Access modes, as `rw_mode`, `read_state`, `write_state` and `count_latched` have them; any other: the low byte.
const HIGH: u8 = 2;
const WORD: u8 = 3;
const WORD_HIGH: u8 = 4;

/// Where a channel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No count loaded since the control word.
    Idle,
    /// Waits for the gate.
    Armed,
    /// Counts since then, in ns.
    Running(u64),
    /// The gate stopped it after that many ns.
    Paused(u64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Channel {
    state: PitChannelState,
    phase: Phase,
}

impl Channel {
    fn new(gate: bool) -> Self {
        let state = PitChannelState { count: 0x1_0000, mode: 0xFF, gate: gate as u8, ..PitChannelState::new_zeroed() };
        Self { state, phase: Phase::Idle }
    }

    fn elapsed_ticks(&self, now_ns: u64) -> Option<u64> {
        match self.phase {
            Phase::Idle | Phase::Armed => None,
            Phase::Running(since_ns) => Some(ns_to_ticks(now_ns.saturating_sub(since_ns))),
            Phase::Paused(elapsed_ns) => Some(ns_to_ticks(elapsed_ns)),
        }
    }

    fn count(&self, now_ns: u64) -> u16 {
        let count = self.state.count as u64;
        let elapsed = self.elapsed_ticks(now_ns).unwrap_or(0);
        let left = match self.state.mode {
            0 | 1 | 4 | 5 => count.wrapping_sub(elapsed),
            3 => count.wrapping_sub(elapsed.wrapping_mul(2).checked_rem(count).unwrap_or(0)),
            _ => count.wrapping_sub(elapsed.checked_rem(count).unwrap_or(0)),
        };
        left as u16
    }

    fn out(&self, now_ns: u64) -> bool {
        let count = self.state.count as u64;
        let Some(elapsed) = self.elapsed_ticks(now_ns) else {
            return self.state.mode != 0;
        };
        let into = elapsed.checked_rem(count).unwrap_or(0);
        match self.state.mode {
            0 | 1 => elapsed >= count,
            2 => into != count.wrapping_sub(1),
            3 => into < count.div_ceil(2),
            4 | 5 => elapsed != count,
            _ => true,
        }
    }

    fn load(&mut self, value: u32, now_ns: u64) {
        self.state.count = match value {
            0 => 0x1_0000,
            value => value.min(0x1_0000),
        };
        self.state.count_load_time = now_ns as i64;
        self.phase = match (self.state.mode, self.state.gate != 0) {
            (1 | 5, _) | (2 | 3, false) => Phase::Armed,
            (_, true) => Phase::Running(now_ns),
            (_, false) => Phase::Paused(0),
        };
    }

    fn set_gate(&mut self, high: bool, now_ns: u64) {
        let was_high = self.state.gate != 0;
        self.state.gate = high as u8;
        self.phase = match (was_high, high, self.state.mode, self.phase) {
            (_, _, _, Phase::Idle) => Phase::Idle,
            (false, true, 1 | 2 | 3 | 5, _) => Phase::Running(now_ns),
            (true, false, 2 | 3, _) => Phase::Armed,
            (false, true, _, Phase::Paused(elapsed_ns)) => Phase::Running(now_ns.saturating_sub(elapsed_ns)),
            (true, false, 0 | 4, Phase::Running(since_ns)) => Phase::Paused(now_ns.saturating_sub(since_ns)),
            (_, _, _, phase) => phase,
        };
    }

    fn latch_count(&mut self, now_ns: u64) {
        if self.state.count_latched == 0 {
            self.state.latched_count = self.count(now_ns);
            self.state.count_latched = self.state.rw_mode;
        }
    }

    fn latch_status(&mut self, now_ns: u64) {
        if self.state.status_latched == 0 {
            let null_count = self.phase == Phase::Idle;
            self.state.status = ((self.out(now_ns) as u8) << 7)
                | ((null_count as u8) << 6)
                | ((self.state.rw_mode & 3) << 4)
                | ((self.state.mode & 7) << 1)
                | (self.state.bcd & 1);
            self.state.status_latched = 1;
        }
    }

    fn control(&mut self, word: u8) {
        let access = (word >> 4) & 3;
        self.state.rw_mode = access;
        self.state.read_state = access;
        self.state.write_state = access;
        let mode = (word >> 1) & 7;
        self.state.mode = if mode > 5 { mode - 4 } else { mode };
        self.state.bcd = word & 1;
        self.phase = Phase::Idle;
    }

    fn read(&mut self, now_ns: u64) -> u8 {
        if self.state.status_latched != 0 {
            self.state.status_latched = 0;
            return self.state.status;
        }
        if self.state.count_latched != 0 {
            let [low, high] = self.state.latched_count.to_le_bytes();
            let latched = core::mem::take(&mut self.state.count_latched);
            if latched == WORD {
                self.state.count_latched = HIGH;
            }
            return if latched == HIGH { high } else { low };
        }
        let [low, high] = self.count(now_ns).to_le_bytes();
        match self.state.read_state {
            HIGH => high,
            WORD => {
                self.state.read_state = WORD_HIGH;
                low
            }
            WORD_HIGH => {
                self.state.read_state = WORD;
                high
            }
            _ => low,
        }
    }

    /// A write of one byte of the count. True: a count was loaded.
    fn write(&mut self, value: u8, now_ns: u64) -> bool {
        let count = match self.state.write_state {
            HIGH => (value as u32) << 8,
            WORD => {
                self.state.write_latch = value;
                self.state.write_state = WORD_HIGH;
                return false;
            }
            WORD_HIGH => {
                self.state.write_state = WORD;
                self.state.write_latch as u32 | ((value as u32) << 8)
            }
            _ => value as u32,
        };
        self.load(count, now_ns);
        true
    }
}

/// The timer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pit {
    channels: [Channel; 3],
    flags: u32,
    /// Channel 0's next interrupt, in ticks after its load.
    next_tick: Option<u64>,
    reinject: bool,
    /// Ticks that wait for an acknowledgement, with the one under way.
    pending: u32,
    /// The last interrupt was acknowledged.
    acknowledged: bool,
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

impl Pit {
    /// After power-on: no channel counts.
    pub fn new() -> Self {
        Self {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            flags: 0,
            next_tick: None,
            reinject: true,
            pending: 0,
            acknowledged: true,
        }
    }

    /// Ticks between two interrupts of channel 0; `None` outside the periodic modes.
    fn period_ticks(&self) -> Option<u64> {
        let state = &self.channels[0].state;
        matches!(state.mode, 2 | 3).then(|| (state.count as u64).max(MIN_PERIOD_TICKS))
    }

    /// Plans channel 0's interrupts from its load.
    fn schedule(&mut self) {
        self.reset_reinjection();
        let channel = &self.channels[0];
        let counts = matches!(channel.phase, Phase::Running(_)) && self.flags & FLAG_HPET_LEGACY == 0;
        let first = match channel.state.mode {
            0 | 4 => Some(channel.state.count as u64),
            _ => self.period_ticks(),
        };
        self.next_tick = first.filter(|_| counts);
    }

    /// When [`Pit::expire`] is to be called, on the host monotonic clock in ns. Look again after every write that
    /// returns true, after `expire` and after `restore`.
    pub fn deadline_ns(&self) -> Option<u64> {
        match (self.next_tick, self.channels[0].phase) {
            (Some(ticks), Phase::Running(since_ns)) => Some(since_ns.saturating_add(ticks_to_ns(ticks))),
            _ => None,
        }
    }

    /// Accounts for the interrupts of channel 0 that are due. True: pulse GSI 0 (raise the line, then lower it).
    pub fn expire(&mut self, now_ns: u64) -> bool {
        let (Some(next), Some(elapsed)) = (self.next_tick, self.channels[0].elapsed_ticks(now_ns)) else {
            return false;
        };
        let Some(late) = elapsed.checked_sub(next) else { return false };
        let missed = match self.period_ticks() {
            Some(period) => {
                let missed = late.checked_div(period).unwrap_or(0);
                self.next_tick = Some(next.saturating_add(missed.saturating_add(1).saturating_mul(period)));
                missed
            }
            None => {
                self.next_tick = None;
                0
            }
        };
        if !self.reinject {
            return true;
        }
        let ticks = u32::try_from(missed.saturating_add(1)).unwrap_or(u32::MAX);
        self.pending = self.pending.saturating_add(ticks);
        core::mem::take(&mut self.acknowledged)
    }

    /// GSI 0 was acknowledged at the 8259A or the I/O APIC. True: pulse it again, a tick waits.
    pub fn irq_acknowledged(&mut self) -> bool {
        if !self.reinject {
            return false;
        }
        self.pending = self.pending.saturating_sub(1);
        self.acknowledged = self.pending == 0;
        !self.acknowledged
    }

    /// GSI 0 was unmasked at the 8259A or the I/O APIC: ticks that waited are forgotten.
    pub fn irq_unmasked(&mut self) {
        if self.reinject {
            self.reset_reinjection();
        }
    }

    fn reset_reinjection(&mut self) {
        self.pending = 0;
        self.acknowledged = true;
    }

    /// Whether acknowledgements of GSI 0 matter.
    pub const fn reinjects(&self) -> bool {
        self.reinject
    }

    /// KVM_REINJECT_CONTROL.
    pub fn set_reinject(&mut self, reinject: bool) {
        if self.reinject != reinject {
            self.reinject = reinject;
            self.reset_reinjection();
        }
    }

    /// IN from ports 40h to 43h, one byte whatever the size.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        match self.channels.get_mut(port as usize & 3) {
            Some(channel) => channel.read(now_ns),
            // The control word cannot be read.
            None => 0,
        }
    }

    /// OUT to ports 40h to 43h, the low byte whatever the size. True: [`Pit::deadline_ns`] changed.
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) -> bool {
        let number = port as usize & 3;
        let Some(channel) = self.channels.get_mut(number) else { return self.write_control(value, now_ns) };
        let loaded = channel.write(value, now_ns);
        if loaded && number == 0 {
            self.schedule();
            return true;
        }
        false
    }

    fn write_control(&mut self, word: u8, now_ns: u64) -> bool {
        let number = (word >> 6) as usize;
        let Some(channel) = self.channels.get_mut(number) else {
            // Read-back: bits 1 to 3 select channels; bits 5 and 4 are active low.
            for (number, channel) in self.channels.iter_mut().enumerate() {
                if word & (2 << number) == 0 {
                    continue;
                }
                if word & 0x20 == 0 {
                    channel.latch_count(now_ns);
                }
                if word & 0x10 == 0 {
                    channel.latch_status(now_ns);
                }
            }
            return false;
        };
        if word & 0x30 == 0 {
            channel.latch_count(now_ns);
            return false;
        }
        channel.control(word);
        if number == 0 {
            self.next_tick = None;
        }
        number == 0
    }

    /// IN from port 61h.
    pub fn read_speaker(&self, now_ns: u64) -> u8 {
        let channel = &self.channels[2];
        // The refresh clock toggles about every 15 us.
        let refresh = (now_ns >> 14) as u8 & 1;
        channel.state.gate & 1
            | (((self.flags & FLAG_SPEAKER_DATA_ON != 0) as u8) << 1)
            | (refresh << 4)
            | ((channel.out(now_ns) as u8) << 5)
    }

    /// OUT to port 61h: bit 0 is the gate of channel 2, bit 1 the speaker.
    pub fn write_speaker(&mut self, value: u8, now_ns: u64) {
        self.flags &= !FLAG_SPEAKER_DATA_ON;
        if value & 2 != 0 {
            self.flags |= FLAG_SPEAKER_DATA_ON;
        }
        self.channels[2].set_gate(value & 1 != 0, now_ns);
    }

    /// KVM_GET_PIT2.
    pub fn save(&self) -> PitState {
        let mut state = PitState { flags: self.flags, ..PitState::new_zeroed() };
        for (to, from) in state.channels.iter_mut().zip(&self.channels) {
            *to = from.state;
        }
        state
    }

    /// KVM_SET_PIT2; the deadline changes. KVM_SET_PIT is the same with the flags as [`Pit::save`] has them.
    pub fn restore(&mut self, state: &PitState, now_ns: u64) {
        for (to, from) in self.channels.iter_mut().zip(&state.channels) {
            to.state = *from;
            to.load(from.count, now_ns);
            if from.mode > 5 {
                to.phase = Phase::Idle;
            }
        }
        self.flags = state.flags & (FLAG_HPET_LEGACY | FLAG_SPEAKER_DATA_ON);
        self.schedule();
    }
}
