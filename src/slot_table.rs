// SPDX-License-Identifier: GPL-2.0
//! The table of a VM's memory slots: chunks, sorted by guest frame, that a new table shares with the one before it but for those that
//! change. So a change costs much less than there are slots, and readers see each table whole.
#![forbid(unsafe_code)]

use core::{ops::Range, sync::atomic::AtomicU64};

use kernel::{prelude::*, sync::Arc};

use crate::{
    arch::{Gfn, Hva},
    mmu::slots,
};

/// One bit a page, set when the page is written.
pub(crate) type DirtyLog = Option<Arc<KVVec<AtomicU64>>>;
pub(crate) type Slot = slots::Slot<DirtyLog>;

/// Most slots in a chunk; half as many when one is split. Near the root of the largest number of slots, so that neither the chunks nor
/// what is in one of them are many.
const CHUNK: usize = 128;

/// Some slots, at least one, sorted.
struct Chunk {
    slots: KVec<Slot>,
    /// Where they are in the virtual machine monitor: all of them from `start` to before `end`.
    start: Hva,
    end: Hva,
    logs_dirty: bool,
}

impl Chunk {
    fn new(slots: KVec<Slot>) -> Result<Arc<Self>> {
        let start = slots.iter().map(|slot| slot.hva).min().unwrap_or_default();
        let end = slots.iter().map(Slot::hva_end).max().unwrap_or_default();
        let logs_dirty = slots.iter().any(Slot::logs_dirty);
        Ok(Arc::new(Self { slots, start, end, logs_dirty }, GFP_KERNEL_ACCOUNT)?)
    }

    fn base(&self) -> Gfn {
        self.slots.first().map_or(Gfn(0), |slot| slot.base)
    }
}

/// All slots.
pub(crate) struct Slots {
    chunks: KVec<Arc<Chunk>>,
}

impl Slots {
    /// None.
    pub(crate) fn new() -> Self {
        Self { chunks: KVec::new() }
    }

    /// The slot that holds `gfn`.
    #[inline]
    pub(crate) fn find(&self, gfn: Gfn) -> Option<&Slot> {
        // Most guests have one chunk, and most of their memory is its first slot.
        let mut chunk = self.chunks.first()?;
        if self.chunks.len() > 1 {
            chunk = self.chunks.get(self.chunks.partition_point(|chunk| chunk.base() <= gfn).checked_sub(1)?)?;
        }
        slots::find(&chunk.slots, gfn, 0).and_then(|at| chunk.slots.get(at))
    }

    /// Calls `f` with the frames of every slot that lie in a range of host addresses.
    pub(crate) fn for_each_range(&self, start: Hva, end: Hva, mut f: impl FnMut(Gfn, u64)) {
        for chunk in self.chunks.iter().filter(|chunk| chunk.start < end && start < chunk.end) {
            for (first, count) in chunk.slots.iter().filter_map(|slot| slot.frames_in(start, end)) {
                f(first, count);
            }
        }
    }

    /// Whether the writes to some slot are logged.
    pub(crate) fn logs_dirty(&self) -> bool {
        self.chunks.iter().any(|chunk| chunk.logs_dirty)
    }

    /// The chunk that a slot at `base` belongs in; 0 if there is none yet.
    fn chunk_for(&self, base: Gfn) -> usize {
        self.chunks.partition_point(|chunk| chunk.base() <= base).saturating_sub(1)
    }

    /// A table with `chunks` in the place of those in `range`.
    fn with_chunks(&self, range: Range<usize>, chunks: impl Iterator<Item = Result<Arc<Chunk>>>) -> Result<Self> {
        let mut new = KVec::with_capacity(self.chunks.len().saturating_add(1), GFP_KERNEL_ACCOUNT)?;
        new.extend_from_slice(self.chunks.get(..range.start).unwrap_or(&[]), GFP_KERNEL_ACCOUNT)?;
        for chunk in chunks {
            new.push(chunk?, GFP_KERNEL_ACCOUNT)?;
        }
        new.extend_from_slice(self.chunks.get(range.end..).unwrap_or(&[]), GFP_KERNEL_ACCOUNT)?;
        Ok(Self { chunks: new })
    }

    /// The chunk at `at` without the slot at `base`, if there is one, and with `slot` instead.
    fn edited(&self, at: usize, base: Gfn, slot: Option<Slot>) -> Result<KVec<Slot>> {
        let old = self.slots_of(at);
        let mut edited = KVec::with_capacity(old.len().saturating_add(1), GFP_KERNEL_ACCOUNT)?;
        let (below, above) = old.split_at_checked(old.partition_point(|old| old.base < base)).unwrap_or((old, &[]));
        edited.extend_from_slice(below, GFP_KERNEL_ACCOUNT)?;
        if let Some(slot) = slot {
            edited.push(slot, GFP_KERNEL_ACCOUNT)?;
        }
        for slot in above.iter().filter(|old| old.base != base) {
            edited.push(slot.clone(), GFP_KERNEL_ACCOUNT)?;
        }
        Ok(edited)
    }

    /// The slots of the chunk at `at`; none if there is no such chunk.
    fn slots_of(&self, at: usize) -> &[Slot] {
        self.chunks.get(at).map_or(&[], |chunk| &chunk.slots)
    }

    /// A table with one more slot, or with this one instead of that at the same frame.
    pub(crate) fn with(&self, slot: Slot) -> Result<Self> {
        let at = self.chunk_for(slot.base);
        let range = at..at.wrapping_add(1);
        let mut edited = self.edited(at, slot.base, Some(slot))?;
        if edited.len() <= CHUNK {
            return self.with_chunks(range, [Chunk::new(edited)].into_iter());
        }
        let mut upper = KVec::with_capacity(CHUNK, GFP_KERNEL_ACCOUNT)?;
        upper.extend_from_slice(edited.get(CHUNK / 2..).unwrap_or(&[]), GFP_KERNEL_ACCOUNT)?;
        edited.truncate(CHUNK / 2);
        self.with_chunks(range, [Chunk::new(edited), Chunk::new(upper)].into_iter())
    }

    /// A table without the slot that begins at `base`. Two neighbours that have become few are one chunk again: any two have more than
    /// half a chunk, so that the chunks are never many more than the slots want.
    pub(crate) fn without(&self, base: Gfn) -> Result<Self> {
        let at = self.chunk_for(base);
        let mut edited = self.edited(at, base, None)?;
        let room = (CHUNK / 2).saturating_sub(edited.len());
        let joins = |neighbour: &usize| (1..=room).contains(&self.slots_of(*neighbour).len());
        let mut range = at..at.wrapping_add(1);
        if let Some(below) = at.checked_sub(1).filter(joins) {
            let mut joined = KVec::with_capacity(CHUNK, GFP_KERNEL_ACCOUNT)?;
            joined.extend_from_slice(self.slots_of(below), GFP_KERNEL_ACCOUNT)?;
            joined.extend_from_slice(&edited, GFP_KERNEL_ACCOUNT)?;
            edited = joined;
            range.start = below;
        } else if let Some(above) = Some(range.end).filter(joins) {
            edited.extend_from_slice(self.slots_of(above), GFP_KERNEL_ACCOUNT)?;
            range.end = above.wrapping_add(1);
        }
        let chunk = (!edited.is_empty()).then(|| Chunk::new(edited));
        self.with_chunks(range, chunk.into_iter())
    }
}

/// Where the slots begin, by their number.
pub(crate) struct Numbers(KVVec<Gfn>);

/// No slot begins there.
const NONE: Gfn = Gfn(u64::MAX);

impl Numbers {
    pub(crate) fn new() -> Self {
        Self(KVVec::new())
    }

    /// Makes room for slot `id`, so that [`set`](Self::set) finds it.
    pub(crate) fn reserve(&mut self, id: u16) -> Result {
        let wanted = usize::from(id) + 1;
        if wanted > self.0.len() {
            self.0.resize(wanted.next_power_of_two(), NONE, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(())
    }

    /// Slot `id` begins at `base` now, or is gone.
    pub(crate) fn set(&mut self, id: u16, base: Option<Gfn>) {
        if let Some(place) = self.0.get_mut(usize::from(id)) {
            *place = base.unwrap_or(NONE);
        }
    }

    /// The slot with number `id`.
    pub(crate) fn find<'a>(&self, slots: &'a Slots, id: u16) -> Option<&'a Slot> {
        let base = *self.0.get(usize::from(id))?;
        slots.find(base).filter(|slot| slot.id == id)
    }
}

/// What a change is planned with.
pub(crate) struct Known<'a>(pub(crate) &'a Slots, pub(crate) &'a Numbers);

impl slots::Table<DirtyLog> for Known<'_> {
    fn with_id(&self, id: u16) -> Option<&Slot> {
        self.1.find(self.0, id)
    }

    fn around(&self, base: Gfn) -> [Option<&Slot>; 2] {
        let chunks = &self.0.chunks;
        let at = self.0.chunk_for(base);
        let Some(chunk) = chunks.get(at) else { return [None; 2] };
        let place = chunk.slots.partition_point(|slot| slot.base < base);
        let below = place.checked_sub(1).and_then(|place| chunk.slots.get(place));
        let next = || chunks.get(at.wrapping_add(1))?.slots.first();
        [below, chunk.slots.get(place).or_else(next)]
    }
}
