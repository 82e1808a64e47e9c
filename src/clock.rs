// SPDX-License-Identifier: GPL-2.0
//! Paravirtual time of a guest: kvmclock, wall clock, steal time, and the VM's clock behind them.
#![forbid(unsafe_code)]

use core::ops::DerefMut;

use kernel::{prelude::*, sync::Arc};

use crate::{
    abi::{
        pvclock::{
            KvmStealTime, PvclockVcpuTimeInfo, PvclockWallClock, TscScale, PVCLOCK_GUEST_STOPPED,
            PVCLOCK_TSC_STABLE_BIT,
        },
        FromZeros,
    },
    arch::Gpa,
    glue::{
        lock::IrqSpinLock,
        power::{self, Slept},
        task, timer,
    },
    guest_tsc::VcpuTsc,
    mmu::guest_mem::GuestMem,
    new_irq_spinlock,
    policy::tsc::{GuestTsc, Ratio},
    vcpu::{request, Peer, State},
    vendor::Vendor,
    vm::Vm,
};

/// The clock of a VM: nanoseconds since it was made, or since what KVM_SET_CLOCK said. It runs with the host's TSC, so that what the
/// guest's CPUs compute from their TSCs is the same everywhere and at all times.
#[pin_data]
pub(crate) struct VmClock {
    #[pin]
    state: IrqSpinLock<Clock>,
}

/// Where the flags are in `struct pvclock_vcpu_time_info`.
const FLAGS: u64 = core::mem::offset_of!(PvclockVcpuTimeInfo, flags) as u64;
/// Where the version is in `struct kvm_steal_time`.
const VERSION_OF_STEAL_TIME: u64 = core::mem::offset_of!(KvmStealTime, version) as u64;

#[derive(Clone, Copy)]
struct Clock {
    /// Host TSC at which the clock showed `base_ns`.
    base_tsc: u64,
    base_ns: u64,
    /// The last TSC that userspace gave a vCPU, when (in host TSC), the offset that came of it, and how that TSC runs.
    written: u64,
    written_at: u64,
    offset: u64,
    ratio: Ratio,
    khz: u32,
    /// Userspace has given some vCPU a TSC.
    set_by_user: bool,
    /// The TSC from which the others go on, and when (in host TSC).
    began: u64,
    began_at: u64,
    /// Sleep of the host that all of this takes account of.
    slept: Slept,
}

impl Clock {
    fn at(&self, tsc: u64) -> u64 {
        // The clock may have been set after `tsc` was read.
        let ticks = tsc.wrapping_sub(self.base_tsc) as i64;
        let ns = scale().map_or(0, |scale| scale.nanoseconds(ticks.unsigned_abs()));
        if ticks < 0 {
            self.base_ns.wrapping_sub(ns)
        } else {
            self.base_ns.wrapping_add(ns)
        }
    }

    /// The TSC offset for a vCPU whose TSC is to show `value`. As in KVM, 0 means "the same as the others", and so do values less than a
    /// second from where the last one that userspace wrote is by now: it writes them one after another.
    /// "The others" have the same frequency.
    fn synchronize(&mut self, value: u64, tsc: &VcpuTsc) -> u64 {
        let now = timer::tsc();
        let ratio = tsc.relation().ratio;
        let expected = self.written.wrapping_add(ratio.guest_ticks(now.wrapping_sub(self.written_at)));
        let second = u64::from(tsc.khz()) * 1000;
        let close = self.set_by_user && expected.abs_diff(value) < second;
        if self.khz != tsc.khz() || value != 0 && !close {
            self.offset = GuestTsc::showing(value, now, ratio).offset;
            (self.began, self.began_at) = (value, now);
        }
        (self.written, self.written_at, self.khz, self.ratio) = (value, now, tsc.khz(), ratio);
        self.offset
    }

    /// The host's TSC may have gone back. Guests' TSCs stand still in a sleep that does that, as on KVM, and the clock does not.
    fn look_for_sleep(&mut self) {
        if power::sleeps() == self.slept.times {
            return;
        }
        let slept = power::slept();
        let ticks = slept.ticks.wrapping_sub(self.slept.ticks);
        let others = GuestTsc { ratio: self.ratio, offset: self.offset }.after_setback(ticks);
        self.offset = others.offset;
        for at in [&mut self.base_tsc, &mut self.written_at, &mut self.began_at] {
            *at = at.wrapping_sub(ticks);
        }
        self.base_ns = self.base_ns.wrapping_add(slept.ns.wrapping_sub(self.slept.ns));
        self.slept = slept;
    }
}

fn scale() -> Option<TscScale> {
    TscScale::from_khz(timer::tsc_khz())
}

impl VmClock {
    /// Shows 0 now. The guest's TSC is 0 now, too.
    pub(crate) fn new() -> impl PinInit<Self> {
        let tsc = timer::tsc();
        let clock = Clock {
            base_tsc: tsc,
            base_ns: 0,
            written: 0,
            written_at: tsc,
            offset: tsc.wrapping_neg(),
            ratio: Ratio::ONE,
            khz: timer::tsc_khz(),
            set_by_user: false,
            began: 0,
            began_at: tsc,
            slept: power::slept(),
        };
        pin_init!(Self { state <- new_irq_spinlock!(clock, "krab::clock") })
    }

    fn now(&self) -> impl DerefMut<Target = Clock> + '_ {
        let mut state = self.state.lock();
        state.look_for_sleep();
        state
    }

    /// What the clock shows when the host's TSC is `tsc`.
    pub(crate) fn at(&self, tsc: u64) -> u64 {
        self.now().at(tsc)
    }

    /// Makes the clock show `clock_ns` now.
    pub(crate) fn set(&self, clock_ns: u64) {
        let mut state = self.now();
        (state.base_tsc, state.base_ns) = (timer::tsc(), clock_ns);
    }

    /// The TSC offset of a new vCPU: that of the others, or the one with which a TSC of another frequency begins at 0.
    pub(crate) fn tsc_offset(&self, tsc: &VcpuTsc) -> u64 {
        let mut others = self.now();
        if others.khz == tsc.khz() {
            others.offset
        } else {
            others.synchronize(0, tsc)
        }
    }

    /// What a TSC shows that has run from the beginning with `ratio`, as a new vCPU's and one that userspace has just set should.
    pub(crate) fn exact_tsc(&self, ratio: Ratio) -> GuestTsc {
        let state = *self.now();
        GuestTsc::showing(state.began, state.began_at, ratio)
    }

    /// The TSC offset for a vCPU whose TSC userspace sets to `value`.
    pub(crate) fn write_tsc(&self, value: u64, tsc: &VcpuTsc) -> u64 {
        let mut state = self.now();
        let offset = state.synchronize(value, tsc);
        state.set_by_user = true;
        offset
    }

    /// Userspace gives a vCPU's TSC this offset. Those that come later, or are set close to it, get the same.
    pub(crate) fn write_tsc_offset(&self, offset: u64, tsc: &VcpuTsc) {
        let mut state = self.now();
        let now = timer::tsc();
        let ratio = tsc.relation().ratio;
        let value = GuestTsc { ratio, offset }.at(now);
        if state.khz != tsc.khz() || state.offset != offset {
            state.offset = offset;
            (state.began, state.began_at) = (value, now);
        }
        (state.written, state.written_at, state.khz, state.ratio) = (value, now, tsc.khz(), ratio);
        state.set_by_user = true;
    }
}

/// Where a vCPU's guest wants its time.
pub(crate) struct VcpuClock {
    /// The vCPU: asked to write the clocks when something about them changed.
    peer: Arc<Peer>,
    system_time: Option<Gpa>,
    system_time_version: u32,
    wall_clock: Option<Gpa>,
    steal_time: Option<Gpa>,
    /// Run-queue wait of the vCPU's thread that the guest has been told of.
    stolen_ns: u64,
    /// The guest is to be told that it was stopped.
    stopped: bool,
}

impl VcpuClock {
    /// The guest has not asked for any.
    pub(crate) fn new(peer: Arc<Peer>) -> Self {
        Self {
            peer,
            system_time: None,
            system_time_version: 0,
            wall_clock: None,
            steal_time: None,
            stolen_ns: 0,
            stopped: false,
        }
    }

    /// Forgets what the guest asked for.
    pub(crate) fn reset(&mut self) {
        *self = Self::new(self.peer.clone());
    }

    /// KVM_KVMCLOCK_CTRL: the guest's watchdogs are to forgive the time since it last ran. `EINVAL` if it has no clock.
    pub(crate) fn guest_stopped(&mut self) -> Result {
        self.system_time.ok_or(EINVAL)?;
        self.stopped = true;
        self.post();
        Ok(())
    }

    pub(crate) fn set_system_time(&mut self, at: Option<Gpa>) {
        self.system_time = at;
        self.post();
    }

    pub(crate) fn request_wall_clock(&mut self, at: Gpa) {
        self.wall_clock = Some(at);
        self.post();
    }

    pub(crate) fn set_steal_time(&mut self, at: Option<Gpa>) {
        self.steal_time = at;
        self.stolen_ns = task::run_delay_ns();
        self.post();
    }

    /// The relation between the TSC and the clock changed.
    pub(crate) fn request_update(&self) {
        if self.system_time.is_some() {
            self.post();
        }
    }

    fn post(&self) {
        self.peer.kick.post_quietly(request::CLOCK);
    }
}

impl<V: Vendor> State<V> {
    /// Writes the guest's clocks. In process context.
    pub(crate) fn update_clock(&mut self, vm: &Vm<V>) {
        let tsc = timer::tsc();
        let clock_ns = vm.clock.at(tsc);
        let view = vm.memory.view(true);
        let scale = TscScale::from_khz(self.tsc.running_khz());
        if let (Some(at), Some(scale)) = (self.clock.system_time, scale) {
            // A reader must see an odd version while the rest changes.
            let version = self.clock.system_time_version.wrapping_add(2);
            self.clock.system_time_version = version;
            // The guest takes it away when it has seen it.
            let mut old = [0];
            let _ = view.read(at.wrapping_add(FLAGS), &mut old);
            let mut flags = old[0] & PVCLOCK_GUEST_STOPPED;
            if core::mem::take(&mut self.clock.stopped) {
                flags |= PVCLOCK_GUEST_STOPPED;
            }
            if timer::tsc_is_stable() && self.tsc.is_even() {
                flags |= PVCLOCK_TSC_STABLE_BIT;
            }
            let mut info = PvclockVcpuTimeInfo {
                version: version.wrapping_sub(1) | 1,
                pad0: 0,
                tsc_timestamp: self.tsc.relation().at(tsc),
                system_time: clock_ns,
                tsc_to_system_mul: scale.mul,
                tsc_shift: scale.shift,
                flags,
                pad: [0; 2],
            };
            // By itself first: the bytes of one copy come in no order.
            let _ = view.write(at, info.version.as_bytes());
            let _ = view.write(at, info.as_bytes());
            info.version = version & !1;
            let _ = view.write(at, info.version.as_bytes());
        }
        if let Some(at) = self.clock.wall_clock.take() {
            let start_ns = timer::real_ns().wrapping_sub(clock_ns);
            let mut version = 0u32;
            let _ = view.read(at, version.as_mut_bytes());
            let wall = PvclockWallClock {
                version: version.wrapping_add(1) | 1,
                sec: (start_ns / 1_000_000_000) as u32,
                nsec: (start_ns % 1_000_000_000) as u32,
            };
            let _ = view.write(at, wall.version.as_bytes());
            let _ = view.write(at, wall.as_bytes());
            let _ = view.write(at, wall.version.wrapping_add(1).as_bytes());
        }
        self.update_steal_time(vm);
    }

    /// Tells the guest how long its CPU was ready to run and did not. In process context.
    pub(crate) fn update_steal_time(&mut self, vm: &Vm<V>) {
        let Some(at) = self.clock.steal_time else { return };
        let waited = task::run_delay_ns();
        let more = waited.wrapping_sub(self.clock.stolen_ns);
        let view = vm.memory.view(true);
        let mut record = KvmStealTime::new_zeroed();
        if view.read(at, record.as_mut_bytes()).is_err() {
            return;
        }
        self.clock.stolen_ns = waited;
        record.steal = record.steal.wrapping_add(more);
        record.preempted = 0;
        // A reader must see an odd version while the rest changes.
        record.version |= 1;
        let version_at = at.wrapping_add(VERSION_OF_STEAL_TIME);
        let _ = view.write(version_at, record.version.as_bytes());
        let _ = view.write(at, record.as_bytes());
        let _ = view.write(version_at, record.version.wrapping_add(1).as_bytes());
    }
}
