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

mod clock;
mod coalesced;
mod dev;
mod emulation;
mod enable_cap;
mod exits;
mod hypercall;
mod irq;
mod irq_eventfd;
mod memory;
mod msrs;
mod run;
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
use glue::{debugfs, fd::CharDevice};
use svm::Svm;
use vendor::Vendor;
use vmx::Vmx;

module! {
    type: Krab,
    name: "krab",
    authors: ["The Krab developers"],
    description: "Type-2 hypervisor with KVM's interface",
    license: "GPL",
}

/// The device node, with the vendor's room behind it that fits this CPU.
enum Node {
    Amd(#[allow(dead_code)] Pin<KBox<CharDevice<System<Svm>>>>),
    Intel(#[allow(dead_code)] Pin<KBox<CharDevice<System<Vmx>>>>),
}

fn register<V: Vendor>(hardware: Arc<V>) -> Result<Pin<KBox<CharDevice<System<V>>>>> {
    KBox::pin_init(CharDevice::register(System(Host::new(hardware)?)), GFP_KERNEL)
}

struct Krab {
    _node: Node,
    _debugfs: debugfs::Root<vcpu::Peers>,
}

impl kernel::Module for Krab {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let debugfs = debugfs::Root::new(c"krab");
        let node = match CpuVendor::from_leaf_0(glue::cpu::cpuid(0, 0)) {
            CpuVendor::Amd => Node::Amd(register(Svm::probe()?)?),
            // Intel, and who builds after it: Centaur, Zhaoxin.
            CpuVendor::Intel | CpuVendor::Other => Node::Intel(register(Vmx::probe()?)?),
        };
        Ok(Self { _node: node, _debugfs: debugfs })
    }
}
