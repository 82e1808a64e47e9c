// SPDX-License-Identifier: GPL-2.0
//! Published facts of the x86 architecture: addresses, registers, bits and layouts. No behaviour lives here.
//!
//! Manuals are cited by title. The revisions meant are:
//! - SDM: Intel 64 and IA-32 Architectures Software Developer's Manual, order 325462, 2025.
//! - APM: AMD64 Architecture Programmer's Manual, publications 24592 to 24594, revision 3.42 and later.
#![forbid(unsafe_code)]

pub mod addr;
pub mod cpuid;
pub mod cr;
pub mod msr;
pub mod paging;
pub mod segment;
pub mod vmcb;
pub mod vmcs;

pub use addr::{Gfn, Gpa, Gva, Hpa, Hva};
pub use paging::Level;
