// SPDX-License-Identifier: GPL-2.0
//! Dirty rings: pages that were written, one ring for each vCPU, shared with userspace. KVM API "KVM_CAP_DIRTY_LOG_RING".
//!
//! An entry goes from free to dirty (here), to be reset (userspace, after it copied the page), to free (KVM_RESET_DIRTY_RINGS, which
//! catches the next write to the page). A vCPU whose ring is nearly full does not run. Any thread may push; an entry is whole when
//! its flag says dirty, and userspace reads them in order.
#![forbid(unsafe_code)]

use core::sync::atomic::{fence, AtomicU32, Ordering};

use kernel::prelude::*;

use crate::{
    abi::vm::{KVM_DIRTY_GFN_BYTES, KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET, KVM_DIRTY_RING_MAX_ENTRIES},
    glue::page::{SharedPage, UserPage, PAGE_SIZE},
};

/// Entries kept free for what the host writes between two looks at the ring.
const RESERVED: u32 = 64;
const PER_PAGE: u32 = PAGE_SIZE as u32 / KVM_DIRTY_GFN_BYTES;

pub(crate) struct DirtyRing {
    pages: KVec<SharedPage>,
    /// A power of two.
    entries: u32,
    /// Entries kept free for what is written between two looks at the ring.
    reserved: u32,
    /// Entries ever pushed, and ever reset; both wrap around.
    pushed: AtomicU32,
    reset: AtomicU32,
}

/// Entries in a ring of so many bytes, where hardware may note `logged` pages between two looks at it. `EINVAL` where KVM says so: not a
/// power of two, too few, too many.
pub(crate) fn entries_of(bytes: u64, logged: u32) -> Result<u32> {
    let entries = bytes / u64::from(KVM_DIRTY_GFN_BYTES);
    let good = bytes.is_power_of_two() && bytes >= PAGE_SIZE as u64 && entries >= u64::from(RESERVED + logged);
    match u32::try_from(entries) {
        Ok(entries) if good && entries <= KVM_DIRTY_RING_MAX_ENTRIES => Ok(entries),
        Ok(entries) if good && entries > KVM_DIRTY_RING_MAX_ENTRIES => Err(E2BIG),
        _ => Err(EINVAL),
    }
}

impl DirtyRing {
    /// An empty ring. `logged` as for [`entries_of`].
    pub(crate) fn new(entries: u32, logged: u32) -> Result<Self> {
        let count = (entries / PER_PAGE) as usize;
        let mut pages = KVec::with_capacity(count, GFP_KERNEL_ACCOUNT)?;
        for _ in 0..count {
            pages.push(SharedPage::new()?, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(Self { pages, entries, reserved: RESERVED + logged, pushed: AtomicU32::new(0), reset: AtomicU32::new(0) })
    }

    /// Page `index` of the ring, for userspace's mapping.
    pub(crate) fn page(&self, index: u64) -> Option<UserPage> {
        self.pages.get(usize::try_from(index).ok()?).map(SharedPage::user_page)
    }

    /// Entries that are not free.
    pub(crate) fn used(&self) -> u32 {
        self.pushed.load(Ordering::Relaxed).wrapping_sub(self.reset.load(Ordering::Acquire))
    }

    /// Whether the vCPU must wait for userspace.
    pub(crate) fn is_nearly_full(&self) -> bool {
        self.used() >= self.entries.saturating_sub(self.reserved)
    }

    /// Page and offset of an entry.
    fn place(&self, number: u32) -> Option<(&SharedPage, usize)> {
        let index = number & self.entries.wrapping_sub(1);
        let page = self.pages.get((index / PER_PAGE) as usize)?;
        Some((page, (index % PER_PAGE * KVM_DIRTY_GFN_BYTES) as usize))
    }

    /// Adds a page: the slot's number, and the page's in the slot. `false` when there is no room.
    pub(crate) fn push(&self, slot: u32, offset: u64) -> bool {
        let next = |pushed: u32| {
            let used = pushed.wrapping_sub(self.reset.load(Ordering::Acquire));
            (used < self.entries).then_some(pushed.wrapping_add(1))
        };
        let Ok(number) = self.pushed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) else { return false };
        let Some((page, at)) = self.place(number) else { return false };
        page.store(at + 4, slot);
        page.store(at + 8, offset);
        // Who sees the flag sees the rest.
        fence(Ordering::Release);
        page.store(at, KVM_DIRTY_GFN_F_DIRTY);
        true
    }

    /// Frees the entries that userspace is done with, in order. `f` gets the slot's and the page's number, which userspace may have
    /// changed. Returns how many there were. One thread at a time.
    pub(crate) fn collect(&self, mut f: impl FnMut(u32, u64)) -> usize {
        let mut count = 0usize;
        while self.used() > 0 {
            let number = self.reset.load(Ordering::Relaxed);
            let Some((page, at)) = self.place(number) else { break };
            if page.load::<u32>(at) & KVM_DIRTY_GFN_F_RESET == 0 {
                break;
            }
            fence(Ordering::Acquire);
            let (slot, offset) = (page.load(at + 4), page.load(at + 8));
            page.store(at, 0u32);
            self.reset.store(number.wrapping_add(1), Ordering::Release);
            f(slot, offset);
            count = count.wrapping_add(1);
        }
        count
    }
}
