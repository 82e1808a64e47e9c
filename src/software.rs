// SPDX-License-Identifier: GPL-2.0
//! A guest that the CPU cannot run in its mode: real mode, segments left from there, no paging where there is no place for a page table that
//! the guest does not see ([`identity`](crate::mmu::identity)), on a CPU without VMX's unrestricted guest. The emulator runs it, events
//! included, until the CPU can. It is slow, and meant for real mode's part in the way from reset to a kernel's own mode.
//!
//! Not supported, and an internal error then: what the emulator and its gates do not support, x87 and SSE arithmetic above all.
#![forbid(unsafe_code)]

use kernel::prelude::*;

use crate::{
    abi::{run, stats::VcpuStat},
    arch::cr::{cr0, cr4},
    emul::{intercepted, Delivery, Intercepted, Step},
    exits::{Handled, ToUser},
    guest::{event::vector, Event, Exception, Exit, Gpr},
    vcpu::{Core, MpState, State, Vcpu},
    vendor::{Vendor, VendorVcpu},
};

/// Instructions between two looks at requests and signals.
const BUDGET: usize = 64;

impl<V: Vendor> Vcpu<V> {
    /// Runs a few instructions of a guest that hardware cannot run. `Some`: userspace is needed.
    pub(crate) fn run_in_software(&self, core: &mut Core<V>) -> Result<Option<ToUser>> {
        let asked = core.state.user_pic && self.run.load::<u8>(run::REQUEST_INTERRUPT_WINDOW) != 0;
        core.state.hw.forget_exit();
        for _ in 0..BUDGET {
            let state = &mut core.state;
            if asked && state.takes_user_interrupt() {
                return Ok(Some(ToUser::InterruptWindow));
            }
            if self.take_event(core) == Step::Unsupported {
                return Ok(self.emulation_failure(core));
            }
            let state = &mut core.state;
            if state.events.triple_fault || state.events.is_mid_delivery() {
                // A fault of the delivery: next time.
                return Ok(None);
            }
            state.code = None;
            let mode = state.mode();
            let (bytes, len) = state.fetch(&self.vm.memory.view(true), mode);
            let bytes = bytes.get(..len).unwrap_or(&[]);
            let reason = match intercepted(bytes, mode) {
                Some((what, length)) => self.as_exit(core, what, length)?,
                None => self.emulate_on(core, (len > 0).then_some(bytes))?,
            };
            if reason.is_some() {
                return Ok(reason);
            }
            let state = &core.state;
            let over = state.mp_state != MpState::Runnable || state.debug.has_stepped() || !self.peer.inbox.is_empty();
            if over || self.peer.kick.pending() != 0 || !state.hw.needs_software(&state.regs) {
                break;
            }
        }
        Ok(None)
    }

    /// Delivers what waits for the guest, if it can take it now.
    fn take_event(&self, core: &mut Core<V>) -> Step {
        let state = &mut core.state;
        let waits = state.interrupt_waits() && !state.debug.blocks_interrupts();
        if !waits && state.events.is_empty() {
            return Step::Done;
        }
        let (entry, _) = state.next_event(self, waits);
        let Some(event) = entry.inject else { return Step::Done };
        let protected = state.hw.cr0() & cr0::PE != 0;
        let delivery = |vector, error_code| Delivery { vector, error_code, software: false };
        let wanted = match event {
            Event::Interrupt(vector) => {
                self.peer.stats.count(VcpuStat::IrqInjections);
                delivery(vector, None)
            }
            Event::Nmi => {
                self.peer.stats.count(VcpuStat::NmiInjections);
                delivery(vector::NMI, None)
            }
            Event::Exception(exception) => {
                // What goes with it gets to where hardware would put it. There is no page fault without paging.
                if let (vector::DB, Some(bits)) = (exception.vector, exception.payload) {
                    state.hw.set_dr6(state.hw.dr6() | bits);
                }
                delivery(exception.vector, exception.error_code.filter(|_| protected))
            }
            Event::Software { .. } => return Step::Done,
        };
        state.hw.set_interrupt_shadow(false);
        match self.deliver(core, wanted) {
            Step::Fault(exception) => {
                let state = &mut core.state;
                if let Event::Exception(first) = event {
                    // Together they may be a double fault.
                    state.events.unfinished = Some(Event::Exception(first));
                }
                state.events.raise(exception);
                Step::Done
            }
            Step::TaskSwitch { switch, .. } => {
                core.state.events.unfinished = Some(event);
                match self.switch_task(core, switch) {
                    None => Step::Done,
                    Some(_) => Step::Unsupported,
                }
            }
            step => {
                if event == Event::Nmi {
                    core.state.hw.set_nmi_masked(true);
                }
                step
            }
        }
    }

    /// An instruction that is an exit of its own: its handlers do it.
    fn as_exit(&self, core: &mut Core<V>, what: Intercepted, length: u8) -> Result<Option<ToUser>> {
        let state = &mut core.state;
        let privileged = !matches!(
            what,
            Intercepted::Cpuid | Intercepted::Hypercall | Intercepted::Rdtsc | Intercepted::Rdtscp | Intercepted::Rdpmc
        );
        if privileged && state.hw.cr0() & cr0::PE != 0 && state.hw.cpl() != 0 {
            state.events.raise(Exception::GP0);
            return Ok(None);
        }
        let exit = match what {
            Intercepted::Cpuid => Exit::Cpuid,
            Intercepted::Hlt => Exit::Hlt,
            Intercepted::Hypercall => Exit::Hypercall,
            Intercepted::Rdmsr => Exit::Rdmsr,
            Intercepted::Wrmsr => Exit::Wrmsr,
            Intercepted::Rdpmc => Exit::Rdpmc,
            Intercepted::Invd => Exit::Invd,
            Intercepted::Wbinvd => Exit::Wbinvd,
            Intercepted::Monitor => Exit::Monitor,
            Intercepted::Mwait => Exit::Mwait,
            Intercepted::Xsetbv if state.hw.cr4() & cr4::OSXSAVE != 0 => Exit::Xsetbv,
            Intercepted::Rdtsc | Intercepted::Rdtscp => {
                state.read_tsc(what == Intercepted::Rdtscp, core.fpu.tsc_aux, length);
                return Ok(None);
            }
            _ => Exit::UndefinedInstruction,
        };
        match state.handle_fast(&self.vm, &exit, core.fpu.xcr0()) {
            Handled::Slow => self.handle_slow(core, &exit),
            _ => Ok(None),
        }
    }
}

impl<V: Vendor> State<V> {
    /// RDTSC and RDTSCP, `length` bytes long.
    fn read_tsc(&mut self, with_aux: bool, aux: Option<u64>, length: u8) {
        let forbidden = self.hw.cr4() & cr4::TSD != 0 && self.hw.cr0() & cr0::PE != 0 && self.hw.cpl() != 0;
        if forbidden || with_aux && aux.is_none() {
            self.events.raise(if forbidden { Exception::GP0 } else { Exception::UD });
            return;
        }
        let tsc = self.guest_tsc();
        self.set_gpr(Gpr::Rax, tsc & 0xFFFF_FFFF);
        self.set_gpr(Gpr::Rdx, tsc >> 32);
        if with_aux {
            self.set_gpr(Gpr::Rcx, aux.unwrap_or(0) & 0xFFFF_FFFF);
        }
        self.completed(self.regs.rip.wrapping_add(length.into()));
    }
}
