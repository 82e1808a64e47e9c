// SPDX-License-Identifier: GPL-2.0
//! The bytes at the guest's RIP, found as the CPU finds them: through the guest's page tables and the nested ones, without a lock.
//!
//! For CPUs that do not tell how long an intercepted instruction is. The last walk is kept and used again as long as every entry of the
//! guest that it went through is the same. What it kept of the nested tables is good for as long as a TLB entry would be: the
//! vCPU is in guest mode here, so who takes a page away waits for it, and it forgets the walk when it is told to flush its TLB.
use super::{bindings, kick::InGuest, page::direct_map};
use crate::{
    arch::{
        paging::{entry, ADDRESS, ENTRIES},
        Hpa,
    },
    mmu::Format,
};

/// Most levels of a guest's page tables.
const LEVELS: usize = 5;
/// Bytes that are read: the longest instruction has 15.
const BYTES: u64 = 16;

/// How the guest finds its code: 64-bit mode, where the code segment starts at 0.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Paging {
    pub(crate) cr3: u64,
    /// CR4.LA57.
    pub(crate) five_levels: bool,
}

/// One vCPU's last walk.
///
/// # Invariants
///
/// The first `used` of `entries`, and `page`, are addresses in the direct map, of pages that the nested tables mapped as ordinary memory
/// when the walk was made.
pub(crate) struct CodeCache {
    root: Hpa,
    depth: u32,
    paging: Paging,
    /// Page number of the code, or all ones: nothing is kept.
    number: u64,
    entries: [*const u64; LEVELS],
    values: [u64; LEVELS],
    used: u32,
    page: *const u8,
}

// SAFETY: the pointers are only used in guest mode, by whoever runs the vCPU.
unsafe impl Send for CodeCache {}

impl CodeCache {
    /// For a guest whose nested tables begin at `root` and have `depth` levels.
    pub(crate) fn new(root: Hpa, depth: u8) -> Self {
        Self {
            root,
            depth: depth.into(),
            paging: Paging { cr3: 0, five_levels: false },
            number: u64::MAX,
            entries: [core::ptr::null(); LEVELS],
            values: [0; LEVELS],
            used: 0,
            page: core::ptr::null(),
        }
    }

    /// Forgets the walk: due whenever the vCPU's TLB is flushed because the nested tables changed.
    #[inline]
    pub(crate) fn forget(&mut self) {
        self.number = u64::MAX;
    }

    /// The 16 bytes at `rip`. `None` where that is not easy: the caller has another way.
    #[inline]
    pub(crate) fn bytes<F: Format>(&mut self, paging: Paging, rip: u64, in_guest: &InGuest<'_>) -> Option<[u8; 16]> {
        let offset = rip & 0xFFF;
        if offset > 4096 - BYTES {
            return None;
        }
        if self.number == rip >> 12 && self.paging == paging {
            if let Some(bytes) = self.read(offset, in_guest) {
                return Some(bytes);
            }
        }
        self.walk::<F>(paging, rip, in_guest)?;
        self.read(offset, in_guest)
    }

    /// Reads the code if the guest's tables still say the same.
    #[inline]
    fn read(&self, offset: u64, _in_guest: &InGuest<'_>) -> Option<[u8; 16]> {
        let mut bytes = [0; 16];
        // SAFETY: by the type's invariant these are addresses in the direct map; memory that the kernel took out of it is met with the
        // exception table. `offset` leaves 16 bytes in the page.
        let failed = unsafe {
            bindings::krab_read_code(
                self.entries.as_ptr(),
                self.values.as_ptr(),
                self.used,
                self.page.wrapping_add(offset as usize).cast(),
                bytes.as_mut_ptr().cast(),
            )
        };
        (failed == 0).then_some(bytes)
    }

    /// Walks the guest's tables. They allow the access, or the CPU would not have come to execute what is there.
    #[cold]
    fn walk<F: Format>(&mut self, paging: Paging, rip: u64, in_guest: &InGuest<'_>) -> Option<()> {
        self.forget();
        let mut table = paging.cr3 & ADDRESS;
        let mut shift: u32 = if paging.five_levels { 48 } else { 39 };
        let mut used = 0;
        let page = loop {
            let index = (rip >> shift) as usize % ENTRIES;
            let at = self.nested::<F>(table, in_guest)?.cast::<u64>().wrapping_add(index);
            let mut value = 0;
            // SAFETY: an address in the direct map; a fault is met with the exception table.
            if unsafe { bindings::krab_read_kernel_u64(&mut value, at) } != 0 || value & entry::P == 0 {
                return None;
            }
            *self.entries.get_mut(used)? = at;
            *self.values.get_mut(used)? = value;
            used += 1;
            if shift == 12 || shift <= 30 && value & entry::PS != 0 {
                let inside = (1_u64 << shift) - 1;
                break value & ADDRESS & !inside | rip & inside & !0xFFF;
            }
            table = value & ADDRESS;
            shift -= 9;
        };
        self.page = self.nested::<F>(page, in_guest)?;
        self.used = used as u32;
        self.paging = paging;
        self.number = rip >> 12;
        Some(())
    }

    /// Where the page of a guest physical address is in the direct map, if it is ordinary memory.
    fn nested<F: Format>(&self, gpa: u64, _in_guest: &InGuest<'_>) -> Option<*const u8> {
        let mut table = self.root;
        let mut depth = self.depth;
        if gpa >> (12 + 9 * depth) != 0 {
            return None;
        }
        loop {
            let shift = 3 + 9 * depth;
            let index = (gpa >> shift) as usize % ENTRIES;
            // SAFETY: the root belongs to the VM, and tables are freed only after every vCPU has left guest mode.
            let value = unsafe { direct_map(table).cast::<u64>().wrapping_add(index).read_volatile() };
            if !F::present(value) {
                return None;
            }
            if depth == 1 || value & F::LARGE != 0 {
                let inside = (1_u64 << shift) - 1;
                return F::write_back(value)
                    .then(|| direct_map(Hpa(F::address(value).0 & !inside | gpa & inside & !0xFFF)).cast_const());
            }
            table = F::address(value);
            depth -= 1;
        }
    }
}
