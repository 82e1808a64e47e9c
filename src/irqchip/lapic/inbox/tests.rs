// SPDX-License-Identifier: GPL-2.0
#![forbid(unsafe_code)]

use super::*;
use crate::irqchip::lapic::regs::{ESR, ESR_RECEIVED_ILLEGAL_VECTOR, ICR, IRR, SVR, TMR};
use crate::irqchip::lapic::LapicFeatures;
use crate::irqchip::testing::Random;
use std::sync::Arc;
use std::vec::Vec;

fn plain() -> Lapic {
    Lapic::new(3, false, LapicFeatures::default())
}

fn enabled() -> Lapic {
    let mut lapic = plain();
    let _ = lapic.mmio_write(SVR, 4, 0x1FF, 0);
    lapic
}

fn read(lapic: &mut Lapic, offset: u32) -> u32 {
    lapic.mmio_read(offset, 4, 0) as u32
}

#[test]
fn inbox_signals() {
    let inbox = Inbox::new();
    let mut lapic = enabled();
    assert!(inbox.is_empty());
    assert_eq!(inbox.drain(&mut lapic), Signals::default());
    assert!(inbox.post_nmi() && !inbox.post_nmi());
    assert!(inbox.post_smi() && inbox.post_pic() && inbox.post_timer() && inbox.post_unhalt());
    assert!(inbox.post_sipi(0x12) && !inbox.post_sipi(0x9A));
    assert!(!inbox.is_empty());
    let signals = inbox.drain(&mut lapic);
    let expected =
        Signals { nmi: true, smi: true, init: false, sipi: Some(0x9A), pic: true, timer: true, unhalt: true };
    assert_eq!(signals, expected);
    assert!(inbox.is_empty());
    // An INIT takes an earlier SIPI back, not a later one.
    inbox.post_sipi(1);
    assert!(inbox.post_init());
    assert_eq!(inbox.drain(&mut lapic), Signals { init: true, ..Signals::default() });
    inbox.post_init();
    assert!(!inbox.post_init());
    inbox.post_sipi(2);
    assert_eq!(inbox.drain(&mut lapic), Signals { init: true, sipi: Some(2), ..Signals::default() });
}

#[test]
fn inbox_vectors() {
    let inbox = Inbox::new();
    let mut lapic = enabled();
    assert!(inbox.post_fixed(0x41, Trigger::Edge));
    assert!(!inbox.post_fixed(0x41, Trigger::Level));
    assert!(inbox.post_fixed(0xFF, Trigger::Edge));
    assert!(inbox.post_fixed(0x0F, Trigger::Edge));
    assert_eq!(inbox.drain(&mut lapic), Signals::default());
    assert_eq!(lapic.highest_pending(), Some(0xFF));
    assert_eq!((read(&mut lapic, TMR + 0x20), read(&mut lapic, IRR)), (2, 0));
    let _ = lapic.mmio_write(ESR, 4, 0, 0);
    assert_eq!(read(&mut lapic, ESR), ESR_RECEIVED_ILLEGAL_VECTOR);
    // The trigger mode is that of the last post.
    assert!(inbox.post_fixed(0x41, Trigger::Edge));
    inbox.drain(&mut lapic);
    assert_eq!(read(&mut lapic, TMR + 0x20), 0);
    // Disabled: they vanish.
    let mut off = plain();
    inbox.post_fixed(0x50, Trigger::Edge);
    inbox.drain(&mut off);
    assert!(inbox.is_empty() && off.highest_irr().is_none());
    inbox.post_fixed(0x50, Trigger::Edge);
    inbox.clear();
    assert!(inbox.is_empty());
    assert!(inbox.post_fixed(0x50, Trigger::Edge));
}

#[test]
fn inbox_messages() {
    let inbox = Inbox::new();
    let mut lapic = enabled();
    let mut message = lapic.mmio_write(ICR, 4, 0xC041, 0).ipi.unwrap();
    assert_eq!((inbox.post(&message), inbox.post(&message)), (Posted::New, Posted::Coalesced));
    message.assert = false;
    assert_eq!(inbox.post(&message), Posted::Dropped);
    message.delivery = DeliveryMode::ExtInt;
    assert_eq!(inbox.post(&message), Posted::Dropped);
    for delivery in [2, 3, 4, 6].map(DeliveryMode::from_bits) {
        message.delivery = delivery;
        assert_eq!(inbox.post(&message), Posted::New);
    }
    let signals = inbox.drain(&mut lapic);
    assert!(signals.nmi && signals.smi && signals.unhalt && signals.sipi == Some(0x41));
    assert_eq!(lapic.highest_irr(), Some(0x41));
}

/// Four senders count what they newly posted; the owner counts what it took. Nothing is lost or doubled.
#[test]
fn inbox_under_fire() {
    let inbox = Arc::new(Inbox::new());
    let done = Arc::new(core::sync::atomic::AtomicU32::new(0));
    let senders: Vec<_> = (0..4u64)
        .map(|seed| {
            let (inbox, done) = (inbox.clone(), done.clone());
            std::thread::spawn(move || {
                let mut random = Random(seed);
                let mut posted = [0u64; 256];
                let mut left = 5_000;
                while left > 0 {
                    let vector = 16 + random.below(240) as u8;
                    if inbox.post_fixed(vector, Trigger::from_level(vector & 1 != 0)) {
                        posted[vector as usize] += 1;
                        left -= 1;
                    } else {
                        std::thread::yield_now();
                    }
                }
                done.fetch_add(1, core::sync::atomic::Ordering::SeqCst);
                posted
            })
        })
        .collect();
    let mut lapic = enabled();
    let mut taken = [0u64; 256];
    loop {
        let last = done.load(core::sync::atomic::Ordering::SeqCst) == 4;
        if !inbox.is_empty() {
            inbox.drain(&mut lapic);
        }
        while let Some(vector) = lapic.highest_pending() {
            lapic.acknowledge(vector);
            let eoi = lapic.eoi().unwrap();
            assert_eq!((eoi.vector, eoi.level), (vector, vector & 1 != 0));
            taken[vector as usize] += 1;
        }
        if last && inbox.is_empty() {
            break;
        }
    }
    let mut posted = [0u64; 256];
    for sender in senders {
        let counts = sender.join().unwrap();
        posted.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    assert_eq!(posted, taken);
    assert_eq!(posted.iter().sum::<u64>(), 20_000);
}
