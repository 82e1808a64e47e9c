// SPDX-License-Identifier: GPL-2.0
//! Machine-check registers: kept, checked, and never filled in. SDM Vol. 3 "Machine-Check MSRs", APM Vol. 2 "Machine Check Architecture MSRs".
#![forbid(unsafe_code)]

use crate::abi::cap::MCE_BANKS;
use crate::arch::msr;

const BANKS: usize = MCE_BANKS as usize;

/// MCG_CAP: MCG_CTL is there.
const CTL_PRESENT: u64 = 1 << 8;
/// MCG_CAP: software error recovery.
const SOFTWARE_RECOVERY: u64 = 1 << 24;
/// Bits beside the number of banks that KVM_X86_SETUP_MCE takes: what KVM_X86_GET_MCE_CAP_SUPPORTED returns.
pub const MCE_CAP_SUPPORTED: u64 = CTL_PRESENT | SOFTWARE_RECOVERY;
/// Number of banks, and the number of extended registers.
const COUNTS: u64 = 0xFF | 0xFF << 16;

/// KVM_X86_SETUP_MCE with no bank, too many, or a feature that is not there: EINVAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadMce;

#[derive(Clone, Debug)]
pub struct Mce {
    cap: u64,
    status: u64,
    ctl: u64,
    /// CTL, STATUS, ADDR and MISC of each bank.
    banks: [u64; 4 * BANKS],
}

impl Mce {
    /// Before KVM_X86_SETUP_MCE.
    pub const fn new() -> Self {
        Self { cap: MCE_BANKS as u64, status: 0, ctl: 0, banks: [0; 4 * BANKS] }
    }

    pub fn setup(&mut self, cap: u64) -> Result<(), BadMce> {
        let banks = (cap & 0xFF) as usize;
        if banks == 0 || banks > BANKS || cap & !(MCE_CAP_SUPPORTED | COUNTS) != 0 {
            return Err(BadMce);
        }
        self.cap = cap;
        if cap & CTL_PRESENT != 0 {
            self.ctl = u64::MAX;
        }
        for ctl in self.banks.iter_mut().step_by(4).take(banks) {
            *ctl = u64::MAX;
        }
        Ok(())
    }

    /// The place in `banks` of a bank register that exists. Masked, so that a mispredicted comparison cannot reach
    /// beyond the array: a guest chooses `index`.
    fn place(&self, index: u32) -> Option<usize> {
        let place = index.checked_sub(msr::MC0_CTL)?;
        (u64::from(place) < 4 * (self.cap & 0xFF)).then_some(place as usize % (4 * BANKS))
    }

    /// Whether this is the CTL2 register of a bank: without corrected-error interrupts only the host sees it.
    fn is_ctl2(&self, index: u32) -> bool {
        index.checked_sub(msr::MC0_CTL2).is_some_and(|bank| u64::from(bank) < self.cap & 0xFF)
    }

    /// `None`: not a machine-check register that exists.
    pub fn read(&self, index: u32, host: bool) -> Option<u64> {
        match index {
            msr::P5_MC_ADDR | msr::P5_MC_TYPE => Some(0),
            msr::MCG_CAP => Some(self.cap),
            msr::MCG_STATUS => Some(self.status),
            msr::MCG_CTL => (host || self.cap & CTL_PRESENT != 0).then_some(self.ctl),
            _ if self.is_ctl2(index) => host.then_some(0),
            _ => self.banks.get(self.place(index)?).copied(),
        }
    }

    /// Whether the value was valid; `None`: not a machine-check register that exists. `status_writable`: a status
    /// register takes more than 0.
    pub fn write(&mut self, index: u32, value: u64, host: bool, status_writable: bool) -> Option<bool> {
        match index {
            msr::MCG_STATUS => self.status = value,
            msr::MCG_CTL => {
                let present = self.cap & CTL_PRESENT != 0;
                if !matches!(value, 0 | u64::MAX) || !present && (value != 0 || !host) {
                    return Some(false);
                }
                self.ctl = value;
            }
            _ if self.is_ctl2(index) => return Some(host && value == 0),
            _ => {
                let place = self.place(index)?;
                let valid = match place % 4 {
                    // All or nothing; but kernels clear bit 10 for a GART erratum, and bit 0 to be left alone with
                    // corrected errors.
                    0 => value == 0 || value | 1 << 10 | 1 == u64::MAX,
                    1 => value == 0 || status_writable,
                    _ => true,
                };
                if !valid {
                    return Some(false);
                }
                *self.banks.get_mut(place)? = value;
            }
        }
        Some(true)
    }
}
