// SPDX-License-Identifier: GPL-2.0
//! Kernel pages.
use core::ptr::NonNull;
use kernel::bindings;

use super::bindings as own;

/// A reference to a page that a userspace mapping may take over.
///
/// # Invariants
///
/// Owns one reference of `page`.
pub struct UserPage {
    page: NonNull<bindings::page>,
}

impl UserPage {
    pub(super) fn as_raw(&self) -> *mut bindings::page {
        self.page.as_ptr()
    }
}

impl Drop for UserPage {
    fn drop(&mut self) {
        // SAFETY: the reference is ours by the type invariant.
        unsafe { own::krab_put_page(self.page.as_ptr()) };
    }
}
