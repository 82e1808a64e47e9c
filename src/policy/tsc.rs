// SPDX-License-Identifier: GPL-2.0
//! A guest's TSC beside the host's: scaling, offset, and when a deadline comes. SDM "Time-Stamp Counter Offset and Multiplier", APM Vol. 2
//! "TSC Ratio".
//!
//! No 128-bit division anywhere: the kernel has none.
#![forbid(unsafe_code)]

/// Guest ticks for each host tick: a binary fraction with `FRACTION` bits behind the point, `WIDTH` in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ratio<const FRACTION: u32, const WIDTH: u32>(u64);

/// The TSC multiplier of VMX.
pub type VmxRatio = Ratio<48, 64>;
/// The TSC ratio of SVM.
pub type SvmRatio = Ratio<32, 40>;

impl<const FRACTION: u32, const WIDTH: u32> Ratio<FRACTION, WIDTH> {
    /// The guest's TSC runs as fast as the host's.
    pub const ONE: Self = Self(1 << FRACTION);

    /// For a guest TSC of `guest_khz` on a host TSC of `host_khz`. `None`: hardware cannot scale that far, or a frequency is 0.
    pub const fn from_khz(guest_khz: u32, host_khz: u32) -> Option<Self> {
        if guest_khz == 0 || host_khz == 0 {
            return None;
        }
        let (mut rest, host) = (guest_khz as u64, host_khz as u64);
        let whole = rest / host;
        if whole >> (WIDTH - FRACTION) != 0 {
            return None;
        }
        let mut ratio = whole;
        let mut left = FRACTION;
        while left != 0 {
            // The rest is below 2^32, so 32 more bits fit.
            let bits = if left < 32 { left } else { 32 };
            rest = (rest % host) << bits;
            ratio = ratio << bits | rest / host;
            left -= bits;
        }
        if ratio == 0 {
            None
        } else {
            Some(Self(ratio))
        }
    }

    /// As hardware takes it.
    #[inline]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Guest ticks in `host_ticks`, rounded down as hardware does; wraps at 2^64.
    #[inline]
    pub const fn guest_ticks(self, host_ticks: u64) -> u64 {
        ((host_ticks as u128 * self.0 as u128) >> FRACTION) as u64
    }

    /// The fewest host ticks in which `guest_ticks` pass; saturates.
    #[inline]
    pub const fn host_ticks(self, guest_ticks: u64) -> u64 {
        if self.0 == Self::ONE.0 {
            return guest_ticks;
        }
        divide_up((guest_ticks as u128) << FRACTION, self.0)
    }
}

/// `dividend / divisor`, rounded up; saturates at 2^64 - 1, for a divisor of 0 too.
const fn divide_up(dividend: u128, divisor: u64) -> u64 {
    let high = (dividend >> 64) as u64;
    if high >= divisor {
        return u64::MAX;
    }
    let low = dividend as u64;
    let (mut rest, mut quotient) = (high, 0u64);
    let mut bit = 64;
    while bit != 0 {
        bit -= 1;
        let carry = rest >> 63 != 0;
        rest = rest << 1 | low >> bit & 1;
        quotient <<= 1;
        // With the carry, the true rest is above any divisor, and the difference fits again.
        if carry || rest >= divisor {
            rest = rest.wrapping_sub(divisor);
            quotient |= 1;
        }
    }
    if rest != 0 {
        quotient.saturating_add(1)
    } else {
        quotient
    }
}

/// A guest's TSC: the host's, scaled, plus an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestTsc<const FRACTION: u32, const WIDTH: u32> {
    pub ratio: Ratio<FRACTION, WIDTH>,
    /// Added after scaling; wraps.
    pub offset: u64,
}

impl<const FRACTION: u32, const WIDTH: u32> GuestTsc<FRACTION, WIDTH> {
    /// A TSC that shows `value` when the host's shows `host_tsc`.
    pub const fn showing(value: u64, host_tsc: u64, ratio: Ratio<FRACTION, WIDTH>) -> Self {
        Self { ratio, offset: value.wrapping_sub(ratio.guest_ticks(host_tsc)) }
    }

    /// What it shows when the host's shows `host_tsc`.
    #[inline]
    pub const fn at(self, host_tsc: u64) -> u64 {
        self.ratio.guest_ticks(host_tsc).wrapping_add(self.offset)
    }

    /// Host TSC at which it shows `deadline` or more, at most one tick later than that; `now` if it does already. Saturates.
    #[inline]
    pub const fn host_deadline(self, deadline: u64, now: u64) -> u64 {
        now.saturating_add(self.ratio.host_ticks(deadline.saturating_sub(self.at(now))))
    }
}

/// Whether a TSC of `guest_khz` can be the host's as it is: two measurements of one clock differ by no more than 250 parts per million.
pub const fn same_frequency(guest_khz: u32, host_khz: u32) -> bool {
    guest_khz.abs_diff(host_khz) as u64 * 1_000_000 <= host_khz as u64 * 250
}

/// TSC ticks in `ns` nanoseconds, rounded up; saturates.
pub const fn ticks_in(ns: u64, tsc_khz: u32) -> u64 {
    const NS_PER_MS: u64 = 1_000_000;
    let khz = tsc_khz as u64;
    let whole = (ns / NS_PER_MS).saturating_mul(khz);
    whole.saturating_add((ns % NS_PER_MS * khz).div_ceil(NS_PER_MS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ratio(guest: u32, host: u32) -> VmxRatio {
        VmxRatio::from_khz(guest, host).unwrap()
    }

    #[test]
    fn frequencies_that_are_one() {
        for (guest, host) in
            [(2_500_000, 2_500_000), (2_500_625, 2_500_000), (2_499_375, 2_500_000), (u32::MAX, u32::MAX)]
        {
            assert!(same_frequency(guest, host), "{guest} {host}");
        }
        for (guest, host) in
            [(2_500_626, 2_500_000), (2_499_374, 2_500_000), (0, 2_500_000), (1, 0), (u32::MAX, 1), (0, u32::MAX)]
        {
            assert!(!same_frequency(guest, host), "{guest} {host}");
        }
    }

    #[test]
    fn ratios() {
        assert_eq!(ratio(2_000_000, 2_000_000), VmxRatio::ONE);
        assert_eq!(ratio(3_000_000, 2_000_000).raw(), 3 << 47);
        assert_eq!(ratio(1_000_000, 3_000_000).raw(), 0x5555_5555_5555);
        assert_eq!(SvmRatio::from_khz(1_000_000, 3_000_000).unwrap().raw(), 0x5555_5555);
        assert_eq!(SvmRatio::from_khz(2, 1).unwrap().raw(), 2 << 32);
        for (guest, host) in [(1, 3), (2_445_406, 3_700_001), (u32::MAX, 65_537), (999_999, u32::MAX), (7, 1)] {
            let exact = (u128::from(guest) << 48) / u128::from(host);
            assert_eq!(u128::from(ratio(guest, host).raw()), exact, "{guest}/{host}");
        }
    }

    #[test]
    fn ratios_that_hardware_does_not_have() {
        assert_eq!(VmxRatio::from_khz(0, 1), None);
        assert_eq!(VmxRatio::from_khz(1, 0), None);
        assert!(VmxRatio::from_khz(65_535, 1).is_some());
        assert_eq!(VmxRatio::from_khz(65_536, 1), None);
        assert!(SvmRatio::from_khz(255, 1).is_some());
        assert_eq!(SvmRatio::from_khz(256, 1), None);
        assert!(SvmRatio::from_khz(1, u32::MAX).is_some());
    }

    #[test]
    fn division() {
        for (dividend, divisor) in [
            (0, 1),
            (1, 1),
            (10, 3),
            (u128::from(u64::MAX), 1),
            (1 << 100, 1 << 40),
            (u128::from(u64::MAX) << 63, u64::MAX),
            ((u128::from(u64::MAX) << 64) - 1, u64::MAX),
            (0x1234_5678_9ABC_DEF0_0FED_CBA9, 0x8000_0000_0000_0001),
        ] {
            let exact = dividend.div_ceil(u128::from(divisor)).min(u128::from(u64::MAX));
            assert_eq!(u128::from(divide_up(dividend, divisor)), exact, "{dividend:#x} / {divisor:#x}");
        }
        assert_eq!(divide_up(u128::MAX, 1), u64::MAX);
        assert_eq!(divide_up(1, 0), u64::MAX);
    }

    #[test]
    fn host_ticks_are_the_fewest_that_do() {
        for (guest, host) in [(1, 3), (3, 1), (2_445_406, 3_700_001), (3_700_001, 2_445_406), (1, 1)] {
            let ratio = ratio(guest, host);
            for wanted in [1, 2, 3, 1000, 123_456_789, 1 << 40, (1 << 52) - 1] {
                let ticks = ratio.host_ticks(wanted);
                assert!(ratio.guest_ticks(ticks) >= wanted, "{guest}/{host}: {wanted}");
                assert!(ratio.guest_ticks(ticks - 1) < wanted, "{guest}/{host}: {wanted}");
            }
            assert_eq!(ratio.host_ticks(0), 0);
        }
        assert_eq!(ratio(1, 3).host_ticks(u64::MAX), u64::MAX);
    }

    #[test]
    fn deadlines() {
        for (guest, host) in [(1, 1), (2_445_406, 3_700_001), (5_000_000, 1_999_999)] {
            let now = 987_654_321_012;
            let tsc = GuestTsc::showing(1_000, now, ratio(guest, host));
            assert_eq!(tsc.at(now), 1_000);
            assert_eq!((tsc.host_deadline(1_000, now), tsc.host_deadline(0, now)), (now, now));
            for ahead in [1, 17, 1 << 20, 1 << 45] {
                let when = tsc.host_deadline(1_000 + ahead, now);
                assert!(tsc.at(when) >= 1_000 + ahead, "{guest}/{host} {ahead}");
                assert!(tsc.at(when - 2) < 1_000 + ahead, "{guest}/{host} {ahead}");
            }
            assert!(tsc.host_deadline(u64::MAX, now) > u64::MAX / 4);
        }
        let tsc = GuestTsc::showing(0, 0, ratio(1, 3));
        assert_eq!(tsc.host_deadline(u64::MAX, 5), u64::MAX);
    }

    #[test]
    fn nanoseconds() {
        assert_eq!(ticks_in(1_000_000, 2_445_406), 2_445_406);
        assert_eq!(ticks_in(1, 2_445_406), 3);
        assert_eq!(ticks_in(0, 2_445_406), 0);
        assert_eq!(ticks_in(1_500_000, 3), 5);
        assert_eq!(ticks_in(u64::MAX, u32::MAX), u64::MAX);
        assert_eq!(ticks_in(u64::MAX, 1), 18_446_744_073_710);
    }
}
