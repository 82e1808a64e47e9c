// SPDX-License-Identifier: GPL-2.0
//! A virtual machine: its memory, its virtual CPUs, its interrupt controllers, and the ioctls on its file descriptor.
//!
//! Lock order, outermost first: a VM's `setup`, a vCPU's `core`, the slots' update lock, `irqfds`, `chips`, the nested table. None is
//! held while a guest runs but the vCPU's own `core`.
#![forbid(unsafe_code)]

use kernel::{
    new_mutex,
    prelude::*,
    sync::{Arc, ArcBorrow, Mutex, SetOnce},
};

use crate::{
    abi::{
        cap::KVM_CAP_X86_APIC_BUS_CYCLES_NS,
        ioctl::*,
        irq::{
            KvmIoeventfd, KvmIrqLevel, KvmIrqchip, KvmIrqfd, KvmMsi, KvmPitConfig, KvmPitState2, KvmReinjectControl,
        },
        vm::{
            KvmClearDirtyLog, KvmClockData, KvmCoalescedMmioZone, KvmDirtyLog, KvmEnableCap, KvmMsrFilter,
            KvmUserspaceMemoryRegion, KvmUserspaceMemoryRegion2, KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME,
            KVM_CLOCK_TSC_STABLE,
        },
        FromZeros,
    },
    arch::Hva,
    clock::VmClock,
    dev::{Host, InUse, MAX_VCPUS},
    enable_cap::Enabled,
    glue::{
        debugfs::Folder,
        fd::{self, FileOperations},
        timer, user,
    },
    irq::Irq,
    memory::{Memory, NestedLimits},
    msrs::MsrFilter,
    pmu::EventFilter,
    stats::StatsFile,
    vcpu::{request, Peers, Vcpu},
    vendor::{Vendor, VendorVcpu},
};

/// One virtual machine. Lives as long as its file descriptor or any of its vCPUs'.
#[pin_data]
pub(crate) struct Vm<V: Vendor> {
    #[pin]
    pub(crate) memory: Memory<V::NestedFormat>,
    #[pin]
    pub(crate) irq: Irq,
    /// Held while something is made that others must not make at the same time.
    #[pin]
    pub(crate) setup: Mutex<()>,
    pub(crate) peers: Arc<Peers>,
    #[pin]
    pub(crate) clock: VmClock,
    pub(crate) enabled: Enabled,
    /// Its place in debugfs.
    folder: SetOnce<Folder<Peers>>,
    /// What KVM_X86_SET_MSR_FILTER set. A vCPU has its own reference; [`request::MSR_FILTER`] makes it take this one.
    #[pin]
    pub(crate) msr_filter: Mutex<Option<Arc<MsrFilter>>>,
    /// What KVM_SET_PMU_EVENT_FILTER set; [`request::EVENT_FILTER`] as above.
    #[pin]
    pub(crate) event_filter: Mutex<Option<Arc<EventFilter>>>,
    /// Last: the extension is needed until everything else is gone.
    pub(crate) host: InUse<V>,
}

impl<V: Vendor> Vm<V> {
    /// A VM without memory and vCPUs. `EBUSY` when another hypervisor holds the CPUs' virtualization extension.
    pub(crate) fn new(host: Arc<Host<V>>) -> Result<Arc<Self>> {
        let host = InUse::new(host)?;
        let peers = Peers::new()?;
        let limits = NestedLimits::of(&**host.owner.hardware());
        let vm = Arc::pin_init(
            try_pin_init!(Self {
                memory <- Memory::new(peers.clone(), limits),
                irq <- Irq::new(peers.clone()),
                setup <- new_mutex!(()),
                peers,
                clock <- VmClock::new(),
                enabled: Enabled::new(),
                folder: SetOnce::new(),
                msr_filter <- new_mutex!(None),
                event_filter <- new_mutex!(None),
                host,
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        if V::Vcpu::DELIVERS {
            vm.irq.cpu_ends_interrupts();
        }
        Ok(vm)
    }

    /// Shows the VM in debugfs under the descriptor it got.
    pub(crate) fn show(&self, fd: i32) {
        self.folder.populate(Folder::new(fd, self.peers.clone()));
    }

    /// Whether local APICs are in the kernel.
    pub(crate) fn has_irqchip(&self) -> bool {
        self.irq.exists()
    }

    fn clock_data(&self) -> KvmClockData {
        let now = timer::instant();
        KvmClockData {
            clock: self.clock.at(now.tsc.unwrap_or_else(timer::tsc)),
            flags: KVM_CLOCK_REALTIME
                | if timer::tsc_is_stable() { KVM_CLOCK_TSC_STABLE } else { 0 }
                | if now.tsc.is_some() { KVM_CLOCK_HOST_TSC } else { 0 },
            realtime: now.real_ns,
            host_tsc: now.tsc.unwrap_or(0),
            ..KvmClockData::new_zeroed()
        }
    }

    fn set_clock(&self, data: &KvmClockData) -> Result {
        if data.flags & !(KVM_CLOCK_REALTIME | KVM_CLOCK_TSC_STABLE | KVM_CLOCK_HOST_TSC) != 0 {
            return Err(EINVAL);
        }
        let mut clock = data.clock;
        if data.flags & KVM_CLOCK_REALTIME != 0 {
            // What passed since the clock was read goes on top.
            clock = clock.wrapping_add(timer::real_ns().saturating_sub(data.realtime));
        }
        self.clock.set(clock);
        for peer in self.peers.iter() {
            peer.kick.post(request::CLOCK);
        }
        Ok(())
    }
}

impl<V: Vendor> FileOperations for Vm<V> {
    const NAME: &'static CStr = c"krab-vm";

    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: usize) -> Result<isize> {
        if !this.memory.is_current() {
            return Err(EIO);
        }
        let at = Hva(arg as u64);
        match cmd {
            KVM_CHECK_EXTENSION if arg == KVM_CAP_X86_APIC_BUS_CYCLES_NS as usize => {
                Ok(this.enabled.bus_cycle_ns() as isize)
            }
            KVM_CHECK_EXTENSION => Ok(this.host.check_extension(arg)),
            KVM_CREATE_VCPU => {
                let id = u32::try_from(arg).ok().filter(|&id| id < MAX_VCPUS).ok_or(EINVAL)?;
                let _setup = this.setup.lock();
                if !this.enabled.takes_id(arg) {
                    return Err(EINVAL);
                }
                let vcpu = Vcpu::new(this.into(), id)?;
                let peer = vcpu.peer.clone();
                // Nothing fails once the vCPU is there: what is refused leaves its id free.
                let file = fd::anon_file(vcpu)?;
                this.peers.add(peer);
                Ok(file.install() as isize)
            }
            KVM_SET_USER_MEMORY_REGION => {
                this.memory.set_region(&user::read::<KvmUserspaceMemoryRegion>(at)?)?;
                Ok(0)
            }
            // There is no guest_memfd: its flag is EINVAL, and so the rest of the structure means nothing.
            KVM_SET_USER_MEMORY_REGION2 => {
                this.memory.set_region(&user::read::<KvmUserspaceMemoryRegion2>(at)?.into())?;
                Ok(0)
            }
            KVM_ENABLE_CAP => {
                this.enable_cap(&user::read::<KvmEnableCap>(at)?)?;
                Ok(0)
            }
            KVM_SET_BOOT_CPU_ID => {
                this.set_boot_cpu(arg)?;
                Ok(0)
            }
            KVM_X86_SET_MSR_FILTER => {
                this.set_msr_filter(&user::read::<KvmMsrFilter>(at)?)?;
                Ok(0)
            }
            KVM_SET_PMU_EVENT_FILTER => {
                this.set_event_filter(at)?;
                Ok(0)
            }
            KVM_RESET_DIRTY_RINGS => this.memory.reset_dirty_rings(),
            KVM_GET_STATS_FD => StatsFile::open(this.peers.clone(), None),
            // Tables are not limited: with nested paging KVM does not shrink them either.
            KVM_SET_NR_MMU_PAGES if arg < 64 => Err(EINVAL),
            KVM_SET_NR_MMU_PAGES => Ok(0),
            KVM_GET_DIRTY_LOG => {
                this.memory.get_dirty_log(&user::read::<KvmDirtyLog>(at)?)?;
                Ok(0)
            }
            KVM_CLEAR_DIRTY_LOG => {
                this.memory.clear_dirty_log(&user::read::<KvmClearDirtyLog>(at)?)?;
                Ok(0)
            }
            // Nobody needs this memory: what KVM has there, real mode as virtual-8086 mode, is emulated.
            KVM_SET_TSS_ADDR if arg as u64 > u64::from(u32::MAX) - 3 * 4096 => Err(EINVAL),
            KVM_SET_TSS_ADDR => Ok(0),
            KVM_SET_IDENTITY_MAP_ADDR => {
                let map: u64 = user::read(at)?;
                let _setup = this.setup.lock();
                if this.peers.len() > 0 {
                    return Err(EINVAL);
                }
                this.memory.set_identity_map_addr(map);
                Ok(0)
            }
            KVM_CREATE_IRQCHIP => {
                let _setup = this.setup.lock();
                if this.has_irqchip() {
                    return Err(EEXIST);
                }
                if this.peers.len() > 0 {
                    return Err(EINVAL);
                }
                this.irq.create()?;
                Ok(0)
            }
            KVM_CREATE_PIT2 => {
                let config: KvmPitConfig = user::read(at)?;
                let _setup = this.setup.lock();
                this.irq.create_pit(&config)?;
                Ok(0)
            }
            KVM_GET_PIT2 => {
                user::write(at, &this.irq.pit()?)?;
                Ok(0)
            }
            KVM_SET_PIT2 => {
                this.irq.set_pit(&user::read::<KvmPitState2>(at)?)?;
                Ok(0)
            }
            KVM_GET_IRQCHIP => {
                let mut irqchip = KBox::new(user::read::<KvmIrqchip>(at)?, GFP_KERNEL_ACCOUNT)?;
                this.irq.get_irqchip(&mut irqchip)?;
                user::write(at, &*irqchip)?;
                Ok(0)
            }
            KVM_SET_IRQCHIP => {
                let irqchip = KBox::new(user::read::<KvmIrqchip>(at)?, GFP_KERNEL_ACCOUNT)?;
                this.irq.set_irqchip(&irqchip)?;
                Ok(0)
            }
            KVM_IRQ_LINE | KVM_IRQ_LINE_STATUS => {
                let mut line: KvmIrqLevel = user::read(at)?;
                let status = this.irq.irq_line(line.irq, line.level != 0)?;
                if cmd == KVM_IRQ_LINE_STATUS {
                    line.irq = status as u32;
                    user::write(at, &line)?;
                }
                Ok(0)
            }
            KVM_SET_GSI_ROUTING => {
                // Reading may take as long as userspace likes, so not under the lock.
                let routes = this.irq.read_gsi_routing(at)?;
                let _setup = this.setup.lock();
                this.irq.set_routes(routes)?;
                Ok(0)
            }
            KVM_SIGNAL_MSI => this.irq.signal_msi(&user::read::<KvmMsi>(at)?),
            KVM_REINJECT_CONTROL => {
                this.irq.set_pit_reinjection(user::read::<KvmReinjectControl>(at)?.pit_reinject != 0)?;
                Ok(0)
            }
            KVM_REGISTER_COALESCED_MMIO | KVM_UNREGISTER_COALESCED_MMIO => {
                let zone: KvmCoalescedMmioZone = user::read(at)?;
                let _setup = this.setup.lock();
                match cmd {
                    KVM_REGISTER_COALESCED_MMIO => this.irq.coalesced.register(&zone)?,
                    _ => this.irq.coalesced.unregister(&zone)?,
                }
                Ok(0)
            }
            KVM_IRQFD => {
                this.irq.irqfd(&user::read::<KvmIrqfd>(at)?)?;
                Ok(0)
            }
            KVM_IOEVENTFD => {
                let request: KvmIoeventfd = user::read(at)?;
                let _setup = this.setup.lock();
                this.irq.ioeventfd(&request)?;
                Ok(0)
            }
            KVM_GET_CLOCK => {
                user::write(at, &this.clock_data())?;
                Ok(0)
            }
            KVM_SET_CLOCK => {
                this.set_clock(&user::read::<KvmClockData>(at)?)?;
                Ok(0)
            }
            KVM_GET_TSC_KHZ => Ok(match this.enabled.tsc_khz() {
                0 => timer::tsc_khz(),
                khz => khz,
            } as isize),
            KVM_SET_TSC_KHZ => {
                this.set_tsc_khz(arg as u32)?;
                Ok(0)
            }
            _ => Err(ENOTTY),
        }
    }
}
