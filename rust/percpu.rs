// SPDX-License-Identifier: GPL-2.0
//! Data of which every CPU has its own.
use kernel::prelude::*;

use super::cpu::{self, IrqsOff};

/// One `T` for each possible CPU.
///
/// # Invariants
///
/// The vector has an element for every possible CPU number, and a CPU's element is only reached on that CPU with interrupts off.
pub(crate) struct PerCpu<T>(KVVec<T>);

// SAFETY: by the type's invariant no element is ever reached by two CPUs at a time.
unsafe impl<T: Send> Sync for PerCpu<T> {}

impl<T> PerCpu<T> {
    /// Makes every element with `make`.
    pub(crate) fn new(mut make: impl FnMut() -> Result<T>) -> Result<Self> {
        let mut elements = KVVec::with_capacity(cpu::ids(), GFP_KERNEL)?;
        for _ in 0..cpu::ids() {
            elements.push(make()?, GFP_KERNEL)?;
        }
        Ok(Self(elements))
    }

    /// This CPU's element.
    #[inline]
    pub(crate) fn get<'a>(&'a self, _irqs: &'a IrqsOff) -> &'a T {
        // SAFETY: by the type's invariant the current CPU's number is in range.
        unsafe { self.0.get_unchecked(cpu::current()) }
    }
}
