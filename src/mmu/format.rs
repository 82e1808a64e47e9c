// SPDX-License-Identifier: GPL-2.0
//! What nested-table code needs to know about the bits of an entry.
#![forbid(unsafe_code)]

use crate::arch::paging::{Level, ADDRESS};
use crate::arch::Hpa;

/// How the host's memory type and the guest's choices combine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryType {
    /// Ordinary memory.
    WriteBack,
    /// Device memory of the host.
    Uncached,
}

/// What a page may be used for. Every mapped page may be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prot {
    pub write: bool,
    pub execute: bool,
    /// Mark it accessed now: right for the page that faulted, wrong for its neighbours mapped on speculation.
    pub accessed: bool,
    /// Mark it dirty now, which spares the CPU a locked update. Only meaningful with `write`.
    pub dirty: bool,
    pub memory_type: MemoryType,
}

impl Prot {
    /// Ordinary memory, mapped because the guest touched it.
    pub const fn touched(write: bool, execute: bool) -> Self {
        Self { write, execute, accessed: true, dirty: write, memory_type: MemoryType::WriteBack }
    }
}

/// The layout of an entry of one vendor's nested tables: pure bit work.
///
/// All formats share 512 entries of 64 bits per table, the address in bits 51 to 12, and [`Self::LARGE`] for a page
/// above the lowest level. An entry of 0 maps nothing.
pub trait Format {
    const WRITABLE: u64;
    /// Set by hardware in every entry that a walk uses.
    const ACCESSED: u64;
    /// Set by hardware in the entry that maps a page, on a write.
    const DIRTY: u64;
    const LARGE: u64 = 1 << 7;

    /// An entry that refers to a table. Everything is allowed: pages restrict it.
    fn table(table: Hpa) -> u64;

    /// An entry that maps the page at `page`, which is aligned to `level`.
    fn leaf(page: Hpa, level: Level, prot: Prot) -> u64;

    /// Whether hardware goes on through the entry.
    fn present(entry: u64) -> bool;

    fn executable(entry: u64) -> bool;

    /// Whether a present entry that maps a page maps it as ordinary memory.
    fn write_back(entry: u64) -> bool;

    /// `entry` with the permissions, accessed and dirty bits of `other` added. Both map the same page.
    fn widen(entry: u64, other: u64) -> u64;

    /// Table or page address of a present entry.
    #[inline]
    fn address(entry: u64) -> Hpa {
        Hpa(entry & ADDRESS)
    }
}
