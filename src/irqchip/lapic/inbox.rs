// SPDX-License-Identifier: GPL-2.0
//! What other threads want from a vCPU's local APIC, until its own thread takes it.
//!
//! Order. A sender first marks the vector, then the summary; the owner first takes the summary, then the vectors. So a
//! summary bit that is gone was seen together with everything before it, and at worst the owner finds an empty word.
//! The summary is also one side of the usual kick protocol: the sender posts and then looks whether the owner runs
//! guest code; the owner says that it will, and then looks at [`Inbox::is_empty`]. Both use sequential consistency, so
//! one of the two notices the other. A sender whose vector was already there need not kick: whoever put it there does.
#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

use super::{Lapic, PostedInterrupts};
use crate::irqchip::message::{DeliveryMode, Message, Trigger};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Summary bits 0-3: the vector word of that number has something.
const WORDS: u32 = 0xF;
const NMI: u32 = 1 << 4;
const SMI: u32 = 1 << 5;
const INIT: u32 = 1 << 6;
const SIPI: u32 = 1 << 7;
const PIC: u32 = 1 << 8;
const TIMER: u32 = 1 << 9;
const UNHALT: u32 = 1 << 10;

/// The signals beside the IRR that [`Inbox::drain`] found. INIT comes before the SIPI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signals {
    pub nmi: bool,
    pub smi: bool,
    pub init: bool,
    /// Start-up vector: the CPU starts at `vector << 12`, if it waits for a SIPI.
    pub sipi: Option<u8>,
    /// The 8259A's output may have risen.
    pub pic: bool,
    /// The host timer for [`Lapic::deadline`] fired: call [`Lapic::timer_expired`].
    pub timer: bool,
    /// Paravirtual kick of a halted CPU.
    pub unhalt: bool,
}

/// Result of a post.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    /// Newly pending: kick the vCPU.
    New,
    /// It was pending already: nothing to do.
    Coalesced,
    /// Nothing that a local APIC takes.
    Dropped,
}

/// One vCPU's inbox.
#[derive(Debug, Default)]
pub struct Inbox {
    summary: AtomicU32,
    sipi_vector: AtomicU32,
    vectors: [AtomicU64; 4],
    /// How each vector was last sent: set for level-triggered. Only means something where the vector is pending.
    levels: [AtomicU64; 4],
}

impl Inbox {
    pub const fn new() -> Self {
        Self {
            summary: AtomicU32::new(0),
            sipi_vector: AtomicU32::new(0),
            vectors: [const { AtomicU64::new(0) }; 4],
            levels: [const { AtomicU64::new(0) }; 4],
        }
    }

    /// Whether there is nothing to drain: one load.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.summary.load(Ordering::SeqCst) == 0
    }

    #[inline]
    fn raise(&self, bits: u32) -> bool {
        self.summary.fetch_or(bits, Ordering::SeqCst) & bits != bits
    }

    /// A fixed interrupt. True: newly pending; false: it was pending here already, and no kick is needed. The caller
    /// has seen in the card that this APIC is enabled; if it no longer is, the interrupt vanishes in `drain`.
    #[inline]
    pub fn post_fixed(&self, vector: u8, trigger: Trigger) -> bool {
        let word = (vector >> 6) as usize;
        let bit = 1u64 << (vector & 63);
        match trigger {
            Trigger::Level => {
                self.levels[word].fetch_or(bit, Ordering::Relaxed);
            }
            // Nearly every interrupt is edge-triggered and always was: no locked operation for those.
            Trigger::Edge if self.levels[word].load(Ordering::Relaxed) & bit != 0 => {
                self.levels[word].fetch_and(!bit, Ordering::Relaxed);
            }
            Trigger::Edge => {}
        }
        let is_new = self.vectors[word].fetch_or(bit, Ordering::AcqRel) & bit == 0;
        if is_new {
            self.raise(1 << word);
        }
        is_new
    }

    /// True: newly pending.
    pub fn post_nmi(&self) -> bool {
        self.raise(NMI)
    }

    /// True: newly pending.
    pub fn post_smi(&self) -> bool {
        self.raise(SMI)
    }

    /// INIT. It takes back a SIPI that was not served yet. True: newly pending.
    pub fn post_init(&self) -> bool {
        let update = |summary| Some((summary & !SIPI) | INIT);
        let before = self.summary.fetch_update(Ordering::SeqCst, Ordering::SeqCst, update);
        before.is_ok_and(|summary| summary & INIT == 0)
    }

    /// Start-up IPI. True: newly pending; of several ones the last vector counts.
    pub fn post_sipi(&self, vector: u8) -> bool {
        self.sipi_vector.store(vector as u32, Ordering::Release);
        self.raise(SIPI)
    }

    /// The 8259A wants attention.
    pub fn post_pic(&self) -> bool {
        self.raise(PIC)
    }

    /// The host timer fired.
    pub fn post_timer(&self) -> bool {
        self.raise(TIMER)
    }

    /// Paravirtual kick of a halted CPU.
    pub fn post_unhalt(&self) -> bool {
        self.raise(UNHALT)
    }

    /// Posts a message whose destination was found to be this CPU.
    pub fn post(&self, message: &Message) -> Posted {
        if message.is_deassert() {
            return Posted::Dropped;
        }
        let is_new = match message.delivery {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => self.post_fixed(message.vector, message.trigger),
            DeliveryMode::Smi => self.post_smi(),
            DeliveryMode::RemoteRead => self.post_unhalt(),
            DeliveryMode::Nmi => self.post_nmi(),
            DeliveryMode::Init => self.post_init(),
            DeliveryMode::StartUp => self.post_sipi(message.vector),
            // The 8259A is wired to LINT0: an ExtINT message has nobody to acknowledge it.
            DeliveryMode::ExtInt => return Posted::Dropped,
        };
        if is_new {
            Posted::New
        } else {
            Posted::Coalesced
        }
    }

    /// Moves all pending vectors into `lapic`'s IRR and returns the signals. Only the owner calls it.
    pub fn drain(&self, lapic: &mut Lapic) -> Signals {
        let summary = self.summary.swap(0, Ordering::SeqCst);
        let mut words = summary & WORDS;
        while words != 0 {
            let word = words.trailing_zeros() as usize & 3;
            words &= words - 1;
            let vectors = self.vectors[word].swap(0, Ordering::AcqRel);
            lapic.accept_word(word, vectors, self.levels[word].load(Ordering::Relaxed));
        }
        if summary & !WORDS == 0 {
            return Signals::default();
        }
        Signals {
            nmi: summary & NMI != 0,
            smi: summary & SMI != 0,
            init: summary & INIT != 0,
            sipi: (summary & SIPI != 0).then(|| self.sipi_vector.load(Ordering::Acquire) as u8),
            pic: summary & PIC != 0,
            timer: summary & TIMER != 0,
            unhalt: summary & UNHALT != 0,
        }
    }

    /// Whether an edge-triggered interrupt may be posted to the CPU itself: its vector is legal, and was not level-triggered here last.
    #[inline]
    pub fn takes_posted(&self, vector: u8) -> bool {
        vector >= 16 && self.levels[(vector >> 6) as usize].load(Ordering::Relaxed) & 1 << (vector & 63) == 0
    }

    /// Moves what was posted to the CPU, and what it did not take, into `lapic`'s IRR. Only the owner calls it.
    pub fn drain_posted(&self, posted: &PostedInterrupts, lapic: &mut Lapic) {
        for (word, vectors) in posted.take().into_iter().enumerate() {
            lapic.accept_word(word, vectors, self.levels[word & 3].load(Ordering::Relaxed));
        }
    }

    /// Forgets everything: before a state is restored, and when the CPU is reset.
    pub fn clear(&self) {
        self.summary.store(0, Ordering::SeqCst);
        for word in &self.vectors {
            word.store(0, Ordering::SeqCst);
        }
    }
}
