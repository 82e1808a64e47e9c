// SPDX-License-Identifier: GPL-2.0
//! Single kernel pages that are shared with userspace, and the way from physical addresses to page descriptors.
use core::ptr::{self, NonNull};
use kernel::{bindings, prelude::*};
use zerocopy::Immutable;

use super::bindings as own;
use crate::arch::Hpa;

/// Bytes in a page.
pub const PAGE_SIZE: usize = bindings::PAGE_SIZE;

/// Where the direct map shows `hpa`. Only an address: that memory exists there is the caller's knowledge.
#[inline]
pub(super) fn direct_map(hpa: Hpa) -> *mut u8 {
    // SAFETY: set once at boot.
    let base = unsafe { bindings::page_offset_base };
    base.wrapping_add(hpa.0 as usize) as *mut u8
}

/// The page descriptor of `hpa`. Only an address, as for [`direct_map`].
#[inline]
pub(super) fn hpa_to_page(hpa: Hpa) -> *mut bindings::page {
    // SAFETY: set once at boot.
    let base = unsafe { bindings::vmemmap_base } as *mut bindings::page;
    base.wrapping_add((hpa.0 / PAGE_SIZE as u64) as usize)
}

/// The physical address of a page.
#[inline]
pub(super) fn page_to_hpa(page: *const bindings::page) -> Hpa {
    // SAFETY: set once at boot.
    let base = unsafe { bindings::vmemmap_base };
    let frame = (page as usize).wrapping_sub(base) / size_of::<bindings::page>();
    Hpa(frame.wrapping_mul(PAGE_SIZE) as u64)
}

/// An integer that the memory bus moves at once.
pub trait Word: Copy + Default + FromBytes + IntoBytes + Immutable {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}

/// A zeroed page that userspace may map, so its contents may change at any time. There are no references into it, only
/// single loads and stores and copies. Offsets are in bytes; what lies outside the page reads as zero and is not written.
///
/// # Invariants
///
/// Owns one reference of `page`, an order-0 page, which is at `base` in the direct map.
pub struct SharedPage {
    page: NonNull<bindings::page>,
    base: *mut u8,
}

// SAFETY: the page is plain memory, reached by single accesses only.
unsafe impl Send for SharedPage {}
// SAFETY: as above.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    /// Allocates a zeroed page, charged to the caller's memory cgroup. May sleep.
    pub fn new() -> Result<Self> {
        let flags = bindings::GFP_KERNEL_ACCOUNT | bindings::__GFP_ZERO;
        // SAFETY: process context; the result is checked.
        let page = unsafe { bindings::alloc_pages(flags, 0) };
        let page = NonNull::new(page).ok_or(ENOMEM)?;
        // INVARIANT: fresh from the allocator with one reference.
        Ok(Self { page, base: direct_map(page_to_hpa(page.as_ptr())) })
    }

    /// Another reference, for [`FileOperations::page`](super::fd::FileOperations::page).
    pub fn user_page(&self) -> UserPage {
        // SAFETY: our own reference keeps the page alive.
        unsafe { own::krab_get_page(self.page.as_ptr()) };
        // INVARIANT: the reference was just taken.
        UserPage { page: self.page }
    }

    #[inline]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        const { assert!(size_of::<T>() <= PAGE_SIZE) };
        (offset <= PAGE_SIZE - size_of::<T>()).then(|| self.base.wrapping_add(offset).cast())
    }

    /// One load; not atomic when misaligned.
    #[inline]
    pub fn load<T: Word>(&self, offset: usize) -> T {
        if offset % size_of::<T>() != 0 {
            return self.read(offset);
        }
        match self.at::<T>(offset) {
            // SAFETY: in bounds and aligned; volatile, because userspace may write.
            Some(at) => unsafe { ptr::read_volatile(at) },
            None => T::default(),
        }
    }

    /// One store; not atomic when misaligned.
    #[inline]
    pub fn store<T: Word>(&self, offset: usize, value: T) {
        if offset % size_of::<T>() != 0 {
            return self.write(offset, &value);
        }
        if let Some(at) = self.at::<T>(offset) {
            // SAFETY: in bounds and aligned; volatile, because userspace may look.
            unsafe { ptr::write_volatile(at, value) };
        }
    }

    /// A copy of the `T` at `offset`; zeroes when it does not fit.
    #[inline]
    pub fn read<T: FromBytes>(&self, offset: usize) -> T {
        match self.at::<T>(offset) {
            // SAFETY: in bounds; any bytes are a `T`, also torn ones.
            Some(at) => unsafe { ptr::read_unaligned(at) },
            None => T::new_zeroed(),
        }
    }

    /// Copies `value` to `offset`.
    #[inline]
    pub fn write<T: IntoBytes + Immutable>(&self, offset: usize, value: &T) {
        self.copy_in(offset, value.as_bytes());
    }

    /// Copies `bytes` into the page; nothing when they do not fit.
    #[inline]
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) {
        if let (Some(at), true) = (self.at::<u8>(offset), bytes.len() <= PAGE_SIZE.saturating_sub(offset)) {
            // SAFETY: in bounds; `bytes` is not in the page, because there are no references into it.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
        }
    }

    /// Fills `bytes` from the page; zeroes when it does not reach that far.
    #[inline]
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) {
        match self.at::<u8>(offset) {
            Some(at) if bytes.len() <= PAGE_SIZE.saturating_sub(offset) => {
                // SAFETY: in bounds; `bytes` is not in the page, because there are no references into it.
                unsafe { ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), bytes.len()) }
            }
            _ => bytes.fill(0),
        }
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: the reference is ours by the type invariant. Mappings hold their own.
        unsafe { own::krab_put_page(self.page.as_ptr()) };
    }
}

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
