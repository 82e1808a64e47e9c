// SPDX-License-Identifier: GPL-2.0
//! The guest's accesses: the xAPIC's memory window, and the x2APIC's MSRs.
//!
//! xAPIC: SDM "Local APIC Register Address Map". A register is read by 1, 2 or 4 bytes inside its first 4 bytes and
//! written by 4 aligned ones; any other access reads 0 or does nothing, as in KVM. A register that does not exist sets
//! the ESR's "illegal register address" (below 400h). Outside xAPIC mode the window reads all ones and ignores writes.
//! x2APIC: SDM "x2APIC Register Address Space". A register that does not exist, a reserved bit, a write of a read-only
//! register and a read of a write-only one: #GP.
#![forbid(unsafe_code)]

use super::regs::{
    self, DFR_FIXED, DIVIDE_DEFINED, ESR_ILLEGAL_REGISTER, ESR_SEND_ILLEGAL_VECTOR, ICR_BUSY, LVT_DEFINED, LVT_MASKED,
    SVR_DIRECTED_EOI, SVR_ENABLE, SVR_FOCUS, X2APIC_ICR_RESERVED,
};
use super::timer::Mode as TimerMode;
use super::{Lapic, LapicWork, Lvt, Mode};
use crate::arch::msr::{X2APIC_FIRST, X2APIC_LAST};
use crate::irqchip::dest::x2apic_logical_id;
use crate::irqchip::message::{DeliveryMode, DestMode, Gp, Message, Shorthand, Trigger};

/// The register does not exist in this mode, or refuses the value.
struct Refused;

const LOW_HALF: u64 = 0xFFFF_FFFF;

impl Lapic {
    /// A read of `size_bytes` at `offset` into the register window; the value is in the low bytes.
    pub fn mmio_read(&mut self, offset: u32, size_bytes: u8, now_ns: u64) -> u64 {
        if self.mode != Mode::XApic {
            return u64::MAX;
        }
        let at = offset & 0xF;
        if !matches!(size_bytes, 1 | 2 | 4) || at + size_bytes as u32 > 4 {
            return 0;
        }
        match self.read_register(offset & !0xF, now_ns) {
            Some(value) => (value as u64 >> (8 * at)) & (u64::MAX >> (64 - 8 * size_bytes as u32)),
            None => {
                self.refuse(offset);
                0
            }
        }
    }

    /// Whether a write at `offset` looks at the clock: the frequent ones do not, and may be given any time.
    #[inline]
    pub const fn write_wants_time(offset: u32) -> bool {
        !matches!(offset, regs::EOI | regs::ICR | regs::ICR2 | regs::SELF_IPI | regs::TPR)
    }

    /// A write of `size_bytes` at `offset` into the register window.
    pub fn mmio_write(&mut self, offset: u32, size_bytes: u8, value: u64, now_ns: u64) -> LapicWork {
        if self.mode != Mode::XApic || size_bytes != 4 || offset & 0xF != 0 {
            return LapicWork::default();
        }
        let value = value as u32;
        self.image_stale |= !matches!(offset, regs::EOI | regs::TPR);
        let written = match offset {
            regs::EOI => return LapicWork { eoi: self.eoi(), ..LapicWork::default() },
            regs::ICR => {
                self.icr = (self.icr & !LOW_HALF) | (value as u64 & !ICR_BUSY);
                return self.send_ipi();
            }
            regs::ICR2 => {
                self.icr = (self.icr & LOW_HALF) | ((value as u64 & 0xFF00_0000) << 32);
                return LapicWork::default();
            }
            regs::ID => {
                self.xapic_id = (value >> 24) as u8;
                return LapicWork { card_changed: true, ..LapicWork::default() };
            }
            regs::LDR => {
                self.logical_id = (value >> 24) as u8;
                return LapicWork { card_changed: true, ..LapicWork::default() };
            }
            regs::DFR => {
                self.dfr = value | DFR_FIXED;
                return LapicWork { card_changed: true, ..LapicWork::default() };
            }
            _ => self.write_register(offset, value, now_ns),
        };
        written.unwrap_or_else(|Refused| {
            self.refuse(offset);
            LapicWork::default()
        })
    }

    /// The guest wrote a register in a CPU's image of the APIC, where `value` is now: in x2APIC mode by its MSR. For the ICR in xAPIC mode
    /// `value` has the upper half, too, which was written before.
    pub fn image_written(&mut self, offset: u32, value: u64, now_ns: u64) -> LapicWork {
        if self.is_x2apic() {
            let msr = X2APIC_FIRST.saturating_add(offset >> 4);
            return self.write_msr(msr, value, now_ns).unwrap_or_default();
        }
        let stale = self.image_stale;
        if offset == regs::ICR {
            self.set_icr(value as u32, (value >> 32) as u32);
        }
        let work = self.mmio_write(offset, 4, value & LOW_HALF, now_ns);
        let alone = matches!(offset, regs::ICR | regs::TIMER_INITIAL | regs::TIMER_DIVIDE);
        if alone && self.read_register(offset, now_ns) == Some(value as u32) {
            // No other register follows it: the image is right.
            self.image_stale = stale;
        }
        work
    }

    /// There is no such register. AMD's extended ones, which a guest on an AMD CPU may look for, are passed over.
    fn refuse(&mut self, offset: u32) {
        if offset < 0x400 {
            self.raise_error(ESR_ILLEGAL_REGISTER);
        }
    }

    /// RDMSR of an x2APIC register, 800h to 8FFh.
    pub fn read_msr(&mut self, msr: u32, now_ns: u64) -> Result<u64, Gp> {
        let offset = self.msr_offset(msr)?;
        match offset {
            regs::ICR => Ok(self.icr),
            regs::ICR2 | regs::DFR | regs::APR => Err(Gp),
            _ => self.read_register(offset, now_ns).map(u64::from).ok_or(Gp),
        }
    }

    /// WRMSR of an x2APIC register, 800h to 8FFh.
    #[inline]
    pub fn write_msr(&mut self, msr: u32, value: u64, now_ns: u64) -> Result<LapicWork, Gp> {
        let offset = self.msr_offset(msr)?;
        if offset == regs::ICR {
            if value & X2APIC_ICR_RESERVED != 0 {
                return Err(Gp);
            }
            self.icr = value & !ICR_BUSY;
            return Ok(self.send_ipi());
        }
        if value & !x2apic_writable(offset) != 0 {
            return Err(Gp);
        }
        match offset {
            regs::EOI => Ok(LapicWork { eoi: self.eoi(), ..LapicWork::default() }),
            regs::SELF_IPI => {
                self.send_to_self(value as u8, false);
                Ok(LapicWork::default())
            }
            _ => self.write_register(offset, value as u32, now_ns).map_err(|Refused| Gp),
        }
    }

    #[inline]
    fn msr_offset(&self, msr: u32) -> Result<u32, Gp> {
        if self.is_x2apic() && (X2APIC_FIRST..=X2APIC_LAST).contains(&msr) {
            Ok((msr - X2APIC_FIRST) << 4)
        } else {
            Err(Gp)
        }
    }

    pub(super) fn id_register(&self) -> u32 {
        if self.is_x2apic() {
            self.id
        } else {
            (self.xapic_id as u32) << 24
        }
    }

    pub(super) fn ldr_register(&self) -> u32 {
        if self.is_x2apic() {
            x2apic_logical_id(self.id)
        } else {
            (self.logical_id as u32) << 24
        }
    }

    fn has_lvt(&self, lvt: Lvt) -> bool {
        lvt != Lvt::Cmci || self.features.cmci
    }

    /// The 32-bit register at a 16-byte aligned offset; `None` if there is none that can be read.
    fn read_register(&self, offset: u32, now_ns: u64) -> Option<u32> {
        let index = (offset >> 4) as usize & 7;
        Some(match offset {
            regs::ID => self.id_register(),
            regs::VERSION => self.version(),
            regs::TPR => self.tpr as u32,
            regs::APR => 0,
            regs::PPR => self.ppr as u32,
            regs::LDR => self.ldr_register(),
            regs::DFR => self.dfr,
            regs::SVR => self.svr,
            regs::ISR..=regs::ISR_LAST => self.isr.dword(index),
            regs::TMR..=regs::TMR_LAST => self.tmr.dword(index),
            regs::IRR..=regs::IRR_LAST => self.irr.dword(index),
            regs::ESR => self.esr,
            regs::ICR => self.icr as u32,
            regs::ICR2 => (self.icr >> 32) as u32,
            regs::TIMER_INITIAL => self.timer.initial(),
            regs::TIMER_CURRENT => self.timer.current(now_ns),
            regs::TIMER_DIVIDE => self.divide,
            _ => {
                let lvt = Lvt::at(offset).filter(|&lvt| self.has_lvt(lvt))?;
                self.lvt[lvt as usize & 7]
            }
        })
    }

    /// Writes a register that both modes have.
    fn write_register(&mut self, offset: u32, value: u32, now_ns: u64) -> Result<LapicWork, Refused> {
        let mut work = LapicWork::default();
        match offset {
            regs::TPR => self.set_tpr(value as u8),
            regs::SVR => {
                let directed = if self.features.directed_eoi { SVR_DIRECTED_EOI } else { 0 };
                self.svr = value & (0xFF | SVR_ENABLE | SVR_FOCUS | directed);
                if self.svr & SVR_ENABLE == 0 {
                    // SDM "Local APIC State After It Has Been Software Disabled".
                    self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
                }
                work.card_changed = true;
            }
            regs::ESR => self.esr = core::mem::take(&mut self.errors),
            regs::TIMER_INITIAL => {
                self.timer.set_initial(value, now_ns);
                work.timer_changed = true;
            }
            regs::TIMER_DIVIDE => {
                self.divide = value & DIVIDE_DEFINED;
                work.timer_changed = self.timer.set_divide(self.divide, now_ns);
            }
            _ => {
                let lvt = Lvt::at(offset).filter(|&lvt| self.has_lvt(lvt)).ok_or(Refused)?;
                work = self.write_lvt(lvt, value);
            }
        }
        Ok(work)
    }

    pub(super) fn write_lvt(&mut self, lvt: Lvt, value: u32) -> LapicWork {
        let forced = if self.is_software_enabled() { 0 } else { LVT_MASKED };
        let value = (value | forced) & lvt.writable(self.timer_modes());
        self.lvt[lvt as usize & 7] = value;
        LapicWork {
            timer_changed: lvt == Lvt::Timer && self.timer.set_mode(TimerMode::from_lvt(value)),
            card_changed: lvt == Lvt::Lint0,
            ..LapicWork::default()
        }
    }

    fn send_to_self(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            self.raise_error(ESR_SEND_ILLEGAL_VECTOR);
        } else {
            self.accept(vector, level);
        }
    }

    /// Sends what the ICR says. What the CPU sends itself goes straight to the IRR.
    fn send_ipi(&mut self) -> LapicWork {
        let low = self.icr as u32;
        let x2apic = self.is_x2apic();
        let message = Message {
            dest: if x2apic { (self.icr >> 32) as u32 } else { (self.icr >> 56) as u32 },
            dest_mode: DestMode::from_logical(low & (1 << 11) != 0),
            shorthand: match (low >> 18) & 3 {
                0 => Shorthand::None,
                1 => Shorthand::Me,
                2 => Shorthand::All,
                _ => Shorthand::AllButMe,
            },
            delivery: DeliveryMode::from_bits(low >> 8),
            vector: low as u8,
            trigger: Trigger::from_level(low & (1 << 15) != 0),
            assert: low & (1 << 14) != 0,
            redirection_hint: false,
        };
        if message.is_deassert() {
            return LapicWork::default();
        }
        if message.delivery.is_vectored() {
            if message.vector < 16 {
                self.raise_error(ESR_SEND_ILLEGAL_VECTOR);
                return LapicWork::default();
            }
            let names_me = message.shorthand == Shorthand::None
                && message.dest_mode == DestMode::Physical
                && x2apic
                && message.dest == self.id;
            if message.shorthand == Shorthand::Me || names_me {
                self.send_to_self(message.vector, message.trigger == Trigger::Level);
                return LapicWork::default();
            }
        }
        LapicWork { ipi: Some(message), ..LapicWork::default() }
    }
}

/// The bits that WRMSR may set in a register, other than the ICR; none of a register that is not there.
const fn x2apic_writable(offset: u32) -> u64 {
    match offset {
        regs::EOI | regs::ESR => 0,
        regs::TPR | regs::SELF_IPI => 0xFF,
        regs::SVR => (0xFF | SVR_ENABLE | SVR_FOCUS | SVR_DIRECTED_EOI) as u64,
        regs::TIMER_INITIAL => LOW_HALF,
        regs::TIMER_DIVIDE => DIVIDE_DEFINED as u64,
        regs::LVT_CMCI | regs::LVT_TIMER..=regs::LVT_ERROR => LVT_DEFINED as u64,
        _ => 0,
    }
}
