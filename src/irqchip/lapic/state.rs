// SPDX-License-Identifier: GPL-2.0
//! The state as KVM_GET_LAPIC and KVM_SET_LAPIC move it: the first 1,024 bytes of the xAPIC's register window, whatever
//! the mode. KVM API "KVM_GET_LAPIC".
//!
//! - ID register in x2APIC mode: all 32 bits with KVM_X2APIC_API_USE_32BIT_IDS, where another ID than the CPU's is
//!   refused; without it the low 8 bits of the ID are in bits 31:24, and what comes back is ignored.
//! - ICR in x2APIC mode: split in ICR and ICR2. LDR in x2APIC mode: computed, what comes back is ignored.
//! - The timer's current count is what is left of the count-down; the timer restarts from it. Errors not yet moved
//!   to the ESR, and IA32_TSC_DEADLINE (an MSR of its own), are not part of the state.
//! - Mode and base address are not either: set IA32_APIC_BASE (in KVM_SET_SREGS) first.
#![forbid(unsafe_code)]

use super::regs::{self, Lvt, DFR_FIXED, DIVIDE_DEFINED, ICR_BUSY, SVR_DIRECTED_EOI, SVR_ENABLE, SVR_FOCUS};
use super::timer::Mode as TimerMode;
use super::{Lapic, LapicWork};

/// Length of `struct kvm_lapic_state`.
pub const STATE_BYTES: usize = 1024;

/// The APIC ID is another CPU's: EINVAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateError;

fn get(regs: &[u8; STATE_BYTES], offset: u32) -> u32 {
    let at = offset as usize;
    let bytes = regs.get(at..).and_then(|rest| rest.first_chunk::<4>());
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn put(regs: &mut [u8; STATE_BYTES], offset: u32, value: u32) {
    let at = offset as usize;
    if let Some(bytes) = regs.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<4>()) {
        *bytes = value.to_le_bytes();
    }
}

/// The eight dwords of ISR, TMR and IRR, with their offsets from the first.
fn dwords() -> impl Iterator<Item = (usize, u32)> {
    (0..8usize).map(|index| (index, 0x10 * index as u32))
}

impl Lapic {
    /// The state now. Drain the inbox and call `timer_expired` first. `wide_ids`: KVM_X2APIC_API_USE_32BIT_IDS.
    pub fn save(&self, now_ns: u64, wide_ids: bool) -> [u8; STATE_BYTES] {
        let mut state = [0; STATE_BYTES];
        let narrow = self.is_x2apic() && !wide_ids;
        put(&mut state, regs::ID, if narrow { self.id << 24 } else { self.id_register() });
        put(&mut state, regs::VERSION, self.version());
        put(&mut state, regs::TPR, self.tpr as u32);
        put(&mut state, regs::PPR, self.ppr as u32);
        put(&mut state, regs::LDR, self.ldr_register());
        put(&mut state, regs::DFR, self.dfr);
        put(&mut state, regs::SVR, self.svr);
        for (index, at) in dwords() {
            put(&mut state, regs::ISR + at, self.isr.dword(index));
            put(&mut state, regs::TMR + at, self.tmr.dword(index));
            put(&mut state, regs::IRR + at, self.irr.dword(index));
        }
        put(&mut state, regs::ESR, self.esr);
        put(&mut state, regs::ICR, self.icr as u32);
        put(&mut state, regs::ICR2, (self.icr >> 32) as u32);
        for lvt in Lvt::ALL {
            if lvt != Lvt::Cmci || self.features.cmci {
                put(&mut state, lvt.offset(), self.lvt[lvt as usize & 7]);
            }
        }
        put(&mut state, regs::TIMER_INITIAL, self.timer.initial());
        put(&mut state, regs::TIMER_CURRENT, self.timer.current(now_ns));
        put(&mut state, regs::TIMER_DIVIDE, self.divide);
        state
    }

    /// Takes on a saved state. Clear the inbox first. Nothing changes on an error. Bits that no register has are
    /// dropped.
    pub fn restore(&mut self, state: &[u8; STATE_BYTES], now_ns: u64, wide_ids: bool) -> Result<LapicWork, StateError> {
        let id = get(state, regs::ID);
        if self.is_x2apic() {
            if wide_ids && id != self.id {
                return Err(StateError);
            }
        } else {
            self.xapic_id = (id >> 24) as u8;
            self.logical_id = (get(state, regs::LDR) >> 24) as u8;
        }
        self.image_stale = true;
        self.tpr = get(state, regs::TPR) as u8;
        self.dfr = get(state, regs::DFR) | DFR_FIXED;
        let directed = if self.features.directed_eoi { SVR_DIRECTED_EOI } else { 0 };
        self.svr = get(state, regs::SVR) & (0xFF | SVR_ENABLE | SVR_FOCUS | directed);
        for (index, at) in dwords() {
            // Vectors 0 to 15 are illegal, and kept as in KVM: of the lowest priority class, they are never delivered.
            self.isr.set_dword(index, get(state, regs::ISR + at));
            self.tmr.set_dword(index, get(state, regs::TMR + at));
            self.irr.set_dword(index, get(state, regs::IRR + at));
        }
        self.highest_irr = self.irr.highest();
        self.highest_isr = self.isr.highest();
        self.update_ppr();
        self.esr = get(state, regs::ESR);
        self.errors = 0;
        let icr = get(state, regs::ICR) as u64 | ((get(state, regs::ICR2) as u64) << 32);
        self.icr = icr & !ICR_BUSY;
        for lvt in Lvt::ALL {
            self.lvt[lvt as usize & 7] = get(state, lvt.offset()) & lvt.writable(self.timer_modes());
        }
        self.divide = get(state, regs::TIMER_DIVIDE) & DIVIDE_DEFINED;
        self.timer.set_mode(TimerMode::from_lvt(self.lvt[Lvt::Timer as usize]));
        self.timer.set_divide(self.divide, now_ns);
        self.timer.restore(get(state, regs::TIMER_INITIAL), get(state, regs::TIMER_CURRENT), now_ns);
        Ok(LapicWork { timer_changed: true, card_changed: true, ..LapicWork::default() })
    }
}
