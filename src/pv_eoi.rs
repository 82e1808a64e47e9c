// SPDX-License-Identifier: GPL-2.0
//! Ends of interrupts without an exit: KVM_FEATURE_PV_EOI. KVM "Paravirtual end of interrupt" (MSR_KVM_PV_EOI_EN).
//!
//! The guest gives a word of its memory. Before an entry in which nothing depends on the end of the interrupt in service, bit 0 of the word is
//! set: a promise that clearing the bit ends the interrupt. The next exit says what became of it. A bit that is clear by then ended the
//! interrupt; one that is still set is taken back, and a promise made again with the next entry if it still holds. So a promise
//! lives only while the guest runs: all others find a local APIC without one.
#![forbid(unsafe_code)]

use crate::{
    arch::Gpa,
    irqchip::lapic::LapicWork,
    mmu::guest_mem::{GuestMem, Refused},
    vcpu::State,
    vendor::Vendor,
    vm::Vm,
};

/// A vCPU's side of it.
#[derive(Default)]
pub(crate) struct PvEoi {
    /// Where the guest's word is.
    word: Option<Gpa>,
    /// Its bit 0 has been set, and what became of it is not known yet.
    promised: bool,
}

/// The bit, in the word's first byte.
const PROMISED: u8 = 1 << 0;

impl PvEoi {
    /// The guest's word is at `word` from now on. The vCPU is out of the guest: no promise is open.
    pub(crate) fn set_word(&mut self, word: Option<Gpa>) {
        self.word = word;
    }

    /// Whether there is a promise, of which it is not known what became of it.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.promised
    }
}

impl<V: Vendor> State<V> {
    /// With an entry that is prepared: lets the guest end the interrupt in service by itself, if nobody waits for that.
    #[inline(never)]
    pub(crate) fn promise_eoi(&mut self, vm: &Vm<V>) {
        if self.cpu_delivers() {
            return;
        }
        if let (Some(word), Some(lapic)) = (self.pv_eoi.word, &self.lapic) {
            if let (Some(vector), None) = (lapic.highest_isr(), lapic.highest_irr()) {
                // Where the word cannot be written now, the guest ends the interrupt as ever.
                self.pv_eoi.promised =
                    !vm.irq.hears_end_of(vector) && vm.memory.view(false).write(word, &[PROMISED]).is_ok();
            }
        }
    }

    /// After an exit: finds out what became of the promise. False: with interrupts off (not `may_sleep`) the word is out of reach. The inner
    /// ring ends then, and until process context has come here nobody may touch the local APIC.
    #[inline(never)]
    pub(crate) fn settle_eoi(&mut self, vm: &Vm<V>, may_sleep: bool) -> bool {
        let taken_back = self.pv_eoi.word.map_or(Err(Refused::NotRam), |word| {
            let view = vm.memory.view(may_sleep);
            let mut byte = [0];
            view.read(word, &mut byte)?;
            let open = byte[0] & PROMISED != 0;
            if open {
                view.write(word, &[0])?;
            }
            Ok(open)
        });
        if taken_back == Err(Refused::NotNow) {
            self.leave_inner_ring(vm);
            return false;
        }
        self.pv_eoi.promised = false;
        // A guest that took the memory away cannot end the interrupt any more: it is over, as in KVM.
        if let (false, Some(lapic)) = (taken_back.unwrap_or(false), &mut self.lapic) {
            let work = LapicWork { eoi: lapic.eoi(), ..LapicWork::default() };
            self.lapic_work(vm, work);
        }
        true
    }
}
