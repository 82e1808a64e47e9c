// SPDX-License-Identifier: GPL-2.0
//! What a guest may see and change: CPUID filter and table, the limits that follow from it, and the MSRs. And what a vendor's room needs to
//! decide that can be decided without its instructions.
#![forbid(unsafe_code)]

pub mod caps;
pub mod cpuid;
pub mod cpuid_table;
pub mod msr;
pub mod pmu;
pub mod tsc;
pub mod vmx;

#[cfg(test)]
mod cpuid_tests;

pub use caps::GuestCaps;
pub use cpuid::HostFeatures;
pub use cpuid_table::CpuidTable;
