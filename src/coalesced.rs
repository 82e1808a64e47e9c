// SPDX-License-Identifier: GPL-2.0
//! Coalesced writes: writes to registers that userspace need not see at once are put into a ring that it shares, and the guest goes
//! on. KVM API "KVM_REGISTER_COALESCED_MMIO", for memory and for ports.
#![forbid(unsafe_code)]

use core::sync::atomic::{
    fence, AtomicBool,
    Ordering::{Acquire, Release},
};

use kernel::prelude::*;

use crate::{
    abi::vm::{KvmCoalescedMmio, KvmCoalescedMmioZone, KVM_COALESCED_MMIO_MAX},
    glue::{
        lock::IrqSpinLock,
        page::{SharedPage, UserPage},
        srcu::SrcuCell,
    },
    new_irq_spinlock,
};

/// Most zones of a VM: they are searched one by one.
const MAX_ZONES: usize = 1024;
/// Where the ring has its two indices: the next entry userspace reads, and the next one that is written here.
const FIRST: usize = 0;
const LAST: usize = 4;
const ENTRIES: usize = 8;

/// A range of addresses or ports.
#[derive(Clone, Copy)]
struct Zone {
    pio: bool,
    address: u64,
    size: u64,
}

impl Zone {
    fn contains(&self, other: &Self) -> bool {
        let Some(offset) = other.address.checked_sub(self.address) else { return false };
        self.pio == other.pio && offset.checked_add(other.size).is_some_and(|end| end <= self.size)
    }
}

/// The zones and the ring of one VM.
#[pin_data]
pub(crate) struct Coalesced {
    ring: SharedPage,
    zones: SrcuCell<KVVec<Zone>>,
    /// There were zones at some time.
    any: AtomicBool,
    /// Held while an entry is added. Userspace takes entries out without it.
    #[pin]
    adding: IrqSpinLock<()>,
}

impl Coalesced {
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            ring: SharedPage::new()?,
            zones: SrcuCell::new(KVVec::new())?,
            any: false.into(),
            adding <- new_irq_spinlock!((), "krab::coalesced"),
        }? Error)
    }

    /// The page of the ring, for userspace.
    pub(crate) fn user_page(&self) -> UserPage {
        self.ring.user_page()
    }

    /// Puts a write into the ring. `false`: it is in no zone, or the ring is full, so userspace must see it now.
    #[inline(always)]
    pub(crate) fn post(&self, pio: bool, address: u64, len: u32, value: u64) -> bool {
        self.any.load(Acquire) && self.add(&Zone { pio, address, size: len.into() }, value)
    }

    /// Whether a zone has the byte at `address`.
    #[inline(always)]
    pub(crate) fn covers(&self, pio: bool, address: u64) -> bool {
        self.any.load(Acquire) && self.contains(&Zone { pio, address, size: 1 })
    }

    #[inline(never)]
    fn contains(&self, write: &Zone) -> bool {
        self.zones.read().iter().any(|zone| zone.contains(write))
    }

    #[inline(never)]
    fn add(&self, write: &Zone, value: u64) -> bool {
        if !self.contains(write) {
            return false;
        }
        let _adding = self.adding.lock();
        // Userspace can write both: neither leads outside of the page.
        let (first, last) = (self.ring.load::<u32>(FIRST), self.ring.load::<u32>(LAST));
        let next = last.wrapping_add(1) % KVM_COALESCED_MMIO_MAX;
        if last >= KVM_COALESCED_MMIO_MAX || next == first {
            return false;
        }
        let entry = KvmCoalescedMmio {
            phys_addr: write.address,
            len: write.size as u32,
            pio: write.pio.into(),
            data: value.to_le_bytes(),
        };
        self.ring.write(ENTRIES + last as usize * size_of::<KvmCoalescedMmio>(), &entry);
        // The entry first, then the index that shows it: x86 keeps the order of stores, and this is one the compiler keeps, too.
        fence(Release);
        self.ring.store(LAST, next);
        true
    }

    /// KVM_REGISTER_COALESCED_MMIO. The caller keeps others from changing the zones at the same time.
    pub(crate) fn register(&self, zone: &KvmCoalescedMmioZone) -> Result {
        let new = checked(zone)?;
        let old = self.zones.read();
        if old.len() >= MAX_ZONES {
            return Err(ENOSPC);
        }
        let mut all = KVVec::with_capacity(old.len().saturating_add(1), GFP_KERNEL_ACCOUNT)?;
        all.extend_from_slice(&old, GFP_KERNEL_ACCOUNT)?;
        all.push(new, GFP_KERNEL_ACCOUNT)?;
        drop(old);
        self.any.store(true, Release);
        self.zones.replace(all)
    }

    /// KVM_UNREGISTER_COALESCED_MMIO: every zone that contains the given one goes; none may.
    pub(crate) fn unregister(&self, zone: &KvmCoalescedMmioZone) -> Result {
        let gone = checked(zone)?;
        let old = self.zones.read();
        let mut rest = KVVec::with_capacity(old.len(), GFP_KERNEL_ACCOUNT)?;
        for zone in old.iter().filter(|zone| !zone.contains(&gone)) {
            rest.push(*zone, GFP_KERNEL_ACCOUNT)?;
        }
        drop(old);
        self.zones.replace(rest)
    }
}

fn checked(zone: &KvmCoalescedMmioZone) -> Result<Zone> {
    match zone.pio {
        0 | 1 => Ok(Zone { pio: zone.pio == 1, address: zone.addr, size: zone.size.into() }),
        _ => Err(EINVAL),
    }
}
