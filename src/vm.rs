// SPDX-License-Identifier: GPL-2.0
//! A virtual machine: its memory, its virtual CPUs, its interrupt controllers, and the ioctls on its file descriptor.
//!
//! Lock order, outermost first: a VM's `setup`, a vCPU's `core`, `irqchip`, the nested table. None is held while a guest runs but the
//! vCPU's own `core`.
#![forbid(unsafe_code)]

use kernel::{
    new_mutex,
    prelude::*,
    sync::{Arc, ArcBorrow, Mutex},
};

use crate::{
    abi::{
        ioctl::*,
        vm::{KvmDirtyLog, KvmUserspaceMemoryRegion},
    },
    arch::Hva,
    dev::{Host, MAX_VCPUS},
    glue::{
        fd::{self, FileOperations},
        user,
    },
    memory::Memory,
    vcpu::{Peers, Vcpu},
    vendor::Vendor,
};

/// One virtual machine. Lives as long as its file descriptor or any of its vCPUs'.
#[pin_data(PinnedDrop)]
pub(crate) struct Vm<V: Vendor> {
    pub(crate) host: Arc<Host<V>>,
    #[pin]
    pub(crate) memory: Memory<V::NestedFormat>,
    /// Everything that must not change while something else is set up.
    #[pin]
    setup: Mutex<Setup>,
    pub(crate) peers: Arc<Peers>,
}
