// SPDX-License-Identifier: GPL-2.0
//! Memory type range registers. They are kept and checked, and have no influence on the memory types that a guest gets: with nested
//! paging those come from the nested tables and the guest's PAT. SDM Vol. 3 "Memory Type Range Registers (MTRRs)".
#![forbid(unsafe_code)]

use crate::arch::msr;

/// Variable ranges.
pub const VARIABLE: usize = 8;
/// MTRRCAP: fixed ranges and write-combining are there, system-management ranges are not.
const CAP: u64 = 1 << 8 | 1 << 10 | VARIABLE as u64;

const VARIABLE_LAST: u32 = msr::MTRR_PHYSBASE0 + 2 * VARIABLE as u32 - 1;
/// MTRR enable, fixed-range enable, type.
const DEF_TYPE_BITS: u64 = 1 << 11 | 1 << 10 | 0xFF;

#[derive(Clone, Debug)]
pub struct Mtrr {
    def_type: u64,
    /// 64 KiB, 16 KiB and 4 KiB ranges; 11 places are used.
    fixed: [u64; 16],
    /// Base and mask by turns.
    variable: [u64; 2 * VARIABLE],
}

/// The place among [`Mtrr::fixed`] of a fixed-range register. Masked, so that a mispredicted range check cannot reach
/// beyond the array: a guest chooses `index`.
fn fixed_place(index: u32) -> Option<usize> {
    let place = match index {
        msr::MTRR_FIX64K_00000 => 0,
        msr::MTRR_FIX16K_80000..=msr::MTRR_FIX16K_A0000 => index - msr::MTRR_FIX16K_80000 + 1,
        msr::MTRR_FIX4K_C0000..=msr::MTRR_FIX4K_F8000 => index - msr::MTRR_FIX4K_C0000 + 3,
        _ => return None,
    };
    Some((place & 15) as usize)
}

/// The place among [`Mtrr::variable`], masked likewise.
fn variable_place(index: u32) -> Option<usize> {
    let inside = (msr::MTRR_PHYSBASE0..=VARIABLE_LAST).contains(&index);
    inside.then(|| (index - msr::MTRR_PHYSBASE0) as usize % (2 * VARIABLE))
}

/// UC, WC, WT, WP, WB.
const fn type_valid(kind: u64) -> bool {
    matches!(kind & 0xFF, 0 | 1 | 4 | 5 | 6)
}

impl Mtrr {
    pub const fn new() -> Self {
        Self { def_type: 0, fixed: [0; 16], variable: [0; 2 * VARIABLE] }
    }

    /// `None`: not an MTRR.
    pub fn read(&self, index: u32) -> Option<u64> {
        match index {
            msr::MTRR_CAP => Some(CAP),
            msr::MTRR_DEF_TYPE => Some(self.def_type),
            _ => match fixed_place(index) {
                Some(place) => self.fixed.get(place).copied(),
                None => self.variable.get(variable_place(index)?).copied(),
            },
        }
    }

    /// Whether the value was valid; `None`: not an MTRR that can be written. `reserved`: physical address bits that a
    /// guest does not have.
    pub fn write(&mut self, index: u32, value: u64, reserved: u64) -> Option<bool> {
        let (place, valid) = if index == msr::MTRR_DEF_TYPE {
            (&mut self.def_type, value & !DEF_TYPE_BITS == 0 && type_valid(value))
        } else if let Some(place) = fixed_place(index) {
            (self.fixed.get_mut(place)?, (0..8).all(|byte| type_valid(value >> (8 * byte))))
        } else {
            let place = variable_place(index)?;
            let valid = if place % 2 == 0 {
                value & (reserved | 0xF00) == 0 && type_valid(value)
            } else {
                value & (reserved | 0x7FF) == 0
            };
            (self.variable.get_mut(place)?, valid)
        };
        if valid {
            *place = value;
        }
        Some(valid)
    }
}
