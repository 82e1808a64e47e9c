// SPDX-License-Identifier: GPL-2.0
//! Guest memory as pages of the virtual machine monitor's address space: an MMU notifier that takes translations away, and
//! the way to get a page when the guest touches it.
//!
//! Nothing is pinned. A page found by [`AddressSpace::fault_in`] may go away at any time after; the notifier says so. The
//! fault path is therefore: [`snapshot`](AddressSpace::snapshot), get the page, take the lock that
//! [`Invalidate::invalidate`] takes, ask [`must_retry_range`](AddressSpace::must_retry_range), and only if the answer is no, map.
//!
//! Why that is enough: an invalidation is counted before `invalidate` runs and until the host's page tables have changed. If the
//! fault path holds the lock before `invalidate` does, the new mapping is found and removed there. If it gets the lock
//! later, it sees the count, or, when all is over, a sequence number newer than its snapshot.
use core::{
    mem::ManuallyDrop,
    ops::Deref,
    ptr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};
use kernel::{
    bindings,
    error::to_result,
    mm::{virt::flags, Mm},
    prelude::*,
    sync::aref::ARef,
    types::Opaque,
};

use super::{
    bindings as own, error,
    host_walk::{self, Unseen},
    lock::IrqSpinLock,
    page::{page_to_hpa, PAGE_SIZE},
};
use crate::{
    arch::{paging::Level, Hpa, Hva},
    new_irq_spinlock,
};

/// What an MMU notifier calls. Ranges are of host virtual addresses, `end` exclusive.
pub trait Invalidate: Send + Sync + 'static {
    /// Removes every translation to the range, flushes the TLBs, and waits until no CPU uses an old one. Must not sleep if
    /// `may_block` is false.
    fn invalidate(&self, start: Hva, end: Hva, may_block: bool);

    /// Clears the accessed state of the range and says whether there was any. `flush`: TLBs must forget, too. Called with page
    /// table locks held: must not sleep.
    fn clear_young(&self, start: Hva, end: Hva, flush: bool) -> bool;

    /// Whether the page was accessed since it was last cleared. Must not sleep.
    fn test_young(&self, at: Hva) -> bool;

    /// The address space goes away: removes every translation.
    fn released(&self);
}

/// The state of invalidations when a fault began.
#[derive(Clone, Copy)]
pub struct InvalidateSeq(u64);

/// The invalidations under way: how many, and a range that covers them all.
#[derive(Default)]
struct Active {
    count: u32,
    start: u64,
    end: u64,
}

/// An address space (the creator's) that is watched for `T`, which it contains and derefs to.
///
/// # Invariants
///
/// - `notifier` is registered with `mm` from the end of [`new`](Self::new) until the drop, and all other fields are initialised
///   before and dropped after that. So every callback gets a live `Self`.
/// - `active` and `active_count` agree whenever the lock is free.
#[pin_data(PinnedDrop)]
pub struct AddressSpace<T: Invalidate> {
    seq: AtomicU64,
    active_count: AtomicU32,
    #[pin]
    active: IrqSpinLock<Active>,
    #[pin]
    target: T,
    mm: ARef<Mm>,
    #[pin]
    notifier: Opaque<bindings::mmu_notifier>,
}

// SAFETY: the notifier may be unregistered by any thread; the rest is `Send` by itself.
unsafe impl<T: Invalidate> Send for AddressSpace<T> {}
// SAFETY: shared access goes through atomics, the lock and `T: Sync`.
unsafe impl<T: Invalidate> Sync for AddressSpace<T> {}

impl<T: Invalidate> Deref for AddressSpace<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.target
    }
}

impl<T: Invalidate> AddressSpace<T> {
    const OPS: bindings::mmu_notifier_ops = bindings::mmu_notifier_ops {
        release: Some(Self::release),
        clear_flush_young: Some(Self::clear_flush_young),
        clear_young: Some(Self::clear_young),
        test_young: Some(Self::test_young),
        invalidate_range_start: Some(Self::invalidate_range_start),
        invalidate_range_end: Some(Self::invalidate_range_end),
        ..pin_init::zeroed()
    };

    /// Watches the current process's address space. EINTR when a fatal signal comes first. Sleeps; takes the mmap lock.
    pub fn new(target: impl PinInit<T, Error>) -> impl PinInit<Self, Error> {
        try_pin_init!(&this in Self {
            seq: AtomicU64::new(0),
            active_count: AtomicU32::new(0),
            active <- new_irq_spinlock!(Active::default(), "krab::invalidations"),
            target <- target,
            mm: kernel::current!().mm().map(|mm| ARef::<Mm>::from(&**mm)).ok_or(EINVAL)?,
            notifier <- Opaque::try_ffi_init(|slot: *mut bindings::mmu_notifier| {
                // SAFETY: the fields above are initialised, this one is pinned and stays until the drop unregisters it.
                // INVARIANT: registered last.
                to_result(unsafe {
                    slot.write(bindings::mmu_notifier { ops: &Self::OPS, ..pin_init::zeroed() });
                    bindings::mmu_notifier_register(slot, (*this.as_ptr()).mm.as_raw())
                })
            }),
        }? Error)
    }

    /// Whether the caller runs in this address space. Only then may the VM be used.
    #[inline]
    pub fn is_current(&self) -> bool {
        // SAFETY: `current` is valid, and only the task itself changes its `mm`.
        unsafe { (*super::task::current()).mm == self.mm.as_raw() }
    }

    /// To be taken before the page of a fault is looked up.
    #[inline]
    pub fn snapshot(&self) -> InvalidateSeq {
        InvalidateSeq(self.seq.load(Ordering::Acquire))
    }

    /// Whether a page of a range, looked up after `seq` was taken, may be gone by now. To be asked under the lock that
    /// `invalidate` takes.
    #[inline]
    pub fn must_retry_range(&self, seq: InvalidateSeq, start: Hva, end: Hva) -> bool {
        // The count first: an invalidation that is over by then has raised the sequence number before.
        (self.active_count.load(Ordering::Acquire) != 0 && {
            let active = self.active.lock();
            active.count != 0 && start.0 < active.end && active.start < end.0
        }) || self.seq.load(Ordering::Acquire) != seq.0
    }

    /// The page at `hva`, made present and writable as wanted. May sleep. Errors: EFAULT nothing there, or not writable; EINTR a
    /// signal came first; `EHWPOISON` the page is broken; EIO not this address space.
    pub fn fault_in(&self, hva: Hva, want: Want) -> Result<HostPage> {
        if !self.is_current() {
            return Err(EIO);
        }
        self.populate(hva, want)?;
        if let Some(page) = self.fault_in_fast(hva, want) {
            return Ok(page);
        }
        let address = hva.page_base().0 as usize;
        let write = if want == Want::Write { bindings::FOLL_WRITE } else { 0 };
        let how = write | bindings::FOLL_HWPOISON | bindings::FOLL_HONOR_NUMA_FAULT | bindings::FOLL_INTERRUPTIBLE;
        let mut page = ptr::null_mut();
        // SAFETY: process context, no mmap lock held; there is room for one page.
        let got = unsafe { bindings::get_user_pages_unlocked(address, 1, &mut page, how) };
        if got == 1 {
            // INVARIANT: the reference is ours.
            return Ok(self.counted(page, hva, want == Want::Write));
        }
        match got as c_int {
            code if code == EINTR.to_errno() || code == EAGAIN.to_errno() => Err(EINTR),
            code if code == error::hwpoison().to_errno() => Err(error::hwpoison()),
            _ => self.remapped(hva, want),
        }
    }

    /// Makes the page at `hva` present as a fault of the program itself would, holding the lock of its area alone: much cheaper than
    /// what looks pages up. Where that does not do, others find out. EINTR when a signal ended the wait for the page, which may come from
    /// a userfaultfd and be long.
    fn populate(&self, hva: Hva, want: Want) -> Result {
        let task = kernel::current!();
        let address = hva.page_base().0 as usize;
        let Some(area) = task.mm().and_then(|mm| mm.lock_vma_under_rcu(address)) else { return Ok(()) };
        let (right, write) = match want {
            Want::Write => (flags::WRITE, bindings::fault_flag_FAULT_FLAG_WRITE),
            Want::Read | Want::ReadMaybeWrite => (flags::READ, 0),
        };
        if area.flags() & (right | flags::IO | flags::PFNMAP) != right {
            return Ok(());
        }
        let how = write
            | bindings::fault_flag_FAULT_FLAG_VMA_LOCK
            | bindings::fault_flag_FAULT_FLAG_ALLOW_RETRY
            | bindings::fault_flag_FAULT_FLAG_KILLABLE
            | bindings::fault_flag_FAULT_FLAG_INTERRUPTIBLE;
        // SAFETY: the area is of the current address space and locked, and the access is one that it allows. No registers: it is not a
        // fault of an instruction.
        let outcome = unsafe { bindings::handle_mm_fault(area.as_ptr(), address, how, ptr::null_mut()) };
        if outcome & (bindings::vm_fault_reason_VM_FAULT_RETRY | bindings::vm_fault_reason_VM_FAULT_COMPLETED) != 0 {
            // The lock was let go on the way.
            core::mem::forget(area);
            if outcome & bindings::vm_fault_reason_VM_FAULT_RETRY != 0 && super::task::signal_pending() {
                return Err(EINTR);
            }
        }
        Ok(())
    }

    /// The page at `hva` if it is present with the wanted rights. Never sleeps; works with interrupts off.
    #[inline]
    pub fn fault_in_fast(&self, hva: Hva, want: Want) -> Option<HostPage> {
        if !self.is_current() {
            return None;
        }
        let write = want == Want::Write;
        // SAFETY: it is the current address space.
        match unsafe { host_walk::peek(self.mm.as_raw(), hva, write) } {
            Ok(seen) => {
                let writable = seen.writable && want != Want::Read;
                // INVARIANT: no reference.
                return Some(HostPage {
                    page: ptr::null_mut(),
                    hpa: seen.hpa,
                    writable,
                    level: seen.level,
                    memory: true,
                    next: seen.next,
                });
            }
            Err(Unseen::Absent) => return None,
            Err(Unseen::Odd) => {}
        }
        let mut page = ptr::null_mut();
        let how = if write { bindings::FOLL_WRITE } else { 0 };
        // SAFETY: there is room for one page; allowed in any context but NMI.
        let got = unsafe { bindings::get_user_pages_fast_only(hva.page_base().0 as usize, 1, how, &mut page) };
        // INVARIANT: the reference is ours.
        (got == 1).then(|| self.counted(page, hva, write))
    }

    /// Puts into `run` the pages from `hva` on that are there with the wanted right, up to the first that is not, at most
    /// [`HostPages::MAX`] and `count`, and not past the 2 MiB that `hva` is in. Never sleeps.
    pub fn present(&self, hva: Hva, count: usize, write: bool, run: &mut HostPages) {
        run.count = 0;
        if self.is_current() {
            let frames = run.frames.get_mut(..count.min(HostPages::MAX)).unwrap_or_default();
            // SAFETY: it is the current address space.
            run.count = unsafe { host_walk::peek_run(self.mm.as_raw(), hva, write, frames) };
        }
    }

    /// A page that came with a reference, which is now the result's.
    fn counted(&self, page: *mut bindings::page, hva: Hva, writable: bool) -> HostPage {
        // SAFETY: whoever looks up pages has checked that it is the current address space.
        let level = unsafe { host_walk::level(self.mm.as_raw(), hva) };
        HostPage { page, hpa: page_to_hpa(page), writable, level, memory: true, next: true }
    }

    /// Memory without page descriptors, or whose descriptors nobody counts: devices.
    fn remapped(&self, hva: Hva, want: Want) -> Result<HostPage> {
        let task = kernel::current!();
        let mm = task.mm().ok_or(EFAULT)?;
        let address = hva.page_base().0 as usize;
        let locked = mm.mmap_read_lock();
        let mut faulted = false;
        loop {
            let vma = locked.vma_lookup(address).ok_or(EFAULT)?;
            if vma.flags() & (flags::IO | flags::PFNMAP) == 0 {
                return Err(EFAULT);
            }
            let mut map =
                bindings::follow_pfnmap_args { vma: vma.as_ptr(), address, ..bindings::follow_pfnmap_args::default() };
            // SAFETY: the area was looked up under the mmap lock, which is held.
            if unsafe { bindings::follow_pfnmap_start(&mut map) } == 0 {
                let level = match (map.addr_mask as u64).wrapping_neg() {
                    size if size >= Level::Page1G.bytes() => Level::Page1G,
                    size if size >= Level::Page2M.bytes() => Level::Page2M,
                    _ => Level::Page4K,
                };
                let page = HostPage {
                    page: ptr::null_mut(),
                    hpa: Hpa((map.pfn as u64).wrapping_mul(PAGE_SIZE as u64)),
                    writable: map.writable && want != Want::Read,
                    level,
                    memory: false,
                    next: false,
                };
                // SAFETY: pairs with the start.
                unsafe { bindings::follow_pfnmap_end(&mut map) };
                return if want == Want::Write && !page.writable { Err(EFAULT) } else { Ok(page) };
            }
            if faulted {
                return Err(EFAULT);
            }
            let how = if want == Want::Write { bindings::fault_flag_FAULT_FLAG_WRITE } else { 0 };
            let mut unlocked = false;
            // SAFETY: the mmap lock is held for reading, and is again on return even if it was dropped in between.
            to_result(unsafe { bindings::fixup_user_fault(mm.as_raw(), address, how, &mut unlocked) }).map_err(
                |e| {
                    if e == EINTR {
                        EINTR
                    } else {
                        EFAULT
                    }
                },
            )?;
            // If the lock was dropped the area may be another one: look again, as often as it takes.
            faulted = !unlocked;
        }
    }

    /// # Safety
    ///
    /// `notifier` must be the field of a live `Self`.
    unsafe fn of<'a>(notifier: *mut bindings::mmu_notifier) -> &'a Self {
        let field = Opaque::cast_from(notifier);
        // SAFETY: the caller's promise.
        unsafe { &*kernel::container_of!(field, Self, notifier) }
    }

    unsafe extern "C" fn invalidate_range_start(
        notifier: *mut bindings::mmu_notifier,
        range: *const bindings::mmu_notifier_range,
    ) -> c_int {
        // SAFETY: by the type invariant, callbacks get a live `Self`; the kernel passes a valid range.
        let (this, range) = unsafe { (Self::of(notifier), &*range) };
        let (start, end) = (range.start as u64, range.end as u64);
        {
            let mut active = this.active.lock();
            if active.count == 0 {
                (active.start, active.end) = (start, end);
            } else {
                (active.start, active.end) = (active.start.min(start), active.end.max(end));
            }
            active.count = active.count.wrapping_add(1);
            this.active_count.store(active.count, Ordering::Release);
        }
        this.target.invalidate(Hva(start), Hva(end), range.flags & bindings::MMU_NOTIFIER_RANGE_BLOCKABLE != 0);
        0
    }

    unsafe extern "C" fn invalidate_range_end(
        notifier: *mut bindings::mmu_notifier,
        _range: *const bindings::mmu_notifier_range,
    ) {
        // SAFETY: as above.
        let this = unsafe { Self::of(notifier) };
        let mut active = this.active.lock();
        this.seq.fetch_add(1, Ordering::Release);
        active.count = active.count.saturating_sub(1);
        this.active_count.store(active.count, Ordering::Release);
    }

    unsafe extern "C" fn clear_flush_young(
        notifier: *mut bindings::mmu_notifier,
        _mm: *mut bindings::mm_struct,
        start: c_ulong,
        end: c_ulong,
    ) -> bool {
        // SAFETY: as above.
        unsafe { Self::of(notifier) }.target.clear_young(Hva(start as u64), Hva(end as u64), true)
    }

    unsafe extern "C" fn clear_young(
        notifier: *mut bindings::mmu_notifier,
        _mm: *mut bindings::mm_struct,
        start: c_ulong,
        end: c_ulong,
    ) -> bool {
        // SAFETY: as above.
        unsafe { Self::of(notifier) }.target.clear_young(Hva(start as u64), Hva(end as u64), false)
    }

    unsafe extern "C" fn test_young(
        notifier: *mut bindings::mmu_notifier,
        _mm: *mut bindings::mm_struct,
        address: c_ulong,
    ) -> bool {
        // SAFETY: as above.
        unsafe { Self::of(notifier) }.target.test_young(Hva(address as u64))
    }

    unsafe extern "C" fn release(notifier: *mut bindings::mmu_notifier, _mm: *mut bindings::mm_struct) {
        // SAFETY: as above.
        unsafe { Self::of(notifier) }.target.released();
    }
}

#[pinned_drop]
impl<T: Invalidate> PinnedDrop for AddressSpace<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: registered with this address space, by the type invariant; our reference keeps its descriptor.
        unsafe { bindings::mmu_notifier_unregister(self.notifier.get(), self.mm.as_raw()) };
    }
}

/// What a fault needs of the host's page.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Reading; the mapping will not be writable.
    Read,
    /// Reading; but tell when writing would be fine as well.
    ReadMaybeWrite,
    /// Writing.
    Write,
}

/// A page of the host, as it was a moment ago.
///
/// # Invariants
///
/// Owns one reference of `page` if that is not null. Without one, nothing is owed to the page.
pub struct HostPage {
    page: *mut bindings::page,
    hpa: Hpa,
    writable: bool,
    level: Level,
    memory: bool,
    next: bool,
}

// SAFETY: a page reference may be dropped anywhere.
unsafe impl Send for HostPage {}

impl HostPage {
    /// Its physical address, of the 4 KiB that was asked for.
    #[inline]
    pub fn hpa(&self) -> Hpa {
        self.hpa
    }

    /// Whether it may be mapped writable.
    #[inline]
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// The largest size at which the host maps it. Good only as long as `must_retry_range` says no.
    #[inline]
    pub fn level(&self) -> Level {
        self.level
    }

    /// Whether it is ordinary memory; otherwise it belongs to a device.
    #[inline]
    pub fn is_memory(&self) -> bool {
        self.memory
    }

    /// Whether the page behind it in the address space may be there as well.
    #[inline]
    pub fn has_next(&self) -> bool {
        self.next
    }

    /// Lets go of a page that the guest now uses: it counts as accessed, and as dirty when it is mapped for `writing`.
    pub fn release(self, writing: bool) {
        let this = ManuallyDrop::new(self);
        if !this.page.is_null() {
            // SAFETY: the reference is ours, and is not used again.
            unsafe { own::krab_put_used_page(this.page, writing) };
        }
    }
}

impl Drop for HostPage {
    fn drop(&mut self) {
        if !self.page.is_null() {
            // SAFETY: the reference is ours by the type invariant.
            unsafe { own::krab_put_page(self.page) };
        }
    }
}

/// A run of neighbouring pages, for mapping around a fault. Good only as long as `must_retry_range` says no.
pub struct HostPages {
    frames: [Option<Hpa>; Self::MAX],
    count: usize,
}

impl HostPages {
    /// Most pages in a run.
    pub const MAX: usize = 16;

    /// No page.
    #[inline]
    pub const fn none() -> Self {
        Self { frames: [None; Self::MAX], count: 0 }
    }

    /// The physical addresses in order, all known.
    #[inline]
    pub fn addresses(&self) -> &[Option<Hpa>] {
        self.frames.get(..self.count).unwrap_or_default()
    }
}
