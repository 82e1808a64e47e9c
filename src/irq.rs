// SPDX-License-Identifier: GPL-2.0
//! Interrupt controllers of a VM outside its vCPUs: 8259A, I/O APIC, 8254, and the routing table.
//!
//! The models are pure; here is their lock, the host timer, and what carries their work out. Messages go to the vCPUs' inboxes under the
//! lock; eventfds are signalled after it, because an eventfd may lead back here.
#![forbid(unsafe_code)]

use core::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Release},
};

use kernel::{
    prelude::*,
    sync::{Arc, SetOnce},
};

use crate::{
    abi::irq::{
        KvmIoapicState, KvmIrqRouting, KvmIrqRoutingEntry, KvmIrqchip, KvmMsi, KvmPicState, KvmPitConfig, KvmPitState2,
    },
    arch::{Gpa, Hva},
    coalesced::Coalesced,
    glue::{
        eventfd::Irqfd,
        lock::IrqSpinLock,
        srcu::SrcuCell,
        timer::{self, Timer, TimerTarget},
        user,
    },
    irq_eventfd::{Ioevent, IrqfdLine, Resampler},
    irqchip::{
        dest::Origin,
        ioapic::{Ioapic, STORM_PAUSE_NS, WINDOW_BYTES},
        pic::{Pic, PicWork},
        pit::Pit,
        routing::{self, Msi, Pins, Route, RouteRules, Target, DEFAULT_ROUTES, MAX_ROUTES},
        Bits256, Eoi, LineSource, LineStatus, Message,
    },
    new_irq_spinlock,
    vcpu::{request, Peers},
};

/// How a GSI is driven.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drive {
    Low,
    High,
    /// High and low again, before anybody else drives it: of two pulses at the same time the second is an edge, too.
    Pulse,
}

/// The PIT's interrupt.
const PIT_GSI: u32 = 0;

/// The models that are in the kernel.
#[derive(Default)]
struct Chips {
    irqchip: Option<KBox<Irqchip>>,
    pit: Option<KBox<Pit>>,
    /// Pins that [`PIT_GSI`] goes to.
    pit_pins: Pins,
    /// [`Chips::eoi_listeners`] when a change was last announced.
    eoi_listeners: Bits256,
}

impl Chips {
    /// The vectors whose end the models want to know.
    fn eoi_listeners(&self) -> Bits256 {
        let pit_pins = if self.pit.is_some() { self.pit_pins.ioapic } else { 0 };
        self.irqchip.as_ref().map_or(Bits256::EMPTY, |irqchip| irqchip.ioapic.eoi_vectors(pit_pins))
    }
}

#[derive(Default)]
struct Irqchip {
    pic: Pic,
    ioapic: Ioapic,
}

/// The routing table.
#[derive(Default)]
pub(crate) struct Routes {
    pub(crate) routes: KVVec<Route>,
    pub(crate) starts: KVVec<u16>,
    /// Vectors of the level-triggered pins of an I/O APIC in userspace, which wants to know of their end.
    user_levels: Bits256,
}

/// What timers, irqfds and the VM share.
#[pin_data]
pub(crate) struct Controllers {
    peers: Arc<Peers>,
    #[pin]
    chips: IrqSpinLock<Chips>,
    pub(crate) routes: SrcuCell<Routes>,
    pub(crate) resamplers: SrcuCell<KVVec<Resampler>>,
    /// Of [`mode`].
    mode: AtomicU32,
}

/// What userspace chose for the VM, before there are vCPUs.
mod mode {
    /// KVM_CREATE_IRQCHIP or KVM_CAP_SPLIT_IRQCHIP: local APICs are in the kernel.
    pub(super) const CREATED: u32 = 1 << 0;
    /// KVM_CAP_SPLIT_IRQCHIP.
    pub(super) const SPLIT: u32 = 1 << 1;
    /// KVM_X2APIC_API_USE_32BIT_IDS.
    pub(super) const WIDE_IDS: u32 = 1 << 2;
    /// KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK.
    pub(super) const FF_IS_ONE_CPU: u32 = 1 << 3;
    /// Not userspace's choice: CPUs may end interrupts without us, and must know of which we want to hear.
    pub(super) const CPU_ENDS: u32 = 1 << 4;
    /// Routes of the first GSIs, this many, are pins of userspace's I/O APIC.
    pub(super) const RESERVED_PINS_SHIFT: u32 = 16;
}

/// Work that waits until the lock is free.
#[derive(Default)]
struct Later {
    /// I/O APIC pins and 8259A pins that were acknowledged, as bits.
    ioapic_acknowledged: u32,
    pic_acknowledged: u16,
    /// The PIT has a tick that waited.
    pit_again: bool,
}

impl Controllers {
    fn new(peers: Arc<Peers>) -> Result<Arc<Self>> {
        let routes = SrcuCell::new(Routes::default())?;
        let resamplers = SrcuCell::new(KVVec::new())?;
        Ok(Arc::pin_init(
            pin_init!(Self {
                peers,
                chips <- new_irq_spinlock!(Chips::default(), "krab::chips"),
                routes,
                resamplers,
                mode: 0.into(),
            }),
            GFP_KERNEL_ACCOUNT,
        )?)
    }

    /// The 8259A's output rose: tell the CPUs that take it.
    fn notify_pic(&self) {
        for (index, peer) in self.peers.iter().enumerate() {
            if self.peers.card(index).is_some_and(|cell| cell.card().takes_pic()) {
                peer.inbox.post_pic();
                peer.kick.kick();
            }
        }
    }

    fn has(&self, mode: u32) -> bool {
        self.mode.load(Acquire) & mode != 0
    }

    fn deliver(&self, message: &Message) -> Option<usize> {
        self.peers.deliver(message, Origin::Device { ff_is_everybody: !self.has(mode::FF_IS_ONE_CPU) })
    }

    /// Drives a GSI. The sum over its routes as KVM_IRQ_LINE_STATUS has it: negative when nothing was delivered, 0 when
    /// coalesced.
    pub(crate) fn set_gsi(&self, gsi: u32, source: LineSource, drive: Drive) -> i32 {
        let mut result = LineStatus::Ignored.kvm();
        let routes = self.routes.read();
        for route in routing::lookup(&routes.routes, &routes.starts, gsi) {
            let status = match route.target {
                Target::Msi(_) if drive == Drive::Low => continue,
                Target::Msi(msi) => match self.deliver(&msi.message(self.has(mode::WIDE_IDS))) {
                    None => LineStatus::Ignored.kvm(),
                    Some(count) => count as i32,
                },
                Target::Pic(pin) => self.set_pic(pin, source, drive),
                Target::Ioapic(pin) => self.set_ioapic(pin, source, drive),
            };
            if status >= 0 {
                result = result.max(0).saturating_add(status);
            }
        }
        result
    }

    fn set_pic(&self, pin: u8, source: LineSource, drive: Drive) -> i32 {
        let mut chips = self.chips.lock();
        let Some(irqchip) = &mut chips.irqchip else { return LineStatus::Ignored.kvm() };
        let (status, rose) = irqchip.pic.set_line(pin, source, drive != Drive::Low);
        if drive == Drive::Pulse {
            let _ = irqchip.pic.set_line(pin, source, false);
        }
        drop(chips);
        if rose {
            self.notify_pic();
        }
        status.kvm()
    }

    fn set_ioapic(&self, pin: u8, source: LineSource, drive: Drive) -> i32 {
        let mut chips = self.chips.lock();
        let Some(irqchip) = &mut chips.irqchip else { return LineStatus::Ignored.kvm() };
        let work = irqchip.ioapic.set_line(pin, source, drive != Drive::Low);
        let status = match work.message {
            None => work.status.kvm(),
            Some(message) => self.send_pin(&mut irqchip.ioapic, pin, &message),
        };
        if drive == Drive::Pulse {
            let _ = irqchip.ioapic.set_line(pin, source, false);
        }
        status
    }

    /// Delivers what a pin of the I/O APIC sent.
    fn send_pin(&self, ioapic: &mut Ioapic, pin: u8, message: &Message) -> i32 {
        match self.deliver(message) {
            None => {
                ioapic.not_accepted(pin);
                LineStatus::Ignored.kvm()
            }
            Some(count) => count as i32,
        }
    }

    /// A local APIC ended an interrupt. Whether a storm is to be paused: then [`resume`](Self::resume) is due.
    fn eoi(&self, eoi: Eoi) -> bool {
        let mut later = Later::default();
        let paused;
        {
            let mut chips = self.chips.lock();
            let Some(irqchip) = &mut chips.irqchip else { return false };
            let work = irqchip.ioapic.eoi(eoi);
            paused = work.paused;
            self.service_pins(&mut irqchip.ioapic, work.again);
            later.ioapic_acknowledged = work.acknowledged;
            if work.acknowledged & chips.pit_pins.ioapic != 0 {
                later.pit_again = chips.pit.as_mut().is_some_and(|pit| pit.irq_acknowledged());
            }
        }
        self.finish(&later);
        paused
    }

    /// Tells the I/O APIC which of its pins (as bits) are resampled.
    pub(crate) fn set_resampling(&self, pins: u32) {
        let mut chips = self.chips.lock();
        if let Some(irqchip) = &mut chips.irqchip {
            irqchip.ioapic.set_resampling(pins);
        }
        self.announce(&mut chips);
    }

    /// Lets the vCPUs know of whose end we want to hear, if that changed: before the next message of those vectors.
    fn announce(&self, chips: &mut Chips) {
        let listeners = chips.eoi_listeners();
        if listeners != core::mem::replace(&mut chips.eoi_listeners, listeners) {
            self.announce_all();
        }
    }

    fn announce_all(&self) {
        if self.has(mode::CPU_ENDS) {
            for peer in self.peers.iter() {
                peer.kick.post(request::EOI_LISTENERS);
            }
        }
    }

    /// Lets the pins go on that a storm paused.
    fn resume(&self) {
        if let Some(irqchip) = &mut self.chips.lock().irqchip {
            let pins = irqchip.ioapic.resume();
            self.service_pins(&mut irqchip.ioapic, pins);
        }
    }

    /// Delivers for each of the pins (as bits) whose line is high.
    fn service_pins(&self, ioapic: &mut Ioapic, pins: u32) {
        for pin in (0..32u8).filter(|pin| pins & 1 << pin != 0) {
            if let Some(message) = ioapic.service(pin) {
                self.send_pin(ioapic, pin, &message);
            }
        }
    }

    /// What had to wait for the lock.
    fn finish(&self, later: &Later) {
        if later.ioapic_acknowledged != 0 || later.pic_acknowledged != 0 {
            let resamplers = self.resamplers.read();
            if !resamplers.is_empty() {
                let routes = self.routes.read();
                for resampler in resamplers.iter() {
                    let here = |route: &Route| match route.target {
                        Target::Ioapic(pin) => later.ioapic_acknowledged & 1 << (pin & 31) != 0,
                        Target::Pic(pin) => later.pic_acknowledged & 1 << (pin & 15) != 0,
                        Target::Msi(_) => false,
                    };
                    if routing::lookup(&routes.routes, &routes.starts, resampler.gsi).iter().any(here) {
                        self.set_gsi(resampler.gsi, LineSource::Resampler, Drive::Low);
                        resampler.eventfd.signal();
                    }
                }
            }
        }
        if later.pit_again {
            self.pulse_pit();
        }
    }

    fn pulse_pit(&self) {
        self.set_gsi(PIT_GSI, LineSource::Pit, Drive::Pulse);
    }

    /// The 8259A's output, and the vector that a CPU takes from it.
    pub(crate) fn pic_output(&self) -> bool {
        self.chips.lock().irqchip.as_ref().is_some_and(|irqchip| irqchip.pic.output())
    }

    pub(crate) fn acknowledge_pic(&self) -> Option<u8> {
        let mut chips = self.chips.lock();
        let irqchip = chips.irqchip.as_mut()?;
        if !irqchip.pic.output() {
            return None;
        }
        let (vector, work) = irqchip.pic.acknowledge();
        let later = pic_work(&mut chips, work);
        drop(chips);
        if work.raised {
            self.notify_pic();
        }
        self.finish(&later);
        Some(vector)
    }
}

/// Tells the PIT what happened at the 8259A.
fn pic_work(chips: &mut Chips, work: PicWork) -> Later {
    let mut later = Later { pic_acknowledged: work.acknowledged, ..Later::default() };
    let pins = chips.pit_pins.pic;
    if let Some(pit) = &mut chips.pit {
        if work.acknowledged & pins != 0 {
            later.pit_again = pit.irq_acknowledged();
        }
        let unmasked = chips.irqchip.as_ref().is_some_and(|irqchip| irqchip.pic.masks() & pins == 0);
        if work.mask_changed & pins != 0 && unmasked {
            pit.irq_unmasked();
        }
    }
    later
}

/// The PIT's host timer.
struct PitTimer(Arc<Controllers>);

impl TimerTarget for PitTimer {
    fn expired(&self) -> Option<u64> {
        let mut chips = self.0.chips.lock();
        let pit = chips.pit.as_mut()?;
        let due = pit.expire(timer::now_ns());
        let next = pit.deadline_ns();
        drop(chips);
        if due {
            self.0.pulse_pit();
        }
        next
    }
}

/// Ends the pause of a level-triggered line that interrupted again and again.
struct StormTimer(Arc<Controllers>);

impl TimerTarget for StormTimer {
    fn expired(&self) -> Option<u64> {
        self.0.resume();
        None
    }
}

/// All of it, as the VM has it.
#[pin_data]
pub(crate) struct Irq {
    pub(crate) controllers: Arc<Controllers>,
    pub(crate) ioevents: SrcuCell<KVVec<Ioevent>>,
    /// There were ioeventfds at some time.
    pub(crate) any_ioevents: core::sync::atomic::AtomicBool,
    #[pin]
    pub(crate) coalesced: Coalesced,
    pit_timer: SetOnce<Pin<KBox<Timer<PitTimer>>>>,
    storm_timer: SetOnce<Pin<KBox<Timer<StormTimer>>>>,
    #[pin]
    pub(crate) irqfds: kernel::sync::Mutex<KVVec<Pin<KBox<Irqfd<IrqfdLine>>>>>,
    /// KVM_PIT_SPEAKER_DUMMY: port 61h is here too.
    speaker: core::sync::atomic::AtomicBool,
}

impl Irq {
    pub(crate) fn new(peers: Arc<Peers>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            controllers: Controllers::new(peers)?,
            ioevents: SrcuCell::new(KVVec::new())?,
            any_ioevents: false.into(),
            coalesced <- Coalesced::new(),
            pit_timer: SetOnce::new(),
            storm_timer: SetOnce::new(),
            irqfds <- kernel::new_mutex!(KVVec::new()),
            speaker: false.into(),
        }? Error)
    }

    /// Whether the interrupt controllers are in the kernel.
    pub(crate) fn exists(&self) -> bool {
        self.controllers.has(mode::CREATED)
    }

    /// Whether the 8259A and the I/O APIC are in the kernel, too.
    pub(crate) fn has_pic(&self) -> bool {
        self.controllers.mode.load(Acquire) & (mode::CREATED | mode::SPLIT) == mode::CREATED
    }

    /// How messages and routes are read.
    pub(crate) fn rules(&self) -> RouteRules {
        RouteRules { split_irqchip: self.controllers.has(mode::SPLIT), wide_ids: self.controllers.has(mode::WIDE_IDS) }
    }

    /// KVM_CAP_SPLIT_IRQCHIP: only the local APICs are in the kernel. The caller has seen that there is no vCPU yet.
    pub(crate) fn split(&self, reserved_pins: u16) -> Result {
        if self.exists() {
            return Err(EEXIST);
        }
        let pins = u32::from(reserved_pins) << mode::RESERVED_PINS_SHIFT;
        self.controllers.mode.fetch_or(mode::CREATED | mode::SPLIT | pins, Release);
        Ok(())
    }

    /// KVM_CAP_X2APIC_API.
    pub(crate) fn set_x2apic_api(&self, wide_ids: bool, ff_is_one_cpu: bool) {
        let bits = u32::from(wide_ids) * mode::WIDE_IDS | u32::from(ff_is_one_cpu) * mode::FF_IS_ONE_CPU;
        self.controllers.mode.fetch_or(bits, Release);
    }

    pub(crate) fn need(&self, error: Error) -> Result {
        self.exists().then_some(()).ok_or(error)
    }

    /// CPUs of this VM may end interrupts themselves. Before there are vCPUs.
    pub(crate) fn cpu_ends_interrupts(&self) {
        self.controllers.mode.fetch_or(mode::CPU_ENDS, Release);
    }

    /// The vectors of which [`eoi`](Self::eoi) is to hear. [`request::EOI_LISTENERS`] says when there are others.
    pub(crate) fn eoi_listeners(&self) -> Bits256 {
        match self.controllers.has(mode::SPLIT) {
            true => self.controllers.routes.read().user_levels,
            false => self.controllers.chips.lock().eoi_listeners(),
        }
    }

    /// Whether somebody is to know when a local APIC ends `vector`.
    pub(crate) fn hears_end_of(&self, vector: u8) -> bool {
        match self.controllers.has(mode::SPLIT) {
            true => self.controllers.routes.read().user_levels.test(vector),
            false => self.controllers.chips.lock().eoi_listeners.test(vector),
        }
    }

    /// A local APIC ended an interrupt. Whether userspace is to know, because its I/O APIC sent it.
    pub(crate) fn eoi(&self, eoi: Eoi) -> bool {
        if self.controllers.has(mode::SPLIT) {
            return eoi.broadcast && self.controllers.routes.read().user_levels.test(eoi.vector);
        }
        if self.controllers.eoi(eoi) {
            if let Some(timer) = self.storm_timer.as_ref() {
                timer.arm(timer::now_ns().saturating_add(STORM_PAUSE_NS));
            }
        }
        false
    }

    pub(crate) fn pic_output(&self) -> bool {
        self.controllers.pic_output()
    }

    pub(crate) fn acknowledge_pic(&self) -> Option<u8> {
        self.controllers.acknowledge_pic()
    }

    /// IN from a device in the kernel. `None`: userspace has the port.
    #[inline]
    pub(crate) fn port_in(&self, port: u16, size_bytes: u8) -> Option<u32> {
        match port {
            0x20 | 0x21 | 0xA0 | 0xA1 | 0x4D0 | 0x4D1 | 0x40..=0x43 | 0x61 if self.has_pic() => {}
            _ => return None,
        }
        let now = timer::now_ns();
        let mut chips = self.controllers.chips.lock();
        match (port, &mut *chips) {
            (0x40..=0x43, Chips { pit: Some(pit), .. }) => Some(pit.read(port, now).into()),
            (0x61, Chips { pit: Some(pit), .. }) if self.speaker.load(Acquire) => Some(pit.read_speaker(now).into()),
            (0x40..=0x43 | 0x61, _) => None,
            (_, Chips { irqchip: Some(irqchip), .. }) => {
                let (value, work) = irqchip.pic.read(port, size_bytes);
                let later = pic_work(&mut chips, work);
                drop(chips);
                self.finish_pic(work, &later);
                Some(value)
            }
            _ => None,
        }
    }

    /// OUT to a device in the kernel. `false`: userspace has the port.
    #[inline]
    pub(crate) fn port_out(&self, port: u16, size_bytes: u8, value: u32) -> bool {
        match port {
            0x20 | 0x21 | 0xA0 | 0xA1 | 0x4D0 | 0x4D1 | 0x40..=0x43 | 0x61 if self.has_pic() => {}
            _ => {
                let (port, len) = (port.into(), size_bytes.into());
                return self.ioevent(true, port, len, value.into())
                    || self.coalesced.post(true, port, len, value.into());
            }
        }
        let now = timer::now_ns();
        let mut chips = self.controllers.chips.lock();
        match (port, &mut *chips) {
            (0x40..=0x43, Chips { pit: Some(pit), .. }) => {
                let changed = pit.write(port, value as u8, now);
                let deadline = pit.deadline_ns();
                drop(chips);
                if changed {
                    self.arm_pit(deadline);
                }
                true
            }
            (0x61, Chips { pit: Some(pit), .. }) if self.speaker.load(Acquire) => {
                pit.write_speaker(value as u8, now);
                true
            }
            (0x40..=0x43 | 0x61, _) => false,
            (_, Chips { irqchip: Some(irqchip), .. }) => {
                let work = irqchip.pic.write(port, size_bytes, value);
                let later = pic_work(&mut chips, work);
                drop(chips);
                self.finish_pic(work, &later);
                true
            }
            _ => false,
        }
    }

    fn finish_pic(&self, work: PicWork, later: &Later) {
        if work.raised {
            self.controllers.notify_pic();
        }
        self.controllers.finish(later);
    }

    fn arm_pit(&self, deadline: Option<u64>) {
        if let (Some(deadline), Some(timer)) = (deadline, self.pit_timer.as_ref()) {
            timer.arm(deadline);
        }
    }

    /// A read from the I/O APIC. `None`: userspace has the address.
    pub(crate) fn mmio_read(&self, gpa: Gpa, len: u8) -> Option<u64> {
        if !self.exists() {
            return None;
        }
        let chips = self.controllers.chips.lock();
        let ioapic = &chips.irqchip.as_ref()?.ioapic;
        let offset = gpa.0.wrapping_sub(ioapic.base().0);
        (offset < WINDOW_BYTES).then(|| ioapic.read(offset as u32, len))
    }

    /// A write to the I/O APIC or an ioeventfd. `false`: userspace has the address.
    pub(crate) fn mmio_write(&self, gpa: Gpa, len: u8, value: u64) -> bool {
        if self.ioevent(false, gpa.0, len.into(), value) || self.coalesced.post(false, gpa.0, len.into(), value) {
            return true;
        }
        if !self.exists() {
            return false;
        }
        let mut resample = None;
        {
            let mut chips = self.controllers.chips.lock();
            let Some(irqchip) = &mut chips.irqchip else { return false };
            let offset = gpa.0.wrapping_sub(irqchip.ioapic.base().0);
            if offset >= WINDOW_BYTES {
                return false;
            }
            let work = irqchip.ioapic.write(offset as u32, len, value);
            if work.entry_changed {
                self.controllers.announce(&mut chips);
            }
            if let (Some((pin, message)), Some(irqchip)) = (work.message, &mut chips.irqchip) {
                self.controllers.send_pin(&mut irqchip.ioapic, pin, &message);
            }
            let pins = chips.pit_pins.ioapic;
            if let (Some((pin, false)), Some(pit)) = (work.mask_changed, &mut chips.pit) {
                if pins & 1 << (pin & 31) != 0 {
                    pit.irq_unmasked();
                }
            }
            if let Some(pin) = work.resample {
                resample = Some(1 << (pin & 31));
            }
        }
        if let Some(pins) = resample {
            self.controllers.finish(&Later { ioapic_acknowledged: pins, ..Later::default() });
        }
        true
    }

    /// KVM_CREATE_IRQCHIP. The caller has seen that there is no vCPU yet.
    pub(crate) fn create(&self) -> Result {
        if self.exists() {
            return Err(EEXIST);
        }
        let mut routes = KVVec::new();
        routes.extend_from_slice(&DEFAULT_ROUTES, GFP_KERNEL_ACCOUNT)?;
        self.set_routes(routes)?;
        let irqchip = KBox::new(Irqchip::default(), GFP_KERNEL_ACCOUNT)?;
        let storm_timer = KBox::pin_init(Timer::new(StormTimer(self.controllers.clone())), GFP_KERNEL_ACCOUNT)?;
        self.storm_timer.populate(storm_timer);
        self.controllers.chips.lock().irqchip = Some(irqchip);
        self.controllers.mode.fetch_or(mode::CREATED, Release);
        Ok(())
    }

    /// KVM_CREATE_PIT2.
    pub(crate) fn create_pit(&self, config: &KvmPitConfig) -> Result {
        const SPEAKER_DUMMY: u32 = 1;
        if config.flags & !SPEAKER_DUMMY != 0 {
            return Err(EINVAL);
        }
        self.has_pic().then_some(()).ok_or(ENOENT)?;
        let pit = KBox::new(Pit::new(), GFP_KERNEL_ACCOUNT)?;
        let timer = KBox::pin_init(Timer::new(PitTimer(self.controllers.clone())), GFP_KERNEL_ACCOUNT)?;
        let mut chips = self.controllers.chips.lock();
        if chips.pit.is_some() {
            drop(chips);
            return Err(EEXIST);
        }
        chips.pit = Some(pit);
        self.controllers.announce(&mut chips);
        drop(chips);
        self.speaker.store(config.flags & SPEAKER_DUMMY != 0, Release);
        self.pit_timer.populate(timer);
        Ok(())
    }

    /// KVM_GET_PIT2.
    pub(crate) fn pit(&self) -> Result<KvmPitState2> {
        self.controllers.chips.lock().pit.as_ref().map(|pit| pit.save()).ok_or(ENXIO)
    }

    /// KVM_SET_PIT2.
    pub(crate) fn set_pit(&self, state: &KvmPitState2) -> Result {
        let mut chips = self.controllers.chips.lock();
        let pit = chips.pit.as_mut().ok_or(ENXIO)?;
        pit.restore(state, timer::now_ns());
        let deadline = pit.deadline_ns();
        drop(chips);
        self.arm_pit(deadline);
        Ok(())
    }

    /// KVM_REINJECT_CONTROL: whether ticks that come too early for the guest wait for it.
    pub(crate) fn set_pit_reinjection(&self, reinject: bool) -> Result {
        self.controllers.chips.lock().pit.as_mut().ok_or(ENXIO)?.set_reinject(reinject);
        Ok(())
    }

    /// KVM_GET_IRQCHIP: fills `chip` for its `chip_id`.
    pub(crate) fn get_irqchip(&self, irqchip: &mut KvmIrqchip) -> Result {
        let chips = self.controllers.chips.lock();
        let models = chips.irqchip.as_ref().ok_or(ENXIO)?;
        match irqchip.chip_id {
            id @ 0..=1 => models.pic.save(id as usize).write_to_prefix(&mut irqchip.chip).map_err(|_| EINVAL),
            2 => models.ioapic.save().write_to_prefix(&mut irqchip.chip).map_err(|_| EINVAL),
            _ => Err(EINVAL),
        }
    }

    /// KVM_SET_IRQCHIP.
    pub(crate) fn set_irqchip(&self, irqchip: &KvmIrqchip) -> Result {
        let mut chips = self.controllers.chips.lock();
        let models = chips.irqchip.as_mut().ok_or(ENXIO)?;
        match irqchip.chip_id {
            id @ 0..=1 => {
                let (state, _) = KvmPicState::read_from_prefix(&irqchip.chip).map_err(|_| EINVAL)?;
                let rose = models.pic.restore(id as usize, &state);
                drop(chips);
                if rose {
                    self.controllers.notify_pic();
                }
            }
            2 => {
                let (state, _) = KvmIoapicState::read_from_prefix(&irqchip.chip).map_err(|_| EINVAL)?;
                let pins = models.ioapic.restore(&state);
                self.controllers.announce(&mut chips);
                if let Some(models) = &mut chips.irqchip {
                    self.controllers.service_pins(&mut models.ioapic, pins);
                }
            }
            _ => return Err(EINVAL),
        }
        Ok(())
    }

    /// KVM_IRQ_LINE and KVM_IRQ_LINE_STATUS: how it was delivered.
    pub(crate) fn irq_line(&self, gsi: u32, level: bool) -> Result<i32> {
        self.need(ENXIO)?;
        Ok(self.controllers.set_gsi(gsi, LineSource::User, if level { Drive::High } else { Drive::Low }))
    }

    /// KVM_SIGNAL_MSI: how many vCPUs took it, negative for none.
    pub(crate) fn signal_msi(&self, msi: &KvmMsi) -> Result<isize> {
        self.need(EINVAL)?;
        if msi.flags != 0 {
            return Err(EINVAL);
        }
        let msi = Msi { address_lo: msi.address_lo, address_hi: msi.address_hi, data: msi.data };
        let wide_ids = self.rules().wide_ids;
        msi.check(wide_ids).map_err(|_| EINVAL)?;
        match self.controllers.deliver(&msi.message(wide_ids)) {
            None => Err(EPERM),
            Some(count) => Ok(count as isize),
        }
    }

    /// The argument of KVM_SET_GSI_ROUTING, at `at`.
    pub(crate) fn read_gsi_routing(&self, at: Hva) -> Result<KVVec<Route>> {
        let head: KvmIrqRouting = user::read(at)?;
        self.need(EINVAL)?;
        if head.nr as usize > MAX_ROUTES || head.flags != 0 {
            return Err(EINVAL);
        }
        let at = at.wrapping_add(size_of::<KvmIrqRouting>() as u64);
        let raw: KVVec<KvmIrqRoutingEntry> = user::read_vec(at, head.nr as usize, MAX_ROUTES)?;
        let mut routes = KVVec::with_capacity(raw.len(), GFP_KERNEL_ACCOUNT)?;
        let rules = self.rules();
        for raw in raw.iter() {
            routes.push(Route::from_raw(raw, rules).map_err(|_| EINVAL)?, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(routes)
    }

    /// KVM_SET_GSI_ROUTING. The caller keeps others from setting routes at the same time.
    pub(crate) fn set_routes(&self, mut routes: KVVec<Route>) -> Result {
        let mut starts = KVVec::new();
        starts.resize(routing::starts_len(&routes), 0u16, GFP_KERNEL_ACCOUNT)?;
        routing::build(&mut routes, &mut starts).map_err(|_| EINVAL)?;
        let mode = self.controllers.mode.load(Acquire);
        let user_levels = routing::level_vectors(&routes, mode >> mode::RESERVED_PINS_SHIFT, self.rules().wide_ids);
        let pit_pins = routing::pins(&routes, &starts, PIT_GSI);
        let _irqfds = self.irqfds.lock();
        self.controllers.routes.replace(Routes { routes, starts, user_levels })?;
        let mut chips = self.controllers.chips.lock();
        chips.pit_pins = pit_pins;
        self.controllers.announce(&mut chips);
        drop(chips);
        if self.controllers.has(mode::SPLIT) {
            self.controllers.announce_all();
        }
        self.tell_resampling();
        Ok(())
    }
}
