// SPDX-License-Identifier: GPL-2.0
//! The signal mask of KVM_SET_SIGNAL_MASK, in force while a vCPU runs.
use core::marker::PhantomData;

use super::bindings as own;

/// The current thread's signal mask is another one until this is dropped.
pub(crate) struct Masked {
    before: u64,
    not_send: PhantomData<*mut ()>,
}

impl Masked {
    /// Blocks the signals in `mask` (bit N - 1 for signal N) and no others. KILL and STOP cannot be blocked.
    pub(crate) fn new(mask: u64) -> Self {
        // SAFETY: changes only the current thread's mask.
        let before = unsafe { own::krab_set_signal_mask(mask) };
        Self { before, not_send: PhantomData }
    }
}

impl Drop for Masked {
    fn drop(&mut self) {
        // SAFETY: as above; the mask is the one from before.
        unsafe { own::krab_set_signal_mask(self.before) };
    }
}
