// SPDX-License-Identifier: GPL-2.0
//! `IrqSpinLock`: a raw spinlock taken with interrupts off, for state that interrupt handlers share.
//!
//! Plain `SpinLock` and `Mutex` come from the kernel crate. Guards of several `IrqSpinLock`s must be dropped in reverse
//! order: the outer guard restores the interrupt state.
use kernel::{
    bindings,
    prelude::*,
    sync::lock::{Backend, Lock},
};

use super::bindings as own;

/// A spinlock that also keeps interrupts off on this CPU. Make one with [`new_irq_spinlock`](crate::new_irq_spinlock).
pub type IrqSpinLock<T> = Lock<T, IrqSpinBackend>;

/// `raw_spinlock_t` with `irqsave`.
pub struct IrqSpinBackend;

// SAFETY: `raw_spinlock_t` excludes other CPUs, and interrupts off exclude this CPU's handlers. `relock` is the default.
unsafe impl Backend for IrqSpinBackend {
    type State = bindings::raw_spinlock_t;
    type GuardState = c_ulong;

    unsafe fn init(ptr: *mut Self::State, name: *const c_char, key: *mut bindings::lock_class_key) {
        // SAFETY: the caller's promise.
        unsafe { own::krab_raw_spin_lock_init(ptr, name, key) }
    }

    #[inline]
    unsafe fn lock(ptr: *mut Self::State) -> Self::GuardState {
        // SAFETY: initialised, by the caller's promise.
        unsafe { own::krab_raw_spin_lock_irqsave(ptr) }
    }

    #[inline]
    unsafe fn try_lock(ptr: *mut Self::State) -> Option<Self::GuardState> {
        let mut flags = 0;
        // SAFETY: initialised, by the caller's promise.
        unsafe { own::krab_raw_spin_trylock_irqsave(ptr, &mut flags) }.then_some(flags)
    }

    #[inline]
    unsafe fn unlock(ptr: *mut Self::State, flags: &Self::GuardState) {
        // SAFETY: owned by the caller, who took it with these flags.
        unsafe { own::krab_raw_spin_unlock_irqrestore(ptr, *flags) }
    }

    #[inline]
    unsafe fn assert_is_held(ptr: *mut Self::State) {
        #[cfg(CONFIG_LOCKDEP)]
        // SAFETY: initialised, by the caller's promise.
        unsafe {
            own::krab_raw_spin_assert_held(ptr)
        }
        #[cfg(not(CONFIG_LOCKDEP))]
        let _ = ptr;
    }
}

/// An initialiser of an `IrqSpinLock` with its own lock class: `new_irq_spinlock!(value, "name")`.
#[macro_export]
macro_rules! new_irq_spinlock {
    ($inner:expr, $name:literal) => {
        $crate::glue::lock::IrqSpinLock::new($inner, ::kernel::c_str!($name), ::kernel::static_lock_class!())
    };
}
