// SPDX-License-Identifier: GPL-2.0
//! Interrupt controllers and their timer: local APIC, I/O APIC, two 8259A, 8254, and the table that joins them.
//!
//! Every model is a plain value with one owner. It gets the time as an argument (`now_ns`: host monotonic clock,
//! nanoseconds) and returns the work that somebody else must do: a [`Message`] to deliver, a deadline to arm, pins
//! whose interrupt was acknowledged. Only [`lapic::Inbox`] and [`dest::CardCell`] are shared between threads; they are
//! made of atomics. Who sends needs the target's card and inbox, never its [`lapic::Lapic`].
#![forbid(unsafe_code)]

mod bits;
#[cfg(test)]
mod board;
pub mod dest;
pub mod ioapic;
pub mod lapic;
pub mod message;
pub mod pic;
pub mod pit;
pub mod routing;
#[cfg(test)]
mod testing;

pub use bits::Bits256;
pub use message::{DeliveryMode, DestMode, Eoi, Gp, LineSource, LineStatus, Message, Shorthand, Trigger};

/// Shortest period that a guest's periodic timer gets, in nanoseconds: host timers are not throttled by the
/// scheduler, so a shorter one would let a guest take a host CPU. KVM's `min_timer_period_us` default.
pub const MIN_TIMER_PERIOD_NS: u64 = 200_000;
