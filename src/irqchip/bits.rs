// SPDX-License-Identifier: GPL-2.0
//! A set of interrupt vectors.
#![forbid(unsafe_code)]

/// 256 bits, one a vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bits256([u64; 4]);

impl Bits256 {
    pub const EMPTY: Self = Self([0; 4]);

    const fn place(vector: u8) -> (usize, u64) {
        ((vector >> 6) as usize, 1 << (vector & 63))
    }

    #[inline]
    pub fn set(&mut self, vector: u8) {
        let (word, bit) = Self::place(vector);
        self.0[word] |= bit;
    }

    #[inline]
    pub fn clear(&mut self, vector: u8) {
        let (word, bit) = Self::place(vector);
        self.0[word] &= !bit;
    }

    #[inline]
    pub const fn test(&self, vector: u8) -> bool {
        let (word, bit) = Self::place(vector);
        self.0[word] & bit != 0
    }

    /// The highest vector in the set; 0 when the set is empty (vector 0 is never a legal interrupt).
    #[inline]
    pub fn highest(&self) -> u8 {
        for (word, bits) in self.0.iter().enumerate().rev() {
            if *bits != 0 {
                return ((word as u8) << 6) | (63 - bits.leading_zeros()) as u8;
            }
        }
        0
    }

    pub const fn is_empty(&self) -> bool {
        self.0[0] | self.0[1] | self.0[2] | self.0[3] == 0
    }

    /// The four words, lowest vectors first.
    pub const fn words(&self) -> [u64; 4] {
        self.0
    }

    /// Word `index & 3`: vectors `64 * index` and up.
    pub(super) fn word_mut(&mut self, index: usize) -> &mut u64 {
        &mut self.0[index & 3]
    }

    /// 32 vectors from `32 * (index & 7)` on, as the APIC's registers show them.
    pub const fn dword(&self, index: usize) -> u32 {
        (self.0[(index >> 1) & 3] >> ((index & 1) * 32)) as u32
    }

    pub(super) fn set_dword(&mut self, index: usize, value: u32) {
        let shift = (index & 1) * 32;
        let word = self.word_mut(index >> 1);
        *word = *word & !(0xFFFF_FFFF << shift) | ((value as u64) << shift);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn highest_and_dwords() {
        let mut set = Bits256::EMPTY;
        assert_eq!(set.highest(), 0);
        for vector in [0u8, 31, 32, 63, 64, 127, 128, 200, 255] {
            set.set(vector);
            assert!(set.test(vector));
            assert_eq!(set.highest(), vector);
            assert_ne!(set.dword(vector as usize / 32) & (1 << (vector % 32)), 0);
        }
        set.clear(255);
        assert_eq!(set.highest(), 200);
        let mut copy = Bits256::EMPTY;
        for index in 0..8 {
            copy.set_dword(index, !0);
            copy.set_dword(index, set.dword(index));
        }
        assert_eq!(copy, set);
        assert!(!set.is_empty() && Bits256::EMPTY.is_empty());
    }
}
