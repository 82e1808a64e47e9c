// SPDX-License-Identifier: GPL-2.0
#![forbid(unsafe_code)]

use super::*;
use crate::irqchip::testing::Random;
use LineSource::{Pit, User};

/// Programmed as Linux does: master at 30h, slave at 38h, everything unmasked.
fn ready() -> Pic {
    with_icw4(0x01)
}

fn with_icw4(icw4: u8) -> Pic {
    let mut pic = Pic::new();
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, icw4), (0x21, 0)] {
        let _ = pic.write(port, 1, value as u32);
    }
    for (port, value) in [(0xA0, 0x11), (0xA1, 0x38), (0xA1, 0x02), (0xA1, icw4), (0xA1, 0)] {
        let _ = pic.write(port, 1, value as u32);
    }
    pic
}

fn raise(pic: &mut Pic, pin: u8) -> bool {
    pic.set_line(pin, User, true).1
}

fn lower(pic: &mut Pic, pin: u8) {
    assert!(!pic.set_line(pin, User, false).1);
}

fn read(pic: &mut Pic, port: u16) -> u8 {
    pic.read(port, 1).0 as u8
}

fn out(pic: &mut Pic, port: u16, value: u8) -> PicWork {
    pic.write(port, 1, value as u32)
}

/// IRR, ISR of a chip, by its command port.
fn irr_isr(pic: &mut Pic, port: u16) -> (u8, u8) {
    let _ = out(pic, port, 0x0A);
    let irr = read(pic, port);
    let _ = out(pic, port, 0x0B);
    (irr, read(pic, port))
}

#[test]
fn an_interrupt_from_edge_to_eoi() {
    let mut pic = ready();
    assert!(!pic.output());
    assert!(raise(&mut pic, 3));
    assert!(!raise(&mut pic, 3));
    assert!(pic.output());
    assert_eq!(irr_isr(&mut pic, 0x20), (1 << 3, 0));
    let (vector, work) = pic.acknowledge();
    assert_eq!((vector, work), (0x33, PicWork::default()));
    assert_eq!(irr_isr(&mut pic, 0x20), (0, 1 << 3));
    assert!(!pic.output());
    // The line is still high, but that is no edge; and lower priorities wait.
    assert!(!raise(&mut pic, 3));
    assert!(!raise(&mut pic, 4));
    // A higher one nests.
    assert!(raise(&mut pic, 1));
    assert_eq!(pic.acknowledge().0, 0x31);
    let work = out(&mut pic, 0x20, 0x20);
    assert_eq!((work.acknowledged, work.raised), (1 << 1, false));
    let work = out(&mut pic, 0x20, 0x20);
    assert_eq!((work.acknowledged, work.raised), (1 << 3, true));
    assert_eq!(pic.acknowledge().0, 0x34);
    assert_eq!(out(&mut pic, 0x20, 0x64).acknowledged, 1 << 4);
    assert_eq!(out(&mut pic, 0x20, 0x20).acknowledged, 0);
}

#[test]
fn the_slave() {
    let mut pic = ready();
    assert!(raise(&mut pic, 12));
    assert_eq!(pic.acknowledge().0, 0x3C);
    assert_eq!((irr_isr(&mut pic, 0x20), irr_isr(&mut pic, 0xA0)), ((0, 4), (0, 1 << 4)));
    // Its higher ones wait for the master's EOI.
    assert!(!raise(&mut pic, 8));
    assert_eq!(out(&mut pic, 0xA0, 0x20).acknowledged, 1 << 12);
    assert_eq!(out(&mut pic, 0x20, 0x20), PicWork { acknowledged: 1 << 2, raised: true, ..PicWork::default() });
    assert_eq!(pic.acknowledge().0, 0x38);
}

#[test]
fn special_fully_nested_mode() {
    let mut pic = with_icw4(0x11);
    raise(&mut pic, 12);
    assert_eq!(pic.acknowledge().0, 0x3C);
    // A higher one of the slave interrupts at once, a lower one does not.
    assert!(!raise(&mut pic, 13));
    assert!(raise(&mut pic, 8));
    assert_eq!(pic.acknowledge().0, 0x38);
}

#[test]
fn spurious() {
    let mut pic = ready();
    assert_eq!(pic.acknowledge().0, 0x37);
    assert_eq!(irr_isr(&mut pic, 0x20), (0, 0));
    // A level that goes away before it is taken, at the slave.
    let _ = out(&mut pic, 0x4D1, 1 << 3);
    raise(&mut pic, 11);
    lower(&mut pic, 11);
    assert_eq!(pic.acknowledge().0, 0x3F);
    assert_eq!((irr_isr(&mut pic, 0x20), irr_isr(&mut pic, 0xA0)), ((0, 4), (0, 0)));
}

#[test]
fn levels() {
    let mut pic = ready();
    let _ = out(&mut pic, 0x4D0, 0xFF);
    let _ = out(&mut pic, 0x4D1, 0xFF);
    assert_eq!((read(&mut pic, 0x4D0), read(&mut pic, 0x4D1)), (0xF8, 0xDE));
    assert_eq!(pic.set_line(5, User, true), (LineStatus::Delivered, true));
    assert_eq!(pic.set_line(5, User, true), (LineStatus::Coalesced, false));
    assert_eq!(pic.acknowledge().0, 0x35);
    // Still requested while the line is high.
    assert!(out(&mut pic, 0x20, 0x20).raised);
    lower(&mut pic, 5);
    assert!(!pic.output());
    // Two sources.
    raise(&mut pic, 5);
    let _ = pic.set_line(5, Pit, true);
    let _ = pic.set_line(5, User, false);
    assert!(pic.output());
    assert_eq!(pic.set_line(16, User, true), (LineStatus::Ignored, false));
    // The cascade is no pin for devices.
    assert_eq!(pic.set_line(2, User, true), (LineStatus::Ignored, false));
    assert_eq!(pic.save(0).irr, 1 << 5);
}

#[test]
fn masks() {
    let mut pic = ready();
    let work = out(&mut pic, 0x21, 0x02);
    assert_eq!(work.mask_changed, 1 << 1);
    assert_eq!(out(&mut pic, 0xA1, 0xF0).mask_changed, 0xF000);
    assert_eq!(pic.masks(), 0xF002);
    assert_eq!(pic.set_line(1, User, true), (LineStatus::Ignored, false));
    assert_eq!((read(&mut pic, 0x21), read(&mut pic, 0xA1)), (2, 0xF0));
    // The edge is remembered, unlike the I/O APIC's.
    let work = out(&mut pic, 0x21, 0);
    assert!(work.raised);
    assert_eq!(pic.acknowledge().0, 0x31);
}

#[test]
fn automatic_eoi() {
    let mut pic = with_icw4(0x03);
    raise(&mut pic, 4);
    let (vector, work) = pic.acknowledge();
    assert_eq!((vector, work.acknowledged), (0x34, 1 << 4));
    assert_eq!(irr_isr(&mut pic, 0x20), (0, 0));
    raise(&mut pic, 9);
    assert_eq!(pic.acknowledge().1.acknowledged, (1 << 9) | (1 << 2));
    // Rotating.
    let _ = out(&mut pic, 0x20, 0x80);
    raise(&mut pic, 0);
    assert_eq!(pic.acknowledge().0, 0x30);
    assert_eq!(pic.save(0).priority_add, 1);
    let _ = out(&mut pic, 0x20, 0x00);
    raise(&mut pic, 6);
    assert_eq!(pic.acknowledge().0, 0x36);
    assert_eq!(pic.save(0).priority_add, 1);
}

#[test]
fn rotation() {
    let mut pic = ready();
    // Pin 3 gets the lowest priority: 4 is first.
    let _ = out(&mut pic, 0x20, 0xC3);
    raise(&mut pic, 0);
    raise(&mut pic, 5);
    assert_eq!(pic.acknowledge().0, 0x35);
    // EOI with rotation: 5 is last.
    assert_eq!(out(&mut pic, 0x20, 0xA0).acknowledged, 1 << 5);
    assert_eq!(pic.save(0).priority_add, 6);
    assert_eq!(pic.acknowledge().0, 0x30);
    // Specific EOI with rotation.
    assert_eq!(out(&mut pic, 0x20, 0xE0).acknowledged, 1);
    assert_eq!(pic.save(0).priority_add, 1);
    // No operation.
    let before = pic.clone();
    assert_eq!(out(&mut pic, 0x20, 0x40), PicWork::default());
    assert_eq!(pic, before);
}

#[test]
fn special_mask_mode() {
    let mut pic = ready();
    raise(&mut pic, 1);
    assert_eq!(pic.acknowledge().0, 0x31);
    raise(&mut pic, 4);
    let _ = out(&mut pic, 0x21, 0x02);
    assert!(!pic.output());
    assert!(out(&mut pic, 0x20, 0x68).raised);
    let _ = out(&mut pic, 0x20, 0x48);
    assert!(!pic.output());
}

#[test]
fn polling() {
    let mut pic = ready();
    let _ = out(&mut pic, 0x20, 0x0C);
    assert_eq!(read(&mut pic, 0x20), 7);
    raise(&mut pic, 10);
    let _ = out(&mut pic, 0x20, 0x0C);
    assert_eq!(read(&mut pic, 0x20), 0x82);
    let _ = out(&mut pic, 0xA0, 0x0C);
    assert_eq!(read(&mut pic, 0xA0), 0x82);
    assert_eq!((irr_isr(&mut pic, 0x20), irr_isr(&mut pic, 0xA0)), ((0, 4), (0, 4)));
    assert!(!pic.output());
}

#[test]
fn initialization() {
    let mut pic = with_icw4(0x13);
    let _ = out(&mut pic, 0x4D0, 0x20);
    let _ = out(&mut pic, 0x20, 0x0B);
    raise(&mut pic, 6);
    raise(&mut pic, 5);
    // The pending edge and what is in service are gone, and that is said; the level stays; masks are open.
    let work = out(&mut pic, 0x20, 0x10);
    assert_eq!(work.acknowledged, 1 << 6);
    let state = pic.save(0);
    assert_eq!((state.irr, state.isr, state.imr, state.elcr, state.init_state), (1 << 5, 0, 0, 0x20, 1));
    // Without ICW4 its functions are off.
    assert_eq!((state.auto_eoi, state.special_fully_nested_mode), (0, 0));
    let _ = out(&mut pic, 0x21, 0x47);
    let _ = out(&mut pic, 0x21, 0x04);
    assert_eq!(pic.save(0).init_state, 0);
    assert_eq!(pic.acknowledge().0, 0x45);
    let work = out(&mut pic, 0x20, 0x11);
    assert_eq!(work.acknowledged, 1 << 5);
}

#[test]
fn other_sizes_and_ports() {
    let mut pic = ready();
    raise(&mut pic, 3);
    let before = pic.clone();
    for size in [0, 2, 4] {
        assert_eq!(pic.read(0x20, size), (0, PicWork::default()));
        assert_eq!(pic.write(0x20, size, 0x11), PicWork::default());
    }
    assert_eq!(pic.read(0x22, 1), (0, PicWork::default()));
    assert_eq!(pic.write(0x22, 1, 0x11), PicWork::default());
    assert_eq!(pic, before);
}

#[test]
fn save_and_restore() {
    let mut pic = ready();
    raise(&mut pic, 3);
    raise(&mut pic, 9);
    let mut copy = Pic::new();
    assert!(!copy.restore(1, &pic.save(1)) || copy.output());
    copy.restore(0, &pic.save(0));
    assert!(copy.output());
    assert_eq!((copy.save(0), copy.save(1)), (pic.save(0), pic.save(1)));
    // Slave before master in priority, in both.
    assert_eq!((copy.acknowledge().0, pic.acknowledge().0), (0x39, 0x39));
    // A state that no chip can have is made one.
    let mad = PicState { priority_add: 0xFF, init_state: 0xFF, elcr: 0xFF, elcr_mask: 0xFF, ..PicState::new_zeroed() };
    copy.restore(0, &mad);
    let state = copy.save(0);
    assert_eq!((state.priority_add, state.init_state, state.elcr, state.elcr_mask), (7, 3, 0xF8, 0xF8));
}

#[test]
fn random_actions() {
    let mut random = Random(23);
    for _ in 0..300 {
        let mut pic = if random.flip() { ready() } else { Pic::new() };
        for _ in 0..1_000 {
            let was_high = pic.output();
            let port = [0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1][random.below(6) as usize];
            let mut raised = false;
            match random.below(6) {
                0..=1 => raised = pic.set_line(random.below(18) as u8, User, random.flip()).1,
                2 => {
                    // Mostly masks and EOIs: initialization is rare.
                    let value = if random.below(8) == 0 { random.next() } else { random.next() & !0x10 };
                    raised = pic.write(port, 1, value as u32).raised;
                }
                3 => raised = pic.read(port, 1).1.raised,
                4 => {
                    let requested = pic.output();
                    let isr = pic.save(0).isr;
                    let (vector, work) = pic.acknowledge();
                    if !requested {
                        assert_eq!((vector & 7, pic.save(0).isr), (7, isr));
                    }
                    assert_eq!(work.raised, pic.output());
                    continue;
                }
                _ => {
                    let mut copy = Pic::new();
                    copy.restore(1, &pic.save(1));
                    copy.restore(0, &pic.save(0));
                    assert_eq!(copy.chips, pic.chips);
                    assert_eq!(copy.output(), pic.output());
                }
            }
            assert_eq!(raised, pic.output() && !was_high);
            assert_eq!(pic.output(), pic.chips[0].request(true).is_some());
            assert!(pic.chips.iter().all(|chip| chip.elcr & !chip.elcr_mask == 0 && chip.priority_add < 8));
        }
    }
}

/// What the output does is worked out when something changes, so that a line that asks for nothing new need not look.
#[test]
fn output_is_settled_after_every_step() {
    let mut random = Random(41);
    let mut pic = ready();
    let (mut rose, mut lines) = (0, 0);
    for step in 0..200_000 {
        let settled = pic.clone();
        assert!(!pic.update(), "step {step}");
        assert_eq!(pic, settled, "step {step}");
        match random.below(8) {
            0..=4 => {
                let (pin, high) = (random.below(16) as u8, random.flip());
                let mut looked = pic.clone();
                let was = looked.output;
                let wanted = looked.set_line(pin, User, high).0;
                let output = looked.update() || looked.output;
                let got = pic.set_line(pin, User, high);
                assert_eq!((got.0, got.1, pic.output), (wanted, output && !was, output), "step {step}");
                rose += u32::from(got.1);
                lines += 1;
            }
            5 => drop(pic.acknowledge()),
            6 => drop(pic.write(
                [0x20, 0xA0][random.below(2) as usize],
                1,
                [0x20, 0x60, 0x0C, 0x68][random.below(4) as usize],
            )),
            _ => match random.below(6) {
                0 => drop(pic.write([0x4D0, 0x4D1][random.below(2) as usize], 1, random.below(256) as u32)),
                1 => drop(pic.write([0x21, 0xA1][random.below(2) as usize], 1, random.below(256) as u32)),
                2 => pic = if random.flip() { with_icw4(0x03) } else { ready() },
                3 => {
                    let chip = random.below(2) as usize;
                    let state = pic.save(chip);
                    let _ = pic.restore(chip, &state);
                }
                _ => drop(pic.read([0x20, 0xA0][random.below(2) as usize], 1)),
            },
        }
    }
    assert!(rose > 100 && lines > 100_000, "{rose} of {lines}");
}
