// SPDX-License-Identifier: GPL-2.0
//! Handing the interrupts of an APIC to a CPU that delivers them to the guest itself, and taking them back. SDM "APIC Virtualization and
//! Virtual Interrupts".
//!
//! While a CPU has them, what it works on is the truth for IRR, ISR and TPR; everything else of the APIC stays here. What becomes pending
//! meanwhile gathers in the IRR here, until it is handed over, too. In xAPIC mode the guest reads the other registers from the CPU's image
//! of them, and the CPU writes the ICR there.
#![forbid(unsafe_code)]

use super::{regs, Lapic, Lvt};
use crate::irqchip::Bits256;

/// What a CPU needs to deliver interrupts, and changes by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// Pending.
    pub irr: Bits256,
    /// In service.
    pub isr: Bits256,
    pub tpr: u8,
}

impl Lapic {
    /// What the CPU is to work on.
    pub const fn delivery(&self) -> Delivery {
        Delivery { irr: self.irr, isr: self.isr, tpr: self.tpr }
    }

    /// The CPU has what [`delivery`](Self::delivery) said: nothing is pending here any more.
    #[inline]
    pub fn handed_over(&mut self) {
        self.irr = Bits256::EMPTY;
        self.highest_irr = 0;
    }

    /// What became pending while the CPU had the rest: it gets these, too. And those of them that are level-triggered.
    #[inline]
    pub fn take_pending(&mut self) -> (Bits256, Bits256) {
        let levels = self.level_vectors();
        let pending = self.irr;
        self.handed_over();
        (pending, levels)
    }

    /// Takes back what the CPU made of it, beside what became pending here meanwhile.
    pub fn take_back(&mut self, delivery: &Delivery) {
        for (index, word) in delivery.irr.words().into_iter().enumerate() {
            *self.irr.word_mut(index) |= word;
        }
        self.isr = delivery.isr;
        self.highest_irr = self.irr.highest();
        self.highest_isr = self.isr.highest();
        self.set_tpr(delivery.tpr);
    }

    /// Whether there is something for a CPU that has the interrupts.
    #[inline]
    pub const fn has_news(&self) -> bool {
        self.highest_irr != 0 || self.image_stale
    }

    /// Whether a register was written that the CPU's image holds, since the last call.
    #[inline]
    pub fn take_image_stale(&mut self) -> bool {
        core::mem::take(&mut self.image_stale)
    }

    /// The ICR as the guest left it in the CPU's image.
    pub fn set_icr(&mut self, low: u32, high: u32) {
        self.icr = (u64::from(high & 0xFF00_0000) << 32 | u64::from(low)) & !regs::ICR_BUSY;
    }

    /// Those registers of an image of the APIC in xAPIC mode that [`Delivery::store`] does not write, and that the guest reads there.
    pub fn store_image(&self, mut store: impl FnMut(u32, u32)) {
        store(regs::ID, self.id_register());
        store(regs::VERSION, self.version());
        store(regs::LDR, self.ldr_register());
        store(regs::DFR, self.dfr);
        store(regs::SVR, self.svr);
        store(regs::ESR, self.esr);
        store(regs::ICR, self.icr as u32);
        store(regs::ICR2, (self.icr >> 32) as u32);
        for lvt in Lvt::ALL {
            if lvt != Lvt::Cmci {
                store(lvt.offset(), self.lvt[lvt as usize & 7]);
            }
        }
        store(regs::TIMER_INITIAL, self.timer.initial());
        store(regs::TIMER_DIVIDE, self.divide);
    }

    /// The trigger mode register, to an image of the APIC.
    pub fn store_trigger_modes(&self, mut store: impl FnMut(u32, u32)) {
        for index in 0..8u32 {
            store(regs::TMR + 0x10 * index, self.tmr.dword(index as usize));
        }
    }

    /// The highest vector in service.
    #[inline]
    pub const fn highest_in_service(&self) -> Option<u8> {
        match self.highest_isr {
            0 => None,
            vector => Some(vector),
        }
    }

    /// The vectors, pending or in service, that came as level-triggered interrupts: their EOI has a listener, whatever the I/O APIC says
    /// by now.
    pub fn level_vectors(&self) -> Bits256 {
        let mut vectors = self.tmr;
        for (index, (pending, in_service)) in self.irr.words().into_iter().zip(self.isr.words()).enumerate() {
            *vectors.word_mut(index) &= pending | in_service;
        }
        vectors
    }

    /// The vector of the interrupt that the CPU ended (it exits for those whose EOI has a listener): what must be told to whom. The CPU
    /// has taken it out of service already.
    pub const fn ended(&self, vector: u8) -> crate::irqchip::Eoi {
        crate::irqchip::Eoi { vector, level: self.tmr.test(vector), broadcast: !self.suppresses_broadcast() }
    }
}

impl Delivery {
    /// Writes the registers to an image of the APIC: `store` gets the offset of each dword.
    pub fn store(&self, mut store: impl FnMut(u32, u32)) {
        for index in 0..8u32 {
            store(regs::ISR + 0x10 * index, self.isr.dword(index as usize));
            store(regs::IRR + 0x10 * index, self.irr.dword(index as usize));
        }
        store(regs::TPR, self.tpr.into());
    }

    /// Reads the registers from an image of the APIC.
    pub fn load(load: impl Fn(u32) -> u32) -> Self {
        let mut delivery = Self { tpr: load(regs::TPR) as u8, ..Self::default() };
        for index in 0..8u32 {
            delivery.isr.set_dword(index as usize, load(regs::ISR + 0x10 * index));
            delivery.irr.set_dword(index as usize, load(regs::IRR + 0x10 * index));
        }
        delivery
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irqchip::lapic::LapicFeatures;
    use std::collections::BTreeMap;

    fn lapic() -> Lapic {
        let mut lapic = Lapic::new(0, true, LapicFeatures::default());
        let _ = lapic.mmio_write(regs::SVR, 4, 0x1FF, 0);
        for (vector, level) in [(0x31, false), (0x52, true), (0x53, false), (0x84, true), (0xEF, false)] {
            assert!(lapic.accept(vector, level));
        }
        lapic.acknowledge(0xEF);
        lapic
    }

    #[test]
    fn an_image_holds_it_all() {
        let mut image = BTreeMap::new();
        let delivery = lapic().delivery();
        delivery.store(|offset, value| {
            image.insert(offset, value);
        });
        assert_eq!(image.len(), 17);
        // The same as KVM_GET_LAPIC's, which has the same layout.
        let state = lapic().save(0, true);
        for (offset, value) in &image {
            let at = *offset as usize;
            assert_eq!(state[at..at + 4], value.to_le_bytes(), "{offset:#x}");
        }
        assert_eq!(Delivery::load(|offset| image[&offset]), delivery);
    }

    #[test]
    fn what_the_cpu_does_and_what_we_do_agree() {
        let mut ours = lapic();
        let mut theirs = ours.clone();
        // The CPU ends one, delivers the next, and the guest masks some.
        let mut delivery = theirs.delivery();
        delivery.isr.clear(0xEF);
        delivery.irr.clear(0x84);
        delivery.isr.set(0x84);
        delivery.tpr = 0x50;
        theirs.handed_over();
        theirs.take_back(&delivery);
        let ended = theirs.ended(0xEF);
        assert_eq!(ours.eoi(), Some(ended));
        ours.acknowledge(0x84);
        ours.set_tpr(0x50);
        assert_eq!(ours, theirs);
        assert_eq!(theirs.highest_in_service(), Some(0x84));
        assert_eq!(theirs.highest_pending(), None, "0x53 is below the priority of what is in service");
    }

    #[test]
    fn what_comes_meanwhile_is_not_lost() {
        let mut lapic = lapic();
        let delivery = lapic.delivery();
        lapic.handed_over();
        assert!(lapic.take_image_stale());
        assert!(!lapic.has_news() && lapic.highest_pending().is_none());
        assert!(lapic.accept(0x99, true) && lapic.accept(0x42, false));
        assert!(lapic.has_news());
        let mut twin = lapic.clone();
        let (pending, levels) = lapic.take_pending();
        assert!(pending.test(0x99) && pending.test(0x42) && !pending.test(0x31) && !lapic.has_news());
        assert!(levels.test(0x99) && !levels.test(0x42));
        // Not handed over before all of it comes back.
        twin.take_back(&delivery);
        assert!([0x31, 0x42, 0x52, 0x53, 0x84, 0x99].into_iter().all(|vector| twin.is_eoi_outstanding(vector)));
        assert_eq!(twin.highest_irr(), Some(0x99));
    }

    #[test]
    fn the_image_is_what_the_guest_would_read() {
        let mut lapic = lapic();
        for (offset, value) in [(regs::ICR2, 0x0300_0000), (regs::LDR, 0x0200_0000), (0x320, 0x2_0040), (0x380, 77)] {
            let _ = lapic.mmio_write(offset, 4, value, 0);
        }
        assert!(lapic.take_image_stale() && !lapic.take_image_stale());
        let mut image = BTreeMap::new();
        lapic.store_image(|offset, value| assert!(image.insert(offset, value).is_none()));
        lapic.store_trigger_modes(|offset, value| assert!(image.insert(offset, value).is_none()));
        lapic.delivery().store(|offset, value| assert!(image.insert(offset, value).is_none()));
        for (offset, value) in image {
            assert_eq!(lapic.mmio_read(offset, 4, 0), value.into(), "{offset:#x}");
        }
        // Ending an interrupt and the priority are the CPU's.
        let _ = (lapic.mmio_write(regs::EOI, 4, 0, 0), lapic.mmio_write(regs::TPR, 4, 0x20, 0));
        assert!(!lapic.take_image_stale());
        lapic.set_icr(0x1_4031, 0xFF12_3456);
        assert_eq!((lapic.mmio_read(regs::ICR, 4, 0), lapic.mmio_read(regs::ICR2, 4, 0)), (0x1_4031, 0xFF00_0000));
    }

    #[test]
    fn level_interrupts_are_remembered_until_they_end() {
        let mut lapic = lapic();
        let vectors = lapic.level_vectors();
        assert!(vectors.test(0x52) && vectors.test(0x84) && !vectors.test(0x53) && !vectors.test(0xEF));
        let _ = lapic.eoi();
        lapic.acknowledge(0x84);
        assert!(lapic.level_vectors().test(0x84), "in service");
        assert!(lapic.eoi().unwrap().level);
        assert!(!lapic.level_vectors().test(0x84));
    }

    #[test]
    fn illegal_vectors_are_never_delivered() {
        let mut lapic = lapic();
        let mut delivery = Delivery::default();
        (0..16).for_each(|vector| delivery.irr.set(vector));
        lapic.handed_over();
        lapic.take_back(&delivery);
        assert_eq!((lapic.highest_pending(), lapic.highest_in_service(), lapic.ppr()), (None, None, 0));
    }
}
