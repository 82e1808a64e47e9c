// SPDX-License-Identifier: GPL-2.0
//! Events that wait for a guest: which goes in next, and what an exception on top of another becomes.
//!
//! SDM "Priority Among Concurrent Events" and "Interrupt 8 - Double Fault Exception (#DF)".
#![forbid(unsafe_code)]

use super::event::{vector, Event, Exception};

/// Whether the guest can take what can be held off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// RFLAGS.IF.
    pub interrupts_enabled: bool,
    /// In the shadow of STI or MOV SS.
    pub shadow: bool,
}

/// What the next entry does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    pub inject: Option<Event>,
    /// Ask for an exit when an interrupt can be taken.
    pub interrupt_window: bool,
    /// Ask for an exit when the guest leaves its NMI handler (or the shadow) while an NMI waits.
    pub nmi_window: bool,
}

/// Events waiting for one vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct EventQueue {
    /// Was being delivered when the guest exited: goes in again before anything else.
    pub unfinished: Option<Event>,
    /// To be delivered before the next instruction.
    pub exception: Option<Exception>,
    /// NMIs waiting: at most two, as one can be latched while another is handled.
    pub nmis: u8,
    /// The guest is in its NMI handler.
    pub nmi_masked: bool,
    /// The vCPU is to be shut down: an exception during the delivery of a double fault.
    pub triple_fault: bool,
}

#[derive(PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
}

fn class(vector: u8) -> Class {
    match vector {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        _ => Class::Benign,
    }
}

impl EventQueue {
    /// An exception hits the guest now.
    pub fn raise(&mut self, exception: Exception) {
        let earlier = match (self.exception, self.unfinished) {
            (Some(earlier), _) | (None, Some(Event::Exception(earlier))) => earlier,
            _ => {
                self.exception = Some(exception);
                return;
            }
        };
        self.unfinished = None;
        let second = class(exception.vector);
        self.exception = if earlier.vector == vector::DF {
            self.triple_fault = true;
            None
        } else if match class(earlier.vector) {
            Class::Benign => false,
            Class::Contributory => second == Class::Contributory,
            Class::PageFault => second != Class::Benign,
        } {
            Some(Exception::with_code(vector::DF, 0))
        } else {
            Some(exception)
        };
    }

    /// An NMI arrives. A third one is lost, as on hardware.
    pub fn raise_nmi(&mut self) {
        let limit = if self.nmi_masked { 1 } else { 2 };
        self.nmis = self.nmis.saturating_add(1).min(limit);
    }

    /// Whether nothing waits here: the hot path's question.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.unfinished.is_none() && self.exception.is_none() && self.nmis == 0
    }

    /// Whether the next entry begins with the delivery of an event that is the guest's own doing.
    #[inline]
    pub fn is_mid_delivery(&self) -> bool {
        self.unfinished.is_some() || self.exception.is_some()
    }

    /// What goes in at the next entry. `interrupt` acknowledges an external interrupt at its controller and is called only when it can
    /// be delivered now; `interrupt_waits` says whether there is one.
    #[inline]
    pub fn next(
        &mut self,
        readiness: Readiness,
        interrupt_waits: bool,
        interrupt: impl FnOnce() -> Option<u8>,
    ) -> Entry {
        let mut entry = Entry::default();
        if !self.is_empty() {
            entry.inject = match (self.unfinished.take(), self.exception.take()) {
                (Some(event), exception) => {
                    self.exception = exception;
                    Some(event)
                }
                (None, Some(exception)) => Some(Event::Exception(exception)),
                (None, None) => None,
            };
            if self.nmis > 0 {
                if entry.inject.is_none() && !self.nmi_masked && !readiness.shadow {
                    self.nmis -= 1;
                    self.nmi_masked = true;
                    entry.inject = Some(Event::Nmi);
                }
                entry.nmi_window = self.nmis > 0;
            }
        }
        if interrupt_waits {
            if entry.inject.is_none() && readiness.interrupts_enabled && !readiness.shadow {
                entry.inject = interrupt().map(Event::Interrupt);
            } else {
                entry.interrupt_window = true;
            }
        }
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Readiness = Readiness { interrupts_enabled: true, shadow: false };
    const CLOSED: Readiness = Readiness { interrupts_enabled: false, shadow: false };
    const SHADOW: Readiness = Readiness { interrupts_enabled: true, shadow: true };

    fn raised(vectors: &[u8]) -> EventQueue {
        let mut queue = EventQueue::default();
        vectors.iter().for_each(|&v| queue.raise(Exception::plain(v)));
        queue
    }

    #[test]
    fn exceptions_combine_as_the_manual_says() {
        let double = Some(Exception::with_code(vector::DF, 0));
        assert_eq!(raised(&[vector::GP, vector::NP]).exception, double);
        assert_eq!(raised(&[vector::PF, vector::PF]).exception, double);
        assert_eq!(raised(&[vector::PF, vector::GP]).exception, double);
        assert_eq!(raised(&[vector::GP, vector::PF]).exception, Some(Exception::plain(vector::PF)));
        assert_eq!(raised(&[vector::DB, vector::GP]).exception, Some(Exception::plain(vector::GP)));
        assert_eq!(raised(&[vector::PF, vector::DB]).exception, Some(Exception::plain(vector::DB)));
        let triple = raised(&[vector::GP, vector::GP, vector::GP]);
        assert!(triple.triple_fault && triple.exception.is_none());
        assert!(!raised(&[vector::GP, vector::GP]).triple_fault);
    }

    #[test]
    fn an_exception_during_the_delivery_of_another_combines_with_it() {
        let mut queue = EventQueue {
            unfinished: Some(Event::Exception(Exception::page_fault(0, 0x1000))),
            ..EventQueue::default()
        };
        queue.raise(Exception::page_fault(2, 0x2000));
        assert_eq!(queue.exception, Some(Exception::with_code(vector::DF, 0)));
        assert_eq!(queue.unfinished, None);
    }

    #[test]
    fn an_interrupted_interrupt_goes_in_again_after_the_fault_is_not_lost() {
        let mut queue = EventQueue { unfinished: Some(Event::Interrupt(0x30)), ..EventQueue::default() };
        queue.raise(Exception::GP0);
        let first = queue.next(CLOSED, false, || None).inject;
        let second = queue.next(CLOSED, false, || None).inject;
        assert_eq!((first, second), (Some(Event::Interrupt(0x30)), Some(Event::Exception(Exception::GP0))));
    }

    #[test]
    fn interrupts_wait_for_the_window() {
        let mut queue = EventQueue::default();
        for closed in [CLOSED, SHADOW] {
            let entry = queue.next(closed, true, || panic!("acknowledged while closed"));
            assert_eq!(entry, Entry { interrupt_window: true, ..Entry::default() });
        }
        assert_eq!(queue.next(OPEN, true, || Some(0x40)).inject, Some(Event::Interrupt(0x40)));
        assert_eq!(queue.next(OPEN, false, || panic!("nothing waits")), Entry::default());
    }

    #[test]
    fn nmis_come_one_at_a_time_and_a_third_is_lost() {
        let mut queue = EventQueue::default();
        queue.raise_nmi();
        queue.raise_nmi();
        queue.raise_nmi();
        assert_eq!(queue.nmis, 2);
        let entry = queue.next(OPEN, true, || panic!("the NMI goes first"));
        assert_eq!(entry, Entry { inject: Some(Event::Nmi), interrupt_window: true, nmi_window: true });
        assert_eq!(queue.next(OPEN, false, || None), Entry { nmi_window: true, ..Entry::default() });
        queue.nmi_masked = false;
        assert_eq!(queue.next(SHADOW, false, || None), Entry { nmi_window: true, ..Entry::default() });
        assert_eq!(queue.next(CLOSED, false, || None).inject, Some(Event::Nmi));
        assert_eq!(queue.nmis, 0);
    }
}
