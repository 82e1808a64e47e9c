// SPDX-License-Identifier: GPL-2.0
//! Pages of nested page tables: a stock filled where sleeping is allowed, tables in use, and tables retired until the TLBs
//! have been flushed. Implements the pure room's `Tables`.
//!
//! Fault path: [`TablePages::short_of`] says what is missing, [`TableStock::allocate`] gets it without the lock,
//! [`TablePages::refill`] hands it over under the lock. After a TLB flush [`TablePages::take_retired`] gives the pages to free.
use core::{
    ptr,
    sync::atomic::{AtomicU64, Ordering},
};
use kernel::{bindings, prelude::*};

use super::page::{direct_map, hpa_to_page, page_to_hpa, PAGE_SIZE};
use crate::{arch::Hpa, mmu::nested::Tables};

/// Entries in a table.
const ENTRIES: usize = 512;

/// A stack of free pages, linked through their descriptors (`lru.next`).
///
/// # Invariants
///
/// Owns the `count` order-0 pages that the chain from `head` passes; nobody else knows them.
struct Chain {
    head: *mut bindings::page,
    count: usize,
}

/// The list links of a page that its owner may use.
///
/// # Safety
///
/// `page` must be an order-0 page that the caller owns.
unsafe fn links(page: *mut bindings::page) -> *mut bindings::list_head {
    // SAFETY: the caller owns the page, so its `lru` field is his.
    unsafe { &raw mut (*page).__bindgen_anon_1.__bindgen_anon_1.__bindgen_anon_1.lru }
}

/// The word of a page descriptor that its owner may use.
///
/// # Safety
///
/// `page` must be the address of a page descriptor.
unsafe fn tag_of(page: *mut bindings::page) -> *mut usize {
    // SAFETY: the caller's promise.
    unsafe { (&raw mut (*page).__bindgen_anon_1.__bindgen_anon_1.private).cast() }
}

impl Chain {
    const EMPTY: Self = Self { head: ptr::null_mut(), count: 0 };

    /// # Safety
    ///
    /// The caller gives away an order-0 page that he owns.
    unsafe fn push(&mut self, page: *mut bindings::page) {
        // SAFETY: owned by the caller.
        unsafe { (*links(page)).next = self.head.cast() };
        self.head = page;
        self.count = self.count.wrapping_add(1);
    }

    /// A page that is the caller's from now on.
    fn pop(&mut self) -> Option<*mut bindings::page> {
        let page = self.head;
        if page.is_null() {
            return None;
        }
        // SAFETY: the chain owns its pages.
        self.head = unsafe { (*links(page)).next }.cast();
        self.count = self.count.wrapping_sub(1);
        Some(page)
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        while let Some(page) = self.pop() {
            // SAFETY: the page is ours and of order 0.
            unsafe { bindings::__free_pages(page, 0) };
        }
    }
}

// SAFETY: the chain owns its pages.
unsafe impl Send for Chain {}

/// Zeroed pages on their way into a [`TablePages`]; the drop frees what is left.
pub struct TableStock(Chain);

impl TableStock {
    /// Allocates `count` zeroed pages, charged to the caller's memory cgroup. May sleep.
    pub fn allocate(count: usize) -> Result<Self> {
        let mut chain = Chain::EMPTY;
        while chain.count < count {
            // SAFETY: process context; the result is checked.
            let page = unsafe { bindings::alloc_pages(bindings::GFP_KERNEL_ACCOUNT | bindings::__GFP_ZERO, 0) };
            if page.is_null() {
                return Err(ENOMEM);
            }
            // SAFETY: fresh from the allocator.
            unsafe { chain.push(page) };
        }
        Ok(Self(chain))
    }
}

/// Tables that are out of use; the drop frees them. Only to be dropped once no TLB and no page walker uses them.
pub struct RetiredTables(#[allow(dead_code)] Chain);

/// One VM's table pages. To be kept under the lock that guards the tables.
///
/// # Invariants
///
/// - Every page in `stock`, `retired` and on the circle around `live` is an order-0 page owned by this value.
/// - Those on the circle, and only those, have `tag` in their descriptor's private word. Nobody but the owner of a page writes
///   that word, it is cleared when the page leaves the circle, and no tag is given twice: so a descriptor with our tag means
///   that the page is a table of ours in use.
/// - `live` is the circle's anchor: null links mean an empty circle. Linked pages point at each other, never at the anchor, so
///   the value may move.
pub struct TablePages {
    stock: Chain,
    retired: Chain,
    live: *mut bindings::page,
    tag: usize,
    first: u64,
    last: u64,
}

// SAFETY: the value owns its pages.
unsafe impl Send for TablePages {}

impl TablePages {
    /// An empty allocator.
    pub fn new() -> Self {
        static NEXT_TAG: AtomicU64 = AtomicU64::new(0);
        // The low bits make a chance match with a pointer or a small number impossible.
        let tag = NEXT_TAG.fetch_add(1, Ordering::Relaxed).wrapping_mul(4).wrapping_add(0x6b72_6162_0000_0003) as usize;
        // INVARIANT: no pages at all.
        Self { stock: Chain::EMPTY, retired: Chain::EMPTY, live: ptr::null_mut(), tag, first: u64::MAX, last: 0 }
    }

    /// How many pages are missing to have `want` in stock.
    #[inline]
    pub fn short_of(&self, want: usize) -> usize {
        want.saturating_sub(self.stock.count)
    }

    /// Moves pages into the stock.
    pub fn refill(&mut self, mut stock: TableStock) {
        while let Some(page) = stock.0.pop() {
            let hpa = page_to_hpa(page).0;
            self.first = self.first.min(hpa);
            self.last = self.last.max(hpa);
            // SAFETY: `pop` made the page ours.
            unsafe { self.stock.push(page) };
        }
    }

    /// Whether tables wait to be freed after a TLB flush.
    #[inline]
    pub fn has_retired(&self) -> bool {
        self.retired.count != 0
    }

    /// Takes the retired tables out. They may be dropped when TLBs have been flushed.
    pub fn take_retired(&mut self) -> RetiredTables {
        RetiredTables(core::mem::replace(&mut self.retired, Chain::EMPTY))
    }

    /// The page of `table` if it is one of ours.
    #[inline]
    fn owned(&self, table: Hpa) -> Option<*mut bindings::page> {
        if table.0 < self.first || table.0 > self.last || table.page_offset() != 0 {
            return None;
        }
        let page = hpa_to_page(table);
        // SAFETY: the frame lies between two frames of RAM that we own, where the kernel keeps page descriptors; the word is
        // only compared. (A hole in between would fault, not lie.)
        (unsafe { ptr::read_volatile(tag_of(page)) } == self.tag).then_some(page)
    }

    #[inline]
    fn entry(&self, table: Hpa, index: usize) -> Option<&AtomicU64> {
        self.owned(table)?;
        let entry = direct_map(table).cast::<u64>().wrapping_add(index % ENTRIES);
        // SAFETY: the page is ours, so it lives as long as `self` is borrowed; hardware and others access it atomically.
        Some(unsafe { AtomicU64::from_ptr(entry) })
    }

    fn unlink(&mut self, page: *mut bindings::page) {
        // SAFETY: the page and its neighbours are ours. INVARIANT: the page loses the tag and its place on the circle.
        unsafe {
            *tag_of(page) = 0;
            let at = links(page);
            let (next, prev) = ((*at).next.cast::<bindings::page>(), (*at).prev.cast::<bindings::page>());
            if next == page {
                self.live = ptr::null_mut();
            } else {
                (*links(next)).prev = prev.cast();
                (*links(prev)).next = next.cast();
                if self.live == page {
                    self.live = next;
                }
            }
        }
    }
}

/// A name that is not one of our tables in use reads as zero and is not written.
impl Tables for TablePages {
    #[inline]
    fn read(&self, table: Hpa, index: usize) -> u64 {
        self.entry(table, index).map_or(0, |entry| entry.load(Ordering::Relaxed))
    }

    #[inline]
    fn write(&mut self, table: Hpa, index: usize, value: u64) {
        if let Some(entry) = self.entry(table, index) {
            entry.store(value, Ordering::Release);
        }
    }

    #[inline]
    fn compare_exchange(&mut self, table: Hpa, index: usize, old: u64, new: u64) -> core::result::Result<(), u64> {
        let entry = self.entry(table, index).ok_or(0u64)?;
        entry.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).map(|_| ())
    }

    fn alloc(&mut self) -> Option<Hpa> {
        let page = self.stock.pop()?;
        // SAFETY: the page and everything on the circle are ours. INVARIANT: the page gets the tag and a place on the circle.
        unsafe {
            *tag_of(page) = self.tag;
            let at = links(page);
            if self.live.is_null() {
                (*at).next = page.cast();
                (*at).prev = page.cast();
                self.live = page;
            } else {
                let before = links(self.live);
                let after = (*before).next;
                (*at).next = after;
                (*at).prev = self.live.cast();
                (*before).next = page.cast();
                (*links(after.cast())).prev = page.cast();
            }
        }
        Some(page_to_hpa(page))
    }

    fn retire(&mut self, table: Hpa) {
        if let Some(page) = self.owned(table) {
            self.unlink(page);
            // SAFETY: the page is ours and off the circle.
            unsafe { self.retired.push(page) };
        }
    }
}

impl Drop for TablePages {
    fn drop(&mut self) {
        while !self.live.is_null() {
            let page = self.live;
            self.unlink(page);
            // SAFETY: the page is ours and off the circle.
            unsafe { self.retired.push(page) };
        }
    }
}

const _: () = assert!(ENTRIES * size_of::<u64>() == PAGE_SIZE);
