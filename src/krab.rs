// SPDX-License-Identifier: GPL-2.0
//! Kernel crate root: the `krab` module. It looks at the CPUs, takes the vendor's room that fits, and registers `/dev/krab`.
#![allow(unreachable_pub)]
use kernel::prelude::*;

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
mod dev;
mod emulation;
mod enable_cap;
mod exits;
mod hypercall;
mod irq;
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

use dev::{Host, System};
use glue::{debugfs, fd::CharDevice};
use svm::Svm;

module! {
    type: Krab,
    name: "krab",
    authors: ["The Krab developers"],
    description: "Type-2 hypervisor with KVM's interface",
    license: "GPL",
}

#[pin_data]
struct Krab {
    #[pin]
    device: CharDevice<System<Svm>>,
    _debugfs: debugfs::Root<vcpu::Peers>,
}

impl kernel::InPlaceModule for Krab {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(|| {
            let system = System(Host::new(Svm::probe()?)?);
            let root = debugfs::Root::new(c"krab");
            Ok(try_pin_init!(Self { _debugfs: root, device <- CharDevice::register(system) }? Error))
        })
    }
}
