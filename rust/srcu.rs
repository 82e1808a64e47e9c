// SPDX-License-Identifier: GPL-2.0
//! A value that is read often, from any context, and replaced seldom: sleepable RCU.
use core::{
    ffi::c_void,
    ops::Deref,
    ptr::NonNull,
    sync::atomic::{AtomicBool, AtomicPtr, Ordering},
};

use kernel::prelude::*;

use super::bindings;

/// A `T` that readers see whole, and that is dropped only when no reader can see it any more.
///
/// # Invariants
///
/// `domain` is an initialised `srcu_struct`. `current` came from [`KBox::into_raw`] and is freed only after it was replaced and every
/// reader that may have loaded it has left `domain`.
pub(crate) struct SrcuCell<T> {
    domain: NonNull<c_void>,
    current: AtomicPtr<T>,
    /// Values are left to [`Retired`].
    any_retired: AtomicBool,
}

/// A value that is dropped when the last reader has gone.
///
/// # Invariants
///
/// `head` is the first field, and queued from [`SrcuCell::replace_soon`] until the callback.
#[repr(C)]
struct Retired<T> {
    head: kernel::bindings::callback_head,
    value: *mut T,
}

impl<T> Retired<T> {
    unsafe extern "C" fn done(head: *mut kernel::bindings::callback_head) {
        // SAFETY: the head is that of a `Retired` made by `KBox::into_raw`; it and its value belong to this callback now, because every
        // reader that could have loaded the value has left.
        unsafe {
            let this = KBox::from_raw(head.cast::<Self>());
            drop(KBox::from_raw(this.value));
        }
    }
}

// SAFETY: the value is dropped by whoever replaces it or drops the cell.
unsafe impl<T: Send + Sync> Send for SrcuCell<T> {}
// SAFETY: readers on several threads share `&T`.
unsafe impl<T: Send + Sync> Sync for SrcuCell<T> {}

/// Keeps the value that was current when it was made alive.
pub(crate) struct SrcuGuard<'a, T> {
    cell: &'a SrcuCell<T>,
    index: i32,
    value: &'a T,
}

impl<T> SrcuCell<T> {
    /// A cell with `value`. May sleep.
    pub(crate) fn new(value: T) -> Result<Self> {
        let value = KBox::new(value, GFP_KERNEL_ACCOUNT)?;
        // SAFETY: no preconditions.
        let domain = NonNull::new(unsafe { bindings::krab_srcu_new() }).ok_or(ENOMEM)?;
        Ok(Self { domain, current: AtomicPtr::new(KBox::into_raw(value)), any_retired: AtomicBool::new(false) })
    }

    /// The current value. Works in any context but NMI; a reader may sleep.
    #[inline]
    pub(crate) fn read(&self) -> SrcuGuard<'_, T> {
        // SAFETY: the domain is initialised; the guard leaves it again.
        let index = unsafe { bindings::krab_srcu_read_lock(self.domain.as_ptr()) };
        // SAFETY: by the type's invariant the value stays until the guard has left the domain.
        let value = unsafe { &*self.current.load(Ordering::Acquire) };
        SrcuGuard { cell: self, index, value }
    }

    /// Puts `value` in the place of the current one, waits until nobody reads that any more, and drops it. May sleep; must not be
    /// called by a reader.
    pub(crate) fn replace(&self, value: T) -> Result {
        let new = KBox::into_raw(KBox::new(value, GFP_KERNEL_ACCOUNT)?);
        let old = self.current.swap(new, Ordering::AcqRel);
        // SAFETY: the domain is initialised.
        unsafe { bindings::krab_srcu_synchronize(self.domain.as_ptr()) };
        // SAFETY: every reader that could have loaded it has left.
        drop(unsafe { KBox::from_raw(old) });
        Ok(())
    }

    /// As [`replace`](Self::replace), but does not wait: whoever reads now may see the old value a little longer, and it is
    /// dropped later, in a context that must not sleep. Its memory counts until then, so not for values that are large or replaced often.
    pub(crate) fn replace_soon(&self, value: T) -> Result
    where
        T: 'static,
    {
        let new = KBox::new(value, GFP_KERNEL_ACCOUNT)?;
        let retired = KBox::new(
            Retired { head: kernel::bindings::callback_head::default(), value: core::ptr::null_mut::<T>() },
            GFP_KERNEL_ACCOUNT,
        )?;
        let retired = KBox::into_raw(retired);
        self.any_retired.store(true, Ordering::Relaxed);
        // SAFETY: the box is ours until it is queued; `done` gets it back. The drop of the cell waits for that.
        unsafe {
            (*retired).value = self.current.swap(KBox::into_raw(new), Ordering::AcqRel);
            bindings::krab_srcu_call(self.domain.as_ptr(), retired.cast(), Some(Retired::<T>::done));
        }
        Ok(())
    }
}

impl<T> Drop for SrcuCell<T> {
    fn drop(&mut self) {
        if *self.any_retired.get_mut() {
            // SAFETY: the domain is initialised.
            unsafe { bindings::krab_srcu_barrier(self.domain.as_ptr()) };
        }
        // SAFETY: `&mut self`: there are no readers.
        unsafe {
            drop(KBox::from_raw(*self.current.get_mut()));
            bindings::krab_srcu_free(self.domain.as_ptr());
        }
    }
}

impl<T> Deref for SrcuGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        self.value
    }
}

impl<T> Drop for SrcuGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: entered by `read` with this index.
        unsafe { bindings::krab_srcu_read_unlock(self.cell.domain.as_ptr(), self.index) };
    }
}
