// SPDX-License-Identifier: GPL-2.0
//! The emulator at work: what a vCPU offers it, and where its device accesses go.
#![forbid(unsafe_code)]

use kernel::prelude::*;

use crate::{
    abi::stats::VcpuStat,
    arch::{
        cr::{dr, rflags},
        segment::{DescriptorTable, Segment, SegmentName},
        Gpa, Gva,
    },
    emul::{Access, Cpu, Delivery, DeviceMove, Direction, Mode, NotRam, Shadow, Step, Switched, Table, X87Words},
    exits::ToUser,
    glue::{fpu::GuestFpu, page::SharedPage, timer, trace},
    guest::{
        event::vector,
        exit::{NestedFault, TaskSource, TaskSwitch},
        Event, Exception, SystemRegs,
    },
    irqchip::lapic::Lapic,
    mmu::{guest_mem::GuestMem, walk},
    vcpu::{Core, Pending, State, Vcpu},
    vendor::{Vendor, VendorVcpu},
    view::View,
    vm::Vm,
};

/// Bytes in the local APIC's register window.
const LAPIC_WINDOW: u64 = 4096;

/// Where a guest's access to a device went: the CPU walked the guest's tables for it and checked its rights.
#[derive(Clone, Copy)]
pub(crate) struct Found {
    /// The instruction.
    rip: u64,
    gpa: Gpa,
    write: bool,
    /// It is clear which of the instruction's accesses it is.
    unique: bool,
}

impl Found {
    /// Of an instruction at `rip` that begins with `code`, if that is known.
    fn new(rip: u64, fault: &NestedFault, code: Option<&[u8; 16]>) -> Self {
        // CMPS reads two places. Its opcode may also be in an operand, which costs nothing but time.
        const EACH: u128 = u128::MAX / 0xFF;
        let two_reads = |code: &[u8; 16]| {
            let opcode_is_zero = u128::from_le_bytes(*code) & EACH.wrapping_mul(0xFE) ^ EACH.wrapping_mul(0xA6);
            // Some byte is zero: it borrows, and had no top bit itself.
            opcode_is_zero.wrapping_sub(EACH) & !opcode_is_zero & EACH.wrapping_mul(0x80) != 0
        };
        Self { rip, gpa: fault.gpa, write: fault.write, unique: code.is_some_and(|code| !two_reads(code)) }
    }
}

/// A vCPU as the emulator sees it.
struct Emulated<'a, V: Vendor> {
    state: &'a mut State<V>,
    fpu: &'a mut GuestFpu,
    data: &'a SharedPage,
    vm: &'a Vm<V>,
    /// Guest memory, from the first use on.
    view: Option<View<'a>>,
    /// What the CPU found in the access that made it exit: spares looking the device up.
    found: Option<Found>,
    /// The translation of that access is still to come.
    untranslated: bool,
    /// The last translation failed in a way that the guest has no exception for.
    lost: bool,
}

impl<V: Vendor> Emulated<'_, V> {
    #[inline]
    fn view(&mut self) -> &View<'_> {
        let vm = self.vm;
        self.view.get_or_insert_with(|| vm.memory.view(true))
    }

    /// Whether the CPU has just found a device there.
    #[inline]
    fn is_device(&self, at: Gpa, write: bool) -> bool {
        self.found.is_some_and(|found| found.gpa.gfn() == at.gfn() && found.write == write)
    }
}

impl<V: Vendor> Cpu for Emulated<'_, V> {
    fn gpr(&self, register: usize) -> u64 {
        self.state.regs.gpr[register & 0xF]
    }

    fn set_gpr(&mut self, register: usize, value: u64) {
        self.state.regs.gpr[register & 0xF] = value;
    }

    fn rip(&self) -> u64 {
        self.state.regs.rip
    }

    fn set_rip(&mut self, value: u64) {
        self.state.regs.rip = value;
    }

    fn rflags(&self) -> u64 {
        self.state.regs.rflags
    }

    fn set_rflags(&mut self, value: u64) {
        self.state.regs.rflags = value;
    }

    fn set_interrupt_shadow(&mut self, shadow: Shadow) {
        self.state.hw.set_interrupt_shadow(shadow != Shadow::None);
    }

    fn segment(&self, name: SegmentName) -> Segment {
        self.state.hw.segment(name as usize)
    }

    fn set_segment(&mut self, name: SegmentName, value: &Segment) {
        self.state.hw.set_segment(name as usize, value);
    }

    fn tss(&self) -> Segment {
        self.state.hw.tr()
    }

    fn set_tss(&mut self, value: &Segment) {
        let regs = SystemRegs { tr: *value, ..self.state.hw.system_regs() };
        self.state.hw.set_system_regs(&regs);
    }

    fn ldt(&self) -> Segment {
        self.state.hw.system_regs().ldtr
    }

    fn set_ldt(&mut self, value: &Segment) {
        let regs = SystemRegs { ldtr: *value, ..self.state.hw.system_regs() };
        self.state.hw.set_system_regs(&regs);
    }

    fn table(&self, which: Table) -> DescriptorTable {
        match which {
            Table::Gdt => self.state.hw.gdtr(),
            Table::Idt => self.state.hw.idtr(),
        }
    }

    fn set_table(&mut self, which: Table, value: DescriptorTable) {
        match which {
            Table::Gdt => self.state.hw.set_gdtr(value),
            Table::Idt => self.state.hw.set_idtr(value),
        }
    }

    fn cpl(&self) -> u8 {
        self.state.hw.cpl()
    }

    fn set_cpl(&mut self, level: u8) {
        let regs = SystemRegs { cpl: level, ..self.state.hw.system_regs() };
        self.state.hw.set_system_regs(&regs);
    }

    fn efer(&self) -> u64 {
        self.state.hw.efer()
    }

    fn xcr0(&self) -> u64 {
        self.fpu.xcr0()
    }

    fn cr(&self, register: u8) -> u64 {
        let hw = &self.state.hw;
        match register {
            0 => hw.cr0(),
            2 => hw.cr2(),
            3 => hw.cr3(),
            4 => hw.cr4(),
            _ => self.state.current_cr8().into(),
        }
    }

    fn set_cr(&mut self, register: u8, value: u64) -> core::result::Result<(), Exception> {
        if register == 2 {
            self.state.hw.set_cr2(value);
            return Ok(());
        }
        self.state.write_cr(register, value)
    }

    fn dr(&self, register: u8) -> u64 {
        self.state.debug_register(self.fpu, register)
    }

    fn set_dr(&mut self, register: u8, value: u64) -> core::result::Result<(), Exception> {
        if matches!(register, 6 | 7) && value >> 32 != 0 {
            return Err(Exception::GP0);
        }
        self.state.set_debug_register(self.fpu, register, value);
        Ok(())
    }

    fn invlpg(&mut self, _at: Gva) {
        self.state.hw.flush_tlb();
    }

    fn unmask_nmis(&mut self) {
        self.state.events.nmi_masked = false;
        self.state.hw.set_nmi_masked(false);
    }

    fn translate(&mut self, at: Gva, access: Access) -> core::result::Result<Gpa, Exception> {
        if let (true, Some(Found { gpa, write, .. })) = (self.untranslated, self.found) {
            let same = if write { Access::Write } else { Access::Read };
            if access == same && at.page_offset() == gpa.page_offset() {
                self.untranslated = false;
                return Ok(gpa);
            }
        }
        let access = match access {
            Access::Read => walk::Access::READ,
            Access::Write => walk::Access::WRITE,
            Access::Execute => walk::Access::EXECUTE,
            Access::SystemRead => walk::Access::SYSTEM_READ,
            Access::SystemWrite => walk::Access::SYSTEM_WRITE,
        };
        let context = self.state.walk_context(self.fpu.pkru());
        match walk::walk(self.view(), &context, at, access) {
            Ok(found) => Ok(found.gpa),
            Err(walk::WalkError::Fault(exception)) => Err(exception),
            Err(walk::WalkError::NonCanonical) => Err(Exception::GP0),
            Err(walk::WalkError::Tables(..) | walk::WalkError::Contended) => {
                self.lost = true;
                Err(Exception::GP0)
            }
        }
    }

    fn read_ram(&mut self, at: Gpa, to: &mut [u8]) -> core::result::Result<(), NotRam> {
        if self.is_device(at, false) {
            return Err(NotRam);
        }
        self.view().read(at, to).map_err(|_| NotRam)
    }

    fn write_ram(&mut self, at: Gpa, from: &[u8]) -> core::result::Result<(), NotRam> {
        if self.is_device(at, true) {
            return Err(NotRam);
        }
        self.view().write(at, from).map_err(|_| NotRam)
    }

    fn compare_exchange_ram(&mut self, at: Gpa, old: &[u8], new: &[u8]) -> core::result::Result<bool, NotRam> {
        self.view().compare_exchange_bytes(at, old, new).map_err(|_| NotRam)
    }

    fn vector(&mut self, register: usize) -> [u8; 32] {
        self.fpu.vector(register)
    }

    fn set_vector(&mut self, register: usize, value: &[u8; 32], vex: bool) {
        self.fpu.set_vector(register, value, vex);
    }

    fn x87_words(&self) -> X87Words {
        self.fpu.x87_words()
    }

    fn initialize_x87(&mut self) {
        self.fpu.initialize_x87();
    }

    fn read_port_data(&mut self, offset: usize, to: &mut [u8]) {
        self.data.copy_out(offset, to);
    }

    fn write_port_data(&mut self, offset: usize, from: &[u8]) {
        self.data.copy_in(offset, from);
    }

    fn mode(&self) -> Mode {
        self.state.mode()
    }
}

impl<V: Vendor> Vcpu<V> {
    /// Emulates the instruction at RIP, which just made the guest exit. `fault`: what it tried, if that is why.
    /// `Some`: userspace is needed.
    pub(crate) fn emulate(&self, core: &mut Core<V>, fault: Option<&NestedFault>) -> Result<Option<ToUser>> {
        if let Some(fault) = fault.filter(|_| core.state.events.unfinished.is_some()) {
            return Ok(Some(ToUser::Delivery { gpa: fault.gpa }));
        }
        if fault.is_some_and(|fault| fault.walk) {
            // The guest's page tables are in no memory.
            return Ok(self.emulation_failure(core));
        }
        if let Some(done) = fault.and_then(|fault| self.store_to_device(core, fault)) {
            return Ok(done);
        }
        let state = &mut core.state;
        let (mut code, mut len) = ([0; 16], 0);
        if let Some(bytes) = fault.and(state.hw.instruction_bytes()) {
            len = bytes.len().min(15);
            code[..len].copy_from_slice(&bytes[..len]);
        } else if let Some(bytes) = state.code.take() {
            (code, len) = (bytes, bytes.len());
        }
        core.found = fault.map(|fault| Found::new(state.regs.rip, fault, (len != 0).then_some(&code)));
        self.emulate_on(core, code.get(..len).filter(|code| !code.is_empty()))
    }

    /// Carries out the instruction at RIP if it is a plain store, which needs no emulator. `None`: it is not, and nothing was done.
    fn store_to_device(&self, core: &mut Core<V>, fault: &NestedFault) -> Option<Option<ToUser>> {
        let (state, vm) = (&mut core.state, &*self.vm);
        if !fault.write || state.debug.is_on() || state.regs.rflags & rflags::TF != 0 {
            return None;
        }
        let found = state.device_move(fault)?;
        let Direction::Store(value) = found.direction else { return None };
        let (gpa, len) = (fault.gpa, found.size);
        let taken = state.device_write(vm, gpa, len, value);
        trace::mmio(true, gpa.0, len.into(), value);
        self.peer.stats.count(VcpuStat::InsnEmulation);
        state.completed(state.regs.rip.wrapping_add(found.length.into()));
        Some((!taken).then_some(ToUser::Mmio { gpa, data: value.to_le_bytes(), len, write: true }))
    }

    /// Takes the guest to the handler of `event` without hardware's help.
    pub(crate) fn deliver(&self, core: &mut Core<V>, event: Delivery) -> Step {
        let Core { state, fpu, emulator, .. } = core;
        let mut emulated = Emulated {
            state,
            fpu,
            data: &self.data,
            vm: &self.vm,
            view: None,
            found: None,
            untranslated: false,
            lost: false,
        };
        match emulator.deliver(&mut emulated, event) {
            Step::Fault(_) if emulated.lost => Step::Unsupported,
            step => step,
        }
    }

    /// Takes the guest to another task, which the CPU does not do.
    pub(crate) fn switch_task(&self, core: &mut Core<V>, switch: TaskSwitch) -> Option<ToUser> {
        let state = &core.state;
        let event = state.events.unfinished.filter(|_| switch.source == TaskSource::Gate);
        let resume_at = state.hw.next_rip().filter(|_| event.is_none()).unwrap_or(state.regs.rip);
        self.switch_task_for(core, switch, event, resume_at)
    }

    /// The same for `event`, or an instruction. The old task goes on at `resume_at`.
    fn switch_task_for(
        &self,
        core: &mut Core<V>,
        switch: TaskSwitch,
        event: Option<Event>,
        resume_at: u64,
    ) -> Option<ToUser> {
        let Core { state, fpu, emulator, .. } = core;
        let (data, vm) = (&self.data, &*self.vm);
        let mut emulated = Emulated { state, fpu, data, vm, view: None, found: None, untranslated: false, lost: false };
        let switched = match emulator.switch_task(&mut emulated, switch, event, resume_at) {
            Switched::Fault(_) if emulated.lost => Switched::Unsupported,
            switched => switched,
        };
        drop(emulated);
        if event == Some(Event::Nmi) {
            state.hw.set_nmi_masked(true);
        }
        if !matches!((switched, event), (Switched::Fault(_), Some(Event::Exception(_)))) {
            // Delivered, or lost as it would be on a CPU. An exception is still there to become a double fault.
            state.events.unfinished = None;
        }
        match switched {
            Switched::Done | Switched::Trapped => {
                if event.is_none() && state.debug.steps() {
                    state.debug.instruction_over();
                }
                if switched == Switched::Trapped {
                    state.events.raise(Exception { payload: Some(dr::DR6_BT), ..Exception::plain(vector::DB) });
                }
            }
            Switched::Fault(exception) => {
                state.regs.rflags |= rflags::RF;
                state.events.raise(exception);
            }
            Switched::Unsupported => return Some(ToUser::Emulation { bytes: [0; 15], len: 0 }),
        }
        None
    }

    /// Goes on with an instruction that waited for userspace's answer to the read of a device.
    pub(crate) fn answer_read(&self, core: &mut Core<V>, data: u64) -> Result<Option<ToUser>> {
        let Core { state, fpu, emulator, .. } = core;
        emulator.complete_read(data);
        let traps = state.regs.rflags & rflags::TF != 0;
        if !traps && !state.debug.steps() {
            let (data, vm) = (&self.data, &*self.vm);
            let mut emulated =
                Emulated { state, fpu, data, vm, view: None, found: None, untranslated: false, lost: false };
            if emulator.finish_load(&mut emulated) {
                self.peer.stats.count(VcpuStat::InsnEmulation);
                return Ok(None);
            }
        }
        self.emulate_on(core, None)
    }

    /// Goes on with an instruction that waited for userspace, or begins one. `code`: its bytes, if they are known.
    pub(crate) fn emulate_on(&self, core: &mut Core<V>, code: Option<&[u8]>) -> Result<Option<ToUser>> {
        let vm = &*self.vm;
        loop {
            let Core { state, fpu, emulator, found, .. } = core;
            let traps = state.regs.rflags & rflags::TF != 0;
            let rip = state.regs.rip;
            let found = found.filter(|found| found.rip == rip);
            let untranslated = found.is_some_and(|found| found.unique);
            let mut emulated =
                Emulated { state, fpu, data: &self.data, vm, view: None, found, untranslated, lost: false };
            let step = emulator.step(&mut emulated, code);
            self.peer.stats.count(VcpuStat::InsnEmulation);
            let lost = emulated.lost;
            drop(emulated);
            // An instruction, or an iteration of one, is over.
            let over = state.regs.rip != rip || matches!(step, Step::Done) && emulator.is_repeating();
            if state.regs.rip != rip && !matches!(step, Step::Fault(_)) {
                state.instruction_retired();
            }
            if over && state.debug.steps() && !matches!(step, Step::Fault(_)) {
                state.debug.instruction_over();
            } else if traps && over && !matches!(step, Step::Fault(_)) {
                state.events.raise(Exception { payload: Some(dr::DR6_BS), ..Exception::plain(vector::DB) });
            }
            match step {
                Step::MmioRead { gpa, len } => trace::mmio(false, gpa.0, len.into(), 0),
                Step::MmioWrite { gpa, data, len } => trace::mmio(true, gpa.0, len.into(), u64::from_le_bytes(data)),
                Step::PortIn { port, size, count } => trace::pio(false, port, size.into(), count.into()),
                Step::PortOut { port, size, count } => trace::pio(true, port, size.into(), count.into()),
                _ => {}
            }
            let done = match step {
                Step::Done => true,
                Step::MmioRead { gpa, len } => match state.device_read(vm, gpa, len) {
                    Some(value) => {
                        emulator.complete_read(value);
                        false
                    }
                    None => {
                        core.pending = Pending::MmioRead;
                        return Ok(Some(ToUser::Mmio { gpa, data: [0; 8], len, write: false }));
                    }
                },
                Step::MmioWrite { gpa, data, len } => {
                    if state.device_write(vm, gpa, len, u64::from_le_bytes(data)) {
                        !emulator.is_busy()
                    } else {
                        if emulator.is_busy() {
                            core.pending = Pending::Emulation;
                        }
                        return Ok(Some(ToUser::Mmio { gpa, data, len, write: true }));
                    }
                }
                Step::PortIn { port, size, count } => {
                    if self.ports_in(port, size, count) {
                        emulator.complete_port_in();
                        false
                    } else {
                        core.pending = Pending::EmulatedPortIn;
                        return Ok(Some(ToUser::Port { input: true, size_bytes: size, port, count }));
                    }
                }
                Step::PortOut { port, size, count } => {
                    let rest = self.ports_out(port, size, count);
                    if rest > 0 {
                        return Ok(Some(ToUser::Port { input: false, size_bytes: size, port, count: rest }));
                    }
                    true
                }
                Step::Fault(_) if lost => return Ok(self.emulation_failure(core)),
                Step::TaskSwitch { switch, resume_at } => {
                    return Ok(self.switch_task_for(core, switch, None, resume_at))
                }
                Step::Fault(exception) => {
                    state.regs.rflags |= rflags::RF;
                    state.events.raise(exception);
                    true
                }
                Step::Unsupported => return Ok(self.emulation_failure(core)),
            };
            if done {
                return Ok(None);
            }
        }
    }

    /// An instruction that cannot be emulated. The guest's user code gets #UD, so that it cannot end the guest, unless userspace
    /// wants to see every such instruction.
    pub(crate) fn emulation_failure(&self, core: &mut Core<V>) -> Option<ToUser> {
        self.peer.stats.count(VcpuStat::InsnEmulationFail);
        core.emulator.reset();
        let (bytes, len) = core.state.fetch(&self.vm.memory.view(true), core.state.mode());
        let always = self.vm.enabled.exit_on_emulation_failure();
        if !always {
            core.state.events.raise(Exception::UD);
        }
        (always || core.state.hw.cpl() == 0).then_some(ToUser::Emulation { bytes, len: len as u8 })
    }

    /// INS from a device in the kernel, which fills the data page. `false`: userspace has the port.
    fn ports_in(&self, port: u16, size: u8, count: u16) -> bool {
        for at in (0..usize::from(count)).map(|n| n * usize::from(size)) {
            let Some(value) = self.vm.irq.port_in(port, size) else { return false };
            self.data.copy_in(at, value.to_le_bytes().get(..usize::from(size)).unwrap_or(&[]));
        }
        true
    }

    /// OUTS to devices in the kernel. How many elements are left for userspace, at the start of the data page.
    fn ports_out(&self, port: u16, size: u8, count: u16) -> u16 {
        let len = usize::from(size);
        for done in 0..count {
            let mut value = [0; 4];
            let at = usize::from(done) * len;
            if let Some(into) = value.get_mut(..len) {
                self.data.copy_out(at, into);
            }
            if !self.vm.irq.port_out(port, size, u32::from_le_bytes(value)) {
                let rest = count - done;
                for n in (0..usize::from(rest)).filter(|_| done > 0) {
                    let mut element = [0; 4];
                    let element = element.get_mut(..len).unwrap_or_default();
                    self.data.copy_out(at + n * len, element);
                    self.data.copy_in(n * len, element);
                }
                return rest;
            }
        }
        0
    }
}

/// The time for a write to a register of the local APIC, if it wants one.
#[inline]
pub(crate) fn write_time(offset: u32) -> u64 {
    match Lapic::write_wants_time(offset) {
        true => timer::now_ns(),
        false => 0,
    }
}

impl<V: Vendor> State<V> {
    /// Offset into the local APIC's register window.
    #[inline]
    fn lapic_offset(&self, gpa: Gpa) -> Option<u32> {
        let lapic = self.lapic.as_ref()?;
        let offset = gpa.0.wrapping_sub(lapic.base_gpa().0);
        (lapic.mode() == crate::irqchip::lapic::Mode::XApic && offset < LAPIC_WINDOW).then_some(offset as u32)
    }

    /// An access to a device that is over at once, without process context: to the local APIC, or a write that an eventfd or a ring
    /// takes. `false`: nothing was done.
    #[inline]
    pub(crate) fn device_fast(&mut self, vm: &Vm<V>, fault: &NestedFault) -> bool {
        let own = self.lapic_offset(fault.gpa).is_some();
        (own || fault.write && vm.irq.may_post(fault.gpa)) && self.access_device(vm, fault, own)
    }

    /// `own`: it is the local APIC.
    #[inline(never)]
    fn access_device(&mut self, vm: &Vm<V>, fault: &NestedFault, own: bool) -> bool {
        let Some(found) = self.device_move(fault) else { return false };
        if own {
            self.take_back();
        }
        match found.direction {
            Direction::Store(value) => {
                let posted = || vm.irq.post(false, fault.gpa.0, found.size.into(), value);
                if !(if own { self.device_write(vm, fault.gpa, found.size, value) } else { posted() }) {
                    return false;
                }
                trace::mmio(true, fault.gpa.0, found.size.into(), value);
            }
            Direction::Load { .. } => {
                let Some(value) = self.device_read(vm, fault.gpa, found.size) else { return false };
                trace::mmio(false, fault.gpa.0, found.size.into(), 0);
                found.answer(value, &mut self.regs);
            }
        }
        if let Some(peer) = vm.peers.get(self.index) {
            peer.stats.count(VcpuStat::InsnEmulation);
        }
        self.completed(self.regs.rip.wrapping_add(found.length.into()));
        true
    }

    /// The instruction that exited, if it is a plain move and nothing else was going on.
    fn device_move(&self, fault: &NestedFault) -> Option<DeviceMove> {
        let code = self.code_in_long_mode()?;
        if fault.walk || fault.execute || self.events.unfinished.is_some() || self.regs.rflags & rflags::AC != 0 {
            return None;
        }
        DeviceMove::of(code, &self.regs, fault.gpa.page_offset(), fault.write)
    }

    /// The bytes of the instruction that exited, if they are at hand and it is of 64-bit code.
    fn code_in_long_mode(&self) -> Option<&[u8]> {
        match (&self.code, self.hw.instruction_bytes()) {
            // Only in 64-bit code they are looked for.
            (Some(code), _) => Some(code),
            (None, Some(code)) if self.mode() == Mode::Long64 => Some(code),
            _ => None,
        }
    }

    /// A read from a device in the kernel. `None`: userspace has it.
    fn device_read(&mut self, vm: &crate::vm::Vm<V>, gpa: Gpa, len: u8) -> Option<u64> {
        match (self.lapic_offset(gpa), &mut self.lapic) {
            (Some(offset), Some(lapic)) => {
                let value = lapic.mmio_read(offset, len, timer::now_ns());
                self.lapic_accessed(vm, offset, false);
                Some(value)
            }
            _ => vm.irq.mmio_read(gpa, len),
        }
    }

    /// A write to a device in the kernel. `false`: userspace has it.
    #[inline]
    fn device_write(&mut self, vm: &Vm<V>, gpa: Gpa, len: u8, value: u64) -> bool {
        match self.lapic_offset(gpa) {
            Some(offset) => self.lapic_write(vm, offset, len, value),
            None => vm.irq.mmio_write(gpa, len, value),
        }
    }

    #[inline(never)]
    fn lapic_write(&mut self, vm: &Vm<V>, offset: u32, len: u8, value: u64) -> bool {
        let Some(lapic) = &mut self.lapic else { return false };
        let work = lapic.mmio_write(offset, len, value, write_time(offset));
        self.lapic_work(vm, work);
        self.lapic_accessed(vm, offset, true);
        true
    }
}
