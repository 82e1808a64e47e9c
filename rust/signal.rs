// SPDX-License-Identifier: GPL-2.0
//! Signals of the current thread: the mask of KVM_SET_SIGNAL_MASK, in force while a vCPU runs, and the one for broken memory.
use core::marker::PhantomData;

use super::bindings as own;
use crate::arch::Hva;

/// Sends SIGBUS (BUS_MCEERR_AR) to the current thread: the page at `hva` is broken, and the guest wants it.
pub(crate) fn memory_is_broken(hva: Hva) {
    // SAFETY: the address is only told.
    unsafe { own::krab_send_memory_error(hva.0) };
}

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
