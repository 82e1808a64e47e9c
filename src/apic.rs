// SPDX-License-Identifier: GPL-2.0
//! Who delivers a guest's interrupts: the software's local APIC, or the CPU, where it can.
//!
//! Outside of the inner ring everything is in the software's APIC. Within it the CPU may have IRR, ISR and TPR: they are handed over before
//! an entry and taken back when the ring ends, so whoever looks at the APIC in process context finds the truth. What comes in the ring, from
//! the inbox or the timer, gathers in the software's IRR and is added to the CPU's before the next entry.
#![forbid(unsafe_code)]

use crate::{
    emulation::write_time,
    glue::cpu::IrqsOff,
    irqchip::lapic::Mode,
    vcpu::State,
    vendor::{Vendor, VendorVcpu},
    vm::Vm,
};

/// What the CPU does for a vCPU's local APIC.
#[derive(Clone, Copy, Default)]
pub(crate) struct CpuDelivery {
    /// It delivers, as long as the APIC stays in its mode.
    chosen: bool,
    /// It has the interrupts now.
    has_them: bool,
}

impl<V: Vendor> State<V> {
    /// In process context, before the inner ring: the APIC may have got another mode.
    #[inline]
    pub(crate) fn choose_delivery(&mut self, vm: &Vm<V>) {
        if !V::Vcpu::DELIVERS {
            return;
        }
        // A guest with a shared word changes its task priority there.
        let by_software = self.debug.blocks_interrupts() || self.apic_user.shared_word.is_some();
        let apic = self.lapic.as_deref().filter(|_| !by_software);
        self.delivery.chosen = self.hw.choose_delivery(apic);
        if !self.hw.uses_apic_page() {
            vm.memory.forbid_apic_page();
        }
    }

    /// Before an entry: the CPU gets what it is to deliver. Whether it is the one who delivers.
    #[inline]
    pub(crate) fn hand_over(&mut self, irqs: &IrqsOff) -> bool {
        if !V::Vcpu::DELIVERS || !self.delivery.chosen {
            return false;
        }
        let all = !self.delivery.has_them;
        if all || self.lapic.as_ref().is_some_and(|lapic| lapic.has_news()) {
            self.hand_over_now(all, irqs);
        }
        true
    }

    #[inline(never)]
    fn hand_over_now(&mut self, all: bool, irqs: &IrqsOff) {
        self.await_deadline();
        if let Some(lapic) = &mut self.lapic {
            self.delivery.has_them = true;
            self.cr8 = lapic.cr8();
            self.hw.hand_over(lapic, all, irqs);
        }
    }

    /// Whether the CPU has what is in service.
    #[inline]
    pub(crate) fn cpu_delivers(&self) -> bool {
        V::Vcpu::DELIVERS && self.delivery.has_them
    }

    /// The software's APIC is to have everything.
    #[inline]
    pub(crate) fn take_back(&mut self) {
        if !V::Vcpu::DELIVERS || !core::mem::take(&mut self.delivery.has_them) {
            return;
        }
        if let Some(lapic) = &mut self.lapic {
            self.hw.take_back(lapic);
        }
    }

    /// The software's APIC has been reset: what the CPU has is worth nothing.
    pub(crate) fn forget_handed_over(&mut self) {
        self.delivery.has_them = false;
    }

    /// The guest wrote to a register of its APIC, in the CPU's image of it.
    pub(crate) fn handle_apic_write(&mut self, vm: &Vm<V>, offset: u32, value: u64) {
        let Some(lapic) = &mut self.lapic else { return };
        let work = lapic.image_written(offset, value, write_time(offset));
        let in_memory = lapic.mode() == Mode::XApic;
        self.lapic_work(vm, work);
        if in_memory {
            self.lapic_accessed(vm, offset, true);
        }
    }

    /// The CPU ended an interrupt that somebody wants to hear of.
    pub(crate) fn handle_end_of_interrupt(&mut self, vm: &Vm<V>, vector: u8) {
        let Some(lapic) = &self.lapic else { return };
        let eoi = lapic.ended(vector);
        if vm.irq.eoi(eoi) {
            self.interrupt_ended(vm, eoi.vector);
        }
    }
}
