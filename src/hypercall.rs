// SPDX-License-Identifier: GPL-2.0
//! KVM's hypercalls, and the hypercall instruction of the other vendor. Linux "Documentation/virt/kvm/x86/hypercalls.rst".
//!
//! Not supported: KVM_HC_CLOCK_PAIRING, KVM_HC_MAP_GPA_RANGE. SCHED_YIELD is a hint, and taken as one.
#![forbid(unsafe_code)]

use crate::{
    abi::vm::KVM_X86_QUIRK_FIX_HYPERCALL_INSN,
    arch::{cpuid::kvm_eax, segment::SegmentName, Gva},
    emul::{Intercepted, Mode},
    exits::NotNow,
    guest::{Exception, Gpr},
    irqchip::{
        message::{DeliveryMode, DestMode, Shorthand, Trigger},
        Message,
    },
    mmu::{guest_mem::GuestMem, walk},
    vcpu::{request, State},
    vendor::{Vendor, VendorVcpu},
    vm::Vm,
};

/// `linux/kvm_para.h`.
mod number {
    pub(super) const VAPIC_POLL_IRQ: u64 = 1;
    pub(super) const KICK_CPU: u64 = 5;
    pub(super) const SEND_IPI: u64 = 10;
    pub(super) const SCHED_YIELD: u64 = 11;
}

/// `KVM_ENOSYS`, `EPERM` and `EINVAL` as a guest sees them.
const ENOSYS: u64 = -1000i64 as u64;
const EPERM: u64 = -1i64 as u64;
const EINVAL: u64 = -22i64 as u64;

/// VMCALL of Intel and VMMCALL of AMD: three bytes each.
const HYPERCALLS: [[u8; 3]; 2] = [[0x0F, 0x01, 0xC1], [0x0F, 0x01, 0xD9]];

impl<V: Vendor> State<V> {
    /// VMCALL or VMMCALL: a number and four arguments in, a result in RAX.
    pub(crate) fn handle_hypercall(&mut self, vm: &Vm<V>, may_sleep: bool) -> Result<(), NotNow> {
        self.skip(vm, Intercepted::Hypercall, may_sleep)?;
        let long = self.mode() == Mode::Long64;
        let mask = if long { u64::MAX } else { u32::MAX.into() };
        let result = match self.hw.cpl() {
            0 => {
                let arguments = [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx, Gpr::Rsi].map(|register| self.gpr(register) & mask);
                self.hypercall(vm, self.gpr(Gpr::Rax) & mask, arguments, if long { 64 } else { 32 })
            }
            _ => EPERM,
        };
        self.set_gpr(Gpr::Rax, result & mask);
        Ok(())
    }

    fn hypercall(&self, vm: &Vm<V>, number: u64, arguments: [u64; 4], word_bits: u32) -> u64 {
        let offered = vm.host.msr_config.pv_features & self.pv_features;
        let has = |feature| offered & feature != 0;
        match number {
            number::VAPIC_POLL_IRQ => 0,
            number::KICK_CPU if has(kvm_eax::PV_UNHALT) => {
                if let Some(peer) = vm.peers.iter().find(|peer| u64::from(peer.id) == arguments[1]) {
                    peer.kick.post(request::UNHALT);
                }
                0
            }
            number::SEND_IPI if has(kvm_eax::PV_SEND_IPI) => send_ipi(vm, arguments, word_bits),
            number::SCHED_YIELD if has(kvm_eax::PV_SCHED_YIELD) => 0,
            _ => ENOSYS,
        }
    }

    /// #UD: the hypercall of the other vendor becomes this one's, unless userspace turned that off. The guest runs it again.
    pub(crate) fn handle_undefined(&mut self, vm: &Vm<V>) {
        let view = vm.memory.view(true);
        let mode = self.mode();
        let (bytes, len) = self.fetch(&view, mode);
        let found = HYPERCALLS.iter().find(|code| len >= 3 && bytes[..3] == **code);
        let foreign = found.is_some_and(|code| *code != V::HYPERCALL);
        if !foreign || !vm.enabled.has_quirk(KVM_X86_QUIRK_FIX_HYPERCALL_INSN) {
            self.events.raise(Exception::UD);
            return;
        }
        let base = if mode == Mode::Long64 { 0 } else { self.hw.segment(SegmentName::Cs as usize).base };
        let context = self.walk_context(0);
        for (byte, at) in V::HYPERCALL.iter().zip(0..) {
            let at = Gva(base.wrapping_add(self.regs.rip).wrapping_add(at));
            match walk::walk(&view, &context, at, walk::Access::WRITE) {
                Ok(found) => {
                    if view.write(found.gpa, &[*byte]).is_err() {
                        self.events.raise(Exception::UD);
                        return;
                    }
                }
                Err(walk::WalkError::Fault(exception)) => return self.events.raise(exception),
                Err(_) => return self.events.raise(Exception::UD),
            }
        }
    }
}

/// KVM_HC_SEND_IPI: a bit map of CPUs from an APIC ID on, and the low word of an ICR. Returns how many took it.
fn send_ipi<V: Vendor>(vm: &Vm<V>, [low, high, first, icr]: [u64; 4], word_bits: u32) -> u64 {
    /// Destination mode and shorthand: not in this call.
    const ICR_DESTINATION: u64 = 1 << 11 | 3 << 18;
    if icr & ICR_DESTINATION != 0 {
        return EINVAL;
    }
    let message = Message {
        dest: 0,
        dest_mode: DestMode::Physical,
        shorthand: Shorthand::None,
        delivery: DeliveryMode::from_bits((icr >> 8) as u32),
        vector: icr as u8,
        trigger: Trigger::from_level(icr & 1 << 15 != 0),
        assert: icr & 1 << 14 != 0,
        redirection_hint: false,
    };
    if message.is_deassert() || message.delivery.is_vectored() && message.vector < 16 {
        return 0;
    }
    let mut taken = 0u64;
    for (index, peer) in vm.peers.iter().enumerate() {
        let bit = u64::from(peer.id).wrapping_sub(first);
        let word = match bit {
            bit if bit < u64::from(word_bits) => low >> bit,
            bit if bit < 2 * u64::from(word_bits) => high >> (bit - u64::from(word_bits)),
            _ => 0,
        };
        if word & 1 != 0 && vm.peers.deliver_to(index, &message) {
            taken = taken.wrapping_add(1);
        }
    }
    taken
}
