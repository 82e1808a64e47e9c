// SPDX-License-Identifier: GPL-2.0
//! Intel VMX without the instructions: which controls a CPU gets, what an exit means, what an event looks like at VM entry.
#![forbid(unsafe_code)]

pub mod event;
pub mod exit;
pub mod negotiate;

#[cfg(test)]
mod cpus;
#[cfg(test)]
mod exit_tests;
#[cfg(test)]
mod negotiate_tests;

pub use negotiate::{negotiate, CapabilityMsrs, Config, Controls, Features, Fixed, Options, Refusal};
