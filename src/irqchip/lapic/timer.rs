// SPDX-License-Identifier: GPL-2.0
//! The local APIC's timer. SDM "APIC Timer".
//!
//! A pure schedule: the owner arms a host timer for [`Timer::deadline`] and calls back when it is due. The timer
//! runs whether or not its LVT entry is masked. Periods that were missed are skipped in phase: no drift, no storm.
#![forbid(unsafe_code)]

use crate::irqchip::MIN_TIMER_PERIOD_NS;

/// Nanoseconds per tick of the APIC's bus clock: 1 GHz, KVM's default.
pub const BUS_CYCLE_NS: u64 = 1;

/// When the timer wants to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// Host monotonic clock, in nanoseconds.
    Ns(u64),
    /// Value of the guest's TSC.
    GuestTsc(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
    /// Mode bits 11b: the timer does not run.
    Reserved,
}

impl Mode {
    /// From bits 18:17 of the LVT entry.
    pub(super) const fn from_lvt(lvt: u32) -> Self {
        match (lvt >> 17) & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Timer {
    mode: Mode,
    initial: u32,
    /// log2 of the divisor, 0 to 7.
    shift: u32,
    /// Length of a cycle of the bus clock, in ns.
    bus_cycle_ns: u64,
    /// Length of a count-down, in ns.
    period_ns: u64,
    /// End of the count-down, while one runs.
    target_ns: Option<u64>,
    /// 0: not armed.
    tsc_deadline: u64,
}

impl Timer {
    pub(super) const fn new() -> Self {
        // Divide configuration 0 divides by 2.
        Self {
            mode: Mode::OneShot,
            initial: 0,
            shift: 1,
            bus_cycle_ns: BUS_CYCLE_NS,
            period_ns: 0,
            target_ns: None,
            tsc_deadline: 0,
        }
    }

    /// Another bus clock, for a timer that does not run.
    pub(super) fn set_bus_cycle(&mut self, ns: u64) {
        self.bus_cycle_ns = ns;
    }

    pub(super) const fn initial(&self) -> u32 {
        self.initial
    }

    pub(super) const fn mode(&self) -> Mode {
        self.mode
    }

    pub(super) const fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    pub(super) fn deadline(&self) -> Option<Deadline> {
        match self.mode {
            Mode::TscDeadline => (self.tsc_deadline != 0).then_some(Deadline::GuestTsc(self.tsc_deadline)),
            _ => self.target_ns.map(Deadline::Ns),
        }
    }

    const fn ticks_to_ns(&self, ticks: u32) -> u64 {
        (ticks as u64).wrapping_shl(self.shift).saturating_mul(self.bus_cycle_ns)
    }

    fn set_period(&mut self) {
        self.period_ns = self.ticks_to_ns(self.initial);
        if self.mode == Mode::Periodic && self.period_ns != 0 {
            self.period_ns = self.period_ns.max(MIN_TIMER_PERIOD_NS);
        }
    }

    /// A new mode. Into or out of TSC-deadline mode the timer is disarmed, as the SDM has it.
    pub(super) fn set_mode(&mut self, mode: Mode) -> bool {
        if self.mode == mode {
            return false;
        }
        if (self.mode == Mode::TscDeadline) != (mode == Mode::TscDeadline) {
            *self = Self { shift: self.shift, bus_cycle_ns: self.bus_cycle_ns, ..Self::new() };
        }
        self.mode = mode;
        self.set_period();
        true
    }

    /// A write of the initial count: starts the count-down, or stops it (0). Ignored in TSC-deadline mode.
    pub(super) fn set_initial(&mut self, ticks: u32, now_ns: u64) {
        if self.mode != Mode::TscDeadline {
            self.initial = ticks;
            self.set_period();
            self.run(self.period_ns, now_ns);
        }
    }

    /// Continues a saved timer: `current` is what was left of `initial`. A one-shot timer with nothing left is due now,
    /// as in KVM: it may have ended between the save and its delivery.
    pub(super) fn restore(&mut self, initial: u32, current: u32, now_ns: u64) {
        self.initial = initial;
        self.set_period();
        let left_ns = match (current, self.mode) {
            (0, Mode::Periodic) => self.period_ns,
            _ => self.ticks_to_ns(current).min(self.period_ns),
        };
        self.run(left_ns, now_ns);
    }

    fn run(&mut self, left_ns: u64, now_ns: u64) {
        let runs = self.initial != 0 && matches!(self.mode, Mode::OneShot | Mode::Periodic);
        self.target_ns = runs.then_some(now_ns.saturating_add(left_ns));
    }

    /// A new divisor: what is left of the count-down keeps its ticks.
    pub(super) fn set_divide(&mut self, register: u32, now_ns: u64) -> bool {
        let old = self.shift;
        self.shift = divide_shift(register);
        if old == self.shift {
            return false;
        }
        self.set_period();
        if let Some(target_ns) = self.target_ns {
            let left_ns = target_ns.saturating_sub(now_ns);
            let left_ns = (left_ns >> (old & 7)).wrapping_shl(self.shift);
            self.target_ns = Some(now_ns.saturating_add(left_ns));
        }
        true
    }

    /// What is left of the count-down, in ticks; 0 in TSC-deadline mode.
    pub(super) fn current(&self, now_ns: u64) -> u32 {
        let Some(target_ns) = self.target_ns else { return 0 };
        let left_ns = match target_ns.checked_sub(now_ns) {
            Some(left_ns) => left_ns,
            // Past its end but not served yet: a periodic timer is already in a later period.
            None if self.mode == Mode::Periodic => {
                let late_ns = now_ns.wrapping_sub(target_ns).checked_rem(self.period_ns).unwrap_or(0);
                self.period_ns.saturating_sub(late_ns)
            }
            None => 0,
        };
        let ticks = left_ns.checked_div(self.bus_cycle_ns).unwrap_or(0) >> (self.shift & 7);
        ticks.min(self.initial as u64) as u32
    }

    /// A write of IA32_TSC_DEADLINE. Ignored outside TSC-deadline mode.
    pub(super) fn set_tsc_deadline(&mut self, deadline: u64) {
        if self.mode == Mode::TscDeadline {
            self.tsc_deadline = deadline;
        }
    }

    /// Whether the timer fires now. A one-shot timer stops, a periodic one goes on to its first end after `now_ns`.
    pub(super) fn expire(&mut self, now_ns: u64, guest_tsc: u64) -> bool {
        if self.mode == Mode::TscDeadline {
            let due = self.tsc_deadline != 0 && guest_tsc >= self.tsc_deadline;
            if due {
                self.tsc_deadline = 0;
            }
            return due;
        }
        let Some(late_ns) = self.target_ns.and_then(|target_ns| now_ns.checked_sub(target_ns)) else { return false };
        self.target_ns = match (self.mode, late_ns.checked_rem(self.period_ns)) {
            (Mode::Periodic, Some(into_ns)) => Some(now_ns.saturating_add(self.period_ns.saturating_sub(into_ns))),
            _ => None,
        };
        true
    }
}

/// log2 of the divisor that a divide configuration stands for: bits 3, 1 and 0; 111b divides by 1.
const fn divide_shift(register: u32) -> u32 {
    let code = (register & 3) | ((register & 8) >> 1);
    (code + 1) & 7
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors() {
        let shifts: std::vec::Vec<u32> = [0xB, 0, 1, 2, 3, 8, 9, 0xA].map(divide_shift).to_vec();
        assert_eq!(shifts, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn one_shot_counts_down_and_stops() {
        let mut timer = Timer::new();
        timer.set_initial(1_000, 10_000);
        assert_eq!(timer.deadline(), Some(Deadline::Ns(12_000)));
        assert_eq!(timer.current(10_000), 1_000);
        assert_eq!(timer.current(11_000), 500);
        assert!(!timer.expire(11_999, 0));
        assert!(timer.expire(12_000, 0));
        assert_eq!((timer.deadline(), timer.current(12_001)), (None, 0));
        assert!(!timer.expire(99_000, 0));
        timer.set_initial(0, 0);
        assert_eq!(timer.deadline(), None);
    }

    #[test]
    fn periodic_keeps_its_phase_and_skips_what_it_missed() {
        let mut timer = Timer::new();
        timer.set_mode(Mode::Periodic);
        timer.set_initial(500_000, 7);
        for period in 1..1_000u64 {
            assert_eq!(timer.deadline(), Some(Deadline::Ns(7 + period * 1_000_000)));
            // Served late, by up to a fifth of a period.
            assert!(timer.expire(7 + period * 1_000_000 + (period * 7919) % 200_000, 0));
        }
        assert!(timer.expire(7 + 5_000 * 1_000_000 + 3, 0));
        assert_eq!(timer.deadline(), Some(Deadline::Ns(7 + 5_001 * 1_000_000)));
        assert_eq!(timer.current(7 + 5_002 * 1_000_000 + 500_000), 250_000);
    }

    #[test]
    fn short_periods_are_lengthened_but_short_shots_are_not() {
        let mut timer = Timer::new();
        timer.set_initial(10, 0);
        assert_eq!(timer.deadline(), Some(Deadline::Ns(20)));
        timer.set_mode(Mode::Periodic);
        timer.set_initial(10, 0);
        assert_eq!(timer.deadline(), Some(Deadline::Ns(MIN_TIMER_PERIOD_NS)));
        assert!(timer.current(0) <= 10);
    }

    #[test]
    fn divisor_change_keeps_the_ticks() {
        let mut timer = Timer::new();
        timer.set_initial(1_000, 0);
        assert!(timer.set_divide(0xB, 1_000));
        assert_eq!(timer.current(1_000), 500);
        assert_eq!(timer.deadline(), Some(Deadline::Ns(1_500)));
        assert!(timer.set_divide(0xA, 1_000));
        assert_eq!(timer.deadline(), Some(Deadline::Ns(1_000 + 500 * 128)));
        assert!(!timer.set_divide(0xA, 1_000));
    }

    #[test]
    fn tsc_deadline_mode() {
        let mut timer = Timer::new();
        timer.set_tsc_deadline(5);
        assert_eq!(timer.tsc_deadline(), 0);
        timer.set_initial(1_000, 0);
        timer.set_mode(Mode::TscDeadline);
        assert_eq!((timer.deadline(), timer.initial()), (None, 0));
        timer.set_initial(1_000, 0);
        assert_eq!(timer.initial(), 0);
        timer.set_tsc_deadline(5_000);
        assert_eq!(timer.deadline(), Some(Deadline::GuestTsc(5_000)));
        assert!(!timer.expire(u64::MAX, 4_999));
        assert!(timer.expire(0, 5_000));
        assert!(!timer.expire(0, 5_001));
        timer.set_tsc_deadline(9);
        timer.set_mode(Mode::OneShot);
        assert_eq!((timer.deadline(), timer.tsc_deadline()), (None, 0));
    }

    #[test]
    fn reserved_mode_never_runs() {
        let mut timer = Timer::new();
        timer.set_mode(Mode::Reserved);
        timer.set_initial(1_000, 0);
        assert_eq!(timer.deadline(), None);
        assert!(!timer.expire(u64::MAX, u64::MAX));
    }
}
