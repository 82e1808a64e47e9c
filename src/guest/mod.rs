// SPDX-License-Identifier: GPL-2.0
//! Guest architectural state and the vendor-neutral words for what stopped a guest and what goes into it.
#![forbid(unsafe_code)]

pub mod check;
pub mod event;
pub mod exit;
pub mod queue;
pub mod regs;

pub use event::{Event, Exception};
pub use exit::{Exit, Unintercepted};
pub use regs::{Gpr, Regs, SystemRegs};
