// SPDX-License-Identifier: GPL-2.0
//! Kernel crate root: the `krab` module.
#![allow(unreachable_pub)]
use kernel::prelude::*;

#[path = "../rust/mod.rs"]
#[allow(dead_code)]
mod glue;

mod abi;
mod arch;
mod emul;
mod guest;
mod irqchip;
mod mmu;
mod policy;
mod svm;
mod vendor;

module! {
    type: Krab,
    name: "krab",
    authors: ["The Krab developers"],
    description: "Type-2 hypervisor with KVM's interface",
    license: "GPL",
}

struct Krab;

impl kernel::Module for Krab {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        pr_info!("loaded\n");
        Ok(Krab)
    }
}
