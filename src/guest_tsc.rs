// SPDX-License-Identifier: GPL-2.0
//! A vCPU's TSC: how it follows the host's, and what userspace and the guest may set of it. KVM API "KVM_SET_TSC_KHZ".
//!
//! A frequency that the CPU cannot give is refused, but for one above the host's: then the TSC is too slow and is set forward now and then,
//! as in KVM.
#![forbid(unsafe_code)]

use kernel::prelude::*;

use crate::{
    clock::VmClock,
    glue::{
        power::{self, Slept},
        timer,
    },
    policy::tsc::{rate_for, Format, GuestTsc, Rate, Ratio},
    vcpu::State,
    vendor::{Vendor, VendorVcpu},
};

/// How one vCPU's TSC runs.
#[derive(Clone, Copy)]
pub(crate) struct VcpuTsc {
    now: GuestTsc,
    /// What userspace asked for.
    khz: u32,
    /// What it should be, where the CPU cannot make it run so fast.
    wanted: Option<GuestTsc>,
    /// Sleep of the host that it takes account of.
    slept: Slept,
}

impl VcpuTsc {
    /// With a frequency that was asked for a whole VM (0: the host's), and that may be one that cannot be: then it is the host's after all.
    pub(crate) fn new(khz: u32, format: Option<Format>) -> Self {
        let mut tsc =
            Self { now: GuestTsc { ratio: Ratio::ONE, offset: 0 }, khz: 0, wanted: None, slept: power::slept() };
        if tsc.set_khz(khz, format).is_err() {
            tsc.khz = khz;
        }
        tsc
    }

    /// Shows what the VM's other vCPUs do.
    pub(crate) fn start(&mut self, clock: &VmClock) {
        self.now.offset = clock.tsc_offset(self);
        self.follow(clock);
    }

    /// What it should show is what the VM's other vCPUs should.
    fn follow(&mut self, clock: &VmClock) {
        if let Some(wanted) = &mut self.wanted {
            *wanted = clock.exact_tsc(wanted.ratio);
        }
    }

    /// The frequency that userspace asked for.
    pub(crate) fn khz(&self) -> u32 {
        self.khz
    }

    pub(crate) fn relation(&self) -> GuestTsc {
        self.now
    }

    /// The frequency at which it runs while nobody sets it forward.
    pub(crate) fn running_khz(&self) -> u32 {
        u32::try_from(self.now.ratio.guest_ticks(timer::tsc_khz().into())).unwrap_or(u32::MAX)
    }

    /// Whether guests may rely on it from one moment to the next.
    pub(crate) fn is_even(&self) -> bool {
        self.wanted.is_none()
    }

    fn set_khz(&mut self, khz: u32, format: Option<Format>) -> Result {
        let host_khz = timer::tsc_khz();
        let khz = if khz == 0 { host_khz } else { khz };
        let rate = rate_for(khz, host_khz, format).ok_or(EINVAL)?;
        self.khz = khz;
        self.now.ratio = match rate {
            Rate::Host | Rate::CatchUp(_) => Ratio::ONE,
            Rate::Scaled(ratio) => ratio,
        };
        self.wanted = match rate {
            Rate::CatchUp(ratio) => {
                let now = timer::tsc();
                Some(GuestTsc::showing(self.now.at(now), now, ratio))
            }
            _ => None,
        };
        Ok(())
    }

    /// Ticks that are missing.
    fn behind(&self) -> u64 {
        let Some(wanted) = self.wanted else { return 0 };
        let now = timer::tsc();
        let behind = wanted.at(now).wrapping_sub(self.now.at(now));
        if (behind as i64) < 0 {
            0
        } else {
            behind
        }
    }

    /// Goes on from where it was when the host's went back.
    fn catch_up_with(&mut self, slept: Slept) {
        let ticks = slept.ticks.wrapping_sub(self.slept.ticks);
        self.now = self.now.after_setback(ticks);
        self.wanted = self.wanted.map(|wanted| wanted.after_setback(ticks));
        self.slept = slept;
    }

    /// For this TSC alone.
    fn set_offset(&mut self, offset: u64) {
        self.now.offset = offset;
        if let Some(wanted) = &mut self.wanted {
            let now = timer::tsc();
            *wanted = GuestTsc::showing(self.now.at(now), now, wanted.ratio);
        }
    }
}

impl<V: Vendor> State<V> {
    /// The guest's TSC now.
    #[inline]
    pub(crate) fn guest_tsc(&self) -> u64 {
        self.tsc.now.at(timer::tsc())
    }

    /// What is added to the host's TSC, after scaling.
    pub(crate) fn tsc_offset(&self) -> u64 {
        self.tsc.now.offset
    }

    /// The guest, or userspace for it, moves this TSC against the others.
    pub(crate) fn set_tsc_offset(&mut self, offset: u64) {
        self.tsc.set_offset(offset);
        self.tsc_changed();
    }

    /// Userspace sets the offset.
    pub(crate) fn write_tsc_offset(&mut self, offset: u64, clock: &VmClock) {
        clock.write_tsc_offset(offset, &self.tsc);
        self.tsc.now.offset = offset;
        self.tsc.follow(clock);
        self.tsc_changed();
    }

    /// Userspace sets the TSC.
    pub(crate) fn write_tsc(&mut self, value: u64, clock: &VmClock) {
        self.tsc.now.offset = clock.write_tsc(value, &self.tsc);
        self.tsc.follow(clock);
        self.tsc_changed();
    }

    /// KVM_SET_TSC_KHZ; 0 is the host's. `EINVAL` for what cannot be. What the TSC shows jumps: userspace sets it next.
    pub(crate) fn set_tsc_khz(&mut self, khz: u32, format: Option<Format>) -> Result {
        self.tsc.set_khz(khz, format)?;
        self.tsc_changed();
        Ok(())
    }

    /// Whether the TSC is so far behind what it should be (a millisecond) that it must be set forward.
    #[inline]
    pub(crate) fn tsc_lags(&self) -> bool {
        self.tsc.wanted.is_some() && self.tsc.behind() > u64::from(self.tsc.khz)
    }

    /// Sets the TSC forward where it is too slow.
    pub(crate) fn catch_up_tsc(&mut self) {
        let behind = self.tsc.behind();
        if behind > 0 {
            self.tsc.now.offset = self.tsc.now.offset.wrapping_add(behind);
            self.tsc_changed();
        }
    }

    /// The host may have slept since the last ioctl on this vCPU. To be called before anything else looks at its time.
    #[inline]
    pub(crate) fn look_for_sleep(&mut self) {
        if power::sleeps() != self.tsc.slept.times {
            self.host_slept();
        }
    }

    #[cold]
    fn host_slept(&mut self) {
        self.tsc.catch_up_with(power::slept());
        self.forget_due_deadline();
        // Without a clock there is nobody to tell.
        let _ = self.clock.guest_stopped();
        self.tsc_changed();
    }

    fn tsc_changed(&mut self) {
        self.hw.set_tsc(self.tsc.now);
        self.clock.request_update();
        self.arm_timer();
    }
}
