// SPDX-License-Identifier: GPL-2.0
//! Machine-check registers: kept and checked; only userspace reports errors in them. SDM Vol. 3 "Machine-Check MSRs", APM Vol. 2 "Machine Check Architecture MSRs".
#![forbid(unsafe_code)]

use crate::abi::cap::MCE_BANKS;
use crate::abi::vcpu::KvmX86Mce;
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

/// MCG_STATUS: a machine check is being handled.
const IN_PROGRESS: u64 = 1 << 2;

/// Bits of a bank's status.
mod status {
    pub(super) const VALID: u64 = 1 << 63;
    pub(super) const OVERFLOW: u64 = 1 << 62;
    pub(super) const UNCORRECTED: u64 = 1 << 61;
    /// The context is corrupt; the error was signalled; action is required.
    pub(super) const SIGNALLED: u64 = 1 << 57 | 1 << 56 | 1 << 55;
}

/// What KVM_X86_SET_MCE means for the guest beside what its registers show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reported {
    Quietly,
    /// #MC.
    MachineCheck,
    /// A machine check while one is handled, or with CR4.MCE off.
    Shutdown,
}

/// KVM_X86_SETUP_MCE with no bank, too many, or a feature that is not there; KVM_X86_SET_MCE of an error that is none, or in a bank that
/// is not there: EINVAL.
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

    /// KVM_X86_SET_MCE: an error happened. `takes`: the guest's CR4.MCE.
    pub fn report(&mut self, error: &KvmX86Mce, takes: bool) -> Result<Reported, BadMce> {
        let place = self.place(msr::MC0_CTL.wrapping_add(u32::from(error.bank) * 4)).ok_or(BadMce)?;
        if error.status & status::VALID == 0 {
            return Err(BadMce);
        }
        let reports_all = self.cap & CTL_PRESENT == 0 || self.ctl == u64::MAX;
        let Some([ctl, bank @ ..]) = self.banks.get_mut(place..).and_then(|banks| banks.first_chunk_mut::<4>()) else {
            return Err(BadMce);
        };
        let old = bank[0];
        let uncorrected = error.status & status::UNCORRECTED != 0;
        let quiet = !uncorrected || error.mcg_status == 0 && error.status & status::SIGNALLED == 0;
        if !quiet {
            if !reports_all || *ctl != u64::MAX {
                return Ok(Reported::Quietly);
            }
            if self.status & IN_PROGRESS != 0 || !takes {
                return Ok(Reported::Shutdown);
            }
        }
        if uncorrected {
            self.status = error.mcg_status;
        } else if old & status::VALID != 0 && old & status::UNCORRECTED != 0 {
            // The worse one stays.
            bank[0] |= status::OVERFLOW;
            return Ok(Reported::Quietly);
        }
        let lost = if old & status::VALID != 0 && !(quiet && uncorrected) { status::OVERFLOW } else { 0 };
        *bank = [error.status | lost, error.addr, error.misc];
        Ok(if quiet { Reported::Quietly } else { Reported::MachineCheck })
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
