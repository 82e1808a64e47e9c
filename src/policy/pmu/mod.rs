// SPDX-License-Identifier: GPL-2.0
//! A guest's performance counters: Intel's architectural performance monitoring, version 2. SDM Vol. 3 "Architectural Performance
//! Monitoring", and for what is refused, KVM.
//!
//! The model keeps registers and the values of counters. What happens in the guest is counted elsewhere, by counters of the host's kernel:
//! for each counter the model says with a [`Program`] what is to be counted, and takes back how often it was. Instructions that
//! software carries out for the guest are counted here.
//!
//! Not supported: AMD's counters, full-width writes (PERF_CAPABILITIES), PEBS, branch records, transactional qualifiers, freezing by
//! DEBUGCTL.
#![forbid(unsafe_code)]

pub mod filter;

#[cfg(test)]
mod tests;

use crate::arch::msr;
use core::iter;

/// General counters of the model, at most.
pub const GENERAL: usize = 8;
/// Fixed counters, at most.
pub const FIXED: usize = 3;
/// All of them: the general ones come first.
pub const COUNTERS: usize = GENERAL + FIXED;

/// A set of counters, a bit for each.
pub type Set = u16;

/// The newest version that there is for guests.
const VERSION: u32 = 2;
/// FIXED_CTR_CTRL and GLOBAL_CTRL, GLOBAL_STATUS: where the first fixed counter is in the last two.
const FIRST_FIXED: u32 = 32;
/// GLOBAL_STATUS: overflow of the debug store's buffer, and a change of condition.
const STATUS_OTHERS: u64 = 3 << 62;
/// The events that the fixed counters count, as the kernel's own numbers for them: instructions, cycles, reference cycles.
const FIXED_EVENTS: [u64; FIXED] = [INSTRUCTIONS, 0x3C, 0x300];
/// The event "instructions retired".
const INSTRUCTIONS: u64 = 0xC0;

/// PERFEVTSELx. SDM "Layout of IA32_PERFEVTSELx MSRs".
mod select {
    pub const EVENT: u64 = 0xFFFF;
    pub const USER: u64 = 1 << 16;
    pub const KERNEL: u64 = 1 << 17;
    pub const EDGE: u64 = 1 << 18;
    pub const INTERRUPT: u64 = 1 << 20;
    pub const ENABLE: u64 = 1 << 22;
    pub const INVERT: u64 = 1 << 23;
    pub const THRESHOLD: u64 = 0xFF << 24;
    /// Bit 21 counts for all threads of a core, and is of version 3.
    pub const RESERVED: u64 = 0xFFFF_FFFF_0020_0000;
}

/// A counter's four bits of FIXED_CTR_CTRL.
mod fixed_ctrl {
    pub const KERNEL: u64 = 1 << 0;
    pub const USER: u64 = 1 << 1;
    pub const INTERRUPT: u64 = 1 << 3;
    pub const DEFINED: u64 = KERNEL | USER | INTERRUPT;
}

/// What CPUID leaf 0Ah says. All zero: no performance monitoring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PmuCaps {
    pub version: u32,
    /// Number of general counters, and bits of each.
    pub general: u32,
    pub general_bits: u32,
    pub fixed: u32,
    pub fixed_bits: u32,
    /// Number of architectural events that the leaf tells of, and which of them are missing.
    pub events: u32,
    pub missing: u32,
}

impl PmuCaps {
    /// No performance monitoring.
    pub const NONE: Self =
        Self { version: 0, general: 0, general_bits: 0, fixed: 0, fixed_bits: 0, events: 0, missing: 0 };

    /// What guests can have on a host with this leaf 0Ah.
    pub fn host([eax, ebx, _, edx]: [u32; 4]) -> Self {
        let caps = Self {
            version: (eax & 0xFF).min(VERSION),
            general: (eax >> 8 & 0xFF).min(GENERAL as u32),
            general_bits: (eax >> 16 & 0xFF).min(63),
            fixed: (edx & 0x1F).min(FIXED as u32),
            fixed_bits: (edx >> 5 & 0xFF).min(63),
            events: eax >> 24,
            missing: ebx,
        };
        if caps.version == 0 || caps.general == 0 {
            Self::NONE
        } else {
            caps
        }
    }

    /// Leaf 0Ah for a guest. Bit 15 of EDX: nothing is counted for all threads of a core.
    pub fn leaf(&self) -> [u32; 4] {
        if self.version == 0 {
            return [0; 4];
        }
        let eax = self.version | self.general << 8 | self.general_bits << 16 | self.events << 24;
        [eax, self.missing, 0, self.fixed | self.fixed_bits << 5 | 1 << 15]
    }

    /// What a guest with this leaf 0Ah has on this host.
    pub fn within(&self, leaf: [u32; 4]) -> Self {
        let [eax, ebx, _, edx] = leaf;
        // A version that nobody knows is as good as the newest one that somebody does, as in KVM.
        let version = eax & 0xFF;
        if self.version == 0 || version == 0 {
            return Self::NONE;
        }
        let fixed = if version > 1 { edx & 0x1F } else { 0 };
        Self {
            version,
            general: (eax >> 8 & 0xFF).min(self.general),
            general_bits: (eax >> 16 & 0xFF).min(self.general_bits),
            fixed: fixed.min(self.fixed),
            fixed_bits: (edx >> 5 & 0xFF).min(self.fixed_bits),
            events: (eax >> 24).min(self.events),
            missing: ebx,
        }
    }

    fn has(&self, counter: usize) -> bool {
        match counter.checked_sub(GENERAL) {
            None => counter < self.general as usize,
            Some(fixed) => fixed < self.fixed as usize,
        }
    }

    /// The values that a counter can have.
    fn mask(&self, counter: usize) -> u64 {
        let bits = if counter < GENERAL { self.general_bits } else { self.fixed_bits };
        !u64::MAX.checked_shl(bits).unwrap_or(0)
    }

    /// Every counter's bit in GLOBAL_CTRL.
    fn enables(&self) -> u64 {
        (0..COUNTERS).filter(|&n| self.has(n)).fold(0, |bits, n| bits | global_bit(n))
    }
}

/// A counter's bit in GLOBAL_CTRL and GLOBAL_STATUS.
const fn global_bit(counter: usize) -> u64 {
    if counter < GENERAL {
        1 << counter
    } else {
        1 << (FIRST_FIXED + (counter - GENERAL) as u32 % 32)
    }
}

/// What KVM_GET_MSR_INDEX_LIST lists for a host with these counters.
pub fn index_list(caps: &PmuCaps) -> impl Iterator<Item = u32> + '_ {
    let globals = [msr::FIXED_CTR_CTRL, msr::PERF_GLOBAL_STATUS, msr::PERF_GLOBAL_CTRL];
    let globals = globals.into_iter().filter(|_| caps.version > 1);
    let fixed = (msr::FIXED_CTR0..).take(caps.fixed as usize);
    let general = (msr::P6_PERFCTR0..).take(caps.general as usize);
    let selects = (msr::P6_EVNTSEL0..).take(caps.general as usize);
    fixed.chain(globals).chain(general).chain(selects)
}

/// What a counter of the host's has to count for one of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// Event, unit mask, edge, inversion and threshold, where PERFEVTSELx has them.
    pub event: u64,
    pub user: bool,
    pub kernel: bool,
}

/// #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// One counter.
#[derive(Clone, Copy, Debug, Default)]
struct Counter {
    /// Without what the host's counter has counted since it was last asked.
    value: u64,
    /// Instructions that software carried out since then.
    by_software: u64,
    /// PERFEVTSELx.
    select: u64,
}

/// Which register an MSR is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Counter(usize),
    Select(usize),
    FixedCtrl,
    GlobalStatus,
    GlobalCtrl,
    OverflowCtrl,
}

/// The counters of one vCPU.
#[derive(Clone, Debug)]
pub struct Pmu {
    caps: PmuCaps,
    counters: [Counter; COUNTERS],
    fixed_ctrl: u64,
    global_ctrl: u64,
    global_status: u64,
}

impl Pmu {
    /// As after reset: with general counters on as far as GLOBAL_CTRL is concerned.
    pub fn new(caps: PmuCaps) -> Self {
        let global_ctrl = caps.enables() & ((1 << GENERAL) - 1);
        Self { caps, counters: [Counter::default(); COUNTERS], fixed_ctrl: 0, global_ctrl, global_status: 0 }
    }

    fn register(&self, index: u32) -> Option<Register> {
        let in_row = |first: u32, count: u32| index.checked_sub(first).filter(|n| *n < count).map(|n| n as usize);
        if let Some(n) = in_row(msr::P6_PERFCTR0, self.caps.general) {
            return Some(Register::Counter(n));
        }
        if let Some(n) = in_row(msr::P6_EVNTSEL0, self.caps.general) {
            return Some(Register::Select(n));
        }
        if let Some(n) = in_row(msr::FIXED_CTR0, self.caps.fixed) {
            return Some(Register::Counter(n.wrapping_add(GENERAL)));
        }
        match index {
            _ if self.caps.version < 2 => None,
            msr::FIXED_CTR_CTRL => Some(Register::FixedCtrl),
            msr::PERF_GLOBAL_STATUS => Some(Register::GlobalStatus),
            msr::PERF_GLOBAL_CTRL => Some(Register::GlobalCtrl),
            msr::PERF_GLOBAL_OVF_CTRL => Some(Register::OverflowCtrl),
            _ => None,
        }
    }

    /// Whether this MSR is one of these.
    pub fn owns(&self, index: u32) -> bool {
        self.register(index).is_some()
    }

    /// The counter that this MSR is.
    pub fn counter_of(&self, index: u32) -> Option<usize> {
        match self.register(index)? {
            Register::Counter(n) => Some(n),
            _ => None,
        }
    }

    /// The counter that RDPMC with this ECX reads. Bits 31:16 are the type: 4000h is a fixed one.
    pub fn rdpmc(&self, ecx: u32) -> Result<usize, Refused> {
        let n = (ecx & 0xFFFF) as usize;
        let n = match ecx >> 16 {
            0 if n < GENERAL => n,
            0x4000 if n < FIXED => n.wrapping_add(GENERAL),
            _ => return Err(Refused),
        };
        self.caps.has(n).then_some(n).ok_or(Refused)
    }

    /// A counter's value, when the host's has counted `counted` more.
    pub fn value(&self, counter: usize, counted: u64) -> u64 {
        self.counters
            .get(counter)
            .map_or(0, |it| it.value.wrapping_add(it.by_software).wrapping_add(counted) & self.caps.mask(counter))
    }

    /// RDMSR of anything but a counter.
    pub fn read(&self, index: u32) -> Result<u64, Refused> {
        Ok(match self.register(index).ok_or(Refused)? {
            Register::Counter(_) => return Err(Refused),
            Register::Select(n) => self.counters.get(n).map_or(0, |counter| counter.select),
            Register::FixedCtrl => self.fixed_ctrl,
            Register::GlobalStatus => self.global_status,
            Register::GlobalCtrl => self.global_ctrl,
            Register::OverflowCtrl => 0,
        })
    }

    /// WRMSR, or KVM_SET_MSRS (`host`). The counters that have another program now, or must begin anew. What the host's counter has
    /// counted for one that is written counts no more.
    pub fn write(&mut self, index: u32, value: u64, host: bool) -> Result<Set, Refused> {
        let caps = self.caps;
        match self.register(index).ok_or(Refused)? {
            Register::Counter(n) => {
                let counter = self.counters.get_mut(n).ok_or(Refused)?;
                // The old numbers of general counters take 32 bits.
                let value = if n < GENERAL && !host { value as u32 as i32 as u64 } else { value };
                counter.value = value & caps.mask(n);
                counter.by_software = 0;
                Ok(1 << n)
            }
            Register::Select(n) => {
                let counter = self.counters.get_mut(n).ok_or(Refused)?;
                if value & select::RESERVED != 0 {
                    return Err(Refused);
                }
                let changed = core::mem::replace(&mut counter.select, value) != value;
                Ok(if changed { 1 << n } else { 0 })
            }
            Register::FixedCtrl => {
                let defined = (0..caps.fixed).fold(0, |bits, n| bits | fixed_ctrl::DEFINED << (4 * n));
                if value & !defined != 0 {
                    return Err(Refused);
                }
                let changed = core::mem::replace(&mut self.fixed_ctrl, value) ^ value;
                Ok((0..FIXED).filter(|n| changed >> (4 * n) & 0xF != 0).fold(0, |set, n| set | 1 << (GENERAL + n)))
            }
            Register::GlobalStatus => {
                if !host || value & !(caps.enables() | STATUS_OTHERS) != 0 {
                    return Err(Refused);
                }
                self.global_status = value;
                Ok(0)
            }
            Register::GlobalCtrl => {
                if value & !caps.enables() != 0 {
                    return Err(Refused);
                }
                let changed = core::mem::replace(&mut self.global_ctrl, value) ^ value;
                Ok((0..COUNTERS).filter(|&n| changed & global_bit(n) != 0).fold(0, |set, n| set | 1 << n))
            }
            Register::OverflowCtrl => {
                if value & !(caps.enables() | STATUS_OTHERS) != 0 {
                    return Err(Refused);
                }
                if !host {
                    self.global_status &= !value;
                }
                Ok(0)
            }
        }
    }

    /// PERFEVTSELx, or what it would be for a fixed counter.
    pub fn select(&self, counter: usize) -> u64 {
        let Some(fixed) = counter.checked_sub(GENERAL) else {
            return self.counters.get(counter).map_or(0, |counter| counter.select);
        };
        let control = self.fixed_ctrl >> (4 * (fixed as u32 % 16));
        let bits = [
            (fixed_ctrl::KERNEL, select::KERNEL | select::ENABLE),
            (fixed_ctrl::USER, select::USER | select::ENABLE),
            (fixed_ctrl::INTERRUPT, select::INTERRUPT),
        ];
        let set = bits.into_iter().filter(|(bit, _)| control & bit != 0);
        set.fold(FIXED_EVENTS.get(fixed).copied().unwrap_or(0), |select, (_, bits)| select | bits)
    }

    /// What is to be counted for a counter, if it counts.
    pub fn program(&self, counter: usize) -> Option<Program> {
        let select = self.select(counter);
        let on = self.caps.has(counter)
            && (self.caps.version < 2 || self.global_ctrl & global_bit(counter) != 0)
            && select & select::ENABLE != 0;
        on.then_some(Program {
            event: select & (select::EVENT | select::EDGE | select::INVERT | select::THRESHOLD),
            user: select & select::USER != 0,
            kernel: select & select::KERNEL != 0,
        })
    }

    /// How much a counter counts until it overflows: never 0.
    pub fn until_overflow(&self, counter: usize) -> u64 {
        let mask = self.caps.mask(counter);
        match self.value(counter, 0).wrapping_neg() & mask {
            0 => mask.wrapping_add(1),
            left => left,
        }
    }

    /// Whether a counter's overflow raises an interrupt.
    pub fn interrupts(&self, counter: usize) -> bool {
        self.select(counter) & select::INTERRUPT != 0
    }

    /// Whether a counter counts instructions, whatever else it is told.
    pub fn counts_instructions(&self, counter: usize) -> bool {
        self.program(counter).is_some_and(|program| program.event & select::EVENT == INSTRUCTIONS)
    }

    /// Software carried out an instruction at this privilege level. `counters`: those that count instructions. Those of them that have to be
    /// looked after: that raise an interrupt, or overflow without any help.
    pub fn retired(&mut self, counters: Set, cpl: u8) -> Set {
        let mut attention = 0;
        for n in (0..COUNTERS).filter(|n| counters >> n & 1 != 0) {
            let select = self.select(n);
            let wanted = if cpl == 0 { select::KERNEL } else { select::USER };
            if select & wanted == 0 {
                continue;
            }
            let mask = self.caps.mask(n);
            let Some(counter) = self.counters.get_mut(n) else { continue };
            counter.by_software = counter.by_software.saturating_add(1);
            if select & select::INTERRUPT != 0 || counter.value.wrapping_add(counter.by_software) > mask {
                attention |= 1 << n;
            }
        }
        attention
    }

    /// The host's counter has counted this much and begins anew. Whether what software did made the counter overflow: of its own overflows
    /// the host's counter [tells](Self::overflowed).
    pub fn settle(&mut self, counter: usize, counted: u64) -> bool {
        let mask = self.caps.mask(counter);
        let Some(it) = self.counters.get_mut(counter) else { return false };
        let before = it.value.wrapping_add(counted) & mask;
        it.value = before.wrapping_add(core::mem::take(&mut it.by_software)) & mask;
        it.value < before
    }

    /// A counter overflowed. Whether that raises an interrupt.
    pub fn overflowed(&mut self, counter: usize) -> bool {
        self.global_status |= self.caps.enables() & global_bit(counter);
        self.interrupts(counter)
    }
}

/// The counters in a set.
pub fn counters(set: Set) -> impl Iterator<Item = usize> {
    let mut left = set;
    iter::from_fn(move || {
        let n = left.trailing_zeros() as usize;
        left &= left.wrapping_sub(1);
        (n < COUNTERS).then_some(n)
    })
}
