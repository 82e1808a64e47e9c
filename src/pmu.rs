// SPDX-License-Identifier: GPL-2.0
//! A vCPU's performance counters: the model of [`policy::pmu`](crate::policy::pmu), and the host's counters that count for it.
//!
//! The guest's registers are changed in process context. Counters that have another program then, or have overflowed, are looked after
//! before the next entry.
#![forbid(unsafe_code)]

use kernel::{prelude::*, sync::Arc};

use crate::{
    abi::vm::KvmPmuEventFilter,
    arch::{
        cr::{cr0, cr4},
        Hva,
    },
    emul::Intercepted,
    exits::NotNow,
    glue::{cpu::IrqsOff, kick::KickPoint, pmu::Counters, user},
    guest::{Exception, Gpr},
    irqchip::lapic::LocalSignal,
    msrs::Refused,
    policy::{
        msr::By,
        pmu::{
            counters,
            filter::{self, BadFilter, Filter},
            index_list, Pmu, PmuCaps, Program, Set, COUNTERS,
        },
    },
    vcpu::{request, State},
    vendor::{Vendor, VendorVcpu},
    vm::Vm,
};

/// KVM_SET_PMU_EVENT_FILTER's argument.
pub(crate) type EventFilter = Filter<KVVec<u64>>;

/// The counters of a vCPU that has any.
pub(crate) struct VcpuPmu {
    model: Pmu,
    /// Of the host.
    counters: Counters,
    /// What those that exist count when they are not paused.
    programs: [Option<Program>; COUNTERS],
    /// Those that count now.
    running: Set,
    /// Those that are to be looked after before the next entry.
    pending: Set,
    /// Those that count instructions which software carries out.
    by_software: Set,
    filter: Option<Arc<EventFilter>>,
}

impl VcpuPmu {
    /// Counters as after reset; `None` if the guest has none.
    pub(crate) fn new(caps: PmuCaps, filter: Option<Arc<EventFilter>>) -> Result<Option<KBox<Self>>> {
        if caps == PmuCaps::NONE {
            return Ok(None);
        }
        let pmu = Self {
            model: Pmu::new(caps),
            counters: Counters::new(COUNTERS)?,
            programs: [None; COUNTERS],
            running: 0,
            pending: 0,
            by_software: 0,
            filter,
        };
        Ok(Some(KBox::new(pmu, GFP_KERNEL_ACCOUNT)?))
    }

    fn allows(&self, n: usize) -> bool {
        self.filter.as_ref().is_none_or(|filter| filter.allows(n, self.model.select(n)))
    }

    /// These counters may have another program.
    fn changed(&mut self, set: Set) {
        self.pending |= set;
        for n in counters(set) {
            let counts = self.model.counts_instructions(n) && self.allows(n);
            self.by_software = self.by_software & !(1 << n) | Set::from(counts) << n;
        }
    }

    fn counted(&self, n: usize) -> u64 {
        if self.running >> n & 1 != 0 {
            self.counters.read(n)
        } else {
            0
        }
    }

    fn pause(&mut self, n: usize) -> u64 {
        if self.running >> n & 1 != 0 {
            self.running &= !(1 << n);
            self.counters.pause(n)
        } else {
            0
        }
    }

    fn value(&self, n: usize) -> u64 {
        self.model.value(n, self.counted(n))
    }

    /// Whether something is to be done before the guest runs.
    #[inline]
    pub(crate) fn has_work(&self) -> bool {
        self.pending != 0 || self.counters.has_overflowed()
    }

    /// Does it. Whether the guest gets an interrupt for it. In process context, on the vCPU's thread.
    fn work(&mut self) -> bool {
        let mut interrupt = false;
        let overflowed = self.counters.take_overflowed() as Set;
        for n in counters(overflowed) {
            // One that was written or turned off since does not overflow.
            if self.pending >> n & 1 == 0 {
                interrupt |= self.model.overflowed(n);
            }
        }
        for n in counters(core::mem::take(&mut self.pending) | overflowed) {
            let counted = self.pause(n);
            let overflows = self.model.settle(n, counted);
            let Some(program) = self.model.program(n).filter(|_| self.allows(n)) else { continue };
            if overflows {
                interrupt |= self.model.overflowed(n);
            }
            let period = self.model.until_overflow(n);
            let same = self.programs.get(n).is_some_and(|old| *old == Some(program));
            if !(same && self.counters.resume(n, period)) {
                let Program { event, user, kernel } = program;
                // The host's counters may all be taken: then it stands still until it gets another program.
                let started = self.counters.start(n, event, user, kernel, period);
                if let Some(place) = self.programs.get_mut(n) {
                    *place = started.then_some(program);
                }
                if !started {
                    continue;
                }
            }
            self.running |= 1 << n;
        }
        interrupt
    }

    /// Software carried out an instruction for the guest.
    #[cold]
    fn retired(&mut self, cpl: u8) {
        self.pending |= self.model.retired(self.by_software, cpl);
    }
}

impl Drop for VcpuPmu {
    fn drop(&mut self) {
        for n in 0..COUNTERS {
            self.counters.stop(n);
        }
    }
}

impl<V: Vendor> State<V> {
    /// The MSR `index` if it is one of the guest's counters' registers. `None`: it is not.
    pub(crate) fn read_pmu_msr(&self, index: u32, may_sleep: bool) -> Option<Result<u64, Refused>> {
        let pmu = self.pmu.as_ref().filter(|pmu| pmu.model.owns(index))?;
        Some(match pmu.model.counter_of(index) {
            Some(_) if !may_sleep => Err(Refused::Busy),
            Some(n) => Ok(pmu.value(n)),
            None => pmu.model.read(index).map_err(|_| Refused::Gp),
        })
    }

    /// The same for a write.
    pub(crate) fn write_pmu_msr(
        &mut self,
        index: u32,
        value: u64,
        by: By,
        may_sleep: bool,
    ) -> Option<Result<(), Refused>> {
        let pmu = self.pmu.as_mut().filter(|pmu| pmu.model.owns(index))?;
        if !may_sleep {
            return Some(Err(Refused::Busy));
        }
        Some(match pmu.model.write(index, value, by == By::Host) {
            Ok(set) => {
                if let Some(n) = pmu.model.counter_of(index) {
                    pmu.pause(n);
                }
                pmu.changed(set);
                Ok(())
            }
            Err(_) => Err(Refused::Gp),
        })
    }

    /// Whether an MSR is a register of the guest's counters.
    pub(crate) fn has_pmu_msr(&self, index: u32) -> bool {
        self.pmu.as_ref().is_some_and(|pmu| pmu.model.owns(index))
    }

    /// Whether KVM_GET_MSR_INDEX_LIST lists an MSR that this guest does not have: userspace may read and write 0 there.
    pub(crate) fn is_listed_pmu_msr(vm: &Vm<V>, index: u32) -> bool {
        index_list(&vm.host.msr_config.pmu).any(|listed| listed == index)
    }

    /// RDPMC in process context.
    pub(crate) fn handle_rdpmc(&mut self, vm: &Vm<V>) -> Result<(), NotNow> {
        let allowed = self.hw.cpl() == 0 || self.hw.cr4_bits(cr4::PCE) != 0 || self.hw.cr0_bits(cr0::PE) == 0;
        let ecx = self.gpr(Gpr::Rcx) as u32;
        let value = self.pmu.as_ref().and_then(|pmu| Some(pmu.value(pmu.model.rdpmc(ecx).ok()?)));
        match value.filter(|_| allowed) {
            Some(value) => {
                self.skip(vm, Intercepted::Rdpmc, true)?;
                self.set_msr_result(value);
            }
            None => self.events.raise(Exception::GP0),
        }
        Ok(())
    }

    /// Before the guest runs, in process context.
    pub(crate) fn serve_pmu(&mut self) {
        let interrupt = match &mut self.pmu {
            Some(pmu) if pmu.has_work() => pmu.work(),
            _ => return,
        };
        if !interrupt {
            return;
        }
        if let Some(lapic) = &mut self.lapic {
            if lapic.deliver_performance() == Some(LocalSignal::Nmi) {
                self.events.raise_nmi();
            }
        }
    }

    /// Turns on the host's counters that count for the guest. In each stretch of interrupts off, after `load`.
    #[inline]
    pub(crate) fn load_counters(&mut self, irqs: &IrqsOff) {
        if let Some(pmu) = &self.pmu {
            let enabled = if pmu.running != 0 { pmu.counters.enabled(irqs) } else { 0 };
            self.hw.enable_counters(enabled, irqs);
        }
    }

    /// Software carried out an instruction for the guest, which counts like any.
    #[inline]
    pub(crate) fn instruction_retired(&mut self) {
        if let Some(pmu) = &mut self.pmu {
            if pmu.by_software != 0 {
                pmu.retired(self.hw.cpl());
            }
        }
    }

    /// Takes the VM's event filter.
    pub(crate) fn update_event_filter(&mut self, vm: &Vm<V>) {
        if let Some(pmu) = &mut self.pmu {
            pmu.filter = vm.event_filter.lock().clone();
            pmu.changed((1 << COUNTERS) - 1);
        }
    }

    /// The counters that a guest with this CPUID has, as after reset.
    pub(crate) fn reset_pmu(&mut self, vm: &Vm<V>) -> Result {
        let caps =
            if vm.enabled.pmu() { vm.host.msr_config.pmu.within(self.cpuid.leaf(0xA, 0)) } else { PmuCaps::NONE };
        self.pmu = VcpuPmu::new(caps, vm.event_filter.lock().clone())?;
        Ok(())
    }
}

impl<V: Vendor> Vm<V> {
    /// KVM_SET_PMU_EVENT_FILTER. `EINVAL` for an action, a flag or an entry that does not exist, `E2BIG` for too many entries.
    pub(crate) fn set_event_filter(&self, at: Hva) -> Result {
        let to_error = |bad| match bad {
            BadFilter::Invalid => EINVAL,
            BadFilter::TooMany => E2BIG,
        };
        let head: KvmPmuEventFilter = user::read(at)?;
        filter::check(&head).map_err(to_error)?;
        let at = at.wrapping_add(size_of::<KvmPmuEventFilter>() as u64);
        let events = user::read_vec(at, head.nevents as usize, filter::MAX_EVENTS as usize)?;
        let filter = Arc::new(Filter::new(&head, events).map_err(to_error)?, GFP_KERNEL_ACCOUNT)?;
        // A vCPU that is being made either has this filter or is among the peers.
        let _setup = self.setup.lock();
        *self.event_filter.lock() = Some(filter);
        KickPoint::post_and_wait(self.peers.iter().map(|peer| &peer.kick), request::EVENT_FILTER);
        Ok(())
    }
}
