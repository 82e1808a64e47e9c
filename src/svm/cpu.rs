// SPDX-License-Identifier: GPL-2.0
//! SVM on this host: whether it may be used, and what each CPU keeps for it.
#![forbid(unsafe_code)]

use core::cell::Cell;

use kernel::{prelude::*, sync::Arc};

use super::insn;
use crate::{
    arch::{
        cpuid::{ext10_edx, leaf1_ecx},
        msr,
    },
    glue::{
        cpu::{self, HostFeatures, IrqsOff, LastVcpu, VcpuId},
        error,
        percpu::PerCpu,
        phys::{Bytes, PhysBox},
        virt::Hardware,
    },
    guest::Unintercepted,
    policy::tsc::{Format, Ratio},
};

/// VM_CR: SVM is disabled. APM Vol. 2 "Enabling SVM".
const VM_CR_SVMDIS: u64 = 1 << 4;

/// What one CPU keeps.
struct PerCpuState {
    /// Where VMRUN keeps host state.
    save_area: PhysBox<Bytes<4096>>,
    /// Where VMSAVE keeps the rest of it.
    host: PhysBox<Bytes<4096>>,
    /// Whether we turned SVM on here.
    ours: Cell<bool>,
    /// What guests' TSCs are to the host's.
    tsc_ratio: Cell<Ratio>,
    asids: Cell<AsidPool>,
    last_vcpu: LastVcpu,
}

/// Address space identifiers are handed out upwards; when they run out, a new generation begins with a flush of the CPU's TLB.
#[derive(Clone, Copy)]
struct AsidPool {
    generation: u64,
    next: u32,
}

/// An identifier and when and where it is valid.
#[derive(Clone, Copy, Default)]
pub(super) struct Asid {
    pub(super) id: u32,
    generation: u64,
    cpu: usize,
}

/// AMD SVM on this host.
pub(crate) struct Svm {
    per_cpu: PerCpu<PerCpuState>,
    pub(super) features: HostFeatures,
    /// Number of identifiers, the host's 0 among them.
    asid_count: u32,
    /// The CPUs scale guests' TSCs.
    pub(super) tsc_ratio: bool,
    pub(super) injection: Injection,
    pub(super) io_permissions: PhysBox<Bytes<{ 4 * 4096 }>>,
    pub(super) msr_permissions: PhysBox<Bytes<{ 2 * 4096 }>>,
    /// The same without exceptions: every access is an exit.
    pub(super) msr_all: PhysBox<Bytes<{ 2 * 4096 }>>,
}

impl Svm {
    /// Looks at the host. Each refusal is one line in the log: `ENODEV` without SVM, `EPERM` when firmware disabled it, `EOPNOTSUPP`
    /// without nested paging or with encrypted host memory.
    pub(crate) fn probe() -> Result<Arc<Self>> {
        let features = cpu::host_features();
        if !features.svm {
            pr_err!(
                "this CPU has no SVM (or its hypervisor does not offer it): Krab needs AMD SVM with nested paging\n"
            );
            return Err(ENODEV);
        }
        if cpu::read_msr_or_zero(msr::VM_CR) & VM_CR_SVMDIS != 0 {
            pr_err!("SVM is disabled by firmware: turn it on in the firmware's setup (often called SVM mode)\n");
            return Err(EPERM);
        }
        if !features.npt {
            pr_err!("this CPU has SVM but no nested paging, which Krab needs\n");
            return Err(error::unsupported());
        }
        if features.memory_encryption || features.snp {
            pr_err!("the host encrypts its memory (SME or SEV-SNP), which Krab does not support: boot with mem_encrypt=off\n");
            return Err(error::unsupported());
        }
        let per_cpu = PerCpu::new(|| {
            Ok(PerCpuState {
                tsc_ratio: Cell::new(Ratio::ONE),
                save_area: PhysBox::new()?,
                host: PhysBox::new()?,
                ours: Cell::new(false),
                asids: Cell::new(AsidPool { generation: 1, next: 1 }),
                last_vcpu: LastVcpu::default(),
            })
        })?;
        // CPUID.8000000Ah:EBX is the number of identifiers.
        let asid_count = cpu::cpuid(0x8000_000A, 0)[1].max(2);
        let mut io_permissions = PhysBox::<Bytes<{ 4 * 4096 }>>::new()?;
        io_permissions.0.fill(0xFF);
        let mut msr_permissions = PhysBox::<Bytes<{ 2 * 4096 }>>::new()?;
        msr_permissions.0.fill(0xFF);
        let mut msr_all = PhysBox::<Bytes<{ 2 * 4096 }>>::new()?;
        msr_all.0.fill(0xFF);
        for msr in PASSED_THROUGH {
            allow(&mut msr_permissions.0, msr, READ | WRITE);
        }
        let tsc_ratio = cpu::cpuid(0x8000_000A, 0)[3] & ext10_edx::TSC_RATIO != 0;
        Ok(Arc::new(
            Self {
                per_cpu,
                features,
                tsc_ratio,
                injection: Injection::choose(),
                asid_count,
                io_permissions,
                msr_permissions,
                msr_all,
            },
            GFP_KERNEL,
        )?)
    }

    /// `vcpu` is about to run on this CPU: keeps what the host's mitigations promise about branch prediction.
    #[inline]
    pub(super) fn separate(&self, vcpu: &VcpuId, irqs: &IrqsOff) {
        // The CPUs are ours alone while we have guests.
        self.per_cpu.get(irqs).last_vcpu.separate(vcpu, false, &self.features, irqs);
    }

    /// This CPU's save area for what VMRUN does not save.
    #[inline]
    pub(super) fn host_area<'a>(&'a self, irqs: &'a IrqsOff) -> &'a PhysBox<Bytes<4096>> {
        &self.per_cpu.get(irqs).host
    }

    /// A guest whose TSC has that ratio is about to run on this CPU.
    #[inline]
    pub(super) fn set_tsc_ratio(&self, ratio: Ratio, irqs: &IrqsOff) {
        let now = &self.per_cpu.get(irqs).tsc_ratio;
        if now.get() != ratio {
            now.set(ratio);
            insn::write_tsc_ratio(ratio.raw(Format::SVM), irqs);
        }
    }

    /// Makes sure that `asid` may be used on this CPU. Returns whether the whole TLB must be flushed by the next VMRUN.
    #[inline]
    pub(super) fn refresh_asid(&self, asid: &mut Asid, irqs: &IrqsOff) -> bool {
        let state = self.per_cpu.get(irqs);
        let mut pool = state.asids.get();
        let cpu = cpu::current();
        if asid.generation == pool.generation && asid.cpu == cpu {
            return false;
        }
        let exhausted = pool.next >= self.asid_count;
        if exhausted {
            pool = AsidPool { generation: pool.generation.wrapping_add(1), next: 1 };
        }
        *asid = Asid { id: pool.next, generation: pool.generation, cpu };
        pool.next += 1;
        state.asids.set(pool);
        exhausted
    }
}

impl Asid {
    /// Never to be used again: the next entry takes a fresh one, which is a flush of this guest's translations.
    pub(super) fn forget(&mut self) {
        self.generation = 0;
    }
}

impl Hardware for Svm {
    fn enable(&self, irqs: &IrqsOff) -> Result {
        let state = self.per_cpu.get(irqs);
        if insn::is_on(irqs)? {
            return Err(EBUSY);
        }
        insn::turn_on(state.save_area.address(), self.features.bp_spec_reduce, irqs)?;
        // Whatever another hypervisor left in the TLB under our identifiers goes with the new generation's flush.
        let pool = state.asids.get();
        state.asids.set(AsidPool { generation: pool.generation.wrapping_add(1), next: self.asid_count });
        if self.tsc_ratio {
            // Whatever was left there.
            insn::write_tsc_ratio(Ratio::ONE.raw(Format::SVM), irqs);
            state.tsc_ratio.set(Ratio::ONE);
        }
        state.ours.set(true);
        Ok(())
    }

    fn disable(&self, irqs: &IrqsOff) {
        let state = self.per_cpu.get(irqs);
        if state.ours.replace(false) {
            self.set_tsc_ratio(Ratio::ONE, irqs);
            insn::turn_off(self.features.bp_spec_reduce, irqs);
        }
    }
}

/// MSRs that VMLOAD and VMSAVE switch: the guest reads and writes them without an exit.
const PASSED_THROUGH: [u32; 10] = [
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::FS_BASE,
    msr::GS_BASE,
    msr::KERNEL_GS_BASE,
];

/// How an interrupt is injected.
///
/// The SVM that QEMU emulates (seen in 10.0.13) forgets to note that an injected interrupt was delivered: when something stops the CPU, a
/// timer of the machine where instructions are counted, or another CPU's misaligned atomic access, it delivers the interrupt once
/// more, be it in the first instruction of the handler. The guest's next exit or exception ends that.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Injection {
    /// As an interrupt.
    Plain,
    /// With an exit before the handler's first instruction: where QEMU emulates several CPUs.
    WithExit,
    /// As INT n, which QEMU does once, where the guest may do that: where it emulates one CPU. With several, guests ended early for it.
    AsInt,
}

impl Injection {
    fn choose() -> Self {
        // The hypervisor's name, where there is one.
        let [_, b, c, d] = cpu::cpuid(0x4000_0000, 0);
        let qemu = [b, c, d].map(u32::to_le_bytes) == [*b"TCGT", *b"CGTC", *b"GTCG"];
        match cpu::cpuid(1, 0)[2] & leaf1_ecx::HYPERVISOR != 0 && qemu {
            false => Self::Plain,
            true if cpu::ids() > 1 => Self::WithExit,
            true => Self::AsInt,
        }
    }
}

/// The usual permissions, and reading the CPU's counters. `None`: `free` has none of them.
pub(super) fn counter_permissions(
    usual: &PhysBox<Bytes<{ 2 * 4096 }>>,
    free: Unintercepted,
) -> Result<Option<PhysBox<Bytes<{ 2 * 4096 }>>>> {
    // The counters of sleep are Intel's.
    if !free.frequency_counters {
        return Ok(None);
    }
    let mut map = PhysBox::<Bytes<{ 2 * 4096 }>>::new()?;
    map.0 = usual.0;
    for counter in [msr::APERF, msr::MPERF] {
        allow(&mut map.0, counter, READ);
    }
    Ok(Some(map))
}

/// The two bits of an MSR.
const READ: u8 = 1;
const WRITE: u8 = 2;

/// Clears the bits `access` of `msr`. APM Vol. 2 "MSR Intercepts": two bits an MSR, 2 KiB for each of three ranges.
fn allow(map: &mut [u8], msr: u32, access: u8) {
    let (range, index) = match msr {
        0..=0x1FFF => (0, msr),
        0xC000_0000..=0xC000_1FFF => (0x800, msr & 0x1FFF),
        0xC001_0000..=0xC001_1FFF => (0x1000, msr & 0x1FFF),
        _ => return,
    };
    if let Some(byte) = map.get_mut(range + index as usize / 4) {
        *byte &= !(access << (index % 4 * 2));
    }
}
