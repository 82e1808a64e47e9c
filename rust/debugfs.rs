// SPDX-License-Identifier: GPL-2.0
//! Counters in debugfs.
use core::{ffi::c_void, marker::PhantomData};
use kernel::{prelude::*, sync::Arc};

use super::bindings;

/// Something with numbers to show.
pub(crate) trait Counters: Send + Sync + 'static {
    /// The files' names.
    const NAMES: &'static [&'static CStr];

    /// Number `index` in the order of the names. Process context.
    fn value(&self, index: usize) -> u64;
}

/// More than any list of names.
const MOST: usize = 64;

/// The names as C wants them.
struct Names<T>(PhantomData<T>);

impl<T: Counters> Names<T> {
    const POINTERS: [*const kernel::ffi::c_char; MOST] = {
        assert!(T::NAMES.len() <= MOST);
        let mut pointers = [core::ptr::null(); MOST];
        let mut n = 0;
        while n < T::NAMES.len() {
            pointers[n] = T::NAMES[n].as_ptr().cast();
            n += 1;
        }
        pointers
    };
}

/// The module's folder. One at a time.
pub(crate) struct Root<T: Counters>(PhantomData<T>);

impl<T: Counters> Root<T> {
    /// Makes the folder, with the sums over all [`Folder`]s. Without debugfs there is none, and nothing else changes.
    pub(crate) fn new(name: &'static CStr) -> Self {
        // SAFETY: the strings are static; the callback gets what `Folder::new` gave.
        unsafe {
            bindings::krab_debugfs_init(
                name.as_ptr().cast(),
                Names::<T>::POINTERS.as_ptr(),
                T::NAMES.len() as u32,
                Some(Self::read),
            )
        };
        Self(PhantomData)
    }

    unsafe extern "C" fn read(object: *const c_void, index: u32) -> u64 {
        // SAFETY: `object` is the `T` that a `Folder<T>` holds a reference of; its drop waits for readers.
        unsafe { &*object.cast::<T>() }.value(index as usize)
    }
}

impl<T: Counters> Drop for Root<T> {
    fn drop(&mut self) {
        // SAFETY: made by `new`; the folders of VMs are gone, because each keeps a file open, and so the module.
        unsafe { bindings::krab_debugfs_exit() };
    }
}

/// The folder of one VM.
///
/// # Invariants
///
/// `handle` came from `krab_debugfs_add_vm` with a pointer to what `counters` refers to, and is removed first.
pub(crate) struct Folder<T: Counters> {
    handle: *mut bindings::krab_debugfs_vm,
    _counters: Arc<T>,
}

// SAFETY: the handle is only used to remove it; `T` is `Send` and `Sync`.
unsafe impl<T: Counters> Send for Folder<T> {}
// SAFETY: as above; nothing is reachable through `&self`.
unsafe impl<T: Counters> Sync for Folder<T> {}

impl<T: Counters> Folder<T> {
    /// The folder `PID-fd` of the calling process. The [`Root`] must be the same `T`'s, and there while a VM is.
    pub(crate) fn new(fd: i32, counters: Arc<T>) -> Self {
        let object: *const T = &*counters;
        // SAFETY: the strings are static; `counters` keeps the object alive until the drop.
        let handle = unsafe {
            bindings::krab_debugfs_add_vm(fd, Names::<T>::POINTERS.as_ptr(), T::NAMES.len() as u32, object.cast())
        };
        Self { handle, _counters: counters }
    }
}

impl<T: Counters> Drop for Folder<T> {
    fn drop(&mut self) {
        // SAFETY: by the type invariant; null is allowed.
        unsafe { bindings::krab_debugfs_remove_vm(self.handle) };
    }
}
