// SPDX-License-Identifier: GPL-2.0
//! Pages that hardware wants in a guest's physical memory and that are not userspace's: the local APICs' window, and the page table with
//! which a CPU without unrestricted guests runs a guest without paging. They are mapped where no slot is.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, AtomicU8, Ordering::Relaxed};

use kernel::prelude::*;

use super::{Fault, Memory, Nested, NestedLimits, APIC_FRAME};
use crate::{
    arch::{paging::Level, Gfn, Gpa, Hpa},
    glue::{
        phys::{Bytes, PhysBox},
        tables::TableStock,
    },
    guest::exit::NestedFault,
    mmu::{identity, nested::TABLES_PER_MAP, Format, MemoryType, Prot},
};

/// No frame.
const NOWHERE: u64 = u64::MAX;

pub(super) struct OwnPages {
    /// What the guest has at [`APIC_FRAME`] where its CPUs know that page.
    apic: Option<PhysBox<Bytes<4096>>>,
    /// One of [`apic`].
    apic_state: AtomicU8,
    /// What a CPU that needs it goes by while the guest has no paging.
    identity_map: Option<PhysBox<Bytes<4096>>>,
    /// Where userspace wants it.
    identity_addr: AtomicU64,
    /// The frame where it is, once a vCPU knows of it: then no slot may have that. Changes under the slots' update lock.
    identity_frame: AtomicU64,
}

/// Whether the page for the local APICs' window is mapped.
mod apic {
    /// Not yet: the first access maps it.
    pub(super) const AWAITED: u8 = 0;
    pub(super) const MAPPED: u8 = 1;
    /// A vCPU has its APIC elsewhere or in another mode, and would find memory there. It stays like this: such a guest does without.
    pub(super) const FORBIDDEN: u8 = 2;
}

impl OwnPages {
    pub(super) fn new(limits: &NestedLimits) -> Result<Self> {
        let mut identity_map = if limits.identity_map { Some(PhysBox::<Bytes<4096>>::new()?) } else { None };
        if let Some(page) = &mut identity_map {
            identity::fill(&mut page.0);
        }
        Ok(Self {
            apic: if limits.apic_page { Some(PhysBox::new()?) } else { None },
            apic_state: apic::AWAITED.into(),
            identity_map,
            identity_addr: identity::DEFAULT_ADDR.into(),
            identity_frame: NOWHERE.into(),
        })
    }

    /// Whether a frame has become hardware's for good.
    pub(super) fn reserves(&self, slots_have: impl FnOnce(Gfn) -> bool) -> bool {
        let frame = self.identity_frame.load(Relaxed);
        frame != NOWHERE && slots_have(Gfn(frame))
    }
}

impl<F: Format + Send + Sync + 'static> Memory<F> {
    /// The page for the local APICs' window, where the CPUs have a use for it.
    pub(crate) fn apic_page(&self) -> Option<Hpa> {
        self.own.apic.as_ref().map(PhysBox::address)
    }

    /// Some vCPU does not have its APIC's window at that page: nobody gets the page from now on. May sleep.
    #[inline]
    pub(crate) fn forbid_apic_page(&self) {
        if self.own.apic.is_some() && self.own.apic_state.load(Relaxed) != apic::FORBIDDEN {
            self.unmap_apic_page();
        }
    }

    #[cold]
    fn unmap_apic_page(&self) {
        let nested = self.space.nested.lock();
        self.own.apic_state.store(apic::FORBIDDEN, Relaxed);
        drop(nested);
        self.space.unmap(APIC_FRAME, 1);
    }

    /// KVM_SET_IDENTITY_MAP_ADDR, before there are vCPUs. 0 is the default.
    pub(crate) fn set_identity_map_addr(&self, at: u64) {
        self.own.identity_addr.store(if at == 0 { identity::DEFAULT_ADDR } else { at }, Relaxed);
    }

    /// Where a new vCPU finds a page table that translates every address to itself; from now on no slot can be there. `None`: its CPUs
    /// need none, or a slot is there already. `EINVAL` where it cannot be.
    pub(crate) fn place_identity_map(&self) -> Result<Option<Gpa>> {
        if self.own.identity_map.is_none() {
            return Ok(None);
        }
        let at = self.own.identity_addr.load(Relaxed);
        if !identity::fits(at) {
            return Err(EINVAL);
        }
        let _update = self.update.lock();
        let frame = Gpa(at).gfn();
        if self.space.slots.read().find(frame).is_some() {
            return Ok(None);
        }
        self.own.identity_frame.store(frame.0, Relaxed);
        Ok(Some(Gpa(at)))
    }

    /// A fault where there is no slot: a device, unless it is at a page of hardware's. The local APICs' window is one if the vCPU has
    /// that at its page: all have, or they would have forbidden it.
    #[inline]
    pub(super) fn device_fault(&self, fault: &NestedFault, may_sleep: bool) -> Result<Fault> {
        let gfn = fault.gpa.gfn();
        if fault.execute {
            return Ok(Fault::Mmio);
        }
        match (&self.own.apic, &self.own.identity_map) {
            (Some(page), _) if gfn == APIC_FRAME => {
                let awaited = || self.own.apic_state.load(Relaxed) == apic::AWAITED;
                self.map_own(gfn, page.address(), may_sleep, awaited)
            }
            (_, Some(page)) if gfn.0 == self.own.identity_frame.load(Relaxed) => {
                self.map_own(gfn, page.address(), may_sleep, || true)
            }
            _ => Ok(Fault::Mmio),
        }
    }

    /// Maps a page while it is `wanted`, which is asked under the tables' lock, too.
    #[cold]
    fn map_own(&self, gfn: Gfn, page: Hpa, may_sleep: bool, wanted: impl Fn() -> bool) -> Result<Fault> {
        if !wanted() {
            return Ok(Fault::Mmio);
        }
        let stock = if may_sleep { Some(TableStock::allocate(TABLES_PER_MAP)?) } else { None };
        let mut nested = self.space.nested.lock();
        let Nested { table, pages } = &mut *nested;
        if let Some(stock) = stock {
            pages.refill(stock);
        }
        if pages.short_of(TABLES_PER_MAP) > 0 {
            return Ok(Fault::Sleep);
        }
        if !wanted() {
            return Ok(Fault::Mmio);
        }
        let memory_type = MemoryType::WriteBack;
        let prot = Prot { write: true, execute: false, accessed: true, dirty: true, memory_type };
        // A page that is mapped already stays as it is: no flush is owed.
        table.map(pages, gfn, page, Level::Page4K, prot).map_err(|_| EFAULT)?;
        if gfn == APIC_FRAME {
            self.own.apic_state.store(apic::MAPPED, Relaxed);
        }
        Ok(Fault::Mapped)
    }
}
