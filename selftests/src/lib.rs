// SPDX-License-Identifier: GPL-2.0
//! What the test programs share: raw ioctls, a KTAP harness, virtual machines, and small guests to run in them.
//!
//! Nothing here hides an argument check: every ioctl goes through `libc::ioctl` as it is, so that wrong arguments can
//! be passed as easily as right ones.

pub mod counts;
pub mod guest;
pub mod harness;
pub mod ioctls;
pub mod kmsg;
pub mod rng;
pub mod routing;
pub mod sys;
pub mod vm;

pub use kvm_bindings as kvm;
