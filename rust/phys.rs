// SPDX-License-Identifier: GPL-2.0
//! Memory that hardware reads and writes by physical address.
use core::ops::{Deref, DerefMut};

use kernel::prelude::*;

use super::bindings;
use crate::arch::Hpa;

/// A zeroed, physically contiguous `T` whose physical address hardware is told.
///
/// # Invariants
///
/// The memory is one slab or page allocation, so it is contiguous, and aligned as `T` asks (4 KiB for what hardware takes).
pub(crate) struct PhysBox<T>(KBox<T>);

impl<T: Zeroable> PhysBox<T> {
    /// Allocates; may sleep. The size of `T` must be a power of two: that is what makes the allocator align it.
    pub(crate) fn new() -> Result<Self> {
        const { assert!(core::mem::size_of::<T>().is_power_of_two()) };
        Ok(Self(KBox::zeroed(GFP_KERNEL_ACCOUNT)?))
    }

    /// Where hardware finds it.
    #[inline]
    pub(crate) fn address(&self) -> Hpa {
        // SAFETY: the pointer is to the linear map, as every slab allocation is.
        Hpa(unsafe { bindings::krab_virt_to_phys((&raw const *self.0).cast()) })
    }
}

impl<T> Deref for PhysBox<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for PhysBox<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

/// `N` bytes for hardware: permission maps, save areas.
#[derive(Zeroable)]
#[repr(C, align(4096))]
pub(crate) struct Bytes<const N: usize>(pub(crate) [u8; N]);
