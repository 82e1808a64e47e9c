// SPDX-License-Identifier: GPL-2.0
//! What a local APIC has to tell userspace: the end of an interrupt that userspace's I/O APIC sent (KVM_CAP_SPLIT_IRQCHIP),
//! accesses to the task priority (KVM_TPR_ACCESS_REPORTING), and the page in which a 32-bit guest keeps its task priority
//! (KVM_SET_VAPIC_ADDR), so that it need not exit to change it.
#![forbid(unsafe_code)]

use crate::{
    arch::Gpa,
    exits::ToUser,
    mmu::guest_mem::GuestMem,
    vcpu::{request, State},
    vendor::Vendor,
    vm::Vm,
};

/// Offset of the task priority register in the local APIC's window.
const TASK_PRIORITY: u32 = 0x80;

/// What waits for userspace, and what userspace asked for.
#[derive(Default)]
pub(crate) struct LocalApicUser {
    /// The guest ended this interrupt, which came from an I/O APIC in userspace.
    ended: Option<u8>,
    /// RIP, and whether it was a write.
    task_priority_access: Option<(u64, bool)>,
    pub(crate) report_task_priority: bool,
    /// Where the guest's shared word is.
    pub(crate) shared_word: Option<Gpa>,
}

impl LocalApicUser {
    /// The next thing for userspace.
    pub(crate) fn take(&mut self) -> Option<ToUser> {
        if let Some(vector) = self.ended.take() {
            return Some(ToUser::IoapicEoi { vector });
        }
        self.task_priority_access.take().map(|(rip, write)| ToUser::TprAccess { rip, write })
    }
}

impl<V: Vendor> State<V> {
    /// Something is for process context before the next entry.
    pub(crate) fn leave_inner_ring(&self, vm: &Vm<V>) {
        if let Some(peer) = vm.peers.get(self.index) {
            peer.kick.post_quietly(request::TO_USER);
        }
    }

    /// The guest ended `vector`, which belongs to userspace's I/O APIC.
    pub(crate) fn interrupt_ended(&mut self, vm: &Vm<V>, vector: u8) {
        self.apic_user.ended = Some(vector);
        self.leave_inner_ring(vm);
    }

    /// An access to a register of the local APIC in memory.
    pub(crate) fn lapic_accessed(&mut self, vm: &Vm<V>, offset: u32, write: bool) {
        if self.apic_user.report_task_priority && offset == TASK_PRIORITY {
            self.apic_user.task_priority_access = Some((self.regs.rip, write));
            self.leave_inner_ring(vm);
        }
    }

    /// Shows the guest its task priority (bits 7:0), the priority in service (15:8) and what waits (31:24).
    pub(crate) fn fill_shared_word(&self, vm: &Vm<V>) {
        if let (Some(at), Some(lapic)) = (self.apic_user.shared_word, &self.lapic) {
            let in_service = lapic.highest_isr().unwrap_or(0) & 0xF0;
            let word = [lapic.tpr(), in_service, 0, lapic.highest_irr().unwrap_or(0)];
            // A guest that took the memory away misses it.
            let _ = vm.memory.view(true).write(at, &word);
        }
    }

    /// Takes the task priority that the guest left.
    pub(crate) fn take_shared_word(&mut self, vm: &Vm<V>) {
        if let (Some(at), Some(lapic)) = (self.apic_user.shared_word, &mut self.lapic) {
            if let Ok(word) = vm.memory.view(true).read_u32(at) {
                lapic.set_tpr(word as u8);
            }
        }
    }
}
