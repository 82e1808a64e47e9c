// SPDX-License-Identifier: GPL-2.0
//! The ioctls of a vCPU other than KVM_RUN: reading and writing its state.
#![forbid(unsafe_code)]

use kernel::prelude::*;

use crate::{
    abi::{
        ioctl::*,
        vcpu::*,
        vm::{KvmDeviceAttr, KvmEnableCap, KvmPreFaultMemory},
        FromZeros, IntoBytes,
    },
    arch::{cr::cr4, Gpa, Gva, Hva},
    clock::VmClock,
    dev::each_msr,
    enable_cap::Enabled,
    glue::{fpu, lock::lock_killable, timer, user},
    guest::{
        check::{self, Allowed},
        event::{vector, Event, Exception},
        Regs, SystemRegs,
    },
    irqchip::lapic::STATE_BYTES,
    mmu::{guest_mem::GuestMem, walk},
    policy::{
        caps::GuestCaps,
        cpuid_table::{withhold_unhalt, CpuidTable},
        msr::{By, Reported},
        vmx::pdpte,
    },
    stats::StatsFile,
    vcpu::{Core, MpState, State, Vcpu},
    vendor::{Vendor, VendorVcpu},
    vm::Vm,
};

/// Reads the argument, calls `f` with it, returns 0.
fn with<T: crate::abi::FromBytes>(at: Hva, f: impl FnOnce(T) -> Result) -> Result<isize> {
    f(user::read(at)?)?;
    Ok(0)
}

/// Writes a result, returns 0.
fn give<T: IntoBytes + crate::abi::Immutable>(at: Hva, value: &T) -> Result<isize> {
    user::write(at, value)?;
    Ok(0)
}

impl<V: Vendor> Vcpu<V> {
    // Its frame is large, and KVM_RUN's calls go deep: they must not share it.
    #[inline(never)]
    pub(crate) fn state_ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        let at = Hva(arg as u64);
        let mut core = lock_killable(&self.core)?;
        let core = &mut *core;
        core.state.look_for_sleep();
        let vm = &*self.vm;
        match cmd {
            KVM_GET_REGS => give(at, &KvmRegs::from(&core.state.regs)),
            KVM_SET_REGS => with(at, |regs: KvmRegs| {
                core.set_regs(&regs);
                Ok(())
            }),
            KVM_GET_SREGS => give(at, &core.state.sregs()),
            KVM_SET_SREGS => with(at, |sregs: KvmSregs| core.set_sregs(self, &sregs)),
            KVM_GET_SREGS2 => {
                let pdptrs = core.state.pdptrs(vm);
                give(at, &KvmSregs2::new(&core.state.sregs(), pdptrs))
            }
            KVM_SET_SREGS2 => with(at, |sregs: KvmSregs2| core.set_sregs2(self, &sregs)),
            KVM_GET_FPU => give(at, &core.fpu()),
            KVM_SET_FPU => with(at, |fpu: KvmFpu| core.set_fpu(&fpu)),
            KVM_TRANSLATE => {
                let asked: KvmTranslation = user::read(at)?;
                let found =
                    walk::translate(&vm.memory.view(true), &core.state.walk_context(0), Gva(asked.linear_address));
                let mut answer =
                    KvmTranslation { linear_address: asked.linear_address, ..KvmTranslation::new_zeroed() };
                answer.physical_address = u64::MAX;
                // Without paging every address but the one that means "none" is valid.
                if let Some(found) = found.ok().filter(|found| found.gpa.0 != u64::MAX) {
                    answer.physical_address = found.gpa.0;
                    answer.valid = 1;
                    answer.writeable = u8::from(found.writable);
                    answer.usermode = u8::from(found.user);
                }
                give(at, &answer)
            }
            KVM_GET_XSAVE | KVM_GET_XSAVE2 => {
                let image = core.fpu.image();
                let len = if cmd == KVM_GET_XSAVE { 4096 } else { vm.host.xsave_bytes().max(4096) };
                user::write_bytes(at, image.get(..len).ok_or(EINVAL)?)?;
                Ok(0)
            }
            KVM_SET_XSAVE => {
                let len = vm.host.xsave_bytes();
                let mut image = KVVec::new();
                image.resize(len.max(4096), 0u8, GFP_KERNEL)?;
                user::read_bytes(at, &mut image)?;
                core.fpu.set_image(image.get(..len).ok_or(EINVAL)?)?;
                Ok(0)
            }
            KVM_GET_XCRS => {
                let mut xcrs = KvmXcrs::new_zeroed();
                xcrs.nr_xcrs = 1;
                xcrs.xcrs[0].value = core.fpu.xcr0();
                give(at, &xcrs)
            }
            KVM_SET_XCRS => with(at, |xcrs: KvmXcrs| {
                if xcrs.nr_xcrs > KVM_MAX_XCRS || xcrs.flags != 0 {
                    return Err(EINVAL);
                }
                let given = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|xcr| xcr.xcr == 0);
                match given {
                    Some(xcr) if vm.host.caps.xcr0_valid(xcr.value) => core.fpu.set_xcr0(xcr.value),
                    Some(_) => Err(EINVAL),
                    None => Ok(()),
                }
            }),
            KVM_GET_MSRS => each_msr(at, |entry| {
                let read = core.state.read_msr(vm, Some(&core.fpu), entry.index, By::Host);
                entry.data = read.map_err(|_| EINVAL)?;
                Ok(())
            }),
            KVM_SET_MSRS => each_msr(at, |entry| {
                let written = core.state.write_msr(vm, Some(&mut core.fpu), entry.index, entry.data, By::Host);
                written.map_err(|_| EINVAL)
            }),
            KVM_GET_ONE_REG | KVM_SET_ONE_REG => with(at, |reg: KvmOneReg| {
                let index = one_reg_msr(reg.id).ok_or(EINVAL)?;
                if cmd == KVM_GET_ONE_REG {
                    let read = core.state.read_msr(vm, Some(&core.fpu), index, By::Host);
                    return user::write(Hva(reg.addr), &read.map_err(|_| EINVAL)?);
                }
                let value: u64 = user::read(Hva(reg.addr))?;
                let written = core.state.write_msr(vm, Some(&mut core.fpu), index, value, By::Host);
                written.map_err(|_| EINVAL)
            }),
            KVM_GET_REG_LIST => {
                let _room: u64 = user::read(at)?;
                give(at, &0u64)
            }
            KVM_SET_CPUID2 => with(at, |head: KvmCpuid2| core.set_cpuid(self, at, &head)),
            KVM_GET_CPUID2 => {
                let mut head: KvmCpuid2 = user::read(at)?;
                let dynamic = core.state.cpuid_dynamic(vm, core.fpu.xcr0());
                let table = &core.state.cpuid;
                let entries = table.entries();
                if (head.nent as usize) < entries.len() {
                    return Err(E2BIG);
                }
                head.nent = entries.len() as u32;
                user::write(at, &head)?;
                let mut copy = KVVec::with_capacity(entries.len(), GFP_KERNEL)?;
                for entry in entries {
                    copy.push(table.current(entry, &dynamic), GFP_KERNEL)?;
                }
                user::write(at.wrapping_add(size_of::<KvmCpuid2>() as u64), &copy[..])?;
                Ok(0)
            }
            KVM_GET_MP_STATE => {
                core.state.drain_inbox(vm, &self.peer);
                give(at, &KvmMpState { mp_state: core.state.mp_state.to_kvm() })
            }
            KVM_SET_MP_STATE => with(at, |state: KvmMpState| {
                core.state.mp_state = MpState::from_kvm(state.mp_state, core.state.lapic.is_some())?;
                if state.mp_state == KVM_MP_STATE_SIPI_RECEIVED {
                    self.peer.inbox.post_sipi(core.sipi_vector);
                }
                Ok(())
            }),
            KVM_GET_LAPIC => {
                core.state.drain_inbox(vm, &self.peer);
                let lapic = core.state.lapic.as_ref().ok_or(EINVAL)?;
                user::write_bytes(at, &lapic.save(timer::now_ns(), vm.irq.rules().wide_ids))?;
                Ok(0)
            }
            KVM_SET_LAPIC => {
                let mut state = [0; STATE_BYTES];
                user::read_bytes(at, &mut state)?;
                core.state.drain_inbox(vm, &self.peer);
                let lapic = core.state.lapic.as_mut().ok_or(EINVAL)?;
                let work = lapic.restore(&state, timer::now_ns(), vm.irq.rules().wide_ids).map_err(|_| EINVAL)?;
                core.state.lapic_work(vm, work);
                core.state.arm_timer();
                Ok(0)
            }
            KVM_INTERRUPT => with(at, |interrupt: KvmInterrupt| {
                let vector = u8::try_from(interrupt.irq).map_err(|_| EINVAL)?;
                if !core.state.user_pic {
                    return Err(ENXIO);
                }
                if core.state.user_interrupt.is_some() {
                    return Err(EEXIST);
                }
                core.state.user_interrupt = Some(vector);
                Ok(())
            }),
            KVM_NMI => {
                core.state.events.raise_nmi();
                Ok(0)
            }
            KVM_GET_VCPU_EVENTS => {
                core.state.drain_inbox(vm, &self.peer);
                give(at, &core.state.vcpu_events(&vm.enabled))
            }
            KVM_SET_VCPU_EVENTS => with(at, |events: KvmVcpuEvents| core.set_vcpu_events(&vm.enabled, &events)),
            KVM_GET_DEBUGREGS => {
                let mut regs = KvmDebugregs::new_zeroed();
                regs.db = [0, 1, 2, 3].map(|n| core.state.debug_register(&core.fpu, n));
                regs.dr6 = core.state.debug_register(&core.fpu, 6);
                regs.dr7 = core.state.debug_register(&core.fpu, 7);
                give(at, &regs)
            }
            KVM_SET_DEBUGREGS => with(at, |regs: KvmDebugregs| {
                if regs.flags != 0 || (regs.dr6 | regs.dr7) >> 32 != 0 {
                    return Err(EINVAL);
                }
                let [a, b, c, d] = regs.db;
                for (number, value) in [(0, a), (1, b), (2, c), (3, d), (6, regs.dr6), (7, regs.dr7)] {
                    core.state.set_debug_register(&mut core.fpu, number, value);
                }
                Ok(())
            }),
            KVM_SET_GUEST_DEBUG => with(at, |request: KvmGuestDebug| core.set_guest_debug(&request)),
            KVM_HAS_DEVICE_ATTR | KVM_GET_DEVICE_ATTR | KVM_SET_DEVICE_ATTR => {
                with(at, |attr: KvmDeviceAttr| core.state.device_attribute(cmd, &attr, &vm.clock))
            }
            KVM_PRE_FAULT_MEMORY => {
                let mut range: KvmPreFaultMemory = user::read(at)?;
                let done = vm.memory.pre_fault(&mut range);
                // How far it got is told in any case.
                user::write(at, &range)?;
                done.map(|()| 0)
            }
            KVM_GET_STATS_FD => StatsFile::open(vm.peers.clone(), Some(self.peer.clone())),
            KVM_ENABLE_CAP => with(at, |cap: KvmEnableCap| core.enable_cap(&cap)),
            KVM_SET_VAPIC_ADDR => with(at, |KvmVapicAddr { vapic_addr }: KvmVapicAddr| {
                if core.state.lapic.is_none() {
                    return Err(EINVAL);
                }
                let word = (vapic_addr != 0).then_some(Gpa(vapic_addr));
                if let Some(word) = word {
                    vm.memory.view(true).read_u32(word).map_err(|_| EINVAL)?;
                }
                core.state.apic_user.shared_word = word;
                Ok(())
            }),
            KVM_TPR_ACCESS_REPORTING => with(at, |control: KvmTprAccessCtl| {
                if control.flags != 0 {
                    return Err(EINVAL);
                }
                core.state.apic_user.report_task_priority = control.enabled != 0;
                user::write(at, &control)
            }),
            KVM_X86_SETUP_MCE => with(at, |cap: u64| core.state.msrs.setup_mce(cap).map_err(|_| EINVAL)),
            KVM_X86_SET_MCE => with(at, |error: KvmX86Mce| {
                let takes = core.state.hw.cr4() & cr4::MCE != 0;
                match core.state.msrs.report_mce(&error, takes).map_err(|_| EINVAL)? {
                    Reported::Quietly => {}
                    Reported::MachineCheck => core.state.events.raise(Exception::plain(vector::MC)),
                    Reported::Shutdown => core.state.events.triple_fault = true,
                }
                Ok(())
            }),
            KVM_SET_SIGNAL_MASK => {
                core.signal_mask = match arg {
                    0 => None,
                    _ => {
                        let head: KvmSignalMask = user::read(at)?;
                        if head.len != 8 {
                            return Err(EINVAL);
                        }
                        Some(user::read(at.wrapping_add(size_of::<KvmSignalMask>() as u64))?)
                    }
                };
                Ok(0)
            }
            KVM_GET_TSC_KHZ => Ok(core.state.tsc.khz() as isize),
            // KVM takes the lower half, too.
            KVM_SET_TSC_KHZ => {
                core.state.set_tsc_khz(arg as u32, vm.host.owner.hardware().tsc_format())?;
                Ok(0)
            }
            KVM_KVMCLOCK_CTRL => {
                core.state.clock.guest_stopped()?;
                Ok(0)
            }
            _ => Err(ENOTTY),
        }
    }
}

impl<V: Vendor> State<V> {
    /// The attributes of a vCPU: the offset of its TSC. `ENXIO` for others.
    fn device_attribute(&mut self, cmd: u32, attribute: &KvmDeviceAttr, clock: &VmClock) -> Result {
        if (attribute.group, attribute.attr) != (KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET) {
            return Err(ENXIO);
        }
        match cmd {
            KVM_GET_DEVICE_ATTR => user::write(Hva(attribute.addr), &self.tsc_offset()),
            KVM_SET_DEVICE_ATTR => {
                self.write_tsc_offset(user::read(Hva(attribute.addr))?, clock);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn sregs(&self) -> KvmSregs {
        let mut regs = self.hw.system_regs();
        regs.cr8 = self.current_cr8().into();
        let queued = match self.events.unfinished {
            Some(Event::Interrupt(vector)) => Some(vector),
            _ => self.user_interrupt.filter(|_| self.lapic.is_none()),
        };
        KvmSregs::new(&regs, self.apic_base(), queued)
    }

    /// The page-directory-pointer entries of a guest with PAE paging.
    fn pdptrs(&mut self, vm: &Vm<V>) -> Option<[u64; 4]> {
        if !pdpte::in_use(self.hw.cr0(), self.hw.cr4(), self.hw.efer()) {
            return None;
        }
        if self.hw.wants_pdptes() {
            self.load_pdptes(vm);
        }
        Some(self.hw.pdptes().unwrap_or_else(|| self.read_pdptes(vm)))
    }

    pub(crate) fn vcpu_events(&self, enabled: &Enabled) -> KvmVcpuEvents {
        let mut events = KvmVcpuEvents::new_zeroed();
        let unfinished_exception = match self.events.unfinished {
            Some(Event::Exception(exception)) => Some(exception),
            _ => None,
        };
        if let Some(exception) = unfinished_exception.or(self.events.exception) {
            let pending = enabled.exception_payload() && unfinished_exception.is_none();
            events.exception = KvmEventException {
                injected: u8::from(!pending),
                nr: exception.vector,
                has_error_code: u8::from(exception.error_code.is_some()),
                pending: u8::from(pending),
                error_code: exception.error_code.unwrap_or(0),
            };
            if pending {
                events.exception_has_payload = u8::from(exception.payload.is_some());
                events.exception_payload = exception.payload.unwrap_or(0);
            }
        }
        let interrupt = match self.events.unfinished {
            Some(Event::Interrupt(vector)) => Some(vector),
            _ => self.user_interrupt.filter(|_| self.lapic.is_none()),
        };
        events.interrupt = KvmEventInterrupt {
            injected: u8::from(interrupt.is_some()),
            nr: interrupt.unwrap_or(0),
            soft: 0,
            shadow: if self.hw.interrupt_shadow() { KVM_X86_SHADOW_INT_MOV_SS | KVM_X86_SHADOW_INT_STI } else { 0 },
        };
        events.nmi = KvmEventNmi {
            injected: u8::from(self.events.unfinished == Some(Event::Nmi)),
            pending: self.events.nmis,
            masked: u8::from(self.events.nmi_masked),
            pad: 0,
        };
        events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
        if enabled.exception_payload() {
            events.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
        }
        if enabled.triple_fault_event() {
            events.triple_fault_pending = u8::from(self.events.triple_fault);
            events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        }
        events
    }
}

impl<V: Vendor> Core<V> {
    pub(crate) fn set_regs(&mut self, regs: &KvmRegs) {
        let same_place = self.state.regs.rip == regs.rip;
        self.state.regs = Regs::from(regs);
        self.state.events.exception = None;
        // An instruction that waits for userspace goes on with the new registers, unless the guest is somewhere else now.
        if !same_place {
            self.emulator.reset();
        }
    }

    pub(crate) fn set_sregs(&mut self, vcpu: &Vcpu<V>, sregs: &KvmSregs) -> Result {
        self.set_common_sregs(vcpu, sregs)?;
        let mut vectors = sregs.interrupt_bitmap.iter().enumerate().filter(|(_, word)| **word != 0);
        let queued = vectors.next().map(|(n, word)| (n * 64) as u8 + word.trailing_zeros() as u8);
        match (&self.state.lapic, queued) {
            (None, queued) => self.state.user_interrupt = queued,
            (Some(_), Some(vector)) => self.state.events.unfinished = Some(Event::Interrupt(vector)),
            (Some(_), None) => {}
        }
        Ok(())
    }

    /// KVM_SET_SREGS2: no interrupt, but the four entries of PAE paging. Where the CPU has them in no registers it goes by memory.
    fn set_sregs2(&mut self, vcpu: &Vcpu<V>, sregs2: &KvmSregs2) -> Result {
        let (sregs, pdptrs) = sregs2.parts().ok_or(EINVAL)?;
        if pdptrs.is_some() && !pdpte::in_use(sregs.cr0, sregs.cr4, sregs.efer) {
            return Err(EINVAL);
        }
        self.set_common_sregs(vcpu, &sregs)?;
        if let Some(entries) = pdptrs {
            self.state.hw.set_pdptes(entries);
        }
        Ok(())
    }

    fn set_common_sregs(&mut self, vcpu: &Vcpu<V>, sregs: &KvmSregs) -> Result {
        let state = &mut self.state;
        let regs = SystemRegs::from(sregs);
        let allowed = Allowed {
            cr4: state.caps.cr4,
            // What the host lets any guest have: userspace may set EFER before CPUID.
            efer: vcpu.vm.host.caps.efer,
            physical_bits: state.caps.physical_bits.into(),
        };
        if !check::system_regs_valid(&regs, &allowed) {
            return Err(EINVAL);
        }
        match &mut state.lapic {
            Some(lapic) => {
                let bits = state.caps.physical_bits.into();
                let work = lapic.write_base(sregs.apic_base, bits, true).map_err(|_| EINVAL)?;
                lapic.set_cr8(regs.cr8 as u8);
                state.lapic_work(&vcpu.vm, work);
            }
            None => state.set_user_apic_base(sregs.apic_base).map_err(|_| EINVAL)?,
        }
        state.cr8 = regs.cr8 as u8;
        state.hw.set_tpr(state.cr8);
        state.hw.set_system_regs(&regs);
        self.emulator.reset();
        Ok(())
    }

    fn fpu(&self) -> KvmFpu {
        let mut fpu = KvmFpu::new_zeroed();
        let image = self.fpu.image();
        let half = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let word = |at| fpu::word_at(image, at).unwrap_or(0);
        fpu.fcw = half(0);
        fpu.fsw = half(2);
        fpu.ftwx = image[4];
        fpu.last_opcode = half(6);
        fpu.last_ip = word(8);
        fpu.last_dp = word(16);
        fpu.mxcsr = word(24) as u32;
        for (n, register) in fpu.fpr.iter_mut().enumerate() {
            register.copy_from_slice(&image[32 + 16 * n..48 + 16 * n]);
        }
        for (n, register) in fpu.xmm.iter_mut().enumerate() {
            register.copy_from_slice(&self.fpu.vector(n)[..16]);
        }
        fpu
    }

    fn set_fpu(&mut self, fpu: &KvmFpu) -> Result {
        let mut image = KVVec::new();
        image.extend_from_slice(self.fpu.image(), GFP_KERNEL)?;
        image[0..2].copy_from_slice(&fpu.fcw.to_le_bytes());
        image[2..4].copy_from_slice(&fpu.fsw.to_le_bytes());
        image[4] = fpu.ftwx;
        image[5] = 0;
        image[6..8].copy_from_slice(&fpu.last_opcode.to_le_bytes());
        image[8..16].copy_from_slice(&fpu.last_ip.to_le_bytes());
        image[16..24].copy_from_slice(&fpu.last_dp.to_le_bytes());
        image[24..28].copy_from_slice(&fpu.mxcsr.to_le_bytes());
        for (n, register) in fpu.fpr.iter().enumerate() {
            image[32 + 16 * n..48 + 16 * n].copy_from_slice(register);
        }
        for (n, register) in fpu.xmm.iter().enumerate() {
            image[160 + 16 * n..176 + 16 * n].copy_from_slice(register);
        }
        // x87 and SSE are explicit in the image now.
        image[512] |= 3;
        self.fpu.set_image(&image)
    }

    /// KVM_SET_CPUID2. After the first KVM_RUN only the same table is accepted.
    fn set_cpuid(&mut self, vcpu: &Vcpu<V>, at: Hva, head: &KvmCpuid2) -> Result {
        let at = at.wrapping_add(size_of::<KvmCpuid2>() as u64);
        let mut entries: KVVec<KvmCpuidEntry2> =
            user::read_vec(at, head.nent as usize, KVM_MAX_CPUID_ENTRIES as usize)?;
        if vcpu.vm.enabled.unintercepted().hlt {
            withhold_unhalt(&mut entries);
        }
        if self.ran {
            let dynamic = self.state.cpuid_dynamic(&vcpu.vm, self.fpu.xcr0());
            return self.state.cpuid.same_as(&entries, &dynamic).then_some(()).ok_or(EINVAL);
        }
        let table = CpuidTable::new(entries).map_err(|_| EINVAL)?;
        let caps = GuestCaps::derive(|function, index| table.leaf(function, index)).within(&vcpu.vm.host.caps);
        self.fpu.tsc_aux = caps.tsc_aux.then(|| self.fpu.tsc_aux.unwrap_or(0));
        if let Some(lapic) = &mut self.state.lapic {
            lapic.set_features(crate::irqchip::lapic::LapicFeatures {
                x2apic: caps.x2apic,
                tsc_deadline: caps.tsc_deadline,
                ..Default::default()
            });
        }
        self.state.cpuid = KBox::new(table, GFP_KERNEL_ACCOUNT)?;
        self.state.caps = caps;
        self.state.hw.set_cr4_allowed(caps.cr4);
        self.state.update_pv_features();
        self.state.reset_pmu(&vcpu.vm)?;
        Ok(())
    }

    pub(crate) fn set_vcpu_events(&mut self, enabled: &Enabled, events: &KvmVcpuEvents) -> Result {
        const KNOWN: u32 = KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SIPI_VECTOR
            | KVM_VCPUEVENT_VALID_SHADOW
            | KVM_VCPUEVENT_VALID_SMM
            | KVM_VCPUEVENT_VALID_PAYLOAD
            | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        let has = |flag| events.flags & flag != 0;
        let exception = &events.exception;
        let pending = has(KVM_VCPUEVENT_VALID_PAYLOAD) && exception.pending != 0;
        let injected = exception.injected != 0 && !pending;
        let smi = &events.smi;
        let bad = events.flags & !KNOWN != 0
            || has(KVM_VCPUEVENT_VALID_PAYLOAD) && !enabled.exception_payload()
            || has(KVM_VCPUEVENT_VALID_TRIPLE_FAULT) && !enabled.triple_fault_event()
            || (injected || pending) && (exception.nr > 31 || exception.nr == vector::NMI)
            // There is no system management mode to be in.
            || has(KVM_VCPUEVENT_VALID_SMM) && (smi.smm | smi.pending | smi.smm_inside_nmi) != 0;
        if bad {
            return Err(EINVAL);
        }
        let state = &mut self.state;
        state.events.exception = pending.then(|| Exception {
            vector: exception.nr,
            error_code: (exception.has_error_code != 0).then_some(exception.error_code),
            payload: (events.exception_has_payload != 0).then_some(events.exception_payload),
        });
        if has(KVM_VCPUEVENT_VALID_TRIPLE_FAULT) {
            state.events.triple_fault = events.triple_fault_pending != 0;
        }
        state.events.unfinished = if injected {
            Some(Event::Exception(Exception {
                vector: exception.nr,
                error_code: (exception.has_error_code != 0).then_some(exception.error_code),
                payload: None,
            }))
        } else if events.interrupt.injected != 0 {
            Some(Event::Interrupt(events.interrupt.nr))
        } else if events.nmi.injected != 0 {
            Some(Event::Nmi)
        } else {
            None
        };
        if state.lapic.is_none() {
            // The same interrupt is in KVM_SET_SREGS: it must not come twice.
            state.user_interrupt = None;
        }
        if events.flags & KVM_VCPUEVENT_VALID_NMI_PENDING != 0 {
            state.events.nmis = events.nmi.pending.min(2);
        }
        state.events.nmi_masked = events.nmi.masked != 0;
        state.hw.set_nmi_masked(state.events.nmi_masked);
        if events.flags & KVM_VCPUEVENT_VALID_SHADOW != 0 {
            state.hw.set_interrupt_shadow(events.interrupt.shadow != 0);
        }
        if events.flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR != 0 {
            self.sipi_vector = events.sipi_vector as u8;
        }
        Ok(())
    }
}
