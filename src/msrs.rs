// SPDX-License-Identifier: GPL-2.0
//! MSR accesses of the guest and of userspace: the policy decides, this file moves values to and from where they live.
#![forbid(unsafe_code)]

use kernel::{prelude::*, sync::Arc};

use crate::{
    abi::vm::{
        KvmMsrFilter, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN,
        KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE,
    },
    arch::{cr::cr0, msr, Hva},
    emul::Intercepted,
    emulation::write_time,
    exits::{NotNow, ToUser},
    glue::{cpu, fpu::GuestFpu, kick::KickPoint, timer, trace, user},
    guest::{Exception, Gpr},
    irqchip::lapic::regs,
    policy::msr::{
        filter::{self, Access},
        By, Context, Effect, Read, Register, Write,
    },
    vcpu::{request, Core, Pending, State},
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

impl<V: Vendor> State<V> {
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
            pv_features: self.pv_features,
            platform_info: vm.enabled.platform_info(),
        };
        f(&mut self.msrs, &context)
    }

    /// Reads an MSR. `fpu` is the extended state where it is at hand.
    pub(crate) fn read_msr(&mut self, vm: &Vm<V>, fpu: Option<&GuestFpu>, index: u32, by: By) -> Result<u64, Refused> {
        if let Some(done) = self.read_pmu_msr(index, fpu.is_some()) {
            return done;
        }
        let register = match self.policy(vm, by, |msrs, context| msrs.read(context, index)) {
            Read::Value(value) => return Ok(value),
            Read::Gp if by == By::Host && Self::is_listed_pmu_msr(vm, index) => return Ok(0),
            Read::Gp => return Err(Refused::Gp),
            Read::Register(register) => register,
        };
        self.take_back_for(register);
        match (register, &mut self.lapic) {
            (Register::Hardware(register), _) => Ok(self.hw.msr(register)),
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
        if let Some(done) = self.write_pmu_msr(index, value, by, fpu.is_some()) {
            return done;
        }
        let (register, value) = match self.policy(vm, by, |msrs, context| msrs.write(context, index, value)) {
            Write::Done => return Ok(()),
            Write::Gp if by == By::Host && value == 0 && Self::is_listed_pmu_msr(vm, index) => return Ok(()),
            Write::Gp => return Err(Refused::Gp),
            Write::Effect(effect) => {
                self.msr_effect(effect);
                return Ok(());
            }
            Write::Register(register, value) => (register, value),
        };
        self.take_back_for(register);
        let work = match (register, &mut self.lapic) {
            (Register::Hardware(register), _) => {
                self.hw.set_msr(register, value);
                return Ok(());
            }
            (Register::Tsc, _) if by == By::Host => {
                self.write_tsc(value, &vm.clock);
                return Ok(());
            }
            (Register::Tsc, _) => {
                let moved = value.wrapping_sub(self.guest_tsc());
                self.set_tsc_offset(self.tsc_offset().wrapping_add(moved));
                self.msrs.moved_tsc(moved);
                return Ok(());
            }
            (Register::TscAux, _) => {
                fpu.ok_or(Refused::Busy)?.tsc_aux = Some(value);
                return Ok(());
            }
            (Register::ApicBase, None) => {
                return self.set_user_apic_base(value);
            }
            // Another mode may change who delivers interrupts.
            (Register::ApicBase, Some(_)) if V::Vcpu::DELIVERS && fpu.is_none() => return Err(Refused::Busy),
            (Register::ApicBase, Some(lapic)) => {
                lapic.write_base(value, self.caps.physical_bits.into(), by == By::Host).map_err(|_| Refused::Gp)?
            }
            (Register::TscDeadline, Some(lapic)) => {
                let tsc = self.tsc.relation().at(timer::tsc());
                lapic.set_tsc_deadline(value, tsc)
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

    /// Before an access to a register of the local APIC: most may have to do with the interrupts that the CPU has. The ICR is in a hurry, and
    /// has not.
    #[inline]
    fn take_back_for(&mut self, register: Register) {
        const ICR: Register = Register::X2Apic((regs::ICR >> 4) as u8);
        if V::Vcpu::DELIVERS && matches!(register, Register::X2Apic(_)) && register != ICR {
            self.take_back();
        }
    }

    fn msr_effect(&mut self, effect: Effect) {
        match effect {
            Effect::Pat(value) => self.hw.set_msr(HardwareMsr::Pat, value),
            Effect::TscOffset(moved) => self.set_tsc_offset(self.tsc_offset().wrapping_add(moved)),
            Effect::SystemTime(at) => self.clock.set_system_time(at),
            Effect::WallClock(at) => self.clock.request_wall_clock(at),
            Effect::StealTime(at) => self.clock.set_steal_time(at),
            Effect::PvEoi(word) => self.pv_eoi.set_word(word),
            Effect::PredCmd(value) => cpu::write_pred_cmd(value),
            Effect::FlushCmd(value) => cpu::write_flush_cmd(value),
        }
    }

    /// Whether the guest has such an MSR, whatever it may do with it.
    fn knows_msr(&mut self, vm: &Vm<V>, index: u32) -> bool {
        self.has_pmu_msr(index) || self.policy(vm, By::Guest, |msrs, context| msrs.knows(context, index))
    }

    fn msr_operands(&self) -> (u32, u64) {
        (self.gpr(Gpr::Rcx) as u32, self.gpr(Gpr::Rdx) << 32 | self.gpr(Gpr::Rax) & 0xFFFF_FFFF)
    }

    fn rdmsr(&mut self, vm: &Vm<V>, fpu: Option<&GuestFpu>, may_sleep: bool) -> Result<(), Stopped> {
        let (index, _) = self.msr_operands();
        let value = self.read_msr(vm, fpu, index, By::Guest).inspect_err(|_| trace::msr(false, index, 0, true))?;
        trace::msr(false, index, value, false);
        self.skip(vm, Intercepted::Rdmsr, may_sleep)?;
        self.set_msr_result(value);
        Ok(())
    }

    fn wrmsr(&mut self, vm: &Vm<V>, fpu: Option<&mut GuestFpu>, may_sleep: bool) -> Result<(), Stopped> {
        let (index, value) = self.msr_operands();
        // The length first: what the write does must not happen twice.
        let next = self.next_instruction(vm, Intercepted::Wrmsr, may_sleep)?;
        let written = self.write_msr(vm, fpu, index, value, By::Guest);
        trace::msr(true, index, value, written.is_err());
        written?;
        self.completed(next);
        Ok(())
    }

    /// RDMSR's result: EDX:EAX.
    pub(crate) fn set_msr_result(&mut self, value: u64) {
        self.set_gpr(Gpr::Rax, value & 0xFFFF_FFFF);
        self.set_gpr(Gpr::Rdx, value >> 32);
    }

    /// RDMSR and WRMSR in the inner ring. Whatever userspace may have a word in is for process context.
    fn quickly(&mut self, vm: &Vm<V>, access: impl FnOnce(&mut Self) -> Result<(), Stopped>) -> Result<(), NotNow> {
        if self.msr_filter.is_some() {
            return Err(NotNow);
        }
        match access(self) {
            Ok(()) => Ok(()),
            Err(Stopped::Gp) if vm.enabled.user_space_msr() == 0 => {
                self.events.raise(Exception::GP0);
                Ok(())
            }
            Err(_) => Err(NotNow),
        }
    }

    pub(crate) fn handle_rdmsr(&mut self, vm: &Vm<V>) -> Result<(), NotNow> {
        self.quickly(vm, |state| state.rdmsr(vm, None, false))
    }

    pub(crate) fn handle_wrmsr(&mut self, vm: &Vm<V>) -> Result<(), NotNow> {
        self.quickly(vm, |state| state.wrmsr(vm, None, false))
    }

    /// Which paravirtual features the guest may use follows from its CPUID and from KVM_CAP_ENFORCE_PV_FEATURE_CPUID.
    pub(crate) fn update_pv_features(&mut self) {
        self.pv_features = if self.enforce_pv { self.cpuid.leaf(PV_FEATURES_LEAF, 0)[0] } else { u32::MAX };
    }

    /// Takes the VM's MSR filter.
    pub(crate) fn update_msr_filter(&mut self, vm: &Vm<V>) {
        self.msr_filter = vm.msr_filter.lock().clone();
        self.hw.want_all_msrs(self.msr_filter.is_some());
    }

    fn filter_allows(&self, index: u32, access: Access) -> bool {
        self.msr_filter.as_ref().is_none_or(|filter| filter.allows(index, access))
    }
}

impl<V: Vendor> Core<V> {
    /// RDMSR and WRMSR in process context. `Some`: userspace carries it out.
    pub(crate) fn handle_msr_slow(&mut self, vm: &Vm<V>, access: Access) -> Result<Option<ToUser>, NotNow> {
        let (state, fpu) = (&mut self.state, &mut self.fpu);
        let (index, value) = state.msr_operands();
        let reason = if !state.filter_allows(index, access) {
            KVM_MSR_EXIT_REASON_FILTER
        } else {
            let done = match access {
                Access::Read => state.rdmsr(vm, Some(fpu), true),
                Access::Write => state.wrmsr(vm, Some(fpu), true),
            };
            match done {
                Ok(()) => return Ok(None),
                Err(Stopped::Again) => return Err(NotNow),
                Err(Stopped::Gp) => match state.knows_msr(vm, index) {
                    true => KVM_MSR_EXIT_REASON_INVAL,
                    false => KVM_MSR_EXIT_REASON_UNKNOWN,
                },
            }
        };
        if vm.enabled.user_space_msr() & reason == 0 {
            state.events.raise(Exception::GP0);
            return Ok(None);
        }
        let read = access == Access::Read;
        let what = if read { Intercepted::Rdmsr } else { Intercepted::Wrmsr };
        let next_rip = state.next_instruction(vm, what, true)?;
        self.pending = Pending::Msr { read, rip: state.regs.rip, next_rip };
        Ok(Some(ToUser::Msr { read, reason, index, data: if read { 0 } else { value } }))
    }
}

/// CPUID leaf of the paravirtual features.
const PV_FEATURES_LEAF: u32 = 0x4000_0001;

/// Why RDMSR or WRMSR did not complete.
enum Stopped {
    Gp,
    /// It needs process context, or the instruction is not there any more.
    Again,
}

impl From<Refused> for Stopped {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Gp => Self::Gp,
            Refused::Busy => Self::Again,
        }
    }
}

impl From<NotNow> for Stopped {
    fn from(_: NotNow) -> Self {
        Self::Again
    }
}

/// KVM_X86_SET_MSR_FILTER's argument, copied.
pub(crate) struct MsrFilter {
    default_allow: bool,
    ranges: KVec<filter::Range<KVec<u8>>>,
}

impl MsrFilter {
    /// `EINVAL` for flags that do not exist, bitmaps that are too long, and a filter that denies everything.
    fn new(request: &KvmMsrFilter) -> Result<Self> {
        let default_allow = request.flags & KVM_MSR_FILTER_DEFAULT_DENY == 0;
        let given = request.ranges.iter().filter(|range| range.nmsrs != 0);
        if request.flags & !KVM_MSR_FILTER_DEFAULT_DENY != 0 || !default_allow && given.clone().next().is_none() {
            return Err(EINVAL);
        }
        let mut ranges = KVec::new();
        for range in given {
            let bytes = (range.nmsrs as usize).div_ceil(64).saturating_mul(8);
            let known = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;
            if range.flags & !known != 0 || range.flags == 0 || bytes > KVM_MSR_FILTER_MAX_BITMAP_SIZE {
                return Err(EINVAL);
            }
            let mut bitmap = KVec::new();
            bitmap.resize(bytes, 0, GFP_KERNEL_ACCOUNT)?;
            user::read_bytes(Hva(range.bitmap), &mut bitmap)?;
            let range = filter::Range {
                reads: range.flags & KVM_MSR_FILTER_READ != 0,
                writes: range.flags & KVM_MSR_FILTER_WRITE != 0,
                base: range.base,
                count: range.nmsrs,
                bitmap,
            };
            ranges.push(range, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(Self { default_allow, ranges })
    }

    fn allows(&self, index: u32, access: Access) -> bool {
        filter::allowed(&self.ranges, self.default_allow, index, access)
    }
}

impl<V: Vendor> Vm<V> {
    /// KVM_X86_SET_MSR_FILTER. When it returns, no vCPU runs guest code under the old filter.
    pub(crate) fn set_msr_filter(&self, request: &KvmMsrFilter) -> Result {
        let filter = Arc::new(MsrFilter::new(request)?, GFP_KERNEL_ACCOUNT)?;
        // A vCPU that is being made either has this filter or is among the peers.
        let _setup = self.setup.lock();
        *self.msr_filter.lock() = Some(filter);
        KickPoint::post_and_wait(self.peers.iter().map(|peer| &peer.kick), request::MSR_FILTER);
        Ok(())
    }
}
