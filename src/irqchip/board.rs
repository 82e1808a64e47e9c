// SPDX-License-Identifier: GPL-2.0
//! The models wired together as the kernel side wires them: a test of the contracts between them.
#![forbid(unsafe_code)]

use super::dest::{for_each_target, CardCell, Origin};
use super::ioapic::Ioapic;
use super::lapic::{Inbox, Lapic, LapicFeatures, LapicWork, Posted, STATE_BYTES};
use super::message::{LineSource, Message};
use super::pic::Pic;
use super::pit::Pit;
use super::routing::{build, lookup, starts_len, Route, Target, DEFAULT_ROUTES};
use super::testing::Random;
use std::vec;
use std::vec::Vec;

const X2APIC_ICR: u32 = 0x830;
const X2APIC_EOI: u32 = 0x80B;
const X2APIC_SVR: u32 = 0x80F;

struct Cpu {
    lapic: Lapic,
    inbox: Inbox,
    /// Interrupts taken, by vector.
    taken: [u32; 256],
}

struct Board {
    cpus: Vec<Cpu>,
    cards: Vec<CardCell>,
    ioapic: Ioapic,
    pic: Pic,
    pit: Pit,
    routes: Vec<Route>,
    starts: Vec<u16>,
    now_ns: u64,
    /// GSIs with resampling devices that were told to look again.
    resampled: Vec<u32>,
}

impl Board {
    fn new(count: u32) -> Self {
        let features = LapicFeatures { x2apic: true, tsc_deadline: true, ..LapicFeatures::default() };
        let cpu = |id| Cpu { lapic: Lapic::new(id, id == 0, features), inbox: Inbox::new(), taken: [0; 256] };
        let mut routes = DEFAULT_ROUTES.to_vec();
        let mut starts = vec![0; starts_len(&routes)];
        build(&mut routes, &mut starts).unwrap();
        let mut board = Self {
            cpus: (0..count).map(cpu).collect(),
            cards: (0..count).map(|_| CardCell::new()).collect(),
            ioapic: Ioapic::new(),
            pic: Pic::new(),
            pit: Pit::new(),
            routes,
            starts,
            now_ns: 0,
            resampled: Vec::new(),
        };
        for index in 0..count as usize {
            let lapic = &mut board.cpus[index].lapic;
            let base = lapic.base();
            let work = lapic.write_base(base | (1 << 10), 40, false).unwrap();
            board.act(index, work);
            let work = board.cpus[index].lapic.write_msr(X2APIC_SVR, 0x1FF, 0).unwrap();
            board.act(index, work);
        }
        board
    }

    fn deliver(&mut self, message: Message, origin: Origin) -> usize {
        let cpus = &self.cpus;
        let mut accepted = 0;
        for_each_target(&self.cards[..], &message, origin, |index, card| {
            if card.accepts(message.delivery) && cpus[index].inbox.post(&message) != Posted::Dropped {
                accepted += 1;
            }
        });
        accepted
    }

    fn deliver_pin(&mut self, pin: u8, message: Option<Message>) {
        let Some(message) = message else { return };
        if self.deliver(message, Origin::Device { ff_is_everybody: true }) == 0 {
            self.ioapic.not_accepted(pin);
        }
    }

    fn set_gsi(&mut self, gsi: u32, source: LineSource, level: bool) {
        let routes = lookup(&self.routes, &self.starts, gsi);
        for target in routes.iter().map(|route| route.target).collect::<Vec<_>>() {
            match target {
                Target::Pic(pin) => {
                    if self.pic.set_line(pin, source, level).1 {
                        self.cpus[0].inbox.post_pic();
                    }
                }
                Target::Ioapic(pin) => {
                    let work = self.ioapic.set_line(pin, source, level);
                    self.deliver_pin(pin, work.message);
                }
                Target::Msi(msi) if level => {
                    self.deliver(msi.message(true), Origin::Device { ff_is_everybody: false });
                }
                Target::Msi(_) => {}
            }
        }
    }

    fn pulse_pit(&mut self) {
        self.set_gsi(0, LineSource::Pit, true);
        self.set_gsi(0, LineSource::Pit, false);
    }

    /// Pins of one controller were acknowledged; the default table has GSI = pin.
    fn acknowledged(&mut self, pins: u32, resampling: u32) {
        if pins & 1 != 0 && self.pit.irq_acknowledged() {
            self.pulse_pit();
        }
        for gsi in (0..24).filter(|gsi| pins & resampling & (1 << gsi) != 0) {
            self.set_gsi(gsi, LineSource::Resampler, false);
            self.resampled.push(gsi);
        }
    }

    /// What a vCPU's thread does with the work of its APIC.
    fn act(&mut self, index: usize, work: LapicWork) {
        if work.card_changed {
            self.cards[index].publish(self.cpus[index].lapic.card());
        }
        if let Some(message) = work.ipi {
            self.deliver(message, Origin::Cpu(index));
        }
        if let Some(eoi) = work.eoi {
            let resampling = 1 << 10;
            if self.ioapic.eoi_vectors(1).test(eoi.vector) {
                let work = self.ioapic.eoi(eoi);
                for pin in (0..24u8).filter(|pin| work.again & (1 << pin) != 0) {
                    let message = self.ioapic.service(pin);
                    self.deliver_pin(pin, message);
                }
                self.acknowledged(work.acknowledged, resampling);
            }
        }
    }

    /// One entry of the guest: takes an interrupt if there is one, and ends it. True: there was one.
    fn step(&mut self, index: usize) -> bool {
        let cpu = &mut self.cpus[index];
        if !cpu.inbox.is_empty() {
            cpu.inbox.drain(&mut cpu.lapic);
        }
        if let Some(vector) = cpu.lapic.highest_pending() {
            cpu.lapic.acknowledge(vector);
            cpu.taken[vector as usize] += 1;
            let work = cpu.lapic.write_msr(X2APIC_EOI, 0, self.now_ns).unwrap();
            self.act(index, work);
            return true;
        }
        if cpu.lapic.accepts_pic() && self.pic.output() {
            let (vector, work) = self.pic.acknowledge();
            self.cpus[index].taken[vector as usize] += 1;
            self.acknowledged(work.acknowledged as u32, 0);
            let work = self.pic.write(0x20, 1, 0x20);
            self.acknowledged(work.acknowledged as u32, 0);
            return true;
        }
        false
    }

    fn settle(&mut self) {
        for _ in 0..1_000 {
            if !(0..self.cpus.len()).any(|index| self.step(index)) {
                return;
            }
        }
        panic!("interrupts without end");
    }

    fn run_pit(&mut self, until_ns: u64) {
        while let Some(due) = self.pit.deadline_ns().filter(|&due| due <= until_ns) {
            self.now_ns = due;
            if self.pit.expire(due) {
                self.pulse_pit();
            }
            self.settle();
        }
        self.now_ns = until_ns;
    }

    fn program_pin(&mut self, pin: u8, entry: u64) {
        for (register, value) in [(0x11 + 2 * pin, entry >> 32), (0x10 + 2 * pin, entry & 0xFFFF_FFFF)] {
            let _ = self.ioapic.write(0, 4, register as u64);
            let work = self.ioapic.write(0x10, 4, value);
            if work.mask_changed == Some((0, false)) {
                self.pit.irq_unmasked();
            }
            if let Some((pin, message)) = work.message {
                self.deliver_pin(pin, Some(message));
            }
        }
    }

    fn start_pit(&mut self) {
        for (port, value) in [(0x43, 0x34), (0x40, 0x9C), (0x40, 0x2E)] {
            self.pit.write(port, value, self.now_ns);
        }
    }
}

#[test]
fn the_pit_ticks_through_the_ioapic() {
    let mut board = Board::new(2);
    let _ = board.pic.write(0x21, 1, 0xFF);
    board.program_pin(0, (1 << 56) | 0x30);
    board.start_pit();
    board.run_pit(1_000_000_000);
    // 1193182 / 11932 ticks in a second, all on CPU 1.
    assert_eq!((board.cpus[0].taken[0x30], board.cpus[1].taken[0x30]), (0, 99));
}

#[test]
fn the_pit_ticks_through_the_8259a() {
    let mut board = Board::new(2);
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFE)] {
        let _ = board.pic.write(port, 1, value);
    }
    // LINT0 as the firmware leaves it: ExtINT. (Enabling by the SVR left it so.)
    assert!(board.cpus[0].lapic.accepts_pic() && !board.cpus[1].lapic.accepts_pic());
    board.start_pit();
    board.run_pit(500_000_000);
    assert_eq!((board.cpus[0].taken[0x20], board.cpus[1].taken[0x20]), (49, 0));
}

#[test]
fn ticks_that_were_missed_are_made_up_for() {
    let mut board = Board::new(1);
    let _ = board.pic.write(0x21, 1, 0xFF);
    board.program_pin(0, 0x30);
    board.start_pit();
    // The vCPU does not run for a second.
    while let Some(due) = board.pit.deadline_ns().filter(|&due| due <= 1_000_000_000) {
        if board.pit.expire(due) {
            board.pulse_pit();
        }
    }
    board.settle();
    assert_eq!(board.cpus[0].taken[0x30], 99);
}

#[test]
fn ipis_reach_whom_they_name() {
    let mut board = Board::new(20);
    let cases: [(u64, &[usize]); 4] = [
        ((17 << 32) | 0x4050, &[17]),
        ((((1 << 16) | 0x9) << 32) | 0x4851, &[16, 19]),
        (0xC_4052, &[0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]),
        ((3 << 32) | 0x4053, &[3]),
    ];
    for (icr, expected) in cases {
        let work = board.cpus[3].lapic.write_msr(X2APIC_ICR, icr, 0).unwrap();
        board.act(3, work);
        board.settle();
        let vector = icr as u8 as usize;
        let found: Vec<usize> = (0..20).filter(|&index| board.cpus[index].taken[vector] == 1).collect();
        assert_eq!(found, expected, "{icr:#x}");
    }
}

/// Level-triggered devices, some of which resample: every request is seen, and nothing hangs.
#[test]
fn level_devices() {
    let mut random = Random(77);
    let mut board = Board::new(4);
    let _ = board.pic.write(0x21, 1, 0xFF);
    let _ = board.pic.write(0xA1, 1, 0xFF);
    board.ioapic.set_resampling(1 << 10);
    for pin in 9..12u8 {
        board.program_pin(pin, ((pin as u64 & 3) << 56) | (1 << 15) | (0x60 + pin as u64));
    }
    let mut wanted = [0u32; 3];
    for _ in 0..2_000 {
        let device = random.below(3) as usize;
        let gsi = 9 + device as u32;
        let before: u32 = board.cpus.iter().map(|cpu| cpu.taken[0x60 + gsi as usize]).sum();
        let source = if gsi == 10 { LineSource::Resampler } else { LineSource::User };
        if random.below(4) == 0 {
            // Masked, raised, unmasked: a resampling device is asked first.
            let entry = ((gsi as u64 & 3) << 56) | (1 << 15) | (0x60 + gsi as u64);
            board.program_pin(gsi as u8, entry | (1 << 16));
            board.set_gsi(gsi, source, true);
            board.program_pin(gsi as u8, entry);
        }
        board.set_gsi(gsi, source, true);
        // The handler of the guest silences the device before the EOI in most cases; else it comes again.
        let target = (gsi & 3) as usize;
        let cpu = &mut board.cpus[target];
        cpu.inbox.drain(&mut cpu.lapic);
        assert_eq!(cpu.lapic.highest_pending(), Some(0x60 + gsi as u8));
        let rounds = if gsi == 10 || random.flip() { 1 } else { 3 };
        for round in 1..=rounds {
            if round == rounds && gsi != 10 {
                board.set_gsi(gsi, source, false);
            }
            assert!(board.step(target));
        }
        if gsi == 10 {
            assert_eq!(board.resampled.pop(), Some(10));
        }
        board.settle();
        wanted[device] += rounds;
        let after: u32 = board.cpus.iter().map(|cpu| cpu.taken[0x60 + gsi as usize]).sum();
        assert_eq!(after - before, rounds);
    }
    for (device, wanted) in wanted.iter().enumerate() {
        let taken: u32 = board.cpus.iter().map(|cpu| cpu.taken[0x69 + device]).sum();
        assert_eq!(taken, *wanted);
    }
}

#[test]
fn a_whole_board_moves() {
    let mut board = Board::new(3);
    let _ = (board.pic.write(0x21, 1, 0xFF), board.pic.write(0xA1, 1, 0xFF));
    board.program_pin(0, (2 << 56) | 0x30);
    board.program_pin(9, (1 << 15) | 0x69);
    board.start_pit();
    board.run_pit(35_000_000);
    board.set_gsi(9, LineSource::User, true);
    let mut copy = Board::new(3);
    for (to, from) in copy.cpus.iter_mut().zip(&mut board.cpus) {
        from.inbox.drain(&mut from.lapic);
        let state: [u8; STATE_BYTES] = from.lapic.save(35_000_000, true);
        let _ = to.lapic.restore(&state, 0, true).unwrap();
        to.taken = from.taken;
    }
    let pins = copy.ioapic.restore(&board.ioapic.save());
    for pin in (0..24u8).filter(|pin| pins & (1 << pin) != 0) {
        let message = copy.ioapic.service(pin);
        copy.deliver_pin(pin, message);
    }
    copy.pic.restore(0, &board.pic.save(0));
    copy.pic.restore(1, &board.pic.save(1));
    copy.pit.restore(&board.pit.save(), 0);
    copy.set_gsi(9, LineSource::User, true);
    assert_eq!(copy.cpus[0].lapic.highest_pending(), Some(0x69));
    assert!(copy.step(0));
    // Still high: again, until the device lets go.
    copy.set_gsi(9, LineSource::User, false);
    assert!(copy.step(0));
    assert!(!copy.step(0));
    copy.run_pit(35_000_000);
    assert_eq!(copy.cpus[2].taken[0x30], 6);
}
