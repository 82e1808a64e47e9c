// SPDX-License-Identifier: GPL-2.0
//! APICv: the CPU's part of a vCPU's local APIC. SDM "APIC Virtualization and Virtual Interrupts".
//!
//! The CPU works on the virtual-APIC page, and on the guest interrupt status, which follows from the page: so what it has can be taken back
//! from the page at any time. In xAPIC mode the guest reads most registers in the page without an exit, and its writes exit behind the
//! instruction where they mean something; in x2APIC mode the MSR bitmap lets it do what the CPU does alone.
#![forbid(unsafe_code)]

use kernel::prelude::*;

use super::{
    cpu::{MsrBitmaps, Vmx},
    insn::{self, CurrentVmcs, VirtualApic},
};
use crate::{
    arch::{
        vmcs::{
            control::secondary,
            exit::{ApicAccess, ApicAccessKind},
            Control16, Control32, Control64, Guest16,
        },
        Gpa, Hpa,
    },
    glue::phys::PhysBox,
    guest::{exit::NestedFault, Exit},
    irqchip::{
        lapic::{
            regs::{self, BASE_DEFAULT},
            Delivery, Lapic, Mode,
        },
        Bits256,
    },
    policy::vmx::{
        apicv::{eoi_exit_bitmap, interrupt_status, with_requesting, ApicControls},
        Features,
    },
};

/// The fields of the EOI-exit bitmap, lowest vectors first.
const EOI_EXIT_BITMAP: [Control64; 4] =
    [Control64::EoiExitBitmap0, Control64::EoiExitBitmap1, Control64::EoiExitBitmap2, Control64::EoiExitBitmap3];

/// What a vCPU has for it.
pub(super) struct Apic {
    /// The virtual-APIC page.
    pub(super) page: PhysBox<VirtualApic>,
    /// The APIC-access page.
    window: Option<Hpa>,
    /// The posted-interrupt descriptor.
    posted: Option<Hpa>,
    controls: ApicControls,
    /// Where software delivers: the guest exits when its priority class falls below this.
    threshold: u8,
    /// Vectors whose EOI somebody hears.
    heard: Bits256,
    /// The EOI-exit bitmap, as the VMCS has it.
    eoi_exits: [u64; 4],
    /// What was taken back last, as long as page and VMCS have just that.
    returned: Option<Delivery>,
}

impl Apic {
    /// All is software's.
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            page: PhysBox::new()?,
            window: None,
            posted: None,
            controls: ApicControls::default(),
            threshold: 0,
            heard: Bits256::EMPTY,
            eoi_exits: [0; 4],
            returned: None,
        })
    }

    pub(super) fn set_window(&mut self, page: Hpa) {
        self.window = Some(page);
    }

    pub(super) fn set_posted(&mut self, descriptor: Hpa) {
        self.posted = Some(descriptor);
    }

    pub(super) fn set_listeners(&mut self, vectors: &Bits256) {
        self.heard = *vectors;
        self.returned = None;
    }

    #[inline]
    pub(super) fn set_cr8(&mut self, cr8: u8) {
        self.page.set_cr8(cr8);
        self.returned = None;
    }

    /// Whether the threshold changed. It is never above the priority class that the guest has.
    pub(super) fn set_threshold(&mut self, class: u8) -> bool {
        core::mem::replace(&mut self.threshold, class) != class
    }

    /// Whether the guest accesses the page as its local APIC.
    #[inline]
    pub(super) fn has_window(&self) -> bool {
        self.controls.secondary & secondary::VIRTUALIZE_APIC_ACCESSES != 0
    }

    /// Whether the CPU delivers interrupts.
    #[inline]
    pub(super) fn delivers(&self) -> bool {
        self.controls.delivers()
    }

    /// Those of the secondary controls that are decided here.
    pub(super) fn secondary(&self) -> u32 {
        self.controls.secondary
    }

    /// Those of the pin-based controls.
    pub(super) fn pin(&self) -> u32 {
        self.controls.pin
    }

    /// Chooses the controls for an APIC in its present mode. Whether they changed.
    pub(super) fn choose(&mut self, features: &Features, lapic: Option<&Lapic>) -> bool {
        let mode = match lapic.map(|lapic| (lapic.mode(), lapic.base_gpa())) {
            Some((Mode::XApic, Gpa(base))) if base != BASE_DEFAULT || self.window.is_none() => Mode::Disabled,
            Some((mode, _)) => mode,
            None => Mode::Disabled,
        };
        let controls = ApicControls::new(features, mode, self.posted.is_some());
        let changed = controls != self.controls;
        if changed {
            self.controls = controls;
            self.returned = None;
        }
        changed
    }

    /// Writes what goes with the controls.
    pub(super) fn write(&self, host: &Vmx, bitmaps: &MsrBitmaps, vmcs: CurrentVmcs<'_>) {
        let x2apic = self.controls.secondary & secondary::VIRTUALIZE_X2APIC_MODE != 0;
        let bitmap = if x2apic { &bitmaps.x2apic } else { &bitmaps.usual };
        vmcs.write(Control64::MsrBitmaps, insn::address(bitmap));
        vmcs.write(Control32::TprThreshold, self.threshold.into());
        if let (true, Some(Hpa(window))) = (self.has_window(), self.window) {
            vmcs.write(Control64::ApicAccessAddress, window);
        }
        if let (true, Some(Hpa(descriptor)), Some(vector)) = (self.pin() != 0, self.posted, host.notification_vector) {
            vmcs.write(Control64::PostedInterruptDescriptor, descriptor);
            vmcs.write(Control16::PostedInterruptNotificationVector, vector.into());
        }
        if self.delivers() {
            for (field, word) in EOI_EXIT_BITMAP.into_iter().zip(self.eoi_exits) {
                vmcs.write(field, word);
            }
        }
    }

    /// Gives the CPU everything, or what became pending since.
    pub(super) fn hand_over(&mut self, vmcs: CurrentVmcs<'_>, lapic: &mut Lapic, all: bool) {
        let stale = lapic.take_image_stale();
        if !all {
            self.add_pending(vmcs, lapic);
        } else {
            let delivery = lapic.delivery();
            if self.returned.take() != Some(delivery) || stale {
                let exits = eoi_exit_bitmap(&self.heard, &lapic.level_vectors());
                self.write_eoi_exits(vmcs, exits);
                delivery.store(|offset, value| self.page.store(offset, value));
                vmcs.write(Guest16::InterruptStatus, interrupt_status(lapic));
                self.show_trigger_modes(lapic);
            }
            lapic.handed_over();
        }
        if stale && self.has_window() {
            lapic.store_image(|offset, value| self.page.store(offset, value));
        }
    }

    fn add_pending(&mut self, vmcs: CurrentVmcs<'_>, lapic: &mut Lapic) {
        let Some(highest) = lapic.highest_irr() else { return };
        let (pending, levels) = lapic.take_pending();
        for (index, offset) in (0..8).zip((regs::IRR..).step_by(0x10)) {
            let vectors = pending.dword(index);
            if vectors != 0 {
                self.page.store(offset, self.page.load(offset) | vectors);
            }
        }
        let old = vmcs.read(Guest16::InterruptStatus);
        let status = with_requesting(old, highest);
        if status != old {
            vmcs.write(Guest16::InterruptStatus, status);
        }
        if !levels.is_empty() {
            let [a, b, c, d] = eoi_exit_bitmap(&self.heard, &levels);
            let [e, f, g, h] = self.eoi_exits;
            self.write_eoi_exits(vmcs, [a | e, b | f, c | g, d | h]);
        }
        self.show_trigger_modes(lapic);
    }

    fn write_eoi_exits(&mut self, vmcs: CurrentVmcs<'_>, exits: [u64; 4]) {
        for ((field, word), old) in EOI_EXIT_BITMAP.into_iter().zip(exits).zip(&mut self.eoi_exits) {
            if word != *old {
                *old = word;
                vmcs.write(field, word);
            }
        }
    }

    #[inline]
    fn show_trigger_modes(&self, lapic: &Lapic) {
        if self.has_window() {
            lapic.store_trigger_modes(|offset, value| self.page.store(offset, value));
        }
    }

    /// Takes everything back.
    pub(super) fn take_back(&mut self, lapic: &mut Lapic) {
        let delivery = Delivery::load(|offset| self.page.load(offset));
        lapic.take_back(&delivery);
        self.returned = Some(delivery);
        if self.has_window() {
            lapic.set_icr(self.page.load(regs::ICR), self.page.load(regs::ICR2));
        }
    }

    /// The register that an APIC-write exit tells of.
    pub(super) fn written(&self, offset: u16) -> Exit {
        let offset = u32::from(offset & 0xFF0);
        let high = if offset == regs::ICR { self.page.load(regs::ICR2) } else { 0 };
        Exit::ApicWrite { offset, value: u64::from(high) << 32 | u64::from(self.page.load(offset)) }
    }
}

/// An access to the APIC-access page that the CPU leaves to us: the emulator's, as one to any device.
pub(super) fn access(access: ApicAccess) -> Exit {
    let kind = access.kind();
    Exit::NestedFault(NestedFault {
        gpa: Gpa(BASE_DEFAULT | u64::from(access.offset())),
        write: kind == ApicAccessKind::Write,
        execute: kind == ApicAccessKind::Fetch,
        present: false,
        walk: matches!(kind, ApicAccessKind::Physical | ApicAccessKind::PhysicalEvent),
    })
}
