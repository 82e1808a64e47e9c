// SPDX-License-Identifier: GPL-2.0
//! Interrupts and device registers of a VM that are eventfds: irqfds, with or without resampling, and ioeventfds. KVM API
//! "KVM_IRQFD", "KVM_IOEVENTFD".
#![forbid(unsafe_code)]

use core::sync::atomic::Ordering::{Acquire, Release};

use kernel::{prelude::*, sync::Arc};

use crate::{
    abi::irq::{
        KvmIoeventfd, KvmIrqfd, KVM_IOEVENTFD_FLAG_DATAMATCH, KVM_IOEVENTFD_FLAG_DEASSIGN, KVM_IOEVENTFD_FLAG_PIO,
        KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE,
    },
    arch::Gpa,
    glue::eventfd::{EventFd, Irqfd, IrqfdTarget},
    irq::{Controllers, Drive, Irq},
    irqchip::{
        routing::{self, Target, MAX_ROUTES},
        LineSource,
    },
};

/// Most ioeventfds of a VM: they are searched one by one, and one eventfd serves any number of them. Many more than a machine with a
/// hundred devices of many queues has.
const MAX_IOEVENTS: usize = 4096;

/// A resample eventfd: told when the interrupt of its GSI is acknowledged.
#[derive(Clone)]
pub(crate) struct Resampler {
    pub(crate) gsi: u32,
    /// The irqfd that it belongs to.
    trigger: Arc<EventFd>,
    pub(crate) eventfd: Arc<EventFd>,
}

/// An eventfd in the place of a device register.
#[derive(Clone)]
pub(crate) struct Ioevent {
    pio: bool,
    address: u64,
    /// 0: any.
    len: u32,
    data_match: Option<u64>,
    eventfd: Arc<EventFd>,
}

/// An irqfd's GSI.
pub(crate) struct IrqfdLine {
    controllers: Arc<Controllers>,
    gsi: u32,
    resample: bool,
}

impl IrqfdTarget for IrqfdLine {
    fn signaled(&self) {
        if self.resample {
            // Stays high until it is acknowledged.
            self.controllers.set_gsi(self.gsi, LineSource::Resampler, Drive::High);
        } else {
            self.controllers.set_gsi(self.gsi, LineSource::User, Drive::Pulse);
        }
    }
}

impl Irq {
    /// Signals the ioeventfds for a write. Whether there was one.
    #[inline]
    pub(crate) fn ioevent(&self, pio: bool, address: u64, len: u32, value: u64) -> bool {
        if !self.any_ioevents.load(Acquire) {
            return false;
        }
        let ioevents = self.ioevents.read();
        let hit = ioevents.iter().find(|event| {
            event.pio == pio
                && event.address == address
                && (event.len == 0 || event.len == len)
                && event.data_match.is_none_or(|wanted| wanted == value)
        });
        hit.map(|event| event.eventfd.signal()).is_some()
    }

    /// Whether an eventfd or the ring of coalesced writes may take a write to memory at `gpa`.
    #[inline(always)]
    pub(crate) fn may_post(&self, gpa: Gpa) -> bool {
        self.any_ioevents.load(Acquire) && self.has_ioevent(gpa) || self.coalesced.covers(false, gpa.0)
    }

    fn has_ioevent(&self, gpa: Gpa) -> bool {
        self.ioevents.read().iter().any(|event| !event.pio && event.address == gpa.0)
    }

    /// Gives a write to its eventfd, or puts it into the ring of coalesced writes. Whether there was one with room.
    #[inline]
    pub(crate) fn post(&self, pio: bool, address: u64, len: u32, value: u64) -> bool {
        self.ioevent(pio, address, len, value) || self.coalesced.post(pio, address, len, value)
    }

    /// KVM_IRQFD.
    pub(crate) fn irqfd(&self, request: &KvmIrqfd) -> Result {
        if request.flags & !(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE) != 0
            || request.gsi as usize >= MAX_ROUTES
        {
            return Err(EINVAL);
        }
        let fd = request.fd as i32;
        let resample = request.flags & KVM_IRQFD_FLAG_RESAMPLE != 0;
        let mut irqfds = self.irqfds.lock();
        for dead in irqfds.iter().filter(|irqfd| irqfd.is_dead()) {
            self.drop_resamplers(|resampler| resampler.trigger.is_same(dead.eventfd()))?;
        }
        irqfds.retain(|irqfd| !irqfd.is_dead());
        let resamples = |resampler: &Resampler, eventfd: &EventFd| {
            resampler.gsi == request.gsi && resampler.trigger.is_same(eventfd)
        };
        if request.flags & KVM_IRQFD_FLAG_DEASSIGN != 0 {
            let eventfd = EventFd::from_fd(fd)?;
            self.drop_resamplers(|resampler| resamples(resampler, &eventfd))?;
            irqfds.retain(|irqfd| irqfd.target().gsi != request.gsi || !irqfd.eventfd().is_same(&eventfd));
            return Ok(());
        }
        self.need(EINVAL)?;
        if resample && !self.has_pic() {
            // With the split irqchip nobody here sees what becomes of a line.
            return Err(EINVAL);
        }
        irqfds.reserve(1, GFP_KERNEL_ACCOUNT)?;
        let line = IrqfdLine { controllers: self.controllers.clone(), gsi: request.gsi, resample };
        let irqfd = Irqfd::new(fd, line)?;
        if resample {
            // Only now is it sure that the eventfd is free. An interrupt that was acknowledged before comes again, as its line stays high.
            let trigger = Arc::new(EventFd::from_fd(fd)?, GFP_KERNEL_ACCOUNT)?;
            if !irqfd.eventfd().is_same(&trigger) {
                return Err(EBADF);
            }
            let eventfd = Arc::new(EventFd::from_fd(request.resamplefd as i32)?, GFP_KERNEL_ACCOUNT)?;
            let mut all = self.copy_resamplers(|_| true)?;
            all.push(Resampler { gsi: request.gsi, trigger, eventfd }, GFP_KERNEL_ACCOUNT)?;
            self.controllers.resamplers.replace(all)?;
            self.tell_resampling();
        }
        irqfds.push(irqfd, GFP_KERNEL_ACCOUNT)?;
        Ok(())
    }

    fn copy_resamplers(&self, keep: impl Fn(&Resampler) -> bool) -> Result<KVVec<Resampler>> {
        let old = self.controllers.resamplers.read();
        let mut all = KVVec::with_capacity(old.len(), GFP_KERNEL_ACCOUNT)?;
        for resampler in old.iter().filter(|resampler| keep(resampler)) {
            all.push(resampler.clone(), GFP_KERNEL_ACCOUNT)?;
        }
        Ok(all)
    }

    fn drop_resamplers(&self, gone: impl Fn(&Resampler) -> bool) -> Result {
        if self.controllers.resamplers.read().iter().any(&gone) {
            let rest = self.copy_resamplers(|resampler| !gone(resampler))?;
            self.controllers.resamplers.replace(rest)?;
            self.tell_resampling();
        }
        Ok(())
    }

    /// Tells the I/O APIC which of its pins are resampled. The caller has `irqfds` locked, so that the last one to tell knows all.
    pub(crate) fn tell_resampling(&self) {
        let mut pins = 0;
        let resamplers = self.controllers.resamplers.read();
        let routes = self.controllers.routes.read();
        for resampler in resamplers.iter() {
            for route in routing::lookup(&routes.routes, &routes.starts, resampler.gsi) {
                if let Target::Ioapic(pin) = route.target {
                    pins |= 1 << (pin & 31);
                }
            }
        }
        self.controllers.set_resampling(pins);
    }

    /// KVM_IOEVENTFD. The caller keeps others from changing them at the same time.
    pub(crate) fn ioeventfd(&self, request: &KvmIoeventfd) -> Result {
        const KNOWN: u32 = KVM_IOEVENTFD_FLAG_DATAMATCH | KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DEASSIGN;
        let pio = request.flags & KVM_IOEVENTFD_FLAG_PIO != 0;
        let matches = request.flags & KVM_IOEVENTFD_FLAG_DATAMATCH != 0;
        let bad = request.flags & !KNOWN != 0
            || !matches!(request.len, 0 | 1 | 2 | 4 | 8)
            || request.len == 0 && matches
            || request.addr.checked_add(request.len.into()).is_none();
        if bad {
            return Err(EINVAL);
        }
        let new = Ioevent {
            pio,
            address: request.addr,
            len: request.len,
            data_match: matches.then_some(request.datamatch),
            eventfd: Arc::new(EventFd::from_fd(request.fd)?, GFP_KERNEL_ACCOUNT)?,
        };
        let same_place = |old: &Ioevent| old.pio == new.pio && old.address == new.address && old.len == new.len;
        let old = self.ioevents.read();
        let mut all = KVVec::with_capacity(old.len().saturating_add(1), GFP_KERNEL_ACCOUNT)?;
        let deassign = request.flags & KVM_IOEVENTFD_FLAG_DEASSIGN != 0;
        if deassign {
            let is_it = |event: &Ioevent| {
                same_place(event) && event.data_match == new.data_match && event.eventfd.is_same(&new.eventfd)
            };
            if !old.iter().any(is_it) {
                return Err(ENOENT);
            }
            for event in old.iter().filter(|event| !is_it(event)) {
                all.push(event.clone(), GFP_KERNEL_ACCOUNT)?;
            }
        } else {
            let clash = |event: &Ioevent| {
                event.pio == new.pio
                    && event.address == new.address
                    && (event.len == 0 || new.len == 0 || event.len == new.len)
                    && (event.data_match.is_none() || !matches || event.data_match == new.data_match)
            };
            if old.iter().any(clash) {
                return Err(EEXIST);
            }
            if old.len() >= MAX_IOEVENTS {
                return Err(ENOSPC);
            }
            for event in old.iter() {
                all.push(event.clone(), GFP_KERNEL_ACCOUNT)?;
            }
            all.push(new, GFP_KERNEL_ACCOUNT)?;
            self.any_ioevents.store(true, Release);
        }
        drop(old);
        // A new one may be missed by a write that is under way, so nobody waits; one that goes is not signalled after this. A long table
        // does not stay around.
        match deassign || all.len() > 256 {
            true => self.ioevents.replace(all),
            false => self.ioevents.replace_soon(all),
        }
    }
}
