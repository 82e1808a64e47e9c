// SPDX-License-Identifier: GPL-2.0
//! Interrupts that the CPU takes for the guest that it runs, without an exit: the posted-interrupt descriptor, as the CPU reads it. SDM
//! "Posted-Interrupt Processing".
//!
//! A sender marks the vector and then that there is something, and tells the CPU by an interrupt if the guest runs. Whoever takes, the CPU
//! or the owner's [`Inbox::drain_posted`](super::Inbox::drain_posted), first clears that mark and then takes the vectors: as with the inbox,
//! at worst it finds none. Only for edge-triggered interrupts: the CPU knows no trigger modes.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

/// The descriptor.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct PostedInterrupts {
    /// 0: one bit a vector.
    requests: [AtomicU64; 4],
    /// 20h: bit 0 is "outstanding notification".
    control: AtomicU64,
    unused: [u64; 3],
}

const OUTSTANDING: u64 = 1;

impl PostedInterrupts {
    pub const fn new() -> Self {
        Self { requests: [const { AtomicU64::new(0) }; 4], control: AtomicU64::new(0), unused: [0; 3] }
    }

    /// Marks `vector`. `None`: it was marked already. Else whether the owner is to be told: nobody has told it since it took the last ones.
    #[inline]
    pub fn post(&self, vector: u8) -> Option<bool> {
        let bit = 1 << (vector & 63);
        if self.requests[(vector >> 6) as usize].fetch_or(bit, Ordering::AcqRel) & bit != 0 {
            return None;
        }
        Some(self.control.fetch_or(OUTSTANDING, Ordering::SeqCst) & OUTSTANDING == 0)
    }

    /// Whether there may be something to take.
    #[inline]
    pub fn is_outstanding(&self) -> bool {
        self.control.load(Ordering::SeqCst) & OUTSTANDING != 0
    }

    /// Takes all vectors, as words.
    pub(super) fn take(&self) -> [u64; 4] {
        self.control.fetch_and(!OUTSTANDING, Ordering::SeqCst);
        [0, 1, 2, 3].map(|word: usize| self.requests[word & 3].swap(0, Ordering::AcqRel))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irqchip::lapic::{regs, Inbox, Lapic, LapicFeatures};
    use crate::irqchip::message::Trigger;
    use core::mem::{align_of, offset_of, size_of};

    #[test]
    fn layout() {
        assert_eq!((size_of::<PostedInterrupts>(), align_of::<PostedInterrupts>()), (64, 64));
        assert_eq!((offset_of!(PostedInterrupts, requests), offset_of!(PostedInterrupts, control)), (0, 0x20));
    }

    fn lapic() -> Lapic {
        let mut lapic = Lapic::new(0, true, LapicFeatures::default());
        let _ = lapic.mmio_write(regs::SVR, 4, 0x1FF, 0);
        lapic
    }

    #[test]
    fn told_once() {
        let posted = PostedInterrupts::new();
        assert!(!posted.is_outstanding());
        assert_eq!(posted.post(0x31), Some(true));
        assert_eq!(posted.post(0x31), None);
        assert_eq!(posted.post(0xFF), Some(false), "somebody has told already");
        assert!(posted.is_outstanding());
        let (inbox, mut lapic) = (Inbox::new(), lapic());
        inbox.drain_posted(&posted, &mut lapic);
        assert!(!posted.is_outstanding());
        assert!(lapic.is_eoi_outstanding(0x31) && lapic.is_eoi_outstanding(0xFF));
        assert_eq!(posted.post(0x31), Some(true));
    }

    #[test]
    fn level_triggered_ones_stay_so() {
        let (posted, inbox, mut lapic) = (PostedInterrupts::new(), Inbox::new(), lapic());
        assert!(inbox.takes_posted(0x44));
        assert_eq!(posted.post(0x44), Some(true));
        inbox.post_fixed(0x44, Trigger::Level);
        assert!(!inbox.takes_posted(0x44), "the CPU would not know");
        let _ = inbox.drain(&mut lapic);
        inbox.drain_posted(&posted, &mut lapic);
        assert!(lapic.level_vectors().test(0x44));
        inbox.post_fixed(0x44, Trigger::Edge);
        assert!(inbox.takes_posted(0x44), "edge-triggered again");
    }
}
