// SPDX-License-Identifier: GPL-2.0
//! Kernel crate root: the `krab` module. It looks at the CPUs, takes the vendor's room that fits, and registers `/dev/krab`.
#![allow(unreachable_pub)]
use kernel::{prelude::*, sync::Arc};

#[path = "../rust/mod.rs"]
mod glue;

// The pure rooms, by the same names as in the host crate (lib.rs). They state whole interfaces: tables that only the host's tests
// read, published numbers, what Intel's room will need.
#[allow(dead_code, unused_imports)]
mod abi;
#[allow(dead_code, unused_imports)]
mod arch;
#[allow(dead_code, unused_imports)]
mod emul;
#[allow(dead_code, unused_imports)]
mod guest;
#[allow(dead_code, unused_imports)]
mod irqchip;
#[allow(dead_code, unused_imports)]
mod mmu;
#[allow(dead_code, unused_imports)]
mod policy;

mod apic;
mod clock;
mod coalesced;
mod deadline;
mod debug;
mod dev;
mod dirty_ring;
mod emulation;
mod enable_cap;
mod exits;
mod guest_tsc;
mod hypercall;
mod irq;
mod irq_eventfd;
mod memory;
mod msrs;
mod pmu;
mod pv_eoi;
mod run;
mod slot_table;
mod software;
mod stats;
mod svm;
mod to_user;
mod vcpu;
mod vcpu_ioctl;
mod vendor;
mod vm;
mod vmx;

use arch::cpuid::Vendor as CpuVendor;
use dev::{Host, System};
use glue::{
    debugfs,
    fd::{CharDevice, Node},
};
use policy::vmx::Options as VmxOptions;
use svm::Svm;
use vendor::Vendor;
use vmx::Vmx;

module! {
    type: Krab,
    name: "krab",
    authors: ["The Krab developers"],
    description: "Type-2 hypervisor with KVM's interface",
    license: "GPL",
    params: {
        kvm_node: u8 {
            default: 0,
            description: "1: serve /dev/kvm, too, where KVM is not loaded",
        },
        ept_ad: u8 {
            default: 1,
            description: "0: Intel CPUs do not mark pages of guests as accessed and dirty",
        },
        unrestricted_guest: u8 {
            default: 1,
            description: "0: guests in real mode and without paging are emulated on Intel",
        },
        pml: u8 {
            default: 1,
            description: "0: Intel CPUs do not log the pages that guests write",
        },
        preemption_timer: u8 {
            default: 1,
            description: "0: deadlines of running guests on Intel CPUs are kept by timers of the host, too",
        },
        apicv: u8 {
            default: 1,
            description: "Intel's APICv: 0: deliver guests' interrupts by software; 1: no posted interrupts; 2: all of it",
        },
    },
}

/// What is registered, with the vendor's room behind it that fits this CPU.
enum Devices {
    Amd(#[allow(dead_code)] Registered<Svm>),
    Intel(#[allow(dead_code)] Registered<Vmx>),
}

/// The device nodes.
struct Registered<V: Vendor> {
    _krab: Pin<KBox<CharDevice<System<V>>>>,
    _kvm: Option<Pin<KBox<CharDevice<System<V>>>>>,
}

impl<V: Vendor> Registered<V> {
    /// `/dev/krab`, and `/dev/kvm` if it is wanted.
    fn new(hardware: Arc<V>, as_kvm: bool) -> Result<Self> {
        let host = Host::new(hardware)?;
        let register = |node| KBox::pin_init(CharDevice::register(System(host.clone()), node), GFP_KERNEL);
        let kvm = match as_kvm {
            true => Some(register(Node::KVM).inspect_err(|error| {
                if *error == EBUSY {
                    pr_err!(
                        "another module serves /dev/kvm: unload it (kvm_amd or kvm_intel), or load krab without kvm_node\n"
                    );
                }
            })?),
            false => None,
        };
        Ok(Self { _krab: register(Node::KRAB)?, _kvm: kvm })
    }
}

/// What the parameters allow on Intel.
fn vmx_options() -> VmxOptions {
    VmxOptions {
        apicv: *module_parameters::apicv.value() != 0,
        posted: *module_parameters::apicv.value() > 1,
        pml: *module_parameters::pml.value() != 0,
        accessed_dirty: *module_parameters::ept_ad.value() != 0,
        unrestricted_guest: *module_parameters::unrestricted_guest.value() != 0,
        fred: false,
        preemption_timer: (*module_parameters::preemption_timer.value() != 0).then(glue::timer::tsc_khz),
    }
}

struct Krab {
    _devices: Devices,
    _debugfs: debugfs::Root<vcpu::Peers>,
}

impl kernel::Module for Krab {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let as_kvm = *module_parameters::kvm_node.value() != 0;
        // Where KVM's tools look.
        let debugfs = debugfs::Root::new(if as_kvm { c"kvm" } else { c"krab" });
        let devices = match CpuVendor::from_leaf_0(glue::cpu::cpuid(0, 0)) {
            CpuVendor::Amd => Devices::Amd(Registered::new(Svm::probe()?, as_kvm)?),
            // Intel, and who builds after it: Centaur, Zhaoxin.
            CpuVendor::Intel | CpuVendor::Other => Devices::Intel(Registered::new(Vmx::probe(vmx_options())?, as_kvm)?),
        };
        Ok(Self { _devices: devices, _debugfs: debugfs })
    }
}
