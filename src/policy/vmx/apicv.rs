// SPDX-License-Identifier: GPL-2.0
//! When a CPU delivers a guest's interrupts itself, and what it needs for that. SDM "APIC Virtualization and Virtual Interrupts".
//!
//! All or nothing: registers and interrupts are virtualized together or not at all, because the software APIC is the truth otherwise and a
//! page that says something else helps nobody. The shadow of the task priority is on in any case, where the CPU has it.
#![forbid(unsafe_code)]

use super::Features;
use crate::{
    arch::{
        msr,
        vmcs::control::{pin, secondary},
    },
    irqchip::{
        lapic::{Lapic, Mode},
        Bits256,
    },
};

/// Control bits that follow from a guest's APIC. The others stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ApicControls {
    pub pin: u32,
    pub secondary: u32,
}

impl ApicControls {
    /// The bits that this choice decides.
    pub const MASK: Self = Self {
        pin: pin::POSTED_INTERRUPTS,
        secondary: secondary::VIRTUALIZE_APIC_ACCESSES
            | secondary::VIRTUALIZE_X2APIC_MODE
            | secondary::APIC_REGISTER_VIRTUALIZATION
            | secondary::VIRTUAL_INTERRUPT_DELIVERY,
    };

    /// For an APIC in this mode. `acknowledges`: exits acknowledge host interrupts, which posted interrupts need.
    pub const fn new(features: &Features, mode: Mode, acknowledges: bool) -> Self {
        const BOTH: u32 = secondary::APIC_REGISTER_VIRTUALIZATION | secondary::VIRTUAL_INTERRUPT_DELIVERY;
        let how = match mode {
            Mode::XApic if features.apic_access => secondary::VIRTUALIZE_APIC_ACCESSES,
            Mode::X2Apic if features.x2apic_mode => secondary::VIRTUALIZE_X2APIC_MODE,
            _ => 0,
        };
        if how == 0 || !features.apic_registers || !features.virtual_interrupts {
            return Self { pin: 0, secondary: 0 };
        }
        let posted = features.posted_interrupts && acknowledges;
        Self { pin: if posted { pin::POSTED_INTERRUPTS } else { 0 }, secondary: how | BOTH }
    }

    /// Whether the CPU delivers interrupts.
    #[inline]
    pub const fn delivers(self) -> bool {
        self.secondary & secondary::VIRTUAL_INTERRUPT_DELIVERY != 0
    }
}

/// Guest interrupt status: requesting virtual interrupt in the low byte, servicing virtual interrupt in the high byte.
#[inline]
pub fn interrupt_status(lapic: &Lapic) -> u16 {
    let requesting = lapic.highest_irr().unwrap_or(0);
    let servicing = lapic.highest_in_service().unwrap_or(0);
    u16::from_le_bytes([requesting, servicing])
}

/// The status after `vector` was put into the IRR that the CPU works on. It never loses what the CPU has not delivered yet.
#[inline]
pub const fn with_requesting(status: u16, vector: u8) -> u16 {
    let [requesting, servicing] = status.to_le_bytes();
    u16::from_le_bytes([if vector > requesting { vector } else { requesting }, servicing])
}

/// EOI-exit bitmap, lowest vectors first. `listened`: the vectors whose EOI the I/O APIC or userspace wants to hear of, as the routing is
/// now. `levels`: what is under way as a level-triggered interrupt is heard of although the routing has changed since. An EOI without an
/// interrupt in service counts as vector 0, and the illegal ones are never in service.
pub fn eoi_exit_bitmap(listened: &Bits256, levels: &Bits256) -> [u64; 4] {
    let [a, b, c, d] = listened.words();
    let [e, f, g, h] = levels.words();
    [(a | e) & !0xFFFF, b | f, c | g, d | h]
}

/// Which accesses to an x2APIC register the CPU does without an exit while it delivers interrupts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct X2apicAccess {
    pub read: bool,
    pub write: bool,
}

/// For one MSR: those registers that the CPU itself keeps. Others are read and written in software, which has them.
pub const fn x2apic_access(number: u32) -> X2apicAccess {
    const TPR: u32 = msr::X2APIC_FIRST + 0x08;
    const PPR: u32 = msr::X2APIC_FIRST + 0x0A;
    const EOI: u32 = msr::X2APIC_FIRST + 0x0B;
    const ISR: u32 = msr::X2APIC_FIRST + 0x10;
    const ISR_LAST: u32 = ISR + 7;
    const IRR: u32 = msr::X2APIC_FIRST + 0x20;
    const IRR_LAST: u32 = IRR + 7;
    const SELF_IPI: u32 = msr::X2APIC_FIRST + 0x3F;
    match number {
        TPR => X2apicAccess { read: true, write: true },
        PPR | ISR..=ISR_LAST | IRR..=IRR_LAST => X2apicAccess { read: true, write: false },
        EOI | SELF_IPI => X2apicAccess { read: false, write: true },
        _ => X2apicAccess { read: false, write: false },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        irqchip::lapic::{regs, LapicFeatures},
        policy::vmx::{cpus, negotiate, Options},
    };

    fn features(cpu: &cpus::Cpu, apicv: bool) -> Features {
        negotiate(&cpu.msrs, Options { apicv, ..Options::ALL }).unwrap().features
    }

    fn lapic() -> Lapic {
        let mut lapic = Lapic::new(0, true, LapicFeatures::default());
        let _ = lapic.mmio_write(regs::SVR, 4, 0x1FF, 0);
        lapic
    }

    #[test]
    fn controls_by_mode() {
        use secondary::*;
        let both = APIC_REGISTER_VIRTUALIZATION | VIRTUAL_INTERRUPT_DELIVERY;
        let all = features(&cpus::BOCHS_SKYLAKE_X, true);
        for (mode, wanted) in [
            (Mode::Disabled, 0),
            (Mode::XApic, VIRTUALIZE_APIC_ACCESSES | both),
            (Mode::X2Apic, VIRTUALIZE_X2APIC_MODE | both),
        ] {
            let controls = ApicControls::new(&all, mode, false);
            assert_eq!(controls, ApicControls { pin: 0, secondary: wanted });
            assert_eq!(controls.delivers(), wanted != 0);
            assert_eq!(controls.secondary & !ApicControls::MASK.secondary, 0);
            // The manual's checks: never both ways of access, and both ways need what comes with them.
            assert!(wanted & VIRTUALIZE_APIC_ACCESSES == 0 || wanted & VIRTUALIZE_X2APIC_MODE == 0);
        }
        assert_eq!(ApicControls::new(&all, Mode::XApic, true).pin, pin::POSTED_INTERRUPTS);
        assert_eq!(ApicControls::new(&all, Mode::Disabled, true).pin, 0);
    }

    #[test]
    fn without_the_whole_there_is_nothing() {
        let none = ApicControls::default();
        for mode in [Mode::Disabled, Mode::XApic, Mode::X2Apic] {
            assert_eq!(ApicControls::new(&features(&cpus::SKYLAKE_CLIENT, true), mode, true), none);
            assert_eq!(ApicControls::new(&features(&cpus::BOCHS_SKYLAKE_X, false), mode, true), none);
        }
        let all = features(&cpus::HASWELL, true);
        assert_eq!(ApicControls::new(&Features { apic_access: false, ..all }, Mode::XApic, false), none);
        assert_eq!(ApicControls::new(&Features { x2apic_mode: false, ..all }, Mode::X2Apic, false), none);
        assert_eq!(ApicControls::new(&Features { virtual_interrupts: false, ..all }, Mode::X2Apic, false), none);
    }

    #[test]
    fn status_follows_the_apic() {
        let mut lapic = lapic();
        assert_eq!(interrupt_status(&lapic), 0);
        lapic.accept(0x31, false);
        lapic.accept(0xA1, false);
        assert_eq!(interrupt_status(&lapic), 0x00A1);
        lapic.acknowledge(0xA1);
        assert_eq!(interrupt_status(&lapic), 0xA131);
        let _ = lapic.eoi();
        assert_eq!(interrupt_status(&lapic), 0x0031);
        assert_eq!(with_requesting(0xA131, 0x52), 0xA152);
        assert_eq!(with_requesting(0xA152, 0x31), 0xA152);
    }

    #[test]
    fn eois_that_somebody_hears() {
        let mut lapic = lapic();
        let mut listened = Bits256::EMPTY;
        listened.set(0x31);
        listened.set(0xFF);
        listened.set(0);
        lapic.accept(0x52, true);
        lapic.accept(0x53, false);
        let bitmap = eoi_exit_bitmap(&listened, &lapic.level_vectors());
        assert_eq!(bitmap, [1 << 0x31, 1 << (0x52 - 64), 0, 1 << 63]);
        lapic.acknowledge(0x52);
        assert_eq!(
            eoi_exit_bitmap(&Bits256::EMPTY, &lapic.level_vectors()),
            [0, 1 << (0x52 - 64), 0, 0],
            "in service, and not routed any more"
        );
        let _ = lapic.eoi();
        assert_eq!(eoi_exit_bitmap(&Bits256::EMPTY, &lapic.level_vectors()), [0; 4]);
    }

    #[test]
    fn x2apic_registers_without_exits() {
        let access = |read, write| X2apicAccess { read, write };
        for (number, wanted) in [
            (0x802, access(false, false)),
            (0x808, access(true, true)),
            (0x80A, access(true, false)),
            (0x80B, access(false, true)),
            (0x810, access(true, false)),
            (0x818, access(false, false)),
            (0x827, access(true, false)),
            (0x828, access(false, false)),
            (0x830, access(false, false)),
            (0x839, access(false, false)),
            (0x83F, access(false, true)),
            (0x8FF, access(false, false)),
            (0x10, access(false, false)),
        ] {
            assert_eq!(x2apic_access(number), wanted, "{number:#x}");
        }
    }
}
