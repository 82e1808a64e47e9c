// SPDX-License-Identifier: GPL-2.0
//! Virtual CPUs: what others see of one, what its own thread works on, and its file descriptor.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use kernel::{
    prelude::*,
    sync::{Arc, ArcBorrow, SetOnce},
};

use crate::{
    abi::{
        ioctl::KVM_RUN,
        stats::VmStat,
        vcpu::{
            KvmCpuidEntry2, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
            KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED,
        },
        vm::{KVM_DIRTY_LOG_PAGE_OFFSET, KVM_X86_QUIRK_STUFF_FEATURE_MSRS},
    },
    apic::CpuDelivery,
    arch::{
        cr::rflags,
        segment::{Segment, SegmentName},
    },
    clock::VcpuClock,
    deadline::Deadlines,
    debug::GuestDebug,
    dev::MAX_VCPUS,
    dirty_ring::DirtyRing,
    emul::Emulator,
    emulation::Found,
    glue::{
        code::CodeCache,
        fd::FileOperations,
        fpu::GuestFpu,
        kick::KickPoint,
        lock::KillableMutex,
        page::{SharedPage, UserPage},
        phys::PhysBox,
        task,
    },
    guest::{queue::EventQueue, Regs},
    guest_tsc::VcpuTsc,
    irqchip::{
        dest::{for_each_target, CardCell, Cards, Origin},
        lapic::{regs::BASE_BSP, Inbox, Lapic, LapicWork, LocalSignal, Posted, PostedInterrupts, Reset},
        Message,
    },
    msrs::MsrFilter,
    new_killable_mutex,
    pmu::VcpuPmu,
    policy::{caps::GuestCaps, cpuid_table::CpuidTable, msr::MsrState},
    pv_eoi::PvEoi,
    stats::{VcpuStats, VmStats},
    to_user::LocalApicUser,
    vendor::{Vendor, VendorVcpu},
    vm::Vm,
};

/// Requests to a vCPU, in its [`KickPoint`].
pub(crate) mod request {
    /// Forget all translations before the next entry.
    pub(crate) const FLUSH_TLB: u64 = 1 << 0;
    /// Update the guest's paravirtual clock.
    pub(crate) const CLOCK: u64 = 1 << 1;
    /// Something waits for process context, or for userspace.
    pub(crate) const TO_USER: u64 = 1 << 2;
    /// The VM has another MSR filter.
    pub(crate) const MSR_FILTER: u64 = 1 << 3;
    /// Another CPU of the guest wakes this one, without an interrupt.
    pub(crate) const UNHALT: u64 = 1 << 4;
    /// Hardware is to note written pages, or not any more: [`Peers::logs_writes`](super::Peers::logs_writes).
    pub(crate) const LOG_WRITES: u64 = 1 << 6;
    /// Other vectors have an end that somebody wants to know, where the CPU ends interrupts.
    pub(crate) const EOI_LISTENERS: u64 = 1 << 5;
    /// The VM has another filter of events that may be counted.
    pub(crate) const EVENT_FILTER: u64 = 1 << 7;
}

/// What other threads see of a vCPU.
pub(crate) struct Peer {
    /// The id that userspace gave it, and its APIC ID.
    pub(crate) id: u32,
    pub(crate) inbox: Inbox,
    /// Where the CPU that runs it takes interrupts by itself.
    posted: Option<PhysBox<PostedInterrupts>>,
    pub(crate) kick: KickPoint,
    pub(crate) stats: VcpuStats,
    /// Pages that it wrote, where userspace wants rings.
    pub(crate) ring: Option<DirtyRing>,
    /// The thread that is in KVM_RUN.
    runner: AtomicUsize,
}

/// All vCPUs of a VM, in the order they were made. They stay until the VM goes.
pub(crate) struct Peers {
    peers: KVVec<SetOnce<Arc<Peer>>>,
    cards: KVVec<CardCell>,
    count: AtomicUsize,
    pub(crate) stats: VmStats,
    /// Entries of each vCPU's dirty ring; 0: dirty bitmaps.
    ring_entries: AtomicU32,
    /// Some slot has a dirty log that hardware fills.
    logs_writes: AtomicBool,
}

impl Peers {
    pub(crate) fn new() -> Result<Arc<Self>> {
        let mut peers = KVVec::with_capacity(MAX_VCPUS as usize, GFP_KERNEL_ACCOUNT)?;
        let mut cards = KVVec::with_capacity(MAX_VCPUS as usize, GFP_KERNEL_ACCOUNT)?;
        for _ in 0..MAX_VCPUS {
            peers.push(SetOnce::new(), GFP_KERNEL_ACCOUNT)?;
            cards.push(CardCell::new(), GFP_KERNEL_ACCOUNT)?;
        }
        Ok(Arc::new(
            Self {
                peers,
                cards,
                count: AtomicUsize::new(0),
                stats: VmStats::new(),
                ring_entries: AtomicU32::new(0),
                logs_writes: AtomicBool::new(false),
            },
            GFP_KERNEL_ACCOUNT,
        )?)
    }

    /// The index that a new vCPU will have. The caller keeps others from adding one until it is [added](Self::add). `EEXIST` when the
    /// id is taken, `EINVAL` when there are [`MAX_VCPUS`].
    fn place_for(&self, id: u32) -> Result<usize> {
        if self.iter().any(|other| other.id == id) {
            return Err(EEXIST);
        }
        let index = self.count.load(Ordering::Relaxed);
        if index < self.peers.len() {
            Ok(index)
        } else {
            Err(EINVAL)
        }
    }

    /// Adds a vCPU, which others find from now on.
    pub(crate) fn add(&self, peer: Arc<Peer>) {
        let index = self.count.load(Ordering::Relaxed);
        if let Some(place) = self.peers.get(index) {
            place.populate(peer);
            self.count.store(index + 1, Ordering::Release);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    pub(crate) fn get(&self, index: usize) -> Option<&Arc<Peer>> {
        self.peers.get(index)?.as_ref()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Peer>> + Clone {
        self.peers.iter().take(self.len()).filter_map(|peer| peer.as_ref())
    }

    pub(crate) fn card(&self, index: usize) -> Option<&CardCell> {
        self.cards.get(index)
    }

    pub(crate) fn ring_entries(&self) -> u32 {
        self.ring_entries.load(Ordering::Relaxed)
    }

    /// Wants dirty rings. The caller keeps others from adding vCPUs at the same time.
    pub(crate) fn set_ring_entries(&self, entries: u32) {
        self.ring_entries.store(entries, Ordering::Relaxed);
    }

    pub(crate) fn logs_writes(&self) -> bool {
        self.logs_writes.load(Ordering::Relaxed)
    }

    /// Hardware is to note the pages that guests write, or not any more. On return none writes that does not know.
    pub(crate) fn log_writes(&self, on: bool) {
        // A full barrier: a vCPU that is missing among the peers looks at this before it runs.
        if self.logs_writes.swap(on, Ordering::SeqCst) != on {
            KickPoint::post_and_wait(self.iter().map(|peer| &peer.kick), request::LOG_WRITES);
        }
    }

    /// Waits until every page that a guest has written so far, and hardware has noted, is in its log.
    pub(crate) fn collect_written(&self) {
        KickPoint::post_and_wait(self.iter().map(|peer| &peer.kick), 0);
    }

    /// A page was written: into the ring of the vCPU that this thread runs. What others write goes where there is most room.
    #[cold]
    pub(crate) fn push_dirty(&self, slot: u32, page: u64) {
        let with_rings = || self.iter().filter(|peer| peer.ring.is_some());
        let used = |peer: &&Arc<Peer>| peer.ring.as_ref().map_or(u32::MAX, DirtyRing::used);
        let this = task::identity();
        let own = with_rings().find(|peer| peer.runner.load(Ordering::Relaxed) == this);
        let Some(peer) = own.or_else(|| with_rings().min_by_key(used)) else { return };
        let Some(ring) = &peer.ring else { return };
        if !ring.push(slot, page) {
            // Its vCPU leaves it this full only when userspace ignores KVM_EXIT_DIRTY_RING_FULL.
            with_rings().any(|other| other.ring.as_ref().is_some_and(|ring| ring.push(slot, page)));
        }
        if ring.is_nearly_full() {
            peer.kick.post_quietly(request::TO_USER);
        }
    }

    /// Makes every vCPU forget its translations, and waits until none runs guest code with old ones.
    pub(crate) fn flush_tlbs(&self) {
        self.stats.count(VmStat::RemoteTlbFlushRequests);
        KickPoint::post_and_wait(self.iter().map(|peer| &peer.kick), request::FLUSH_TLB);
        self.stats.count(VmStat::RemoteTlbFlush);
    }

    /// Delivers an interrupt message. Returns how many vCPUs took it, or `None` when it was for nobody; vCPUs where it was pending
    /// already do not count.
    pub(crate) fn deliver(&self, message: &Message, origin: Origin) -> Option<usize> {
        let mut new = 0;
        let matched = for_each_target(self, message, origin, |index, card| {
            if !card.accepts(message.delivery) {
                return;
            }
            if let Some(peer) = self.get(index) {
                if peer.post(message) {
                    new = usize::wrapping_add(new, 1);
                }
            }
        });
        (matched > 0).then_some(new)
    }

    /// Delivers an interrupt message to the vCPU number `index`. Whether it took it and had none like it pending.
    pub(crate) fn deliver_to(&self, index: usize, message: &Message) -> bool {
        let accepts = self.cards.get(index).is_some_and(|card| card.card().accepts(message.delivery));
        match self.get(index) {
            Some(peer) => accepts && peer.post(message),
            None => false,
        }
    }
}

impl Cards for Peers {
    #[inline]
    fn count(&self) -> usize {
        self.len()
    }

    #[inline]
    fn card(&self, index: usize) -> crate::irqchip::dest::ApicCard {
        self.cards.get(index).map_or_else(Default::default, CardCell::card)
    }
}

/// What a vCPU is doing. SDM "MP Initialization"; KVM API "KVM_GET_MP_STATE".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MpState {
    Runnable,
    /// An application processor that nobody has sent an INIT yet.
    Uninitialized,
    /// Waits for a start-up IPI.
    InitReceived,
    Halted,
}

impl MpState {
    pub(crate) fn to_kvm(self) -> u32 {
        match self {
            Self::Runnable => KVM_MP_STATE_RUNNABLE,
            Self::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
            Self::InitReceived => KVM_MP_STATE_INIT_RECEIVED,
            Self::Halted => KVM_MP_STATE_HALTED,
        }
    }

    /// `EINVAL` for a state that does not exist here. Without a local APIC only "runnable" and "halted" do.
    pub(crate) fn from_kvm(state: u32, has_lapic: bool) -> Result<Self> {
        match state {
            KVM_MP_STATE_RUNNABLE => Ok(Self::Runnable),
            KVM_MP_STATE_HALTED => Ok(Self::Halted),
            KVM_MP_STATE_UNINITIALIZED if has_lapic => Ok(Self::Uninitialized),
            KVM_MP_STATE_INIT_RECEIVED if has_lapic => Ok(Self::InitReceived),
            KVM_MP_STATE_SIPI_RECEIVED if has_lapic => Ok(Self::InitReceived),
            _ => Err(EINVAL),
        }
    }
}

/// What userspace is doing for the guest between two KVM_RUNs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pending {
    Nothing,
    /// IN: the value goes to the accumulator.
    PortIn {
        size_bytes: u8,
    },
    /// INS: the data page goes to the emulator.
    EmulatedPortIn,
    /// The emulator waits for a device's answer.
    MmioRead,
    /// The emulator has more to do.
    Emulation,
    /// A hypercall at `rip`, whose result userspace gives; `mask`: bits that it has.
    Hypercall {
        rip: u64,
        next_rip: u64,
        mask: u64,
    },
    /// RDMSR or WRMSR at `rip`, which userspace carries out.
    Msr {
        read: bool,
        rip: u64,
        next_rip: u64,
    },
}

/// Everything of a vCPU but the extended state: what the run loop works on.
pub(crate) struct State<V: Vendor> {
    pub(crate) hw: V::Vcpu,
    pub(crate) regs: Regs,
    pub(crate) events: EventQueue,
    pub(crate) lapic: Option<KBox<Lapic>>,
    pub(crate) cpuid: KBox<CpuidTable<KVVec<KvmCpuidEntry2>>>,
    pub(crate) caps: GuestCaps,
    pub(crate) msrs: KBox<MsrState>,
    /// Performance counters, if the guest has any.
    pub(crate) pmu: Option<KBox<VcpuPmu>>,
    /// Accesses that userspace denies.
    pub(crate) msr_filter: Option<Arc<MsrFilter>>,
    /// The guest may use only those paravirtual features that its CPUID shows.
    pub(crate) enforce_pv: bool,
    /// Paravirtual features that the guest may use.
    pub(crate) pv_features: u32,
    pub(crate) mp_state: MpState,
    /// The next halt ends at once: the hypercall KICK_CPU came.
    pub(crate) unhalted: bool,
    /// From KVM_INTERRUPT, without a local APIC.
    pub(crate) user_interrupt: Option<u8>,
    /// The 8259A may have an interrupt for this CPU.
    pub(crate) pic_signal: bool,
    pub(crate) delivery: CpuDelivery,
    /// CR8 as hardware last had it.
    pub(crate) cr8: u8,
    /// Where the IRET of an NMI handler is: NMIs are masked until the guest is past it.
    pub(crate) nmi_return: Option<u64>,
    /// RFLAGS.TF is ours, to see the end of that IRET.
    pub(crate) stepping: bool,
    /// RFLAGS.TF is ours in this entry, to see the end of an interrupt shadow that an NMI waits for.
    pub(crate) shadow_step: bool,
    /// An interrupt window or CR8 writes were asked for.
    pub(crate) windows_open: bool,
    pub(crate) tsc: VcpuTsc,
    pub(crate) deadlines: Deadlines,
    /// Index among the peers.
    pub(crate) index: usize,
    pub(crate) clock: VcpuClock,
    pub(crate) debug: GuestDebug,
    pub(crate) code_cache: CodeCache,
    /// The last nested fault was an access to a device: the next one is expected to be, too.
    pub(crate) expects_device: bool,
    /// The bytes at RIP at the last exit, where they were at hand.
    pub(crate) code: Option<[u8; 16]>,
    /// IA32_APIC_BASE where userspace has the local APIC.
    pub(crate) user_apic_base: u64,
    pub(crate) apic_user: LocalApicUser,
    pub(crate) pv_eoi: PvEoi,
    /// The 8259A is in userspace: it says when there is an interrupt of it.
    pub(crate) user_pic: bool,
}

/// What the vCPU's thread works on.
pub(crate) struct Core<V: Vendor> {
    pub(crate) state: State<V>,
    pub(crate) fpu: GuestFpu,
    pub(crate) emulator: KBox<Emulator>,
    pub(crate) pending: Pending,
    /// What the instruction under emulation accesses.
    pub(crate) found: Option<Found>,
    /// KVM_RUN happened: CPUID cannot change any more.
    pub(crate) ran: bool,
    pub(crate) signal_mask: Option<u64>,
    /// From KVM_SET_VCPU_EVENTS, for a start-up IPI that KVM_SET_MP_STATE brings.
    pub(crate) sipi_vector: u8,
}

// Nothing in it points into itself, whatever the vendor.
impl<V: Vendor> Unpin for Core<V> {}

/// The file descriptor.
#[pin_data]
pub(crate) struct Vcpu<V: Vendor> {
    pub(crate) vm: Arc<Vm<V>>,
    pub(crate) peer: Arc<Peer>,
    /// `struct kvm_run`.
    pub(crate) run: SharedPage,
    /// Data of port accesses.
    pub(crate) data: SharedPage,
    #[pin]
    pub(crate) core: KillableMutex<Core<V>>,
}

impl<V: Vendor> Vcpu<V> {
    #[inline]
    pub(crate) fn has_mail(&self) -> bool {
        self.peer.has_mail(V::Vcpu::DELIVERS)
    }

    /// A vCPU in its reset state. The caller keeps others from making one until it has added it to the VM's.
    pub(crate) fn new(vm: Arc<Vm<V>>, id: u32) -> Result<Arc<Self>> {
        let index = vm.peers.place_for(id)?;
        let peer = Arc::new(
            Peer {
                id,
                inbox: Inbox::new(),
                posted: if vm.host.owner.hardware().takes_posted() { Some(PhysBox::new()?) } else { None },
                kick: KickPoint::new(),
                stats: VcpuStats::new(),
                ring: match vm.peers.ring_entries() {
                    0 => None,
                    entries => Some(DirtyRing::new(entries, vm.host.owner.hardware().write_log_entries())?),
                },
                runner: AtomicUsize::new(0),
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        peer.kick.post_quietly(request::LOG_WRITES);
        let mut hw = vm.host.owner.hardware().new_vcpu(vm.enabled.unintercepted())?;
        hw.set_nested_root(vm.memory.root());
        let mut tsc = VcpuTsc::new(vm.enabled.tsc_khz(), vm.host.owner.hardware().tsc_format());
        tsc.start(&vm.clock);
        hw.set_tsc(tsc.relation());
        if let Some(page) = vm.memory.apic_page() {
            hw.set_apic_page(page);
        }
        if let Some(at) = vm.memory.place_identity_map()? {
            hw.set_identity_map(at);
        }
        if let Some(posted) = &peer.posted {
            hw.set_posted(posted.address());
        }
        peer.kick.post_quietly(request::EOI_LISTENERS);
        let cpuid = KBox::new(CpuidTable::new(KVVec::new()).map_err(|_| EINVAL)?, GFP_KERNEL_ACCOUNT)?;
        let caps = GuestCaps::derive(|_, _| [0; 4]).within(&vm.host.caps);
        let boots = id == vm.enabled.boot_cpu();
        let mut lapic = match vm.has_irqchip() {
            true => Some(KBox::new(Lapic::new(id, boots, Default::default()), GFP_KERNEL_ACCOUNT)?),
            false => None,
        };
        if let Some(lapic) = &mut lapic {
            lapic.set_bus_cycle(vm.enabled.bus_cycle_ns());
        }
        let mp_state = if lapic.is_some() && !boots { MpState::Uninitialized } else { MpState::Runnable };
        let stuffed = vm.enabled.has_quirk(KVM_X86_QUIRK_STUFF_FEATURE_MSRS);
        let msrs = KBox::new(MsrState::new(&vm.host.msr_config, stuffed), GFP_KERNEL_ACCOUNT)?;
        let msr_filter = vm.msr_filter.lock().clone();
        let emulator = KBox::new(Emulator::new(), GFP_KERNEL_ACCOUNT)?;
        let fpu = GuestFpu::new()?;
        let (run, data) = (SharedPage::new()?, SharedPage::new()?);
        let mut state = State::<V> {
            hw,
            regs: Regs::default(),
            events: EventQueue::default(),
            lapic,
            cpuid,
            caps,
            msrs,
            pmu: None,
            msr_filter,
            enforce_pv: false,
            pv_features: u32::MAX,
            mp_state,
            unhalted: false,
            user_interrupt: None,
            pic_signal: false,
            delivery: CpuDelivery::default(),
            cr8: 0,
            nmi_return: None,
            stepping: false,
            shadow_step: false,
            windows_open: false,
            tsc,
            deadlines: Deadlines::new(peer.clone())?,
            index,
            clock: VcpuClock::new(peer.clone()),
            debug: GuestDebug::default(),
            expects_device: false,
            code_cache: CodeCache::new(vm.memory.root(), vm.host.owner.hardware().nested_levels()),
            code: None,
            user_apic_base: 0xFEE0_0800 | if boots { 0x100 } else { 0 },
            apic_user: LocalApicUser::default(),
            pv_eoi: PvEoi::default(),
            user_pic: !vm.irq.has_pic(),
        };
        state.regs = RESET_REGS;
        state.hw.want_all_msrs(state.msr_filter.is_some());
        if let (Some(lapic), Some(card)) = (&state.lapic, vm.peers.card(index)) {
            card.publish(lapic.card());
        }
        let core = Core {
            state,
            fpu,
            emulator,
            pending: Pending::Nothing,
            found: None,
            ran: false,
            signal_mask: None,
            sipi_vector: 0,
        };
        Ok(Arc::pin_init(
            try_pin_init!(Self { vm, peer, run, data, core <- new_killable_mutex!(core, "krab::vcpu") }),
            GFP_KERNEL_ACCOUNT,
        )?
        .into())
    }
}

/// RIP and RFLAGS after RESET and INIT; RDX is the CPU's signature, which userspace sets if it matters.
const RESET_REGS: Regs = Regs { gpr: [0; 16], rip: 0xFFF0, rflags: rflags::FIXED };

impl<V: Vendor> State<V> {
    /// Takes what others left in the inbox. The vCPU's state may change with it: INIT, SIPI.
    pub(crate) fn drain_inbox(&mut self, vm: &Vm<V>, peer: &Peer) {
        let Some(lapic) = &mut self.lapic else {
            peer.inbox.clear();
            return;
        };
        let signals = peer.inbox.drain(lapic);
        if let Some(posted) = peer.posted.as_ref().filter(|posted| posted.is_outstanding()) {
            peer.inbox.drain_posted(posted, lapic);
        }
        if signals.timer {
            self.host_timer_fired();
        }
        if signals.pic {
            self.pic_signal = vm.irq.pic_output();
        }
        if signals.nmi {
            self.events.raise_nmi();
        }
        if signals.init {
            self.init(vm);
        }
        if let (Some(vector), MpState::InitReceived) = (signals.sipi, self.mp_state) {
            self.start(vector);
        }
    }

    /// Registers as after INIT, and no events.
    pub(crate) fn reset_cpu(&mut self) {
        self.hw.reset(true);
        self.regs = RESET_REGS;
        self.events = EventQueue::default();
        self.nmi_return = None;
        self.stepping = false;
        self.shadow_step = false;
    }

    /// INIT: the boot CPU starts at the reset vector, the others wait for a start-up IPI.
    fn init(&mut self, vm: &Vm<V>) {
        self.reset_cpu();
        self.pic_signal = false;
        self.msrs.init();
        self.clock.reset();
        self.pv_eoi.set_word(None);
        self.forget_handed_over();
        let Some(lapic) = &mut self.lapic else { return };
        let work = lapic.reset(Reset::Init);
        let boot = lapic.base() & BASE_BSP != 0;
        self.lapic_work(vm, work);
        self.mp_state = if boot { MpState::Runnable } else { MpState::InitReceived };
    }

    /// Start-up IPI: real mode at `vector` * 4096.
    fn start(&mut self, vector: u8) {
        let code = Segment {
            base: u64::from(vector) << 12,
            selector: u16::from(vector) << 8,
            ..self.hw.segment(SegmentName::Cs as usize)
        };
        self.hw.set_segment(SegmentName::Cs as usize, &code);
        self.regs.rip = 0;
        self.mp_state = MpState::Runnable;
    }

    /// Carries out what an access to the local APIC asked for.
    pub(crate) fn lapic_work(&mut self, vm: &Vm<V>, work: LapicWork) {
        if work.card_changed {
            if let (Some(lapic), Some(cell)) = (&self.lapic, vm.peers.card(self.index)) {
                cell.publish(lapic.card());
            }
            // The 8259A may have risen while this CPU did not listen.
            self.pic_signal = vm.irq.pic_output();
        }
        if let Some(message) = work.ipi {
            vm.peers.deliver(&message, Origin::Cpu(self.index));
        }
        if let Some(eoi) = work.eoi {
            if vm.irq.eoi(eoi) {
                self.interrupt_ended(vm, eoi.vector);
            }
        }
        if work.timer_changed {
            self.arm_timer();
        }
        match work.signal {
            Some(LocalSignal::Nmi) => self.events.raise_nmi(),
            Some(LocalSignal::ExtInt) => self.pic_signal = vm.irq.pic_output(),
            _ => {}
        }
    }
}

impl Peer {
    /// Gives it an interrupt message. Whether it had none like it pending.
    fn post(&self, message: &Message) -> bool {
        if let (Some(posted), true) =
            (&self.posted, message.is_edge_vector() && self.inbox.takes_posted(message.vector))
        {
            let Some(tell) = posted.post(message.vector) else { return false };
            if tell {
                self.kick.notify();
            }
            return true;
        }
        let new = self.inbox.post(message) == Posted::New;
        if new {
            self.kick.kick();
        }
        new
    }

    /// Whether there is something for [`State::drain_inbox`]. `cpu_takes`: there may be posted interrupts.
    #[inline]
    pub(crate) fn has_mail(&self, cpu_takes: bool) -> bool {
        !self.inbox.is_empty() || cpu_takes && self.posted.as_ref().is_some_and(|posted| posted.is_outstanding())
    }

    /// Remembers which thread is in KVM_RUN, until the value it returns is dropped.
    pub(crate) fn run_here(&self) -> Running<'_> {
        self.runner.store(task::identity(), Ordering::Relaxed);
        Running(self)
    }
}

/// A thread in KVM_RUN.
pub(crate) struct Running<'a>(&'a Peer);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.runner.store(0, Ordering::Relaxed);
    }
}

impl<V: Vendor> FileOperations for Vcpu<V> {
    const NAME: &'static CStr = c"krab-vcpu";
    const MAPPABLE: bool = true;

    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: usize) -> Result<isize> {
        if !this.vm.memory.is_current() {
            return Err(EIO);
        }
        match cmd {
            KVM_RUN if arg != 0 => Err(EINVAL),
            KVM_RUN => this.run(),
            _ => this.state_ioctl(cmd, arg),
        }
    }

    /// A ring is shared or not at all.
    fn may_map(this: ArcBorrow<'_, Self>, first: u64, shared: bool) -> bool {
        shared || first < KVM_DIRTY_LOG_PAGE_OFFSET || this.peer.ring.is_none()
    }

    fn page(this: ArcBorrow<'_, Self>, index: u64) -> Option<UserPage> {
        match index {
            0 => Some(this.run.user_page()),
            1 => Some(this.data.user_page()),
            2 => Some(this.vm.irq.coalesced.user_page()),
            index if index >= KVM_DIRTY_LOG_PAGE_OFFSET => {
                this.peer.ring.as_ref()?.page(index - KVM_DIRTY_LOG_PAGE_OFFSET)
            }
            _ => None,
        }
    }
}
