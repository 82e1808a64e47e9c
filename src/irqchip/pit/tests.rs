// SPDX-License-Identifier: GPL-2.0
#![forbid(unsafe_code)]

use super::*;
use crate::irqchip::testing::Random;

const SECOND: u64 = 1_000_000_000;

/// Programs a channel with both bytes; the control word is `channel << 6 | 30h | mode << 1`.
fn program(pit: &mut Pit, channel: u8, mode: u8, count: u16, now_ns: u64) {
    pit.write(0x43, (channel << 6) | 0x30 | (mode << 1), now_ns);
    let [low, high] = count.to_le_bytes();
    pit.write(0x40 + channel as u16, low, now_ns);
    assert_eq!(pit.write(0x40 + channel as u16, high, now_ns), channel == 0);
}

fn count(pit: &mut Pit, channel: u8, now_ns: u64) -> u16 {
    pit.write(0x43, channel << 6, now_ns);
    let port = 0x40 + channel as u16;
    u16::from_le_bytes([pit.read(port, now_ns), pit.read(port, now_ns)])
}

fn out2(pit: &Pit, now_ns: u64) -> bool {
    pit.read_speaker(now_ns) & 0x20 != 0
}

/// Start of tick number `ticks`.
fn at(ticks: u64) -> u64 {
    ticks_to_ns(ticks)
}

#[test]
fn scaling_is_exact() {
    let mut random = Random(1);
    for _ in 0..100_000 {
        let ns = random.wide() >> 2;
        let exact = (ns as u128 * FREQUENCY_HZ as u128 / NS as u128) as u64;
        assert_eq!(ns_to_ticks(ns), exact);
        let ticks = random.wide() >> 20;
        let start = ticks_to_ns(ticks);
        assert_eq!(ns_to_ticks(start), ticks);
        assert!(start == 0 || ns_to_ticks(start - 1) == ticks - 1);
    }
    assert_eq!((ns_to_ticks(SECOND), ticks_to_ns(FREQUENCY_HZ)), (FREQUENCY_HZ, SECOND));
    let _ = (ns_to_ticks(u64::MAX), ticks_to_ns(u64::MAX));
}

#[test]
fn a_periodic_timer_does_not_drift() {
    let mut pit = Pit::new();
    pit.set_reinject(false);
    // Linux at 250 Hz.
    program(&mut pit, 0, 2, 4773, 123);
    for tick in 1..=100_000u64 {
        let due = pit.deadline_ns().unwrap();
        assert_eq!(due, 123 + at(tick * 4773));
        assert!(!pit.expire(due - 1));
        assert!(pit.expire(due + tick % 1000));
    }
}

#[test]
fn missed_ticks_come_after_each_acknowledgement() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 3, 11932, 0);
    assert!(pit.expire(at(11932)));
    // Not acknowledged yet: the next three wait.
    assert!(!pit.expire(at(4 * 11932)));
    assert_eq!(pit.deadline_ns(), Some(at(5 * 11932)));
    assert!(pit.irq_acknowledged());
    assert!(pit.irq_acknowledged());
    assert!(pit.irq_acknowledged());
    assert!(!pit.irq_acknowledged());
    assert!(pit.expire(at(5 * 11932)));
    // Unmasked, or programmed anew: what waited is forgotten.
    assert!(!pit.expire(at(7 * 11932)));
    pit.irq_unmasked();
    assert!(!pit.irq_acknowledged());
    assert!(pit.expire(at(8 * 11932)));
    assert!(!pit.expire(at(9 * 11932)));
    program(&mut pit, 0, 3, 11932, 0);
    assert!(pit.expire(at(11932)));
}

#[test]
fn without_reinjection_ticks_are_dropped() {
    let mut pit = Pit::new();
    assert!(pit.reinjects());
    pit.set_reinject(false);
    program(&mut pit, 0, 2, 11932, 0);
    assert!(pit.expire(at(5 * 11932)));
    assert!(!pit.expire(at(6 * 11932) - 1));
    assert!(pit.expire(at(6 * 11932)));
    assert!(!pit.irq_acknowledged());
    pit.set_reinject(true);
    assert!(pit.expire(at(7 * 11932)));
    assert!(!pit.expire(at(8 * 11932)));
}

#[test]
fn one_shot() {
    for mode in [0, 4] {
        let mut pit = Pit::new();
        program(&mut pit, 0, mode, 1000, 50);
        assert_eq!(pit.deadline_ns(), Some(50 + at(1000)));
        assert!(!pit.expire(50 + at(1000) - 1));
        assert!(pit.expire(50 + at(1000)));
        assert_eq!(pit.deadline_ns(), None);
        assert!(!pit.expire(SECOND));
        // A control word cancels.
        program(&mut pit, 0, mode, 1000, 0);
        assert!(pit.write(0x43, 0x30, 0));
        assert_eq!(pit.deadline_ns(), None);
    }
    // Channel 0's gate has no edge.
    for mode in [1, 5] {
        let mut pit = Pit::new();
        program(&mut pit, 0, mode, 1000, 0);
        assert_eq!(pit.deadline_ns(), None);
        assert!(!pit.expire(SECOND));
    }
}

#[test]
fn short_periods_are_lengthened() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 2, 0);
    let due = pit.deadline_ns().unwrap();
    assert!((MIN_TIMER_PERIOD_NS..MIN_TIMER_PERIOD_NS + 1000).contains(&due));
    // A single shot may be short.
    program(&mut pit, 0, 0, 2, 0);
    assert_eq!(pit.deadline_ns(), Some(at(2)));
}

#[test]
fn counts() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 0, 1000, 0);
    assert_eq!(count(&mut pit, 0, 0), 1000);
    assert_eq!(count(&mut pit, 0, at(999)), 1);
    assert_eq!(count(&mut pit, 0, at(1001)), 0xFFFF);
    program(&mut pit, 0, 2, 1000, 0);
    assert_eq!(count(&mut pit, 0, at(999)), 1);
    assert_eq!(count(&mut pit, 0, at(1000)), 1000);
    program(&mut pit, 0, 3, 1000, 0);
    assert_eq!(count(&mut pit, 0, at(499)), 2);
    assert_eq!(count(&mut pit, 0, at(500)), 1000);
    // 0 stands for 65536.
    program(&mut pit, 1, 2, 0, 0);
    assert_eq!(count(&mut pit, 1, at(1)), 0xFFFF);
    assert_eq!(count(&mut pit, 1, at(0x1_0000)), 0);
    assert_eq!(pit.save().channels[1].count, 0x1_0000);
}

#[test]
fn byte_access() {
    let mut pit = Pit::new();
    // Low byte only, high byte only.
    pit.write(0x43, 0x50, 0);
    pit.write(0x41, 0x34, 0);
    assert_eq!((pit.save().channels[1].count, pit.read(0x41, 0), pit.read(0x41, 0)), (0x34, 0x34, 0x34));
    pit.write(0x43, 0x60, 0);
    pit.write(0x41, 0x12, 0);
    assert_eq!((pit.save().channels[1].count, pit.read(0x41, 0)), (0x1200, 0x12));
    // Word reads alternate, without a latch too; a latched count stays until read.
    program(&mut pit, 1, 0, 0x1234, 0);
    assert_eq!((pit.read(0x41, 0), pit.read(0x41, 0), pit.read(0x41, 0)), (0x34, 0x12, 0x34));
    assert_eq!(pit.read(0x41, 0), 0x12);
    pit.write(0x43, 0x40, 0);
    pit.write(0x43, 0x40, at(16));
    assert_eq!((pit.read(0x41, at(32)), pit.read(0x41, at(32))), (0x34, 0x12));
    assert_eq!(pit.read(0x41, at(0x34)), 0);
    assert_eq!(pit.read(0x43, 0), 0);
    // One byte written of two: nothing is loaded.
    pit.write(0x43, 0x34, 0);
    assert!(!pit.write(0x40, 1, 0));
    assert_eq!(pit.deadline_ns(), None);
}

#[test]
fn read_back() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 0x2000, 0);
    program(&mut pit, 2, 0, 0x3000, 0);
    // Status and count of 0 and 2.
    assert!(!pit.write(0x43, 0xC0 | (1 << 1) | (1 << 3), 0));
    assert_eq!(pit.read(0x40, 0), 0x80 | 0x30 | (2 << 1));
    assert_eq!((pit.read(0x40, at(5)), pit.read(0x40, at(5))), (0, 0x20));
    assert_eq!(pit.read(0x42, 0), 0x30);
    // Only status; the count has not come yet after a control word.
    pit.write(0x43, 0xB0, 0);
    pit.write(0x43, 0xE0 | (1 << 3), 0);
    assert_eq!(pit.read(0x42, 0), 0x40 | 0x30);
    // Bits 5 and 4 set: nothing is latched.
    let before = pit.clone();
    pit.write(0x43, 0xF0 | 0xE, 0);
    assert_eq!(pit, before);
}

#[test]
fn the_gate_and_the_speaker() {
    let mut pit = Pit::new();
    assert_eq!(pit.read_speaker(0) & 3, 0);
    pit.write_speaker(0xFF, 0);
    assert_eq!((pit.read_speaker(0) & 3, pit.save().flags), (3, FLAG_SPEAKER_DATA_ON));
    pit.write_speaker(1, 0);
    assert_eq!(pit.read_speaker(0) & 3, 1);
    // Linux calibrates its TSC so: mode 0, out rises at the end.
    program(&mut pit, 2, 0, 1000, 0);
    assert!(!out2(&pit, at(999)) && out2(&pit, at(1000)));
    // The refresh clock toggles.
    assert_ne!(pit.read_speaker(0) & 0x10, pit.read_speaker(1 << 14) & 0x10);
    // Mode 0: a low gate holds the count.
    program(&mut pit, 2, 0, 1000, 0);
    pit.write_speaker(0, at(400));
    assert_eq!(count(&mut pit, 2, at(5000)), 600);
    pit.write_speaker(1, at(6000));
    assert!(!out2(&pit, at(6599)) && out2(&pit, at(6601)));
    // Mode 1 starts with the edge, and again with the next.
    program(&mut pit, 2, 1, 1000, 0);
    assert!(out2(&pit, at(5000)));
    pit.write_speaker(0, 0);
    pit.write_speaker(1, at(100));
    assert!(!out2(&pit, at(1099)));
    pit.write_speaker(0, at(500));
    pit.write_speaker(1, at(600));
    assert!(!out2(&pit, at(1599)) && out2(&pit, at(1601)));
    // Mode 2: low for one tick each period; a low gate forces out high.
    program(&mut pit, 2, 2, 100, 0);
    assert!(out2(&pit, at(98)) && !out2(&pit, at(99)) && out2(&pit, at(100)) && !out2(&pit, at(199)));
    pit.write_speaker(0, at(199));
    assert!(out2(&pit, at(199)));
    // Mode 3: half and half, the odd tick high.
    pit.write_speaker(1, 0);
    program(&mut pit, 2, 3, 101, 0);
    assert!(out2(&pit, at(50)) && !out2(&pit, at(51)) && !out2(&pit, at(100)) && out2(&pit, at(101)));
    // Mode 4: low for one tick, once.
    program(&mut pit, 2, 4, 100, 0);
    assert!(out2(&pit, at(99)) && !out2(&pit, at(100)) && out2(&pit, at(101)) && out2(&pit, at(200)));
}

#[test]
fn save_and_restore() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 4773, 0);
    program(&mut pit, 2, 3, 100, 0);
    pit.write_speaker(3, 0);
    let state = pit.save();
    assert_eq!((state.channels[0].mode, state.channels[0].count, state.flags), (2, 4773, 2));
    let mut copy = Pit::new();
    copy.restore(&state, SECOND);
    assert_eq!(copy.deadline_ns(), Some(SECOND + at(4773)));
    let again = copy.save();
    for (a, b) in state.channels.iter().zip(&again.channels) {
        assert_eq!(PitChannelState { count_load_time: 0, ..*a }, PitChannelState { count_load_time: 0, ..*b });
    }
    // An HPET took over: it counts, but does not interrupt.
    copy.restore(&PitState { flags: FLAG_HPET_LEGACY | 0xF0, ..state }, 0);
    assert_eq!((copy.deadline_ns(), copy.save().flags), (None, FLAG_HPET_LEGACY));
    program(&mut copy, 0, 2, 4773, 0);
    assert_eq!(copy.deadline_ns(), None);
    // As created: never programmed.
    copy.restore(&Pit::new().save(), 0);
    assert_eq!(copy.deadline_ns(), None);
}

#[test]
fn random_actions() {
    let mut random = Random(99);
    for _ in 0..200 {
        let mut pit = Pit::new();
        let mut now = random.wide() >> 2;
        for _ in 0..2_000 {
            now = now.saturating_add(random.wide() >> 34);
            let before = pit.deadline_ns();
            let mut announced = false;
            match random.below(8) {
                0..=3 => announced = pit.write(random.below(0x44) as u16, random.next() as u8, now),
                4 => {
                    pit.read(random.next() as u16, now);
                }
                5 => {
                    let waited = pit.pending;
                    if pit.expire(now) {
                        assert!(!pit.acknowledged || !pit.reinject);
                    }
                    assert!(pit.pending >= waited);
                    assert!(pit.deadline_ns().is_none_or(|due| due > now));
                    announced = true;
                }
                6 => {
                    pit.write_speaker(random.next() as u8, now);
                    let _ = pit.read_speaker(now);
                    if pit.irq_acknowledged() {
                        assert!(pit.pending > 0 && !pit.acknowledged);
                    }
                }
                _ if random.below(20) == 0 => {
                    let mut state = PitState { flags: random.next() as u32, ..PitState::new_zeroed() };
                    for channel in &mut state.channels {
                        *channel = PitChannelState {
                            count: random.wide() as u32,
                            latched_count: random.next() as u16,
                            count_latched: random.next() as u8,
                            status_latched: random.next() as u8,
                            status: random.next() as u8,
                            read_state: random.next() as u8,
                            write_state: random.next() as u8,
                            write_latch: random.next() as u8,
                            rw_mode: random.next() as u8,
                            mode: random.next() as u8,
                            bcd: random.next() as u8,
                            gate: random.next() as u8,
                            count_load_time: random.next() as i64,
                        };
                    }
                    pit.restore(&state, now);
                    pit.set_reinject(random.flip());
                    announced = true;
                }
                _ => pit.irq_unmasked(),
            }
            assert!(announced || before == pit.deadline_ns());
            // Never more often than allowed.
            if let (Some(due), Phase::Running(since)) = (pit.deadline_ns(), pit.channels[0].phase) {
                assert!(pit.period_ticks().is_none_or(|ticks| ticks_to_ns(ticks) >= MIN_TIMER_PERIOD_NS));
                assert!(due > since);
            }
            assert!(pit.channels.iter().all(|channel| (1..=0x1_0000).contains(&channel.state.count)));
        }
    }
}
