// SPDX-License-Identifier: GPL-2.0
//! High-resolution timers and clocks. Times are nanoseconds.
use core::arch::asm;
use kernel::{bindings, prelude::*, types::Opaque};

use super::bindings as own;

/// What a [`Timer`] tells.
pub trait TimerTarget: Send + Sync + 'static {
    /// The deadline has passed. Hard interrupt context. Returns the next deadline, absolute as for [`Timer::arm`], if there is one.
    fn expired(&self) -> Option<u64>;
}

/// A timer on CLOCK_MONOTONIC that calls its `T`. Usually `T` is, or has, an `Arc` of what it wakes.
///
/// # Invariants
///
/// `timer` is set up, with our callback, and is not queued nor running once the value is dropped.
#[pin_data(PinnedDrop)]
pub struct Timer<T: TimerTarget> {
    #[pin]
    timer: Opaque<bindings::hrtimer>,
    target: T,
}

// SAFETY: hrtimers may be used from any thread.
unsafe impl<T: TimerTarget> Send for Timer<T> {}
// SAFETY: hrtimers do their own locking; the target is `Sync`.
unsafe impl<T: TimerTarget> Sync for Timer<T> {}

impl<T: TimerTarget> Timer<T> {
    /// An idle timer.
    pub fn new(target: T) -> impl PinInit<Self> {
        pin_init!(Self {
            target,
            timer <- Opaque::ffi_init(|slot| {
                // SAFETY: `slot` is valid for writing and pinned.
                unsafe {
                    bindings::hrtimer_setup(
                        slot,
                        Some(Self::callback),
                        bindings::CLOCK_MONOTONIC as bindings::clockid_t,
                        bindings::hrtimer_mode_HRTIMER_MODE_ABS_HARD,
                    )
                }
            }),
        })
    }

    /// Expires at `deadline_ns` (see [`now_ns`]), or right away if that is past; replaces an earlier deadline. A callback may be
    /// running at this moment: [`cancel`](Self::cancel) first where that matters.
    #[inline]
    pub fn arm(&self, deadline_ns: u64) {
        let deadline = deadline_ns.min(i64::MAX as u64) as bindings::ktime_t;
        // SAFETY: set up, by the type invariant.
        unsafe {
            bindings::hrtimer_start_range_ns(
                self.timer.get(),
                deadline,
                0,
                bindings::hrtimer_mode_HRTIMER_MODE_ABS_HARD,
            )
        };
    }

    /// Stops the timer and waits for a running callback. Not from the callback, nor under a lock that it takes. Says whether it
    /// was armed.
    pub fn cancel(&self) -> bool {
        // SAFETY: set up, by the type invariant.
        unsafe { bindings::hrtimer_cancel(self.timer.get()) != 0 }
    }

    unsafe extern "C" fn callback(timer: *mut bindings::hrtimer) -> bindings::hrtimer_restart {
        let field = Opaque::cast_from(timer);
        // SAFETY: by the type invariant the callback only runs while the value lives.
        let this = unsafe { &*kernel::container_of!(field, Self, timer) };
        if let Some(next) = this.target.expired() {
            // Not by restarting: somebody may have armed it meanwhile, and then its queue entry is not ours to change.
            this.arm(next);
        }
        bindings::hrtimer_restart_HRTIMER_NORESTART
    }
}

#[pinned_drop]
impl<T: TimerTarget> PinnedDrop for Timer<T> {
    fn drop(self: Pin<&mut Self>) {
        self.cancel();
    }
}

/// CLOCK_MONOTONIC.
#[inline]
pub fn now_ns() -> u64 {
    // SAFETY: always allowed.
    unsafe { bindings::ktime_get() as u64 }
}

/// CLOCK_REALTIME.
pub fn real_ns() -> u64 {
    // SAFETY: always allowed.
    unsafe { bindings::ktime_get_with_offset(bindings::tk_offsets_TK_OFFS_REAL) as u64 }
}

/// CLOCK_BOOTTIME: goes on while the host sleeps.
pub fn boot_ns() -> u64 {
    // SAFETY: always allowed.
    unsafe { bindings::ktime_get_with_offset(bindings::tk_offsets_TK_OFFS_BOOT) as u64 }
}

/// The time-stamp counter, read in program order.
#[inline(always)]
pub fn tsc() -> u64 {
    let (high, low): (u64, u64);
    // SAFETY: every x86-64 CPU has these instructions; they change EAX and EDX only.
    unsafe { asm!("lfence", "rdtsc", out("rdx") high, out("rax") low, options(nomem, nostack, preserves_flags)) };
    high << 32 | low
}

/// The host's TSC frequency in kHz.
pub fn tsc_khz() -> u32 {
    // SAFETY: changes at most at boot and when a CPU's frequency does; read in one piece.
    unsafe { core::ptr::read_volatile(&raw const bindings::tsc_khz) }
}

/// Whether the TSCs of all CPUs agree and run evenly, as far as the kernel knows.
pub fn tsc_is_stable() -> bool {
    // SAFETY: always allowed.
    unsafe { own::krab_tsc_is_stable() }
}

/// One instant on several clocks.
#[derive(Clone, Copy, Debug)]
pub struct Instant {
    /// The host's TSC, if the kernel keeps time by it.
    pub tsc: Option<u64>,
    /// CLOCK_REALTIME.
    pub real_ns: u64,
}

/// The clocks at one instant, for paravirtual clocks.
pub fn instant() -> Instant {
    let mut clocks = own::krab_clocks::default();
    // SAFETY: `clocks` is valid for writing.
    unsafe { own::krab_read_clocks(&mut clocks) };
    Instant { tsc: clocks.has_tsc.then_some(clocks.tsc), real_ns: clocks.real_ns }
}
