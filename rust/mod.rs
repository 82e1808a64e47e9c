// SPDX-License-Identifier: GPL-2.0
//! Kernel glue: the only room that touches `bindings::`, C or kernel services.

mod bindings;

/// test
pub(crate) fn tsc() -> u64 {
    // SAFETY: RDTSC has no preconditions.
    unsafe { bindings::krab_rdtsc() }
}
