// SPDX-License-Identifier: GPL-2.0
//! A look at a process's page tables, as the CPU would take it: no locks, and no references to the pages found.
//!
//! What is found may be gone a moment later. It is good for mapping under an MMU notifier, which tells when it goes (see
//! `guest_mem.rs`). Only entries are taken that the CPU would use without writing to them: accessed is set, and dirty where
//! writing is wanted. So the host's entry already says all that it must say about the guest's use of the page, and nothing is
//! owed to the page itself. Everything unusual (device memory, protection keys, uncached pages) is left to the slow path.
use core::{arch::asm, ptr};
use kernel::bindings;

use super::page::direct_map;
use crate::arch::{
    paging::{entry, Level, ENTRIES},
    Hpa, Hva,
};

/// The kernel's mark on pages that are not to be treated as memory; a bit that the CPU ignores.
const SPECIAL: u64 = 1 << bindings::_PAGE_BIT_SPECIAL;
/// The protection key of a page.
const KEY: u64 = 0xf << entry::PK_SHIFT;

/// What the tables say about an address.
#[derive(Clone, Copy)]
pub(super) struct Seen {
    /// The 4 KiB frame of the address.
    pub(super) hpa: Hpa,
    /// Writable, and dirty already.
    pub(super) writable: bool,
    /// The size of the page.
    pub(super) level: Level,
    /// The 4 KiB behind it may be there as well.
    pub(super) next: bool,
}

/// Interrupts off, as they were before on drop.
struct IrqsSaved(u64);

impl IrqsSaved {
    fn new() -> Self {
        let flags;
        // SAFETY: uses only the stack; the drop turns interrupts on again if they were.
        unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) };
        Self(flags)
    }
}

impl Drop for IrqsSaved {
    fn drop(&mut self) {
        const IF: u64 = 1 << 9;
        if self.0 & IF != 0 {
            // SAFETY: they were on before.
            unsafe { asm!("sti", options(nostack)) };
        }
    }
}

/// Entry number `hva` >> `SHIFT` of a table, and where it is.
///
/// # Safety
///
/// `table` must be a page table that is not freed meanwhile. Entries may change at any time, so each is read once.
#[inline(always)]
unsafe fn read<const SHIFT: u32>(table: *const u64, hva: Hva) -> (*const u64, u64) {
    let slot = table.wrapping_add((hva.0 >> SHIFT) as usize % ENTRIES);
    // SAFETY: the caller's promise; a table has 512 entries.
    (slot, unsafe { ptr::read_volatile(slot) })
}

/// The last-level entry for `hva`, where it is, and its level. It may be absent; `None` when there is no table that has it.
///
/// # Safety
///
/// `mm` must be the current address space, and interrupts off as long as the pointer is used: the kernel frees page
/// tables only after every CPU has had interrupts on.
#[inline]
unsafe fn leaf(mm: *const bindings::mm_struct, hva: Hva) -> Option<(*const u64, u64, Level)> {
    // SAFETY: set once at boot.
    let (top_shift, frame_mask) = unsafe { (bindings::pgdir_shift, bindings::physical_mask & !0xfff) };
    let five_levels = top_shift != 39;
    // The upper half is the kernel's.
    if hva.0 >> (if five_levels { 56 } else { 47 }) != 0 {
        return None;
    }
    let table = |value: u64| -> Option<*const u64> {
        const NEED: u64 = entry::P | entry::U;
        (value & NEED == NEED).then(|| direct_map(Hpa(value & frame_mask)).cast_const().cast())
    };
    // SAFETY: by the caller's promise every table found stays while interrupts are off.
    unsafe {
        let mut top = (*mm).__bindgen_anon_1.pgd.cast_const().cast::<u64>();
        if five_levels {
            top = table(read::<48>(top, hva).1)?;
        }
        let next = table(read::<39>(top, hva).1)?;
        let (slot, value) = read::<30>(next, hva);
        let next = table(value)?;
        if value & entry::PS != 0 {
            return Some((slot, value, Level::Page1G));
        }
        let (slot, value) = read::<21>(next, hva);
        let next = table(value)?;
        if value & entry::PS != 0 {
            return Some((slot, value, Level::Page2M));
        }
        let (slot, value) = read::<12>(next, hva);
        Some((slot, value, Level::Page4K))
    }
}

/// Which entries allow the access as they are, and what in them is the address.
struct Rule {
    mask: u64,
    value: u64,
    frame: u64,
}

impl Rule {
    #[inline]
    fn new(level: Level, write: bool) -> Self {
        let large_pat = if level == Level::Page4K { 1 << 7 } else { 1 << 12 };
        let odd = SPECIAL | KEY | entry::PWT | entry::PCD | large_pat;
        let need = entry::P | entry::U | entry::A | if write { entry::W | entry::D } else { 0 };
        // SAFETY: set once at boot.
        let address = unsafe { bindings::physical_mask };
        Self { mask: odd | need, value: need, frame: address & !(level.bytes() - 1) }
    }

    /// The frame, if the entry will do.
    #[inline]
    fn frame(&self, entry: u64) -> Option<u64> {
        (entry & self.mask == self.value).then_some(entry & self.frame)
    }
}

/// Why a look at the tables was not enough.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Unseen {
    /// Nothing is mapped there: only a page fault helps.
    Absent,
    /// There is something, but the CPU would have to mark it, or it is unusual.
    Odd,
}

/// How the current address space maps `hva`, if it does in a way that needs no more work.
///
/// # Safety
///
/// `mm` must be the current address space.
#[inline]
pub(super) unsafe fn peek(mm: *const bindings::mm_struct, hva: Hva, write: bool) -> Result<Seen, Unseen> {
    let _irqs = IrqsSaved::new();
    // SAFETY: the caller's promise, and interrupts are off.
    let (slot, value, level) = unsafe { leaf(mm, hva) }.ok_or(Unseen::Absent)?;
    if value & entry::P == 0 {
        return Err(Unseen::Absent);
    }
    let last = (hva.0 >> 12) as usize % ENTRIES == ENTRIES - 1;
    // SAFETY: not the last one of its table, which stays.
    let next = last || level > Level::Page4K || unsafe { ptr::read_volatile(slot.wrapping_add(1)) } & entry::P != 0;
    Rule::new(level, write).frame(value).ok_or(Unseen::Odd).map(|frame| Seen {
        next,
        hpa: Hpa(frame | (hva.0 & (level.bytes() - 1) & !0xfff)),
        writable: value & (entry::W | entry::D) == entry::W | entry::D,
        level,
    })
}

/// The size of the page that maps `hva`; 4 KiB when there is none.
///
/// # Safety
///
/// `mm` must be the current address space.
pub(super) unsafe fn level(mm: *const bindings::mm_struct, hva: Hva) -> Level {
    let _irqs = IrqsSaved::new();
    // SAFETY: the caller's promise, and interrupts are off.
    unsafe { leaf(mm, hva) }.map_or(Level::Page4K, |(_, _, level)| level)
}

/// Fills `frames` with what is mapped from `hva` on, up to the first page that is not there or the end of the 2 MiB that `hva` is in;
/// returns how many that are.
///
/// # Safety
///
/// `mm` must be the current address space.
pub(super) unsafe fn peek_run(
    mm: *const bindings::mm_struct,
    hva: Hva,
    write: bool,
    frames: &mut [Option<Hpa>],
) -> usize {
    let index = (hva.0 >> 12) as usize % ENTRIES;
    let count = frames.len().min(ENTRIES - index);
    let _irqs = IrqsSaved::new();
    // SAFETY: the caller's promise, and interrupts are off.
    let Some((slot, value, level)) = (unsafe { leaf(mm, hva) }) else { return 0 };
    let rule = Rule::new(level, write);
    let frames = frames.iter_mut().take(count).enumerate();
    if level == Level::Page4K {
        for (at, out) in frames {
            // SAFETY: in the table of `slot`, which goes on for as long as the 2 MiB do; interrupts are still off.
            match rule.frame(unsafe { ptr::read_volatile(slot.wrapping_add(at)) }) {
                Some(frame) => *out = Some(Hpa(frame)),
                None => return at,
            }
        }
    } else if let Some(frame) = rule.frame(value) {
        let first = frame | (hva.0 & (level.bytes() - 1) & !0xfff);
        for (at, out) in frames {
            *out = Some(Hpa(first.wrapping_add(at as u64 * 4096)));
        }
    } else {
        return 0;
    }
    count
}
