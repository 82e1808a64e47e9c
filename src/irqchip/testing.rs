// SPDX-License-Identifier: GPL-2.0
//! Random numbers for the tests of this room: deterministic, so that a failure can be repeated.
#![forbid(unsafe_code)]

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// 0 to `count - 1`.
    pub fn below(&mut self, count: u64) -> u64 {
        self.next() % count
    }

    pub fn flip(&mut self) -> bool {
        self.next() & 1 != 0
    }

    /// A number with a random number of bits: small ones, large ones, and edges.
    pub fn wide(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            _ => self.next() >> self.below(64),
        }
    }
}
