// SPDX-License-Identifier: GPL-2.0
//! Guest memory: the guest's own paging, the nested tables below it, memory slots and the dirty log.
//!
//! Nothing here takes a lock or touches memory: the caller hands in [`nested::Tables`] and holds the lock that
//! serializes its writers. Concurrent hardware walks are expected everywhere.
#![forbid(unsafe_code)]

pub mod dirty;
pub mod ept;
pub mod format;
pub mod guest_mem;
pub mod identity;
pub mod nested;
pub mod npt;
pub mod slots;
pub mod walk;

#[cfg(test)]
mod nested_tests;
#[cfg(test)]
mod slots_tests;
#[cfg(test)]
mod walk_tests;

pub use crate::arch::paging::Level;
pub use dirty::DirtyBitmap;
pub use ept::Ept;
pub use format::{Format, MemoryType, Prot};
pub use guest_mem::{GuestMem, Refused};
pub use nested::{Leaf, MapError, Mapped, NestedTable, Progress, Tables};
pub use npt::Npt;
pub use slots::{Change, Slot, SlotError};
pub use walk::{translate, walk, Access, AccessKind, Context, Translation, WalkError};
