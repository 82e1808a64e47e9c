// SPDX-License-Identifier: GPL-2.0
//! One virtual CPU: entering the guest, and what exits leave behind.
#![forbid(unsafe_code)]

use kernel::{prelude::*, sync::Arc};

use super::{
    apic::Apic,
    cpu::{MsrBitmaps, Vmx},
    entry::{flush, own},
    insn::WriteLog,
    pml,
    state::{group, GuestState, HostFields, Machine, FS, GS, TR},
    timer::RunTimer,
};
use crate::{
    arch::{
        cr::{cr0, dr, efer},
        segment::{DescriptorTable, Segment, SegmentAttributes},
        vmcs::{
            control::{interruptibility, primary},
            GuestNatural,
        },
        Gfn, Gpa, Hpa, Level,
    },
    glue::{
        cpu::{IrqsOff, VcpuId},
        fpu::Window,
        phys::PhysBox,
        vmx::{deliver_host_interrupt, load_kernel_gs_base, DebugControl, SyscallMsrs, TaskState},
    },
    guest::{
        event::{vector, Event},
        Exit, Regs, SystemRegs, Unintercepted,
    },
    irqchip::{lapic::Lapic, Bits256},
    mmu::Ept,
    policy::{
        msr::PAT_RESET,
        tsc::{Format, GuestTsc, Ratio},
        vmx::{
            event::{injection, interruptibility_for, Injection},
            negotiate::CR3_EXITING,
            restricted,
        },
    },
    vendor::{HardwareMsr, Vendor, VendorVcpu},
};

/// Vectors that must not be delivered without us: #DB and #AC can be raised without end by their own delivery, #UD may be the other
/// vendor's hypercall, and #MC is the host's.
pub(super) const EXCEPTIONS: u32 = 1 << vector::DB | 1 << vector::UD | 1 << vector::AC | 1 << vector::MC;

/// One vCPU.
pub(crate) struct VmxVcpu {
    pub(super) machine: Machine,
    pub(super) state: GuestState,
    pub(super) id: VcpuId,
    /// Where the CPU notes pages that the guest writes, if it can, and whether it does.
    pub(super) write_log: Option<PhysBox<WriteLog>>,
    pub(super) logs_writes: bool,
    pub(super) run_timer: RunTimer,
    pub(super) apic: Apic,
    /// MSR bitmaps of its own, where the guest reads the CPU's counters.
    pub(super) counters: Option<MsrBitmaps>,
    pub(super) vpid: Option<u16>,
    pub(super) tsc: GuestTsc,
    pub(super) nested_root: Hpa,
    /// RIP, RSP and RFLAGS as the VMCS has them.
    pub(super) rip: u64,
    pub(super) rsp: u64,
    pub(super) rflags: u64,
    /// RSP is not in `Regs` but only in the VMCS.
    pub(super) rsp_left: bool,
    /// Primary controls as they should be, and as the VMCS has them.
    pub(super) primary: u32,
    pub(super) written_primary: u32,
    /// The exception bitmap, and what of it the VMCS has.
    pub(super) exceptions: u32,
    pub(super) written_exceptions: u32,
    /// RFLAGS.TF is userspace's.
    pub(super) user_steps: bool,
    /// Fields of this room's own to be written: bits of [`own`].
    pub(super) dirty: u8,

    pub(super) injection: Option<Injection>,
    pub(super) unfinished: Option<Event>,
    pub(super) next_rip: Option<u64>,
    /// Groups to read when the VMCS is unloaded: the last exit may need them in process context.
    pub(super) wanted: u32,

    pub(super) flush: u8,
    /// IA32_PERF_GLOBAL_CTRL in the guest, as the VMCS has it or is to have it at first.
    pub(super) perf_global_ctrl: u64,
    /// The host's interrupt that the last exit acknowledged, and that the host does not know of yet.
    pub(super) acknowledged: Option<u8>,
    /// Where the vCPU ran last; a number that no CPU has before.
    pub(super) last_cpu: usize,
    pub(super) host_fields: HostFields,
    pub(super) host_debugctl: DebugControl,
    pub(super) host_syscall: SyscallMsrs,
    /// The current task's, while a window is open.
    pub(super) task: Option<TaskState>,
    /// What is in the CPU then.
    pub(super) loaded_syscall: SyscallMsrs,
}

impl Vendor for Vmx {
    type Vcpu = VmxVcpu;
    type NestedFormat = Ept;

    const HYPERCALL: [u8; 3] = [0x0F, 0x01, 0xC1];

    fn new_vcpu(self: &Arc<Self>, free: Unintercepted) -> Result<VmxVcpu> {
        let mut primary = self.config.controls.primary;
        if self.config.features.tpr_shadow {
            primary |= primary::TPR_SHADOW;
        }
        if free.hlt {
            primary &= !primary::HLT_EXITING;
        }
        if free.mwait {
            primary &= !(primary::MONITOR_EXITING | primary::MWAIT_EXITING);
        }
        // It stands still in the deeper sleep that MWAIT may choose.
        let timer = self.config.features.preemption_timer.filter(|_| !free.mwait);
        let mut vcpu = VmxVcpu {
            machine: Machine::new(self.clone())?,
            state: GuestState::new(free.hlt),
            id: VcpuId::new(),
            write_log: self.config.features.pml.then(PhysBox::new).transpose()?,
            logs_writes: false,
            run_timer: RunTimer::new(timer),
            apic: Apic::new()?,
            counters: self.counter_bitmaps(free)?,
            vpid: self.take_vpid(),
            tsc: GuestTsc { ratio: Ratio::ONE, offset: 0 },
            nested_root: Hpa(0),
            rip: 0,
            rsp: 0,
            rflags: 0,
            rsp_left: false,
            primary,
            written_primary: 0,
            exceptions: EXCEPTIONS,
            written_exceptions: EXCEPTIONS,
            user_steps: false,
            dirty: own::CONSTANT | own::CONTROL | own::SECONDARY,
            injection: None,
            unfinished: None,
            next_rip: None,
            wanted: 0,
            flush: flush::NESTED,
            perf_global_ctrl: 0,
            acknowledged: None,
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

    fn guest_xsaves(&self) -> bool {
        self.config.features.xsaves
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

    fn nested_accessed(&self) -> bool {
        self.config.features.accessed_dirty
    }

    fn no_large_execute(&self) -> bool {
        self.features.itlb_multihit
    }

    fn tsc_format(&self) -> Option<Format> {
        self.config.features.tsc_scaling.then_some(Format::VMX)
    }

    fn write_log_entries(&self) -> u32 {
        if self.config.features.pml {
            pml::ENTRIES
        } else {
            0
        }
    }

    fn takes_posted(&self) -> bool {
        self.notification_vector.is_some()
    }

    fn counts_guests(&self) -> bool {
        self.perf_global_ctrl
    }

    fn has_apic_page(&self) -> bool {
        let features = &self.config.features;
        features.apic_access && features.apic_registers && features.virtual_interrupts
    }

    fn wants_identity_map(&self) -> bool {
        !self.config.features.unrestricted_guest
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

    /// CR0 was set.
    fn paging_set(&mut self) {
        let hidden = self.state.hides_paging();
        set_bit(&mut self.primary, CR3_EXITING, hidden);
        self.flush |= flush::LINEAR;
    }

    fn set_segment_base(&mut self, number: usize, base: u64) {
        let old = self.state.segment(&self.machine, number);
        self.state.set_segment(number, Segment { base, ..old });
    }
}

impl VendorVcpu for VmxVcpu {
    const NMI_WINDOW: bool = true;
    const DELIVERS: bool = true;

    fn reset(&mut self, init: bool) {
        if core::mem::take(&mut self.rsp_left) {
            // The VMCS is loaded, and what it has decides whether the next entry writes it.
            self.rsp = self.machine.vmcs.peek(GuestNatural::Rsp);
        }
        // INIT leaves CR0.CD, CR0.NW and most MSRs alone.
        let caching = if init { self.state.cr0_mode() & (cr0::CD | cr0::NW) } else { cr0::CD | cr0::NW };
        self.set_system_regs(&SystemRegs { cr0: cr0::ET | caching, ..SystemRegs::AT_RESET });
        self.state.dr6 = dr::DR6_INIT;
        self.state.dr7 = dr::DR7_INIT;
        self.state.set_interruptibility(&self.machine, u32::MAX, 0);
        self.injection = None;
        self.unfinished = None;
        self.want_interrupt_window(false);
        self.want_nmi_window(false);
        if !init {
            self.state.pat = PAT_RESET;
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
        self.state.set_system_regs(&self.machine, regs);
        self.paging_set();
    }

    #[inline]
    fn segment(&self, number: usize) -> Segment {
        self.state.segment(&self.machine, number)
    }

    #[inline]
    fn attributes(&self, number: usize) -> SegmentAttributes {
        self.state.attributes(&self.machine, number)
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
        self.state.cr0(&self.machine)
    }

    #[inline]
    fn cr0_bits(&self, wanted: u64) -> u64 {
        self.state.cr0_bits(&self.machine, wanted)
    }

    fn set_cr0(&mut self, value: u64) {
        self.state.set_cr0(&self.machine, value);
        self.paging_set();
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
        self.state.cr4(&self.machine)
    }

    #[inline]
    fn cr4_bits(&self, wanted: u64) -> u64 {
        self.state.cr4_bits(&self.machine, wanted)
    }

    fn set_cr4_allowed(&mut self, allowed: u64) {
        self.state.own_cr4(&self.machine, allowed);
        self.dirty |= own::CONTROL;
    }

    fn set_cr4(&mut self, value: u64) {
        self.state.set_cr4(value);
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

    fn set_tsc(&mut self, tsc: GuestTsc) {
        self.tsc = tsc;
        self.dirty |= own::CONTROL | own::SECONDARY;
    }

    fn inject(&mut self, event: Event, _irqs: &IrqsOff) {
        match event {
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
        self.state.wake();
        self.injection = injection(event, self.state.cr0_mode() & cr0::PE != 0);
        let state = self.state.interruptibility(&self.machine);
        self.state.set_interruptibility(&self.machine, u32::MAX, interruptibility_for(state, self.injection));
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

    #[inline]
    fn has_interrupt_window(&self) -> bool {
        self.primary & primary::INTERRUPT_WINDOW_EXITING != 0
    }

    fn want_nmi_window(&mut self, wanted: bool) {
        set_bit(&mut self.primary, primary::NMI_WINDOW_EXITING, wanted);
    }

    fn want_cr8_writes(&mut self, below: Option<u8>) {
        // Without the shadow every write exits.
        if self.machine.host.config.features.tpr_shadow && self.apic.set_threshold(below.unwrap_or(0)) {
            self.dirty |= own::SECONDARY;
        }
    }

    fn want_breakpoints(&mut self, wanted: bool) {
        set_bit(&mut self.exceptions, 1 << vector::BP, wanted);
    }

    fn set_user_steps(&mut self, steps: bool) {
        self.user_steps = steps;
    }

    fn want_all_msrs(&mut self, wanted: bool) {
        set_bit(&mut self.primary, primary::USE_MSR_BITMAPS, !wanted);
    }

    #[inline]
    fn watches_deadlines(&self) -> bool {
        self.run_timer.exists()
    }

    fn set_deadline(&mut self, tsc: Option<u64>) {
        self.run_timer.set_deadline(tsc);
    }

    fn log_writes(&mut self, on: bool) {
        self.set_pml(on);
    }

    #[inline]
    fn take_written(&mut self, irqs: &IrqsOff) -> Option<impl Iterator<Item = Gfn>> {
        match self.logs_writes {
            true => self.empty_pml(irqs),
            false => None,
        }
    }

    #[inline]
    fn tpr(&self) -> u8 {
        self.apic.page.cr8()
    }

    #[inline]
    fn set_tpr(&mut self, cr8: u8) {
        self.apic.set_cr8(cr8);
    }

    fn set_apic_page(&mut self, page: Hpa) {
        self.apic.set_window(page);
    }

    fn set_identity_map(&mut self, at: Gpa) {
        self.state.set_identity_map(at);
        self.paging_set();
    }

    fn set_posted(&mut self, descriptor: Hpa) {
        self.apic.set_posted(descriptor);
    }

    fn choose_delivery(&mut self, apic: Option<&Lapic>) -> bool {
        if self.apic.choose(&self.machine.host.config.features, apic) {
            self.dirty |= own::SECONDARY;
            // What is cached of the APIC-access page depends on the control. SDM "Virtualizing Memory-Mapped APIC Accesses".
            self.flush |= flush::NESTED;
        }
        self.apic.delivers()
    }

    fn uses_apic_page(&self) -> bool {
        self.apic.has_window()
    }

    fn set_eoi_listeners(&mut self, vectors: &Bits256) {
        self.apic.set_listeners(vectors);
    }

    fn hand_over(&mut self, lapic: &mut Lapic, all: bool, irqs: &IrqsOff) {
        if self.dirty & own::SECONDARY != 0 {
            self.prepare_rarely(irqs);
        }
        // Without a VMCS there is no entry.
        if let Some(vmcs) = self.machine.vmcs.current(irqs) {
            self.apic.hand_over(vmcs, lapic, all);
        }
    }

    fn take_back(&mut self, lapic: &mut Lapic) {
        self.apic.take_back(lapic);
    }

    #[inline]
    fn enable_counters(&mut self, enabled: u64, irqs: &IrqsOff) {
        if enabled != self.perf_global_ctrl {
            self.write_counters(enabled, irqs);
        }
    }

    #[inline]
    fn needs_software(&self, regs: &Regs) -> bool {
        !self.machine.host.config.features.unrestricted_guest
            && (!restricted::mode_fits(self.state.cr0_mode(), self.state.has_identity_map())
                || self.state.is_dirty() && !self.state.segments_fit(&self.machine, regs.rflags))
    }

    fn forget_exit(&mut self) {
        self.next_rip = None;
    }

    #[inline]
    fn wants_pdptes(&self) -> bool {
        self.state.wants_pdptes()
    }

    fn set_pdptes(&mut self, entries: [u64; 4]) {
        self.state.set_pdptes(entries, self.machine.host.physical_bits);
    }

    fn pdptes(&self) -> Option<[u64; 4]> {
        Some(self.state.pdptes(&self.machine))
    }

    #[inline]
    fn next_rip(&self) -> Option<u64> {
        self.next_rip
    }

    fn instruction_bytes(&self) -> Option<&[u8]> {
        None
    }

    fn load(&mut self, irqs: &IrqsOff) {
        self.machine.host.separate(&self.id, irqs);
        let task = TaskState::save(irqs);
        load_kernel_gs_base(self.state.kernel_gs_base, &task);
        self.task = Some(task);
        self.host_syscall = SyscallMsrs::read(irqs);
        self.loaded_syscall = self.host_syscall;
        self.load_syscall_msrs();
        self.load_vmcs(irqs);
    }

    #[inline]
    fn leave_registers(&mut self) {
        self.wanted = 0;
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
        if let Some(task) = self.task.take() {
            self.loaded_syscall.replace(&self.host_syscall);
            self.state.kernel_gs_base = task.restore();
            self.machine.host.leave();
        }
    }

    #[inline]
    fn deliver_host_interrupt(&mut self, irqs: &IrqsOff) {
        if let Some(vector) = self.acknowledged.take() {
            deliver_host_interrupt(vector, irqs);
        }
    }

    #[inline]
    fn run(&mut self, regs: &mut Regs, window: &Window<'_>, irqs: &IrqsOff) -> Exit {
        self.enter(regs, window, irqs)
    }
}

fn set_bit(word: &mut u32, bit: u32, on: bool) {
    *word = *word & !bit | if on { bit } else { 0 };
}
