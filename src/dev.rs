// SPDX-License-Identifier: GPL-2.0
//! `/dev/krab` itself: what a client asks before it has a virtual machine.
#![forbid(unsafe_code)]

use core::ops::Deref;

use kernel::{prelude::*, sync::Arc};

use crate::{
    abi::{
        cap,
        ioctl::*,
        vcpu::{
            KvmCpuid2, KvmCpuidEntry2, KvmMsrEntry, KvmMsrList, KvmMsrs, KVM_MAX_CPUID_ENTRIES,
            KVM_X86_XCOMP_GUEST_SUPP, MAX_IO_MSRS,
        },
        vm::{
            KvmDeviceAttr, KVM_X86_DISABLE_EXITS_APERFMPERF, KVM_X86_DISABLE_EXITS_CSTATE, KVM_X86_DISABLE_EXITS_HLT,
            KVM_X86_DISABLE_EXITS_MWAIT, KVM_X86_DISABLE_EXITS_PAUSE,
        },
        KVM_API_VERSION,
    },
    arch::Hva,
    glue::{
        cpu,
        fd::{self, DeviceOperations},
        fpu, pmu, user,
        virt::Owner,
    },
    policy::{
        caps::GuestCaps,
        cpuid,
        msr::{self, MsrConfig},
        pmu::PmuCaps,
    },
    vendor::Vendor,
    vm::Vm,
};

/// Most virtual CPUs in a machine, and one more than the highest id.
pub(crate) const MAX_VCPUS: u32 = 1024;
/// Bytes that a vCPU's file descriptor can be mapped for: `struct kvm_run`, the data page of port exits, the ring of coalesced writes.
pub(crate) const VCPU_MMAP_BYTES: isize = 3 * 4096;

/// What does not change while the module is loaded.
pub(crate) struct Host<V: Vendor> {
    pub(crate) owner: Owner<V>,
    /// What KVM_GET_SUPPORTED_CPUID returns.
    pub(crate) supported_cpuid: KVVec<KvmCpuidEntry2>,
    /// The same as capabilities: the most that any guest may do.
    pub(crate) caps: GuestCaps,
    /// What is the same for every guest's MSRs.
    pub(crate) msr_config: MsrConfig,
    limits: cap::Limits,
}

impl<V: Vendor> Host<V> {
    /// Takes `hardware` into use.
    pub(crate) fn new(hardware: Arc<V>) -> Result<Arc<Self>> {
        let xcr0 = fpu::host_components()?;
        let features = cpu::host_features();
        let pmu = match hardware.counts_guests() && pmu::works() {
            true => PmuCaps::host(cpu::cpuid(0xA, 0)),
            false => PmuCaps::NONE,
        };
        let host_features = cpuid::HostFeatures {
            xcr0,
            xsaves: hardware.guest_xsaves(),
            tsc_aux: features.rdtscp,
            spec_ctrl: features.spec_ctrl,
            lfence_serializing: features.lfence_serializing,
            invariant_tsc: features.invariant_tsc,
            la57: features.la57,
            nested_address_bits: 48,
            pv_features: cpuid::PV_FEATURES,
            pmu,
        };
        let mut supported = KVVec::new();
        supported.resize(KVM_MAX_CPUID_ENTRIES as usize, KvmCpuidEntry2::default(), GFP_KERNEL)?;
        let count = cpuid::supported(cpu::cpuid, &host_features, &mut supported).map_err(|_| E2BIG)?;
        supported.truncate(count);
        let caps = GuestCaps::derive(|function, index| {
            let found = supported.iter().find(|entry| entry.function == function && entry.index == index);
            found.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
        });
        let msr_config = MsrConfig {
            supported: caps,
            pv_features: cpuid::PV_FEATURES,
            arch_capabilities: 0,
            microcode: cpu::read_msr_or_zero(crate::arch::msr::UCODE_REV),
            pmu,
        };
        let limits = cap::Limits {
            recommended_vcpus: (cpu::ids() as u32).min(MAX_VCPUS),
            max_vcpus: MAX_VCPUS,
            max_vcpu_id: MAX_VCPUS,
            memory_slots: crate::mmu::slots::USER_SLOTS,
            xsave: xcr0 != 0,
            tsc_scaling: hardware.tsc_format().is_some(),
            pmu: pmu != PmuCaps::NONE,
            xsave_bytes: cpuid::xsave_bytes(xcr0, false, |i| cpu::cpuid(0xD, i)).max(4096),
            disable_exits: disable_exits(&features),
        };
        Ok(Arc::new(
            Self { owner: Owner::new(hardware)?, supported_cpuid: supported, caps, msr_config, limits },
            GFP_KERNEL,
        )?)
    }

    /// Bytes of a whole XSAVE image.
    pub(crate) fn xsave_bytes(&self) -> usize {
        self.limits.xsave_bytes as usize
    }

    /// `KVM_X86_DISABLE_EXITS_*` that a VM may have.
    pub(crate) fn disable_exits(&self) -> u64 {
        self.limits.disable_exits
    }

    /// What KVM_CHECK_EXTENSION answers, on the system and on a VM.
    pub(crate) fn check_extension(&self, number: usize) -> isize {
        cap::check_extension(number as u64, &self.limits) as isize
    }
}

/// What guests of this host may do without an exit. None sleeps where what a sleeping sibling leaves behind misleads the other thread's
/// returns: KVM only warns there, unless its `mitigate_smt_rsb` is set.
fn disable_exits(features: &cpu::HostFeatures) -> u64 {
    let mut allowed = KVM_X86_DISABLE_EXITS_PAUSE;
    if features.aperfmperf {
        allowed |= KVM_X86_DISABLE_EXITS_APERFMPERF;
    }
    if !features.smt_rsb {
        allowed |= KVM_X86_DISABLE_EXITS_HLT | KVM_X86_DISABLE_EXITS_CSTATE;
        if features.mwait {
            allowed |= KVM_X86_DISABLE_EXITS_MWAIT;
        }
    }
    allowed
}

/// A host whose virtualization extension is on.
pub(crate) struct InUse<V: Vendor>(Arc<Host<V>>);

impl<V: Vendor> InUse<V> {
    /// Turns the extension on if this is its first use. `EBUSY` when another hypervisor holds it.
    pub(crate) fn new(host: Arc<Host<V>>) -> Result<Self> {
        host.owner.acquire().inspect_err(|error| {
            if *error == EBUSY {
                pr_warn!("another hypervisor holds the CPUs' virtualization extension: unload it (rmmod kvm_amd) and try again\n");
            }
        })?;
        Ok(Self(host))
    }
}

impl<V: Vendor> Deref for InUse<V> {
    type Target = Host<V>;

    fn deref(&self) -> &Host<V> {
        &self.0
    }
}

impl<V: Vendor> Drop for InUse<V> {
    fn drop(&mut self) {
        self.0.owner.release();
    }
}

/// The device node.
pub(crate) struct System<V: Vendor>(pub(crate) Arc<Host<V>>);

impl<V: Vendor> DeviceOperations for System<V> {
    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        let at = Hva(arg as u64);
        match cmd {
            KVM_GET_API_VERSION if arg == 0 => Ok(KVM_API_VERSION as isize),
            KVM_GET_VCPU_MMAP_SIZE if arg == 0 => Ok(VCPU_MMAP_BYTES),
            KVM_GET_API_VERSION | KVM_GET_VCPU_MMAP_SIZE => Err(EINVAL),
            KVM_CREATE_VM if arg == 0 => {
                let vm = Vm::new(self.0.clone())?;
                let file = fd::anon_file(vm.clone())?;
                vm.show(file.number());
                Ok(file.install() as isize)
            }
            KVM_CREATE_VM => Err(EINVAL),
            KVM_CHECK_EXTENSION => Ok(self.0.check_extension(arg)),
            KVM_GET_SUPPORTED_CPUID => give_cpuid(at, &self.0.supported_cpuid),
            // The leaves that KVM shows, without a feature: none is emulated that the CPU does not have.
            KVM_GET_EMULATED_CPUID => {
                let entry = |function, eax| KvmCpuidEntry2 { function, eax, ..KvmCpuidEntry2::default() };
                give_cpuid(at, &[entry(0, 7), entry(1, 0), entry(7, 0)])
            }
            KVM_GET_MSR_INDEX_LIST => write_list(at, || msr::index_list(&self.0.msr_config)),
            KVM_GET_MSR_FEATURE_INDEX_LIST => write_list(at, || msr::feature_list(&self.0.msr_config)),
            KVM_GET_MSRS => each_msr(at, |entry| {
                entry.data = msr::feature_value(&self.0.msr_config, entry.index).ok_or(EINVAL)?;
                Ok(())
            }),
            KVM_GET_DEVICE_ATTR | KVM_HAS_DEVICE_ATTR => {
                let attribute: KvmDeviceAttr = user::read(at)?;
                if (attribute.group, attribute.attr) != (0, KVM_X86_XCOMP_GUEST_SUPP) {
                    return Err(ENXIO);
                }
                if cmd == KVM_GET_DEVICE_ATTR {
                    user::write(Hva(attribute.addr), &self.0.caps.xcr0)?;
                }
                Ok(0)
            }
            KVM_X86_GET_MCE_CAP_SUPPORTED => {
                user::write(at, &msr::MCE_CAP_SUPPORTED)?;
                Ok(0)
            }
            _ => Err(ENOTTY),
        }
    }
}

/// Writes a `struct kvm_cpuid2`; E2BIG when the caller has less room.
fn give_cpuid(at: Hva, entries: &[KvmCpuidEntry2]) -> Result<isize> {
    let mut head: KvmCpuid2 = user::read(at)?;
    if (head.nent as usize) < entries.len() {
        return Err(E2BIG);
    }
    head.nent = entries.len() as u32;
    user::write(at, &head)?;
    user::write(at.wrapping_add(size_of::<KvmCpuid2>() as u64), entries)?;
    Ok(0)
}

/// Writes a `struct kvm_msr_list`: always its true length, and E2BIG when the caller has less room.
fn write_list<I: Iterator<Item = u32>>(at: Hva, list: impl Fn() -> I) -> Result<isize> {
    let head: KvmMsrList = user::read(at)?;
    let count = list().count();
    user::write(at, &KvmMsrList { nmsrs: count as u32 })?;
    if (head.nmsrs as usize) < count {
        return Err(E2BIG);
    }
    let mut indices = KVVec::with_capacity(count, GFP_KERNEL)?;
    for index in list() {
        indices.push(index, GFP_KERNEL)?;
    }
    user::write(at.wrapping_add(size_of::<KvmMsrList>() as u64), &indices[..])?;
    Ok(0)
}

/// Goes through a `struct kvm_msrs` until `f` fails, and writes it back. Returns the number of entries that went well, as KVM does.
pub(crate) fn each_msr(at: Hva, mut f: impl FnMut(&mut KvmMsrEntry) -> Result) -> Result<isize> {
    let head: KvmMsrs = user::read(at)?;
    let at = at.wrapping_add(size_of::<KvmMsrs>() as u64);
    let mut entries: KVVec<KvmMsrEntry> = user::read_vec(at, head.nmsrs as usize, MAX_IO_MSRS as usize - 1)?;
    let done = entries.iter_mut().position(|entry| f(entry).is_err()).unwrap_or(head.nmsrs as usize);
    user::write(at, &entries[..])?;
    Ok(done as isize)
}
