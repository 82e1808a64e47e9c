// SPDX-License-Identifier: GPL-2.0
//! Userspace memory of the current process: ioctl arguments and guest memory by host virtual address.
//!
//! Every access checks that the range is a user range and answers EFAULT otherwise. What was read may change at any
//! time: read once, check the copy.
use core::mem::MaybeUninit;
use kernel::{bindings, prelude::*};
use zerocopy::Immutable;

use super::bindings as own;
use crate::arch::Hva;

/// Reads one value; EFAULT if any byte cannot be read. May sleep.
pub fn read<T: FromBytes>(from: Hva) -> Result<T> {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: `value` is valid for writes of its size.
    let left = unsafe { bindings::copy_from_user(value.as_mut_ptr().cast(), from.0 as *const c_void, size_of::<T>()) };
    if left != 0 {
        return Err(EFAULT);
    }
    // SAFETY: every byte was written, and any bytes are a `T`.
    Ok(unsafe { value.assume_init() })
}

/// Writes one value; EFAULT if any byte cannot be written. May sleep.
pub fn write<T: IntoBytes + Immutable + ?Sized>(to: Hva, value: &T) -> Result {
    write_bytes(to, value.as_bytes())
}

/// Reads `count` values; E2BIG when there are more than `limit`. May sleep.
pub fn read_vec<T: FromBytes>(from: Hva, count: usize, limit: usize) -> Result<KVVec<T>> {
    if count > limit {
        return Err(E2BIG);
    }
    let bytes = count.checked_mul(size_of::<T>()).ok_or(E2BIG)?;
    let mut values = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT)?;
    let room: &mut [MaybeUninit<T>] = values.spare_capacity_mut();
    // SAFETY: there is room for `count` values, that is `bytes` bytes.
    if unsafe { bindings::copy_from_user(room.as_mut_ptr().cast(), from.0 as *const c_void, bytes) } != 0 {
        return Err(EFAULT);
    }
    // SAFETY: `count` values fit the capacity and were written in full; any bytes are a `T`.
    unsafe { values.inc_len(count) };
    Ok(values)
}

/// Fills `into` from userspace. May sleep.
pub fn read_bytes(from: Hva, into: &mut [u8]) -> Result {
    // SAFETY: `into` is valid for writes of its length.
    match unsafe { bindings::copy_from_user(into.as_mut_ptr().cast(), from.0 as *const c_void, into.len()) } {
        0 => Ok(()),
        _ => Err(EFAULT),
    }
}

/// Copies `bytes` to userspace. May sleep.
pub fn write_bytes(to: Hva, bytes: &[u8]) -> Result {
    // SAFETY: `bytes` is valid for reads of its length.
    match unsafe { bindings::copy_to_user(to.0 as *mut c_void, bytes.as_ptr().cast(), bytes.len()) } {
        0 => Ok(()),
        _ => Err(EFAULT),
    }
}

/// Like [`read_bytes`] but never sleeps: EFAULT also when the page is not present. For any context but NMI.
pub fn read_bytes_nofault(from: Hva, into: &mut [u8]) -> Result {
    // SAFETY: `into` is valid for writes of its length.
    match unsafe { bindings::copy_from_user_nofault(into.as_mut_ptr().cast(), from.0 as *const c_void, into.len()) } {
        0 => Ok(()),
        _ => Err(EFAULT),
    }
}

/// Like [`write_bytes`] but never sleeps: EFAULT also when the page is not present or not writable yet.
pub fn write_bytes_nofault(to: Hva, bytes: &[u8]) -> Result {
    // SAFETY: `bytes` is valid for reads of its length.
    match unsafe { bindings::copy_to_user_nofault(to.0 as *mut c_void, bytes.as_ptr().cast(), bytes.len()) } {
        0 => Ok(()),
        _ => Err(EFAULT),
    }
}

/// One naturally aligned 64-bit read that never sleeps; a page-table entry, for example.
#[inline]
pub fn read_u64_nofault(from: Hva) -> Result<u64> {
    let mut value = 0;
    // SAFETY: `value` is valid for writes; the helper checks the user address.
    match unsafe { own::krab_read_user_u64_nofault(&mut value, from.0 as *const u64) } {
        0 => Ok(value),
        _ => Err(EFAULT),
    }
}

/// Atomically replaces the `size` (1, 2, 4 or 8) bytes at `at` by `new` if they equal `old`: `Ok(None)` when replaced,
/// `Ok(Some(found))` when they differ. EFAULT when not accessible; EINVAL for another size or when the bytes straddle a
/// cache line, because a split lock can kill the host. May sleep, unless page faults are off.
pub fn compare_exchange(at: Hva, size: u32, old: u64, new: u64) -> Result<Option<u64>> {
    const CACHE_LINE: u64 = 64;
    if at.0 % CACHE_LINE + u64::from(size.min(16)) > CACHE_LINE {
        return Err(EINVAL);
    }
    let mut seen = old;
    // SAFETY: `seen` is valid for reads and writes; the helper checks the user address and the size.
    match unsafe { own::krab_cmpxchg_user(at.0 as *mut c_void, &mut seen, new, size) } {
        0 => Ok(None),
        1 => Ok(Some(seen)),
        error => Err(Error::from_errno(error)),
    }
}

/// Runs `f` with page faults off: user accesses in it fail with EFAULT instead of sleeping. Nests.
pub fn with_faults_off<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: balanced by the enable below; code here does not unwind.
    unsafe { own::krab_pagefault_disable() };
    let result = f();
    // SAFETY: pairs with the disable above.
    unsafe { own::krab_pagefault_enable() };
    result
}
