// SPDX-License-Identifier: GPL-2.0
//! Statistics of VMs and vCPUs, as KVM_GET_STATS_FD's files and in debugfs. KVM API "KVM_GET_STATS_FD".
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use kernel::{
    prelude::*,
    str::CString,
    sync::{Arc, ArcBorrow},
};

use crate::{
    abi::{
        stats::{self, Stat, VcpuStat, VmStat, KVM_STATS_NAME_SIZE, VCPU_STATS, VM_STATS},
        IntoBytes,
    },
    glue::{
        debugfs::Counters,
        fd::{self, FileOperations},
        task,
    },
    guest::Exit,
    vcpu::{Peer, Peers},
};

/// What a vCPU counts. Only its own thread counts; anybody may look.
pub(crate) struct VcpuStats([AtomicU64; VCPU_STATS.len()]);

/// What happens to a VM as a whole. Any thread counts.
pub(crate) struct VmStats([AtomicU64; VM_STATS.len()]);

impl VcpuStats {
    pub(crate) const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; VCPU_STATS.len()])
    }

    #[inline]
    pub(crate) fn add(&self, stat: VcpuStat, more: u64) {
        let cell = &self.0[stat as usize];
        // There is one writer, so this loses nothing.
        cell.store(cell.load(Relaxed).wrapping_add(more), Relaxed);
    }

    #[inline]
    pub(crate) fn count(&self, stat: VcpuStat) {
        self.add(stat, 1);
    }

    pub(crate) fn set(&self, stat: VcpuStat, value: u64) {
        self.0[stat as usize].store(value, Relaxed);
    }

    /// Counts an exit, and what kind it is.
    #[inline]
    pub(crate) fn exit(&self, exit: &Exit) {
        self.count(VcpuStat::Exits);
        self.count(match exit {
            Exit::HostInterrupt => VcpuStat::IrqExits,
            Exit::NestedFault(_) => VcpuStat::PfTaken,
            Exit::Port(_) => VcpuStat::IoExits,
            Exit::Hypercall => VcpuStat::Hypercalls,
            Exit::Hlt => VcpuStat::HaltExits,
            Exit::InterruptWindow => VcpuStat::IrqWindowExits,
            Exit::NmiWindow => VcpuStat::NmiWindowExits,
            _ => return,
        });
    }

    fn value(&self, index: usize) -> u64 {
        self.0.get(index).map_or(0, |cell| cell.load(Relaxed))
    }
}

impl VmStats {
    pub(crate) const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; VM_STATS.len()])
    }

    pub(crate) fn count(&self, stat: VmStat) {
        self.0[stat as usize].fetch_add(1, Relaxed);
    }

    fn value(&self, index: usize) -> u64 {
        self.0.get(index).map_or(0, |cell| cell.load(Relaxed))
    }
}

/// In debugfs a VM shows its own statistics and the sums of its vCPUs'.
impl Counters for Peers {
    const NAMES: &'static [&'static CStr] = &{
        let mut names = [c""; VM_STATS.len() + VCPU_STATS.len()];
        let mut n = 0;
        while n < names.len() {
            names[n] = if n < VM_STATS.len() { VM_STATS[n].name } else { VCPU_STATS[n - VM_STATS.len()].name };
            n += 1;
        }
        names
    };

    fn value(&self, index: usize) -> u64 {
        match index.checked_sub(VM_STATS.len()) {
            None => self.stats.value(index),
            Some(index) => self.iter().fold(0, |sum, peer| sum.wrapping_add(peer.stats.value(index))),
        }
    }
}

/// The file that KVM_GET_STATS_FD returns. It outlives the VM's own descriptor.
pub(crate) struct StatsFile {
    peers: Arc<Peers>,
    /// Whose statistics; `None`: the VM's.
    vcpu: Option<Arc<Peer>>,
    id: [u8; KVM_STATS_NAME_SIZE],
}

impl StatsFile {
    /// A new descriptor for the statistics of a vCPU, or of the VM.
    pub(crate) fn open(peers: Arc<Peers>, vcpu: Option<Arc<Peer>>) -> Result<isize> {
        let process = task::id();
        let text = match &vcpu {
            None => CString::try_from_fmt(fmt!("kvm-{process}"))?,
            Some(peer) => CString::try_from_fmt(fmt!("kvm-{process}/vcpu-{}", peer.id))?,
        };
        let id = stats::padded(text.to_bytes());
        Ok(fd::anon_fd(Arc::new(Self { peers, vcpu, id }, GFP_KERNEL_ACCOUNT)?)? as isize)
    }

    fn table(&self) -> &'static [Stat] {
        if self.vcpu.is_some() {
            VCPU_STATS
        } else {
            VM_STATS
        }
    }
}

impl FileOperations for StatsFile {
    const NAME: &'static CStr = c"krab-stats";
    const READABLE: bool = true;

    fn ioctl(_this: ArcBorrow<'_, Self>, _cmd: u32, _arg: usize) -> Result<isize> {
        Err(ENOTTY)
    }

    fn snapshot(this: ArcBorrow<'_, Self>) -> Result<KVVec<u8>> {
        let mut out = KVVec::new();
        let table = this.table();
        out.extend_from_slice(stats::header(table).as_bytes(), GFP_KERNEL)?;
        out.extend_from_slice(&this.id, GFP_KERNEL)?;
        for (index, stat) in table.iter().enumerate() {
            out.extend_from_slice(stats::descriptor(stat, index).as_bytes(), GFP_KERNEL)?;
        }
        for index in 0..table.len() {
            let value = match &this.vcpu {
                Some(peer) => peer.stats.value(index),
                None => this.peers.stats.value(index),
            };
            out.extend_from_slice(value.as_bytes(), GFP_KERNEL)?;
        }
        Ok(out)
    }
}
