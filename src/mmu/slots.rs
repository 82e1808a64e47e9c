// SPDX-License-Identifier: GPL-2.0
//! Memory slots: which guest frames are backed by which addresses of the virtual machine monitor.
//!
//! The slots of a VM are sorted by guest frame, without overlap and without empty slots; the caller owns the storage, a
//! [`Table`] of some kind. KVM API "KVM_SET_USER_MEMORY_REGION"; the order of the checks, which decides between errors, is KVM's.
//! Not supported: other address spaces than 0, guest_memfd.
#![forbid(unsafe_code)]

use crate::arch::addr::{PAGE_SHIFT, PAGE_SIZE};
use crate::arch::{Gfn, Hva, Level};

/// Slots that userspace may have, ids 0 to 32763: KVM_CAP_NR_MEMSLOTS. KVM has three more for itself.
pub const USER_SLOTS: u32 = 32764;
/// Most pages in a slot, so that a dirty bitmap is indexed with 31 bits.
pub const MAX_PAGES: u64 = (1 << 31) - 1;

/// Slot flags. KVM API "KVM_SET_USER_MEMORY_REGION".
pub mod flags {
    pub const LOG_DIRTY_PAGES: u32 = 1 << 0;
    pub const READONLY: u32 = 1 << 1;
    pub const ALL: u32 = LOG_DIRTY_PAGES | READONLY;
}

/// A memory slot. `B` is the caller's handle on whatever belongs to it, such as the dirty bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot<B> {
    pub base: Gfn,
    /// Number of frames, 1 to [`MAX_PAGES`].
    pub pages: u64,
    /// Address of the first frame.
    pub hva: Hva,
    pub id: u16,
    pub flags: u32,
    pub attachment: B,
}

impl<B> Slot<B> {
    /// First frame past the slot.
    #[inline]
    pub fn end(&self) -> Gfn {
        Gfn(self.base.0.wrapping_add(self.pages))
    }

    #[inline]
    pub fn contains(&self, gfn: Gfn) -> bool {
        gfn.0.wrapping_sub(self.base.0) < self.pages
    }

    /// Index of the frame in the slot and its dirty bitmap.
    #[inline]
    pub fn index(&self, gfn: Gfn) -> Option<u64> {
        let index = gfn.0.wrapping_sub(self.base.0);
        (index < self.pages).then_some(index)
    }

    /// Where the frame starts in the virtual machine monitor.
    #[inline]
    pub fn hva_of(&self, gfn: Gfn) -> Option<Hva> {
        self.index(gfn).map(|index| Hva(self.hva.0.wrapping_add(index << PAGE_SHIFT)))
    }

    #[inline]
    pub fn writable(&self) -> bool {
        self.flags & flags::READONLY == 0
    }

    #[inline]
    pub fn logs_dirty(&self) -> bool {
        self.flags & flags::LOG_DIRTY_PAGES != 0
    }

    /// First address past the slot.
    #[inline]
    pub fn hva_end(&self) -> Hva {
        Hva(self.hva.0.saturating_add(self.pages << PAGE_SHIFT))
    }

    /// The frames that lie in the host range from `start` to before `end`, also partly: first frame and count.
    pub fn frames_in(&self, start: Hva, end: Hva) -> Option<(Gfn, u64)> {
        let start = start.0.max(self.hva.0);
        let end = end.0.min(self.hva_end().0);
        if start >= end {
            return None;
        }
        let first = (start - self.hva.0) >> PAGE_SHIFT;
        let last = (end - 1).wrapping_sub(self.hva.0) >> PAGE_SHIFT;
        Some((Gfn(self.base.0.wrapping_add(first)), last.wrapping_sub(first).wrapping_add(1)))
    }

    /// The largest page that may map `gfn`: all of it in the slot, and at the same offset in guest and host. While
    /// writes are logged, single pages only.
    pub fn max_level(&self, gfn: Gfn) -> Level {
        if self.logs_dirty() {
            return Level::Page4K;
        }
        for level in [Level::Page1G, Level::Page2M] {
            let inside = level.pages() - 1;
            let congruent = (self.base.0 ^ (self.hva.0 >> PAGE_SHIFT)) & inside == 0;
            let first = gfn.0 & !inside;
            if congruent && self.contains(gfn) && first >= self.base.0 && first + level.pages() <= self.end().0 {
                return level;
            }
        }
        Level::Page4K
    }
}

/// The position of the slot that holds `gfn`. `hint`, the last answer, is tried first.
#[inline]
pub fn find<B>(slots: &[Slot<B>], gfn: Gfn, hint: usize) -> Option<usize> {
    match slots.get(hint) {
        Some(slot) if slot.contains(gfn) => Some(hint),
        _ => search(slots, gfn),
    }
}

fn search<B>(slots: &[Slot<B>], gfn: Gfn) -> Option<usize> {
    let at = slots.partition_point(|slot| slot.base <= gfn).checked_sub(1)?;
    slots.get(at)?.contains(gfn).then_some(at)
}

/// The slots of a VM, as [`plan`] needs them.
pub trait Table<B> {
    /// The slot with number `id`.
    fn with_id(&self, id: u16) -> Option<&Slot<B>>;

    /// The last slot that begins below `base`, and the first one that does not.
    fn around(&self, base: Gfn) -> [Option<&Slot<B>>; 2];
}

/// What userspace asks for: `struct kvm_userspace_memory_region`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Address space in bits 31 to 16, id in bits 15 to 0.
    pub slot: u32,
    pub flags: u32,
    pub guest_phys_addr: u64,
    /// Bytes; 0 deletes the slot.
    pub memory_size: u64,
    pub userspace_addr: u64,
}

/// What the machine can address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// First frame that no slot may reach.
    pub end: Gfn,
    /// First address past the user half: TASK_SIZE_MAX.
    pub user_end: Hva,
}

/// What a request amounts to. `from` is where the slot begins that there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Create,
    Delete { from: Gfn },
    Move { from: Gfn },
    FlagsOnly,
    Nothing,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotError {
    /// EINVAL.
    Invalid,
    /// EEXIST: the frames overlap another slot.
    Overlap,
}

/// The slot that `request` describes, once [`plan`] has accepted it.
pub fn slot_of<B>(request: &Request, attachment: B) -> Slot<B> {
    Slot {
        base: Gfn(request.guest_phys_addr >> PAGE_SHIFT),
        pages: request.memory_size >> PAGE_SHIFT,
        hva: Hva(request.userspace_addr),
        id: request.slot as u16,
        flags: request.flags,
        attachment,
    }
}

/// Checks a request against the slots there are.
pub fn plan<B>(slots: &impl Table<B>, request: &Request, limits: &Limits) -> Result<Change, SlotError> {
    let aligned = (request.memory_size | request.guest_phys_addr | request.userspace_addr) % PAGE_SIZE == 0;
    let in_user_half =
        request.userspace_addr.checked_add(request.memory_size).is_some_and(|end| end <= limits.user_end.0);
    let wraps = request.guest_phys_addr.checked_add(request.memory_size).is_none();
    let pages = request.memory_size >> PAGE_SHIFT;
    if request.slot >= USER_SLOTS
        || request.flags & !flags::ALL != 0
        || !aligned
        || !in_user_half
        || wraps
        || pages > MAX_PAGES
    {
        return Err(SlotError::Invalid);
    }
    let id = request.slot as u16;
    let old = slots.with_id(id);
    let base = Gfn(request.guest_phys_addr >> PAGE_SHIFT);
    if pages == 0 {
        return old.map(|old| Change::Delete { from: old.base }).ok_or(SlotError::Invalid);
    }
    if let Some(old) = old {
        if request.userspace_addr != old.hva.0
            || pages != old.pages
            || (request.flags ^ old.flags) & flags::READONLY != 0
        {
            return Err(SlotError::Invalid);
        }
        if base == old.base {
            return Ok(if request.flags == old.flags { Change::Nothing } else { Change::FlagsOnly });
        }
    }
    // No overflow: both addends were page counts of 64-bit byte addresses.
    let end = base.0 + pages;
    // Only the neighbours can overlap. If one of them is the slot itself, on the move, then what lies beyond it is
    // out of reach: the size does not change.
    let clashes = |slot: &Slot<B>| slot.id != id && slot.base.0 < end && base.0 < slot.end().0;
    if slots.around(base).into_iter().flatten().any(clashes) {
        return Err(SlotError::Overlap);
    }
    if end > limits.end.0 {
        return Err(SlotError::Invalid);
    }
    Ok(old.map_or(Change::Create, |old| Change::Move { from: old.base }))
}
