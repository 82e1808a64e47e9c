// SPDX-License-Identifier: GPL-2.0
//! Getting the attention of a vCPU: request bits, leaving guest mode, waking from sleep.
//!
//! The vCPU's side, once per entry: interrupts off, [`KickPoint::enter_guest`], which says no when there is something to do;
//! run the guest; drop the [`InGuest`]; interrupts on. The other side sets bits with [`KickPoint::post`]. Either the
//! vCPU sees the bits before it enters, or the other side sees it in guest mode and interrupts that CPU, which makes the guest
//! exit. Both sides write, then have a full barrier, then read what the other wrote: one of them must notice.
use core::{
    hint::spin_loop,
    sync::atomic::{fence, AtomicU32, AtomicU64, Ordering},
};
use kernel::{bindings, prelude::*, types::Opaque};

use super::{bindings as own, cpu::IrqsOff, task};

/// Not in guest mode, and any change to the requests is seen before the guest runs again.
const OUTSIDE: u32 = 0;
/// In guest mode, or about to enter without looking at the requests again.
const IN_GUEST: u32 = 1;
/// As `IN_GUEST`, but an interrupt is on its way.
const EXITING: u32 = 2;

/// Where others reach a vCPU.
///
/// # Invariants
///
/// - Only the thread that runs the vCPU sets `mode` to `IN_GUEST` or `OUTSIDE`; others change `IN_GUEST` to `EXITING`. `cpu` is
///   where the vCPU is in guest mode whenever it is.
/// - `waiter` is initialised, and set only by a thread inside `block_until`, one at a time.
pub struct KickPoint {
    requests: AtomicU64,
    mode: AtomicU32,
    cpu: AtomicU32,
    blocking: AtomicU32,
    waiter: Opaque<bindings::rcuwait>,
}

// SAFETY: everything is atomic, or the kernel's own synchronisation.
unsafe impl Send for KickPoint {}
// SAFETY: as above.
unsafe impl Sync for KickPoint {}

impl KickPoint {
    /// Outside of guest mode, without requests.
    pub const fn new() -> Self {
        Self {
            requests: AtomicU64::new(0),
            mode: AtomicU32::new(OUTSIDE),
            cpu: AtomicU32::new(0),
            blocking: AtomicU32::new(0),
            // An `rcuwait` starts as a null pointer.
            waiter: Opaque::zeroed(),
        }
    }

    /// Sets request bits, wakes the vCPU if it sleeps and makes it leave guest mode. For any context but NMI.
    #[inline]
    pub fn post(&self, bits: u64) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
        self.wake();
        self.leave_soon();
    }

    /// Sets request bits for the vCPU's next entry, without disturbing it.
    #[inline]
    pub fn post_quietly(&self, bits: u64) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
    }

    /// Wakes the vCPU and makes it leave guest mode after something else changed that it looks at. For any context but NMI.
    #[inline]
    pub fn kick(&self) {
        fence(Ordering::SeqCst);
        self.wake();
        self.leave_soon();
    }

    /// Wakes the vCPU, or tells the CPU that runs it in guest mode, after something changed that this CPU looks at by itself, and that the
    /// vCPU looks at before it enters. For any context but NMI.
    #[inline]
    pub fn notify(&self) {
        fence(Ordering::SeqCst);
        self.wake();
        if self.mode.load(Ordering::Relaxed) != OUTSIDE {
            // SAFETY: by the type invariant a valid CPU number. Where nobody is in guest mode any more, the host ignores it.
            unsafe { own::krab_notify_cpu(self.cpu.load(Ordering::Relaxed)) };
        }
    }

    /// Sets request bits on many vCPUs, makes those in guest mode leave, and waits until they have. Sleepers sleep on. On return no
    /// vCPU runs guest code that does not know of the bits. Not between `enter_guest` and the end of [`InGuest`].
    pub fn post_and_wait<'a>(vcpus: impl Iterator<Item = &'a KickPoint> + Clone, bits: u64) {
        for vcpu in vcpus.clone() {
            vcpu.requests.fetch_or(bits, Ordering::SeqCst);
            vcpu.leave_soon();
        }
        for vcpu in vcpus {
            // Entering again is no reason to wait on: it needs to have seen the bits.
            while vcpu.mode.load(Ordering::Acquire) == EXITING {
                spin_loop();
            }
        }
    }

    /// Takes those of `bits` that are set.
    #[inline]
    pub fn take(&self, bits: u64) -> u64 {
        if self.requests.load(Ordering::Relaxed) & bits == 0 {
            return 0;
        }
        self.requests.fetch_and(!bits, Ordering::SeqCst) & bits
    }

    /// The request bits that are set.
    #[inline]
    pub fn pending(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Enters guest mode; `None` if requests or the kernel's work for this thread come first.
    #[inline]
    pub fn enter_guest<'a>(&'a self, irqs: &'a IrqsOff) -> Option<InGuest<'a>> {
        self.cpu.store(task::this_cpu(), Ordering::Relaxed);
        self.mode.swap(IN_GUEST, Ordering::SeqCst);
        let guard = InGuest { vcpu: self, _irqs: irqs };
        if guard.must_leave() {
            return None;
        }
        Some(guard)
    }

    /// Sleeps until `ready` says yes. It is asked again after every [`post`](Self::post) or [`kick`](Self::kick), and must not sleep
    /// itself. EINTR when a signal is pending. One thread at a time: the vCPU's.
    pub fn block_until(&self, mut ready: impl FnMut() -> bool) -> Result {
        if self.blocking.swap(1, Ordering::Acquire) != 0 {
            return Err(EBUSY);
        }
        let waiter = self.waiter.get();
        // SAFETY: initialised, and `blocking` keeps all others out.
        unsafe { own::krab_prepare_to_wait(waiter) };
        let result = loop {
            // SAFETY: back to running below. A full barrier: what `ready` reads comes after.
            unsafe { own::krab_set_interruptible() };
            if ready() {
                break Ok(());
            }
            if task::signal_pending() {
                break Err(EINTR);
            }
            // SAFETY: process context.
            unsafe { bindings::schedule() };
        };
        // SAFETY: pairs with the preparation; also sets the task running.
        unsafe { bindings::finish_rcuwait(waiter) };
        self.blocking.store(0, Ordering::Release);
        result
    }

    /// Whether the vCPU sleeps in [`block_until`](Self::block_until); a hint.
    #[inline]
    pub fn is_blocked(&self) -> bool {
        self.blocking.load(Ordering::Relaxed) != 0
    }

    #[inline]
    fn wake(&self) {
        // The sleeper says so before it looks whether it may sleep; the caller had a full barrier.
        if self.is_blocked() {
            // SAFETY: initialised; finds the sleeper under RCU.
            unsafe { bindings::rcuwait_wake_up(self.waiter.get()) };
        }
    }

    #[inline]
    fn leave_soon(&self) {
        if self.mode.load(Ordering::Relaxed) == IN_GUEST
            && self.mode.compare_exchange(IN_GUEST, EXITING, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        {
            // SAFETY: by the type invariant a valid CPU number. On this CPU itself nothing is sent: the vCPU's own thread sees the
            // mode in `must_leave`.
            unsafe { own::krab_kick_cpu(self.cpu.load(Ordering::Relaxed)) };
        }
    }
}

/// A vCPU in guest mode on this CPU; the drop leaves it.
pub struct InGuest<'a> {
    vcpu: &'a KickPoint,
    _irqs: &'a IrqsOff,
}

impl InGuest<'_> {
    /// Whether there is a reason to leave before running the guest (again): requests, a kick, or work for this thread.
    #[inline]
    pub fn must_leave(&self) -> bool {
        self.vcpu.pending() != 0 || self.vcpu.mode.load(Ordering::Relaxed) == EXITING || task::work_pending()
    }
}

impl Drop for InGuest<'_> {
    #[inline]
    fn drop(&mut self) {
        self.vcpu.mode.store(OUTSIDE, Ordering::Release);
    }
}
