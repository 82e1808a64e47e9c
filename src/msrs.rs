// SPDX-License-Identifier: GPL-2.0
//! MSR accesses of the guest and of userspace: the policy decides, this file moves values to and from where they live.
#![forbid(unsafe_code)]

use kernel::prelude::*;

use crate::{
    arch::{cr::cr0, msr},
    emul::Intercepted,
    emulation::write_time,
    exits::NotNow,
    glue::{cpu, fpu::GuestFpu, timer},
    guest::{Exception, Gpr},
    policy::msr::{By, Context, Effect, Read, Register, Write},
    vcpu::{Core, State},
    vendor::{HardwareMsr, Vendor, VendorVcpu},
    vm::Vm,
};

/// Why an access does not happen.
pub(crate) enum Refused {
    /// #GP in the guest.
    Gp,
    /// It needs the extended state, which is loaded now: again in process context.
    Busy,
}

/// Where a register is that hardware switches.
fn hardware(register: Register) -> Option<HardwareMsr> {
    Some(match register {
        Register::Efer => HardwareMsr::Efer,
        Register::Star => HardwareMsr::Star,
        Register::Lstar => HardwareMsr::Lstar,
        Register::Cstar => HardwareMsr::Cstar,
        Register::Sfmask => HardwareMsr::Sfmask,
        Register::FsBase => HardwareMsr::FsBase,
        Register::GsBase => HardwareMsr::GsBase,
        Register::KernelGsBase => HardwareMsr::KernelGsBase,
        Register::SysenterCs => HardwareMsr::SysenterCs,
        Register::SysenterEsp => HardwareMsr::SysenterEsp,
        Register::SysenterEip => HardwareMsr::SysenterEip,
        Register::SpecCtrl => HardwareMsr::SpecCtrl,
        _ => return None,
    })
}

impl<V: Vendor> State<V> {
    /// The guest's TSC now.
    pub(crate) fn guest_tsc(&self) -> u64 {
        timer::tsc().wrapping_add(self.hw.tsc_offset())
    }

    /// IA32_APIC_BASE; without a local APIC in the kernel, that of an enabled one.
    pub(crate) fn apic_base(&self) -> u64 {
        self.lapic.as_ref().map_or(self.user_apic_base, |lapic| lapic.base())
    }

    /// Sets IA32_APIC_BASE where userspace has the local APIC. Bits 7:0 and 9 are reserved, and so is what is above the physical
    /// address width.
    pub(crate) fn set_user_apic_base(&mut self, value: u64) -> Result<(), Refused> {
        if value & (0x2FF | self.caps.reserved_physical()) != 0 {
            return Err(Refused::Gp);
        }
        self.user_apic_base = value;
        Ok(())
    }

    fn policy<R>(
        &mut self,
        vm: &Vm<V>,
        by: By,
        f: impl FnOnce(&mut crate::policy::msr::MsrState, &Context<'_>) -> R,
    ) -> R {
        let context = Context {
            config: &vm.host.msr_config,
            caps: &self.caps,
            by,
            efer: self.hw.efer(),
            paging: self.hw.cr0() & cr0::PG != 0,
        };
        f(&mut self.msrs, &context)
    }

    /// Reads an MSR. `fpu` is the extended state where it is at hand.
    pub(crate) fn read_msr(&mut self, vm: &Vm<V>, fpu: Option<&GuestFpu>, index: u32, by: By) -> Result<u64, Refused> {
        let register = match self.policy(vm, by, |msrs, context| msrs.read(context, index)) {
            Read::Value(value) => return Ok(value),
            Read::Gp => return Err(Refused::Gp),
            Read::Register(register) => register,
        };
        if let Some(register) = hardware(register) {
            return Ok(self.hw.msr(register));
        }
        match (register, &mut self.lapic) {
            (Register::Tsc, _) => Ok(self.guest_tsc()),
            (Register::TscAux, _) => Ok(fpu.ok_or(Refused::Busy)?.tsc_aux.unwrap_or(0)),
            (Register::ApicBase, None) => Ok(self.user_apic_base),
            (Register::ApicBase, Some(lapic)) => Ok(lapic.base()),
            (Register::TscDeadline, lapic) => Ok(lapic.as_ref().map_or(0, |lapic| lapic.tsc_deadline())),
            (Register::X2Apic(register), Some(lapic)) => {
                lapic.read_msr(msr::X2APIC_FIRST + u32::from(register), timer::now_ns()).map_err(|_| Refused::Gp)
            }
            _ => Err(Refused::Gp),
        }
    }

    /// Writes an MSR, with everything that follows from it.
    pub(crate) fn write_msr(
        &mut self,
        vm: &Vm<V>,
        fpu: Option<&mut GuestFpu>,
        index: u32,
        value: u64,
        by: By,
    ) -> Result<(), Refused> {
        let (register, value) = match self.policy(vm, by, |msrs, context| msrs.write(context, index, value)) {
            Write::Done => return Ok(()),
            Write::Gp => return Err(Refused::Gp),
            Write::Effect(effect) => {
                self.msr_effect(effect);
                return Ok(());
            }
            Write::Register(register, value) => (register, value),
        };
        if let Some(register) = hardware(register) {
            self.hw.set_msr(register, value);
            return Ok(());
        }
        let work = match (register, &mut self.lapic) {
            (Register::Tsc, _) if by == By::Host => {
                self.hw.set_tsc_offset(vm.clock.write_tsc(value));
                self.clock.request_update();
                return Ok(());
            }
            (Register::Tsc, _) => {
                let moved = value.wrapping_sub(self.guest_tsc());
                self.hw.set_tsc_offset(self.hw.tsc_offset().wrapping_add(moved));
                self.msrs.moved_tsc(moved);
                self.clock.request_update();
                return Ok(());
            }
            (Register::TscAux, _) => {
                fpu.ok_or(Refused::Busy)?.tsc_aux = Some(value);
                return Ok(());
            }
            (Register::ApicBase, None) => {
                return self.set_user_apic_base(value);
            }
            (Register::ApicBase, Some(lapic)) => {
                lapic.write_base(value, self.caps.physical_bits.into(), by == By::Host).map_err(|_| Refused::Gp)?
            }
            (Register::TscDeadline, Some(lapic)) => {
                let tsc = timer::tsc().wrapping_add(self.hw.tsc_offset());
                lapic.set_tsc_deadline(value, timer::now_ns(), tsc)
            }
            (Register::TscDeadline, None) => return Ok(()),
            (Register::X2Apic(register), Some(lapic)) => lapic
                .write_msr(msr::X2APIC_FIRST + u32::from(register), value, write_time(u32::from(register) << 4))
                .map_err(|_| Refused::Gp)?,
            _ => return Err(Refused::Gp),
        };
        self.lapic_work(vm, work);
        Ok(())
    }

    fn msr_effect(&mut self, effect: Effect) {
        match effect {
            Effect::Pat(value) => self.hw.set_msr(HardwareMsr::Pat, value),
            Effect::TscOffset(moved) => {
                self.hw.set_tsc_offset(self.hw.tsc_offset().wrapping_add(moved));
                self.clock.request_update();
            }
            Effect::SystemTime(at) => self.clock.set_system_time(at),
            Effect::WallClock(at) => self.clock.request_wall_clock(at),
            Effect::StealTime(at) => self.clock.set_steal_time(at),
            Effect::PvEoi(_) => {}
            Effect::PredCmd(value) => cpu::write_pred_cmd(value),
            Effect::FlushCmd(value) => cpu::write_flush_cmd(value),
        }
    }

    fn msr_operands(&self) -> (u32, u64) {
        (self.gpr(Gpr::Rcx) as u32, self.gpr(Gpr::Rdx) << 32 | self.gpr(Gpr::Rax) & 0xFFFF_FFFF)
    }

    fn rdmsr(&mut self, vm: &Vm<V>, fpu: Option<&GuestFpu>, may_sleep: bool) -> Result<(), NotNow> {
        let (index, _) = self.msr_operands();
        match self.read_msr(vm, fpu, index, By::Guest) {
            Ok(value) => {
                self.skip(vm, Intercepted::Rdmsr, may_sleep)?;
                self.set_gpr(Gpr::Rax, value & 0xFFFF_FFFF);
                self.set_gpr(Gpr::Rdx, value >> 32);
            }
            Err(Refused::Gp) => self.events.raise(Exception::GP0),
            Err(Refused::Busy) => return Err(NotNow),
        }
        Ok(())
    }

    fn wrmsr(&mut self, vm: &Vm<V>, fpu: Option<&mut GuestFpu>, may_sleep: bool) -> Result<(), NotNow> {
        let (index, value) = self.msr_operands();
        // The length first: what the write does must not happen twice.
        let next = self.next_instruction(vm, Intercepted::Wrmsr, may_sleep)?;
        match self.write_msr(vm, fpu, index, value, By::Guest) {
            Ok(()) => self.completed(next),
            Err(Refused::Gp) => self.events.raise(Exception::GP0),
            Err(Refused::Busy) => return Err(NotNow),
        }
        Ok(())
    }

    /// RDMSR in the inner ring.
    pub(crate) fn handle_rdmsr(&mut self, vm: &Vm<V>, may_sleep: bool) -> Result<(), NotNow> {
        self.rdmsr(vm, None, may_sleep)
    }

    /// WRMSR in the inner ring.
    pub(crate) fn handle_wrmsr(&mut self, vm: &Vm<V>, may_sleep: bool) -> Result<(), NotNow> {
        self.wrmsr(vm, None, may_sleep)
    }
}

impl<V: Vendor> Core<V> {
    pub(crate) fn handle_rdmsr_slow(&mut self, vm: &Vm<V>) -> Result<(), NotNow> {
        self.state.rdmsr(vm, Some(&self.fpu), true)
    }

    pub(crate) fn handle_wrmsr_slow(&mut self, vm: &Vm<V>) -> Result<(), NotNow> {
        self.state.wrmsr(vm, Some(&mut self.fpu), true)
    }
}
