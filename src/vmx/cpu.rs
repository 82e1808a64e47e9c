// SPDX-License-Identifier: GPL-2.0
//! VMX on this host: whether it may be used, and what each CPU keeps for it.
#![forbid(unsafe_code)]

use core::{
    cell::Cell,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use kernel::{prelude::*, sync::Arc};

use super::insn::{self, Operation};
use crate::{
    arch::{
        cpuid::leaf7_ecx,
        msr,
        vmcs::control::{entry, exit},
    },
    glue::{
        cpu::{self, HostFeatures, IrqsOff, LastVcpu, VcpuId},
        error,
        percpu::PerCpu,
        phys::{Bytes, PhysBox},
        virt::Hardware,
        vmx::{host_state, notification_vector, CacheFlush, HostState},
    },
    guest::Unintercepted,
    policy::vmx::{
        apicv::x2apic_access,
        msr_bitmap,
        negotiate::{enabled_by_firmware, negotiate},
        CapabilityMsrs, Config, Options,
    },
};

/// What one CPU keeps.
struct PerCpuState {
    operation: Operation,
    /// What exits load, read when this CPU is first used.
    host: Cell<Option<HostState>>,
    last_vcpu: LastVcpu,
}

/// Intel VMX on this host.
pub(crate) struct Vmx {
    per_cpu: PerCpu<PerCpuState>,
    pub(super) features: HostFeatures,
    /// Control words and what else of VMX is used.
    pub(super) config: Config,
    /// Bits of a linear address.
    pub(super) linear_bits: u32,
    /// Bits of a physical address.
    pub(super) physical_bits: u32,
    /// The host's performance counters stand still while a guest runs.
    pub(super) perf_global_ctrl: bool,
    pub(super) msr_bitmaps: MsrBitmaps,
    /// What tells a CPU of posted interrupts; exits acknowledge the host's interrupts then.
    pub(super) notification_vector: Option<u8>,
    cache_flush: CacheFlush,
    vpids: Vpids,
    /// Another hypervisor was seen. It knows nothing of our guests, nor we of its: each may believe that the last one to run on a CPU was its
    /// own.
    shared: AtomicBool,
}

impl Vmx {
    /// Whether this CPU has VMX, on or not.
    pub(crate) fn present() -> bool {
        cpu::cpuid(1, 0)[2] & 1 << 5 != 0
    }

    /// Looks at the host. Each refusal is one line in the log: `ENODEV` without VMX, `EPERM` when firmware disabled it, `EOPNOTSUPP`
    /// without what Krab needs of it.
    pub(crate) fn probe(options: Options) -> Result<Arc<Self>> {
        let features = cpu::host_features();
        if !Self::present() {
            pr_err!("this CPU has no VMX (or its hypervisor does not offer it): Krab needs Intel VMX with EPT\n");
            return Err(ENODEV);
        }
        // The kernel locks the register at boot and then hides the feature if it was locked without it.
        if !features.vmx || !firmware_allows() {
            pr_err!("VMX is disabled by firmware: turn it on in the firmware's setup (often called VT-x)\n");
            return Err(EPERM);
        }
        let [signature, ..] = cpu::cpuid(1, 0);
        let capabilities = CapabilityMsrs::read(signature, |number| cpu::read_msr_or_zero(number));
        if options.posted && features.fred {
            pr_info!("this host takes its interrupts by FRED: posted interrupts stay off\n");
        }
        let options = Options { fred: features.fred, ..options };
        let mut config = negotiate(&capabilities, options).map_err(|refusal| {
            pr_err!("this CPU's VMX does not do for Krab: {}\n", core::format_args!("{refusal}"));
            error::unsupported()
        })?;
        let perf_global_ctrl = config.features.perf_global_ctrl && cpu::read_msr(msr::PERF_GLOBAL_CTRL).is_ok();
        if perf_global_ctrl {
            config.controls.entry |= entry::LOAD_PERF_GLOBAL_CTRL;
            config.controls.exit |= exit::LOAD_PERF_GLOBAL_CTRL;
        }
        let notification_vector = notification_vector().filter(|_| config.features.posted_interrupts);
        if notification_vector.is_some() {
            config.controls.exit |= exit::ACKNOWLEDGE_INTERRUPT;
        }
        let cache_flush = CacheFlush::new(&features)?;
        let per_cpu = PerCpu::new(|| {
            Ok(PerCpuState {
                operation: Operation::new(config.revision)?,
                host: Cell::new(None),
                last_vcpu: LastVcpu::default(),
            })
        })?;
        let msr_bitmaps = MsrBitmaps::new()?;
        let vpids = Vpids::new()?;
        let physical_bits = cpu::cpuid(0x8000_0008, 0)[0] & 0xFF;
        let linear_bits = if cpu::cpuid(7, 0)[2] & leaf7_ecx::LA57 != 0 { 57 } else { 48 };
        Ok(Arc::new(
            Self {
                per_cpu,
                features,
                config,
                linear_bits,
                physical_bits,
                perf_global_ctrl,
                msr_bitmaps,
                notification_vector,
                cache_flush,
                vpids,
                shared: false.into(),
            },
            GFP_KERNEL,
        )?)
    }

    /// `vcpu` is about to run on this CPU: keeps what the host's mitigations promise about branch prediction.
    #[inline]
    pub(super) fn separate(&self, vcpu: &VcpuId, irqs: &IrqsOff) {
        let shared = self.is_shared(irqs);
        self.per_cpu.get(irqs).last_vcpu.separate(vcpu, shared, &self.features, irqs);
    }

    /// The vCPU has left this CPU for now. Preemption is off.
    #[inline]
    pub(super) fn leave(&self) {
        if self.shared.load(Ordering::Relaxed) && self.features.ibpb {
            cpu::barrier();
        }
    }

    /// Whether another hypervisor runs guests on this host, or has done so. Krab is in no VMX operation here.
    #[inline]
    fn is_shared(&self, irqs: &IrqsOff) -> bool {
        if insn::is_on(irqs) {
            self.shared.store(true, Ordering::Relaxed);
        }
        self.shared.load(Ordering::Relaxed)
    }

    /// Host code ran on this CPU: nothing of what it used may be in the cache for a guest to read by L1TF.
    #[inline]
    pub(super) fn flush_cache(&self) {
        self.cache_flush.flush();
    }

    /// Which performance counters of the host count, for exits to load; 0 where entries do not stop them.
    #[inline]
    pub(super) fn read_perf_global_ctrl(&self) -> u64 {
        match self.perf_global_ctrl {
            true => cpu::read_msr_or_zero(msr::PERF_GLOBAL_CTRL),
            false => 0,
        }
    }

    /// What a guest needs that reads the CPU's counters. `None`: `free` has none of them.
    pub(super) fn counter_bitmaps(&self, free: Unintercepted) -> Result<Option<MsrBitmaps>> {
        if !free.sleep_counters && !free.frequency_counters {
            return Ok(None);
        }
        let mut bitmaps = MsrBitmaps::new()?;
        if free.sleep_counters {
            bitmaps.allow_reading(&SLEEP_COUNTERS);
        }
        if free.frequency_counters {
            bitmaps.allow_reading(&[msr::APERF, msr::MPERF]);
        }
        Ok(Some(bitmaps))
    }

    /// What this CPU needs for VMX operation.
    #[inline]
    pub(super) fn operation<'a>(&'a self, irqs: &'a IrqsOff) -> &'a Operation {
        &self.per_cpu.get(irqs).operation
    }

    /// Calls `f` with what exits load on this CPU.
    #[inline]
    pub(super) fn with_host_state<R>(&self, irqs: &IrqsOff, f: impl FnOnce(&HostState) -> R) -> R {
        let state = self.per_cpu.get(irqs);
        let host = state.host.take().unwrap_or_else(|| host_state(irqs));
        let result = f(&host);
        state.host.set(Some(host));
        result
    }

    /// A VPID that no other vCPU has, or `None` when all are taken or the CPU has none.
    pub(super) fn take_vpid(&self) -> Option<u16> {
        self.config.features.vpid.and_then(|_| self.vpids.take())
    }

    /// Gives it back.
    pub(super) fn give_vpid(&self, vpid: u16) {
        self.vpids.give(vpid);
    }
}

impl Hardware for Vmx {
    /// Nothing is left on outside of the run loop's stretches of interrupts off: this only looks whether it can be turned on.
    fn enable(&self, irqs: &IrqsOff) -> Result {
        // The CPU may have come back from suspend or a reset.
        self.per_cpu.get(irqs).host.set(None);
        if firmware_allows() {
            Ok(())
        } else {
            Err(EPERM)
        }
    }

    fn disable(&self, _irqs: &IrqsOff) {}
}

fn firmware_allows() -> bool {
    enabled_by_firmware(cpu::read_msr_or_zero(msr::FEATURE_CONTROL))
}

/// One bit for each of the 65536 identifiers. 0 is the host's.
struct Vpids(KVVec<AtomicU64>);

impl Vpids {
    fn new() -> Result<Self> {
        let mut words = KVVec::with_capacity(65536 / 64, GFP_KERNEL)?;
        for index in 0..65536 / 64 {
            words.push(AtomicU64::new(u64::from(index == 0)), GFP_KERNEL)?;
        }
        Ok(Self(words))
    }

    fn take(&self) -> Option<u16> {
        for (index, word) in self.0.iter().enumerate() {
            loop {
                let old = word.load(Ordering::Relaxed);
                let bit = old.trailing_ones();
                if bit == 64 {
                    break;
                }
                if word.compare_exchange(old, old | 1 << bit, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                    return Some((index * 64 + bit as usize) as u16);
                }
            }
        }
        None
    }

    fn give(&self, vpid: u16) {
        if let Some(word) = self.0.get(usize::from(vpid / 64)) {
            word.fetch_and(!(1 << (vpid % 64)), Ordering::Relaxed);
        }
    }
}

/// MSR bitmaps for the two ways in which a guest may find its local APIC.
pub(super) struct MsrBitmaps {
    pub(super) usual: PhysBox<Bytes<4096>>,
    /// For guests whose APIC is in x2APIC mode, and that the CPU delivers interrupts to.
    pub(super) x2apic: PhysBox<Bytes<4096>>,
}

impl MsrBitmaps {
    fn new() -> Result<Self> {
        let mut usual = PhysBox::<Bytes<4096>>::new()?;
        usual.0.fill(0xFF);
        for msr in PASSED_THROUGH {
            msr_bitmap::set(&mut usual.0, msr, false, false);
        }
        let mut x2apic = PhysBox::<Bytes<4096>>::new()?;
        x2apic.0 = usual.0;
        for msr in msr::X2APIC_FIRST..=msr::X2APIC_LAST {
            let access = x2apic_access(msr);
            msr_bitmap::set(&mut x2apic.0, msr, !access.read, !access.write);
        }
        Ok(Self { usual, x2apic })
    }

    fn allow_reading(&mut self, msrs: &[u32]) {
        for msr in msrs {
            msr_bitmap::set(&mut self.usual.0, *msr, false, true);
            msr_bitmap::set(&mut self.x2apic.0, *msr, false, true);
        }
    }
}

/// How long the core slept. A CPU without one of them raises the guest's #GP itself.
const SLEEP_COUNTERS: [u32; 4] =
    [msr::CORE_C1_RESIDENCY, msr::CORE_C3_RESIDENCY, msr::CORE_C6_RESIDENCY, msr::CORE_C7_RESIDENCY];

/// MSRs that the VMCS or [`TaskState`](crate::glue::vmx::TaskState) switches and that guests use often: no exit.
const PASSED_THROUGH: [u32; 3] = [msr::FS_BASE, msr::GS_BASE, msr::KERNEL_GS_BASE];
