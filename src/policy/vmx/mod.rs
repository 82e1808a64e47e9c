// SPDX-License-Identifier: GPL-2.0
//! Intel VMX without the instructions: which controls a CPU gets, what an exit means, what events and registers look like at VM entry, when
//! the CPU delivers interrupts itself.
#![forbid(unsafe_code)]

pub mod apicv;
pub mod event;
pub mod exit;
pub mod guest_state;
pub mod msr_bitmap;
pub mod negotiate;
pub mod pdpte;
pub mod restricted;
pub mod timer;

#[cfg(test)]
mod cpus;
#[cfg(test)]
mod exit_tests;
#[cfg(test)]
mod guest_state_tests;
#[cfg(test)]
mod negotiate_tests;

pub use negotiate::{negotiate, CapabilityMsrs, Config, Controls, Features, Fixed, Options, Refusal};
