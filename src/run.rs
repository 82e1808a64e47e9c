// SPDX-License-Identifier: GPL-2.0
//! KVM_RUN: the loop that enters the guest and looks after what made it stop.
//!
//! Two rings. The inner one runs with interrupts off and the guest's extended state loaded, and handles every exit that needs no
//! sleep: that is where nearly all of them end. What needs more leaves the window, is handled in ordinary process
//! context, and comes back.
#![forbid(unsafe_code)]

use kernel::prelude::*;

use crate::{
    abi::{
        run::{
            self, ExitHypercall, ExitMsr, KVM_EXIT_INTR, KVM_EXIT_UNKNOWN, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS,
            KVM_SYNC_X86_SREGS, KVM_SYNC_X86_VALID_FIELDS,
        },
        stats::VcpuStat,
        vcpu::KvmRegs,
    },
    arch::{
        cr::{cr4, rflags},
        Gpa,
    },
    dirty_ring::DirtyRing,
    emul::Mode,
    exits::{Handled, ToUser},
    glue::{
        code::Paging,
        cpu::{self, IrqsOff},
        kick::InGuest,
        lock::lock_killable,
        signal, task, timer, trace,
    },
    guest::{
        event::vector,
        exit::NestedFault,
        queue::{Entry, Readiness},
        Event, Exception, Exit, Gpr,
    },
    irqchip::lapic::Lapic,
    mmu::guest_mem::GuestMem,
    vcpu::{request, Core, MpState, Pending, State, Vcpu},
    vendor::{Vendor, VendorVcpu},
    vm::Vm,
};

/// A vCPU whose hardware state is loaded; the drop unloads it, before interrupts are on.
struct Loaded<'a, V: Vendor> {
    state: &'a mut State<V>,
    irqs: &'a IrqsOff,
}

impl<'a, V: Vendor> Loaded<'a, V> {
    #[inline]
    fn new(state: &'a mut State<V>, irqs: &'a IrqsOff) -> Self {
        state.hw.load(irqs);
        Self { state, irqs }
    }
}

impl<V: Vendor> Drop for Loaded<'_, V> {
    #[inline]
    fn drop(&mut self) {
        self.state.hw.unload(&mut self.state.regs, self.irqs);
    }
}

/// Why the inner ring ended.
enum Slow {
    /// Requests, signals, a reschedule, or the vCPU does not run any more.
    Work,
    /// An exit that needs process context.
    Exit(Exit),
    /// An access to a device.
    Device(NestedFault),
    /// Userspace waits for the guest to take interrupts, and it does.
    InterruptWindow,
}

impl<V: Vendor> Vcpu<V> {
    /// KVM_RUN. Returns 0 when userspace has something to do, `EINTR` when a signal or `immediate_exit` ended it.
    pub(crate) fn run(&self) -> Result<isize> {
        let mut core = lock_killable(&self.core)?;
        let core = &mut *core;
        core.ran = true;
        core.state.look_for_sleep();
        let _running = self.peer.run_here();
        core.state.update_steal_time(&self.vm);
        let _mask = core.signal_mask.map(signal::Masked::new);
        self.take_registers(core)?;
        self.take_user_state(core)?;
        let result = self.run_until_user(core);
        match &result {
            Ok(reason) => reason.report(&self.run),
            // With `immediate_exit` userspace still reads what the last call told.
            Err(error) if *error == EINTR && self.run.load::<u8>(run::IMMEDIATE_EXIT) == 0 => {
                self.peer.stats.count(VcpuStat::SignalExits);
                self.run.store(run::EXIT_REASON, KVM_EXIT_INTR);
            }
            Err(_) => {}
        }
        self.give_user_state(core);
        self.give_registers(core);
        result.map(|_| 0)
    }

    /// KVM_CAP_SYNC_REGS: the registers that userspace changed in `kvm_run`. Other threads may write there at the same time, so each
    /// structure is copied once.
    fn take_registers(&self, core: &mut Core<V>) -> Result {
        let page = &self.run;
        let dirty: u64 = page.load(run::KVM_DIRTY_REGS);
        if (dirty | page.load::<u64>(run::KVM_VALID_REGS)) & !KVM_SYNC_X86_VALID_FIELDS != 0 {
            return Err(EINVAL);
        }
        if dirty == 0 {
            return Ok(());
        }
        if dirty & KVM_SYNC_X86_REGS != 0 {
            core.set_regs(&page.read(run::SYNC_REGS));
        }
        if dirty & KVM_SYNC_X86_SREGS != 0 {
            core.set_sregs(self, &page.read(run::SYNC_SREGS))?;
        }
        if dirty & KVM_SYNC_X86_EVENTS != 0 {
            core.set_vcpu_events(&self.vm.enabled, &page.read(run::SYNC_EVENTS))?;
        }
        page.store(run::KVM_DIRTY_REGS, 0u64);
        Ok(())
    }

    /// KVM_CAP_SYNC_REGS: the registers that userspace wants to see in `kvm_run`.
    #[inline]
    fn give_registers(&self, core: &Core<V>) {
        match self.run.load(run::KVM_VALID_REGS) {
            0 => {}
            valid => self.give_valid_registers(core, valid),
        }
    }

    #[inline(never)]
    fn give_valid_registers(&self, core: &Core<V>, valid: u64) {
        let page = &self.run;
        if valid & KVM_SYNC_X86_REGS != 0 {
            page.write(run::SYNC_REGS, &KvmRegs::from(&core.state.regs));
        }
        if valid & KVM_SYNC_X86_SREGS != 0 {
            page.write(run::SYNC_SREGS, &core.state.sregs());
        }
        if valid & KVM_SYNC_X86_EVENTS != 0 {
            page.write(run::SYNC_EVENTS, &core.state.vcpu_events(&self.vm.enabled));
        }
    }

    /// What userspace sets in `kvm_run` for this call.
    fn take_user_state(&self, core: &mut Core<V>) -> Result {
        if core.state.lapic.is_none() {
            let cr8 = self.run.load::<u64>(run::CR8);
            if cr8 > 0xF {
                return Err(EINVAL);
            }
            core.state.cr8 = cr8 as u8;
            core.state.hw.set_tpr(cr8 as u8);
        }
        Ok(())
    }

    /// What userspace finds in `kvm_run` after this call.
    fn give_user_state(&self, core: &Core<V>) {
        let state = &core.state;
        let enabled = state.regs.rflags & rflags::IF != 0;
        let ready = !state.user_pic || state.takes_user_interrupt();
        self.run.store(run::IF_FLAG, u8::from(enabled));
        self.run.store(run::READY_FOR_INTERRUPT_INJECTION, u8::from(ready));
        self.run.store(run::FLAGS, 0u16);
        self.run.store(run::CR8, u64::from(state.current_cr8()));
        self.run.store(run::APIC_BASE, state.apic_base());
    }

    /// Finishes what userspace did for the guest since the last call.
    fn resume(&self, core: &mut Core<V>) -> Result<Option<ToUser>> {
        match core::mem::replace(&mut core.pending, Pending::Nothing) {
            Pending::Nothing => return Ok(None),
            Pending::PortIn { size_bytes } => {
                core.state.set_accumulator(self.data.load::<u32>(0), size_bytes);
                return Ok(None);
            }
            Pending::EmulatedPortIn => core.emulator.complete_port_in(),
            Pending::MmioRead => return self.answer_read(core, self.run.load(run::EXIT_UNION + 8)),
            Pending::Emulation => {}
            Pending::Hypercall { rip, next_rip, mask } => {
                let answer: ExitHypercall = self.run.read(run::EXIT_UNION);
                if core.state.regs.rip == rip {
                    core.state.set_gpr(Gpr::Rax, answer.ret & mask);
                    core.state.completed(next_rip);
                }
                return Ok(None);
            }
            Pending::Msr { read, rip, next_rip } => {
                let answer: ExitMsr = self.run.read(run::EXIT_UNION);
                if answer.error != 0 {
                    core.state.events.raise(Exception::GP0);
                } else if core.state.regs.rip == rip {
                    if read {
                        core.state.set_msr_result(answer.data);
                    }
                    core.state.completed(next_rip);
                }
                return Ok(None);
            }
        }
        self.emulate_on(core, None)
    }

    fn run_until_user(&self, core: &mut Core<V>) -> Result<ToUser> {
        if let Some(reason) = self.resume(core)? {
            return Ok(reason);
        }
        if self.run.load::<u8>(run::IMMEDIATE_EXIT) != 0 {
            return Err(EINTR);
        }
        // For errors that say no more.
        self.run.store(run::EXIT_REASON, KVM_EXIT_UNKNOWN);
        loop {
            if task::work_pending() {
                task::handle_work()?;
                core.state.update_steal_time(&self.vm);
            }
            self.serve_requests(core);
            if let Some(reason) = core.state.take_step() {
                return Ok(reason);
            }
            if self.peer.ring.as_ref().is_some_and(DirtyRing::is_nearly_full) {
                return Ok(ToUser::DirtyRingFull);
            }
            if let Some(reason) = core.state.apic_user.take() {
                return Ok(reason);
            }
            if core.state.events.triple_fault {
                core.state.reset_cpu();
                return Ok(ToUser::Shutdown);
            }
            if core.state.mp_state != MpState::Runnable {
                if core.state.lapic.is_none() {
                    // Userspace has the interrupt controller: it decides when a halted CPU goes on.
                    core.state.mp_state = MpState::Runnable;
                    return Ok(ToUser::Halt);
                }
                let wanted = core.state.user_pic && self.run.load::<u8>(run::REQUEST_INTERRUPT_WINDOW) != 0;
                if wanted && core.state.takes_user_interrupt() {
                    return Ok(ToUser::InterruptWindow);
                }
                self.block(core)?;
                continue;
            }
            if core.state.hw.needs_software(&core.state.regs) {
                match self.run_in_software(core)? {
                    Some(reason) => return Ok(reason),
                    None => continue,
                }
            }
            core.state.fill_shared_word(&self.vm);
            core.state.choose_delivery(&self.vm);
            let ended = self.run_guest(core);
            core.state.take_shared_word(&self.vm);
            let reason = match ended {
                Slow::Work => None,
                Slow::Exit(exit) => self.handle_slow(core, &exit)?,
                Slow::Device(fault) => self.emulate(core, Some(&fault))?,
                Slow::InterruptWindow => Some(ToUser::InterruptWindow),
            };
            if let Some(reason) = reason {
                return Ok(reason);
            }
        }
    }

    /// What others asked for and what needs process context.
    fn serve_requests(&self, core: &mut Core<V>) {
        if self.has_mail() {
            core.state.drain_inbox(&self.vm, &self.peer);
        }
        core.state.catch_up_tsc();
        let requests = self.peer.kick.take(u64::MAX);
        if requests & request::FLUSH_TLB != 0 {
            self.peer.stats.count(VcpuStat::TlbFlush);
            core.state.forget_translations();
        }
        if core.state.hw.wants_pdptes() {
            core.state.load_pdptes(&self.vm);
        }
        if requests & request::CLOCK != 0 {
            core.state.update_clock(&self.vm);
        }
        core.state.unhalted |= requests & request::UNHALT != 0;
        if requests & request::LOG_WRITES != 0 {
            core.state.hw.log_writes(self.vm.peers.logs_writes());
        }
        if requests & request::MSR_FILTER != 0 {
            core.state.update_msr_filter(&self.vm);
        }
        if requests & request::EOI_LISTENERS != 0 {
            core.state.hw.set_eoi_listeners(&self.vm.irq.eoi_listeners());
        }
        if requests & request::EVENT_FILTER != 0 {
            core.state.update_event_filter(&self.vm);
        }
        core.state.serve_pmu();
    }

    /// Sleeps until there is something for a vCPU that does not run.
    fn block(&self, core: &mut Core<V>) -> Result {
        let state = &mut core.state;
        if state.pic_signal {
            // It may have been taken back, and then there is nothing to wake up for.
            state.pic_signal = self.vm.irq.pic_output();
        }
        if state.wakes_up() {
            state.mp_state = MpState::Runnable;
            state.unhalted = false;
            return Ok(());
        }
        state.arm_timer_for_sleep();
        let peer = &self.peer;
        let began = timer::now_ns();
        peer.stats.set(VcpuStat::Blocking, 1);
        let woken = peer.kick.block_until(|| self.has_mail() || peer.kick.pending() != 0);
        peer.stats.set(VcpuStat::Blocking, 0);
        peer.stats.count(VcpuStat::HaltWakeup);
        peer.stats.add(VcpuStat::HaltWaitNs, timer::now_ns().saturating_sub(began));
        woken
    }

    /// The inner ring. Interrupts that came while they were off are taken between two of its windows.
    fn run_guest(&self, core: &mut Core<V>) -> Slow {
        loop {
            let irqs = IrqsOff::new();
            let guest_time = task::GuestTime::begin(&irqs);
            cpu::rcu_quiescent(&irqs);
            let ended = match core.state.tsc_lags() {
                true => Some(Slow::Work),
                false => self.run_window(core, &irqs),
            };
            core.state.hw.deliver_host_interrupt(&irqs);
            drop(irqs);
            drop(guest_time);
            if let Some(slow) = ended {
                core.state.take_back();
                if core.state.pv_eoi.is_open() {
                    core.state.settle_eoi(&self.vm, true);
                }
                return slow;
            }
        }
    }

    /// One window. `None`: there is nothing to do but to let the host have its interrupts.
    fn run_window(&self, core: &mut Core<V>, irqs: &IrqsOff) -> Option<Slow> {
        let Core { state, fpu, .. } = core;
        let asked = state.user_pic && self.run.load::<u8>(run::REQUEST_INTERRUPT_WINDOW) != 0;
        let window = fpu.enter(irqs);
        self.peer.stats.count(VcpuStat::FpuReload);
        let loaded = Loaded::new(state, irqs);
        let state = &mut *loaded.state;
        state.load_counters(irqs);
        loop {
            if self.has_mail() {
                state.drain_inbox(&self.vm, &self.peer);
                if state.mp_state != MpState::Runnable {
                    return Some(Slow::Work);
                }
            }
            let Some(in_guest) = self.peer.kick.enter_guest(irqs) else {
                if self.peer.kick.pending() == request::FLUSH_TLB && !task::work_pending() {
                    self.peer.kick.take(request::FLUSH_TLB);
                    state.forget_translations();
                    // With a moment of interrupts: others may ask again and again.
                    return None;
                }
                return Some(Slow::Work);
            };
            if self.has_mail() {
                return None;
            }
            if state.hw.wants_pdptes() || state.hw.needs_software(&state.regs) {
                return Some(Slow::Work);
            }
            if state.pmu.as_ref().is_some_and(|pmu| pmu.has_work()) {
                return Some(Slow::Work);
            }
            let user_window = asked && state.accepts_user_interrupt();
            if user_window && state.takes_user_interrupt() {
                return Some(Slow::InterruptWindow);
            }
            let asked_pic = state.prepare_entry(self, user_window, irqs);
            if state.events.triple_fault {
                return Some(Slow::Work);
            }
            if asked_pic && in_guest.must_leave() {
                // Taking the interrupt brought the next one: a kick by this very thread, for which nothing was sent. What goes in is
                // on its way, and the exit follows at once.
                cpu::interrupt_self(irqs);
            }
            if state.lapic.as_ref().is_some_and(|lapic| lapic.highest_isr().is_some()) {
                state.promise_eoi(&self.vm);
            }
            trace::entry(self.peer.id, state.regs.rip);
            state.debug.before_entry(&mut state.regs.rflags);
            let exit = state.hw.run(&mut state.regs, &window, irqs);
            state.debug.after_exit(&mut state.regs.rflags);
            state.look_at_code(&exit, &in_guest);
            state.take_written(&self.vm, irqs);
            drop(in_guest);
            trace::exit(self.peer.id, state.regs.rip, &exit);
            self.peer.stats.exit(&exit);
            state.after_exit();
            if state.pv_eoi.is_open() && !state.settle_eoi(&self.vm, false) {
                if let Exit::NestedFault(_) | Exit::Rdmsr | Exit::Wrmsr = exit {
                    // Perhaps an access to the local APIC: again, when that is settled.
                    return Some(Slow::Work);
                }
            }
            match exit {
                Exit::HostInterrupt | Exit::HostNmi => return None,
                exit => match state.handle_fast(&self.vm, &exit, window.xcr0()) {
                    // An exit in the middle of an event's delivery comes before any host interrupt. If it leads to the next
                    // such delivery, as #AC and #DB can without end, nothing but this lets the host have its turn.
                    Handled::Resume if state.events.is_mid_delivery() => return None,
                    // The guest may have changed its task priority without an exit.
                    Handled::Resume if state.apic_user.shared_word.is_some() => return Some(Slow::Work),
                    Handled::Resume if state.debug.has_stepped() => return Some(Slow::Work),
                    Handled::Resume => {}
                    Handled::Blocked => return Some(Slow::Work),
                    Handled::Slow => {
                        if matches!(exit, Exit::NestedFault(_)) {
                            // Only the page is wanted.
                            state.hw.leave_registers();
                        }
                        return Some(Slow::Exit(exit));
                    }
                    Handled::Device => match exit {
                        Exit::NestedFault(fault) => return Some(Slow::Device(fault)),
                        exit => return Some(Slow::Exit(exit)),
                    },
                },
            }
        }
    }
}

impl<V: Vendor> State<V> {
    /// The nested tables changed.
    fn forget_translations(&mut self) {
        self.hw.flush_tlb();
        self.code_cache.forget();
    }

    /// Reads the page-directory-pointer entries of PAE paging. Where there is no memory they are not present.
    #[cold]
    pub(crate) fn load_pdptes(&mut self, vm: &Vm<V>) {
        let entries = self.read_pdptes(vm);
        self.hw.set_pdptes(entries);
    }

    pub(crate) fn read_pdptes(&self, vm: &Vm<V>) -> [u64; 4] {
        let table = Gpa(self.hw.cr3() & 0xFFFF_FFE0);
        let mut entries = [0; 4];
        for (entry, at) in entries.iter_mut().zip(0..) {
            let mut bytes = [0; 8];
            if vm.memory.view(true).read(Gpa(table.0 | at << 3), &mut bytes).is_ok() {
                *entry = u64::from_le_bytes(bytes);
            }
        }
        entries
    }

    /// Puts the pages that hardware noted as written into the dirty log.
    #[inline]
    fn take_written(&mut self, vm: &Vm<V>, irqs: &IrqsOff) {
        if let Some(pages) = self.hw.take_written(irqs) {
            vm.memory.written(pages);
        }
    }

    /// Takes the bytes of the instruction that exited, if they will be wanted and the CPU does not tell its length.
    #[inline]
    fn look_at_code(&mut self, exit: &Exit, in_guest: &InGuest<'_>) {
        self.code = None;
        let wanted = match exit {
            Exit::NestedFault(fault) => {
                self.expects_device && !fault.present && !fault.execute && self.hw.instruction_bytes().is_none()
            }
            Exit::Cpuid
            | Exit::Hypercall
            | Exit::Rdmsr
            | Exit::Wrmsr
            | Exit::Hlt
            | Exit::Invd
            | Exit::Wbinvd
            | Exit::Pause
            | Exit::Monitor
            | Exit::Mwait
            | Exit::ControlRegister(_) => self.hw.next_rip().is_none(),
            _ => false,
        };
        if wanted && self.mode() == Mode::Long64 {
            let paging = Paging { cr3: self.hw.cr3(), five_levels: self.hw.cr4_bits(cr4::LA57) != 0 };
            self.code = self.code_cache.bytes::<V::NestedFormat>(paging, self.regs.rip, in_guest);
        }
    }

    /// Whether the guest could take an external interrupt now.
    fn readiness(&self) -> Readiness {
        Readiness { interrupts_enabled: self.regs.rflags & rflags::IF != 0, shadow: self.hw.interrupt_shadow() }
    }

    /// CR8 as the guest would read it.
    pub(crate) fn current_cr8(&self) -> u8 {
        self.lapic.as_ref().map_or(self.cr8, |lapic| lapic.cr8())
    }

    /// Whether there is room for an interrupt of userspace, which has the 8259A, and the local APIC lets it through.
    fn accepts_user_interrupt(&self) -> bool {
        self.user_interrupt.is_none() && self.lapic.as_ref().is_none_or(|lapic| lapic.accepts_pic())
    }

    /// Whether userspace may inject an interrupt now.
    pub(crate) fn takes_user_interrupt(&self) -> bool {
        let ready = self.readiness();
        self.accepts_user_interrupt() && self.events.is_empty() && ready.interrupts_enabled && !ready.shadow
    }

    /// Whether an external interrupt waits that the guest's priorities let through.
    #[inline]
    pub(crate) fn interrupt_waits(&self) -> bool {
        match &self.lapic {
            Some(lapic) => lapic.highest_pending().is_some() || self.pic_interrupt_waits(lapic),
            None => self.user_interrupt.is_some(),
        }
    }

    /// Whether an interrupt of the 8259A waits, wherever that is, and gets past the local APIC.
    #[inline]
    fn pic_interrupt_waits(&self, lapic: &Lapic) -> bool {
        (self.pic_signal || self.user_interrupt.is_some()) && lapic.accepts_pic()
    }

    /// The priority below which the guest must lower CR8 for an interrupt that waits for nothing else, which must be seen then.
    #[inline]
    fn held_back_by_tpr(&self) -> Option<u8> {
        self.lapic.as_ref()?.tpr_threshold()
    }

    /// Whether a halted CPU goes on.
    fn wakes_up(&self) -> bool {
        let halted = self.mp_state == MpState::Halted;
        halted
            && (self.events.nmis > 0 && !self.events.nmi_masked
                || self.events.exception.is_some()
                || self.unhalted
                || self.interrupt_waits() && self.regs.rflags & rflags::IF != 0)
    }

    /// Puts what goes into the guest with this entry where hardware finds it. Whether the PIC was asked for it, which may have kicked
    /// this very vCPU.
    #[inline]
    fn prepare_entry(&mut self, vcpu: &Vcpu<V>, user_window: bool, irqs: &IrqsOff) -> bool {
        let (waits, held_back) = if self.hand_over(irqs) {
            (self.lapic.as_ref().is_some_and(|lapic| self.pic_interrupt_waits(lapic)), false)
        } else {
            if let Some(lapic) = &self.lapic {
                if lapic.cr8() != self.cr8 {
                    self.cr8 = lapic.cr8();
                    self.hw.set_tpr(self.cr8);
                }
            }
            (self.interrupt_waits(), self.held_back_by_tpr().is_some())
        };
        let waits = waits && !self.debug.blocks_interrupts();
        let idle = !waits && !held_back && self.events.is_empty();
        if idle && !self.windows_open && !self.shadow_step && !user_window {
            return false;
        }
        // Interrupts that wait for a guest which has them off, and hardware tells when that is over.
        let parked = waits && !held_back && self.regs.rflags & rflags::IF == 0 && self.hw.has_interrupt_window();
        if parked && self.events.is_empty() && !self.shadow_step && !user_window && !self.has_deadline() {
            return false;
        }
        self.prepare_events(vcpu, waits, user_window, irqs)
    }

    /// What goes into the guest now, and whether the 8259A was asked for it.
    pub(crate) fn next_event(&mut self, vcpu: &Vcpu<V>, waits: bool) -> (Entry, bool) {
        let readiness = self.readiness();
        let blocked = self.debug.blocks_interrupts();
        let mut asked_pic = false;
        let Self { events, lapic, user_interrupt, pic_signal, .. } = self;
        let nmis = if blocked { core::mem::take(&mut events.nmis) } else { 0 };
        let entry = events.next(readiness, waits, || match lapic {
            Some(lapic) if *pic_signal && lapic.accepts_pic() => {
                *pic_signal = false;
                asked_pic = true;
                vcpu.vm.irq.acknowledge_pic()
            }
            Some(lapic) if user_interrupt.is_some() && lapic.accepts_pic() => user_interrupt.take(),
            Some(lapic) => {
                let vector = lapic.highest_pending()?;
                lapic.acknowledge(vector);
                Some(vector)
            }
            None => user_interrupt.take(),
        });
        events.nmis = events.nmis.saturating_add(nmis);
        (entry, asked_pic)
    }

    #[inline(never)]
    fn prepare_events(&mut self, vcpu: &Vcpu<V>, waits: bool, user_window: bool, irqs: &IrqsOff) -> bool {
        self.shadow_step = false;
        self.await_deadline();
        let readiness = self.readiness();
        let blocked = self.debug.blocks_interrupts();
        let (entry, asked_pic) = self.next_event(vcpu, waits);
        if let Some(event) = entry.inject {
            let (kind, vector) = match event {
                Event::Interrupt(vector) => (0, vector),
                Event::Nmi => (1, vector::NMI),
                Event::Exception(exception) => (2, exception.vector),
                Event::Software { vector, .. } => (2, vector),
            };
            trace::inject(vcpu.peer.id, kind, vector);
            match event {
                Event::Nmi => {
                    // To learn when the handler ends.
                    self.hw.want_nmi_window(true);
                    vcpu.peer.stats.count(VcpuStat::NmiInjections);
                }
                Event::Interrupt(_) => vcpu.peer.stats.count(VcpuStat::IrqInjections),
                _ => {}
            }
            self.hw.inject(event, irqs);
        }
        // Another one may wait behind the one that goes in now, or behind a signal of the 8259A that was taken back.
        let mut more = entry.interrupt_window || user_window || !blocked && self.interrupt_waits();
        if entry.nmi_window && !self.events.nmi_masked {
            if V::Vcpu::NMI_WINDOW {
                self.hw.want_nmi_window(true);
            } else if entry.inject.is_some() {
                // The event goes in, and before its handler's first instruction comes the exit.
                cpu::interrupt_self(irqs);
            } else if readiness.interrupts_enabled {
                more = true;
            } else if self.regs.rflags & rflags::TF == 0 {
                // In the shadow of MOV SS: the trap after the next instruction tells when it is over.
                self.regs.rflags |= rflags::TF | rflags::RF;
                self.shadow_step = true;
            }
        }
        let held_back = self.held_back_by_tpr();
        self.hw.want_interrupt_window(more);
        self.hw.want_cr8_writes(held_back);
        self.windows_open = more || held_back.is_some();
        asked_pic
    }

    /// What an exit leaves behind, whatever its reason.
    #[inline]
    fn after_exit(&mut self) {
        if let Some(event) = self.hw.take_unfinished_event() {
            self.events.unfinished = Some(event);
        }
        if self.shadow_step {
            self.regs.rflags &= !rflags::TF;
        }
        let cr8 = self.hw.tpr();
        if cr8 != self.cr8 {
            self.cr8 = cr8;
            if let Some(lapic) = &mut self.lapic {
                lapic.set_cr8(cr8);
            }
        }
        if let Some(rip) = self.nmi_return {
            if self.regs.rip != rip {
                self.nmi_return = None;
                self.events.nmi_masked = false;
            }
        }
    }
}
