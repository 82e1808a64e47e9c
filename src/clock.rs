// SPDX-License-Identifier: GPL-2.0
//! Paravirtual time of a guest: kvmclock, wall clock, steal time, and the VM's clock behind them.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

use crate::{
    abi::{
        pvclock::{KvmStealTime, PvclockVcpuTimeInfo, PvclockWallClock, TscScale, PVCLOCK_TSC_STABLE_BIT},
        FromZeros, IntoBytes,
    },
    arch::Gpa,
    glue::timer,
    mmu::guest_mem::GuestMem,
    vcpu::State,
    vendor::{Vendor, VendorVcpu},
    vm::Vm,
};

/// The clock of a VM: nanoseconds since it was made, or what KVM_SET_CLOCK says.
pub(crate) struct VmClock {
    /// Host boot-time nanoseconds at which the VM's clock was 0, wrapping.
    start_ns: AtomicU64,
}

impl VmClock {
    pub(crate) fn new() -> Self {
        Self { start_ns: AtomicU64::new(timer::boot_ns()) }
    }

    /// The VM's clock at host boot time `boot_ns`.
    pub(crate) fn at(&self, boot_ns: u64) -> u64 {
        boot_ns.wrapping_sub(self.start_ns.load(Ordering::Relaxed))
    }

    pub(crate) fn set(&self, clock_ns: u64) {
        self.start_ns.store(timer::boot_ns().wrapping_sub(clock_ns), Ordering::Relaxed);
    }
}

/// Where a vCPU's guest wants its time.
#[derive(Default)]
pub(crate) struct VcpuClock {
    system_time: Option<Gpa>,
    system_time_version: u32,
    wall_clock: Option<Gpa>,
    steal_time: Option<Gpa>,
    /// Run-queue wait of the vCPU's thread that the guest has been told of.
    stolen_ns: u64,
    wants_update: bool,
}

impl VcpuClock {
    pub(crate) fn set_system_time(&mut self, at: Option<Gpa>) {
        self.system_time = at;
        self.wants_update = true;
    }

    pub(crate) fn request_wall_clock(&mut self, at: Gpa) {
        self.wall_clock = Some(at);
        self.wants_update = true;
    }

    pub(crate) fn set_steal_time(&mut self, at: Option<Gpa>) {
        self.steal_time = at;
        self.wants_update = true;
    }

    /// The relation between the TSC and the clock changed.
    pub(crate) fn request_update(&mut self) {
        self.wants_update = self.system_time.is_some();
    }

    pub(crate) fn wants_update(&self) -> bool {
        self.wants_update
    }
}

impl<V: Vendor> State<V> {
    /// Writes the guest's clocks. In process context.
    pub(crate) fn update_clock(&mut self, vm: &Vm<V>) {
        self.clock.wants_update = false;
        let now = timer::instant();
        let view = vm.memory.view(true);
        if let (Some(at), Some(scale), Some(tsc)) =
            (self.clock.system_time, TscScale::from_khz(timer::tsc_khz()), now.tsc)
        {
            // A reader must see an odd version while the rest changes.
            let version = self.clock.system_time_version.wrapping_add(2);
            self.clock.system_time_version = version;
            let mut info = PvclockVcpuTimeInfo {
                version: version.wrapping_sub(1) | 1,
                pad0: 0,
                tsc_timestamp: tsc.wrapping_add(self.hw.tsc_offset()),
                system_time: vm.clock.at(now.boot_ns),
                tsc_to_system_mul: scale.mul,
                tsc_shift: scale.shift,
                flags: PVCLOCK_TSC_STABLE_BIT,
                pad: [0; 2],
            };
            let _ = view.write(at, info.as_bytes());
            info.version = version & !1;
            let _ = view.write(at, info.version.as_bytes());
        }
        if let Some(at) = self.clock.wall_clock.take() {
            let start_ns = now.real_ns.wrapping_sub(vm.clock.at(now.boot_ns));
            let mut version = 0u32;
            let _ = view.read(at, version.as_mut_bytes());
            let wall = PvclockWallClock {
                version: version.wrapping_add(1) | 1,
                sec: (start_ns / 1_000_000_000) as u32,
                nsec: (start_ns % 1_000_000_000) as u32,
            };
            let _ = view.write(at, wall.as_bytes());
            let _ = view.write(at, wall.version.wrapping_add(1).as_bytes());
        }
        if let Some(at) = self.clock.steal_time {
            let mut record = KvmStealTime::new_zeroed();
            if view.read(at, record.as_mut_bytes()).is_ok() {
                let waited = crate::glue::task::run_delay_ns();
                let version = record.version & !1;
                record.steal = record.steal.wrapping_add(waited.wrapping_sub(self.clock.stolen_ns));
                record.preempted = 0;
                self.clock.stolen_ns = waited;
                record.version = version.wrapping_add(1);
                let _ = view.write(at, record.as_bytes());
                record.version = version.wrapping_add(2);
                let _ = view.write(at, record.as_bytes());
            }
        }
    }
}
