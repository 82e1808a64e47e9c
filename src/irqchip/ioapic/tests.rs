// SPDX-License-Identifier: GPL-2.0
#![forbid(unsafe_code)]

use super::*;
use crate::irqchip::testing::Random;
use LineSource::{Pit, Resampler, User};

const LEVEL: u64 = Entry::LEVEL;
const MASKED: u64 = Entry::MASKED;
const REMOTE_IRR: u64 = Entry::REMOTE_IRR;

fn select(ioapic: &mut Ioapic, register: u8) {
    assert_eq!(ioapic.write(SELECT, 4, register as u64), WriteWork::default());
}

fn program(ioapic: &mut Ioapic, pin: u8, entry: u64) -> WriteWork {
    select(ioapic, 0x11 + 2 * pin);
    let upper = ioapic.write(WINDOW, 4, entry >> 32);
    assert_eq!(upper.message, None);
    select(ioapic, 0x10 + 2 * pin);
    ioapic.write(WINDOW, 4, entry & 0xFFFF_FFFF)
}

fn entry(ioapic: &mut Ioapic, pin: u8) -> u64 {
    select(ioapic, 0x11 + 2 * pin);
    let upper = ioapic.read(WINDOW, 4);
    select(ioapic, 0x10 + 2 * pin);
    (upper << 32) | ioapic.read(WINDOW, 4)
}

fn eoi(vector: u8) -> Eoi {
    Eoi { vector, level: true, broadcast: true }
}

#[test]
fn registers() {
    let mut ioapic = Ioapic::new();
    assert_eq!(ioapic.base(), Gpa(0xFEC0_0000));
    select(&mut ioapic, 1);
    assert_eq!(ioapic.read(WINDOW, 4), 0x17_0011);
    assert_eq!(ioapic.write(WINDOW, 4, !0), WriteWork::default());
    assert_eq!(ioapic.read(WINDOW, 4), 0x17_0011);
    assert_eq!((ioapic.read(WINDOW, 1), ioapic.read(WINDOW, 2), ioapic.read(WINDOW, 8)), (0x11, 0x11, 0x17_0011));
    select(&mut ioapic, 0);
    let _ = ioapic.write(WINDOW, 4, 0xFFFF_FFFF);
    assert_eq!(ioapic.read(WINDOW, 4), 0x0F00_0000);
    select(&mut ioapic, 2);
    let _ = ioapic.write(WINDOW, 4, 0);
    assert_eq!(ioapic.read(WINDOW, 4), 0x0F00_0000);
    assert_eq!(ioapic.read(SELECT, 4), 2);
    let _ = ioapic.write(SELECT, 4, 0x1FF);
    assert_eq!(ioapic.read(SELECT, 4), 0xFF);
    // No register there.
    for register in [3, 0xF, 0x40, 0x41, 0xFF] {
        select(&mut ioapic, register);
        assert_eq!(ioapic.read(WINDOW, 4), 0xFFFF_FFFF);
        let before = ioapic.clone();
        assert_eq!(ioapic.write(WINDOW, 4, 0), WriteWork::default());
        assert_eq!(ioapic, before);
    }
    // Not a register of the window, or an odd size.
    assert_eq!(ioapic.read(0x20, 4), 0);
    select(&mut ioapic, 0x10);
    for (offset, size) in [(0x20, 4), (WINDOW, 3), (WINDOW, 0), (WINDOW, 16)] {
        let before = ioapic.clone();
        assert_eq!(ioapic.write(offset, size, 0), WriteWork::default());
        assert_eq!(ioapic, before);
    }
    for pin in 0..PINS {
        assert_eq!(entry(&mut ioapic, pin), MASKED);
    }
}

#[test]
fn entries_and_messages() {
    let mut ioapic = Ioapic::new();
    let work = program(&mut ioapic, 4, 0xA500_0000_0000_0000 | (1 << 11) | (1 << 8) | 0x41);
    assert_eq!((work.mask_changed, work.entry_changed, work.message), (Some((4, false)), true, None));
    let work = ioapic.set_line(4, User, true);
    assert_eq!(
        work.message,
        Some(Message {
            dest: 0xA5,
            dest_mode: DestMode::Logical,
            shorthand: Shorthand::None,
            delivery: DeliveryMode::LowestPriority,
            vector: 0x41,
            trigger: Trigger::Edge,
            assert: true,
            redirection_hint: false,
        })
    );
    assert_eq!(work.status, LineStatus::Delivered);
    // Delivery status and remote IRR are read-only.
    let _ = program(&mut ioapic, 5, REMOTE_IRR | Entry::PENDING | LEVEL | MASKED);
    assert_eq!(entry(&mut ioapic, 5), LEVEL | MASKED);
    assert_eq!(program(&mut ioapic, 5, LEVEL | MASKED).mask_changed, None);
}

#[test]
fn edges() {
    let mut ioapic = Ioapic::new();
    // Masked: lost, and not made up for.
    assert_eq!(ioapic.set_line(3, User, true), LineWork { message: None, status: LineStatus::Ignored });
    assert_eq!(program(&mut ioapic, 3, 0x33).message, None);
    // Still high: no edge.
    assert_eq!(ioapic.set_line(3, User, true).status, LineStatus::Coalesced);
    assert_eq!(ioapic.set_line(3, User, false).status, LineStatus::Delivered);
    for _ in 0..3 {
        assert_eq!(ioapic.set_line(3, User, true).message.unwrap().vector, 0x33);
        assert_eq!(ioapic.set_line(3, User, false).message, None);
    }
    // The EOI is heard by listeners, and does nothing else.
    let work = ioapic.eoi(Eoi { level: false, ..eoi(0x33) });
    assert_eq!(work, EoiWork { acknowledged: 1 << 3, ..EoiWork::default() });
    assert_eq!(ioapic.eoi(eoi(0x34)), EoiWork::default());
    assert_eq!(ioapic.set_line(24, User, true).status, LineStatus::Ignored);
    assert_eq!(ioapic.set_line(255, User, true).message, None);
}

#[test]
fn levels() {
    let mut ioapic = Ioapic::new();
    let _ = program(&mut ioapic, 9, LEVEL | 0x59);
    let message = ioapic.set_line(9, User, true).message.unwrap();
    assert_eq!(message.trigger, Trigger::Level);
    assert_eq!(entry(&mut ioapic, 9), LEVEL | REMOTE_IRR | 0x59);
    // Waits for the EOI.
    assert_eq!(ioapic.set_line(9, User, true), LineWork { message: None, status: LineStatus::Ignored });
    // Suppressed broadcast, or an edge-triggered vector of the same number: still waits.
    assert_eq!(ioapic.eoi(Eoi { broadcast: false, ..eoi(0x59) }).again, 0);
    assert_eq!(ioapic.eoi(Eoi { level: false, ..eoi(0x59) }).again, 0);
    assert_eq!(ioapic.eoi(eoi(0x59)), EoiWork { acknowledged: 1 << 9, again: 1 << 9, paused: false });
    assert_eq!(ioapic.service(9), Some(message));
    assert_eq!(ioapic.service(9), None);
    let _ = ioapic.set_line(9, User, false);
    assert_eq!(ioapic.eoi(eoi(0x59)), EoiWork { acknowledged: 1 << 9, ..EoiWork::default() });
    assert_eq!(entry(&mut ioapic, 9), LEVEL | 0x59);
    assert_eq!(ioapic.service(9), None);
}

#[test]
fn a_line_is_shared_by_its_sources() {
    let mut ioapic = Ioapic::new();
    let _ = program(&mut ioapic, 0, 0x30);
    assert!(ioapic.set_line(0, User, true).message.is_some());
    assert_eq!(ioapic.set_line(0, Pit, true).status, LineStatus::Coalesced);
    // Still held high by one.
    assert_eq!(ioapic.set_line(0, User, false).status, LineStatus::Coalesced);
    let _ = ioapic.set_line(0, Pit, false);
    assert!(ioapic.set_line(0, Pit, true).message.is_some());
}

#[test]
fn unmasking_delivers_what_waits() {
    let mut ioapic = Ioapic::new();
    let _ = program(&mut ioapic, 7, LEVEL | MASKED | 0x47);
    assert_eq!(ioapic.set_line(7, User, true).message, None);
    let work = program(&mut ioapic, 7, LEVEL | 0x47);
    assert_eq!(work.message.map(|(pin, message)| (pin, message.vector)), Some((7, 0x47)));
    assert_eq!(work.mask_changed, Some((7, false)));
    // Waiting for the EOI already: not twice.
    let _ = program(&mut ioapic, 7, LEVEL | MASKED | 0x47);
    assert_eq!(program(&mut ioapic, 7, LEVEL | 0x47).message, None);
    // Through edge and back: the way to an EOI without an EOI register.
    assert_eq!(program(&mut ioapic, 7, MASKED | 0x47).message, None);
    assert!(program(&mut ioapic, 7, LEVEL | 0x47).message.is_some());
    // Nobody took it: the next change tries again.
    ioapic.not_accepted(7);
    assert!(ioapic.set_line(7, User, true).message.is_some());
}

#[test]
fn resampling() {
    let mut ioapic = Ioapic::new();
    ioapic.set_resampling(1 << 10);
    let _ = program(&mut ioapic, 10, LEVEL | 0x5A);
    assert!(ioapic.set_line(10, Resampler, true).message.is_some());
    // The EOI lets go of the line: the device raises it again if it must.
    assert_eq!(ioapic.eoi(eoi(0x5A)), EoiWork { acknowledged: 1 << 10, ..EoiWork::default() });
    assert!(ioapic.set_line(10, Resampler, true).message.is_some());
    // Another source keeps it high.
    let _ = ioapic.set_line(10, User, true);
    assert_eq!(ioapic.eoi(eoi(0x5A)).again, 1 << 10);
    let _ = ioapic.set_line(10, User, false);
    // Unmasked while its line seems high: the device is asked first.
    let _ = program(&mut ioapic, 10, LEVEL | MASKED | 0x5A);
    assert_eq!(ioapic.set_line(10, Resampler, true).message, None);
    let work = program(&mut ioapic, 10, LEVEL | 0x5A);
    assert_eq!((work.resample, work.message), (Some(10), None));
    assert_eq!(ioapic.service(10), None);
    assert!(ioapic.set_line(10, Resampler, true).message.is_some());
}

#[test]
fn wanted_eois() {
    let mut ioapic = Ioapic::new();
    let _ = program(&mut ioapic, 1, 0x31);
    let _ = program(&mut ioapic, 2, LEVEL | 0x32);
    let _ = program(&mut ioapic, 3, 0x33);
    let _ = program(&mut ioapic, 4, 0x34);
    ioapic.set_resampling(1 << 3);
    let vectors = ioapic.eoi_vectors(1 << 4);
    assert_eq!([0x31, 0x32, 0x33, 0x34].map(|vector| vectors.test(vector)), [false, true, true, true]);
}

#[test]
fn storms_are_slowed_down() {
    let mut ioapic = Ioapic::new();
    let _ = program(&mut ioapic, 9, LEVEL | 0x59);
    let mut message = ioapic.set_line(9, User, true).message;
    let mut rounds = 0;
    loop {
        assert!(message.is_some());
        let work = ioapic.eoi(eoi(0x59));
        rounds += 1;
        if work.paused {
            assert_eq!(work.again, 0);
            break;
        }
        message = ioapic.service(9);
    }
    assert_eq!(rounds, STORM_COUNT as u32);
    assert_eq!(ioapic.resume(), 1 << 9);
    assert_eq!(ioapic.resume(), 0);
    assert!(ioapic.service(9).is_some());
    // A quiet EOI starts the count anew.
    let _ = ioapic.set_line(9, User, false);
    let _ = ioapic.eoi(eoi(0x59));
    assert_eq!(ioapic.in_a_row[9], 0);
}

#[test]
fn save_and_restore() {
    let mut ioapic = Ioapic::new();
    let _ = program(&mut ioapic, 1, 0x31);
    let _ = program(&mut ioapic, 2, LEVEL | 0x32);
    let _ = program(&mut ioapic, 3, LEVEL | MASKED | 0x33);
    for pin in 1..4 {
        let _ = ioapic.set_line(pin, User, true);
    }
    let state = ioapic.save();
    // An edge that was delivered is over; a level is not.
    assert_eq!(state.irr, (1 << 2) | (1 << 3));
    assert_eq!(state.redirtbl[2], LEVEL | REMOTE_IRR | 0x32);
    assert_eq!((state.base_address, state.ioregsel), (0xFEC0_0000, 0x16));
    let mut copy = Ioapic::new();
    let pins = copy.restore(&state);
    assert_eq!(pins, state.irr);
    assert_eq!(copy.save(), state);
    // Already waiting for its EOI, and masked: nothing to send.
    assert!((0..PINS).all(|pin| copy.service(pin).is_none()));
    assert_eq!(copy.eoi(eoi(0x32)).again, 1 << 2);
    // An undelivered edge is sent after the restore.
    let pins = copy.restore(&IoapicState { irr: !0, ..state });
    assert_eq!(pins, ALL_PINS);
    assert_eq!(copy.service(1).unwrap().vector, 0x31);
    // The next edge comes while the pin is masked: that one was not delivered.
    let _ = ioapic.set_line(1, User, false);
    let _ = program(&mut ioapic, 1, MASKED | 0x31);
    let _ = ioapic.set_line(1, User, true);
    assert_eq!(ioapic.save().irr & (1 << 1), 1 << 1);
}

#[test]
fn random_actions() {
    let mut random = Random(11);
    for _ in 0..200 {
        let mut ioapic = Ioapic::new();
        ioapic.set_resampling(random.next() as u32);
        for _ in 0..2_000 {
            let pin = random.below(26) as u8;
            let before = ioapic.clone();
            match random.below(8) {
                0..=2 => {
                    let source = [User, Resampler, Pit][random.below(3) as usize];
                    let high = random.flip();
                    let work = ioapic.set_line(pin, source, high);
                    assert_eq!(
                        work.message.is_some(),
                        work.status == LineStatus::Delivered && ioapic.irr & (1 << (pin & 31)) != 0
                    );
                    if let Some(message) = work.message {
                        let was = before.entries[slot(pin)];
                        assert!(!was.has(MASKED) && !was.has(REMOTE_IRR));
                        assert_eq!(message.vector, was.vector());
                    }
                }
                3..=4 => {
                    let work = program(&mut ioapic, pin.min(23), random.wide() & !0x70);
                    if let Some((at, message)) = work.message {
                        assert_eq!((at, message.trigger), (pin.min(23), Trigger::Level));
                    }
                }
                5 => {
                    let work = ioapic.write(random.wide() as u32, random.below(10) as u8, random.wide());
                    assert!(work.message.is_none() || work.resample.is_none());
                }
                6 => {
                    let vector = random.next() as u8 & !0x70;
                    let work = ioapic.eoi(Eoi { vector, level: random.flip(), broadcast: random.flip() });
                    assert_eq!(work.again & !work.acknowledged, 0);
                    for pin in (0..PINS).filter(|pin| work.again & (1 << pin) != 0) {
                        assert_eq!(ioapic.service(pin).unwrap().vector, vector);
                    }
                }
                _ => {
                    let value = ioapic.read(random.wide() as u32, random.below(10) as u8);
                    assert!(value <= u32::MAX as u64);
                    if random.below(30) == 0 {
                        let state = ioapic.save();
                        let mut copy = Ioapic::new();
                        let _ = copy.restore(&state);
                        assert_eq!(copy.save(), state);
                    }
                }
            }
            // An edge-triggered pin never waits for an EOI; the spare entries stay as they are.
            assert!(ioapic.entries.iter().all(|entry| entry.has(LEVEL) || !entry.has(REMOTE_IRR)));
            assert!(ioapic.entries[PINS as usize..].iter().all(|entry| *entry == Entry(MASKED)));
            assert_eq!(ioapic.irr & !ALL_PINS, 0);
            for pin in (0..PINS).filter(|&pin| ioapic.lines[slot(pin)] == 0) {
                assert_eq!(ioapic.irr & (1 << pin), 0);
            }
        }
    }
}
