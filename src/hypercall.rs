// SPDX-License-Identifier: GPL-2.0
//! KVM's hypercalls, and the hypercall instruction of the other vendor. Linux "Documentation/virt/kvm/x86/hypercalls.rst".
//!
//! MAP_GPA_RANGE is userspace's to answer, where it asked for that. SCHED_YIELD is a hint, and taken as one.
#![forbid(unsafe_code)]

use crate::{
    abi::{
        pvclock::KvmClockPairing, run::KVM_HC_MAP_GPA_RANGE, vm::KVM_X86_QUIRK_FIX_HYPERCALL_INSN, FromZeros, IntoBytes,
    },
    arch::{cpuid::kvm_eax, segment::SegmentName, Gpa, Gva},
    emul::{Intercepted, Mode},
    exits::{NotNow, ToUser},
    glue::timer,
    guest::{Exception, Gpr},
    irqchip::{
        message::{DeliveryMode, DestMode, Shorthand, Trigger},
        Message,
    },
    mmu::{guest_mem::GuestMem, walk},
    vcpu::{request, Pending, State},
    vendor::{Vendor, VendorVcpu},
    vm::Vm,
};

/// `linux/kvm_para.h`.
mod number {
    pub(super) const VAPIC_POLL_IRQ: u64 = 1;
    pub(super) const KICK_CPU: u64 = 5;
    pub(super) const CLOCK_PAIRING: u64 = 9;
    pub(super) const SEND_IPI: u64 = 10;
    pub(super) const SCHED_YIELD: u64 = 11;
    pub(super) const MAP_GPA_RANGE: u64 = super::KVM_HC_MAP_GPA_RANGE;
}

/// `KVM_ENOSYS`, `EPERM`, `EFAULT`, `EINVAL` and `EOPNOTSUPP` as a guest sees them.
const ENOSYS: u64 = -1000i64 as u64;
const EPERM: u64 = -1i64 as u64;
const EFAULT: u64 = -14i64 as u64;
const EINVAL: u64 = -22i64 as u64;
const EOPNOTSUPP: u64 = -95i64 as u64;

const NS_PER_SECOND: u64 = 1_000_000_000;

/// VMCALL of Intel and VMMCALL of AMD: three bytes each.
const HYPERCALLS: [[u8; 3]; 2] = [[0x0F, 0x01, 0xC1], [0x0F, 0x01, 0xD9]];

impl<V: Vendor> State<V> {
    /// Bits of a register that a hypercall has now: its number is in RAX, its arguments are in RBX, RCX, RDX and RSI.
    fn hypercall_mask(&self) -> u64 {
        if self.mode() == Mode::Long64 {
            u64::MAX
        } else {
            u32::MAX.into()
        }
    }

    /// VMCALL or VMMCALL: a number and four arguments in, a result in RAX. Not one for [`hypercall_to_user`](Self::hypercall_to_user).
    pub(crate) fn handle_hypercall(&mut self, vm: &Vm<V>, may_sleep: bool) -> Result<(), NotNow> {
        let mask = self.hypercall_mask();
        let number = self.gpr(Gpr::Rax) & mask;
        if !may_sleep && matches!(number, number::CLOCK_PAIRING | number::MAP_GPA_RANGE) {
            return Err(NotNow);
        }
        self.skip(vm, Intercepted::Hypercall, may_sleep)?;
        let result = match self.hw.cpl() {
            0 => {
                let arguments = [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx, Gpr::Rsi].map(|register| self.gpr(register) & mask);
                self.hypercall(vm, number, arguments, mask.count_ones())
            }
            _ => EPERM,
        };
        self.set_gpr(Gpr::Rax, result & mask);
        Ok(())
    }

    /// A hypercall that userspace answers. `None`: [`handle_hypercall`](Self::handle_hypercall) does.
    pub(crate) fn hypercall_to_user(&self, vm: &Vm<V>) -> Result<Option<(Pending, ToUser)>, NotNow> {
        let mask = self.hypercall_mask();
        let [first, count, attributes] = [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx].map(|register| self.gpr(register) & mask);
        let wanted = self.gpr(Gpr::Rax) & mask == number::MAP_GPA_RANGE
            && vm.enabled.has_hypercall_exit(number::MAP_GPA_RANGE)
            && self.hw.cpl() == 0;
        if !wanted || !is_range(first, count) {
            return Ok(None);
        }
        let next_rip = self.next_instruction(vm, Intercepted::Hypercall, true)?;
        let report = ToUser::Hypercall {
            number: number::MAP_GPA_RANGE,
            arguments: [first, count, attributes],
            long: mask == u64::MAX,
        };
        Ok(Some((Pending::Hypercall { rip: self.regs.rip, next_rip, mask }, report)))
    }

    /// KVM_HC_CLOCK_PAIRING: writes the time of day, and the guest's TSC at that time, to the guest's memory.
    fn pair_clocks(&self, vm: &Vm<V>, at: u64, clock: u64) -> u64 {
        const WALL_CLOCK: u64 = 0;
        let now = timer::instant();
        let Some(host_tsc) = now.tsc.filter(|_| clock == WALL_CLOCK && self.tsc.is_even()) else { return EOPNOTSUPP };
        let pairing = KvmClockPairing {
            sec: now.real_ns / NS_PER_SECOND,
            nsec: now.real_ns % NS_PER_SECOND,
            tsc: self.tsc.relation().at(host_tsc),
            ..KvmClockPairing::new_zeroed()
        };
        match vm.memory.view(true).write(Gpa(at), pairing.as_bytes()) {
            Ok(()) => 0,
            Err(_) => EFAULT,
        }
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
            number::CLOCK_PAIRING => self.pair_clocks(vm, arguments[0], arguments[1]),
            // What of it is userspace's went there.
            number::MAP_GPA_RANGE if vm.enabled.has_hypercall_exit(number) => EINVAL,
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

/// Whether `count` pages from `first` on are a range to be mapped otherwise.
fn is_range(first: u64, count: u64) -> bool {
    first % 4096 == 0 && (first >> 12).checked_add(count).is_some_and(|end| end > first >> 12)
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
