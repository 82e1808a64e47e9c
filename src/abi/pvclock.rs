// SPDX-License-Identifier: GPL-2.0
//! Paravirtual time: the structures a guest shares with its hypervisor, and the arithmetic behind them.
//! Linux "Documentation/virt/kvm/x86/msr.rst" describes them.
//!
//! A guest computes `system_time + ((tsc - tsc_timestamp) << tsc_shift) * tsc_to_system_mul / 2^32` nanoseconds.
//! `version` is odd while the structure is being written.
#![forbid(unsafe_code)]

layout! {
    /// `struct pvclock_vcpu_time_info`, at the address in MSR_KVM_SYSTEM_TIME.
    struct PvclockVcpuTimeInfo: 32 {
        0 version: u32,
        4 pad0: u32,
        8 tsc_timestamp: u64,
        /// Nanoseconds at `tsc_timestamp`.
        16 system_time: u64,
        24 tsc_to_system_mul: u32,
        28 tsc_shift: i8,
        29 flags: u8,
        30 pad: [u8; 2],
    }

    /// `struct pvclock_wall_clock`, at the address in MSR_KVM_WALL_CLOCK: real time when the system time was 0.
    struct PvclockWallClock: 12 {
        0 version: u32,
        4 sec: u32,
        8 nsec: u32,
    }

    /// `struct kvm_clock_pairing`, which KVM_HC_CLOCK_PAIRING writes: real time, and the guest's TSC at that time.
    struct KvmClockPairing: 64 {
        0 sec: u64,
        8 nsec: u64,
        16 tsc: u64,
        24 flags: u32,
        28 pad: [u32; 9],
    }

    /// `struct kvm_steal_time`, at the address in MSR_KVM_STEAL_TIME.
    struct KvmStealTime: 64 {
        /// Nanoseconds that the vCPU could run and did not.
        0 steal: u64,
        8 version: u32,
        12 flags: u32,
        /// `KVM_VCPU_PREEMPTED`.
        16 preempted: u8,
        17 u8_pad: [u8; 3],
        20 pad: [u32; 11],
    }
}

/// `flags`: the clock is the same on every vCPU.
pub const PVCLOCK_TSC_STABLE_BIT: u8 = 1 << 0;
/// `flags`: the guest was stopped by its host.
pub const PVCLOCK_GUEST_STOPPED: u8 = 1 << 1;
pub const KVM_VCPU_PREEMPTED: u8 = 1 << 0;
/// Bits of MSR_KVM_STEAL_TIME that must be 0; bit 0 enables, the rest is the address.
pub const KVM_STEAL_TIME_RESERVED: u64 = 0x3E;

impl PvclockVcpuTimeInfo {
    /// The structure for a guest whose TSC is `tsc` when its system time is `system_time_ns`. `version` is even.
    pub const fn new(version: u32, tsc: u64, system_time_ns: u64, scale: TscScale, flags: u8) -> Self {
        Self {
            version,
            pad0: 0,
            tsc_timestamp: tsc,
            system_time: system_time_ns,
            tsc_to_system_mul: scale.mul,
            tsc_shift: scale.shift,
            flags,
            pad: [0; 2],
        }
    }
}

impl PvclockWallClock {
    /// The structure for a guest whose system time is `system_time_ns` when the real time is `real_time_ns` since 1970.
    pub const fn new(version: u32, real_time_ns: u64, system_time_ns: u64) -> Self {
        let boot = real_time_ns.saturating_sub(system_time_ns);
        Self { version, sec: (boot / 1_000_000_000) as u32, nsec: (boot % 1_000_000_000) as u32 }
    }
}

/// Factor from TSC ticks to nanoseconds: first shift (left when positive), then multiply by `mul` / 2^32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscScale {
    pub mul: u32,
    pub shift: i8,
}

impl TscScale {
    /// The scale for a TSC of `tsc_khz`; `None` for 0. `mul` gets all the 32 bits of precision it can hold.
    pub const fn from_khz(tsc_khz: u32) -> Option<Self> {
        if tsc_khz == 0 {
            return None;
        }
        // One tick is 10^6 / khz nanoseconds. Scale either side by powers of two until the quotient is in [1/2, 1).
        let mut nanoseconds = 1_000_000u64;
        let mut ticks = tsc_khz as u64;
        let mut shift = 0i8;
        while ticks <= nanoseconds {
            ticks <<= 1;
            shift = shift.wrapping_add(1);
        }
        while nanoseconds << 1 < ticks {
            nanoseconds <<= 1;
            shift = shift.wrapping_sub(1);
        }
        // nanoseconds < ticks < 2^32: neither the shift nor the quotient overflows.
        Some(Self { mul: ((nanoseconds << 32) / ticks) as u32, shift })
    }

    /// Nanoseconds in `ticks`, as a guest computes them; wraps at 2^64.
    pub const fn nanoseconds(self, ticks: u64) -> u64 {
        let shifted = if self.shift >= 0 {
            ticks.wrapping_shl(self.shift as u32)
        } else {
            ticks.wrapping_shr(self.shift.unsigned_abs() as u32)
        };
        ((shifted as u128 * self.mul as u128) >> 32) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_is_exact_to_a_part_in_a_billion() {
        for khz in [1, 999, 32_768, 999_999, 1_000_000, 1_000_001, 2_000_000, 2_445_406, 3_700_000, 5_800_123, u32::MAX]
        {
            let scale = TscScale::from_khz(khz).unwrap();
            assert!(scale.mul >= 1 << 31, "{khz}: {scale:?} wastes precision");
            let hour_of_ticks = u64::from(khz) * 1000 * 3600;
            let hour_ns = 3600 * 1_000_000_000i64;
            let error = (scale.nanoseconds(hour_of_ticks) as i64 - hour_ns).abs();
            assert!(error <= hour_ns / 1_000_000_000 + 1, "{khz}: {error} ns off in an hour");
        }
        assert_eq!(TscScale::from_khz(0), None);
    }

    #[test]
    fn a_guest_reads_the_time() {
        let scale = TscScale::from_khz(2_445_406).unwrap();
        let info = PvclockVcpuTimeInfo::new(2, 1_000_000, 5_000_000_000, scale, PVCLOCK_TSC_STABLE_BIT);
        // One second later.
        let ticks = 2_445_406_000;
        let now = info.system_time + scale.nanoseconds(ticks);
        assert!(now.abs_diff(6_000_000_000) <= 2, "{now}");
        let wall = PvclockWallClock::new(4, 1_700_000_000_123_456_789, 5_000_000_000);
        assert_eq!((wall.sec, wall.nsec), (1_699_999_995, 123_456_789));
        assert_eq!(PvclockWallClock::new(0, 1, 2).nsec, 0, "a host clock before 1970 plus the guest's uptime");
    }

    #[test]
    fn well_known_scales() {
        assert_eq!(TscScale::from_khz(1_000_000), Some(TscScale { mul: 1 << 31, shift: 1 }));
        assert_eq!(TscScale::from_khz(2_000_000), Some(TscScale { mul: 1 << 31, shift: 0 }));
        assert_eq!(TscScale::from_khz(4_000_000), Some(TscScale { mul: 1 << 31, shift: -1 }));
    }
}
