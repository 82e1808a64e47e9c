// SPDX-License-Identifier: GPL-2.0
//! Capability MSRs of CPUs, for tests. Each entry says where its values come from.
//!
//! - *Dump*: read from the real CPU and published, by VirtualBox' CPU reporter (its CPU database) or in a VirtualBox log.
//! - *QEMU*: the bits that QEMU 10.0's CPU model of that generation lists. They were taken from real CPUs, less what KVM cannot give a
//!   nested hypervisor (PAUSE-loop exiting, TSC scaling and the like are missing). Words that the model leaves out are those of the
//!   dumps of the neighbouring generations.
//! - *Bochs*: read with RDMSR in the Intel bed, Bochs 3.0 with that CPU model.
#![forbid(unsafe_code)]

use super::CapabilityMsrs;

pub(super) struct Cpu {
    pub(super) name: &'static str,
    pub(super) msrs: CapabilityMsrs,
}

/// CPUs with TRUE controls whose four first control words differ in their "may" halves only.
struct Modern {
    name: &'static str,
    signature: u32,
    basic: u64,
    pin: u32,
    primary: u32,
    exit: u32,
    entry: u32,
    misc: u64,
    cr4: u64,
    secondary: u32,
    ept_vpid: u64,
}

const fn word(must: u32, may: u32) -> u64 {
    (may as u64) << 32 | must as u64
}

impl Modern {
    const fn cpu(self) -> Cpu {
        Cpu {
            name: self.name,
            msrs: CapabilityMsrs {
                signature: self.signature,
                basic: self.basic,
                pin: word(0x16, self.pin),
                primary: word(0x0401_E172, self.primary),
                exit: word(0x0003_6DFF, self.exit),
                entry: word(0x11FF, self.entry),
                misc: self.misc,
                cr0_fixed0: 0x8000_0021,
                cr0_fixed1: 0xFFFF_FFFF,
                cr4_fixed0: 0x2000,
                cr4_fixed1: self.cr4,
                secondary: word(0, self.secondary),
                ept_vpid: self.ept_vpid,
                true_pin: word(0x16, self.pin),
                true_primary: word(0x0400_6172, self.primary),
                true_exit: word(0x0003_6DFB, self.exit),
                true_entry: word(0x11FB, self.entry),
            },
        }
    }
}

/// What most of Intel's CPUs have.
const INTEL: Modern = Modern {
    name: "",
    signature: 0,
    basic: 0x00DA_0400_0000_0010,
    pin: 0x7F,
    primary: 0xFFF9_FFFE,
    exit: 0x007F_FFFF,
    entry: 0xFFFF,
    misc: 0x0004_01E5,
    cr4: 0x27FF,
    secondary: 0,
    ept_vpid: 0,
};

/// QEMU's; signature of a Xeon 5500 D0.
pub(super) const NEHALEM: Cpu = Modern {
    name: "Nehalem",
    signature: 0x106A5,
    misc: 0x0004_01C5,
    secondary: 0x7F,
    ept_vpid: 0x0F01_0613_4041,
    ..INTEL
}
.cpu();

/// QEMU's; signature of a Xeon 5600.
pub(super) const WESTMERE: Cpu = Modern {
    name: "Westmere",
    signature: 0x206C2,
    basic: 0x00DA_0400_0000_000F,
    cr4: 0x0002_67FF,
    secondary: 0xFF,
    ept_vpid: 0x0F01_0613_4041,
    ..INTEL
}
.cpu();

/// Dump of a Core i7-2635QM.
pub(super) const SANDY_BRIDGE: Cpu = Modern {
    name: "Sandy Bridge",
    signature: 0x206A7,
    cr4: 0x0006_27FF,
    secondary: 0xFF,
    ept_vpid: 0x0F01_0611_4141,
    ..INTEL
}
.cpu();

/// QEMU's.
pub(super) const HASWELL: Cpu = Modern {
    name: "Haswell",
    signature: 0x306F2,
    basic: 0x00DA_0400_0000_0012,
    pin: 0xFF,
    misc: 0x3004_81E5,
    cr4: 0x0017_27FF,
    secondary: 0x7BFF,
    ept_vpid: 0x0F01_0633_4041,
    ..INTEL
}
.cpu();

/// Dump of a Core i7-5600U.
pub(super) const BROADWELL: Cpu = Modern {
    name: "Broadwell",
    signature: 0x306D4,
    basic: 0x00DA_0400_0000_0012,
    misc: 0x3004_81E5,
    cr4: 0x0037_67FF,
    secondary: 0x0005_7CFF,
    ept_vpid: 0x0F01_0633_4141,
    ..INTEL
}
.cpu();

/// Dump of a client CPU of the Skylake family: without APICv and TSC scaling.
pub(super) const SKYLAKE_CLIENT: Cpu = Modern {
    name: "Skylake client",
    signature: 0x906EA,
    basic: 0x00DA_0400_0000_0004,
    exit: 0x01FF_FFFF,
    entry: 0x0003_FFFF,
    misc: 0x7004_C1E7,
    cr4: 0x0037_67FF,
    secondary: 0x005F_BCFF,
    ept_vpid: 0x0F01_0673_4141,
    ..INTEL
}
.cpu();

/// QEMU's.
pub(super) const SKYLAKE_SP: Cpu = Modern {
    name: "Skylake-SP",
    signature: 0x50654,
    basic: 0x00DA_0400_0000_0004,
    pin: 0xFF,
    exit: 0x01FF_FFFF,
    entry: 0x0003_FFFF,
    misc: 0x7004_C1E7,
    cr4: 0x0077_67FF,
    secondary: 0x0013_7BFF,
    ept_vpid: 0x0F01_0633_4041,
    ..INTEL
}
.cpu();

/// QEMU's.
pub(super) const ICE_LAKE_SP: Cpu = Modern {
    name: "Ice Lake-SP",
    signature: 0x606A6,
    cr4: 0x0077_7FFF,
    ept_vpid: 0x0F01_0633_40C1,
    ..SKYLAKE_SP_MODEL
}
.cpu();

/// QEMU's.
pub(super) const SAPPHIRE_RAPIDS: Cpu = Modern {
    name: "Sapphire Rapids",
    signature: 0x806F8,
    cr4: 0x01F7_7FFF,
    ept_vpid: 0x0F01_0633_40C1,
    ..SKYLAKE_SP_MODEL
}
.cpu();

const SKYLAKE_SP_MODEL: Modern = Modern {
    basic: 0x00DA_0400_0000_0004,
    pin: 0xFF,
    exit: 0x01FF_FFFF,
    entry: 0x0003_FFFF,
    misc: 0x7004_C1E7,
    secondary: 0x0013_7BFF,
    ..INTEL
};

/// QEMU's: Zhaoxin's YongFeng.
pub(super) const YONGFENG: Cpu = Modern {
    name: "YongFeng",
    signature: 0x706B0,
    pin: 0xFF,
    misc: 0x2004_0065,
    cr4: 0x0037_27FF,
    secondary: 0x0002_7BFF,
    ept_vpid: 0x0F01_0633_4041,
    ..INTEL
}
.cpu();

/// Bochs' corei7_skylake_x.
pub(super) const BOCHS_SKYLAKE_X: Cpu = Modern {
    name: "Bochs corei7_skylake_x",
    signature: 0x50654,
    basic: 0x00D8_1000_0000_002B,
    pin: 0xFF,
    exit: 0x407F_FFFF,
    misc: 0x6004_01E0,
    cr4: 0x0037_27FF,
    secondary: 0x0257_7FFF,
    ept_vpid: 0x0F01_0673_4141,
    ..INTEL
}
.cpu();

/// Bochs' tigerlake: with CET, so secondary VM-exit controls, and sub-page permissions.
pub(super) const BOCHS_TIGERLAKE: Cpu = Modern {
    name: "Bochs tigerlake",
    signature: 0x806C1,
    basic: 0x01D8_1000_0000_0004,
    pin: 0xFF,
    exit: 0xD07F_FFFF,
    entry: 0x0010_FFFF,
    misc: 0x6004_01E0,
    cr4: 0x00F7_2FFF,
    secondary: 0x02D7_7FFF,
    ept_vpid: 0x0F01_06F3_4141,
    ..INTEL
}
.cpu();

/// Dump of a VIA QuadCore L4700; VirtualBox has the same MSRs under the name of Zhaoxin's KX-U5581.
pub(super) const VIA_L4700: Cpu = Cpu {
    name: "VIA L4700",
    msrs: CapabilityMsrs {
        signature: 0x6FD,
        basic: 0x001A_0400_0000_0007,
        pin: word(0x16, 0x3F),
        primary: word(0x0401_E172, 0x77F9_FFFE),
        exit: word(0x0003_6DFF, 0x0003_EFFF),
        entry: word(0x11FF, 0x1FFF),
        misc: 0x0004_03C0,
        cr0_fixed0: 0x8000_0021,
        cr0_fixed1: 0xFFFF_FFFF,
        cr4_fixed0: 0x2000,
        cr4_fixed1: 0x27FF,
        secondary: 0,
        ept_vpid: 0,
        true_pin: 0,
        true_primary: 0,
        true_exit: 0,
        true_entry: 0,
    },
};
