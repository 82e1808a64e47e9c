// SPDX-License-Identifier: GPL-2.0
//! A guest's TSC beside the host's: scaling, offset, and when a deadline comes. SDM "Time-Stamp Counter Offset and Multiplier", APM Vol. 2
//! "TSC Ratio".
//!
//! No 128-bit division anywhere: the kernel has none.
#![forbid(unsafe_code)]

/// How hardware takes a [`Ratio`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Bits behind the binary point, up to 48.
    fraction: u32,
    /// Bits in all, up to 64.
    width: u32,
}

impl Format {
    /// The TSC multiplier of VMX.
    pub const VMX: Self = Self { fraction: 48, width: 64 };
    /// The TSC ratio of SVM.
    pub const SVM: Self = Self { fraction: 32, width: 40 };

    /// The lowest frequency of a guest's TSC that is refused outright, in kHz.
    pub const fn end_khz(self, host_khz: u32) -> u32 {
        let max = Ratio { raw: u64::MAX >> (64 - self.width), fraction: self.fraction };
        let khz = max.guest_ticks(host_khz as u64);
        if khz < i32::MAX as u64 {
            khz as u32
        } else {
            i32::MAX as u32
        }
    }
}

/// Guest ticks for each host tick: a binary fraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ratio {
    /// As hardware takes it.
    raw: u64,
    fraction: u32,
}

impl Ratio {
    /// The guest's TSC runs as fast as the host's.
    pub const ONE: Self = Self { raw: 1 << Format::VMX.fraction, fraction: Format::VMX.fraction };

    /// For a guest TSC of `guest_khz` on a host TSC of `host_khz`. `None`: hardware cannot scale that far, or a frequency is 0.
    pub const fn from_khz(format: Format, guest_khz: u32, host_khz: u32) -> Option<Self> {
        if guest_khz == 0 || host_khz == 0 {
            return None;
        }
        let (mut rest, host) = (guest_khz as u64, host_khz as u64);
        let whole = rest / host;
        if whole >> (format.width - format.fraction) != 0 {
            return None;
        }
        let mut raw = whole;
        let mut left = format.fraction;
        while left != 0 {
            // The rest is below 2^32, so 32 more bits fit.
            let bits = if left < 32 { left } else { 32 };
            rest = (rest % host) << bits;
            raw = raw << bits | rest / host;
            left -= bits;
        }
        if raw == 0 {
            None
        } else {
            Some(Self { raw, fraction: format.fraction })
        }
    }

    #[inline]
    pub const fn is_one(self) -> bool {
        self.raw == 1 << self.fraction
    }

    /// As hardware with that format takes it; [`Self::ONE`] fits all.
    #[inline]
    pub const fn raw(self, format: Format) -> u64 {
        if self.is_one() {
            1 << format.fraction
        } else {
            self.raw
        }
    }

    /// Guest ticks in `host_ticks`, rounded down as hardware does; wraps at 2^64.
    #[inline]
    pub const fn guest_ticks(self, host_ticks: u64) -> u64 {
        if self.is_one() {
            return host_ticks;
        }
        ((host_ticks as u128 * self.raw as u128) >> self.fraction) as u64
    }

    /// The fewest host ticks in which `guest_ticks` pass; saturates.
    #[inline]
    pub const fn host_ticks(self, guest_ticks: u64) -> u64 {
        if self.is_one() {
            return guest_ticks;
        }
        divide_up((guest_ticks as u128) << self.fraction, self.raw)
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
pub struct GuestTsc {
    pub ratio: Ratio,
    /// Added after scaling; wraps.
    pub offset: u64,
}

impl GuestTsc {
    /// A TSC that shows `value` when the host's shows `host_tsc`.
    pub const fn showing(value: u64, host_tsc: u64, ratio: Ratio) -> Self {
        Self { ratio, offset: value.wrapping_sub(ratio.guest_ticks(host_tsc)) }
    }

    /// What it shows when the host's shows `host_tsc`.
    #[inline]
    pub const fn at(self, host_tsc: u64) -> u64 {
        self.ratio.guest_ticks(host_tsc).wrapping_add(self.offset)
    }

    /// The same after the host's TSC has gone back by `ticks`: what it shows does not.
    pub const fn after_setback(self, ticks: u64) -> Self {
        Self { offset: self.offset.wrapping_add(self.ratio.guest_ticks(ticks)), ..self }
    }

    /// The host's TSC, `now` at this moment, when the guest's is `at`: not before, and at most one tick later. Saturates.
    #[inline]
    pub const fn host_tsc_at(self, at: u64, now: u64) -> u64 {
        let guest_now = self.at(now);
        if at >= guest_now {
            now.saturating_add(self.ratio.host_ticks(at - guest_now))
        } else {
            now.saturating_sub(self.ratio.host_ticks(guest_now - at))
        }
    }
}

/// How a guest's TSC gets a frequency that userspace asks for. KVM API "KVM_SET_TSC_KHZ".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// The host's as it is.
    Host,
    /// The CPU scales it.
    Scaled(Ratio),
    /// The CPU does not scale. The TSC is too slow, and is set forward now and then; what it should be is the ratio.
    CatchUp(Ratio),
}

/// Chooses; `None` for what cannot be: too fast for the CPU's scaling (`format`), or slower than the host's TSC without it.
pub const fn rate_for(guest_khz: u32, host_khz: u32, format: Option<Format>) -> Option<Rate> {
    match format {
        Some(format) if guest_khz >= format.end_khz(host_khz) => None,
        _ if guest_khz == 0 || host_khz == 0 => None,
        _ if same_frequency(guest_khz, host_khz) => Some(Rate::Host),
        Some(format) => match Ratio::from_khz(format, guest_khz, host_khz) {
            Some(ratio) => Some(Rate::Scaled(ratio)),
            None => None,
        },
        None if guest_khz < host_khz => None,
        None => match Ratio::from_khz(Format::VMX, guest_khz, host_khz) {
            Some(ratio) => Some(Rate::CatchUp(ratio)),
            None => None,
        },
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

    fn ratio(guest: u32, host: u32) -> Ratio {
        Ratio::from_khz(Format::VMX, guest, host).unwrap()
    }

    fn svm(guest: u32, host: u32) -> Option<Ratio> {
        Ratio::from_khz(Format::SVM, guest, host)
    }

    #[test]
    fn a_setback_of_the_host_is_none_of_the_guest() {
        for ratio in [Ratio::ONE, ratio(1_000_000, 2_500_000), ratio(3_000_000, 2_500_000)] {
            let before = GuestTsc::showing(77, 1_000_000_000, ratio);
            let shown = before.at(9_000_000_000);
            // To nothing, as after a reset, and by a little.
            for lost in [9_000_000_000, 10, 0] {
                let after = before.after_setback(lost);
                let now = after.at(9_000_000_000 - lost);
                assert!(now.abs_diff(shown) <= 1, "{now} {shown}");
            }
        }
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
        assert_eq!(ratio(2_000_000, 2_000_000), Ratio::ONE);
        assert_eq!(ratio(3_000_000, 2_000_000).raw(Format::VMX), 3 << 47);
        assert_eq!((Ratio::ONE.raw(Format::VMX), Ratio::ONE.raw(Format::SVM)), (1 << 48, 1 << 32));
        assert_eq!(ratio(1_000_000, 3_000_000).raw(Format::VMX), 0x5555_5555_5555);
        assert_eq!(svm(1_000_000, 3_000_000).unwrap().raw(Format::SVM), 0x5555_5555);
        assert_eq!(svm(2, 1).unwrap().raw(Format::SVM), 2 << 32);
        for (guest, host) in [(1, 3), (2_445_406, 3_700_001), (u32::MAX, 65_537), (999_999, u32::MAX), (7, 1)] {
            let exact = (u128::from(guest) << 48) / u128::from(host);
            assert_eq!(u128::from(ratio(guest, host).raw(Format::VMX)), exact, "{guest}/{host}");
        }
    }

    #[test]
    fn ratios_that_hardware_does_not_have() {
        assert_eq!(Ratio::from_khz(Format::VMX, 0, 1), None);
        assert_eq!(Ratio::from_khz(Format::VMX, 1, 0), None);
        assert!(Ratio::from_khz(Format::VMX, 65_535, 1).is_some());
        assert_eq!(Ratio::from_khz(Format::VMX, 65_536, 1), None);
        assert!(svm(255, 1).is_some());
        assert_eq!(svm(256, 1), None);
        assert!(svm(1, u32::MAX).is_some());
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
            assert_eq!(tsc.host_tsc_at(1_000, now), now);
            for ahead in [1, 17, 1 << 20, 1 << 45] {
                let when = tsc.host_tsc_at(1_000 + ahead, now);
                assert!(tsc.at(when) >= 1_000 + ahead, "{guest}/{host} {ahead}");
                assert!(tsc.at(when - 2) < 1_000 + ahead, "{guest}/{host} {ahead}");
            }
            let past = tsc.host_tsc_at(500, now);
            assert!(past < now && tsc.at(past) <= 500 && tsc.at(past + 3) > 500, "{guest}/{host}");
            assert_eq!(GuestTsc::showing(u64::MAX / 2, 5, ratio(guest, host)).host_tsc_at(0, 5), 0);
            assert!(tsc.host_tsc_at(u64::MAX, now) > u64::MAX / 4);
        }
        let tsc = GuestTsc::showing(0, 0, ratio(1, 3));
        assert_eq!(tsc.host_tsc_at(u64::MAX, 5), u64::MAX);
    }

    #[test]
    fn rates() {
        let host = 2_000_000;
        for format in [None, Some(Format::VMX), Some(Format::SVM)] {
            for near in [host, host - 500, host + 500] {
                assert_eq!(rate_for(near, host, format), Some(Rate::Host));
            }
            assert_eq!((rate_for(0, host, format), rate_for(host, 0, format)), (None, None));
        }
        assert_eq!(rate_for(host + 501, host, None), Some(Rate::CatchUp(ratio(host + 501, host))));
        assert_eq!(rate_for(host - 501, host, None), None);
        for khz in [1, host - 501, host + 501, 4 * host] {
            assert_eq!(rate_for(khz, host, Some(Format::VMX)), Some(Rate::Scaled(ratio(khz, host))));
            assert_eq!(rate_for(khz, host, Some(Format::SVM)), Some(Rate::Scaled(svm(khz, host).unwrap())));
        }
        // What signed 32 bits hold is the most; a slow CPU with few bits before the point ends earlier.
        assert_eq!(Format::VMX.end_khz(host), i32::MAX as u32);
        assert_eq!(Format::SVM.end_khz(1_000), 255_999);
        assert!(rate_for(255_998, 1_000, Some(Format::SVM)).is_some());
        assert_eq!(rate_for(255_999, 1_000, Some(Format::SVM)), None);
        assert_eq!(rate_for(i32::MAX as u32, host, Some(Format::VMX)), None);
        assert_eq!(rate_for(u32::MAX, host, Some(Format::VMX)), None);
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
