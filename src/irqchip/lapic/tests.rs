// SPDX-License-Identifier: GPL-2.0
#![forbid(unsafe_code)]

use super::regs::*;
use super::*;
use crate::irqchip::message::{DestMode, Gp, Shorthand, Trigger};
use crate::irqchip::testing::Random;

const ALL: LapicFeatures = LapicFeatures { x2apic: true, tsc_deadline: true, directed_eoi: true, cmci: true };
const MSR: u32 = crate::arch::msr::X2APIC_FIRST;

fn plain() -> Lapic {
    Lapic::new(3, false, LapicFeatures { x2apic: true, tsc_deadline: true, ..LapicFeatures::default() })
}

/// In xAPIC mode, software-enabled.
fn enabled() -> Lapic {
    let mut lapic = plain();
    let work = lapic.mmio_write(SVR, 4, 0x1FF, 0);
    assert!(work.card_changed);
    lapic
}

fn x2apic() -> Lapic {
    let mut lapic = enabled();
    let work = lapic.write_base(lapic.base() | BASE_X2APIC, 40, false).unwrap();
    assert!(work.card_changed);
    lapic
}

fn read(lapic: &mut Lapic, offset: u32) -> u32 {
    lapic.mmio_read(offset, 4, 0) as u32
}

fn write(lapic: &mut Lapic, offset: u32, value: u32) -> LapicWork {
    lapic.mmio_write(offset, 4, value as u64, 0)
}

#[test]
fn power_on_state() {
    let mut lapic = plain();
    let expected = [
        (ID, 3 << 24),
        (VERSION, 0x5_0014),
        (TPR, 0),
        (PPR, 0),
        (LDR, 0),
        (DFR, !0),
        (SVR, 0xFF),
        (ESR, 0),
        (LVT_TIMER, LVT_MASKED),
        (0x350, LVT_MASKED),
        (TIMER_DIVIDE, 0),
    ];
    for (offset, value) in expected {
        assert_eq!(read(&mut lapic, offset), value, "{offset:#x}");
    }
    assert_eq!(lapic.base(), 0xFEE0_0800);
    let mut boot = Lapic::new(0, true, ALL);
    assert_eq!(boot.base(), 0xFEE0_0900);
    assert_eq!(read(&mut boot, 0x350), LVT_EXTINT);
    assert_eq!(read(&mut boot, VERSION), 0x106_0014);
    assert!(boot.accepts_pic() && boot.card().takes_pic());
    assert!(!lapic.accepts_pic());
    assert_eq!(lapic.highest_pending(), None);
}

#[test]
fn priorities() {
    let mut lapic = enabled();
    for vector in [0x31, 0x55, 0x5A, 0xF0] {
        assert!(lapic.accept(vector, false));
    }
    assert_eq!(lapic.highest_pending(), Some(0xF0));
    lapic.acknowledge(0xF0);
    assert_eq!((lapic.ppr(), lapic.highest_pending()), (0xF0, None));
    assert_eq!(lapic.eoi(), Some(Eoi { vector: 0xF0, level: false, broadcast: true }));
    // The same class does not interrupt: 5Ah is in service, 55h waits.
    lapic.acknowledge(0x5A);
    assert_eq!((lapic.highest_irr(), lapic.highest_pending()), (Some(0x55), None));
    assert!(lapic.has_pending_above(0x4F) && !lapic.has_pending_above(0x50));
    // A higher one nests.
    lapic.accept(0x60, true);
    lapic.acknowledge(0x60);
    assert_eq!(lapic.eoi().unwrap(), Eoi { vector: 0x60, level: true, broadcast: true });
    assert_eq!(lapic.eoi().unwrap().vector, 0x5A);
    assert_eq!(lapic.highest_pending(), Some(0x55));
    // The TPR holds back its class and all below.
    lapic.set_tpr(0x52);
    assert_eq!((lapic.ppr(), lapic.highest_pending(), lapic.tpr_threshold()), (0x52, None, Some(5)));
    lapic.set_cr8(4);
    assert_eq!((lapic.tpr(), lapic.cr8(), lapic.tpr_threshold()), (0x40, 4, None));
    assert_eq!(lapic.highest_pending(), Some(0x55));
    lapic.acknowledge(0x55);
    assert_eq!((lapic.highest_irr(), lapic.tpr_threshold()), (Some(0x31), Some(3)));
    assert_eq!(lapic.eoi().unwrap().vector, 0x55);
    assert_eq!(lapic.eoi(), None);
    // What is not pending cannot be taken.
    lapic.acknowledge(0x99);
    assert_eq!(lapic.eoi(), None);
}

#[test]
fn registers_show_irr_isr_tmr() {
    let mut lapic = enabled();
    lapic.accept(0x41, true);
    lapic.accept(0xE5, false);
    assert_eq!(read(&mut lapic, IRR + 0x20), 2);
    assert_eq!(read(&mut lapic, TMR + 0x20), 2);
    assert_eq!(read(&mut lapic, IRR + 0x70), 1 << 5);
    lapic.acknowledge(0xE5);
    assert_eq!((read(&mut lapic, IRR + 0x70), read(&mut lapic, ISR + 0x70)), (0, 1 << 5));
    assert_eq!(read(&mut lapic, PPR), 0xE0);
    assert!(lapic.is_eoi_outstanding(0xE5) && lapic.is_eoi_outstanding(0x41) && !lapic.is_eoi_outstanding(0x42));
    lapic.accept(0x41, false);
    assert_eq!(read(&mut lapic, TMR + 0x20), 0);
    assert_eq!(write(&mut lapic, EOI, 0).eoi.unwrap().vector, 0xE5);
}

#[test]
fn disabled_apics_take_nothing() {
    let mut lapic = plain();
    assert!(!lapic.accept(0x40, false));
    let mut lapic = enabled();
    lapic.accept(0x40, false);
    // Software-disabled: what is pending stays deliverable, the local vector table is masked.
    let _ = write(&mut lapic, LVT_TIMER, 0x50);
    let _ = write(&mut lapic, SVR, 0xFF);
    assert_eq!(read(&mut lapic, LVT_TIMER), LVT_MASKED | 0x50);
    let _ = write(&mut lapic, LVT_TIMER, 0x50);
    assert_eq!(read(&mut lapic, LVT_TIMER), LVT_MASKED | 0x50);
    assert!(!lapic.accept(0x41, false));
    assert_eq!(lapic.highest_pending(), Some(0x40));
    // Globally disabled: nothing, but the CPU's INTR pin is the 8259A's.
    let _ = lapic.write_base(BASE_DEFAULT, 40, false).unwrap();
    assert_eq!((lapic.highest_pending(), lapic.tpr_threshold()), (None, None));
    assert!(lapic.accepts_pic() && !lapic.card().is_present());
    assert_eq!(lapic.mmio_read(ID, 4, 0), u64::MAX);
    assert_eq!(lapic.deliver_local(Lvt::Lint0), None);
}

#[test]
fn window_access_rules() {
    let mut lapic = enabled();
    let _ = write(&mut lapic, LDR, 0xFFFF_FFFF);
    assert_eq!(read(&mut lapic, LDR), 0xFF00_0000);
    assert_eq!(lapic.mmio_read(LDR + 3, 1, 0), 0xFF);
    assert_eq!(lapic.mmio_read(LDR + 2, 2, 0), 0xFF00);
    // Across the register's end, with a wrong size, or misaligned: nothing.
    for (offset, size) in [(LDR + 2, 4), (LDR + 3, 2), (LDR + 4, 4), (LDR + 8, 1), (LDR, 8), (LDR, 3), (LDR, 0)] {
        assert_eq!(lapic.mmio_read(offset, size, 0), 0);
    }
    for (offset, size) in [(LDR, 1), (LDR, 2), (LDR, 8), (LDR + 1, 4), (LDR + 4, 4)] {
        assert_eq!(lapic.mmio_write(offset, size, 0, 0), LapicWork::default());
    }
    assert_eq!(read(&mut lapic, LDR), 0xFF00_0000);
    assert_eq!(lapic.card(), {
        let card = ApicCard::new(3, 3, 0xFF, LogicalModel::Flat);
        card.with_present(true).with_software_enabled(true)
    });
    assert!(write(&mut lapic, DFR, 0).card_changed);
    assert_eq!(read(&mut lapic, DFR), 0x0FFF_FFFF);
    assert!(write(&mut lapic, ID, 0x7700_0000).card_changed);
    assert_eq!(lapic.card().xapic_id(), 0x77);
    // No register there: the ESR says so once it is written.
    assert_eq!(read(&mut lapic, ESR), 0);
    for offset in [0x0, 0x40, 0xC0, 0x290, LVT_CMCI, 0x3A0, SELF_IPI] {
        assert_eq!(read(&mut lapic, offset), 0);
        let _ = write(&mut lapic, ESR, 0);
        assert_eq!(read(&mut lapic, ESR), ESR_ILLEGAL_REGISTER, "{offset:#x}");
        let _ = write(&mut lapic, ESR, 0);
        assert_eq!(read(&mut lapic, ESR), 0);
        let _ = write(&mut lapic, offset, 0x55);
        let _ = write(&mut lapic, ESR, 0);
        assert_eq!(read(&mut lapic, ESR), ESR_ILLEGAL_REGISTER, "{offset:#x}");
        let _ = write(&mut lapic, ESR, 0);
    }
    for offset in [0x400, 0x500, 0xFFFF_FFF0] {
        assert_eq!((read(&mut lapic, offset), write(&mut lapic, offset, 1)), (0, LapicWork::default()));
    }
    let _ = write(&mut lapic, ESR, 0);
    assert_eq!(read(&mut lapic, ESR), 0);
    // Read-only registers keep their value.
    for offset in [VERSION, PPR, ISR, TMR, IRR, TIMER_CURRENT] {
        let before = read(&mut lapic, offset);
        let _ = write(&mut lapic, offset, !0);
        assert_eq!(read(&mut lapic, offset), before);
    }
}

#[test]
fn lvt_bits() {
    let mut lapic = Lapic::new(0, false, ALL);
    let _ = write(&mut lapic, SVR, 0x100);
    let expected = [
        (LVT_TIMER, 0x7_10FF),
        (0x330, 0x1_17FF),
        (0x340, 0x1_17FF),
        (0x350, 0x1_F7FF),
        (0x360, 0x1_F7FF),
        (LVT_ERROR, 0x1_10FF),
        (LVT_CMCI, 0x1_17FF),
    ];
    for (offset, value) in expected {
        let _ = write(&mut lapic, offset, !0);
        assert_eq!(read(&mut lapic, offset), value, "{offset:#x}");
    }
    let mut lapic = Lapic::new(0, false, LapicFeatures::default());
    let _ = write(&mut lapic, SVR, 0x100);
    let _ = write(&mut lapic, LVT_TIMER, !0);
    assert_eq!(read(&mut lapic, LVT_TIMER), 0x3_10FF);
}

#[test]
fn local_interrupts() {
    let mut lapic = enabled();
    assert_eq!(lapic.deliver_local(Lvt::Lint1), None);
    for (mode, signal) in
        [(2, Some(LocalSignal::Smi)), (4, Some(LocalSignal::Nmi)), (5, Some(LocalSignal::Init)), (1, None), (3, None)]
    {
        let _ = write(&mut lapic, 0x360, mode << 8);
        assert_eq!(lapic.deliver_local(Lvt::Lint1), signal);
    }
    assert_eq!(lapic.highest_irr(), None);
    let _ = write(&mut lapic, 0x360, LVT_LEVEL | 0x61);
    assert_eq!(lapic.deliver_local(Lvt::Lint1), None);
    assert_eq!(lapic.highest_pending(), Some(0x61));
    lapic.acknowledge(0x61);
    assert!(lapic.eoi().unwrap().level);
    assert!(write(&mut lapic, 0x350, LVT_EXTINT).card_changed);
    assert!(lapic.accepts_pic());
    assert_eq!(lapic.deliver_local(Lvt::Lint0), Some(LocalSignal::ExtInt));
    let _ = write(&mut lapic, 0x350, LVT_EXTINT | LVT_MASKED);
    assert!(!lapic.accepts_pic());
}

#[test]
fn performance_interrupts_mask_themselves() {
    const LVT_PERFORMANCE: u32 = 0x340;
    let mut lapic = enabled();
    let _ = write(&mut lapic, LVT_PERFORMANCE, 0x51);
    assert_eq!(lapic.deliver_performance(), None);
    assert_eq!(lapic.highest_irr(), Some(0x51));
    assert_eq!(read(&mut lapic, LVT_PERFORMANCE), LVT_MASKED | 0x51);
    let _ = write(&mut lapic, LVT_PERFORMANCE, 4 << 8);
    assert_eq!(lapic.deliver_performance(), Some(LocalSignal::Nmi));
    assert_eq!(lapic.deliver_performance(), None);
}

#[test]
fn errors_interrupt() {
    let mut lapic = enabled();
    let _ = write(&mut lapic, LVT_ERROR, 0xFE);
    assert!(!lapic.accept(0x0F, false));
    assert_eq!(lapic.highest_pending(), Some(0xFE));
    let _ = write(&mut lapic, ICR, 0x0E);
    let _ = write(&mut lapic, ESR, 0);
    assert_eq!(read(&mut lapic, ESR), ESR_RECEIVED_ILLEGAL_VECTOR | ESR_SEND_ILLEGAL_VECTOR);
    // An error entry that itself is illegal ends there.
    let _ = write(&mut lapic, LVT_ERROR, 0x01);
    assert!(!lapic.accept(0x02, false));
    // The timer with an illegal vector is an error too.
    let _ = write(&mut lapic, LVT_TIMER, 0x05);
    let _ = write(&mut lapic, TIMER_INITIAL, 1);
    let _ = write(&mut lapic, ESR, 0);
    assert!(lapic.timer_expired(10, 0));
    let _ = write(&mut lapic, ESR, 0);
    assert_eq!(read(&mut lapic, ESR), ESR_RECEIVED_ILLEGAL_VECTOR);
}

#[test]
fn ipis() {
    let mut lapic = enabled();
    let _ = write(&mut lapic, ICR2, 0x1234_5678);
    assert_eq!(read(&mut lapic, ICR2), 0x1200_0000);
    let work = write(&mut lapic, ICR, 0x4000 | 0x1000 | 0x51);
    assert_eq!(
        work.ipi,
        Some(Message {
            dest: 0x12,
            dest_mode: DestMode::Physical,
            shorthand: Shorthand::None,
            delivery: DeliveryMode::Fixed,
            vector: 0x51,
            trigger: Trigger::Edge,
            assert: true,
            redirection_hint: false,
        })
    );
    // The busy bit never shows.
    assert_eq!(read(&mut lapic, ICR), 0x4051);
    let work = write(&mut lapic, ICR, 0xC_4D00 | 0x0C00 | 0x52);
    let ipi = work.ipi.unwrap();
    assert_eq!((ipi.shorthand, ipi.dest_mode), (Shorthand::AllButMe, DestMode::Logical));
    assert_eq!(ipi.delivery, DeliveryMode::Init);
    // INIT level de-assert, and a fixed one: nothing.
    assert_eq!(write(&mut lapic, ICR, 0x8500).ipi, None);
    assert_eq!(write(&mut lapic, ICR, 0x8060).ipi, None);
    assert!(write(&mut lapic, ICR, 0xC500).ipi.is_some());
    // A start-up vector is no interrupt vector: below 16 is fine.
    assert_eq!(write(&mut lapic, ICR, 0x4608).ipi.unwrap().vector, 8);
    assert_eq!(write(&mut lapic, ICR, 0x4008).ipi, None);
    // To itself.
    assert_eq!(write(&mut lapic, ICR, 0x4_4061).ipi, None);
    assert_eq!(lapic.highest_pending(), Some(0x61));
    assert!(write(&mut lapic, ICR, 0x4_4400).ipi.is_some());
}

#[test]
fn x2apic_msrs() {
    let mut lapic = x2apic();
    assert_eq!(lapic.read_msr(MSR + 2, 0), Ok(3));
    assert_eq!(lapic.read_msr(MSR + 0xD, 0), Ok(8));
    assert_eq!(lapic.mmio_read(ID, 4, 0), u64::MAX);
    assert_eq!(lapic.mmio_write(TPR, 4, 0x20, 0), LapicWork::default());
    assert_eq!(lapic.tpr(), 0);

    let refused_reads = [0x0, 0x4, 0x9, 0xB, 0xC, 0xE, 0x2F, 0x31, 0x3A, 0x3F, 0x40, 0xFF, 0x100];
    for register in refused_reads {
        assert_eq!(lapic.read_msr(MSR + register, 0), Err(Gp), "{register:#x}");
    }
    let refused_writes: [(u32, u64); 27] = [
        (0x2, 3),
        (0x3, 0),
        (0x4, 0),
        (0x8, 0x100),
        (0x8, 1 << 32),
        (0x9, 0),
        (0xA, 0),
        (0xB, 1),
        (0xC, 0),
        (0xD, 0),
        (0xE, 0),
        (0xF, 0x400),
        (0x10, 0),
        (0x18, 0),
        (0x20, 0),
        (0x28, 1),
        (0x2F, 0),
        (0x30, 1 << 13),
        (0x30, 1 << 16),
        (0x30, 1 << 20),
        (0x31, 0),
        (0x32, 1 << 20),
        (0x35, 1 << 11),
        (0x39, 0),
        (0x3E, 4),
        (0x3F, 0x100),
        (0x100, 0),
    ];
    for (register, value) in refused_writes {
        let before = lapic.clone();
        assert_eq!(lapic.write_msr(MSR + register, value, 0), Err(Gp), "{register:#x}");
        assert_eq!(lapic, before);
    }
    let work = lapic.write_msr(MSR + 0x30, 0x1234_5678_0000_5077, 0).unwrap();
    let ipi = work.ipi.unwrap();
    assert_eq!((ipi.dest, ipi.vector), (0x1234_5678, 0x77));
    assert_eq!(lapic.read_msr(MSR + 0x30, 0), Ok(0x1234_5678_0000_4077));
    // To itself by its ID, and by SELF IPI: no message.
    assert_eq!(lapic.write_msr(MSR + 0x30, (3 << 32) | 0x4041, 0).unwrap().ipi, None);
    assert_eq!(lapic.write_msr(MSR + 0x3F, 0x42, 0).unwrap(), LapicWork::default());
    assert_eq!(lapic.highest_pending(), Some(0x42));
    lapic.acknowledge(0x42);
    assert_eq!(lapic.write_msr(MSR + 0xB, 0, 0).unwrap().eoi.unwrap().vector, 0x42);
    assert!(lapic.write_msr(MSR + 0x28, 0, 0).is_ok());
    assert_eq!(lapic.write_msr(MSR + 8, 0xF0, 0), Ok(LapicWork::default()));
    assert_eq!(lapic.read_msr(MSR + 8, 0), Ok(0xF0));
    // Not in xAPIC mode.
    assert_eq!(enabled().read_msr(MSR + 2, 0), Err(Gp));
    assert_eq!(enabled().write_msr(MSR + 8, 0, 0), Err(Gp));
}

#[test]
fn base_transitions() {
    use super::Mode::*;
    let base = BASE_DEFAULT;
    let modes = [(Disabled, 0), (XApic, BASE_ENABLE), (X2Apic, BASE_ENABLE | BASE_X2APIC)];
    for (from, from_bits) in modes {
        for (to, to_bits) in modes {
            let mut lapic = plain();
            let _ = lapic.write_base(base | from_bits, 40, true).unwrap();
            assert_eq!(lapic.mode(), from);
            let legal = !matches!((from, to), (X2Apic, XApic) | (Disabled, X2Apic));
            assert_eq!(lapic.clone().write_base(base | to_bits, 40, false).is_ok(), legal, "{from:?} {to:?}");
            let work = lapic.write_base(base | to_bits, 40, true).unwrap();
            assert_eq!((lapic.mode(), work.card_changed), (to, from != to));
        }
        let mut lapic = plain();
        let _ = lapic.write_base(base | from_bits, 40, true).unwrap();
        for bad in
            [BASE_X2APIC, BASE_ENABLE | 1, BASE_ENABLE | (1 << 9), BASE_ENABLE | (1 << 40), BASE_ENABLE | (1 << 63)]
        {
            for by_host in [false, true] {
                assert_eq!(lapic.clone().write_base(base | bad, 40, by_host), Err(Gp));
            }
        }
    }
    let mut old = Lapic::new(0, false, LapicFeatures::default());
    assert_eq!(old.write_base(old.base() | BASE_X2APIC, 40, false), Err(Gp));
    // The window moves; the writable ID comes back with the next enable.
    let mut lapic = enabled();
    let _ = write(&mut lapic, ID, 0x5500_0000);
    let _ = lapic.write_base(0xD000_0000 | BASE_ENABLE, 40, false).unwrap();
    assert_eq!(lapic.base_gpa(), crate::arch::Gpa(0xD000_0000));
    assert_eq!(read(&mut lapic, ID), 0x5500_0000);
    let _ = lapic.write_base(0xD000_0000, 40, false).unwrap();
    let _ = lapic.write_base(0xD000_0000 | BASE_ENABLE, 52, false).unwrap();
    assert_eq!(read(&mut lapic, ID), 3 << 24);
    assert_eq!(lapic.write_base(1 << 63, 200, true).map(|work| work.card_changed), Ok(true));
}

#[test]
fn timer_interrupts() {
    let mut lapic = enabled();
    let _ = write(&mut lapic, TIMER_DIVIDE, 0xB);
    assert!(write(&mut lapic, LVT_TIMER, LVT_PERIODIC | 0x31).timer_changed);
    assert!(lapic.mmio_write(TIMER_INITIAL, 4, 1_000_000, 500).timer_changed);
    assert_eq!(lapic.deadline(), Some(Deadline::Ns(1_000_500)));
    assert_eq!(lapic.mmio_read(TIMER_CURRENT, 4, 600), 999_900);
    assert!(!lapic.timer_expired(1_000_499, 0));
    assert!(lapic.timer_expired(1_000_500, 0));
    assert_eq!(lapic.highest_pending(), Some(0x31));
    assert_eq!(lapic.deadline(), Some(Deadline::Ns(2_000_500)));
    // Masked: it runs, silently.
    lapic.acknowledge(0x31);
    let _ = write(&mut lapic, LVT_TIMER, LVT_PERIODIC | LVT_MASKED | 0x31);
    assert!(lapic.timer_expired(2_000_500, 0));
    assert_eq!(lapic.highest_irr(), None);
}

#[test]
fn tsc_deadline() {
    let mut lapic = enabled();
    assert_eq!(lapic.set_tsc_deadline(100, 50), LapicWork::default());
    assert_eq!(lapic.tsc_deadline(), 0);
    let _ = write(&mut lapic, LVT_TIMER, LVT_TSC_DEADLINE | 0x32);
    assert!(lapic.set_tsc_deadline(100, 50).timer_changed);
    assert_eq!((lapic.tsc_deadline(), lapic.deadline()), (100, Some(Deadline::GuestTsc(100))));
    assert!(!lapic.timer_expired(0, 99));
    assert!(lapic.timer_expired(0, 100));
    assert_eq!((lapic.tsc_deadline(), lapic.deadline(), lapic.highest_pending()), (0, None, Some(0x32)));
    lapic.acknowledge(0x32);
    // In the past: at once.
    let _ = lapic.set_tsc_deadline(100, 100);
    assert_eq!((lapic.tsc_deadline(), lapic.highest_irr()), (0, Some(0x32)));
    let _ = lapic.set_tsc_deadline(200, 150);
    let _ = lapic.set_tsc_deadline(0, 150);
    assert_eq!(lapic.deadline(), None);
    assert_eq!(read(&mut lapic, TIMER_CURRENT), 0);
}

#[test]
fn directed_eoi() {
    let mut lapic = Lapic::new(0, false, ALL);
    let _ = write(&mut lapic, SVR, 0x11FF);
    lapic.accept(0x41, true);
    lapic.acknowledge(0x41);
    assert_eq!(lapic.eoi(), Some(Eoi { vector: 0x41, level: true, broadcast: false }));
    let mut lapic = plain();
    let _ = write(&mut lapic, SVR, 0x11FF);
    assert_eq!(read(&mut lapic, SVR), 0x1FF);
}

#[test]
fn resets() {
    let mut lapic = x2apic();
    lapic.accept(0x41, true);
    lapic.set_tpr(0x10);
    let _ = lapic.write_msr(MSR + 0x38, 1000, 0).unwrap();
    let work = lapic.reset(Reset::Init);
    assert!(work.timer_changed && work.card_changed);
    assert_eq!((lapic.mode(), lapic.highest_irr(), lapic.deadline(), lapic.tpr()), (Mode::X2Apic, None, None, 0));
    assert!(!lapic.card().is_enabled() && lapic.card().is_present());
    let _ = lapic.reset(Reset::PowerOn);
    assert_eq!(lapic, plain());
}

#[test]
fn state_layout() {
    let mut lapic = enabled();
    let _ = write(&mut lapic, ICR2, 0x0200_0000);
    let _ = write(&mut lapic, ICR, 0x4041);
    lapic.accept(0x41, true);
    lapic.set_tpr(0x20);
    let state = lapic.save(0, false);
    let at = |offset: usize| u32::from_le_bytes(state[offset..offset + 4].try_into().unwrap());
    let expected = [
        (0x20, 3 << 24),
        (0x30, 0x5_0014),
        (0x80, 0x20),
        (0xA0, 0x20),
        (0xE0, !0),
        (0xF0, 0x1FF),
        (0x1A0, 2),
        (0x220, 2),
        (0x300, 0x4041),
        (0x310, 0x0200_0000),
        (0x320, LVT_MASKED),
    ];
    for (offset, value) in expected {
        assert_eq!(at(offset), value, "{offset:#x}");
    }
}

#[test]
fn state_ids_in_x2apic_mode() {
    let mut lapic = x2apic();
    let narrow = lapic.save(0, false);
    let mut wide = lapic.save(0, true);
    assert_eq!((narrow[0x23], narrow[0x20]), (3, 0));
    assert_eq!((wide[0x23], wide[0x20]), (0, 3));
    assert_eq!(wide[0xD0], 8);
    assert!(lapic.restore(&wide, 0, true).is_ok());
    wide[0x20] = 4;
    let before = lapic.clone();
    assert_eq!(lapic.restore(&wide, 0, true), Err(StateError));
    assert_eq!(lapic, before);
    assert!(lapic.restore(&wide, 0, false).is_ok());
    assert_eq!(lapic.read_msr(MSR + 2, 0), Ok(3));
}

#[test]
fn restore_continues_the_timer() {
    let mut lapic = enabled();
    let _ = write(&mut lapic, LVT_TIMER, LVT_PERIODIC | 0x31);
    let _ = lapic.mmio_write(TIMER_INITIAL, 4, 1_000_000, 0);
    let state = lapic.save(500_000, false);
    let mut copy = plain();
    let _ = copy.restore(&state, 9_000_000, false).unwrap();
    assert_eq!(copy.deadline(), Some(Deadline::Ns(9_000_000 + 1_500_000)));
    assert!(copy.timer_expired(10_500_000, 0));
    assert_eq!(copy.deadline(), Some(Deadline::Ns(12_500_000)));
    // More left than there was: the whole count.
    let mut state = state;
    state[0x390..0x394].copy_from_slice(&[0xFF; 4]);
    let _ = copy.restore(&state, 0, false).unwrap();
    assert_eq!(copy.deadline(), Some(Deadline::Ns(2_000_000)));
    // A finished one-shot timer fires again, as in KVM.
    state[0x322] = 0;
    state[0x390..0x394].fill(0);
    let _ = copy.restore(&state, 77, false).unwrap();
    assert_eq!(copy.deadline(), Some(Deadline::Ns(77)));
}

#[test]
fn restore_survives_any_bytes() {
    let mut random = Random(3);
    for _ in 0..2_000 {
        let mut state = [0u8; STATE_BYTES];
        state.iter_mut().for_each(|byte| *byte = random.next() as u8);
        let mut lapic = if random.flip() { x2apic() } else { plain() };
        let now = random.wide();
        let _ = lapic.restore(&state, now, false).unwrap();
        check(&lapic);
        // What was kept is kept again.
        let kept = lapic.save(now, false);
        let mut copy = lapic.clone();
        let _ = copy.restore(&kept, now, false).unwrap();
        assert_eq!(copy.save(now, false)[..0x380], kept[..0x380]);
        check(&copy);
    }
}

/// What always holds.
fn check(lapic: &Lapic) {
    assert_eq!(lapic.highest_irr, lapic.irr.highest());
    assert_eq!(lapic.highest_isr, lapic.isr.highest());
    let class = lapic.highest_isr & 0xF0;
    assert_eq!(lapic.ppr, if lapic.tpr & 0xF0 >= class { lapic.tpr } else { class });
    assert_eq!(lapic.icr & ICR_BUSY, 0);
    if !lapic.is_software_enabled() {
        // A restored state may say otherwise of the entries, but not of what comes in.
        assert!(!lapic.clone().accept(0x77, false));
    }
    if let Some(vector) = lapic.highest_pending() {
        assert!(lapic.irr.test(vector) && vector & 0xF0 > lapic.ppr);
    }
    if lapic.mode() == Mode::Disabled {
        assert!(lapic.accepts_pic() && lapic.highest_pending().is_none());
    }
    assert_eq!(lapic.card().is_present(), lapic.base() & BASE_ENABLE != 0);
}

#[test]
fn random_actions() {
    let mut random = Random(42);
    for round in 0..300 {
        let features = LapicFeatures {
            x2apic: random.below(4) != 0,
            tsc_deadline: random.flip(),
            directed_eoi: random.flip(),
            cmci: random.flip(),
        };
        let mut lapic = Lapic::new(random.below(5000) as u32, random.flip(), features);
        let inbox = Inbox::new();
        let mut now = random.wide() >> 1;
        let _ = lapic.mmio_write(SVR, 4, 0x1FF, now);
        for _ in 0..1_000 {
            now = now.saturating_add(random.wide() >> 30);
            let before = (lapic.card(), lapic.deadline());
            let mut work = LapicWork::default();
            let offset = match random.below(3) {
                0 => random.wide() as u32,
                _ => (random.below(0x42) as u32) << 4,
            };
            match random.below(16) {
                0..=2 => work = lapic.mmio_write(offset, [4, 4, 4, 1, 8][random.below(5) as usize], random.wide(), now),
                3 => {
                    let size = random.below(10) as u8;
                    let value = lapic.mmio_read(offset, size, now);
                    if lapic.mode() == Mode::XApic && size < 8 {
                        assert_eq!(value >> (8 * size), 0);
                    }
                }
                4..=5 => {
                    let msr = MSR + (offset >> 4);
                    let value = if random.flip() { random.wide() } else { random.below(0x100) };
                    let copy = lapic.clone();
                    match lapic.write_msr(msr, value, now) {
                        Ok(done) => work = done,
                        Err(Gp) => assert_eq!(lapic, copy),
                    }
                }
                6 => {
                    let _ = lapic.read_msr(MSR + (offset >> 4), now);
                }
                7 => {
                    lapic.accept(random.next() as u8, random.flip());
                }
                8..=9 => {
                    inbox.post_fixed(random.next() as u8, Trigger::from_level(random.flip()));
                    if random.flip() {
                        inbox.drain(&mut lapic);
                    }
                }
                10 => {
                    if let Some(vector) = lapic.highest_pending() {
                        let ppr = lapic.ppr();
                        lapic.acknowledge(vector);
                        assert!(lapic.ppr() > ppr && lapic.isr.test(vector) && !lapic.irr.test(vector));
                    }
                }
                11 => {
                    let in_service = lapic.highest_isr;
                    assert_eq!(lapic.eoi().map_or(0, |eoi| eoi.vector), in_service);
                }
                12 => {
                    let bits = [0, BASE_ENABLE, BASE_X2APIC, BASE_ENABLE | BASE_X2APIC][random.below(4) as usize];
                    let value = BASE_DEFAULT | bits | if random.below(4) == 0 { random.wide() } else { 0 };
                    work = lapic.write_base(value, 48, random.below(4) == 0).unwrap_or_default();
                }
                13 => {
                    work.timer_changed = lapic.timer_expired(now, now);
                    if let Some(Deadline::Ns(due)) = lapic.deadline() {
                        assert!(due > now || due == u64::MAX || now == u64::MAX, "{due} {now}");
                    }
                }
                14 => work = lapic.set_tsc_deadline(random.wide(), now),
                _ => {
                    lapic.deliver_local(Lvt::ALL[random.below(7) as usize]);
                    match random.below(20) {
                        0 => work = lapic.reset(if random.flip() { Reset::Init } else { Reset::PowerOn }),
                        1..4 => work = lapic.mmio_write(SVR, 4, 0x1FF, now),
                        4..7 => work = lapic.write_msr(MSR + 0xF, 0x1FF, now).unwrap_or_default(),
                        _ => {}
                    }
                    lapic.set_tpr(random.next() as u8);
                }
            }
            assert!(work.card_changed || before.0 == lapic.card());
            assert!(work.timer_changed || before.1 == lapic.deadline());
            check(&lapic);
        }
        // A copy made from the saved state is the same, as far as the state goes.
        let wide = round % 2 == 0;
        lapic.timer_expired(now, now);
        let state = lapic.save(now, wide);
        let mut copy = Lapic::new(lapic.id, lapic.is_bsp, features);
        let _ = copy.write_base(lapic.base(), 64, true).unwrap();
        let _ = copy.restore(&state, now, wide).unwrap();
        check(&copy);
        let same = if lapic.timer.current(now) == 0 { 0x390 } else { STATE_BYTES };
        assert_eq!(copy.save(now, wide)[..same], state[..same]);
        assert_eq!((copy.highest_pending(), copy.ppr()), (lapic.highest_pending(), lapic.ppr()));
        if lapic.mode() != Mode::X2Apic {
            assert_eq!(copy.card(), lapic.card());
        }
    }
}
