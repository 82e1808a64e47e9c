// SPDX-License-Identifier: GPL-2.0
//! Local APIC: xAPIC and x2APIC. SDM "Advanced Programmable Interrupt Controller", APM Vol. 2 of the same name.
//!
//! A [`Lapic`] belongs to its vCPU's thread alone; other threads use its [`Inbox`] and read its
//! [`ApicCard`]. After every call that returns a [`LapicWork`] the owner acts on it; see there.
//!
//! KVM's choices, where the manuals leave one: version 14h with six LVT entries, a 1 GHz timer clock, the CPU's APIC ID
//! is its vCPU ID, LINT0 of the boot CPU starts in ExtINT mode (a quirk of KVM that its clients rely on), and an
//! interrupt that is pending when the APIC gets software-disabled is still delivered.
//! Not supported: the arbitration priority register (reads 0), remote reads, focus processor checking, AMD's extended
//! registers (offset 400h and up), AVIC.
#![forbid(unsafe_code)]

mod access;
mod base;
mod delivery;
mod inbox;
mod lead;
mod posted;
pub mod regs;
mod state;
#[cfg(test)]
mod tests;
mod timer;

pub use delivery::Delivery;
pub use inbox::{Inbox, Posted, Signals};
pub use lead::Lead;
pub use posted::PostedInterrupts;
pub use regs::Lvt;
pub use state::{StateError, STATE_BYTES};
pub use timer::{Deadline, BUS_CYCLE_NS};

use super::bits::Bits256;
use super::dest::{ApicCard, LogicalModel};
use super::message::{DeliveryMode, Eoi, Message};
use regs::{
    BASE_BSP, BASE_DEFAULT, BASE_ENABLE, DFR_CLUSTER, DFR_FLAT, ESR_RECEIVED_ILLEGAL_VECTOR, LVT_EXTINT, LVT_MASKED,
    LVT_MODE, LVT_VECTOR, SVR_DIRECTED_EOI, SVR_ENABLE, SVR_RESET, VERSION_DIRECTED_EOI, VERSION_ID,
};
use timer::Timer;

/// What the CPU model gives its APIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LapicFeatures {
    /// CPUID.1:ECX.x2APIC.
    pub x2apic: bool,
    /// CPUID.1:ECX.TSC-Deadline.
    pub tsc_deadline: bool,
    /// EOI broadcasts can be suppressed: only where no I/O APIC model without an EOI register listens.
    pub directed_eoi: bool,
    /// A seventh LVT entry for corrected machine checks (MCG_CAP bit 10).
    pub cmci: bool,
}

/// What the owner must do after an access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct LapicWork {
    /// Deliver it, as an IPI of this vCPU.
    pub ipi: Option<Message>,
    /// Tell the I/O APIC, or userspace's.
    pub eoi: Option<Eoi>,
    /// Look at [`Lapic::deadline`] again: arm, move or cancel the host timer.
    pub timer_changed: bool,
    /// Publish [`Lapic::card`].
    pub card_changed: bool,
    /// A local interrupt that is not a vector wants to be delivered to this CPU itself.
    pub signal: Option<LocalSignal>,
}

/// A local interrupt whose LVT entry has another delivery mode than "fixed".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalSignal {
    Nmi,
    Smi,
    Init,
    /// The interrupt comes from the 8259A, if its output is high.
    ExtInt,
}

/// Kind of reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    PowerOn,
    /// INIT: IA32_APIC_BASE and the ID stay.
    Init,
}

/// Mode of the APIC, from IA32_APIC_BASE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Disabled,
    XApic,
    X2Apic,
}

/// One local APIC. Tags: (o) set once, (r) set by reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lapic {
    // What every exit and entry looks at.
    /// Highest vector of `irr`, or 0. (r)
    highest_irr: u8,
    /// Highest vector of `isr`, or 0. (r)
    highest_isr: u8,
    /// Processor priority. (r)
    ppr: u8,
    /// Task priority. (r)
    tpr: u8,
    mode: Mode,
    /// Writable ID of xAPIC mode. (r)
    xapic_id: u8,
    /// Bits 31:24 of the xAPIC's LDR. (r)
    logical_id: u8,
    is_bsp: bool,
    /// A register was written that [`Lapic::store_image`] tells of. (r)
    image_stale: bool,
    features: LapicFeatures,
    /// The CPU's own ID. (o)
    id: u32,
    irr: Bits256,
    isr: Bits256,
    tmr: Bits256,
    /// IA32_APIC_BASE. (r, not on INIT)
    base: u64,
    dfr: u32,
    svr: u32,
    esr: u32,
    /// Errors since the last write of the ESR.
    errors: u32,
    /// ICR: in xAPIC mode ICR2 is the upper half.
    icr: u64,
    /// By [`Lvt`]; the last one is unused and makes the length a power of two.
    lvt: [u32; 8],
    divide: u32,
    timer: Timer,
}

impl Lapic {
    /// An APIC after power-on. `id`: the CPU's APIC ID; `is_bsp`: it is the boot CPU.
    pub fn new(id: u32, is_bsp: bool, features: LapicFeatures) -> Self {
        let mut lapic = Self {
            highest_irr: 0,
            highest_isr: 0,
            ppr: 0,
            tpr: 0,
            mode: Mode::XApic,
            xapic_id: id as u8,
            logical_id: 0,
            is_bsp,
            image_stale: true,
            features,
            id,
            irr: Bits256::EMPTY,
            isr: Bits256::EMPTY,
            tmr: Bits256::EMPTY,
            base: BASE_DEFAULT,
            dfr: DFR_FLAT,
            svr: SVR_RESET,
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [LVT_MASKED; 8],
            divide: 0,
            timer: Timer::new(),
        };
        let _ = lapic.reset(Reset::PowerOn);
        lapic
    }

    /// SDM "Local APIC State After Power-Up or Reset", "... After It Receives an INIT-Reset".
    pub fn reset(&mut self, kind: Reset) -> LapicWork {
        if kind == Reset::PowerOn {
            self.base = BASE_DEFAULT | BASE_ENABLE | if self.is_bsp { BASE_BSP } else { 0 };
            self.mode = Mode::XApic;
            self.xapic_id = self.id as u8;
        }
        self.irr = Bits256::EMPTY;
        self.isr = Bits256::EMPTY;
        self.tmr = Bits256::EMPTY;
        self.highest_irr = 0;
        self.highest_isr = 0;
        self.tpr = 0;
        self.ppr = 0;
        self.logical_id = 0;
        self.dfr = DFR_FLAT;
        self.svr = SVR_RESET;
        self.esr = 0;
        self.errors = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; 8];
        if self.is_bsp {
            self.lvt[Lvt::Lint0 as usize] = LVT_EXTINT;
        }
        self.divide = 0;
        self.timer = Timer::new();
        self.image_stale = true;
        LapicWork { timer_changed: true, card_changed: true, ..LapicWork::default() }
    }

    /// The CPU model changed (KVM_SET_CPUID2, KVM_X86_SETUP_MCE): before the guest runs.
    pub fn set_features(&mut self, features: LapicFeatures) {
        self.features = features;
        self.image_stale = true;
    }

    /// Which CPU boots (KVM_SET_BOOT_CPU_ID): takes effect with the next power-on reset.
    pub fn set_bsp(&mut self, is_bsp: bool) {
        self.is_bsp = is_bsp;
    }

    /// The bus clock that the timer counts with, in ns a cycle: KVM_CAP_X86_APIC_BUS_CYCLES_NS. Before the timer is used.
    pub fn set_bus_cycle(&mut self, ns: u64) {
        self.timer.set_bus_cycle(ns);
    }

    pub const fn id(&self) -> u32 {
        self.id
    }

    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// What the VM may know of this APIC.
    pub const fn card(&self) -> ApicCard {
        let model = match self.dfr {
            DFR_FLAT => LogicalModel::Flat,
            DFR_CLUSTER => LogicalModel::Cluster,
            _ => LogicalModel::None,
        };
        ApicCard::new(self.id, self.xapic_id, self.logical_id, model)
            .with_x2apic_mode(matches!(self.mode, Mode::X2Apic))
            .with_present(self.is_present())
            .with_software_enabled(self.is_software_enabled())
            .with_takes_pic(self.accepts_pic())
    }

    /// Enabled in IA32_APIC_BASE. CPUID.1:EDX.APIC shows the same.
    #[inline]
    pub const fn is_present(&self) -> bool {
        !matches!(self.mode, Mode::Disabled)
    }

    #[inline]
    const fn is_software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }

    const fn suppresses_broadcast(&self) -> bool {
        self.features.directed_eoi && self.svr & SVR_DIRECTED_EOI != 0
    }

    const fn version(&self) -> u32 {
        let last = if self.features.cmci { 6 } else { 5 };
        VERSION_ID | (last << 16) | if self.features.directed_eoi { VERSION_DIRECTED_EOI } else { 0 }
    }

    const fn timer_modes(&self) -> u32 {
        if self.features.tsc_deadline {
            regs::LVT_PERIODIC | regs::LVT_TSC_DEADLINE
        } else {
            regs::LVT_PERIODIC
        }
    }

    // Interrupts in.

    /// Takes a fixed interrupt into the IRR. False: dropped, because the APIC is disabled or the vector illegal.
    pub fn accept(&mut self, vector: u8, level: bool) -> bool {
        if !self.is_present() || !self.is_software_enabled() {
            return false;
        }
        if vector < 16 {
            self.raise_error(ESR_RECEIVED_ILLEGAL_VECTOR);
            return false;
        }
        self.irr.set(vector);
        if level {
            self.tmr.set(vector);
        } else {
            self.tmr.clear(vector);
        }
        self.highest_irr = self.highest_irr.max(vector);
        true
    }

    /// Takes 64 vectors at once: word `index` of the inbox.
    fn accept_word(&mut self, index: usize, vectors: u64, levels: u64) {
        if !self.is_present() || !self.is_software_enabled() {
            return;
        }
        let legal = if index == 0 { vectors & !0xFFFF } else { vectors };
        if legal != vectors {
            self.raise_error(ESR_RECEIVED_ILLEGAL_VECTOR);
        }
        if legal == 0 {
            return;
        }
        *self.irr.word_mut(index) |= legal;
        let tmr = self.tmr.word_mut(index);
        *tmr = (*tmr & !legal) | (levels & legal);
        let highest = ((index as u8 & 3) << 6) | (63 - legal.leading_zeros()) as u8;
        self.highest_irr = self.highest_irr.max(highest);
    }

    /// Notes an error for the ESR and interrupts through the error entry. SDM "Error Handling".
    fn raise_error(&mut self, error: u32) {
        self.errors |= error;
        // An illegal vector in the error entry itself is an error that cannot be reported.
        if self.lvt[Lvt::Error as usize] & LVT_VECTOR >= 16 {
            let _ = self.deliver_local(Lvt::Error);
        }
    }

    /// The local interrupt `lvt` happened. A fixed one goes to the IRR; another one is returned for the caller to do.
    pub fn deliver_local(&mut self, lvt: Lvt) -> Option<LocalSignal> {
        let entry = self.lvt[lvt as usize & 7];
        if !self.is_present() || entry & LVT_MASKED != 0 {
            return None;
        }
        match DeliveryMode::from_bits(entry >> 8) {
            DeliveryMode::Fixed => {
                let level = matches!(lvt, Lvt::Lint0 | Lvt::Lint1) && entry & regs::LVT_LEVEL != 0;
                self.accept((entry & LVT_VECTOR) as u8, level);
                None
            }
            DeliveryMode::Smi => Some(LocalSignal::Smi),
            DeliveryMode::Nmi => Some(LocalSignal::Nmi),
            DeliveryMode::Init => Some(LocalSignal::Init),
            DeliveryMode::ExtInt => Some(LocalSignal::ExtInt),
            DeliveryMode::LowestPriority | DeliveryMode::RemoteRead | DeliveryMode::StartUp => None,
        }
    }

    /// A performance counter overflowed. The entry that is delivered masks itself. SDM "Performance Monitoring Counters Overflow".
    pub fn deliver_performance(&mut self) -> Option<LocalSignal> {
        let signal = self.deliver_local(Lvt::Performance);
        if self.is_present() {
            self.lvt[Lvt::Performance as usize] |= LVT_MASKED;
            self.image_stale = true;
        }
        signal
    }

    /// Whether this CPU takes the 8259A's interrupts: its LINT0 is in ExtINT mode ("virtual wire"), or the APIC is
    /// globally disabled and LINT0 is the CPU's INTR pin.
    pub const fn accepts_pic(&self) -> bool {
        let lint0 = self.lvt[Lvt::Lint0 as usize];
        !self.is_present() || lint0 & (LVT_MODE | LVT_MASKED) == LVT_EXTINT
    }

    // Interrupts out.

    /// The vector that may interrupt the CPU now, if the CPU takes interrupts: the highest in the IRR, when its class
    /// is above the processor priority.
    #[inline]
    pub fn highest_pending(&self) -> Option<u8> {
        (self.highest_irr & 0xF0 > self.ppr && self.is_present()).then_some(self.highest_irr)
    }

    /// Whether something in the IRR is above priority `ppr`.
    #[inline]
    pub const fn has_pending_above(&self, ppr: u8) -> bool {
        self.highest_irr & 0xF0 > ppr && self.is_present()
    }

    /// The highest vector in the IRR, whatever the priority.
    #[inline]
    pub fn highest_irr(&self) -> Option<u8> {
        (self.highest_irr != 0).then_some(self.highest_irr)
    }

    /// The highest vector in service.
    #[inline]
    pub fn highest_isr(&self) -> Option<u8> {
        (self.highest_isr != 0).then_some(self.highest_isr)
    }

    /// Priority class (1 to 15) that a pending interrupt has and that the TPR alone holds back: while there is one, the
    /// owner must see the guest lower CR8. `None`: CR8 writes matter to nobody.
    #[inline]
    pub fn tpr_threshold(&self) -> Option<u8> {
        let class = self.highest_irr >> 4;
        (class != 0 && self.tpr >> 4 >= class && self.is_present()).then_some(class)
    }

    /// The CPU takes `vector`: from the IRR to the ISR. Nothing happens if it is not in the IRR.
    #[inline]
    pub fn acknowledge(&mut self, vector: u8) {
        if !self.irr.test(vector) {
            return;
        }
        self.irr.clear(vector);
        if vector == self.highest_irr {
            self.highest_irr = self.irr.highest();
        }
        self.isr.set(vector);
        self.highest_isr = self.highest_isr.max(vector);
        self.update_ppr();
    }

    /// Ends the interrupt in service. `None`: there was none.
    #[inline]
    pub fn eoi(&mut self) -> Option<Eoi> {
        let vector = self.highest_isr;
        if vector == 0 {
            return None;
        }
        self.isr.clear(vector);
        self.highest_isr = self.isr.highest();
        self.update_ppr();
        Some(Eoi { vector, level: self.tmr.test(vector), broadcast: !self.suppresses_broadcast() })
    }

    /// Whether `vector` is pending or in service: its EOI is still to come.
    pub const fn is_eoi_outstanding(&self, vector: u8) -> bool {
        self.irr.test(vector) || self.isr.test(vector)
    }

    #[inline]
    fn update_ppr(&mut self) {
        let in_service = self.highest_isr & 0xF0;
        self.ppr = if self.tpr & 0xF0 >= in_service { self.tpr } else { in_service };
    }

    #[inline]
    pub const fn ppr(&self) -> u8 {
        self.ppr
    }

    #[inline]
    pub const fn tpr(&self) -> u8 {
        self.tpr
    }

    #[inline]
    pub fn set_tpr(&mut self, tpr: u8) {
        self.tpr = tpr;
        self.update_ppr();
    }

    /// CR8: the class of the TPR, 0 to 15.
    #[inline]
    pub const fn cr8(&self) -> u8 {
        self.tpr >> 4
    }

    /// A move to CR8; the caller has refused values above 15.
    #[inline]
    pub fn set_cr8(&mut self, cr8: u8) {
        self.set_tpr(cr8 << 4);
    }

    // Timer.

    /// When [`Lapic::timer_expired`] is to be called.
    #[inline]
    pub fn deadline(&self) -> Option<Deadline> {
        self.timer.deadline()
    }

    /// Delivers the timer interrupt if it is due; harmless to call at any time. True: the timer fired, and
    /// [`Lapic::deadline`] changed.
    pub fn timer_expired(&mut self, now_ns: u64, guest_tsc: u64) -> bool {
        let fired = self.timer.expire(now_ns, guest_tsc);
        if fired {
            // The timer's entry has no delivery mode: always fixed.
            let _ = self.deliver_local(Lvt::Timer);
        }
        fired
    }

    /// IA32_TSC_DEADLINE as the guest reads it.
    pub fn tsc_deadline(&self) -> u64 {
        if self.is_present() {
            self.timer.tsc_deadline()
        } else {
            0
        }
    }

    /// A write of IA32_TSC_DEADLINE. A deadline in the past fires at once. Ignored outside TSC-deadline mode.
    pub fn set_tsc_deadline(&mut self, deadline: u64, guest_tsc: u64) -> LapicWork {
        if !self.is_present() || self.timer.mode() != timer::Mode::TscDeadline {
            return LapicWork::default();
        }
        self.timer.set_tsc_deadline(deadline);
        // In this mode no other clock counts.
        self.timer_expired(0, guest_tsc);
        LapicWork { timer_changed: true, ..LapicWork::default() }
    }

    const fn is_x2apic(&self) -> bool {
        matches!(self.mode, Mode::X2Apic)
    }
}
