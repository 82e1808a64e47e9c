// SPDX-License-Identifier: GPL-2.0
//! KVM_SET_PMU_EVENT_FILTER: which events userspace lets a guest count. KVM API "KVM_SET_PMU_EVENT_FILTER".
//!
//! An entry is kept as KVM_PMU_EVENT_FLAG_MASKED_EVENTS has it. Not supported: AMD's events above 255.
#![forbid(unsafe_code)]

use super::GENERAL;
use crate::abi::vm::{KvmPmuEventFilter, KVM_PMU_EVENT_ALLOW, KVM_PMU_EVENT_DENY, KVM_PMU_EVENT_FLAG_MASKED_EVENTS};
use core::ops::Deref;

/// Most entries.
pub const MAX_EVENTS: u32 = 300;

/// An entry's event, the unit mask that it wants, whether it excludes, and which bits of the unit mask it looks at.
const EVENT: u64 = 0xFF;
const UNIT: u64 = 0xFF00;
const EXCLUDE: u64 = 1 << 55;
const UNIT_MASK: u64 = 0xFF << 56;

/// Why a filter is refused: EINVAL or E2BIG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadFilter {
    Invalid,
    TooMany,
}

/// Checks everything but the entries.
pub fn check(head: &KvmPmuEventFilter) -> Result<(), BadFilter> {
    let known = matches!(head.action, KVM_PMU_EVENT_ALLOW | KVM_PMU_EVENT_DENY);
    if !known || head.flags & !KVM_PMU_EVENT_FLAG_MASKED_EVENTS != 0 {
        return Err(BadFilter::Invalid);
    }
    if head.nevents > MAX_EVENTS {
        return Err(BadFilter::TooMany);
    }
    Ok(())
}

/// A filter with entries that it owns or borrows.
#[derive(Debug)]
pub struct Filter<E> {
    allows: bool,
    fixed: u32,
    masked: bool,
    events: E,
}

impl<E: Deref<Target = [u64]>> Filter<E> {
    /// `head` was [checked](check). Entries without masks that name no event of this CPU match nothing; with masks they are refused.
    pub fn new(head: &KvmPmuEventFilter, events: E) -> Result<Self, BadFilter> {
        let masked = head.flags & KVM_PMU_EVENT_FLAG_MASKED_EVENTS != 0;
        if masked && events.iter().any(|entry| entry & !(EVENT | UNIT | EXCLUDE | UNIT_MASK) != 0) {
            return Err(BadFilter::Invalid);
        }
        Ok(Self { allows: head.action == KVM_PMU_EVENT_ALLOW, fixed: head.fixed_counter_bitmap, masked, events })
    }

    /// Whether `counter` may count the event in `select`, which is that of PERFEVTSELx.
    pub fn allows(&self, counter: usize, select: u64) -> bool {
        let listed = match counter.checked_sub(GENERAL) {
            Some(fixed) => self.fixed.checked_shr(fixed as u32).unwrap_or(0) & 1 != 0,
            None => self.matches(select, 0) && !self.matches(select, EXCLUDE),
        };
        listed == self.allows
    }

    /// Whether an entry of this kind matches.
    fn matches(&self, select: u64, kind: u64) -> bool {
        if !self.masked {
            return kind == 0 && self.events.iter().any(|entry| *entry == select & (EVENT | UNIT));
        }
        let matches = |entry: &u64| {
            let mask = (entry & UNIT_MASK) >> 48;
            entry & EXCLUDE == kind && entry & EVENT == select & EVENT && select & UNIT & mask == entry & UNIT
        };
        self.events.iter().any(matches)
    }
}
