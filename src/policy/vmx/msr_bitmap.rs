// SPDX-License-Identifier: GPL-2.0
//! The MSR bitmap: which RDMSR and WRMSR exit. SDM "MSR-Bitmap Address".
#![forbid(unsafe_code)]

/// The whole page. A set bit: the access exits.
pub type MsrBitmap = [u8; 4096];

/// Sets whether reads and writes of `msr` exit. MSRs that have no bit always exit, and are left alone.
pub fn set(bitmap: &mut MsrBitmap, msr: u32, read_exits: bool, write_exits: bool) {
    let Some((byte, bit)) = place(msr) else { return };
    for (offset, exits) in [(byte, read_exits), (byte + WRITES, write_exits)] {
        if let Some(byte) = bitmap.get_mut(offset) {
            *byte = *byte & !bit | if exits { bit } else { 0 };
        }
    }
}

/// Whether reads and writes of `msr` exit.
pub fn exits(bitmap: &MsrBitmap, msr: u32) -> (bool, bool) {
    let Some((byte, bit)) = place(msr) else { return (true, true) };
    let exits = |offset: usize| bitmap.get(offset).is_none_or(|byte| byte & bit != 0);
    (exits(byte), exits(byte + WRITES))
}

/// Reads of low MSRs, reads of high MSRs, then writes of both: 1 KiB each.
const HIGH: usize = 0x400;
const WRITES: usize = 0x800;

const fn place(msr: u32) -> Option<(usize, u8)> {
    let range = match msr {
        0..=0x1FFF => 0,
        0xC000_0000..=0xC000_1FFF => HIGH,
        _ => return None,
    };
    let index = msr & 0x1FFF;
    Some((range + (index >> 3) as usize, 1 << (index & 7)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        for (msr, byte, bit) in [
            (0, 0, 0),
            (0x10, 2, 0),
            (0x808, 0x101, 0),
            (0x1FFF, 0x3FF, 7),
            (0xC000_0080, 0x410, 0),
            (0xC000_0102, 0x420, 2),
            (0xC000_1FFF, 0x7FF, 7),
        ] {
            let mut bitmap = [0; 4096];
            set(&mut bitmap, msr, true, false);
            assert_eq!(bitmap[byte], 1 << bit, "{msr:#x}");
            assert_eq!(bitmap.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
            assert_eq!(exits(&bitmap, msr), (true, false));
            set(&mut bitmap, msr, false, true);
            assert_eq!((bitmap[byte], bitmap[byte + 0x800]), (0, 1 << bit), "{msr:#x}");
            assert_eq!(exits(&bitmap, msr), (false, true));
        }
    }

    #[test]
    fn others_always_exit() {
        let mut bitmap = [0; 4096];
        for msr in [0x2000, 0x4B56_4D00, 0xBFFF_FFFF, 0xC000_2000, 0xC001_0015, u32::MAX] {
            set(&mut bitmap, msr, false, false);
            assert_eq!(exits(&bitmap, msr), (true, true), "{msr:#x}");
            set(&mut bitmap, msr, true, true);
        }
        assert!(bitmap.iter().all(|&byte| byte == 0));
    }
}
