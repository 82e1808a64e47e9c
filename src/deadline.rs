// SPDX-License-Identifier: GPL-2.0
//! Who watches the clock for the local APIC's timer: the CPU while the guest runs, if it can, and a timer of the host otherwise, also while
//! the vCPU is halted.
//!
//! Nobody's word is taken for it: what comes only makes the local APIC's own timer look whether it is due. So a deadline that is not the
//! guest's any more comes in vain, and two that come for one are one interrupt. While the vCPU neither runs nor is halted, nobody watches
//! in the CPU's stead: its next run ends at once.
#![forbid(unsafe_code)]

use kernel::{prelude::*, sync::Arc};

use crate::{
    abi::pvclock::TscScale,
    glue::timer::{self, Timer, TimerTarget},
    irqchip::lapic::{Deadline, Lead},
    policy::tsc,
    vcpu::{Peer, State},
    vendor::{Vendor, VendorVcpu},
};

/// A vCPU's next deadline.
pub(crate) struct Deadlines {
    timer: Pin<KBox<Timer<LapicTimer>>>,
    /// The host's timer has a deadline that has not come yet.
    armed: bool,
    /// How much earlier than the deadline the host's timer comes, and the CPU's.
    lead: Lead,
    run_lead: Lead,
    /// Host TSC at the deadline whose interrupt is on its way to the guest, and who watched.
    due: Option<(u64, Watch)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Watch {
    Host,
    Cpu,
}

impl Deadlines {
    pub(crate) fn new(peer: Arc<Peer>) -> Result<Self> {
        let lead = Lead::new(timer::tsc_khz());
        Ok(Self {
            timer: KBox::pin_init(Timer::new(LapicTimer(peer)), GFP_KERNEL_ACCOUNT)?,
            armed: false,
            lead,
            run_lead: lead,
            due: None,
        })
    }

    fn lead(&mut self, watch: Watch) -> &mut Lead {
        match watch {
            Watch::Host => &mut self.lead,
            Watch::Cpu => &mut self.run_lead,
        }
    }
}

impl<V: Vendor> State<V> {
    /// The host's timer has fired.
    pub(crate) fn host_timer_fired(&mut self) {
        self.deadlines.armed = false;
        self.deadline_came(Watch::Host);
    }

    /// The CPU ended the run for the deadline.
    pub(crate) fn run_deadline_came(&mut self) {
        self.deadline_came(Watch::Cpu);
    }

    fn deadline_came(&mut self, watch: Watch) {
        let Some(lapic) = &mut self.lapic else { return };
        match lapic.deadline() {
            Some(Deadline::GuestTsc(at)) => {
                let now = timer::tsc();
                let tsc = self.tsc.relation();
                let host_tsc = tsc.host_tsc_at(at, now);
                let mut guest_tsc = tsc.at(now);
                if host_tsc.saturating_sub(now) <= self.deadlines.lead(watch).max() {
                    self.deadlines.due = Some((host_tsc, watch));
                    guest_tsc = guest_tsc.max(at);
                }
                lapic.timer_expired(0, guest_tsc);
            }
            Some(Deadline::Ns(_)) => {
                lapic.timer_expired(timer::now_ns(), 0);
            }
            None => {}
        }
        self.arm_timer();
    }

    /// Whether [`await_deadline`](Self::await_deadline) has something to do.
    #[inline]
    pub(crate) fn has_deadline(&self) -> bool {
        self.deadlines.due.is_some()
    }

    /// The host's TSC is not the one that it was.
    pub(crate) fn forget_due_deadline(&mut self) {
        self.deadlines.due = None;
    }

    /// An interrupt is about to go into the guest: not before the deadline that it is for, if it is for one.
    #[inline]
    pub(crate) fn await_deadline(&mut self) {
        let Some((deadline, watch)) = self.deadlines.due.take() else { return };
        let start = timer::tsc();
        let late = start.wrapping_sub(deadline) as i64;
        let lead = self.deadlines.lead(watch);
        lead.learn(late);
        let wait = if late < 0 { late.unsigned_abs().min(lead.max()) } else { 0 };
        while timer::tsc().wrapping_sub(start) < wait {
            core::hint::spin_loop();
        }
    }

    /// The local APIC has another deadline, or none.
    pub(crate) fn arm_timer(&mut self) {
        let deadline = self.lapic.as_ref().and_then(|lapic| lapic.deadline());
        if !self.hw.watches_deadlines() {
            if let Some(deadline) = deadline {
                self.arm_host_timer(deadline);
            }
            return;
        }
        if core::mem::take(&mut self.deadlines.armed) {
            self.deadlines.timer.cancel();
        }
        let deadline = deadline.map(|deadline| match deadline {
            Deadline::GuestTsc(at) => {
                self.tsc.relation().host_tsc_at(at, timer::tsc()).saturating_sub(self.deadlines.run_lead.ticks())
            }
            Deadline::Ns(at) => {
                let left = tsc::ticks_in(at.saturating_sub(timer::now_ns()), timer::tsc_khz());
                timer::tsc().saturating_add(left)
            }
        });
        self.hw.set_deadline(deadline);
    }

    /// The vCPU is about to sleep: the host's timer takes over.
    pub(crate) fn arm_timer_for_sleep(&mut self) {
        let deadline = self.lapic.as_ref().and_then(|lapic| lapic.deadline());
        if let (true, false, Some(deadline)) = (self.hw.watches_deadlines(), self.deadlines.armed, deadline) {
            self.arm_host_timer(deadline);
        }
    }

    /// Sets the host's timer. One that is no deadline any more fires in vain.
    fn arm_host_timer(&mut self, deadline: Deadline) {
        let at_ns = match deadline {
            Deadline::Ns(at) => at,
            Deadline::GuestTsc(at) => {
                let now = timer::tsc();
                let ahead = self.tsc.relation().host_tsc_at(at, now).saturating_sub(now);
                let ticks = ahead.saturating_sub(self.deadlines.lead.ticks());
                let ns = TscScale::from_khz(timer::tsc_khz()).map_or(0, |scale| scale.nanoseconds(ticks));
                timer::now_ns().saturating_add(ns)
            }
        };
        self.deadlines.armed = true;
        self.deadlines.timer.arm(at_ns);
    }
}

/// The host timer of a local APIC: tells its vCPU.
struct LapicTimer(Arc<Peer>);

impl TimerTarget for LapicTimer {
    fn expired(&self) -> Option<u64> {
        self.0.inbox.post_timer();
        self.0.kick.kick();
        None
    }
}
