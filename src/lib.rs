// SPDX-License-Identifier: GPL-2.0
//! Host crate root: the pure rooms of Krab under `cargo test`.
//!
//! The kernel crate root, `krab.rs`, declares the same modules by the same names. Everything below is `core` only:
//! no allocation, no locks, no clocks, no logging, and no reachable panic.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod abi;
pub mod arch;
pub mod emul;
pub mod guest;
pub mod irqchip;
pub mod mmu;
pub mod policy;
