// SPDX-License-Identifier: GPL-2.0
//! The host goes down or to sleep: reboot notifier, notifier of sleep, and system-core suspend; and what guests see of a sleep.
use core::sync::atomic::{AtomicU64, Ordering};

use kernel::{bindings, error::to_result, prelude::*, types::Opaque};

use super::{bindings as own, timer};

/// What a [`PowerHooks`] tells.
pub trait PowerTarget: Send + Sync + 'static {
    /// The host reboots, halts or starts another kernel soon. Process context, all CPUs running.
    fn reboot(&self);
    /// The host suspends: only this CPU runs, with interrupts off. The others were unplugged before.
    fn suspend(&self);
    /// The host is back: only this CPU runs, with interrupts off.
    fn resume(&self);
}

/// What the host's sleep has done to what guests see of time. Totals, which wrap.
#[derive(Clone, Copy)]
pub struct Slept {
    /// See [`sleeps`].
    pub times: u64,
    /// Ticks by which the TSC went back.
    pub ticks: u64,
    /// Nanoseconds that passed while it did.
    pub ns: u64,
}

static TIMES: AtomicU64 = AtomicU64::new(0);
static TICKS: AtomicU64 = AtomicU64::new(0);
static NS: AtomicU64 = AtomicU64::new(0);
/// The TSC and CLOCK_BOOTTIME when the system's core was suspended last.
static TSC_BEFORE: AtomicU64 = AtomicU64::new(0);
static NS_BEFORE: AtomicU64 = AtomicU64::new(0);

/// Changes when the host goes to sleep, and once more where its TSC has gone back. No thread is in an ioctl while the host sleeps: it is
/// enough to look once in each.
#[inline]
pub fn sleeps() -> u64 {
    TIMES.load(Ordering::Relaxed)
}

/// All of it.
pub fn slept() -> Slept {
    Slept { times: sleeps(), ticks: TICKS.load(Ordering::Relaxed), ns: NS.load(Ordering::Relaxed) }
}

/// The system's core is suspended: in suspend to RAM the CPU may lose its TSC. The other CPUs are unplugged.
fn clocks_stop() {
    TSC_BEFORE.store(timer::tsc(), Ordering::Relaxed);
    NS_BEFORE.store(timer::boot_ns(), Ordering::Relaxed);
}

/// It is back. What the TSC lost is told to guests; one that only stood still, or ran on, is left as it is, as on KVM.
fn clocks_go_on() {
    let lost = TSC_BEFORE.load(Ordering::Relaxed).wrapping_sub(timer::tsc());
    if (lost as i64) > 0 {
        TICKS.fetch_add(lost, Ordering::Relaxed);
        NS.fetch_add(timer::boot_ns().wrapping_sub(NS_BEFORE.load(Ordering::Relaxed)), Ordering::Relaxed);
        TIMES.fetch_add(1, Ordering::Relaxed);
    }
}

/// Registered hooks around a `T`.
///
/// # Invariants
///
/// `reboot`, `sleep` and `syscore` are registered from the end of [`new`](Self::new) until the drop; the target outlives that.
#[pin_data(PinnedDrop)]
pub struct PowerHooks<T: PowerTarget> {
    target: T,
    #[pin]
    syscore: Opaque<own::syscore>,
    #[pin]
    sleep: Opaque<bindings::notifier_block>,
    #[pin]
    reboot: Opaque<bindings::notifier_block>,
}

// SAFETY: may be unregistered on any thread.
unsafe impl<T: PowerTarget> Send for PowerHooks<T> {}
// SAFETY: shared access is to `T: Sync`.
unsafe impl<T: PowerTarget> Sync for PowerHooks<T> {}

impl<T: PowerTarget> PowerHooks<T> {
    const OPS: own::syscore_ops =
        own::syscore_ops { suspend: Some(Self::suspend), resume: Some(Self::resume), shutdown: None };

    /// Registers the hooks. Sleeps.
    pub fn new(target: T) -> impl PinInit<Self, Error> {
        try_pin_init!(&this in Self {
            target,
            syscore <- Opaque::ffi_init(|slot: *mut own::syscore| {
                // SAFETY: only an address is taken; the field is initialised.
                let data = unsafe { &raw mut (*this.as_ptr()).target };
                // SAFETY: `slot` is valid for writing.
                unsafe { slot.write(own::syscore { ops: &Self::OPS, data: data.cast(), ..Default::default() }) };
            }),
            sleep <- Opaque::ffi_init(|slot: *mut bindings::notifier_block| {
                // SAFETY: `slot` is valid for writing.
                unsafe { slot.write(bindings::notifier_block { notifier_call: Some(Self::sleep), ..pin_init::zeroed() }) };
            }),
            reboot <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
                // SAFETY: all three are valid, pinned, and unregistered before they go away.
                unsafe {
                    slot.write(bindings::notifier_block { notifier_call: Some(Self::reboot), ..pin_init::zeroed() });
                    to_result(own::register_reboot_notifier(slot))?;
                    own::register_pm_notifier((*this.as_ptr()).sleep.get());
                    own::register_syscore((*this.as_ptr()).syscore.get());
                }
                Ok::<(), Error>(())
            }),
        }? Error)
    }

    unsafe extern "C" fn reboot(block: *mut bindings::notifier_block, _action: c_ulong, _data: *mut c_void) -> c_int {
        let field = Opaque::cast_from(block);
        // SAFETY: registered, so alive.
        let this: &Self = unsafe { &*kernel::container_of!(field, Self, reboot) };
        this.target.reboot();
        bindings::NOTIFY_OK as c_int
    }

    unsafe extern "C" fn sleep(_block: *mut bindings::notifier_block, action: c_ulong, _data: *mut c_void) -> c_int {
        // SAFETY: looks at its argument only.
        if unsafe { own::krab_goes_to_sleep(action) } {
            TIMES.fetch_add(1, Ordering::Relaxed);
        }
        bindings::NOTIFY_DONE as c_int
    }

    unsafe extern "C" fn suspend(data: *mut c_void) -> c_int {
        // SAFETY: registered with a pointer to the target, which is alive.
        unsafe { &*data.cast::<T>() }.suspend();
        clocks_stop();
        0
    }

    unsafe extern "C" fn resume(data: *mut c_void) {
        clocks_go_on();
        // SAFETY: as above.
        unsafe { &*data.cast::<T>() }.resume();
    }
}

#[pinned_drop]
impl<T: PowerTarget> PinnedDrop for PowerHooks<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: registered, by the type invariant.
        unsafe {
            own::unregister_syscore(self.syscore.get());
            own::unregister_pm_notifier(self.sleep.get());
            own::unregister_reboot_notifier(self.reboot.get());
        }
    }
}
