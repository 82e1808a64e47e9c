// SPDX-License-Identifier: GPL-2.0
//! What each exit means: the quick handlers of the inner ring, and the slow ones in process context.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicBool, Ordering};

use kernel::prelude::*;

use crate::{
    abi::{
        run::*,
        vm::{KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT, KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS},
    },
    arch::{
        cpuid::leaf1_ecx,
        cr::{cr0, cr4, dr, efer, rflags},
        segment::{SegmentAttributes, SegmentName},
        Gpa, Gva,
    },
    emul::{skip_length, Intercepted, Mode},
    glue::{page::SharedPage, trace},
    guest::{
        check,
        event::{vector, Exception},
        exit::{NestedFault, PortAccess, RegisterMove},
        Exit, Gpr,
    },
    memory::Fault,
    mmu::{guest_mem::GuestMem, walk},
    policy::{cpuid_table::Dynamic, msr::filter::Access},
    vcpu::{Core, MpState, Pending, State, Vcpu},
    vendor::{Vendor, VendorVcpu},
    view::View,
    vm::Vm,
};

/// The host's log has the line about split locks.
static SPLIT_LOCK_TOLD: AtomicBool = AtomicBool::new(false);

/// What the inner ring does after a quick handler.
pub(crate) enum Handled {
    Resume,
    /// The vCPU does not run any more: it is halted.
    Blocked,
    /// The exit needs process context; nothing was done yet.
    Slow,
    /// A nested fault where there is no memory: the emulator's, in process context.
    Device,
}

/// What userspace is told.
pub(crate) enum ToUser {
    Port {
        input: bool,
        size_bytes: u8,
        port: u16,
        count: u16,
    },
    Mmio {
        gpa: Gpa,
        data: [u8; 8],
        len: u8,
        write: bool,
    },
    Halt,
    Shutdown,
    InterruptWindow,
    IoapicEoi {
        vector: u8,
    },
    TprAccess {
        rip: u64,
        write: bool,
    },
    /// A hypercall that userspace answers.
    Hypercall {
        number: u64,
        arguments: [u64; 3],
        /// From 64-bit code.
        long: bool,
    },
    /// Userspace has to empty the vCPU's dirty ring.
    DirtyRingFull,
    FailEntry {
        reason: u64,
    },
    /// #DB or #BP, for userspace's debugger.
    Debug {
        exception: u8,
        /// Linear address of the instruction.
        pc: u64,
        dr6: u64,
        dr7: u64,
    },
    /// The delivery of an event touched a device.
    Delivery {
        gpa: Gpa,
    },
    /// KVM_INTERNAL_ERROR_EMULATION with the bytes of the instruction.
    Emulation {
        bytes: [u8; 15],
        len: u8,
    },
    UnexpectedExit {
        reason: u64,
    },
    Msr {
        read: bool,
        /// One of `KVM_MSR_EXIT_REASON_*`.
        reason: u32,
        index: u32,
        data: u64,
    },
}

impl ToUser {
    /// Writes it to `struct kvm_run`.
    pub(crate) fn report(&self, run: &SharedPage) {
        let reason = match *self {
            Self::Port { input, size_bytes, port, count } => {
                let direction = if input { KVM_EXIT_IO_IN } else { KVM_EXIT_IO_OUT };
                let io = ExitIo { direction, size: size_bytes, port, count: count.into(), data_offset: 4096 };
                run.write(EXIT_UNION, &io);
                KVM_EXIT_IO
            }
            Self::Mmio { gpa, data, len, write } => {
                let mmio = ExitMmio { phys_addr: gpa.0, data, len: len.into(), is_write: u8::from(write), pad: [0; 3] };
                run.write(EXIT_UNION, &mmio);
                KVM_EXIT_MMIO
            }
            Self::Halt => KVM_EXIT_HLT,
            Self::Shutdown => KVM_EXIT_SHUTDOWN,
            Self::InterruptWindow => KVM_EXIT_IRQ_WINDOW_OPEN,
            Self::DirtyRingFull => KVM_EXIT_DIRTY_RING_FULL,
            Self::IoapicEoi { vector } => {
                run.write(EXIT_UNION, &ExitIoapicEoi { vector });
                KVM_EXIT_IOAPIC_EOI
            }
            Self::TprAccess { rip, write } => {
                run.write(EXIT_UNION, &ExitTprAccess { rip, is_write: write.into(), pad: 0 });
                KVM_EXIT_TPR_ACCESS
            }
            Self::Hypercall { number, arguments: [first, second, third], long } => {
                let call = ExitHypercall {
                    nr: number,
                    args: [first, second, third, 0, 0, 0],
                    ret: 0,
                    flags: if long { KVM_EXIT_HYPERCALL_LONG_MODE } else { 0 },
                };
                run.write(EXIT_UNION, &call);
                KVM_EXIT_HYPERCALL
            }
            Self::FailEntry { reason } => {
                let fail = ExitFailEntry {
                    hardware_entry_failure_reason: reason,
                    cpu: crate::glue::cpu::current() as u32,
                    pad: 0,
                };
                run.write(EXIT_UNION, &fail);
                KVM_EXIT_FAIL_ENTRY
            }
            Self::Debug { exception, pc, dr6, dr7 } => {
                run.write(EXIT_UNION, &ExitDebug { exception: exception.into(), pad: 0, pc, dr6, dr7 });
                KVM_EXIT_DEBUG
            }
            Self::Delivery { gpa } => {
                let mut data = [0; 16];
                // KVM's first three are a vendor's exit information.
                data[3] = gpa.0;
                data[4] = crate::glue::cpu::current() as u64;
                run.write(EXIT_UNION, &ExitInternalError { suberror: KVM_INTERNAL_ERROR_DELIVERY_EV, ndata: 5, data });
                KVM_EXIT_INTERNAL_ERROR
            }
            Self::Emulation { bytes, len } => {
                let failure = ExitEmulationFailure {
                    suberror: KVM_INTERNAL_ERROR_EMULATION,
                    ndata: if len > 0 { 3 } else { 0 },
                    flags: if len > 0 { KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES } else { 0 },
                    insn_size: len,
                    insn_bytes: bytes,
                };
                run.write(EXIT_UNION, &failure);
                KVM_EXIT_INTERNAL_ERROR
            }
            Self::UnexpectedExit { reason } => {
                let mut data = [0; 16];
                data[0] = reason;
                data[1] = crate::glue::cpu::current() as u64;
                let error = ExitInternalError { suberror: KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, ndata: 2, data };
                run.write(EXIT_UNION, &error);
                KVM_EXIT_INTERNAL_ERROR
            }
            Self::Msr { read, reason, index, data } => {
                run.write(EXIT_UNION, &ExitMsr { error: 0, pad: [0; 7], reason, index, data });
                if read {
                    KVM_EXIT_X86_RDMSR
                } else {
                    KVM_EXIT_X86_WRMSR
                }
            }
        };
        run.store(EXIT_REASON, reason);
    }
}

/// The instruction's length is not known yet: guest memory is not at hand without sleeping.
pub(crate) struct NotNow;

impl<V: Vendor> State<V> {
    #[inline]
    pub(crate) fn gpr(&self, register: Gpr) -> u64 {
        self.regs.gpr[register as usize]
    }

    #[inline]
    pub(crate) fn set_gpr(&mut self, register: Gpr, value: u64) {
        self.regs.gpr[register as usize] = value;
    }

    /// IN's result: the low bytes of RAX, where 32 bits clear the upper half.
    pub(crate) fn set_accumulator(&mut self, value: u32, size_bytes: u8) {
        let old = self.gpr(Gpr::Rax);
        let new = match size_bytes {
            1 => old & !0xFF | u64::from(value & 0xFF),
            2 => old & !0xFFFF | u64::from(value & 0xFFFF),
            _ => value.into(),
        };
        self.set_gpr(Gpr::Rax, new);
    }

    /// How the guest reads code now.
    pub(crate) fn mode(&self) -> Mode {
        let code = self.hw.attributes(SegmentName::Cs as usize);
        if self.hw.efer() & efer::LMA != 0 && code.long() {
            Mode::Long64
        } else if self.hw.cr0_bits(cr0::PE) == 0 {
            Mode::Real
        } else if self.regs.rflags & rflags::VM != 0 {
            Mode::Vm86
        } else if code.0 & SegmentAttributes::DB != 0 {
            Mode::Protected32
        } else {
            Mode::Protected16
        }
    }

    /// The guest's paging as the walker wants it. `pkru` only matters where the extended state is at hand.
    pub(crate) fn walk_context(&self, pkru: u32) -> walk::Context {
        walk::Context {
            cr0: self.hw.cr0_bits(walk::CR0_BITS),
            cr3: self.hw.cr3(),
            cr4: self.hw.cr4_bits(walk::CR4_BITS),
            efer: self.hw.efer(),
            rflags: self.regs.rflags,
            pkru,
            cpl: self.hw.cpl(),
            physical_bits: self.caps.physical_bits,
            pages_1g: self.caps.page_1g,
            upper_global_reserved: self.caps.vendor == crate::arch::cpuid::Vendor::Amd,
        }
    }

    /// Reads the bytes at RIP, as many as can be read up to 15.
    pub(crate) fn fetch(&self, view: &View<'_>, mode: Mode) -> ([u8; 15], usize) {
        let mut bytes = [0; 15];
        let base = if mode == Mode::Long64 { 0 } else { self.hw.segment(SegmentName::Cs as usize).base };
        let mut at = base.wrapping_add(self.regs.rip);
        if mode != Mode::Long64 {
            at &= 0xFFFF_FFFF;
        }
        let context = self.walk_context(0);
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let Ok(found) = walk::walk(view, &context, Gva(at), walk::Access::EXECUTE) else { break };
            let part = rest.len().min((4096 - found.gpa.page_offset()) as usize);
            let Some(into) = rest.get_mut(..part) else { break };
            if view.read(found.gpa, into).is_err() {
                break;
            }
            done += part;
            at = at.wrapping_add(part as u64);
        }
        (bytes, done)
    }

    /// Moves RIP behind the intercepted instruction.
    #[inline]
    pub(crate) fn skip(&mut self, vm: &Vm<V>, what: Intercepted, may_sleep: bool) -> Result<(), NotNow> {
        let next = self.next_instruction(vm, what, may_sleep)?;
        self.completed(next);
        Ok(())
    }

    /// RIP behind the intercepted instruction.
    #[inline]
    pub(crate) fn next_instruction(&self, vm: &Vm<V>, what: Intercepted, may_sleep: bool) -> Result<u64, NotNow> {
        match self.hw.next_rip() {
            Some(next) => Ok(next),
            None => self.decoded_next(vm, what, may_sleep),
        }
    }

    /// The same from the instruction's bytes.
    #[inline(never)]
    fn decoded_next(&self, vm: &Vm<V>, what: Intercepted, may_sleep: bool) -> Result<u64, NotNow> {
        let mode = self.mode();
        let length = match self.code {
            Some(bytes) => skip_length(&bytes[..15], mode, what),
            None => {
                let (bytes, len) = self.fetch(&vm.memory.view(may_sleep), mode);
                skip_length(bytes.get(..len).unwrap_or(&[]), mode, what)
            }
        };
        let length = length.ok_or(NotNow)?;
        let next = self.regs.rip.wrapping_add(length.into());
        Ok(match mode {
            Mode::Long64 => next,
            Mode::Real | Mode::Vm86 | Mode::Protected16 => next & 0xFFFF,
            Mode::Protected32 => next & 0xFFFF_FFFF,
        })
    }

    /// An instruction is over: RIP, the interrupt shadow, RF, and the single-step trap.
    #[inline]
    pub(crate) fn completed(&mut self, next_rip: u64) {
        self.regs.rip = next_rip;
        self.instruction_retired();
        self.hw.set_interrupt_shadow(false);
        self.regs.rflags &= !rflags::RF;
        if self.debug.steps() {
            self.debug.instruction_over();
        } else if self.regs.rflags & rflags::TF != 0 {
            self.events.raise(Exception { payload: Some(dr::DR6_BS), ..Exception::plain(vector::DB) });
        }
    }

    /// The quick handlers: interrupts are off and nothing may sleep.
    #[inline]
    pub(crate) fn handle_fast(&mut self, vm: &Vm<V>, exit: &Exit, xcr0: u64) -> Handled {
        let done = match exit {
            Exit::NestedFault(fault) => return self.nested_fault_fast(vm, fault),
            Exit::Rdmsr => self.handle_rdmsr(vm),
            Exit::Wrmsr => self.handle_wrmsr(vm),
            Exit::Port(access) => return self.port_fast(vm, access),
            Exit::Cpuid => self.handle_cpuid(vm, xcr0, false),
            Exit::Hlt => {
                if self.hw.cpl() != 0 {
                    self.events.raise(Exception::GP0);
                    return Handled::Resume;
                }
                match self.skip(vm, Intercepted::Hlt, false) {
                    Ok(()) => {
                        self.mp_state = MpState::Halted;
                        return Handled::Blocked;
                    }
                    Err(NotNow) => return Handled::Slow,
                }
            }
            Exit::Hypercall => self.handle_hypercall(vm, false),
            Exit::InterruptWindow | Exit::PriorityLowered | Exit::WriteLogFull => Ok(()),
            Exit::Deadline => {
                self.run_deadline_came();
                Ok(())
            }
            Exit::NmiWindow => {
                self.hw.want_nmi_window(false);
                self.events.nmi_masked = false;
                Ok(())
            }
            Exit::NmiReturn => {
                self.hw.want_nmi_window(false);
                self.nmi_return = Some(self.regs.rip);
                if self.events.nmis > 0 && self.regs.rflags & rflags::TF == 0 {
                    // Another one waits: the trap after IRET tells when it may go in.
                    self.regs.rflags |= rflags::TF | rflags::RF;
                    self.stepping = true;
                }
                Ok(())
            }
            Exit::ApicWrite { offset, value } => {
                self.handle_apic_write(vm, *offset, *value);
                Ok(())
            }
            Exit::EndOfInterrupt { vector } => {
                self.handle_end_of_interrupt(vm, *vector);
                Ok(())
            }
            Exit::Invd => self.skip(vm, Intercepted::Invd, false),
            Exit::Wbinvd => self.skip(vm, Intercepted::Wbinvd, false),
            Exit::Pause => self.skip(vm, Intercepted::Pause, false),
            Exit::ControlRegister(RegisterMove { register, write: true, gpr: Some(gpr) }) => {
                match self.write_cr(*register, self.regs.gpr[usize::from(gpr & 0xF)]) {
                    Ok(()) => self.skip(vm, Intercepted::MoveRegister, false),
                    Err(exception) => {
                        self.events.raise(exception);
                        Ok(())
                    }
                }
            }
            Exit::Exception(Exception { vector: vector::UD, .. }) => return Handled::Slow,
            Exit::Exception(_) if self.debug.is_on() => return Handled::Slow,
            Exit::Exception(exception) => {
                self.handle_exception(*exception);
                Ok(())
            }
            Exit::Rdpmc if self.pmu.is_some() => return Handled::Slow,
            Exit::Rdpmc => {
                self.events.raise(Exception::GP0);
                Ok(())
            }
            Exit::Monitor | Exit::Mwait if self.has_mwait(vm) => {
                // Nothing is awaited: the guest goes on at once.
                let what = if *exit == Exit::Monitor { Intercepted::Monitor } else { Intercepted::Mwait };
                self.skip(vm, what, false)
            }
            Exit::Monitor | Exit::Mwait | Exit::UndefinedInstruction => {
                self.events.raise(Exception::UD);
                Ok(())
            }
            _ => return Handled::Slow,
        };
        match done {
            Ok(()) => Handled::Resume,
            Err(NotNow) => Handled::Slow,
        }
    }

    fn handle_exception(&mut self, exception: Exception) {
        if exception.vector == vector::DB && self.stepping {
            // Our own step over an IRET. The guest's flags came from its stack.
            self.stepping = false;
            self.hw.set_dr6(self.hw.dr6() & !dr::DR6_BS);
            self.nmi_return = None;
            self.events.nmi_masked = false;
            if self.regs.rflags & rflags::TF == 0 {
                return;
            }
        }
        if exception.vector == vector::DB && self.shadow_step {
            // Our own step out of an interrupt shadow. An NMI waits, so the next entry looks again.
            self.hw.set_dr6(self.hw.dr6() & !dr::DR6_BS);
            if self.hw.dr6() & dr::DR6_TRAPS == 0 || self.hw.dr7() & dr::DR7_ENABLES == 0 {
                return;
            }
        }
        if exception.vector == vector::AC
            && !check::alignment_checked(self.hw.cpl(), self.hw.cr0_bits(cr0::AM), self.regs.rflags)
            && !SPLIT_LOCK_TOLD.swap(true, Ordering::Relaxed)
        {
            pr_warn!(
                "a guest's locked access crossed cache lines, and this host detects that: the guest gets #AC (split_lock_detect=off)\n"
            );
        }
        self.events.raise(exception);
    }

    /// What CPUID says beside its table.
    pub(crate) fn cpuid_dynamic(&self, vm: &Vm<V>, xcr0: u64) -> Dynamic {
        let follows = !vm.enabled.has_quirk(KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT);
        Dynamic {
            cr4: self.hw.cr4_bits(cr4::OSXSAVE | cr4::PKE),
            apic_enabled: self.apic_base() & 1 << 11 != 0,
            xcr0,
            xss: 0,
            mwait: follows.then(|| self.msrs.mwait()),
        }
    }

    pub(crate) fn handle_cpuid(&mut self, vm: &Vm<V>, xcr0: u64, may_sleep: bool) -> Result<(), NotNow> {
        self.skip(vm, Intercepted::Cpuid, may_sleep)?;
        let dynamic = self.cpuid_dynamic(vm, xcr0);
        let [eax, ebx, ecx, edx] =
            self.cpuid.query(self.gpr(Gpr::Rax) as u32, self.gpr(Gpr::Rcx) as u32, &dynamic).map(u64::from);
        self.set_gpr(Gpr::Rax, eax);
        self.set_gpr(Gpr::Rbx, ebx);
        self.set_gpr(Gpr::Rcx, ecx);
        self.set_gpr(Gpr::Rdx, edx);
        Ok(())
    }

    /// Whether MONITOR and MWAIT do nothing instead of raising #UD.
    fn has_mwait(&self, vm: &Vm<V>) -> bool {
        vm.enabled.has_quirk(KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)
            || match vm.enabled.has_quirk(KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT) {
                true => self.cpuid.leaf(1, 0)[2] & leaf1_ecx::MONITOR != 0,
                false => self.msrs.mwait(),
            }
    }

    fn nested_fault_fast(&mut self, vm: &Vm<V>, fault: &NestedFault) -> Handled {
        trace::page_fault(self.index as u32, fault.gpa.0, fault.write, fault.execute, fault.present);
        let done = vm.memory.fault(fault, false);
        self.expects_device = matches!(done, Ok(Fault::Mmio));
        match done {
            Ok(Fault::Mapped) => Handled::Resume,
            Ok(Fault::Mmio) if self.device_fast(vm, fault) => Handled::Resume,
            Ok(Fault::Mmio) => Handled::Device,
            _ => Handled::Slow,
        }
    }

    #[inline]
    fn port_fast(&mut self, vm: &Vm<V>, access: &PortAccess) -> Handled {
        if access.string {
            return Handled::Slow;
        }
        trace::pio(!access.input, access.port, access.size_bytes.into(), 1);
        let done = if access.input {
            vm.irq.port_in(access.port, access.size_bytes).map(|value| self.set_accumulator(value, access.size_bytes))
        } else {
            let value = self.gpr(Gpr::Rax) as u32;
            let value = match access.size_bytes {
                1 => value & 0xFF,
                2 => value & 0xFFFF,
                _ => value,
            };
            vm.irq.port_out(access.port, access.size_bytes, value).then_some(())
        };
        // The length is known before the device is asked on every CPU: it is in the exit information.
        match done.map(|()| self.skip(vm, Intercepted::Port, false)) {
            Some(Ok(())) => Handled::Resume,
            _ => Handled::Slow,
        }
    }

    /// Writes CR0, CR3, CR4 or CR8 as a MOV does. `Err` is the exception.
    pub(crate) fn write_cr(&mut self, register: u8, value: u64) -> Result<(), Exception> {
        match register {
            0 => self.write_cr0(value),
            3 => {
                let pcide = self.hw.cr4() & cr4::PCIDE != 0;
                let long = self.hw.efer() & efer::LMA != 0;
                let value = if pcide { value & !(1 << 63) } else { value };
                if long && value & self.caps.reserved_physical() != 0 {
                    return Err(Exception::GP0);
                }
                self.hw.set_cr3(value);
                Ok(())
            }
            4 => self.write_cr4(value),
            8 if value > 0xF => Err(Exception::GP0),
            8 => {
                if let Some(lapic) = &mut self.lapic {
                    lapic.set_cr8(value as u8);
                }
                self.cr8 = value as u8;
                self.hw.set_tpr(self.cr8);
                Ok(())
            }
            _ => Err(Exception::UD),
        }
    }

    fn write_cr0(&mut self, value: u64) -> Result<(), Exception> {
        let old = self.hw.cr0();
        let mut efer_value = self.hw.efer();
        if value >> 32 != 0 || !check::cr0_valid(value & cr0::DEFINED) {
            return Err(Exception::GP0);
        }
        // Undefined bits in the low half are ignored.
        let value = value & cr0::DEFINED | cr0::ET;
        let code = self.hw.attributes(SegmentName::Cs as usize);
        if (old ^ value) & cr0::PG != 0 && efer_value & efer::LME != 0 {
            if value & cr0::PG != 0 {
                if self.hw.cr4() & cr4::PAE == 0 || code.long() {
                    return Err(Exception::GP0);
                }
                efer_value |= efer::LMA;
            } else {
                if code.long() {
                    return Err(Exception::GP0);
                }
                efer_value &= !efer::LMA;
            }
        }
        if value & cr0::PG == 0 && self.hw.cr4() & cr4::PCIDE != 0 {
            return Err(Exception::GP0);
        }
        if efer_value != self.hw.efer() {
            self.hw.set_msr(crate::vendor::HardwareMsr::Efer, efer_value);
        }
        self.hw.set_cr0(value);
        Ok(())
    }

    fn write_cr4(&mut self, value: u64) -> Result<(), Exception> {
        let old = self.hw.cr4();
        let long = self.hw.efer() & efer::LMA != 0;
        let bad = value & !self.caps.cr4 != 0
            || long && (value & cr4::PAE == 0 || (value ^ old) & cr4::LA57 != 0)
            || value & !old & cr4::PCIDE != 0 && (!long || self.hw.cr3() & 0xFFF != 0);
        if bad {
            return Err(Exception::GP0);
        }
        self.hw.set_cr4(value);
        Ok(())
    }
}

impl<V: Vendor> Vcpu<V> {
    /// Handles an exit in process context. `Some`: userspace is needed.
    pub(crate) fn handle_slow(&self, core: &mut Core<V>, exit: &Exit) -> Result<Option<ToUser>> {
        let vm = &*self.vm;
        let state = &mut core.state;
        if state.debug.is_on() {
            if let Some(report) = state.debug_exit(exit) {
                return Ok(Some(report));
            }
        }
        let skipped = match exit {
            Exit::NestedFault(fault) => match self.resolve_fault(fault)? {
                Fault::Mapped | Fault::Sleep => return Ok(None),
                Fault::Mmio => return self.emulate(core, Some(fault)),
            },
            Exit::Port(access) if !access.string => return Ok(self.port_to_user(core, access)),
            Exit::Port(_) | Exit::ControlRegister(_) | Exit::DebugRegister(_) => return self.emulate(core, None),
            Exit::TaskSwitch(switch) => return Ok(self.switch_task(core, *switch)),
            Exit::Cpuid => {
                let xcr0 = core.fpu.xcr0();
                state.handle_cpuid(vm, xcr0, true)
            }
            Exit::Hlt => {
                let skipped = state.skip(vm, Intercepted::Hlt, true);
                state.mp_state = MpState::Halted;
                skipped
            }
            Exit::Rdmsr | Exit::Wrmsr => {
                let access = if *exit == Exit::Rdmsr { Access::Read } else { Access::Write };
                return Ok(core.handle_msr_slow(vm, access).unwrap_or(None));
            }
            Exit::Hypercall => match state.hypercall_to_user(vm) {
                Ok(Some((pending, report))) => {
                    core.pending = pending;
                    return Ok(Some(report));
                }
                Ok(None) => state.handle_hypercall(vm, true),
                Err(NotNow) => Err(NotNow),
            },
            Exit::Rdpmc => state.handle_rdpmc(vm),
            Exit::Invd => state.skip(vm, Intercepted::Invd, true),
            Exit::Wbinvd => state.skip(vm, Intercepted::Wbinvd, true),
            Exit::Pause => state.skip(vm, Intercepted::Pause, true),
            Exit::Monitor => state.skip(vm, Intercepted::Monitor, true),
            Exit::Mwait => state.skip(vm, Intercepted::Mwait, true),
            Exit::Exception(Exception { vector: vector::UD, .. }) => {
                state.handle_undefined(vm);
                Ok(())
            }
            Exit::Exception(exception) => {
                state.handle_exception(*exception);
                Ok(())
            }
            Exit::Xsetbv => self.handle_xsetbv(core),
            Exit::Shutdown => {
                // What the CPU leaves of the guest's state is undefined on AMD: it becomes that after INIT.
                state.reset_cpu();
                return Ok(Some(ToUser::Shutdown));
            }
            Exit::EntryFailure { reason } => return Ok(Some(ToUser::FailEntry { reason: *reason })),
            Exit::Unknown { reason } => return Ok(Some(ToUser::UnexpectedExit { reason: *reason })),
            _ => Ok(()),
        };
        match skipped {
            Ok(()) => Ok(None),
            // The bytes at RIP cannot be read, or are not that instruction any more: the guest changed them under us. It runs
            // into whatever is there now.
            Err(NotNow) if !matches!(exit, Exit::Hlt) => Ok(None),
            Err(NotNow) => {
                core.state.mp_state = MpState::Runnable;
                Ok(None)
            }
        }
    }

    /// Maps what a nested fault asked for. Of memory that is not there userspace learns where: KVM_CAP_MEMORY_FAULT_INFO.
    fn resolve_fault(&self, fault: &NestedFault) -> Result<Fault> {
        self.vm.memory.fault(fault, true).inspect_err(|error| {
            if *error == EFAULT {
                let page = ExitMemoryFault { flags: 0, gpa: fault.gpa.0 & !0xFFF, size: 4096 };
                self.run.write(EXIT_UNION, &page);
                self.run.store(EXIT_REASON, KVM_EXIT_MEMORY_FAULT);
            }
        })
    }

    /// IN or OUT that no device in the kernel took.
    fn port_to_user(&self, core: &mut Core<V>, access: &PortAccess) -> Option<ToUser> {
        let state = &mut core.state;
        let value = state.gpr(Gpr::Rax) as u32;
        if state.skip(&self.vm, Intercepted::Port, true).is_err() {
            return None;
        }
        if access.input {
            core.pending = Pending::PortIn { size_bytes: access.size_bytes };
        } else {
            self.data.store(0, value);
        }
        Some(ToUser::Port { input: access.input, size_bytes: access.size_bytes, port: access.port, count: 1 })
    }

    fn handle_xsetbv(&self, core: &mut Core<V>) -> Result<(), NotNow> {
        let state = &mut core.state;
        let value = state.gpr(Gpr::Rdx) << 32 | state.gpr(Gpr::Rax) & 0xFFFF_FFFF;
        let index = state.gpr(Gpr::Rcx) as u32;
        if state.hw.cpl() != 0 || index != 0 || !state.caps.xcr0_valid(value) || core.fpu.set_xcr0(value).is_err() {
            state.events.raise(Exception::GP0);
            return Ok(());
        }
        state.skip(&self.vm, Intercepted::Xsetbv, true)
    }
}
