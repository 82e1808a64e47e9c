// SPDX-License-Identifier: GPL-2.0
//! Statistics: which there are, and the binary format that KVM_GET_STATS_FD's file has. KVM API "KVM_GET_STATS_FD".
//!
//! The names are KVM's, so that its tools find them; those of counters that make no sense here are left out.
#![forbid(unsafe_code)]

use core::ffi::CStr;

layout! {
    /// `struct kvm_stats_header`: the start of the file. The id string follows, then descriptors, then data.
    struct KvmStatsHeader: 24 {
        0 flags: u32,
        /// Bytes of a name and of the id string.
        4 name_size: u32,
        8 num_desc: u32,
        /// Offsets from the start of the file.
        12 id_offset: u32,
        16 desc_offset: u32,
        20 data_offset: u32,
    }

    /// `struct kvm_stats_desc` with its name.
    struct KvmStatsDesc: 64 {
        /// Type, unit and base.
        0 flags: u32,
        4 exponent: i16,
        /// Number of values.
        6 size: u16,
        /// From the start of the data, in bytes.
        8 offset: u32,
        12 bucket_size: u32,
        16 name: [u8; 48],
    }
}

pub const KVM_STATS_NAME_SIZE: usize = 48;

/// What a number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Counts upwards.
    Count,
    /// Nanoseconds, adding up.
    TimeNs,
    /// 0 or 1, now.
    Boolean,
}

impl Kind {
    /// Flags and exponent of the descriptor.
    const fn flags(self) -> (u32, i16) {
        const INSTANT: u32 = 1;
        const SECONDS: u32 = 2 << 4;
        const BOOLEAN: u32 = 4 << 4;
        match self {
            Self::Count => (0, 0),
            Self::TimeNs => (SECONDS, -9),
            Self::Boolean => (INSTANT | BOOLEAN, 0),
        }
    }
}

/// A statistic's name and kind.
#[derive(Clone, Copy, Debug)]
pub struct Stat {
    pub name: &'static CStr,
    pub kind: Kind,
}

macro_rules! stats {
    ($(#[$doc:meta])* $type:ident, $table:ident: $($variant:ident = $name:literal $kind:ident,)*) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $type {
            $($variant,)*
        }

        /// In the order of the data.
        pub const $table: &[Stat] = &[$(Stat { name: $name, kind: Kind::$kind },)*];
    };
}

stats! {
    /// Statistics of a VM.
    VmStat, VM_STATS:
    RemoteTlbFlush = c"remote_tlb_flush" Count,
    RemoteTlbFlushRequests = c"remote_tlb_flush_requests" Count,
}

stats! {
    /// Statistics of a vCPU.
    VcpuStat, VCPU_STATS:
    HaltWakeup = c"halt_wakeup" Count,
    HaltWaitNs = c"halt_wait_ns" TimeNs,
    Blocking = c"blocking" Boolean,
    PfTaken = c"pf_taken" Count,
    PfFixed = c"pf_fixed" Count,
    PfEmulate = c"pf_emulate" Count,
    TlbFlush = c"tlb_flush" Count,
    Exits = c"exits" Count,
    IoExits = c"io_exits" Count,
    MmioExits = c"mmio_exits" Count,
    SignalExits = c"signal_exits" Count,
    IrqWindowExits = c"irq_window_exits" Count,
    NmiWindowExits = c"nmi_window_exits" Count,
    HaltExits = c"halt_exits" Count,
    IrqExits = c"irq_exits" Count,
    FpuReload = c"fpu_reload" Count,
    InsnEmulation = c"insn_emulation" Count,
    InsnEmulationFail = c"insn_emulation_fail" Count,
    Hypercalls = c"hypercalls" Count,
    IrqInjections = c"irq_injections" Count,
    NmiInjections = c"nmi_injections" Count,
}

/// The header of a file with these statistics.
pub fn header(stats: &[Stat]) -> KvmStatsHeader {
    let id_offset = size_of::<KvmStatsHeader>();
    let desc_offset = id_offset + KVM_STATS_NAME_SIZE;
    let descriptors = size_of::<KvmStatsDesc>().wrapping_mul(stats.len());
    KvmStatsHeader {
        flags: 0,
        name_size: KVM_STATS_NAME_SIZE as u32,
        num_desc: stats.len() as u32,
        id_offset: id_offset as u32,
        desc_offset: desc_offset as u32,
        data_offset: desc_offset.wrapping_add(descriptors) as u32,
    }
}

/// The descriptor of statistic number `index`.
pub fn descriptor(stat: &Stat, index: usize) -> KvmStatsDesc {
    let (flags, exponent) = stat.kind.flags();
    let offset = index.wrapping_mul(8) as u32;
    KvmStatsDesc { flags, exponent, size: 1, offset, bucket_size: 0, name: padded(stat.name.to_bytes()) }
}

/// A name with zeros behind it, cut so that there is at least one.
pub fn padded(name: &[u8]) -> [u8; KVM_STATS_NAME_SIZE] {
    let mut out = [0; KVM_STATS_NAME_SIZE];
    out.iter_mut().zip(name).take(KVM_STATS_NAME_SIZE - 1).for_each(|(to, from)| *to = *from);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_are_unique() {
        let names = || VM_STATS.iter().chain(VCPU_STATS).map(|stat| stat.name);
        for name in names() {
            assert!(name.to_bytes().len() < KVM_STATS_NAME_SIZE);
            assert_eq!(names().filter(|other| *other == name).count(), 1, "{name:?}");
        }
    }

    #[test]
    fn parts_of_the_file_follow_one_another() {
        let header = header(VCPU_STATS);
        assert_eq!((header.id_offset, header.desc_offset), (24, 72));
        assert_eq!(header.data_offset as usize, 72 + 64 * VCPU_STATS.len());
        let exits = descriptor(&VCPU_STATS[VcpuStat::Exits as usize], VcpuStat::Exits as usize);
        assert_eq!(exits.offset, 8 * VcpuStat::Exits as u32);
        assert_eq!(&exits.name[..6], b"exits\0");
        let time = descriptor(&VCPU_STATS[VcpuStat::HaltWaitNs as usize], 0);
        assert_eq!((time.flags, time.exponent), (0x20, -9));
        assert_eq!(padded(&[b'x'; 60])[46..], [b'x', 0]);
    }
}
