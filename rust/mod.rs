// SPDX-License-Identifier: GPL-2.0
//! Kernel glue: the only room that touches `bindings::`, C or kernel services. What is `pub(crate)` here is all that the rest of
//! the module sees, and all of it is safe to use from code that forbids unsafe.

mod bindings;
pub(crate) mod code;
pub(crate) mod cpu;
pub(crate) mod debugfs;
pub(crate) mod error;
pub(crate) mod eventfd;
pub(crate) mod fd;
pub(crate) mod fpu;
pub(crate) mod guest_mem;
mod host_walk;
pub(crate) mod kick;
pub(crate) mod lock;
pub(crate) mod page;
pub(crate) mod percpu;
pub(crate) mod phys;
pub(crate) mod pmu;
pub(crate) mod power;
pub(crate) mod signal;
pub(crate) mod srcu;
pub(crate) mod tables;
pub(crate) mod task;
pub(crate) mod timer;
pub(crate) mod trace;
pub(crate) mod user;
pub(crate) mod virt;
pub(crate) mod vmx;
