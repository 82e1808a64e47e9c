// SPDX-License-Identifier: GPL-2.0
//! Handing the interrupts of an APIC to a CPU that delivers them to the guest itself, and taking them back. SDM "APIC Virtualization and
//! Virtual Interrupts".
//!
//! While a CPU has them, what it works on is the truth; everything else of the APIC stays here.
#![forbid(unsafe_code)]

use super::{regs, Lapic};
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

    /// Takes back what the CPU made of it.
    pub fn set_delivery(&mut self, delivery: &Delivery) {
        self.irr = delivery.irr;
        self.isr = delivery.isr;
        self.highest_irr = self.irr.highest();
        self.highest_isr = self.isr.highest();
        self.set_tpr(delivery.tpr);
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
        for index in 0..4 {
            *vectors.word_mut(index) &= self.irr.words()[index] | self.isr.words()[index];
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
        theirs.set_delivery(&delivery);
        let ended = theirs.ended(0xEF);
        assert_eq!(ours.eoi(), Some(ended));
        ours.acknowledge(0x84);
        ours.set_tpr(0x50);
        assert_eq!(ours, theirs);
        assert_eq!(theirs.highest_in_service(), Some(0x84));
        assert_eq!(theirs.highest_pending(), None, "0x53 is below the priority of what is in service");
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
        lapic.set_delivery(&delivery);
        assert_eq!((lapic.highest_pending(), lapic.highest_in_service(), lapic.ppr()), (None, None, 0));
    }
}
