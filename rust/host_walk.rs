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
    paging::{entry, Level, ENTRIES, INDEX_BITS},
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

/// The entry that maps `hva`, where it is, and its level.
///
/// # Safety
///
/// `mm` must be the current address space, and interrupts off as long as the pointer is used: the kernel frees page
/// tables only after every CPU has had interrupts on.
unsafe fn leaf(mm: *const bindings::mm_struct, hva: Hva) -> Option<(*const u64, u64, Level)> {
    // SAFETY: set once at boot.
    let (top_shift, frame_mask) = unsafe { (bindings::pgdir_shift, bindings::physical_mask) };
    // The upper half is the kernel's.
    if hva.0 >> (top_shift + INDEX_BITS - 1) != 0 {
        return None;
    }
    // SAFETY: the caller's promise.
    let mut table = unsafe { (*mm).__bindgen_anon_1.pgd }.cast_const().cast::<u64>();
    let mut shift = top_shift;
    loop {
        let slot = table.wrapping_add((hva.0 >> shift) as usize % ENTRIES);
        // SAFETY: a table of 512 entries that is not freed under us. It may change under us, so it is read once.
        let value = unsafe { ptr::read_volatile(slot) };
        let level = match shift {
            12 => Some(Level::Page4K),
            21 => Some(Level::Page2M),
            30 => Some(Level::Page1G),
            _ => None,
        };
        if value & (entry::P | entry::U) != entry::P | entry::U {
            return None;
        }
        match level {
            Some(level) if level == Level::Page4K || value & entry::PS != 0 => return Some((slot, value, level)),
            _ => {}
        }
        table = direct_map(Hpa(value & frame_mask & !0xfff)).cast();
        shift -= INDEX_BITS;
    }
}

/// Whether the entry allows the access as it is.
fn usable(value: u64, level: Level, write: bool) -> bool {
    let large_pat = if level == Level::Page4K { 1 << 7 } else { 1 << 12 };
    let odd = SPECIAL | KEY | entry::PWT | entry::PCD | large_pat;
    let need = entry::P | entry::U | entry::A | if write { entry::W | entry::D } else { 0 };
    value & odd == 0 && value & need == need
}

/// The frame in an entry.
fn frame(value: u64, level: Level) -> u64 {
    // SAFETY: set once at boot.
    value & unsafe { bindings::physical_mask } & !(level.bytes() - 1)
}

/// How the current address space maps `hva`, if it does in a way that needs no more work.
///
/// # Safety
///
/// `mm` must be the current address space.
#[inline]
pub(super) unsafe fn peek(mm: *const bindings::mm_struct, hva: Hva, write: bool) -> Option<Seen> {
    let _irqs = IrqsSaved::new();
    // SAFETY: the caller's promise, and interrupts are off.
    let (_, value, level) = unsafe { leaf(mm, hva)? };
    usable(value, level, write).then(|| Seen {
        hpa: Hpa(frame(value, level) | (hva.0 & (level.bytes() - 1) & !0xfff)),
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

/// Fills `frames` with what is mapped from `hva` on, up to the end of the 2 MiB that `hva` is in; returns how many frames lie before
/// that end.
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
    // An absent first page does not mean that its table is absent: any page of the run may lead there.
    for page in 0..count {
        // SAFETY: the caller's promise, and interrupts are off.
        let Some((slot, value, level)) = (unsafe { leaf(mm, hva.wrapping_add(page as u64 * 4096)) }) else { continue };
        for (at, out) in (page..count).zip(frames.iter_mut().skip(page)) {
            if level != Level::Page4K {
                let inside = hva.wrapping_add(at as u64 * 4096).0 & (level.bytes() - 1) & !0xfff;
                *out = usable(value, level, write).then(|| Hpa(frame(value, level) | inside));
                continue;
            }
            // SAFETY: in the table of `slot`, which goes on for as long as the 2 MiB do; interrupts are still off.
            let value = unsafe { ptr::read_volatile(slot.wrapping_add(at - page)) };
            *out = usable(value, level, write).then(|| Hpa(frame(value, level)));
        }
        break;
    }
    count
}
