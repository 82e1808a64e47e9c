// SPDX-License-Identifier: GPL-2.0
//! One virtual CPU: its VMCB and what goes in and out of it.
#![forbid(unsafe_code)]

use kernel::{prelude::*, sync::Arc};

use super::{
    cpu::{counter_permissions, Asid, Injection, Svm},
    exit, insn,
};
use crate::{
    arch::{
        cr::{cr0, dr, efer},
        segment::{DescriptorTable, Segment, SegmentAttributes},
        vmcb::{event, exit_code, int_ctl, int_state, misc1, misc2, misc3, tlb_ctl, Vmcb, VmcbSegment},
        Hpa, Level,
    },
    glue::{
        cpu::{self, IrqsOff, VcpuId},
        fpu::Window,
        phys::{Bytes, PhysBox},
    },
    guest::{
        event::{vector, Event, Exception},
        Exit, Gpr, Regs, SystemRegs, Unintercepted,
    },
    mmu::Npt,
    policy::{
        msr::PAT_RESET,
        tsc::{Format, GuestTsc, Ratio},
    },
    vendor::{HardwareMsr, Vendor, VendorVcpu},
};

/// Vectors that must not be delivered without us: #DB and #AC can be raised without end by their own delivery, #UD may be the other
/// vendor's hypercall, and #MC is the host's.
const EXCEPTIONS: u32 = 1 << vector::DB | 1 << vector::UD | 1 << vector::AC | 1 << vector::MC;

const MISC1: u32 = misc1::INTR
    | misc1::NMI
    | misc1::SMI
    | misc1::INIT
    | misc1::RDPMC
    | misc1::CPUID
    | misc1::RSM
    | misc1::INVD
    | misc1::HLT
    | misc1::INVLPGA
    | misc1::IOIO
    | misc1::MSR
    | misc1::FERR_FREEZE
    | misc1::SHUTDOWN;

const MISC2: u32 = misc2::VMRUN
    | misc2::VMMCALL
    | misc2::VMLOAD
    | misc2::VMSAVE
    | misc2::STGI
    | misc2::CLGI
    | misc2::SKINIT
    | misc2::WBINVD
    | misc2::MONITOR
    | misc2::MWAIT
    | misc2::XSETBV
    | misc2::RDPRU;

const MISC3: u32 = misc3::INVLPGB | misc3::INVLPGB_ILLEGAL | misc3::MCOMMIT | misc3::TLBSYNC;

/// Writes of CR0 and CR4: bits 16 up are writes.
const CR_WRITES: u32 = 1 << 16 | 1 << 20;
const CR0_READ: u32 = 1;
const CR8_WRITE: u32 = 1 << 24;

/// The upper half of V_TPR.
const V_TPR_RESERVED: u32 = 0xF0;

pub(crate) struct SvmVcpu {
    host: Arc<Svm>,
    id: VcpuId,
    vmcb: PhysBox<Vmcb>,
    asid: Asid,
    flush_wanted: bool,
    tsc_ratio: Ratio,
    /// CR0 as the guest set it: hardware's copy has caching on, and the newest TS.
    guest_cr0: u64,
    /// EFER as the guest set it: hardware's copy has SVME, and LME only together with paging.
    guest_efer: u64,
    spec_ctrl: u64,
    /// MSR permissions of its own, where the guest reads the CPU's counters.
    counters: Option<PhysBox<Bytes<{ 2 * 4096 }>>>,
    /// The interrupt that was last injected as INT n: see [`Injection`].
    interrupt_as_int: Option<u8>,
}

impl Vendor for Svm {
    type Vcpu = SvmVcpu;
    type NestedFormat = Npt;
    /// VMMCALL.
    const HYPERCALL: [u8; 3] = [0x0F, 0x01, 0xD9];

    fn new_vcpu(self: &Arc<Self>, free: Unintercepted) -> Result<SvmVcpu> {
        let mut vcpu = SvmVcpu {
            host: self.clone(),
            id: VcpuId::new(),
            vmcb: PhysBox::new()?,
            asid: Asid::default(),
            tsc_ratio: Ratio::ONE,
            flush_wanted: false,
            guest_cr0: 0,
            guest_efer: 0,
            spec_ctrl: 0,
            counters: counter_permissions(&self.msr_permissions, free)?,
            interrupt_as_int: None,
        };
        let control = &mut vcpu.vmcb.control;
        control.intercept_cr = CR_WRITES;
        control.intercept_dr = u32::MAX;
        control.intercept_exceptions = EXCEPTIONS;
        control.intercept_misc1 = MISC1 & if free.hlt { !misc1::HLT } else { !0 };
        control.intercept_misc2 = MISC2 & if free.mwait { !(misc2::MONITOR | misc2::MWAIT) } else { !0 };
        control.intercept_misc3 = MISC3;
        control.iopm_base = self.io_permissions.address().0;
        control.int_ctl = int_ctl::V_INTR_MASKING;
        control.nested_ctl = 1;
        vcpu.want_all_msrs(false);
        vcpu.reset(false);
        Ok(vcpu)
    }

    fn guest_xsaves(&self) -> bool {
        // There is no intercept.
        true
    }

    fn tsc_format(&self) -> Option<Format> {
        self.tsc_ratio.then_some(Format::SVM)
    }

    fn nested_levels(&self) -> u8 {
        // Nested walks have the depth of the host's own paging. APM Vol. 2 "Nested Paging".
        if self.features.la57 {
            5
        } else {
            4
        }
    }

    fn nested_largest(&self) -> Level {
        Level::Page1G
    }

    fn nested_accessed(&self) -> bool {
        true
    }

    fn no_large_execute(&self) -> bool {
        false
    }
}

impl SvmVcpu {
    fn raw_segments(&mut self) -> [&mut VmcbSegment; 6] {
        let save = &mut self.vmcb.save;
        [&mut save.es, &mut save.cs, &mut save.ss, &mut save.ds, &mut save.fs, &mut save.gs]
    }

    /// Gives hardware what EFER comes to. Writes are intercepted, so the guest sees only its own.
    fn update_mode(&mut self) {
        let save = &mut self.vmcb.save;
        // LME means nothing without paging. An emulated CPU that exits from a guest with LME but without PAE takes the host's CR0.PG
        // for the guest's step into long mode, refuses it, and leaves the host without paging.
        let unused = if self.guest_cr0 & cr0::PG == 0 { efer::LME } else { 0 };
        save.efer = self.guest_efer & !unused | efer::SVME;
    }
}

fn from_raw(raw: &VmcbSegment) -> Segment {
    Segment {
        base: raw.base,
        limit: raw.limit,
        selector: raw.selector,
        attributes: SegmentAttributes(raw.attributes & 0xFFF),
    }
}

fn to_raw(segment: &Segment) -> VmcbSegment {
    VmcbSegment {
        selector: segment.selector,
        attributes: segment.attributes.0,
        limit: segment.limit,
        base: segment.base,
    }
}

fn table(raw: &VmcbSegment) -> DescriptorTable {
    DescriptorTable { base: raw.base, limit: raw.limit as u16 }
}

fn from_table(table: DescriptorTable) -> VmcbSegment {
    VmcbSegment { base: table.base, limit: table.limit.into(), ..VmcbSegment::default() }
}

impl VendorVcpu for SvmVcpu {
    const NMI_WINDOW: bool = false;

    fn reset(&mut self, init: bool) {
        // INIT leaves CR0.CD, CR0.NW and most MSRs alone.
        let caching = if init { self.guest_cr0 & (cr0::CD | cr0::NW) } else { cr0::CD | cr0::NW };
        self.set_system_regs(&SystemRegs { cr0: cr0::ET | caching, ..SystemRegs::AT_RESET });
        self.vmcb.save.dr6 = dr::DR6_INIT;
        self.vmcb.save.dr7 = dr::DR7_INIT;
        self.vmcb.control.int_state = 0;
        self.vmcb.control.event_inj = 0;
        self.want_interrupt_window(false);
        self.want_nmi_window(false);
        if !init {
            let save = &mut self.vmcb.save;
            save.pat = PAT_RESET;
            save.star = 0;
            save.lstar = 0;
            save.cstar = 0;
            save.sfmask = 0;
            save.kernel_gs_base = 0;
            save.sysenter_cs = 0;
            save.sysenter_esp = 0;
            save.sysenter_eip = 0;
            self.spec_ctrl = 0;
        }
        self.flush_tlb();
    }

    fn system_regs(&self) -> SystemRegs {
        let save = &self.vmcb.save;
        SystemRegs {
            segments: [&save.es, &save.cs, &save.ss, &save.ds, &save.fs, &save.gs].map(from_raw),
            ldtr: from_raw(&save.ldtr),
            tr: self.tr(),
            gdtr: table(&save.gdtr),
            idtr: table(&save.idtr),
            cr0: self.cr0(),
            cr2: save.cr2,
            cr3: save.cr3,
            cr4: save.cr4,
            cr8: 0,
            efer: self.efer(),
            cpl: save.cpl,
        }
    }

    fn set_system_regs(&mut self, regs: &SystemRegs) {
        for (raw, segment) in self.raw_segments().into_iter().zip(&regs.segments) {
            *raw = to_raw(segment);
        }
        self.set_cr0(regs.cr0);
        let save = &mut self.vmcb.save;
        save.ldtr = to_raw(&regs.ldtr);
        // VMRUN wants a busy task segment; the busy bit is not architectural state that software sees here.
        save.tr = to_raw(&regs.tr);
        save.gdtr = from_table(regs.gdtr);
        save.idtr = from_table(regs.idtr);
        save.cr2 = regs.cr2;
        save.cr3 = regs.cr3;
        save.cr4 = regs.cr4;
        save.cpl = regs.cpl;
        self.guest_efer = regs.efer;
        self.update_mode();
        self.flush_tlb();
    }

    #[inline]
    fn segment(&self, number: usize) -> Segment {
        let save = &self.vmcb.save;
        from_raw(match number {
            0 => &save.es,
            1 => &save.cs,
            2 => &save.ss,
            3 => &save.ds,
            4 => &save.fs,
            _ => &save.gs,
        })
    }

    fn set_segment(&mut self, number: usize, value: &Segment) {
        if let Some(raw) = self.raw_segments().into_iter().nth(number) {
            *raw = to_raw(value);
        }
    }

    fn tr(&self) -> Segment {
        /// Type bit 1: after a task switch an emulated CPU leaves it out.
        const BUSY: u16 = 2;
        let mut tr = from_raw(&self.vmcb.save.tr);
        if tr.attributes.present() {
            tr.attributes.0 |= BUSY;
        }
        tr
    }

    fn gdtr(&self) -> DescriptorTable {
        table(&self.vmcb.save.gdtr)
    }

    fn set_gdtr(&mut self, value: DescriptorTable) {
        self.vmcb.save.gdtr = from_table(value);
    }

    fn idtr(&self) -> DescriptorTable {
        table(&self.vmcb.save.idtr)
    }

    fn set_idtr(&mut self, value: DescriptorTable) {
        self.vmcb.save.idtr = from_table(value);
    }

    #[inline]
    fn cr0(&self) -> u64 {
        // A task switch sets TS without an exit.
        self.guest_cr0 & !cr0::TS | self.vmcb.save.cr0 & cr0::TS
    }

    fn set_cr0(&mut self, value: u64) {
        self.guest_cr0 = value;
        self.vmcb.save.cr0 = value & !(cr0::CD | cr0::NW);
        self.update_mode();
        // The guest must not see through a read that its caches are on.
        let Vmcb { control, save } = &mut *self.vmcb;
        control.intercept_cr = control.intercept_cr & !CR0_READ | u32::from(save.cr0 != value);
        self.flush_tlb();
    }

    #[inline]
    fn cr2(&self) -> u64 {
        self.vmcb.save.cr2
    }

    fn set_cr2(&mut self, value: u64) {
        self.vmcb.save.cr2 = value;
    }

    #[inline]
    fn cr3(&self) -> u64 {
        self.vmcb.save.cr3
    }

    fn set_cr3(&mut self, value: u64) {
        self.vmcb.save.cr3 = value;
        self.flush_tlb();
    }

    #[inline]
    fn cr4(&self) -> u64 {
        self.vmcb.save.cr4
    }

    fn set_cr4(&mut self, value: u64) {
        self.vmcb.save.cr4 = value;
        self.flush_tlb();
    }

    #[inline]
    fn efer(&self) -> u64 {
        self.guest_efer
    }

    #[inline]
    fn cpl(&self) -> u8 {
        self.vmcb.save.cpl
    }

    fn dr6(&self) -> u64 {
        self.vmcb.save.dr6
    }

    fn set_dr6(&mut self, value: u64) {
        self.vmcb.save.dr6 = value;
    }

    fn dr7(&self) -> u64 {
        self.vmcb.save.dr7
    }

    fn set_dr7(&mut self, value: u64) {
        self.vmcb.save.dr7 = value;
    }

    fn msr(&self, msr: HardwareMsr) -> u64 {
        let save = &self.vmcb.save;
        match msr {
            HardwareMsr::Efer => self.efer(),
            HardwareMsr::Star => save.star,
            HardwareMsr::Lstar => save.lstar,
            HardwareMsr::Cstar => save.cstar,
            HardwareMsr::Sfmask => save.sfmask,
            HardwareMsr::FsBase => save.fs.base,
            HardwareMsr::GsBase => save.gs.base,
            HardwareMsr::KernelGsBase => save.kernel_gs_base,
            HardwareMsr::SysenterCs => save.sysenter_cs,
            HardwareMsr::SysenterEsp => save.sysenter_esp,
            HardwareMsr::SysenterEip => save.sysenter_eip,
            HardwareMsr::Pat => save.pat,
            HardwareMsr::SpecCtrl => self.spec_ctrl,
        }
    }

    fn set_msr(&mut self, msr: HardwareMsr, value: u64) {
        let save = &mut self.vmcb.save;
        match msr {
            HardwareMsr::Efer => {
                self.guest_efer = value;
                self.update_mode();
                self.flush_tlb();
            }
            HardwareMsr::Star => save.star = value,
            HardwareMsr::Lstar => save.lstar = value,
            HardwareMsr::Cstar => save.cstar = value,
            HardwareMsr::Sfmask => save.sfmask = value,
            HardwareMsr::FsBase => save.fs.base = value,
            HardwareMsr::GsBase => save.gs.base = value,
            HardwareMsr::KernelGsBase => save.kernel_gs_base = value,
            HardwareMsr::SysenterCs => save.sysenter_cs = value,
            HardwareMsr::SysenterEsp => save.sysenter_esp = value,
            HardwareMsr::SysenterEip => save.sysenter_eip = value,
            HardwareMsr::Pat => save.pat = value,
            HardwareMsr::SpecCtrl => self.spec_ctrl = value,
        }
    }

    fn set_nested_root(&mut self, root: Hpa) {
        self.vmcb.control.nested_cr3 = root.0;
        self.flush_tlb();
    }

    fn flush_tlb(&mut self) {
        self.flush_wanted = true;
    }

    fn set_tsc(&mut self, tsc: GuestTsc) {
        self.vmcb.control.tsc_offset = tsc.offset;
        self.tsc_ratio = tsc.ratio;
    }

    fn inject(&mut self, event: Event, irqs: &IrqsOff) {
        self.interrupt_as_int = None;
        let Vmcb { control, save } = &mut *self.vmcb;
        let (kind, vector) = match event {
            // The guest's programs have no right to INT n.
            Event::Interrupt(vector) if self.host.injection == Injection::AsInt && save.cpl == 0 => {
                self.interrupt_as_int = Some(vector);
                (event::TYPE_SOFTWARE, vector)
            }
            Event::Interrupt(vector) => {
                if self.host.injection != Injection::Plain {
                    cpu::interrupt_self(irqs);
                }
                (event::TYPE_INTERRUPT, vector)
            }
            Event::Nmi => (event::TYPE_NMI, vector::NMI),
            Event::Exception(exception) => {
                match (exception.vector, exception.payload) {
                    (vector::PF, Some(address)) => save.cr2 = address,
                    (vector::DB, Some(bits)) => save.dr6 |= bits,
                    _ => {}
                }
                if exception.vector == vector::DB {
                    // SDM "General-Detect Exception Condition": the handler may use the debug registers.
                    save.dr7 &= !dr::DR7_GD;
                }
                (event::TYPE_EXCEPTION, exception.vector)
            }
            // Its instruction runs again.
            Event::Software { .. } => return,
        };
        control.event_inj = u32::from(vector) | kind << event::TYPE_SHIFT | event::VALID;
        if let Event::Exception(Exception { error_code: Some(code), .. }) = event {
            control.event_inj |= event::ERROR_CODE_VALID;
            control.event_inj_error = code;
        }
    }

    #[inline]
    fn take_unfinished_event(&mut self) -> Option<Event> {
        let info = self.vmcb.control.exit_int_info;
        if info & event::VALID == 0 {
            return None;
        }
        self.vmcb.control.exit_int_info = 0;
        exit::unfinished_event(info, self.vmcb.control.exit_int_info_error, self.interrupt_as_int)
    }

    #[inline]
    fn interrupt_shadow(&self) -> bool {
        self.vmcb.control.int_state & int_state::SHADOW != 0
    }

    #[inline]
    fn set_interrupt_shadow(&mut self, shadow: bool) {
        let control = &mut self.vmcb.control;
        control.int_state = control.int_state & !int_state::SHADOW | u32::from(shadow);
    }

    fn want_interrupt_window(&mut self, wanted: bool) {
        let control = &mut self.vmcb.control;
        let window = int_ctl::V_IRQ | int_ctl::V_INTR_PRIO_MASK | int_ctl::V_IGN_TPR;
        if wanted {
            // A virtual interrupt of the highest priority, intercepted where it would be delivered.
            control.int_ctl |= window;
            control.intercept_misc1 |= misc1::VINTR;
            // QEMU 10.0's emulation of SVM ends itself when a guest writes CR8 while a virtual interrupt waits.
            control.intercept_cr |= CR8_WRITE;
        } else {
            control.int_ctl &= !window;
            control.intercept_misc1 &= !misc1::VINTR;
        }
    }

    #[inline]
    fn has_interrupt_window(&self) -> bool {
        self.vmcb.control.int_ctl & int_ctl::V_IRQ != 0
    }

    fn want_nmi_window(&mut self, wanted: bool) {
        let control = &mut self.vmcb.control;
        if wanted {
            control.intercept_misc1 |= misc1::IRET;
        } else {
            control.intercept_misc1 &= !misc1::IRET;
        }
    }

    fn set_nmi_masked(&mut self, masked: bool) {
        self.want_nmi_window(masked);
    }

    fn want_cr8_writes(&mut self, below: Option<u8>) {
        let control = &mut self.vmcb.control;
        let wanted = below.is_some() || control.int_ctl & int_ctl::V_IRQ != 0;
        control.intercept_cr = control.intercept_cr & !CR8_WRITE | if wanted { CR8_WRITE } else { 0 };
    }

    fn want_breakpoints(&mut self, wanted: bool) {
        let more = if wanted { 1 << vector::BP } else { 0 };
        self.vmcb.control.intercept_exceptions = EXCEPTIONS | more;
    }

    fn set_user_steps(&mut self, _: bool) {}

    fn want_all_msrs(&mut self, wanted: bool) {
        let usual = self.counters.as_ref().unwrap_or(&self.host.msr_permissions);
        let map = if wanted { &self.host.msr_all } else { usual };
        self.vmcb.control.msrpm_base = map.address().0;
    }

    #[inline]
    fn tpr(&self) -> u8 {
        (self.vmcb.control.int_ctl & 0xF) as u8
    }

    #[inline]
    fn set_tpr(&mut self, cr8: u8) {
        let control = &mut self.vmcb.control;
        control.int_ctl = control.int_ctl & !int_ctl::V_TPR_MASK | u32::from(cr8 & 0xF);
    }

    #[inline]
    fn wants_pdptes(&self) -> bool {
        // Hardware reads them when it needs them.
        false
    }

    fn set_pdptes(&mut self, _entries: [u64; 4]) {}

    fn pdptes(&self) -> Option<[u64; 4]> {
        None
    }

    #[inline]
    fn next_rip(&self) -> Option<u64> {
        let control = &self.vmcb.control;
        if control.exit_code == exit_code::IOIO {
            Some(control.exit_info_2)
        } else if self.host.features.next_rip && control.next_rip != 0 {
            Some(control.next_rip)
        } else {
            None
        }
    }

    fn instruction_bytes(&self) -> Option<&[u8]> {
        let control = &self.vmcb.control;
        // Kept for nested page faults and intercepted page faults only.
        if !self.host.features.decode_assists || control.exit_code != exit_code::NPF {
            return None;
        }
        match control.instruction_bytes.get(..usize::from(control.instruction_length)) {
            Some([]) | None => None,
            bytes => bytes,
        }
    }

    #[inline]
    fn load(&mut self, irqs: &IrqsOff) {
        self.host.separate(&self.id, irqs);
        insn::save_host(self.host.host_area(irqs), irqs);
        self.host.set_tsc_ratio(self.tsc_ratio, irqs);
    }

    #[inline]
    fn unload(&mut self, _regs: &mut Regs, _irqs: &IrqsOff) {}

    #[inline]
    fn run(&mut self, regs: &mut Regs, window: &Window<'_>, irqs: &IrqsOff) -> Exit {
        if self.flush_wanted && !self.host.features.flush_by_asid {
            self.asid.forget();
        }
        let flush_all = self.host.refresh_asid(&mut self.asid, irqs);
        let control = &mut self.vmcb.control;
        control.tlb_ctl = if flush_all {
            tlb_ctl::FLUSH_ALL
        } else if self.flush_wanted && self.host.features.flush_by_asid {
            tlb_ctl::FLUSH_ASID
        } else {
            tlb_ctl::NOTHING
        };
        self.flush_wanted = false;
        control.asid = self.asid.id;
        // An emulated CPU may let a guest set more of CR8 than there is, and then refuse to enter.
        // It may also forget this when it refuses an entry, and without it a guest with interrupts off keeps the host's CPU for good.
        control.int_ctl = control.int_ctl & !V_TPR_RESERVED | int_ctl::V_INTR_MASKING;

        let save = &mut self.vmcb.save;
        save.rax = regs.gpr[Gpr::Rax as usize];
        save.rsp = regs.gpr[Gpr::Rsp as usize];
        save.rip = regs.rip;
        save.rflags = regs.rflags;
        let host = self.host.host_area(irqs);
        let entered = insn::enter(regs, &mut self.vmcb, host, self.spec_ctrl, window, irqs);
        if self.vmcb.control.exit_code == exit_code::INVALID {
            // What a refused entry leaves in the save area is undefined; an emulated CPU puts host state there.
            self.reset(true);
            return Exit::EntryFailure { reason: exit_code::INVALID };
        }
        let save = &self.vmcb.save;
        regs.gpr[Gpr::Rax as usize] = save.rax;
        regs.gpr[Gpr::Rsp as usize] = save.rsp;
        regs.rip = save.rip;
        regs.rflags = save.rflags;
        self.vmcb.control.event_inj = 0;
        match entered {
            Ok(()) => exit::decode(&self.vmcb.control, self.host.features.decode_assists, irqs),
            Err(insn::SvmIsOff) => Exit::EntryFailure { reason: u64::MAX },
        }
    }
}
