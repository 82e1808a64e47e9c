// SPDX-License-Identifier: GPL-2.0
//! The host goes down or to sleep: reboot notifier and system-core suspend.
use kernel::{bindings, error::to_result, prelude::*, types::Opaque};

use super::bindings as own;

/// What a [`PowerHooks`] tells.
pub trait PowerTarget: Send + Sync + 'static {
    /// The host reboots, halts or starts another kernel soon. Process context, all CPUs running.
    fn reboot(&self);
    /// The host suspends: only this CPU runs, with interrupts off. The others were unplugged before.
    fn suspend(&self);
    /// The host is back: only this CPU runs, with interrupts off.
    fn resume(&self);
}

/// Registered hooks around a `T`.
///
/// # Invariants
///
/// `reboot` and `syscore` are registered from the end of [`new`](Self::new) until the drop; the target outlives that.
#[pin_data(PinnedDrop)]
pub struct PowerHooks<T: PowerTarget> {
    target: T,
    #[pin]
    syscore: Opaque<own::syscore>,
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
            reboot <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
                // SAFETY: both are valid, pinned, and unregistered before they go away.
                unsafe {
                    slot.write(bindings::notifier_block { notifier_call: Some(Self::reboot), ..pin_init::zeroed() });
                    to_result(own::register_reboot_notifier(slot))?;
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

    unsafe extern "C" fn suspend(data: *mut c_void) -> c_int {
        // SAFETY: registered with a pointer to the target, which is alive.
        unsafe { &*data.cast::<T>() }.suspend();
        0
    }

    unsafe extern "C" fn resume(data: *mut c_void) {
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
            own::unregister_reboot_notifier(self.reboot.get());
        }
    }
}
