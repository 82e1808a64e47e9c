// SPDX-License-Identifier: GPL-2.0
//! One virtual CPU: entering the guest, and what exits leave behind.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

use kernel::{prelude::*, sync::Arc};

use super::{
    cpu::Vmx,
    insn::{self, CurrentVmcs, NotEntered, VirtualApic},
    state::{group, GuestState, HostFields, Machine, FS, GS, TR},
};
use crate::{
    arch::{
        cr::{cr0, dr, efer, rflags},
        segment::{DescriptorTable, Segment, SegmentAttributes, SegmentName},
        vmcs::{
            control::{eptp, interruptibility, primary, secondary, NO_LINK},
            exit::reason,
            Control16, Control32, Control64, ControlNatural, Guest64, GuestNatural, Host16, Host32, Host64,
            HostNatural,
        },
        Hpa, Level,
    },
    glue::{
        cpu::{self, IrqsOff},
        fpu::Window,
        phys::PhysBox,
        vmx::{deliver_host_nmi, load_kernel_gs_base, DebugControl, SyscallMsrs, TaskState},
    },
    guest::{
        event::{vector, Event, Exception},
        Exit, Gpr, Regs, SystemRegs,
    },
    mmu::Ept,
    policy::vmx::{
        event::{injection, Injection},
        exit::{self, debug_status, VmExit},
    },
    vendor::{HardwareMsr, Vendor, VendorVcpu},
};

/// Vectors that must not be delivered without us: #DB and #AC can be raised without end by their own delivery, and #MC is the host's.
const EXCEPTIONS: u32 = 1 << vector::DB | 1 << vector::AC | 1 << vector::MC;

/// PAT after reset.
const PAT_INIT: u64 = 0x0007_0406_0007_0406;

/// What else than registers the next entry writes.
mod own {
    /// Everything that is written once.
    pub(super) const CONSTANT: u8 = 1 << 0;
    /// Nested root and TSC offset.
    pub(super) const CONTROL: u8 = 1 << 1;
}

/// Translations to forget before the next entry.
mod flush {
    /// Of linear addresses: a control register was changed for the guest.
    pub(super) const LINEAR: u8 = 1 << 0;
    /// All.
    pub(super) const NESTED: u8 = 1 << 1;
}

/// One vCPU.
pub(crate) struct VmxVcpu {
    machine: Machine,
    state: GuestState,
    /// Like no other vCPU's, ever.
    number: u64,
    virtual_apic: PhysBox<VirtualApic>,
    vpid: Option<u16>,
    tsc_offset: u64,
    nested_root: Hpa,
    /// RIP, RSP and RFLAGS as the VMCS has them.
    rip: u64,
    rsp: u64,
    rflags: u64,
    /// RSP is not in `Regs` but only in the VMCS.
    rsp_left: bool,
    /// Primary controls as they should be, and as the VMCS has them.
    primary: u32,
    written_primary: u32,
    /// The exception bitmap, and what of it the VMCS has.
    exceptions: u32,
    written_exceptions: u32,
    /// Fields of this room's own to be written: bits of [`own`].
    dirty: u8,

    injection: Option<Injection>,
    unfinished: Option<Event>,
    next_rip: Option<u64>,
    /// Groups to read when the VMCS is unloaded: the last exit may need them in process context.
    wanted: u32,

    flush: u8,
    /// Where the vCPU ran last; a number that no CPU has before.
    last_cpu: usize,
    host_fields: HostFields,
    host_debugctl: DebugControl,
    host_syscall: SyscallMsrs,
    /// The current task's, while a window is open.
    task: Option<TaskState>,
    /// What is in the CPU then.
    loaded_syscall: SyscallMsrs,
}

impl Vendor for Vmx {
    type Vcpu = VmxVcpu;
    type NestedFormat = Ept;

    const HYPERCALL: [u8; 3] = [0x0F, 0x01, 0xC1];

    fn new_vcpu(self: &Arc<Self>) -> Result<VmxVcpu> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let mut vcpu = VmxVcpu {
            machine: Machine::new(self.clone())?,
            state: GuestState::new(),
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            virtual_apic: PhysBox::new()?,
            vpid: self.take_vpid(),
            tsc_offset: 0,
            nested_root: Hpa(0),
            rip: 0,
            rsp: 0,
            rflags: 0,
            rsp_left: false,
            primary: self.config.controls.primary
                | if self.config.features.tpr_shadow { primary::TPR_SHADOW } else { 0 },
            written_primary: 0,
            exceptions: EXCEPTIONS,
            written_exceptions: EXCEPTIONS,
            dirty: own::CONSTANT | own::CONTROL,
            injection: None,
            unfinished: None,
            next_rip: None,
            wanted: 0,
            flush: flush::NESTED,
            last_cpu: usize::MAX,
            host_fields: HostFields::UNWRITTEN,
            host_debugctl: DebugControl::default(),
            host_syscall: SyscallMsrs::default(),
            task: None,
            loaded_syscall: SyscallMsrs::default(),
        };
        vcpu.reset(false);
        Ok(vcpu)
    }

    fn nested_levels(&self) -> u8 {
        4
    }

    fn nested_largest(&self) -> Level {
        match (self.config.features.page_2m, self.config.features.page_1g) {
            (false, _) => Level::Page4K,
            (true, false) => Level::Page2M,
            (true, true) => Level::Page1G,
        }
    }

    fn no_large_execute(&self) -> bool {
        self.features.itlb_multihit
    }
}

impl Drop for VmxVcpu {
    fn drop(&mut self) {
        if let Some(vpid) = self.vpid {
            self.machine.host.give_vpid(vpid);
        }
    }
}

impl VmxVcpu {
    /// The guest's SYSCALL MSRs go into the CPU while a window is open, if it can use them.
    fn load_syscall_msrs(&mut self) {
        if self.task.is_some() && self.state.efer & efer::SCE != 0 {
            self.loaded_syscall.replace(&self.state.syscall);
        }
    }

    fn set_segment_base(&mut self, number: usize, base: u64) {
        let old = self.state.segment(&self.machine, number);
        self.state.set_segment(number, Segment { base, ..old });
    }

    fn ept_pointer(&self) -> u64 {
        self.nested_root.0 | eptp::TYPE_WB | 3 << eptp::WALK_SHIFT | eptp::ACCESSED_DIRTY
    }

    fn write_constants(&self, vmcs: CurrentVmcs<'_>) {
        let controls = &self.machine.host.config.controls;
        vmcs.write(Control32::Pin, controls.pin);
        let without_vpid = if self.vpid.is_none() { secondary::VPID } else { 0 };
        vmcs.write(Control32::Secondary, controls.secondary & !without_vpid);
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
            Control32::TprThreshold,
        ] {
            vmcs.write(zero, 0);
        }
        if let Some(vpid) = self.vpid {
            vmcs.write(Control16::Vpid, vpid);
        }
        let features = &self.machine.host.config.features;
        if features.encls_exiting {
            vmcs.write(Control64::EnclsExitBitmap, u64::MAX);
        }
        if self.machine.host.perf_global_ctrl {
            // The host's counters do not count guests: a record of theirs would go to an address of the guest's.
            vmcs.write(Guest64::PerfGlobalCtrl, 0);
            vmcs.write(Host64::PerfGlobalCtrl, self.host_fields.perf_global_ctrl);
        }
        vmcs.write(Control64::MsrBitmaps, insn::address(&self.machine.host.msr_bitmap));
        vmcs.write(Control64::VirtualApicAddress, insn::address(&self.virtual_apic));
        vmcs.write(ControlNatural::Cr0Mask, u64::MAX);
        vmcs.write(ControlNatural::Cr4Mask, u64::MAX);
        vmcs.write(Guest64::LinkPointer, NO_LINK);
        vmcs.write(Guest64::Debugctl, 0);
        vmcs.write(GuestNatural::Rip, self.rip);
        vmcs.write(GuestNatural::Rsp, self.rsp);
        vmcs.write(GuestNatural::Rflags, self.rflags);
    }

    /// What few entries need: fields that nearly never change, and forgetting translations.
    #[cold]
    fn prepare_rarely(&mut self, irqs: &IrqsOff) {
        // Without a VMCS the entry fails, and what was wanted waits for the next one.
        let Some(vmcs) = self.machine.vmcs.current(irqs) else { return };
        let dirty = core::mem::take(&mut self.dirty);
        let wanted = core::mem::take(&mut self.flush);
        if dirty & own::CONSTANT != 0 {
            self.write_constants(vmcs);
        }
        if dirty & own::CONTROL != 0 {
            vmcs.write(Control64::EptPointer, self.ept_pointer());
            vmcs.write(Control64::TscOffset, self.tsc_offset);
        }
        let features = &self.machine.host.config.features;
        if wanted & flush::NESTED != 0 {
            vmcs.invept(features.invept, self.ept_pointer());
        } else if let (true, Some(kind), Some(vpid)) = (wanted & flush::LINEAR != 0, features.vpid, self.vpid) {
            vmcs.invvpid(kind, vpid);
        }
    }

    /// Brings RSP to where everybody looks for it.
    fn read_rsp(&mut self, regs: &mut Regs) {
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
                && self.state.segment(&self.machine, SegmentName::Cs as usize).attributes.long())
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
}

impl VendorVcpu for VmxVcpu {
    const NMI_WINDOW: bool = true;

    fn reset(&mut self, init: bool) {
        if core::mem::take(&mut self.rsp_left) {
            // The VMCS is loaded, and what it has decides whether the next entry writes it.
            self.rsp = self.machine.vmcs.peek(GuestNatural::Rsp);
        }
        // SDM "Processor State After Reset": INIT keeps CR0.CD and CR0.NW and most MSRs.
        let caching = if init { self.state.cr0 & (cr0::CD | cr0::NW) } else { cr0::CD | cr0::NW };
        let data = Segment { base: 0, limit: 0xFFFF, selector: 0, attributes: SegmentAttributes(0x93) };
        let code = Segment { base: 0xFFFF_0000, selector: 0xF000, attributes: SegmentAttributes(0x9B), ..data };
        self.set_system_regs(&SystemRegs {
            segments: [data, code, data, data, data, data],
            ldtr: Segment { attributes: SegmentAttributes(0x82), ..data },
            tr: Segment { attributes: SegmentAttributes(0x8B), ..data },
            gdtr: DescriptorTable { base: 0, limit: 0xFFFF },
            idtr: DescriptorTable { base: 0, limit: 0xFFFF },
            cr0: cr0::ET | caching,
            ..SystemRegs::default()
        });
        self.state.dr6 = dr::DR6_INIT;
        self.state.dr7 = dr::DR7_INIT;
        self.state.set_interruptibility(&self.machine, u32::MAX, 0);
        self.injection = None;
        self.unfinished = None;
        self.want_interrupt_window(false);
        self.want_nmi_window(false);
        if !init {
            self.state.pat = PAT_INIT;
            self.state.sysenter = [0; 3];
            self.state.syscall = SyscallMsrs::default();
            self.state.kernel_gs_base = 0;
            self.state.spec_ctrl = 0;
        }
        self.state.changed(group::DR7 | group::MSRS | group::RESET);
        self.flush_tlb();
    }

    fn system_regs(&self) -> SystemRegs {
        self.state.system_regs(&self.machine)
    }

    fn set_system_regs(&mut self, regs: &SystemRegs) {
        self.state.set_system_regs(regs);
        self.flush |= flush::LINEAR;
    }

    #[inline]
    fn segment(&self, number: usize) -> Segment {
        self.state.segment(&self.machine, number)
    }

    fn set_segment(&mut self, number: usize, value: &Segment) {
        self.state.set_segment(number, *value);
    }

    fn tr(&self) -> Segment {
        self.state.segment(&self.machine, TR)
    }

    fn gdtr(&self) -> DescriptorTable {
        self.state.gdtr(&self.machine)
    }

    fn set_gdtr(&mut self, value: DescriptorTable) {
        self.state.set_gdtr(value);
    }

    fn idtr(&self) -> DescriptorTable {
        self.state.idtr(&self.machine)
    }

    fn set_idtr(&mut self, value: DescriptorTable) {
        self.state.set_idtr(value);
    }

    #[inline]
    fn cr0(&self) -> u64 {
        self.state.cr0
    }

    fn set_cr0(&mut self, value: u64) {
        self.state.cr0 = value;
        self.state.changed(group::CR0);
        self.flush |= flush::LINEAR;
    }

    #[inline]
    fn cr2(&self) -> u64 {
        self.state.cr2
    }

    fn set_cr2(&mut self, value: u64) {
        self.state.cr2 = value;
    }

    #[inline]
    fn cr3(&self) -> u64 {
        self.state.cr3(&self.machine)
    }

    fn set_cr3(&mut self, value: u64) {
        self.state.set_cr3(value);
        self.flush |= flush::LINEAR;
    }

    #[inline]
    fn cr4(&self) -> u64 {
        self.state.cr4
    }

    fn set_cr4(&mut self, value: u64) {
        self.state.cr4 = value;
        self.state.changed(group::CR4);
        self.flush |= flush::LINEAR;
    }

    #[inline]
    fn efer(&self) -> u64 {
        self.state.efer
    }

    #[inline]
    fn cpl(&self) -> u8 {
        self.state.cpl(&self.machine)
    }

    fn dr6(&self) -> u64 {
        self.state.dr6
    }

    fn set_dr6(&mut self, value: u64) {
        self.state.dr6 = value;
    }

    fn dr7(&self) -> u64 {
        self.state.dr7
    }

    fn set_dr7(&mut self, value: u64) {
        self.state.dr7 = value;
        self.state.changed(group::DR7);
    }

    fn msr(&self, msr: HardwareMsr) -> u64 {
        let [star, lstar, cstar, sfmask] = self.state.syscall.0;
        let [cs, esp, eip] = self.state.sysenter;
        match msr {
            HardwareMsr::Efer => self.state.efer,
            HardwareMsr::Star => star,
            HardwareMsr::Lstar => lstar,
            HardwareMsr::Cstar => cstar,
            HardwareMsr::Sfmask => sfmask,
            HardwareMsr::FsBase => self.state.segment(&self.machine, FS).base,
            HardwareMsr::GsBase => self.state.segment(&self.machine, GS).base,
            HardwareMsr::KernelGsBase => {
                self.task.as_ref().map_or(self.state.kernel_gs_base, |task| task.guest_kernel_gs_base())
            }
            HardwareMsr::SysenterCs => cs,
            HardwareMsr::SysenterEsp => esp,
            HardwareMsr::SysenterEip => eip,
            HardwareMsr::Pat => self.state.pat,
            HardwareMsr::SpecCtrl => self.state.spec_ctrl,
        }
    }

    fn set_msr(&mut self, msr: HardwareMsr, value: u64) {
        match msr {
            HardwareMsr::Efer => {
                self.state.efer = value;
                self.state.changed(group::EFER);
                self.flush |= flush::LINEAR;
            }
            HardwareMsr::Star => self.state.syscall.0[0] = value,
            HardwareMsr::Lstar => self.state.syscall.0[1] = value,
            HardwareMsr::Cstar => self.state.syscall.0[2] = value,
            HardwareMsr::Sfmask => self.state.syscall.0[3] = value,
            HardwareMsr::FsBase => self.set_segment_base(FS, value),
            HardwareMsr::GsBase => self.set_segment_base(GS, value),
            HardwareMsr::KernelGsBase => {
                self.state.kernel_gs_base = value;
                if let Some(task) = &self.task {
                    load_kernel_gs_base(value, task);
                }
            }
            HardwareMsr::SysenterCs => self.state.sysenter[0] = value,
            HardwareMsr::SysenterEsp => self.state.sysenter[1] = value,
            HardwareMsr::SysenterEip => self.state.sysenter[2] = value,
            HardwareMsr::Pat => self.state.pat = value,
            HardwareMsr::SpecCtrl => self.state.spec_ctrl = value,
        }
        self.state.changed(group::MSRS);
        self.load_syscall_msrs();
    }

    fn set_nested_root(&mut self, root: Hpa) {
        self.nested_root = root;
        self.dirty |= own::CONTROL;
        self.flush_tlb();
    }

    fn flush_tlb(&mut self) {
        self.flush |= flush::NESTED;
    }

    fn tsc_offset(&self) -> u64 {
        self.tsc_offset
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.tsc_offset = offset;
        self.dirty |= own::CONTROL;
    }

    fn inject(&mut self, event: Event) {
        match event {
            // It must not find NMIs blocked; the delivery blocks them.
            Event::Nmi => self.state.set_interruptibility(&self.machine, interruptibility::NMI, 0),
            Event::Exception(exception) => {
                match (exception.vector, exception.payload) {
                    (vector::PF, Some(address)) => self.state.cr2 = address,
                    (vector::DB, Some(bits)) => self.state.dr6 |= bits,
                    _ => {}
                }
                if exception.vector == vector::DB && self.state.dr7 & dr::DR7_GD != 0 {
                    // SDM "General-Detect Exception Condition": the handler may use the debug registers.
                    self.set_dr7(self.state.dr7 & !dr::DR7_GD);
                }
            }
            _ => {}
        }
        self.injection = injection(event, self.state.cr0 & cr0::PE != 0);
    }

    #[inline]
    fn take_unfinished_event(&mut self) -> Option<Event> {
        self.unfinished.take()
    }

    #[inline]
    fn interrupt_shadow(&self) -> bool {
        self.state.interruptibility(&self.machine) & (interruptibility::STI | interruptibility::MOV_SS) != 0
    }

    #[inline]
    fn set_interrupt_shadow(&mut self, shadow: bool) {
        let both = interruptibility::STI | interruptibility::MOV_SS;
        self.state.set_interruptibility(&self.machine, both, if shadow { interruptibility::STI } else { 0 });
    }

    fn set_nmi_masked(&mut self, masked: bool) {
        self.state.set_interruptibility(
            &self.machine,
            interruptibility::NMI,
            if masked { interruptibility::NMI } else { 0 },
        );
        self.want_nmi_window(masked);
    }

    fn want_interrupt_window(&mut self, wanted: bool) {
        set_bit(&mut self.primary, primary::INTERRUPT_WINDOW_EXITING, wanted);
    }

    fn want_nmi_window(&mut self, wanted: bool) {
        set_bit(&mut self.primary, primary::NMI_WINDOW_EXITING, wanted);
    }

    fn want_cr8_writes(&mut self, wanted: bool) {
        set_bit(&mut self.primary, primary::CR8_LOAD_EXITING, wanted);
    }

    fn want_breakpoints(&mut self, wanted: bool) {
        set_bit(&mut self.exceptions, 1 << vector::BP, wanted);
    }

    fn want_all_msrs(&mut self, wanted: bool) {
        set_bit(&mut self.primary, primary::USE_MSR_BITMAPS, !wanted);
    }

    #[inline]
    fn tpr(&self) -> u8 {
        self.virtual_apic.cr8()
    }

    #[inline]
    fn set_tpr(&mut self, cr8: u8) {
        self.virtual_apic.set_cr8(cr8);
    }

    #[inline]
    fn wants_pdptes(&self) -> bool {
        self.state.wants_pdptes()
    }

    fn set_pdptes(&mut self, entries: [u64; 4]) {
        self.state.set_pdptes(entries, self.machine.host.physical_bits);
    }

    #[inline]
    fn next_rip(&self) -> Option<u64> {
        self.next_rip
    }

    fn instruction_bytes(&self) -> Option<&[u8]> {
        None
    }

    fn begin_window(&mut self, irqs: &IrqsOff) {
        self.machine.host.separate(self.number, irqs);
        let task = TaskState::save(irqs);
        load_kernel_gs_base(self.state.kernel_gs_base, &task);
        self.task = Some(task);
        self.host_syscall = SyscallMsrs::read(irqs);
        self.loaded_syscall = self.host_syscall;
        self.load_syscall_msrs();
    }

    fn end_window(&mut self) {
        if let Some(task) = self.task.take() {
            self.loaded_syscall.replace(&self.host_syscall);
            self.state.kernel_gs_base = task.restore();
        }
    }

    fn load(&mut self, irqs: &IrqsOff) {
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

    fn unload(&mut self, regs: &mut Regs, irqs: &IrqsOff) {
        if core::mem::take(&mut self.rsp_left) {
            self.read_rsp(regs);
        }
        let wanted = core::mem::take(&mut self.wanted);
        if wanted != 0 && self.machine.vmcs.is_current() {
            self.state.read_groups(&self.machine, wanted);
        }
        self.machine.unload(irqs);
        self.host_debugctl.restore(irqs);
    }

    #[inline]
    fn run(&mut self, regs: &mut Regs, window: &Window<'_>, irqs: &IrqsOff) -> Exit {
        if self.dirty | self.flush != 0 {
            self.prepare_rarely(irqs);
        }
        let Some(vmcs) = self.machine.vmcs.current(irqs) else { return Exit::EntryFailure { reason: u64::MAX } };
        if self.state.is_dirty() {
            self.state.write_dirty(&self.machine, vmcs, regs.rflags);
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
        if regs.rflags & rflags::TF != 0 {
            self.state.prepare_single_step(&self.machine, vmcs);
        }
        if self.primary != self.written_primary {
            self.written_primary = self.primary;
            vmcs.write(Control32::Primary, self.primary);
        }
        if self.exceptions != self.written_exceptions {
            self.written_exceptions = self.exceptions;
            vmcs.write(Control32::ExceptionBitmap, self.exceptions);
        }
        if let Some(Injection { info, error_code }) = self.injection.take() {
            vmcs.write(Control32::EntryInterruptionInfo, info.0);
            if info.has_error_code() {
                vmcs.write(Control32::EntryErrorCode, error_code);
            }
        }

        match vmcs.enter(regs, &mut self.state.cr2, self.state.spec_ctrl, &self.virtual_apic, window, irqs) {
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
        self.wanted = match exit {
            Exit::HostInterrupt | Exit::HostNmi | Exit::InterruptWindow | Exit::NmiWindow => 0,
            Exit::Port(access) if !access.string => group::INTERRUPTIBILITY,
            Exit::Hlt | Exit::Cpuid | Exit::Rdmsr | Exit::Wrmsr => group::INTERRUPTIBILITY,
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

fn set_bit(word: &mut u32, bit: u32, on: bool) {
    *word = *word & !bit | if on { bit } else { 0 };
}
