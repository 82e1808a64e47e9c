// SPDX-License-Identifier: GPL-2.0
//! The VMX-preemption timer: it ends the guest's run when the host's TSC reaches a value. SDM "VMX-Preemption Timer".
#![forbid(unsafe_code)]

/// What to write to the timer field for an exit at host TSC `deadline`, when the host TSC is `now`. The timer counts down each time that bit
/// `shift` of the TSC changes, and exits at 0.
///
/// It does not end early; it ends late by less than 2^`shift` ticks and what passes from `now` to the entry. A deadline that has come gives
/// 0: the guest exits before its first instruction. One that is too far away ends early, and is asked for again.
#[inline]
pub const fn timer_value(deadline: u64, now: u64, shift: u32) -> u32 {
    if deadline <= now {
        return 0;
    }
    let shift = shift & 31;
    // Changes are at the multiples of 2^shift: up to the first at or behind the deadline.
    let last = deadline.wrapping_sub(1) >> shift;
    let changes = (last - (now >> shift)).saturating_add(1);
    if changes > u32::MAX as u64 {
        u32::MAX
    } else {
        changes as u32
    }
}

/// Whether the timer's highest value is as good as no timer: on a CPU with a TSC of so many kHz it takes at least ten seconds.
pub const fn usable(shift: u32, tsc_khz: u32) -> bool {
    let per_second = (tsc_khz as u64 * 1000) >> (shift & 31);
    tsc_khz != 0 && per_second <= u32::MAX as u64 / 10
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Host TSC at which a timer ends that was started at `now`.
    fn end(value: u32, now: u64, shift: u32) -> u64 {
        match value {
            0 => now,
            value => ((now >> shift) + u64::from(value)) << shift,
        }
    }

    #[test]
    fn never_early_and_hardly_late() {
        for shift in [0, 1, 5, 7] {
            for now in [0, 1, 31, 32, 33, 127, 1_000_003] {
                for ahead in [1, 2, 31, 32, 33, 100, 128, 4096, 99_999] {
                    let deadline = now + ahead;
                    let ends = end(timer_value(deadline, now, shift), now, shift);
                    assert!(ends >= deadline, "{shift} {now} {ahead}");
                    assert!(ends < deadline + (1 << shift), "{shift} {now} {ahead}");
                }
            }
        }
    }

    #[test]
    fn what_has_come_exits_at_once() {
        assert_eq!(timer_value(5, 5, 5), 0);
        assert_eq!(timer_value(4, 5, 0), 0);
        assert_eq!(timer_value(0, u64::MAX, 31), 0);
    }

    #[test]
    fn too_fast_a_timer_is_none() {
        assert!(usable(5, 3_000_000) && usable(4, u32::MAX) == usable(0, u32::MAX >> 4));
        assert!(usable(0, 100_000) && usable(0, 429_496));
        assert!(!usable(0, 429_497) && !usable(0, 3_000_000) && !usable(5, 0));
    }

    #[test]
    fn far_away_saturates() {
        assert_eq!(timer_value(u64::MAX, 0, 5), u32::MAX);
        assert_eq!(timer_value(u64::MAX, 0, 0), u32::MAX);
        assert_eq!(timer_value(1 << 32, 0, 0), u32::MAX);
        assert_eq!(timer_value(u32::MAX.into(), 0, 0), u32::MAX);
        assert_eq!(timer_value(u64::MAX, u64::MAX - 1, 0), 1);
    }
}
