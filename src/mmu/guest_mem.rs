// SPDX-License-Identifier: GPL-2.0
//! Access to guest physical memory, as the walker and the emulator need it. The kernel side implements it over the
//! memory slots.
#![forbid(unsafe_code)]

use crate::arch::Gpa;

/// Why an access to guest memory did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No slot, or its host memory is gone: the guest sees a device there.
    NotRam,
    /// A write to a read-only slot.
    ReadOnly,
    /// The host page is not there yet, and the caller may not sleep: again from where one may.
    NotNow,
}

/// Guest physical memory. Multi-byte values are little-endian, and the single values must be aligned.
pub trait GuestMem {
    /// One single-copy atomic load of an aligned 64-bit value.
    fn read_u64(&self, gpa: Gpa) -> Result<u64, Refused>;
    /// One single-copy atomic load of an aligned 32-bit value.
    fn read_u32(&self, gpa: Gpa) -> Result<u32, Refused>;
    /// Stores `new` if the value is still `old`, atomically, and says whether it was. Counts as a guest write.
    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Result<bool, Refused>;
    /// Like [`Self::compare_exchange_u64`] for 32 bits.
    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Result<bool, Refused>;
    /// Fills `bytes`; the range may span pages and slots. On an error part of it may have been filled.
    fn read(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), Refused>;
    /// Writes `bytes`; the range may span pages and slots. On an error part of it may have been written.
    fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Refused>;
}
