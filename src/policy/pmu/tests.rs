// SPDX-License-Identifier: GPL-2.0
#![forbid(unsafe_code)]

use super::filter::{check, BadFilter, Filter, MAX_EVENTS};
use super::*;
use crate::abi::vm::{KvmPmuEventFilter, KVM_PMU_EVENT_ALLOW, KVM_PMU_EVENT_DENY, KVM_PMU_EVENT_FLAG_MASKED_EVENTS};
use crate::abi::FromZeros;
use std::vec::Vec;

/// Version 4, eight general counters of 48 bits and four fixed ones, as some CPUs have it.
const HOST: [u32; 4] = [0x0830_0804, 0x7F, 0, 0x604];
const OS: u64 = 1 << 17;
const USR: u64 = 1 << 16;
const EN: u64 = 1 << 22;
const INT: u64 = 1 << 20;
const TOP: u64 = (1 << 48) - 1;

fn caps() -> PmuCaps {
    PmuCaps { general: 4, ..PmuCaps::host(HOST) }
}

fn pmu() -> Pmu {
    Pmu::new(caps())
}

#[test]
fn host_caps_are_bounded() {
    let caps = PmuCaps::host(HOST);
    assert_eq!((caps.version, caps.general, caps.fixed, caps.general_bits, caps.fixed_bits), (2, 8, 3, 48, 48));
    assert_eq!(caps.leaf(), [0x0830_0802, 0x7F, 0, 0x8603]);
    // No version, or no counters: none.
    assert_eq!(PmuCaps::host([0x0830_0800, 0, 0, 0]), PmuCaps::default());
    assert_eq!(PmuCaps::host([0x0830_0002, 0, 0, 0x603]), PmuCaps::default());
    assert_eq!(PmuCaps::default().leaf(), [0; 4]);
}

#[test]
fn a_guest_has_no_more_than_the_host() {
    let host = caps();
    let greedy = host.within([0xFFFF_FF05, 0, 0, 0x1FFF]);
    assert_eq!((greedy.version, greedy.general, greedy.fixed), (5, 4, 3));
    assert_eq!((greedy.general_bits, greedy.fixed_bits), (48, 48));
    // Version 1 has no fixed counters and no global control.
    let old = host.within([0x0720_0201, 0, 0, 0x603]);
    assert_eq!((old.general, old.general_bits, old.fixed), (2, 32, 0));
    assert!(!Pmu::new(old).owns(msr::PERF_GLOBAL_CTRL) && !Pmu::new(old).owns(msr::FIXED_CTR0));
    assert_eq!(host.within([0x0830_0400, 0, 0, 0]), PmuCaps::default());
    assert_eq!(PmuCaps::default().within(HOST), PmuCaps::default());
}

#[test]
fn the_list_is_that_of_the_counters() {
    let list: Vec<u32> = index_list(&PmuCaps { general: 2, ..caps() }).collect();
    assert_eq!(list, [0x309, 0x30A, 0x30B, 0x38D, 0x38E, 0x38F, 0xC1, 0xC2, 0x186, 0x187]);
    assert_eq!(index_list(&PmuCaps::default()).count(), 0);
    assert!(index_list(&caps()).all(|index| pmu().owns(index)));
}

#[test]
fn registers_refuse_reserved_bits() {
    let mut pmu = pmu();
    assert_eq!(pmu.read(msr::PERF_GLOBAL_CTRL), Ok(0xF), "general counters are on after reset");
    for (index, good, bad) in [
        (msr::P6_EVNTSEL0, 0xFFDF_FFFF, 1 << 21),
        (msr::P6_EVNTSEL0 + 3, EN, 1 << 32),
        (msr::FIXED_CTR_CTRL, 0xBBB, 0x004),
        (msr::FIXED_CTR_CTRL, 0, 0x1000),
        (msr::PERF_GLOBAL_CTRL, 0x7_0000_000F, 0x10),
        (msr::PERF_GLOBAL_CTRL, 0, 1 << 35),
        (msr::PERF_GLOBAL_OVF_CTRL, 0xC000_0007_0000_000F, 1 << 61),
    ] {
        assert!(pmu.write(index, good, false).is_ok(), "{index:#x}");
        let before = pmu.read(index);
        assert_eq!(pmu.write(index, bad, false), Err(Refused), "{index:#x}");
        assert_eq!(pmu.read(index), before);
    }
    for index in [msr::P6_PERFCTR0 + 4, msr::P6_EVNTSEL0 + 4, msr::FIXED_CTR0 + 3, 0x4C1] {
        assert!(!pmu.owns(index), "{index:#x}");
        assert_eq!((pmu.read(index), pmu.write(index, 0, true)), (Err(Refused), Err(Refused)));
    }
}

#[test]
fn status_is_the_hosts_to_write() {
    let mut pmu = pmu();
    assert_eq!(pmu.write(msr::PERF_GLOBAL_STATUS, 1, false), Err(Refused));
    assert_eq!(pmu.write(msr::PERF_GLOBAL_STATUS, 0x10, true), Err(Refused));
    assert_eq!(pmu.write(msr::PERF_GLOBAL_STATUS, 3, true), Ok(0));
    // The host restores registers in any order: what it writes there clears nothing.
    assert_eq!(pmu.write(msr::PERF_GLOBAL_OVF_CTRL, 1, true), Ok(0));
    assert_eq!(pmu.read(msr::PERF_GLOBAL_STATUS), Ok(3));
    assert_eq!(pmu.write(msr::PERF_GLOBAL_OVF_CTRL, 1, false), Ok(0));
    assert_eq!(pmu.read(msr::PERF_GLOBAL_STATUS), Ok(2));
    assert_eq!(pmu.read(msr::PERF_GLOBAL_OVF_CTRL), Ok(0));
}

#[test]
fn counters_are_as_wide_as_they_say() {
    let mut pmu = pmu();
    assert_eq!(pmu.write(msr::P6_PERFCTR0, 0x8000_0000, false), Ok(1));
    assert_eq!(pmu.value(0, 0), 0xFFFF_8000_0000, "32 bits, sign-extended");
    assert_eq!(pmu.write(msr::P6_PERFCTR0, 0x1234_5678_9ABC, true), Ok(1));
    assert_eq!(pmu.value(0, 4), 0x1234_5678_9AC0);
    assert_eq!(pmu.write(msr::FIXED_CTR0, u64::MAX, false), Ok(1 << GENERAL));
    assert_eq!((pmu.value(GENERAL, 0), pmu.value(GENERAL, 1)), (TOP, 0));
    assert_eq!((pmu.until_overflow(GENERAL), pmu.until_overflow(1)), (1, TOP + 1));
    assert_eq!(pmu.read(msr::FIXED_CTR0), Err(Refused), "counters have their own way");
}

#[test]
fn rdpmc_names_counters() {
    let pmu = pmu();
    assert_eq!((pmu.rdpmc(3), pmu.rdpmc(0x4000_0002)), (Ok(3), Ok(GENERAL + 2)));
    for ecx in [4, 8, 0x4000_0003, 0x8000_0000, 0x1_0000, 0x2000_0000, u32::MAX] {
        assert_eq!(pmu.rdpmc(ecx), Err(Refused), "{ecx:#x}");
    }
}

#[test]
fn programs_follow_all_enables() {
    let mut pmu = pmu();
    assert_eq!(pmu.program(0), None);
    assert_eq!(pmu.write(msr::P6_EVNTSEL0, 0x0184_00C0 | OS | INT, false), Ok(1));
    assert_eq!(pmu.program(0), None, "not enabled");
    assert_eq!(pmu.write(msr::P6_EVNTSEL0, 0x0184_00C0 | OS | INT | EN, false), Ok(1));
    assert_eq!(pmu.write(msr::P6_EVNTSEL0, 0x0184_00C0 | OS | INT | EN, false), Ok(0), "nothing new");
    assert_eq!(pmu.program(0), Some(Program { event: 0x0184_00C0, user: false, kernel: true }));
    assert!(pmu.interrupts(0) && pmu.counts_instructions(0));
    assert_eq!(pmu.write(msr::PERF_GLOBAL_CTRL, 0x7_0000_000E, false), Ok(1 | 7 << GENERAL));
    assert_eq!(pmu.program(0), None, "globally off");
    assert_eq!(pmu.write(msr::FIXED_CTR_CTRL, 0xB20, false), Ok(6 << GENERAL));
    assert_eq!(pmu.program(GENERAL), None);
    assert_eq!(pmu.program(GENERAL + 1), Some(Program { event: 0x3C, user: true, kernel: false }));
    assert_eq!(pmu.program(GENERAL + 2), Some(Program { event: 0x300, user: true, kernel: true }));
    assert!(!pmu.interrupts(GENERAL + 1) && pmu.interrupts(GENERAL + 2));
    assert_eq!((pmu.program(COUNTERS), pmu.value(COUNTERS, 1), pmu.select(usize::MAX)), (None, 0, 0));
    // Version 1: no global control.
    let mut old = Pmu::new(caps().within([0x0730_0401, 0, 0, 0]));
    assert_eq!(old.write(msr::P6_EVNTSEL0, 0xC0 | EN | USR, false), Ok(1));
    assert!(old.program(0).is_some());
}

#[test]
fn software_counts_what_it_carries_out() {
    let mut pmu = pmu();
    assert_eq!(pmu.write(msr::P6_EVNTSEL0, 0xC0 | EN | USR, false), Ok(1));
    assert_eq!(pmu.write(msr::P6_EVNTSEL0 + 1, 0xC0 | EN | OS | INT, false), Ok(2));
    assert_eq!(pmu.retired(3, 0), 2, "the second one raises an interrupt one day");
    assert_eq!((pmu.value(0, 0), pmu.value(1, 0)), (0, 1));
    assert_eq!(pmu.retired(3, 3), 0);
    assert_eq!((pmu.value(0, 10), pmu.value(1, 10)), (11, 11));
    assert!(!pmu.settle(0, 10));
    assert_eq!(pmu.value(0, 0), 11);
    // The last step by software.
    assert!(pmu.write(msr::P6_PERFCTR0, u64::MAX, true).is_ok());
    assert_eq!(pmu.retired(1, 3), 1);
    assert!(pmu.settle(0, 0));
    assert_eq!(pmu.value(0, 0), 0);
    // By hardware: that is not told twice.
    assert!(pmu.write(msr::P6_PERFCTR0, u64::MAX, true).is_ok());
    assert!(!pmu.settle(0, 5));
    assert_eq!(pmu.value(0, 0), 4);
}

#[test]
fn overflows_are_told() {
    let mut pmu = pmu();
    assert!(pmu.write(msr::P6_EVNTSEL0 + 2, 0xC0 | EN | USR | INT, false).is_ok());
    assert!(pmu.overflowed(2) && !pmu.overflowed(GENERAL + 1) && !pmu.overflowed(COUNTERS));
    assert_eq!(pmu.read(msr::PERF_GLOBAL_STATUS), Ok(1 << 2 | 1 << 33));
    assert_eq!(counters(0b1000_0000_0101).collect::<Vec<_>>(), [0, 2]);
}

fn head(action: u32, flags: u32, nevents: u32) -> KvmPmuEventFilter {
    KvmPmuEventFilter { action, flags, nevents, ..KvmPmuEventFilter::new_zeroed() }
}

#[test]
fn filters_are_checked() {
    assert_eq!(check(&head(KVM_PMU_EVENT_ALLOW, 0, MAX_EVENTS)), Ok(()));
    assert_eq!(check(&head(KVM_PMU_EVENT_DENY, KVM_PMU_EVENT_FLAG_MASKED_EVENTS, 0)), Ok(()));
    assert_eq!(check(&head(2, 0, 0)), Err(BadFilter::Invalid));
    assert_eq!(check(&head(0, 2, 0)), Err(BadFilter::Invalid));
    assert_eq!(check(&head(0, 0, MAX_EVENTS + 1)), Err(BadFilter::TooMany));
    let strange = [1u64 << 40];
    assert!(Filter::new(&head(0, 0, 1), &strange[..]).is_ok(), "it only matches nothing");
    assert!(Filter::new(&head(0, KVM_PMU_EVENT_FLAG_MASKED_EVENTS, 1), &strange[..]).is_err());
}

#[test]
fn filters_decide() {
    let list = [0xC0u64, 0x01C2, 1 << 40 | 0x3C];
    let allow = Filter::new(&head(KVM_PMU_EVENT_ALLOW, 0, 3), &list[..]).unwrap();
    let deny = Filter::new(&head(KVM_PMU_EVENT_DENY, 0, 3), &list[..]).unwrap();
    for (select, listed) in
        [(0xC0, true), (0xC0 | EN | OS | 1 << 24, true), (0x01C0, false), (0x01C2, true), (0x3C, false)]
    {
        assert_eq!((allow.allows(0, select), deny.allows(0, select)), (listed, !listed), "{select:#x}");
    }
    // Fixed counters have a word of their own.
    let fixed = KvmPmuEventFilter { fixed_counter_bitmap: 2, ..head(KVM_PMU_EVENT_DENY, 0, 0) };
    let fixed = Filter::new(&fixed, &list[..0]).unwrap();
    assert!(fixed.allows(GENERAL, 0xC0) && !fixed.allows(GENERAL + 1, 0x3C));
    // Event C0h with any odd unit mask, but not 5.
    let masked = [0xC0u64 | 1 << 8 | 1 << 56, 0xC0 | 5 << 8 | 0xFF << 56 | 1 << 55];
    let masked = Filter::new(&head(KVM_PMU_EVENT_ALLOW, KVM_PMU_EVENT_FLAG_MASKED_EVENTS, 2), &masked[..]).unwrap();
    for (select, allowed) in [(0x01C0, true), (0x03C0, true), (0x05C0, false), (0x02C0, false), (0x01C1, false)] {
        assert_eq!(masked.allows(0, select), allowed, "{select:#x}");
    }
}
