// SPDX-License-Identifier: GPL-2.0
//! Entering the guest: what the VMCS gets before it, and what is read after the exit.
#![forbid(unsafe_code)]

use kernel::prelude::*;

use super::{
    apic,
    cpu::Vmx,
    insn::{self, CurrentVmcs, NotEntered},
    state::{group, HostFields},
    vcpu::{VmxVcpu, EXCEPTIONS},
};
use crate::{
    arch::{
        cr::{efer, rflags},
        segment::SegmentName,
        vmcs::{
            control::{eptp, interruptibility, primary, secondary, NO_LINK},
            event::{InterruptionInfo, Kind},
            exit::reason,
            Control16, Control32, Control64, ControlNatural, Guest64, GuestNatural, Host16, Host32, Host64,
            HostNatural, ReadOnly32,
        },
    },
    glue::{
        cpu::{self, IrqsOff},
        fpu::Window,
        vmx::{deliver_host_nmi, DebugControl, TaskState},
    },
    guest::{
        event::{vector, Exception},
        Exit, Gpr, Regs,
    },
    policy::vmx::{
        event::Injection,
        exit::{self, debug_status, VmExit},
    },
};

/// What else than registers the next entry writes.
pub(super) mod own {
    /// Everything that is written once.
    pub(in crate::vmx) const CONSTANT: u8 = 1 << 0;
    /// Nested root, TSC offset, and the masks of CR0 and CR4.
    pub(in crate::vmx) const CONTROL: u8 = 1 << 1;
    /// Pin-based and secondary controls, and the fields of those that come and go.
    pub(in crate::vmx) const SECONDARY: u8 = 1 << 2;
}

/// Translations to forget before the next entry.
pub(super) mod flush {
    /// Of linear addresses: a control register was changed for the guest.
    pub(in crate::vmx) const LINEAR: u8 = 1 << 0;
    /// All.
    pub(in crate::vmx) const NESTED: u8 = 1 << 1;
}

impl VmxVcpu {
    fn ept_pointer(&self) -> u64 {
        let accessed_dirty = if self.machine.host.config.features.accessed_dirty { eptp::ACCESSED_DIRTY } else { 0 };
        self.nested_root.0 | eptp::TYPE_WB | 3 << eptp::WALK_SHIFT | accessed_dirty
    }

    fn write_constants(&self, vmcs: CurrentVmcs<'_>) {
        let controls = &self.machine.host.config.controls;
        vmcs.write(Control32::Exit, controls.exit);
        vmcs.write(Control32::ExceptionBitmap, EXCEPTIONS);
        for zero in [
            Control32::PageFaultErrorMask,
            Control32::PageFaultErrorMatch,
            Control32::Cr3TargetCount,
            Control32::ExitMsrStoreCount,
            Control32::ExitMsrLoadCount,
            Control32::EntryMsrLoadCount,
            Control32::EntryInterruptionInfo,
            Control32::EntryErrorCode,
            Control32::EntryInstructionLength,
        ] {
            vmcs.write(zero, 0);
        }
        if let Some(vpid) = self.vpid {
            vmcs.write(Control16::Vpid, vpid);
        }
        let features = &self.machine.host.config.features;
        if features.xsaves {
            vmcs.write(Control64::XssExitBitmap, 0);
        }
        if features.encls_exiting {
            vmcs.write(Control64::EnclsExitBitmap, u64::MAX);
        }
        if self.machine.host.perf_global_ctrl {
            // The host's own counters do not count guests: a record of theirs would go to an address of the guest's.
            vmcs.write(Guest64::PerfGlobalCtrl, self.perf_global_ctrl);
            vmcs.write(Host64::PerfGlobalCtrl, self.host_fields.perf_global_ctrl);
        }
        vmcs.write(Control64::VirtualApicAddress, insn::address(&self.apic.page));
        vmcs.write(Guest64::LinkPointer, NO_LINK);
        vmcs.write(Guest64::Debugctl, 0);
        vmcs.write(GuestNatural::Rip, self.rip);
        vmcs.write(GuestNatural::Rsp, self.rsp);
        vmcs.write(GuestNatural::Rflags, self.rflags);
    }

    /// Other counters of the host's count in the guest.
    #[cold]
    pub(super) fn write_counters(&mut self, enabled: u64, irqs: &IrqsOff) {
        // Without a VMCS there is no entry.
        if let Some(vmcs) = self.machine.vmcs.current(irqs) {
            self.perf_global_ctrl = enabled;
            vmcs.write(Guest64::PerfGlobalCtrl, enabled);
        }
    }

    fn secondary(&self) -> u32 {
        let without_vpid = if self.vpid.is_none() { secondary::VPID } else { 0 };
        let wanted = self.pml_control() | self.tsc_control() | self.apic.secondary();
        self.machine.host.config.controls.secondary & !without_vpid | wanted
    }

    /// What few entries need: fields that nearly never change, and forgetting translations.
    #[cold]
    pub(super) fn prepare_rarely(&mut self, irqs: &IrqsOff) {
        // Without a VMCS the entry fails, and what was wanted waits for the next one.
        let Some(vmcs) = self.machine.vmcs.current(irqs) else { return };
        let dirty = core::mem::take(&mut self.dirty);
        let wanted = core::mem::take(&mut self.flush);
        if dirty & own::CONSTANT != 0 {
            self.write_constants(vmcs);
        }
        if dirty & own::SECONDARY != 0 {
            vmcs.write(Control32::Pin, self.pin_controls());
            vmcs.write(Control32::Secondary, self.secondary());
            self.write_pml(vmcs);
            let host = &self.machine.host;
            self.apic.write(host, self.counters.as_ref().unwrap_or(&host.msr_bitmaps), vmcs);
        }
        if dirty & own::CONTROL != 0 {
            vmcs.write(Control64::EptPointer, self.ept_pointer());
            self.write_tsc(vmcs);
            let (cr0, cr4) = self.state.masks();
            vmcs.write(ControlNatural::Cr0Mask, cr0);
            vmcs.write(ControlNatural::Cr4Mask, cr4);
        }
        let features = &self.machine.host.config.features;
        if wanted & flush::NESTED != 0 {
            vmcs.invept(features.invept, self.ept_pointer());
        } else if let (true, Some(kind), Some(vpid)) = (wanted & flush::LINEAR != 0, features.vpid, self.vpid) {
            vmcs.invvpid(kind, vpid);
        }
    }

    /// Brings RSP to where everybody looks for it.
    pub(super) fn read_rsp(&mut self, regs: &mut Regs) {
        self.rsp = self.machine.vmcs.peek(GuestNatural::Rsp);
        regs.gpr[Gpr::Rsp as usize] = self.rsp;
        self.rsp_left = false;
    }

    /// What only VMX knows, in neutral words. What is the host's goes there at once.
    #[inline]
    fn neutral(&mut self, exit: VmExit, irqs: &IrqsOff) -> Exit {
        match exit {
            VmExit::Guest(exit) => exit,
            VmExit::HostNmi => {
                deliver_host_nmi(irqs);
                Exit::HostNmi
            }
            VmExit::HostMachineCheck => {
                cpu::deliver_machine_check(irqs);
                Exit::HostInterrupt
            }
            VmExit::Debug(qualification) => {
                self.state.dr6 = debug_status(self.state.dr6, qualification);
                Exit::Exception(Exception::plain(vector::DB))
            }
            VmExit::EntryFailure { reason, .. } => {
                if reason.basic() == reason::MACHINE_CHECK {
                    cpu::deliver_machine_check(irqs);
                }
                self.entry_failed(irqs, reason.0.into())
            }
            VmExit::TprBelowThreshold => Exit::PriorityLowered,
            VmExit::PmlFull => Exit::WriteLogFull,
            VmExit::PreemptionTimer => Exit::Deadline,
            VmExit::Apic(access) => apic::access(access),
            VmExit::ApicWrite { offset } => self.apic.written(offset),
            VmExit::VirtualizedEoi { vector } => Exit::EndOfInterrupt { vector },
            VmExit::EptMisconfiguration(_) => Exit::Unknown { reason: reason::EPT_MISCONFIGURATION.into() },
            // Of controls that are off.
            _ => Exit::Unknown { reason: u64::MAX },
        }
    }

    /// RIP behind an instruction of `length` bytes at `rip`.
    #[inline]
    fn behind(&self, rip: u64, length: u8) -> u64 {
        let next = rip.wrapping_add(length.into());
        if (rip ^ next) >> 32 != 0
            && !(self.state.efer & efer::LMA != 0
                && self.state.attributes(&self.machine, SegmentName::Cs as usize).long())
        {
            next & 0xFFFF_FFFF
        } else {
            next
        }
    }

    #[cold]
    fn entry_failed(&mut self, irqs: &IrqsOff, reason: u64) -> Exit {
        if let Some(vmcs) = self.machine.vmcs.current(irqs) {
            vmcs.write(Control32::EntryInterruptionInfo, 0);
        }
        Exit::EntryFailure { reason }
    }

    /// In each stretch of interrupts off, before the first entry: makes the VMCS this CPU's, and writes what of the host has changed.
    #[inline]
    pub(super) fn load_vmcs(&mut self, irqs: &IrqsOff) {
        self.host_debugctl = DebugControl::default();
        self.machine.load(irqs);
        let Some(vmcs) = self.machine.vmcs.current(irqs) else { return };
        self.host_debugctl = DebugControl::read(irqs);
        let cpu = cpu::current();
        if self.last_cpu != cpu {
            self.last_cpu = cpu;
            write_host(vmcs, &self.machine.host, irqs);
            // Whoever had the same nested root on this CPU before, it is not to be found in its TLB any more.
            self.flush |= flush::NESTED;
        }
        let (cr3, cr4) = vmcs.host_control_registers();
        let now = HostFields {
            cr3,
            cr4,
            fs_base: self.task.as_ref().map_or(0, TaskState::fs_base),
            perf_global_ctrl: self.machine.host.read_perf_global_ctrl(),
        };
        let old = core::mem::replace(&mut self.host_fields, now);
        for (field, value, old) in [
            (HostNatural::Cr3, now.cr3, old.cr3),
            (HostNatural::Cr4, now.cr4, old.cr4),
            (HostNatural::FsBase, now.fs_base, old.fs_base),
        ] {
            if value != old {
                vmcs.write(field, value);
            }
        }
        if now.perf_global_ctrl != old.perf_global_ctrl {
            vmcs.write(Host64::PerfGlobalCtrl, now.perf_global_ctrl);
        }
        self.machine.host.flush_cache();
    }

    /// Enters the guest and tells why it exited.
    #[inline]
    pub(super) fn enter(&mut self, regs: &mut Regs, window: &Window<'_>, irqs: &IrqsOff) -> Exit {
        if self.dirty | self.flush != 0 {
            self.prepare_rarely(irqs);
        }
        let Some(vmcs) = self.machine.vmcs.current(irqs) else { return Exit::EntryFailure { reason: u64::MAX } };
        if self.user_steps {
            // The CPU would insist on a trap before the next instruction, and userspace wants the one after it.
            self.state.set_interruptibility(&self.machine, interruptibility::STI | interruptibility::MOV_SS, 0);
        }
        if regs.rflags != self.rflags {
            self.state.flags_changed(&self.machine, regs.rflags ^ self.rflags);
        }
        if self.state.is_dirty() {
            self.state.write_dirty(&self.machine, vmcs, regs.rflags);
        }
        if (regs.rflags | self.rflags) & rflags::TF != 0 {
            self.state.prepare_single_step(&self.machine, vmcs, regs.rflags);
        }
        let rsp = if self.rsp_left { self.rsp } else { regs.gpr[Gpr::Rsp as usize] };
        for (field, value, old) in [
            (GuestNatural::Rip, regs.rip, &mut self.rip),
            (GuestNatural::Rsp, rsp, &mut self.rsp),
            (GuestNatural::Rflags, regs.rflags, &mut self.rflags),
        ] {
            if value != *old {
                *old = value;
                vmcs.write(field, value);
            }
        }
        if self.primary != self.written_primary {
            self.written_primary = self.primary;
            vmcs.write(Control32::Primary, self.primary);
        }
        if self.exceptions != self.written_exceptions {
            self.written_exceptions = self.exceptions;
            vmcs.write(Control32::ExceptionBitmap, self.exceptions);
        }
        if self.run_timer.is_wanted() {
            self.run_timer.write(vmcs);
        }
        if let Some(Injection { info, error_code }) = self.injection.take() {
            vmcs.write(Control32::EntryInterruptionInfo, info.0);
            if info.has_error_code() {
                vmcs.write(Control32::EntryErrorCode, error_code);
            }
        }

        match vmcs.enter(regs, &mut self.state.cr2, self.state.spec_ctrl, &self.apic.page, window, irqs) {
            Ok(()) => {}
            Err(NotEntered::Refused(error)) => {
                pr_warn!("VM entry refused: {} ({error})\n", insn::describe(error));
                return self.entry_failed(irqs, error.into());
            }
            Err(NotEntered::VmxIsOff) => return Exit::EntryFailure { reason: u64::MAX },
        }
        self.state.ran();
        self.rip = vmcs.read(GuestNatural::Rip);
        self.rflags = vmcs.read(GuestNatural::Rflags);
        regs.rip = self.rip;
        regs.rflags = self.rflags;
        self.rsp_left = true;

        let decoded = exit::decode(&vmcs);
        self.unfinished = decoded.unfinished;
        self.next_rip = decoded.instruction_bytes.map(|length| self.behind(self.rip, length));
        if decoded.blocks_nmis && self.primary & primary::NMI_WINDOW_EXITING != 0 {
            self.state.set_interruptibility(&self.machine, 0, interruptibility::NMI);
        }
        let exit = self.neutral(decoded.exit, irqs);
        if matches!(exit, Exit::HostInterrupt) && self.machine.host.notification_vector.is_some() {
            let info = InterruptionInfo(self.machine.vmcs.peek(ReadOnly32::InterruptionInfo));
            self.acknowledged = (info.valid() && info.kind() == Kind::ExternalInterrupt).then(|| info.vector());
        }
        self.wanted = match exit {
            Exit::HostInterrupt
            | Exit::HostNmi
            | Exit::InterruptWindow
            | Exit::NmiWindow
            | Exit::WriteLogFull
            | Exit::Deadline
            | Exit::PriorityLowered
            | Exit::ApicWrite { .. }
            | Exit::EndOfInterrupt { .. } => 0,
            Exit::Port(access) if !access.string => group::INTERRUPTIBILITY,
            Exit::Hlt | Exit::Cpuid | Exit::Rdmsr | Exit::Wrmsr => group::INTERRUPTIBILITY,
            Exit::NestedFault(_) if self.state.efer & efer::LMA != 0 => group::LONG_CODE,
            // MOV to a control register may be from RSP.
            Exit::ControlRegister(_) => {
                self.read_rsp(regs);
                group::VOLATILE
            }
            _ => group::VOLATILE,
        };
        exit
    }
}

/// Writes what exits load on this CPU, which the vCPU has come to.
#[cold]
fn write_host(vmcs: CurrentVmcs<'_>, host: &Vmx, irqs: &IrqsOff) {
    host.with_host_state(irqs, |host| {
        vmcs.write(Host16::CsSelector, host.cs);
        vmcs.write(Host16::SsSelector, host.ss);
        vmcs.write(Host16::TrSelector, host.tr);
        // The task's own may be none that an exit can load; `TaskState` brings them back.
        for null in [Host16::DsSelector, Host16::EsSelector, Host16::FsSelector, Host16::GsSelector] {
            vmcs.write(null, 0);
        }
        vmcs.write(HostNatural::Cr0, host.cr0);
        vmcs.write(HostNatural::GsBase, host.gs_base);
        vmcs.write(HostNatural::TrBase, host.tr_base);
        vmcs.write(HostNatural::GdtrBase, host.gdt_base);
        vmcs.write(HostNatural::IdtrBase, host.idt_base);
        vmcs.write(Host32::SysenterCs, host.sysenter_cs as u32);
        vmcs.write(HostNatural::SysenterEsp, host.sysenter_esp);
        vmcs.write(HostNatural::SysenterEip, host.sysenter_eip);
        vmcs.write(Host64::Efer, host.efer);
        vmcs.write(Host64::Pat, host.pat);
    });
    vmcs.write_host_entry_point();
}
