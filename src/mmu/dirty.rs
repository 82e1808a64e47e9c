// SPDX-License-Identifier: GPL-2.0
//! The dirty log of a memory slot: one bit per page, set when the guest or the host writes it. KVM API
//! "KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG" and "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2".
//!
//! Taking a bit and write-protecting its page must not be torn apart by a fault that marks the page and makes it
//! writable: both run under the lock of the nested tables, or the fault marks after it has mapped. The flush that
//! write protection owes comes before userspace learns the result.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

/// Pages per word of the bitmap.
pub const PAGES_PER_WORD: u64 = 64;

/// Number of 64-bit words in the bitmap of a slot. Userspace's buffer has the same size.
pub const fn words_for(pages: u64) -> u64 {
    pages.div_ceil(PAGES_PER_WORD)
}

/// A dirty bitmap in the caller's storage. Bits past the last page stay clear.
#[derive(Clone, Copy, Debug)]
pub struct DirtyBitmap<'a> {
    words: &'a [AtomicU64],
    pages: u64,
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
        let bit = 1 << (index % PAGES_PER_WORD);
        // The plain load spares a page that is written again and again the locked operation.
        word.load(Ordering::Relaxed) & bit == 0 && word.fetch_or(bit, Ordering::AcqRel) & bit == 0
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
