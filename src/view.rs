// SPDX-License-Identifier: GPL-2.0
//! Guest memory as the walker and the emulator read and write it, and where its writes are noted: the dirty log of a slot, or a ring.
#![forbid(unsafe_code)]

use crate::{
    arch::{Gfn, Gpa, Hva},
    glue::{srcu::SrcuGuard, user},
    mmu::{
        dirty::{self, Place},
        guest_mem::{GuestMem, Refused},
    },
    slot_table::{Slot, Slots},
    vcpu::Peers,
};

/// Where a write to `gfn`, which is the slot's, is noted.
#[inline]
fn place_of(slot: &Slot, gfn: Gfn) -> Place<'_> {
    let unlogged = Place::Nowhere { first: slot.base, count: slot.pages };
    match (&slot.attachment, slot.index(gfn)) {
        (Some(words), _) => {
            let log = dirty::DirtyBitmap::new(words, slot.pages);
            log.map_or(unlogged, |log| Place::Bitmap { base: slot.base, log })
        }
        (None, Some(page)) if slot.logs_dirty() => Place::Ring { slot: slot.id.into(), page },
        _ => unlogged,
    }
}

/// The page at `gfn`, which is the slot's, was written.
pub(crate) fn mark_dirty(peers: &Peers, slot: &Slot, gfn: Gfn) {
    match place_of(slot, gfn) {
        Place::Bitmap { base, log } => {
            log.mark(gfn.0.wrapping_sub(base.0));
        }
        Place::Ring { slot, page } => peers.push_dirty(slot, page),
        Place::Nowhere { .. } => {}
    }
}

/// Guest memory as the walker and the emulator see it.
pub(crate) struct View<'a> {
    slots: SrcuGuard<'a, Slots>,
    peers: &'a Peers,
    may_sleep: bool,
}

impl<'a> View<'a> {
    /// The memory that `slots` describe. With `may_sleep` off it works with interrupts off.
    #[inline]
    pub(crate) fn new(slots: SrcuGuard<'a, Slots>, peers: &'a Peers, may_sleep: bool) -> Self {
        Self { slots, peers, may_sleep }
    }

    /// The guest wrote to these pages, in this order.
    #[inline]
    pub(crate) fn written(&self, pages: impl Iterator<Item = Gfn>) {
        let place = |gfn| match self.slots.find(gfn) {
            Some(slot) => place_of(slot, gfn),
            None => Place::Nowhere { first: gfn, count: 1 },
        };
        dirty::mark_each(pages, place, |slot, page| self.peers.push_dirty(slot, page));
    }

    /// Where `gpa` is in the address space, if the access is allowed.
    #[inline]
    fn place(&self, gpa: Gpa, write: bool) -> Result<(&Slot, Hva), Refused> {
        let slot = self.slots.find(gpa.gfn()).ok_or(Refused::NotRam)?;
        if write && !slot.writable() {
            return Err(Refused::ReadOnly);
        }
        let page = slot.hva_of(gpa.gfn()).ok_or(Refused::NotRam)?;
        Ok((slot, page.wrapping_add(gpa.page_offset())))
    }

    /// What a failed access to the host's memory means.
    fn refused(&self) -> Refused {
        if self.may_sleep {
            Refused::NotRam
        } else {
            Refused::NotNow
        }
    }

    /// Atomically where the bytes are naturally aligned.
    pub(crate) fn compare_exchange_bytes(&self, gpa: Gpa, old: &[u8], new: &[u8]) -> Result<bool, Refused> {
        let word = |bytes: &[u8]| {
            let mut word = [0; 8];
            word.iter_mut().zip(bytes).for_each(|(into, byte)| *into = *byte);
            u64::from_le_bytes(word)
        };
        let len = old.len();
        if matches!(len, 1 | 2 | 4 | 8) && gpa.page_offset() % 64 + len as u64 <= 64 {
            return self.compare_exchange(gpa, len as u32, word(old), word(new));
        }
        let mut now = [0; 16];
        let now = now.get_mut(..len).ok_or(Refused::NotRam)?;
        self.read(gpa, now)?;
        if now != old {
            return Ok(false);
        }
        self.write(gpa, new).map(|()| true)
    }

    fn compare_exchange(&self, gpa: Gpa, size_bytes: u32, old: u64, new: u64) -> Result<bool, Refused> {
        let (slot, hva) = self.place(gpa, true)?;
        let exchange = || user::compare_exchange(hva, size_bytes, old, new);
        let found = if self.may_sleep { exchange() } else { user::with_faults_off(exchange) };
        let done = found.map_err(|_| self.refused())?.is_none();
        if done {
            mark_dirty(self.peers, slot, gpa.gfn());
        }
        Ok(done)
    }

    /// Calls `f` for each part of the range that lies in one page.
    fn pages(
        mut gpa: Gpa,
        mut len: usize,
        mut f: impl FnMut(Gpa, usize, usize) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        let mut done = 0;
        while len > 0 {
            let part = len.min((4096 - gpa.page_offset()) as usize);
            f(gpa, done, part)?;
            gpa = gpa.checked_add(part as u64).ok_or(Refused::NotRam)?;
            done = done.wrapping_add(part);
            len -= part;
        }
        Ok(())
    }
}

impl GuestMem for View<'_> {
    #[inline]
    fn read_u64(&self, gpa: Gpa) -> Result<u64, Refused> {
        let (_, hva) = self.place(gpa, false)?;
        match user::read_u64_nofault(hva) {
            Ok(value) => Ok(value),
            Err(_) if self.may_sleep => user::read(hva).map_err(|_| Refused::NotRam),
            Err(_) => Err(Refused::NotNow),
        }
    }

    fn read_u32(&self, gpa: Gpa) -> Result<u32, Refused> {
        let mut bytes = [0; 4];
        self.read(gpa, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Result<bool, Refused> {
        self.compare_exchange(gpa, 8, old, new)
    }

    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Result<bool, Refused> {
        self.compare_exchange(gpa, 4, old.into(), new.into())
    }

    fn read(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), Refused> {
        Self::pages(gpa, bytes.len(), |gpa, done, part| {
            let (_, hva) = self.place(gpa, false)?;
            let into = bytes.get_mut(done..done.wrapping_add(part)).ok_or(Refused::NotRam)?;
            let read = if self.may_sleep { user::read_bytes(hva, into) } else { user::read_bytes_nofault(hva, into) };
            read.map_err(|_| self.refused())
        })
    }

    fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Refused> {
        Self::pages(gpa, bytes.len(), |gpa, done, part| {
            let (slot, hva) = self.place(gpa, true)?;
            let from = bytes.get(done..done.wrapping_add(part)).ok_or(Refused::NotRam)?;
            let written =
                if self.may_sleep { user::write_bytes(hva, from) } else { user::write_bytes_nofault(hva, from) };
            written.map_err(|_| self.refused())?;
            mark_dirty(self.peers, slot, gpa.gfn());
            Ok(())
        })
    }
}
