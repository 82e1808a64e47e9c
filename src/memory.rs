// SPDX-License-Identifier: GPL-2.0
//! Guest memory of a VM: slots over the virtual machine monitor's address space, the nested table that maps them, and the dirty log.
//!
//! Nothing is pinned: pages come from the address space when the guest touches them, and its MMU notifier takes them back.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use kernel::{
    new_mutex, new_spinlock,
    prelude::*,
    sync::{Arc, Mutex, SpinLock},
};

use crate::{
    abi::vm::{KvmClearDirtyLog, KvmDirtyLog, KvmPreFaultMemory, KvmUserspaceMemoryRegion},
    arch::{paging::Level, Gfn, Gpa, Hpa, Hva},
    glue::{
        error,
        guest_mem::{AddressSpace, HostPages, Invalidate, Want},
        signal,
        srcu::SrcuCell,
        tables::{TablePages, TableStock},
        task, user,
    },
    guest::exit::NestedFault,
    irqchip::lapic::regs::BASE_DEFAULT,
    mmu::{
        dirty,
        nested::{Catch, MapError, NestedTable, TABLES_PER_MAP},
        slots::{self, flags, Change, SlotError},
        Format, MemoryType, Prot,
    },
    slot_table::{DirtyLog, Known, Numbers, Slot, Slots},
    vcpu::Peers,
    vendor::Vendor,
    view::{mark_dirty, View},
};

mod own_pages;

use own_pages::OwnPages;

/// First frame that no slot may reach: four levels of nested tables.
const END: Gfn = Gfn(1 << 36);
/// First address past the user half with four-level paging.
const USER_END: Hva = Hva((1 << 47) - 4096);
/// Pages or tables removed in one go before others get the lock.
const BUDGET: usize = 512;

/// Pages whose next write is caught, in one go.
const CATCH_PAGES: u64 = 1 << 16;

/// The local APICs' window.
const APIC_FRAME: Gfn = Gfn(BASE_DEFAULT >> 12);

/// Neighbours looked up with a page that faults: what is present gets mapped at once.
const AROUND: usize = 15;

/// What became of a nested fault.
pub(crate) enum Fault {
    /// The guest can go on.
    Mapped,
    /// No slot there, or a write to a read-only one: a device.
    Mmio,
    /// Sleeping is needed: again from where one may.
    Sleep,
}

struct Nested<F: Format> {
    table: NestedTable<F>,
    pages: TablePages,
}

// Nothing in it points into itself, whatever the format.
impl<F: Format> Unpin for Nested<F> {}

/// The part that the MMU notifier reaches.
#[pin_data]
pub(crate) struct Mapped<F: Format + 'static> {
    #[pin]
    slots: SrcuCell<Slots>,
    #[pin]
    nested: SpinLock<Nested<F>>,
    peers: Arc<Peers>,
    /// Hardware marks the pages that it uses. Where it does not, one that is mapped was used, and is unmapped to see whether it is used again.
    accessed: bool,
}

/// What hardware's nested tables can be.
#[derive(Clone, Copy)]
pub(crate) struct NestedLimits {
    levels: u8,
    largest: Level,
    accessed: bool,
    no_large_execute: bool,
    catch: Catch,
    apic_page: bool,
    identity_map: bool,
}

impl NestedLimits {
    pub(crate) fn of<V: Vendor>(hardware: &V) -> Self {
        Self {
            levels: hardware.nested_levels(),
            largest: hardware.nested_largest(),
            accessed: hardware.nested_accessed(),
            no_large_execute: hardware.no_large_execute(),
            catch: if hardware.write_log_entries() > 0 { Catch::Log } else { Catch::Fault },
            apic_page: hardware.has_apic_page(),
            identity_map: hardware.wants_identity_map(),
        }
    }
}

/// Guest memory of one VM.
#[pin_data]
pub(crate) struct Memory<F: Format + Send + Sync + 'static> {
    #[pin]
    space: AddressSpace<Mapped<F>>,
    /// One change of the slots, or harvest of a log, at a time.
    #[pin]
    update: Mutex<Numbers>,
    root: Hpa,
    /// The largest page that is mapped.
    largest: Level,
    /// How the dirty log learns of writes.
    catch: Catch,
    /// What is hardware's of the guest's memory.
    own: OwnPages,
    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: reading a log does not write-protect, KVM_CLEAR_DIRTY_LOG does.
    manual_protect: AtomicBool,
    /// A new log begins with every page dirty.
    initially_dirty: AtomicBool,
}

impl<F: Format + 'static> Mapped<F> {
    /// Unmaps `count` frames from `start` and waits until no CPU uses them. Returns whether one was mapped.
    fn unmap(&self, start: Gfn, count: u64) -> bool {
        let mut mapped = false;
        let mut next = Some(start);
        let end = start.0.saturating_add(count);
        while let Some(from) = next {
            let mut nested = self.nested.lock();
            let Nested { table, pages } = &mut *nested;
            let progress = table.unmap_some(pages, from, end.saturating_sub(from.0), BUDGET);
            let retired = pages.has_retired().then(|| pages.take_retired());
            drop(nested);
            if progress.flush || retired.is_some() {
                self.peers.flush_tlbs();
            }
            // Hardware has let go of the tables now.
            drop(retired);
            mapped |= progress.flush;
            next = progress.next;
        }
        mapped
    }

    /// Calls `f` with the frames of every slot that lie in the range of host addresses.
    fn for_each_range(&self, start: Hva, end: Hva, f: impl FnMut(Gfn, u64)) {
        self.slots.read().for_each_range(start, end, f);
    }
}

impl<F: Format + Send + Sync + 'static> Invalidate for Mapped<F> {
    fn invalidate(&self, start: Hva, end: Hva, _may_block: bool) {
        self.for_each_range(start, end, |first, count| {
            self.unmap(first, count);
        });
    }

    fn clear_young(&self, start: Hva, end: Hva, flush: bool) -> bool {
        let mut young = false;
        if !self.accessed {
            // With a flush also where none is asked for: nothing remembers that one is owed.
            self.for_each_range(start, end, |first, count| young |= self.unmap(first, count));
            return young;
        }
        self.for_each_range(start, end, |first, count| {
            let mut nested = self.nested.lock();
            let Nested { table, pages } = &mut *nested;
            young |= table.clear_accessed(pages, first, count);
        });
        if young && flush {
            self.peers.flush_tlbs();
        }
        young
    }

    fn test_young(&self, at: Hva) -> bool {
        let mut young = false;
        self.for_each_range(at, at.wrapping_add(1), |first, count| {
            let mut nested = self.nested.lock();
            let Nested { table, pages } = &mut *nested;
            young |= match self.accessed {
                true => table.test_accessed(pages, first, count),
                false => table.maps_any(pages, first, count),
            };
        });
        young
    }

    fn released(&self) {
        self.unmap(Gfn(0), END.0);
    }
}

impl<F: Format + Send + Sync + 'static> Memory<F> {
    /// No memory yet.
    pub(crate) fn new(peers: Arc<Peers>, limits: NestedLimits) -> impl PinInit<Self, Error> {
        let tables = move || -> Result<Nested<F>> {
            let mut pages = TablePages::new();
            pages.refill(TableStock::allocate(1)?);
            let table = NestedTable::new(&mut pages, limits.levels.into(), limits.no_large_execute).ok_or(ENOMEM)?;
            Ok(Nested { table, pages })
        };
        pin_init::pin_init_scope(move || {
            let nested = tables()?;
            let root = nested.table.root();
            Ok(try_pin_init!(Self {
                space <- AddressSpace::new(try_pin_init!(Mapped {
                    slots <- SrcuCell::new(Slots::new())?,
                    nested <- new_spinlock!(nested),
                    peers,
                    accessed: limits.accessed,
                })),
                update <- new_mutex!(Numbers::new()),
                root,
                largest: limits.largest,
                catch: limits.catch,
                own: OwnPages::new(&limits)?,
                manual_protect: false.into(),
                initially_dirty: false.into(),
            }? Error))
        })
    }

    /// Root of the nested table.
    pub(crate) fn root(&self) -> Hpa {
        self.root
    }

    /// Whether the caller runs in the VM's address space. Only then may the VM be used.
    pub(crate) fn is_current(&self) -> bool {
        self.space.is_current()
    }

    /// KVM_SET_USER_MEMORY_REGION.
    pub(crate) fn set_region(&self, region: &KvmUserspaceMemoryRegion) -> Result {
        let request = slots::Request {
            slot: region.slot,
            flags: region.flags,
            guest_phys_addr: region.guest_phys_addr,
            memory_size: region.memory_size,
            userspace_addr: region.userspace_addr,
        };
        let mut numbers = self.update.lock();
        let old = self.space.slots.read();
        let limits = slots::Limits { end: END, user_end: USER_END };
        let change = slots::plan(&Known(&old, &numbers), &request, &limits).map_err(|error| match error {
            SlotError::Invalid => EINVAL,
            SlotError::Overlap => EEXIST,
        })?;
        let id = request.slot as u16;
        let gone = match change {
            Change::Nothing => return Ok(()),
            Change::Delete { from } | Change::Move { from } => old.find(from).cloned(),
            Change::Create | Change::FlagsOnly => None,
        };
        let rest = gone.as_ref().map(|slot| old.without(slot.base)).transpose()?;
        let slot = match change {
            Change::Delete { .. } => None,
            _ => Some(slots::slot_of(&request, self.new_log(&request)?)),
        };
        let new = match (&slot, rest) {
            (Some(slot), rest) => rest.as_ref().unwrap_or(&old).with(slot.clone())?,
            (None, rest) => rest.ok_or(EINVAL)?,
        };
        if self.own.reserves(|frame| new.find(frame).is_some()) {
            return Err(EEXIST);
        }
        drop(old);
        numbers.reserve(id)?;
        let hardware_logs = self.catch == Catch::Log && new.logs_dirty();
        if hardware_logs {
            // Before a fault maps a page of a slot with a log for writing.
            self.space.peers.log_writes(true);
        }
        // No fault handler knows the old slots after this, so none maps anything of them after the unmapping.
        let hides_apics = new.find(APIC_FRAME).is_some();
        self.space.slots.replace(new)?;
        numbers.set(id, slot.as_ref().map(|slot| slot.base));
        if !hardware_logs {
            self.space.peers.log_writes(false);
        }
        if hides_apics {
            self.forbid_apic_page();
        }
        if let Some(slot) = gone {
            self.space.unmap(slot.base, slot.pages);
        }
        // With all pages dirty from the start it is KVM_CLEAR_DIRTY_LOG that has their next writes caught.
        let changed = slot.filter(|_| change == Change::FlagsOnly);
        if let Some(slot) = changed.filter(|slot| slot.logs_dirty() && !self.initially_dirty.load(Relaxed)) {
            // In parts, so that faults of other slots get in between.
            let mut flush = false;
            let mut done = 0;
            while done < slot.pages {
                let part = CATCH_PAGES.min(slot.pages - done);
                let mut nested = self.space.nested.lock();
                let Nested { table, pages } = &mut *nested;
                flush |= table.catch_writes_in_range(pages, Gfn(slot.base.0.wrapping_add(done)), part, self.catch);
                done = done.wrapping_add(part);
            }
            if flush {
                self.space.peers.flush_tlbs();
            }
        }
        Ok(())
    }

    /// KVM_GET_DIRTY_LOG: writes the slot's bitmap to userspace, clears it, and catches the next write to each page.
    pub(crate) fn get_dirty_log(&self, request: &KvmDirtyLog) -> Result {
        if self.space.peers.ring_entries() != 0 {
            return Err(ENXIO);
        }
        let numbers = self.update.lock();
        let slots = self.space.slots.read();
        let (slot, words) = logged(&slots, &numbers, request.slot)?;
        let log = dirty::DirtyBitmap::new(words, slot.pages).ok_or(EINVAL)?;
        let manual = self.manual_protect.load(Relaxed);
        self.collect_written();
        let mut flush = false;
        let mut out = [0u64; 64];
        let mut first = 0;
        let mut written = Ok(());
        while first < words.len() && written.is_ok() {
            let count = (words.len() - first).min(out.len());
            let mut nested = self.space.nested.lock();
            let Nested { table, pages } = &mut *nested;
            let chunk = out.get_mut(..count).ok_or(EINVAL)?;
            if manual {
                log.copy(first as u64, chunk);
            } else {
                log.take(first as u64, chunk, |page, mask| {
                    flush |= table.catch_writes(pages, Gfn(slot.base.0.wrapping_add(page)), mask, self.catch);
                });
            }
            drop(nested);
            written = user::write(Hva(request.dirty_bitmap).wrapping_add((first as u64).wrapping_mul(8)), &*chunk);
            first = first.wrapping_add(count);
        }
        if flush {
            self.space.peers.flush_tlbs();
        }
        written
    }

    /// KVM_CLEAR_DIRTY_LOG: clears the bits that userspace's bitmap has, and catches the next write to each of their pages.
    pub(crate) fn clear_dirty_log(&self, request: &KvmClearDirtyLog) -> Result {
        if self.space.peers.ring_entries() != 0 {
            return Err(ENXIO);
        }
        let numbers = self.update.lock();
        let slots = self.space.slots.read();
        let (slot, words) = logged(&slots, &numbers, request.slot)?;
        let log = dirty::DirtyBitmap::new(words, slot.pages).ok_or(EINVAL)?;
        let count = dirty::check_clear(slot.pages, request.first_page, request.num_pages).map_err(|_| EINVAL)?;
        self.collect_written();
        let mut flush = false;
        let mut bits = [0u64; 64];
        let mut done = 0;
        let mut read = Ok(());
        while done < count && read.is_ok() {
            let chunk = bits.get_mut(..(count - done).min(64) as usize).ok_or(EINVAL)?;
            read = user::read_bytes(Hva(request.dirty_bitmap).wrapping_add(done.wrapping_mul(8)), chunk.as_mut_bytes());
            if read.is_ok() {
                let mut nested = self.space.nested.lock();
                let Nested { table, pages } = &mut *nested;
                log.clear(request.first_page.wrapping_add(done.wrapping_mul(64)), chunk, |page, mask| {
                    flush |= table.catch_writes(pages, Gfn(slot.base.0.wrapping_add(page)), mask, self.catch);
                });
            }
            done = done.wrapping_add(64);
        }
        if flush {
            self.space.peers.flush_tlbs();
        }
        read
    }

    /// Brings what hardware has noted into the logs.
    fn collect_written(&self) {
        if self.catch == Catch::Log {
            self.space.peers.collect_written();
        }
    }

    /// KVM_RESET_DIRTY_RINGS: frees the entries that userspace is done with, and catches the next write to each of their pages.
    /// Returns how many there were. `EINVAL` without rings.
    pub(crate) fn reset_dirty_rings(&self) -> Result<isize> {
        if self.space.peers.ring_entries() == 0 {
            return Err(EINVAL);
        }
        let numbers = self.update.lock();
        let slots = self.space.slots.read();
        let mut count = 0usize;
        for ring in self.space.peers.iter().filter_map(|peer| peer.ring.as_ref()) {
            let protect = |number: u32, page: u64| {
                let slot = u16::try_from(number).ok().and_then(|id| numbers.find(&slots, id));
                if let Some(slot) = slot.filter(|slot| page < slot.pages) {
                    let mut nested = self.space.nested.lock();
                    let Nested { table, pages } = &mut *nested;
                    table.catch_writes(pages, Gfn(slot.base.0.wrapping_add(page)), 1, self.catch);
                }
            };
            count = count.wrapping_add(ring.collect(protect));
        }
        if count > 0 {
            self.space.peers.flush_tlbs();
        }
        Ok(count as isize)
    }

    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    pub(crate) fn set_manual_protect(&self, enable: bool, initially_dirty: bool) {
        self.manual_protect.store(enable, Relaxed);
        self.initially_dirty.store(initially_dirty, Relaxed);
    }

    fn new_log(&self, request: &slots::Request) -> Result<DirtyLog> {
        // With dirty rings there is no bitmap.
        if request.flags & flags::LOG_DIRTY_PAGES == 0 || self.space.peers.ring_entries() != 0 {
            return Ok(None);
        }
        let count = request.memory_size >> 12;
        let words = dirty::words_for(count) as usize;
        let mut log = KVVec::with_capacity(words, GFP_KERNEL_ACCOUNT)?;
        for _ in 0..words {
            log.push(AtomicU64::new(0), GFP_KERNEL_ACCOUNT)?;
        }
        if self.initially_dirty.load(Relaxed) {
            dirty::DirtyBitmap::new(&log, count).ok_or(EINVAL)?.mark_all();
        }
        Ok(Some(Arc::new(log, GFP_KERNEL_ACCOUNT)?))
    }

    /// Maps what a nested fault asked for. With `may_sleep` off it works with interrupts off, and may answer [`Fault::Sleep`].
    /// Errors are those of the page: EFAULT, EINTR.
    /// Broken memory is a SIGBUS for the thread.
    pub(crate) fn fault(&self, fault: &NestedFault, may_sleep: bool) -> Result<Fault> {
        let slots = self.space.slots.read();
        let gfn = fault.gpa.gfn();
        let Some(slot) = slots.find(gfn) else {
            return self.device_fault(fault, may_sleep);
        };
        let Some(hva) = slot.hva_of(gfn) else { return Ok(Fault::Mmio) };
        if fault.write && !slot.writable() {
            return Ok(Fault::Mmio);
        }
        let want = match (fault.write, slot.writable()) {
            (true, _) => Want::Write,
            // A page that is only read need not be copied or allocated; where it is writable already, say so.
            (false, true) => Want::ReadMaybeWrite,
            (false, false) => Want::Read,
        };
        loop {
            let seq = self.space.snapshot();
            let page = if may_sleep {
                match self.space.fault_in(hva, want) {
                    Err(error) if error == error::hwpoison() => {
                        // The guest goes back to the access, unless the signal has its way first.
                        signal::memory_is_broken(hva);
                        return Ok(Fault::Sleep);
                    }
                    page => page?,
                }
            } else {
                match self.space.fault_in_fast(hva, want) {
                    Some(page) => page,
                    None => return Ok(Fault::Sleep),
                }
            };
            // Write permission goes unnoticed where writes do not.
            let unlogged = !slot.logs_dirty() || self.catch == Catch::Log;
            let writable = slot.writable() && page.writable() && (fault.write || unlogged);
            let memory_type = if page.is_memory() { MemoryType::WriteBack } else { MemoryType::Uncached };
            let prot = Prot { write: writable, execute: true, accessed: true, dirty: fault.write, memory_type };
            let limit =
                if slot.logs_dirty() { Level::Page4K } else { slot.max_level(gfn).min(page.level()).min(self.largest) };
            // A refused write of a page that is there comes from dirty logging: its neighbours are there as well.
            let mut around;
            let mut neighbours: &[Option<Hpa>] = &[];
            if limit == Level::Page4K && page.is_memory() && page.has_next() && !fault.present {
                around = HostPages::none();
                self.space.present(hva.wrapping_add(4096), AROUND, writable, &mut around);
                neighbours = around.addresses();
            }

            let mut nested = self.space.nested.lock();
            let Nested { table, pages } = &mut *nested;
            let short = pages.short_of(TABLES_PER_MAP);
            if short > 0 {
                drop(nested);
                if !may_sleep {
                    return Ok(Fault::Sleep);
                }
                let stock = TableStock::allocate(TABLES_PER_MAP * 8)?;
                self.space.nested.lock().pages.refill(stock);
                continue;
            }
            if self.space.must_retry_range(seq, hva, hva.wrapping_add(4096 * (AROUND as u64 + 1))) {
                // The guest faults again: on the way there signals get their turn, and whoever changes the slots.
                return Ok(Fault::Sleep);
            }
            let level = table.fault_level(limit, fault.execute);
            let mapped = table.map(pages, gfn, page.hpa(), level, prot).map_err(|error| match error {
                MapError::OutOfTables => ENOMEM,
                MapError::BeyondRoot | MapError::Misaligned => EFAULT,
            })?;
            if !neighbours.is_empty() {
                let inside = slot.end().0.saturating_sub(gfn.0 + 1) as usize;
                let neighbours = neighbours.get(..neighbours.len().min(inside)).unwrap_or(&[]);
                let prot = Prot { accessed: false, dirty: false, write: writable && unlogged, ..prot };
                // Neighbours are a favour: without tables for them they wait for their own fault.
                let _ = table.map_around(pages, Gfn(gfn.0 + 1), neighbours, prot);
            }
            if fault.write {
                mark_dirty(&self.space.peers, slot, gfn);
            }
            let retired = pages.has_retired().then(|| pages.take_retired());
            drop(nested);
            page.release(writable);
            if mapped.flush || retired.is_some() {
                self.space.peers.flush_tlbs();
            }
            drop(retired);
            return Ok(Fault::Mapped);
        }
    }

    /// KVM_PRE_FAULT_MEMORY: maps a range as if the guest had read it. `range` is what is left when it returns; an error counts only
    /// where nothing was done. `EINVAL` for a bad range, `ENOENT` where there is no slot, `EINTR` when a signal came.
    pub(crate) fn pre_fault(&self, range: &mut KvmPreFaultMemory) -> Result {
        let end = range.gpa.checked_add(range.size).filter(|end| *end > range.gpa);
        if range.flags != 0 || (range.gpa | range.size) % 4096 != 0 || end.is_none() {
            return Err(EINVAL);
        }
        let asked = range.size;
        while range.size > 0 {
            let fault = NestedFault { gpa: Gpa(range.gpa), write: false, execute: false, present: false, walk: false };
            let work = if task::work_pending() { task::handle_work() } else { Ok(()) };
            match work.and_then(|()| self.fault(&fault, true)) {
                Ok(Fault::Mapped) => {
                    range.gpa = range.gpa.wrapping_add(4096);
                    range.size = range.size.wrapping_sub(4096);
                }
                Ok(Fault::Sleep) => {}
                Ok(Fault::Mmio) | Err(_) if range.size != asked => return Ok(()),
                Ok(Fault::Mmio) => return Err(ENOENT),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The guest wrote to these pages, in this order. Works with interrupts off.
    #[inline]
    pub(crate) fn written(&self, pages: impl Iterator<Item = Gfn>) {
        self.view(false).written(pages);
    }

    /// Guest memory by guest physical address, as it is until the view is dropped. With `may_sleep` off it works with
    /// interrupts off.
    #[inline]
    pub(crate) fn view(&self, may_sleep: bool) -> View<'_> {
        View::new(self.space.slots.read(), &self.space.peers, may_sleep)
    }
}

/// A slot and its log. `ENOENT` where there is none.
fn logged<'a>(slots: &'a Slots, numbers: &Numbers, number: u32) -> Result<(&'a Slot, &'a KVVec<AtomicU64>)> {
    let id = u16::try_from(number).map_err(|_| EINVAL)?;
    let slot = numbers.find(slots, id).ok_or(ENOENT)?;
    let words = slot.attachment.as_ref().ok_or(ENOENT)?;
    Ok((slot, words))
}
