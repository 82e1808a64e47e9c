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
/// `memory` is one slab or page allocation, so it is contiguous, and aligned as `T` asks (4 KiB for what hardware takes). `address` is its
/// physical address.
pub(crate) struct PhysBox<T> {
    memory: KBox<T>,
    address: Hpa,
}

impl<T: Zeroable> PhysBox<T> {
    /// Allocates; may sleep. The size of `T` must be a power of two: that is what makes the allocator align it.
    pub(crate) fn new() -> Result<Self> {
        const { assert!(core::mem::size_of::<T>().is_power_of_two()) };
        let memory: KBox<T> = KBox::zeroed(GFP_KERNEL_ACCOUNT)?;
        // SAFETY: the pointer is to the linear map, as every slab allocation is.
        let address = Hpa(unsafe { bindings::krab_virt_to_phys((&raw const *memory).cast()) });
        Ok(Self { memory, address })
    }

    /// Where hardware finds it.
    #[inline]
    pub(crate) fn address(&self) -> Hpa {
        self.address
    }
}

impl<T> Deref for PhysBox<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.memory
    }
}

impl<T> DerefMut for PhysBox<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.memory
    }
}

// SAFETY: every field is made of integers.
unsafe impl Zeroable for crate::irqchip::lapic::PostedInterrupts {}

/// `N` bytes for hardware: permission maps, save areas.
#[derive(Zeroable)]
#[repr(C, align(4096))]
pub(crate) struct Bytes<const N: usize>(pub(crate) [u8; N]);
