// SPDX-License-Identifier: GPL-2.0
//! The host's performance counters, as the kernel lends them: for what happens while a task runs a guest.
//!
//! The kernel puts a counter into the CPU while its task runs there, and leaves it off: who runs the guest turns on those that are
//! [`enabled`](Counters::enabled) at each entry, and off at each exit.
use core::ptr::NonNull;
use kernel::prelude::*;

use super::{bindings, cpu::IrqsOff};

/// Whether the kernel lends counters that count in guests.
pub(crate) fn works() -> bool {
    // SAFETY: process context.
    unsafe { bindings::krab_pmu_works() }
}

/// Counters for one vCPU, numbered from 0. What begins to count does so for the current task.
///
/// # Invariants
///
/// `counters` is owned, and has `count` counters. Only `&mut` changes which of them exist, and what NMIs change is atomic.
pub(crate) struct Counters {
    counters: NonNull<bindings::krab_counters>,
    count: usize,
}

// SAFETY: nothing in it belongs to a thread: the kernel's counters can be paused, read and released from any.
unsafe impl Send for Counters {}

impl Counters {
    pub(crate) fn new(count: usize) -> Result<Self> {
        // SAFETY: any number may be asked for; the counters are freed by `drop`.
        let counters = unsafe { bindings::krab_counters_new(count as u32) };
        // INVARIANT: a new one, of that many.
        Ok(Self { counters: NonNull::new(counters).ok_or(ENOMEM)?, count })
    }

    /// `f` for a counter that exists.
    fn with<T: Default>(&self, n: usize, f: impl FnOnce(*mut bindings::krab_counters, u32) -> T) -> T {
        if n < self.count {
            f(self.counters.as_ptr(), n as u32)
        } else {
            T::default()
        }
    }

    /// Counts an event of PERFEVTSELx from 0, and [overflows](Self::has_overflowed) after `period`, which is not 0. `false` where the
    /// kernel does not count that. In process context, as all that follows.
    pub(crate) fn start(&mut self, n: usize, event: u64, user: bool, kernel: bool, period: u64) -> bool {
        // SAFETY: by the invariant there is such a counter, and nobody else uses it.
        self.with(n, |all, n| unsafe { bindings::krab_counter_start(all, n, event, user, kernel, period) })
    }

    /// The same for one that counted this before and was paused.
    pub(crate) fn resume(&mut self, n: usize, period: u64) -> bool {
        // SAFETY: as above.
        self.with(n, |all, n| unsafe { bindings::krab_counter_resume(all, n, period) })
    }

    /// Stops counting. What was counted.
    pub(crate) fn pause(&mut self, n: usize) -> u64 {
        // SAFETY: as above.
        self.with(n, |all, n| unsafe { bindings::krab_counter_pause(all, n) })
    }

    /// What was counted so far.
    pub(crate) fn read(&self, n: usize) -> u64 {
        // SAFETY: by the invariant there is such a counter; reading changes nothing of it.
        self.with(n, |all, n| unsafe { bindings::krab_counter_read(all, n) })
    }

    /// Gives a counter back.
    pub(crate) fn stop(&mut self, n: usize) {
        // SAFETY: by the invariant there is such a counter, and nobody else uses it.
        self.with(n, |all, n| unsafe { bindings::krab_counter_stop(all, n) });
    }

    /// Whether some have overflowed. For any context.
    #[inline]
    pub(crate) fn has_overflowed(&self) -> bool {
        // SAFETY: by the invariant they exist; one read.
        unsafe { bindings::krab_counters_overflowed(self.counters.as_ptr()) }
    }

    /// Takes a bit for each that has overflowed.
    pub(crate) fn take_overflowed(&mut self) -> usize {
        // SAFETY: by the invariant they exist; atomic.
        unsafe { bindings::krab_counters_take_overflowed(self.counters.as_ptr()) }
    }

    /// The bits of IA32_PERF_GLOBAL_CTRL that turn on those which are in this CPU now.
    #[inline]
    pub(crate) fn enabled(&self, _irqs: &IrqsOff) -> u64 {
        // SAFETY: by the invariant they exist, and interrupts are off, so none comes or goes.
        unsafe { bindings::krab_counters_enabled(self.counters.as_ptr()) }
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        // SAFETY: owned, and not used any more.
        unsafe { bindings::krab_counters_free(self.counters.as_ptr()) };
    }
}
