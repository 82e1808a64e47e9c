// SPDX-License-Identifier: GPL-2.0
//! GSI routing tables.

use crate::ioctls::*;
use crate::kvm::*;
use crate::sys::Result;
use crate::vm::Vm;

/// `struct kvm_irq_routing` with room for 8 entries.
#[repr(C)]
#[derive(Clone)]
pub struct Routing {
    pub nr: u32,
    pub flags: u32,
    pub entries: [kvm_irq_routing_entry; 8],
}

impl Default for Routing {
    fn default() -> Self {
        Self::new()
    }
}

impl Routing {
    pub fn new() -> Routing {
        Routing { nr: 0, flags: 0, entries: [kvm_irq_routing_entry::default(); 8] }
    }

    pub fn msi(mut self, gsi: u32, address: u64, data: u32) -> Routing {
        let e = &mut self.entries[self.nr as usize];
        e.gsi = gsi;
        e.type_ = KVM_IRQ_ROUTING_MSI;
        e.u.msi = kvm_irq_routing_msi { address_lo: address as u32, address_hi: 0, data, ..Default::default() };
        self.nr += 1;
        self
    }

    pub fn chip(mut self, gsi: u32, irqchip: u32, pin: u32) -> Routing {
        let e = &mut self.entries[self.nr as usize];
        e.gsi = gsi;
        e.type_ = KVM_IRQ_ROUTING_IRQCHIP;
        e.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        self.nr += 1;
        self
    }

    pub fn set(&self, vm: &Vm) -> Result<i32> {
        vm.set(KVM_SET_GSI_ROUTING, self)
    }
}
