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
mod debug;
mod dev;
mod dirty_ring;
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

use dev::{Host, System};
use glue::{
    debugfs,
    fd::{CharDevice, Node},
};
use svm::Svm;

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
    },
}

#[pin_data]
struct Krab {
    #[pin]
    device: CharDevice<System<Svm>>,
    _kvm: Option<Pin<KBox<CharDevice<System<Svm>>>>>,
    _debugfs: debugfs::Root<vcpu::Peers>,
}

impl kernel::InPlaceModule for Krab {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(|| {
            let host = Host::new(Svm::probe()?)?;
            let as_kvm = *module_parameters::kvm_node.value() != 0;
            // Where KVM's tools look.
            let root = debugfs::Root::new(if as_kvm { c"kvm" } else { c"krab" });
            let kvm = match as_kvm {
                true => Some(serve_kvm(host.clone())?),
                false => None,
            };
            Ok(try_pin_init!(Self {
                device <- CharDevice::register(System(host), Node::KRAB),
                _kvm: kvm,
                _debugfs: root,
            }? Error))
        })
    }
}

/// `/dev/kvm`, for programs that know no other path.
fn serve_kvm(host: Arc<Host<Svm>>) -> Result<Pin<KBox<CharDevice<System<Svm>>>>> {
    KBox::pin_init(CharDevice::register(System(host), Node::KVM), GFP_KERNEL).inspect_err(|error| {
        if *error == EBUSY {
            pr_err!("another module serves /dev/kvm: unload it (rmmod kvm_amd), or load krab without kvm_node\n");
        }
    })
}
