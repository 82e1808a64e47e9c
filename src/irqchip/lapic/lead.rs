// SPDX-License-Identifier: GPL-2.0
//! How much earlier than a guest's TSC deadline the host's timer comes: as much as the way from there to the guest takes, which is
//! learned, so that the interrupt is at the door in time. Whoever lets it in waits there for the rest. All times are TSC ticks.
#![forbid(unsafe_code)]

/// The longest lead, and so the longest wait.
const MAX_US: u64 = 5;

/// One vCPU's lead.
#[derive(Clone, Copy, Debug)]
pub struct Lead {
    ticks: u64,
    max: u64,
}

impl Lead {
    /// A microsecond to begin with. `tsc_khz`: the host's.
    pub const fn new(tsc_khz: u32) -> Self {
        let us = tsc_khz as u64 / 1000;
        Self { ticks: us, max: MAX_US * us }
    }

    /// How early the timer is to come.
    pub const fn ticks(&self) -> u64 {
        self.ticks
    }

    /// The most that anybody waits.
    pub const fn max(&self) -> u64 {
        self.max
    }

    /// The interrupt got to the guest's door `late` ticks after the deadline; negative: before.
    pub fn learn(&mut self, late: i64) {
        // So far off, something else took the time.
        if late.unsigned_abs() <= self.max.wrapping_mul(2) {
            self.ticks = self.ticks.saturating_add_signed(late / 8).min(self.max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settles_where_the_interrupt_is_in_time() {
        let mut lead = Lead::new(2_000_000);
        assert_eq!((lead.ticks(), lead.max()), (2000, 10_000));
        for _ in 0..100 {
            lead.learn(4000 - lead.ticks() as i64);
        }
        assert!(lead.ticks().abs_diff(4000) < 8, "{}", lead.ticks());
    }

    #[test]
    fn stays_in_bounds() {
        let mut lead = Lead::new(1_000_000);
        for _ in 0..100 {
            lead.learn(9000);
        }
        assert_eq!(lead.ticks(), 5000);
        for late in [i64::MAX, i64::MIN, 10_001, -10_001] {
            lead.learn(late);
            assert_eq!(lead.ticks(), 5000, "{late} says nothing");
        }
        for _ in 0..100 {
            lead.learn(-9000);
        }
        assert_eq!(lead.ticks(), 0);
        lead.learn(7);
        assert_eq!(Lead::new(0).max(), 0);
    }
}
