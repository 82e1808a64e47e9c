// SPDX-License-Identifier: GPL-2.0
//! `IrqSpinLock`: a raw spinlock taken with interrupts off, for state that interrupt handlers share. `KillableMutex`: a mutex
//! that is held for as long as userspace likes, so that who waits for it must be killable.
//!
//! Plain `SpinLock` and `Mutex` come from the kernel crate. Guards of several `IrqSpinLock`s must be dropped in reverse
//! order: the outer guard restores the interrupt state.
use kernel::{
    bindings,
    prelude::*,
    sync::lock::{Backend, Guard, Lock},
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

/// A mutex whose waiters a fatal signal wakes. Make one with [`new_killable_mutex`](crate::new_killable_mutex).
pub type KillableMutex<T> = Lock<T, KillableBackend>;

/// `struct mutex` with `mutex_lock_killable` in the place of `mutex_trylock`.
pub struct KillableBackend;

// SAFETY: a `struct mutex` excludes all other tasks. `relock` is the default.
unsafe impl Backend for KillableBackend {
    type State = bindings::mutex;
    type GuardState = ();

    unsafe fn init(ptr: *mut Self::State, name: *const c_char, key: *mut bindings::lock_class_key) {
        // SAFETY: the caller's promise.
        unsafe { bindings::__mutex_init(ptr, name, key) }
    }

    unsafe fn lock(ptr: *mut Self::State) -> Self::GuardState {
        // SAFETY: initialised, by the caller's promise.
        unsafe { bindings::mutex_lock(ptr) }
    }

    unsafe fn try_lock(ptr: *mut Self::State) -> Option<Self::GuardState> {
        // SAFETY: initialised, by the caller's promise.
        (unsafe { own::krab_mutex_lock_killable(ptr) } == 0).then_some(())
    }

    unsafe fn unlock(ptr: *mut Self::State, _state: &Self::GuardState) {
        // SAFETY: owned by the caller.
        unsafe { bindings::mutex_unlock(ptr) }
    }

    unsafe fn assert_is_held(ptr: *mut Self::State) {
        // SAFETY: initialised, by the caller's promise.
        unsafe { bindings::mutex_assert_is_held(ptr) }
    }
}

/// Waits for the mutex. EINTR when the task is killed meanwhile.
pub fn lock_killable<T>(mutex: &KillableMutex<T>) -> Result<Guard<'_, T, KillableBackend>> {
    mutex.try_lock().ok_or(EINTR)
}

/// An initialiser of a `KillableMutex` with its own lock class: `new_killable_mutex!(value, "name")`.
#[macro_export]
macro_rules! new_killable_mutex {
    ($inner:expr, $name:literal) => {
        $crate::glue::lock::KillableMutex::new($inner, ::kernel::c_str!($name), ::kernel::static_lock_class!())
    };
}
