// SPDX-License-Identifier: GPL-2.0
//! The dirty log of a memory slot: one bit per page, set when the guest or the host writes it. KVM API
//! "KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG" and "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2".
//!
//! Taking a bit and write-protecting its page must not be torn apart by a fault that marks the page and makes it
//! writable: both run under the lock of the nested tables, or the fault marks after it has mapped. The flush that
//! write protection owes comes before userspace learns the result.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

use crate::arch::Gfn;

/// Pages per word of the bitmap.
pub const PAGES_PER_WORD: u64 = 64;

/// Number of 64-bit words in the bitmap of a slot. Userspace's buffer has the same size.
pub const fn words_for(pages: u64) -> u64 {
    pages.div_ceil(PAGES_PER_WORD)
}

/// Sets `bits`. Returns whether one of them was clear.
#[inline]
fn set(word: &AtomicU64, bits: u64) -> bool {
    // The plain load spares pages that are written again and again the locked operation.
    word.load(Ordering::Relaxed) & bits != bits && word.fetch_or(bits, Ordering::AcqRel) & bits != bits
}

/// Notes that each of `pages` was written, where `place` says; `push` puts it into a ring. As [`DirtyBitmap::mark`] for one after the
/// other, but pages in a row that share a word of a bitmap are marked together, when the row ends: a locked operation for up to 64. All
/// are marked on return.
#[inline]
pub fn mark_each<'a>(
    pages: impl Iterator<Item = Gfn>,
    place: impl Fn(Gfn) -> Place<'a>,
    mut push: impl FnMut(u32, u64),
) {
    // The pages from `first` on whose bits are gathered for `word`; without one they are dropped.
    let (mut first, mut count, mut word, mut bits) = (0, 0, None, 0u64);
    for gfn in pages {
        let mut nth = gfn.0.wrapping_sub(first);
        if nth >= count {
            if let Some(word) = word.take() {
                set(word, bits);
            }
            bits = 0;
            match place(gfn) {
                Place::Bitmap { base, log } => {
                    let index = gfn.0.wrapping_sub(base.0);
                    let skipped = index & !(PAGES_PER_WORD - 1);
                    first = base.0.wrapping_add(skipped);
                    // None where the bitmap does not reach.
                    count = log.pages.saturating_sub(skipped).min(PAGES_PER_WORD);
                    word = log.words.get((index / PAGES_PER_WORD) as usize);
                }
                Place::Ring { slot, page } => {
                    push(slot, page);
                    // The next page, even if it is this one, asks again.
                    count = 0;
                }
                Place::Nowhere { first: from, count: pages } => (first, count) = (from.0, pages),
            }
            nth = gfn.0.wrapping_sub(first);
            if nth >= count {
                continue;
            }
        }
        bits |= 1 << (nth % PAGES_PER_WORD);
    }
    if let Some(word) = word {
        set(word, bits);
    }
}

/// A dirty bitmap in the caller's storage. Bits past the last page stay clear.
#[derive(Clone, Copy, Debug)]
pub struct DirtyBitmap<'a> {
    words: &'a [AtomicU64],
    pages: u64,
}

/// Where it is noted that a page was written.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// In the bitmap of the slot that begins at `base`.
    Bitmap { base: Gfn, log: DirtyBitmap<'a> },
    /// In a dirty ring: the slot's number, and the page's in it.
    Ring { slot: u32, page: u64 },
    /// Nobody wants to know, of none of the `count` pages from `first` on.
    Nowhere { first: Gfn, count: u64 },
}

/// EINVAL: a range that KVM_CLEAR_DIRTY_LOG does not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRange;

/// Checks the range of KVM_CLEAR_DIRTY_LOG: it starts at a multiple of 64 pages, and has a multiple of 64 pages or
/// goes up to the end of the slot. Returns the number of words.
pub fn check_clear(pages: u64, first_page: u64, num_pages: u32) -> Result<u64, BadRange> {
    let left = pages.checked_sub(first_page).ok_or(BadRange)?;
    let count = u64::from(num_pages);
    let ragged = count % PAGES_PER_WORD != 0 && count < left;
    if first_page % PAGES_PER_WORD != 0 || count > left || ragged {
        return Err(BadRange);
    }
    Ok(words_for(count))
}

impl<'a> DirtyBitmap<'a> {
    /// The bitmap of `pages` pages in `words`, which may be longer than needed; `None` if it is too short.
    pub fn new(words: &'a [AtomicU64], pages: u64) -> Option<Self> {
        let needed = usize::try_from(words_for(pages)).ok()?;
        Some(Self { words: words.get(..needed)?, pages })
    }

    /// Marks page `index` of the slot. Returns whether it was clean. A page past the end is ignored.
    #[inline]
    pub fn mark(&self, index: u64) -> bool {
        if index >= self.pages {
            return false;
        }
        let Some(word) = self.words.get((index / PAGES_PER_WORD) as usize) else { return false };
        set(word, 1 << (index % PAGES_PER_WORD))
    }

    /// Marks every page, as KVM_DIRTY_LOG_INITIALLY_SET wants it for a new log.
    pub fn mark_all(&self) {
        for (word, n) in self.words.iter().zip(0..) {
            let left = self.pages.saturating_sub(n * PAGES_PER_WORD);
            let bits = if left >= PAGES_PER_WORD { u64::MAX } else { (1 << left) - 1 };
            word.store(bits, Ordering::Release);
        }
    }

    /// Takes the words from number `first_word` on, as many as `out` holds, and leaves them clear. `protect` gets
    /// (first page of the word, its bits) of each that is not zero, before the next one is taken. What is past the
    /// end of the bitmap reads as zero.
    pub fn take(&self, first_word: u64, out: &mut [u64], mut protect: impl FnMut(u64, u64)) {
        for ((n, word), out) in self.words_from(first_word, out) {
            // Most words are clean: a load tells, and leaves the cache line shared.
            let bits = match word.load(Ordering::Relaxed) {
                0 => 0,
                _ => word.swap(0, Ordering::AcqRel),
            };
            *out = bits;
            if bits != 0 {
                protect(n.wrapping_mul(PAGES_PER_WORD), bits);
            }
        }
    }

    /// Copies the words from number `first_word` on and leaves them as they are: KVM_GET_DIRTY_LOG when protection is
    /// manual.
    pub fn copy(&self, first_word: u64, out: &mut [u64]) {
        for ((_, word), out) in self.words_from(first_word, out) {
            *out = word.load(Ordering::Acquire);
        }
    }

    /// Clears the pages whose bits are set in `bits`, which starts at page `first_page` (a multiple of 64).
    /// `protect` gets (first page of the word, the bits that were dirty) of each word where something was cleared.
    pub fn clear(&self, first_page: u64, bits: &[u64], mut protect: impl FnMut(u64, u64)) {
        let first = first_page / PAGES_PER_WORD;
        let Some(words) = usize::try_from(first).ok().and_then(|first| self.words.get(first..)) else { return };
        for ((n, word), &mask) in (first..).zip(words).zip(bits) {
            if mask == 0 {
                continue;
            }
            let cleared = word.fetch_and(!mask, Ordering::AcqRel) & mask;
            if cleared != 0 {
                protect(n * PAGES_PER_WORD, cleared);
            }
        }
    }

    /// Pairs `out`, zeroed, with the numbered words from `first_word` on.
    fn words_from<'s, 'o>(
        &'s self,
        first_word: u64,
        out: &'o mut [u64],
    ) -> impl Iterator<Item = ((u64, &'s AtomicU64), &'o mut u64)> {
        out.fill(0);
        let first = usize::try_from(first_word).unwrap_or(usize::MAX);
        let words = self.words.get(first..).unwrap_or(&[]);
        words.iter().enumerate().map(move |(n, word)| (first_word.wrapping_add(n as u64), word)).zip(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmu::nested_tests::Random;
    use std::vec::Vec;

    fn zeroed(words: usize) -> Vec<AtomicU64> {
        (0..words).map(|_| AtomicU64::new(0)).collect()
    }

    fn contents(words: &[AtomicU64]) -> Vec<u64> {
        words.iter().map(|word| word.load(Ordering::Relaxed)).collect()
    }

    #[test]
    fn marks_and_takes() {
        let storage = zeroed(3);
        let log = DirtyBitmap::new(&storage, 130).unwrap();
        assert!(log.mark(0) && log.mark(63) && log.mark(64) && log.mark(129));
        assert!(!log.mark(63));
        assert!(!log.mark(130) && !log.mark(u64::MAX), "past the end");
        let mut copy = [7; 4];
        log.copy(0, &mut copy);
        assert_eq!(copy, [(1 << 63) | 1, 1, 2, 0]);
        let (mut out, mut protected) = ([7; 4], Vec::new());
        log.take(1, &mut out, |page, mask| protected.push((page, mask)));
        assert_eq!((out, protected), ([1, 2, 0, 0], std::vec![(64, 1), (128, 2)]));
        assert_eq!(contents(&storage), [(1 << 63) | 1, 0, 0]);
        assert!(log.mark(64));
        log.take(3, &mut out, |_, _| panic!("nothing is there"));
        log.take(u64::MAX, &mut out, |_, _| panic!("nothing is there"));
        assert_eq!(out, [0; 4]);
    }

    /// A slot for [`mark_each`]; no words: a slot without a log, or with rings.
    struct Slot {
        base: Gfn,
        pages: u64,
        words: Vec<AtomicU64>,
        ring: bool,
    }

    /// Slots of all kinds, some side by side, with holes and ragged ends; the last one ends with the address space, and the one before
    /// it has less storage than pages.
    fn slots() -> Vec<Slot> {
        let slot = |base: u64, pages: u64, words: usize, ring: bool| Slot {
            base: Gfn(base),
            pages,
            words: zeroed(words),
            ring,
        };
        std::vec![
            slot(0, 3, 1, false),
            slot(3, 130, 3, false),
            slot(133, 40, 0, false),
            slot(173, 64, 1, false),
            slot(237, 30, 0, true),
            slot(300, 65, 3, false),
            slot(400, 100, 0, false),
            slot(500, 1, 1, false),
            slot(600, 128, 1, false),
            slot(u64::MAX - 69, 70, 2, false),
        ]
    }

    fn place_in(slots: &[Slot], gfn: Gfn) -> Place<'_> {
        let Some((n, slot)) = slots.iter().enumerate().find(|(_, slot)| gfn.0.wrapping_sub(slot.base.0) < slot.pages)
        else {
            return Place::Nowhere { first: gfn, count: 1 };
        };
        let nowhere = Place::Nowhere { first: slot.base, count: slot.pages };
        if slot.ring {
            return Place::Ring { slot: n as u32, page: gfn.0 - slot.base.0 };
        }
        DirtyBitmap::new(&slot.words, slot.pages).map_or(nowhere, |log| Place::Bitmap { base: slot.base, log })
    }

    /// Marks `pages` together and one by one, and compares everything.
    fn compare(pages: &[Gfn], before: &[Gfn]) {
        let (together, single) = (slots(), slots());
        let (mut ring, mut wanted_ring) = (Vec::new(), Vec::new());
        mark_each(before.iter().copied(), |gfn| place_in(&together, gfn), |_, _| {});
        mark_each(pages.iter().copied(), |gfn| place_in(&together, gfn), |slot, page| ring.push((slot, page)));
        for (gfn, wanted) in before.iter().map(|gfn| (gfn, false)).chain(pages.iter().map(|gfn| (gfn, true))) {
            match place_in(&single, *gfn) {
                Place::Bitmap { base, log } => {
                    log.mark(gfn.0 - base.0);
                }
                Place::Ring { slot, page } if wanted => wanted_ring.push((slot, page)),
                _ => {}
            }
        }
        for (n, (a, b)) in together.iter().zip(&single).enumerate() {
            assert_eq!(contents(&a.words), contents(&b.words), "slot {n}: {pages:?}");
        }
        assert_eq!(ring, wanted_ring, "{pages:?}");
    }

    #[test]
    fn marks_together_as_one_by_one() {
        let up: Vec<_> = (0..800).chain(u64::MAX - 80..=u64::MAX).map(Gfn).collect();
        let down: Vec<_> = up.iter().rev().copied().collect();
        for pages in [&up, &down, &Vec::new()] {
            compare(pages, &[]);
            compare(pages, &up);
        }
        let mut random = Random(11);
        let mut draw = |len: u64| -> Vec<Gfn> {
            let mut at = 0u64;
            let mut one = || {
                // Now a neighbour, now the same page, now anywhere.
                at = match random.below(8) {
                    0 => random.below(800),
                    1 => u64::MAX - random.below(80),
                    2 => at,
                    3 => at.wrapping_sub(1),
                    4 => at.wrapping_add(64),
                    _ => at.wrapping_add(1),
                };
                Gfn(at)
            };
            (0..len).map(|_| one()).collect()
        };
        for _ in 0..2000 {
            let (before, pages) = (draw(20), draw(512));
            for len in [1, 2, 3, 17, 512] {
                compare(&pages[..len], &before);
            }
        }
    }

    #[test]
    fn a_row_of_pages_asks_once() {
        let slots = slots();
        let asked = core::cell::Cell::new(0);
        let place = |gfn| {
            asked.set(asked.get() + 1);
            place_in(&slots, gfn)
        };
        mark_each((3..133).map(Gfn), place, |_, _| {});
        assert_eq!(asked.replace(0), 3, "once a word");
        mark_each((133..173).map(Gfn), place, |_, _| {});
        assert_eq!(asked.replace(0), 1, "once a slot without a log");
        mark_each([Gfn(237); 3].into_iter(), place, |_, _| {});
        assert_eq!(asked.replace(0), 3, "a ring gets every write");
    }

    #[test]
    fn storage_and_all() {
        let storage = zeroed(3);
        assert!(DirtyBitmap::new(&storage, 193).is_none());
        assert!(DirtyBitmap::new(&storage, u64::MAX).is_none());
        DirtyBitmap::new(&storage, 192).unwrap().mark_all();
        assert_eq!(contents(&storage), [u64::MAX; 3]);
        DirtyBitmap::new(&storage, 65).unwrap().mark_all();
        assert_eq!(contents(&storage), [u64::MAX, 1, u64::MAX]);
    }

    #[test]
    fn clears_what_was_dirty() {
        let storage = zeroed(3);
        let log = DirtyBitmap::new(&storage, 192).unwrap();
        for page in [64, 65, 70, 128] {
            log.mark(page);
        }
        let mut protected = Vec::new();
        log.clear(64, &[0b1011, 0, u64::MAX, u64::MAX], |page, mask| protected.push((page, mask)));
        assert_eq!(protected, [(64, 0b11)]);
        assert_eq!(contents(&storage), [0, 1 << 6, 1]);
        log.clear(!63, &[u64::MAX], |_, _| panic!("nothing is there"));
    }

    #[test]
    fn clear_ranges() {
        for (pages, first, count, wanted) in [
            (1000, 0, 1000, Ok(16)),
            (1000, 64, 128, Ok(2)),
            (1000, 64, 936, Ok(15)),
            (1000, 960, 40, Ok(1)),
            (1000, 1024, 0, Err(BadRange)),
            (1024, 1024, 0, Ok(0)),
            (1000, 64, 100, Err(BadRange)),
            (1000, 63, 64, Err(BadRange)),
            (1000, 960, 64, Err(BadRange)),
            (1000, 960, 39, Err(BadRange)),
            (1000, !63, 64, Err(BadRange)),
            (1000, 0, u32::MAX, Err(BadRange)),
            (1000, 0, 0, Ok(0)),
        ] {
            assert_eq!(check_clear(pages, first, count), wanted, "{pages} {first} {count}");
        }
    }
}
