// SPDX-License-Identifier: GPL-2.0
//! Nested page tables: what guest physical memory means in host physical memory.
//!
//! One writer at a time (the caller's lock), any number of hardware walks at the same time. So every store leaves the
//! tables in a state that hardware may use: a table is filled before it is linked, a page that is split reads the
//! same before and after, and an unlinked table is handed to [`Tables::retire`], which keeps it until the TLBs have
//! been flushed. Hardware sets accessed and dirty bits behind the writer's back; where that can happen, entries
//! change by compare-and-exchange.
//!
//! Dirty logging catches the next write to a page: without write permission it faults, without a dirty bit hardware logs
//! it, where it can. Large pages lose their write permission in both cases, and the fault maps 4 KiB, which splits the
//! page. Nothing is allocated to catch.
#![forbid(unsafe_code)]

use super::format::{Format, Prot};
use crate::arch::paging::{Level, ADDRESS, ENTRIES, INDEX_BITS};
use crate::arch::{Gfn, Hpa};
use core::marker::PhantomData;

/// Access to the pages that hold the tables. `index` is always below 512.
pub trait Tables {
    /// One aligned 64-bit load.
    fn read(&self, table: Hpa, index: usize) -> u64;
    /// One aligned 64-bit store, after everything stored before it.
    fn write(&mut self, table: Hpa, index: usize, entry: u64);
    /// Stores `new` if the entry is still `old`, atomically; otherwise returns what it is.
    fn compare_exchange(&mut self, table: Hpa, index: usize, old: u64, new: u64) -> Result<(), u64>;
    /// A zeroed page, from a stock that the caller filled beforehand: this runs under his lock. `None`: the stock is
    /// empty.
    fn alloc(&mut self) -> Option<Hpa>;
    /// Takes a table that is no longer linked. Hardware may still use it until the TLBs have been flushed.
    fn retire(&mut self, table: Hpa);
}

/// Most tables that one [`NestedTable::map`] or [`NestedTable::map_around`] can need.
pub const TABLES_PER_MAP: usize = 4;

/// What a mapping operation did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapped {
    /// Something was written: otherwise the fault was spurious, another CPU was faster.
    pub changed: bool,
    /// Old translations may be cached that the tables no longer allow.
    pub flush: bool,
}

/// Why a page was not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// [`Tables::alloc`] had nothing: refill the stock and try again.
    OutOfTables,
    /// The frame is past what the root's depth can address.
    BeyondRoot,
    /// Guest frame and host page differ in their offset within a page of that size.
    Misaligned,
}

/// How far a bounded operation came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// A TLB flush is owed.
    pub flush: bool,
    /// Where to go on; `None` when all is done.
    pub next: Option<Gfn>,
}

/// How the next write to a page gets noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Catch {
    /// The page loses its write permission.
    Fault,
    /// A page of 4 KiB loses its dirty bit, and hardware logs that it sets it. A larger one loses its write permission.
    Log,
}

/// What a frame translates to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The 4 KiB host page of this frame, also inside a larger page.
    pub hpa: Hpa,
    pub level: Level,
    pub write: bool,
    pub execute: bool,
    pub accessed: bool,
    pub dirty: bool,
}

/// One tree of nested tables in format `F`.
#[derive(Debug)]
pub struct NestedTable<F: Format> {
    root: Hpa,
    depth: u32,
    no_large_execute: bool,
    format: PhantomData<F>,
}

/// Where an entry is.
#[derive(Clone, Copy)]
struct Place {
    table: Hpa,
    index: usize,
}

/// log2 of the pages that one entry covers at `depth`. Wrapping, because the kernel would check what cannot happen.
#[inline]
const fn shift_of(depth: u32) -> u32 {
    depth.wrapping_sub(1).wrapping_mul(INDEX_BITS)
}

/// Index of `gfn` in its table at `depth` (1: the lowest).
#[inline]
const fn index_at(gfn: u64, depth: u32) -> usize {
    gfn.wrapping_shr(shift_of(depth)) as usize & (ENTRIES - 1)
}

/// Pages that one entry covers at `depth`.
#[inline]
const fn span(depth: u32) -> u64 {
    1_u64.wrapping_shl(shift_of(depth))
}

#[inline]
const fn level_at(depth: u32) -> Level {
    match depth {
        0 | 1 => Level::Page4K,
        2 => Level::Page2M,
        _ => Level::Page1G,
    }
}

#[inline]
fn is_leaf<F: Format>(entry: u64, depth: u32) -> bool {
    depth == 1 || entry & F::LARGE != 0
}

/// Whether `entry` permits all that `leaf` does.
#[inline]
fn allows<F: Format>(entry: u64, leaf: u64) -> bool {
    (F::widen(entry, leaf) ^ entry) & !(F::ACCESSED | F::DIRTY) == 0
}

/// Changes a present page entry from `old` to `change(old)`, without losing what hardware sets meanwhile.
#[inline]
fn update<F: Format, T: Tables>(tables: &mut T, at: Place, mut old: u64, change: impl Fn(u64) -> u64) {
    let volatile = F::ACCESSED | F::DIRTY;
    // Hardware sets two bits and clears none, and nobody else writes: the third attempt cannot fail.
    for _ in 0..4 {
        if old & volatile == volatile {
            // Nothing left for hardware to set: a plain store does.
            break;
        }
        match tables.compare_exchange(at.table, at.index, old, change(old)) {
            Ok(()) => return,
            Err(now) => old = now,
        }
    }
    tables.write(at.table, at.index, change(old));
}

impl<F: Format> NestedTable<F> {
    /// An empty tree of `depth` levels, 4 or 5. `no_large_execute`: large pages are never executable, for CPUs with
    /// the machine-check erratum on page size changes.
    pub fn new<T: Tables>(tables: &mut T, depth: u32, no_large_execute: bool) -> Option<Self> {
        let root = tables.alloc()?;
        Some(Self { root, depth: depth.clamp(4, 5), no_large_execute, format: PhantomData })
    }

    /// The table that hardware starts from.
    #[inline]
    pub fn root(&self) -> Hpa {
        self.root
    }

    /// Levels of the tree.
    #[inline]
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// First frame that the tree cannot address.
    #[inline]
    pub fn end(&self) -> Gfn {
        Gfn(span(self.depth.wrapping_add(1)))
    }

    /// The level to map a fault at: `allowed` by slot and host page, unless an instruction fetch must stay small.
    #[inline]
    pub fn fault_level(&self, allowed: Level, execute: bool) -> Level {
        if execute && self.no_large_execute {
            Level::Page4K
        } else {
            allowed
        }
    }

    /// Maps the page of size `level` around `gfn`, given the host page `hpa` of `gfn` itself: both are rounded down.
    ///
    /// On the same host page permissions are only ever added: use [`Self::catch_writes_in_range`] or
    /// [`Self::unmap_range`] to take some away. A larger page in the way is split, smaller ones are replaced.
    pub fn map<T: Tables>(
        &mut self,
        tables: &mut T,
        gfn: Gfn,
        hpa: Hpa,
        level: Level,
        mut prot: Prot,
    ) -> Result<Mapped, MapError> {
        let target = level as u32;
        let inside = level.bytes() - 1;
        if ((gfn.gpa().0 ^ hpa.0) & inside) >> 12 != 0 {
            return Err(MapError::Misaligned);
        }
        if self.no_large_execute && level > Level::Page4K {
            prot.execute = false;
        }
        let leaf = F::leaf(Hpa(hpa.0 & !inside), level, prot);
        let Some(table) = self.descend_to_map(tables, gfn, target, hpa, leaf)? else {
            return Ok(Mapped::default());
        };
        Ok(self.install(tables, Place { table, index: index_at(gfn.0, target) }, target, leaf))
    }

    /// Maps 4 KiB pages next to each other, where nothing is mapped yet: `pages[0]` at `first` and so on. `None` is
    /// left out, and so is everything past the end of the lowest table that holds `first`. No flush is ever owed.
    pub fn map_around<T: Tables>(
        &mut self,
        tables: &mut T,
        first: Gfn,
        pages: &[Option<Hpa>],
        prot: Prot,
    ) -> Result<(), MapError> {
        if first.0 >= self.end().0 {
            return Err(MapError::BeyondRoot);
        }
        let mut table = self.root;
        let mut depth = self.depth;
        while depth > 1 {
            let at = Place { table, index: index_at(first.0, depth) };
            let entry = tables.read(at.table, at.index);
            table = match F::present(entry) {
                true if is_leaf::<F>(entry, depth) => return Ok(()),
                true => F::address(entry),
                false => self.grow(tables, at)?,
            };
            depth = depth.wrapping_sub(1);
        }
        let bits = F::leaf(Hpa(0), Level::Page4K, prot);
        for (index, page) in (index_at(first.0, 1)..ENTRIES).zip(pages) {
            if let Some(page) = page {
                if !F::present(tables.read(table, index)) {
                    tables.write(table, index, bits | (page.0 & ADDRESS));
                }
            }
        }
        Ok(())
    }

    /// What `gfn` translates to.
    pub fn lookup<T: Tables>(&self, tables: &T, gfn: Gfn) -> Option<Leaf> {
        let (_, entry, depth) = self.find(tables, gfn)?;
        Some(Leaf {
            hpa: Hpa(F::address(entry).0 | ((gfn.0 & (span(depth) - 1)) << 12)),
            level: level_at(depth),
            write: entry & F::WRITABLE != 0,
            execute: F::executable(entry),
            accessed: entry & F::ACCESSED != 0,
            dirty: entry & F::DIRTY != 0,
        })
    }

    /// Unmaps every page that has a frame among `count` from `start`: a large page goes whole, accessed and dirty bits
    /// with it. Tables that the range covers go too. Returns whether a flush is owed.
    pub fn unmap_range<T: Tables>(&mut self, tables: &mut T, start: Gfn, count: u64) -> bool {
        self.unmap_some(tables, start, count, usize::MAX).flush
    }

    /// Like [`Self::unmap_range`], but stops after removing `budget` (at least one) pages or tables.
    pub fn unmap_some<T: Tables>(&mut self, tables: &mut T, start: Gfn, count: u64, budget: usize) -> Progress {
        let end = start.0.saturating_add(count).min(self.end().0);
        let mut zap = Zap { start: start.0, end, budget: budget.max(1), flush: false };
        let next = if start.0 < end { zap.table::<F, T>(tables, self.root, self.depth, 0) } else { None };
        Progress { flush: zap.flush, next: next.map(Gfn) }
    }

    /// Frees everything, the root last, in steps of `budget` removals; call it until it returns `true`. After that
    /// the tree must not be used. No CPU may be running on it.
    pub fn destroy<T: Tables>(&mut self, tables: &mut T, budget: usize) -> bool {
        let done = self.unmap_some(tables, Gfn(0), self.end().0, budget).next.is_none();
        if done {
            tables.retire(self.root);
        }
        done
    }

    /// Sees to it that the next write to every page that has a frame among `count` from `start` is noticed. Returns whether a
    /// flush is owed, before which writes may still go unnoticed.
    pub fn catch_writes_in_range<T: Tables>(&mut self, tables: &mut T, start: Gfn, count: u64, by: Catch) -> bool {
        let mut flush = false;
        self.for_each_leaf(tables, start, count, &mut |tables: &mut T, at, entry, (_, pages)| {
            flush |= catch_writes::<F, T>(tables, at, entry, if pages > 1 { Catch::Fault } else { by });
        });
        flush
    }

    /// The same for the pages of the frames `base + n`, for every bit `n` set in `mask`.
    pub fn catch_writes<T: Tables>(&mut self, tables: &mut T, base: Gfn, mask: u64, by: Catch) -> bool {
        let mut flush = false;
        let mut left = mask;
        while left != 0 {
            let gfn = base.0.saturating_add(u64::from(left.trailing_zeros()));
            if gfn >= self.end().0 {
                break;
            }
            // The bits from `gfn` to the end of its lowest table: one walk serves them all.
            let first = left.trailing_zeros();
            let room = (ENTRIES - index_at(gfn, 1)) as u32;
            let here = match room.checked_add(first) {
                Some(end) if end < 64 => left & ((1 << end) - 1),
                _ => left,
            };
            left &= !here;
            let Some((at, entry, depth)) = self.find_lowest(tables, Gfn(gfn)) else { continue };
            if depth > 1 {
                flush |= catch_writes::<F, T>(tables, at, entry, Catch::Fault);
                continue;
            }
            let mut bits = here >> first;
            while bits != 0 {
                let at = Place { table: at.table, index: (at.index + bits.trailing_zeros() as usize) & (ENTRIES - 1) };
                let entry = tables.read(at.table, at.index);
                if F::present(entry) {
                    flush |= catch_writes::<F, T>(tables, at, entry, by);
                }
                bits &= bits - 1;
            }
        }
        flush
    }

    /// Clears the accessed bits of the pages that have a frame among `count` from `start`. Returns whether one was
    /// set. Until a flush, a CPU with a cached translation may not set it again: that is for the caller to weigh.
    pub fn clear_accessed<T: Tables>(&mut self, tables: &mut T, start: Gfn, count: u64) -> bool {
        let mut young = false;
        self.for_each_leaf(tables, start, count, &mut |tables: &mut T, at, entry, _| {
            if entry & F::ACCESSED != 0 {
                young = true;
                update::<F, T>(tables, at, entry, |entry| entry & !F::ACCESSED);
            }
        });
        young
    }

    /// Whether a page that has a frame among `count` from `start` has been accessed.
    pub fn test_accessed<T: Tables>(&self, tables: &mut T, start: Gfn, count: u64) -> bool {
        let mut young = false;
        self.for_each_leaf(tables, start, count, &mut |_: &mut T, _, entry, _| young |= entry & F::ACCESSED != 0);
        young
    }

    /// Whether a page that has a frame among `count` from `start` is mapped: it was used, where hardware does not say so itself.
    pub fn maps_any<T: Tables>(&self, tables: &mut T, start: Gfn, count: u64) -> bool {
        let mut mapped = false;
        self.for_each_leaf(tables, start, count, &mut |_: &mut T, _, _, _| mapped = true);
        mapped
    }

    /// The table at `target` on the way to `gfn`, with tables made and large pages split on the way. `None`: a larger
    /// page already gives what `leaf` wants for the host page `hpa`.
    #[inline]
    fn descend_to_map<T: Tables>(
        &mut self,
        tables: &mut T,
        gfn: Gfn,
        target: u32,
        hpa: Hpa,
        leaf: u64,
    ) -> Result<Option<Hpa>, MapError> {
        if gfn.0 >= self.end().0 {
            return Err(MapError::BeyondRoot);
        }
        let mut table = self.root;
        let mut depth = self.depth;
        while depth > target {
            let at = Place { table, index: index_at(gfn.0, depth) };
            let entry = tables.read(at.table, at.index);
            table = if !F::present(entry) {
                self.grow(tables, at)?
            } else if !is_leaf::<F>(entry, depth) {
                F::address(entry)
            } else {
                let same = F::address(entry).0 == hpa.page_base().0 & !(span(depth) << 12).wrapping_sub(1);
                if same && allows::<F>(entry, leaf) {
                    return Ok(None);
                }
                self.split(tables, at, entry, depth)?
            };
            depth = depth.wrapping_sub(1);
        }
        Ok(Some(table))
    }

    /// Links an empty table.
    #[cold]
    fn grow<T: Tables>(&mut self, tables: &mut T, at: Place) -> Result<Hpa, MapError> {
        let table = tables.alloc().ok_or(MapError::OutOfTables)?;
        tables.write(at.table, at.index, F::table(table));
        Ok(table)
    }

    /// Replaces a large page by a table that says the same. No flush is owed: a cached translation stays right.
    #[cold]
    fn split<T: Tables>(&mut self, tables: &mut T, at: Place, mut entry: u64, depth: u32) -> Result<Hpa, MapError> {
        let table = tables.alloc().ok_or(MapError::OutOfTables)?;
        let step = span(depth - 1) << 12;
        // Again if hardware sets the accessed or dirty bit meanwhile, which it does at most once each.
        for _ in 0..4 {
            let mut page = if depth == 2 { entry & !F::LARGE } else { entry };
            for index in 0..ENTRIES {
                tables.write(table, index, page);
                page = page.wrapping_add(step);
            }
            match tables.compare_exchange(at.table, at.index, entry, F::table(table)) {
                Ok(()) => break,
                Err(now) => entry = now,
            }
        }
        Ok(table)
    }

    /// Puts `leaf` in its place at `depth`.
    #[inline]
    fn install<T: Tables>(&mut self, tables: &mut T, at: Place, depth: u32, leaf: u64) -> Mapped {
        let old = tables.read(at.table, at.index);
        if !F::present(old) {
            tables.write(at.table, at.index, leaf);
            return Mapped { changed: true, flush: false };
        }
        if !is_leaf::<F>(old, depth) {
            tables.write(at.table, at.index, leaf);
            retire_tree::<F, T>(tables, F::address(old), depth - 1);
            return Mapped { changed: true, flush: true };
        }
        if F::address(old) != F::address(leaf) {
            tables.write(at.table, at.index, leaf);
            return Mapped { changed: true, flush: true };
        }
        if F::widen(old, leaf) == old {
            return Mapped::default();
        }
        update::<F, T>(tables, at, old, |old| F::widen(old, leaf));
        Mapped { changed: true, flush: false }
    }

    /// The page entry of `gfn`: its place, the entry and its depth.
    #[inline]
    fn find<T: Tables>(&self, tables: &T, gfn: Gfn) -> Option<(Place, u64, u32)> {
        self.find_lowest(tables, gfn).filter(|(_, entry, _)| F::present(*entry))
    }

    /// Like [`Self::find`], but an absent entry counts if it is in a table of the lowest level.
    #[inline]
    fn find_lowest<T: Tables>(&self, tables: &T, gfn: Gfn) -> Option<(Place, u64, u32)> {
        if gfn.0 >= self.end().0 {
            return None;
        }
        let mut table = self.root;
        let mut depth = self.depth;
        loop {
            let at = Place { table, index: index_at(gfn.0, depth) };
            let entry = tables.read(at.table, at.index);
            if is_leaf::<F>(entry, depth) {
                return Some((at, entry, depth));
            }
            if !F::present(entry) {
                return None;
            }
            table = F::address(entry);
            depth = depth.wrapping_sub(1);
        }
    }

    /// Calls `visit(tables, place, entry, (first frame, frames))` for every page with a frame in the range.
    #[inline]
    fn for_each_leaf<T: Tables>(
        &self,
        tables: &mut T,
        start: Gfn,
        count: u64,
        visit: &mut impl FnMut(&mut T, Place, u64, (u64, u64)),
    ) {
        let end = start.0.saturating_add(count).min(self.end().0);
        if start.0 < end {
            visit_leaves::<F, T>(tables, self.root, self.depth, 0, (start.0, end), visit);
        }
    }
}

/// Takes away what lets a write to the page of `entry` go unnoticed. Returns whether there was anything.
#[inline]
fn catch_writes<F: Format, T: Tables>(tables: &mut T, at: Place, entry: u64, by: Catch) -> bool {
    // Without write permission the dirty bit goes as well: who gives the permission back need not know that the page was dirty.
    let (tells, gone) = match by {
        Catch::Fault => (F::WRITABLE, F::WRITABLE | F::DIRTY),
        Catch::Log => (F::DIRTY, F::DIRTY),
    };
    let unnoticed = entry & tells != 0;
    if unnoticed {
        update::<F, T>(tables, at, entry, |entry| entry & !gone);
    }
    unnoticed
}

/// The indices of the table at `base` that have frames in `range`, which overlaps the table.
#[inline]
fn indices(base: u64, depth: u32, range: (u64, u64)) -> core::ops::RangeInclusive<usize> {
    let last = base.wrapping_add(span(depth.wrapping_add(1)).wrapping_sub(1));
    index_at(range.0.max(base), depth)..=index_at(range.1.wrapping_sub(1).min(last), depth)
}

fn visit_leaves<F: Format, T: Tables>(
    tables: &mut T,
    table: Hpa,
    depth: u32,
    base: u64,
    range: (u64, u64),
    visit: &mut impl FnMut(&mut T, Place, u64, (u64, u64)),
) {
    for index in indices(base, depth, range) {
        let entry = tables.read(table, index);
        if !F::present(entry) {
            continue;
        }
        let first = base.wrapping_add((index as u64).wrapping_shl(shift_of(depth)));
        if is_leaf::<F>(entry, depth) {
            visit(tables, Place { table, index }, entry, (first, span(depth)));
        } else {
            visit_leaves::<F, T>(tables, F::address(entry), depth.wrapping_sub(1), first, range, visit);
        }
    }
}

/// Retires a table that has been unlinked, and all below it.
fn retire_tree<F: Format, T: Tables>(tables: &mut T, table: Hpa, depth: u32) {
    if depth > 1 {
        for index in 0..ENTRIES {
            let entry = tables.read(table, index);
            if F::present(entry) && !is_leaf::<F>(entry, depth) {
                retire_tree::<F, T>(tables, F::address(entry), depth - 1);
            }
        }
    }
    tables.retire(table);
}

/// A removal under way.
struct Zap {
    start: u64,
    end: u64,
    budget: usize,
    flush: bool,
}

impl Zap {
    /// Removes what is in the range below one table; returns where to go on if the budget ran out.
    fn table<F: Format, T: Tables>(&mut self, tables: &mut T, table: Hpa, depth: u32, base: u64) -> Option<u64> {
        for index in indices(base, depth, (self.start, self.end)) {
            let entry = tables.read(table, index);
            if !F::present(entry) {
                continue;
            }
            let first = base.wrapping_add((index as u64).wrapping_shl(shift_of(depth)));
            let end = first.wrapping_add(span(depth));
            if self.budget == 0 {
                return Some(first);
            }
            if !is_leaf::<F>(entry, depth) {
                let child = F::address(entry);
                let covered = self.start <= first && self.end >= end;
                // A table of pages that goes whole need not be emptied first.
                if !(covered && depth == 2) {
                    if let Some(next) = self.table::<F, T>(tables, child, depth.wrapping_sub(1), first) {
                        return Some(next);
                    }
                    // An operation that resumed in the middle finds out the hard way whether the table is empty.
                    if !covered && (depth == 2 || self.end < end || !is_empty::<F, T>(tables, child)) {
                        continue;
                    }
                    if self.budget == 0 {
                        return Some(end.wrapping_sub(1));
                    }
                }
                tables.write(table, index, 0);
                tables.retire(child);
            } else {
                tables.write(table, index, 0);
            }
            self.flush = true;
            self.budget = self.budget.wrapping_sub(1);
        }
        None
    }
}

fn is_empty<F: Format, T: Tables>(tables: &T, table: Hpa) -> bool {
    (0..ENTRIES).all(|index| !F::present(tables.read(table, index)))
}
