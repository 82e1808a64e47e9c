// SPDX-License-Identifier: GPL-2.0
#![forbid(unsafe_code)]

use super::*;
use crate::abi::FromZeros;
use crate::arch::cpuid::Vendor;
use crate::policy::cpuid::PV_FEATURES;
use std::vec::Vec;

fn supported(vendor: Vendor) -> GuestCaps {
    GuestCaps {
        vendor,
        physical_bits: 48,
        efer: efer::SCE | efer::LME | efer::LMA | efer::NXE,
        spec_ctrl: 7,
        pred_cmd: 1,
        x2apic: true,
        tsc_deadline: true,
        tsc_adjust: true,
        rdtscp: true,
        tsc_aux: true,
        arch_capabilities: vendor == Vendor::Intel,
        flush_cmd: vendor == Vendor::Intel,
        lfence_serializing: true,
        ..GuestCaps::default()
    }
}

fn config(vendor: Vendor) -> MsrConfig {
    MsrConfig {
        supported: supported(vendor),
        pv_features: PV_FEATURES,
        arch_capabilities: if vendor == Vendor::Intel { 0x2B } else { 0 },
        microcode: 0x0100_0065,
        pmu: PmuCaps::NONE,
    }
}

/// A vCPU with the registers that live elsewhere beside it.
struct Bench {
    config: MsrConfig,
    caps: GuestCaps,
    state: MsrState,
    efer: u64,
    paging: bool,
    pv_features: u32,
    platform_info: bool,
}

impl Bench {
    fn new(vendor: Vendor) -> Self {
        let config = config(vendor);
        Self {
            caps: config.supported,
            state: MsrState::new(&config, true),
            config,
            efer: 0,
            paging: false,
            pv_features: u32::MAX,
            platform_info: true,
        }
    }

    fn context(&self, by: By) -> Context<'_> {
        let Self { config, caps, efer, paging, pv_features, platform_info, .. } = self;
        Context {
            config,
            caps,
            by,
            efer: *efer,
            paging: *paging,
            pv_features: *pv_features,
            platform_info: *platform_info,
        }
    }

    fn read(&self, by: By, index: u32) -> Read {
        self.state.read(&self.context(by), index)
    }

    fn write(&mut self, by: By, index: u32, value: u64) -> Write {
        let Self { config, caps, efer, paging, pv_features, platform_info, .. } = *self;
        let cx = Context { config: &config, caps: &caps, by, efer, paging, pv_features, platform_info };
        self.state.write(&cx, index, value)
    }

    /// Writes by the guest must all be taken and read back.
    fn kept(&mut self, index: u32, values: &[u64]) {
        for value in values {
            assert_ne!(self.write(By::Guest, index, *value), Write::Gp, "{index:#x} {value:#x}");
            assert_eq!(self.read(By::Guest, index), Read::Value(*value), "{index:#x} {value:#x}");
        }
    }

    fn refused(&mut self, index: u32, values: &[u64]) {
        for value in values {
            let before = self.read(By::Host, index);
            assert_eq!(self.write(By::Guest, index, *value), Write::Gp, "{index:#x} {value:#x}");
            assert_eq!(self.read(By::Host, index), before, "a refused write changed {index:#x}");
        }
    }
}

/// What QEMU asserts: every MSR it found or knows can be written with what was read.
#[test]
fn host_writes_back_whatever_it_reads() {
    for vendor in [Vendor::Amd, Vendor::Intel] {
        let mut bench = Bench::new(vendor);
        bench.state.setup_mce(10 | MCE_CAP_SUPPORTED).unwrap();
        // Userspace gave the guest nothing at all.
        bench.caps = GuestCaps::default();
        let mut indices: Vec<u32> = index_list(&bench.config).collect();
        indices.extend(feature_list(&bench.config));
        indices.extend(msr::MTRR_PHYSBASE0..msr::MTRR_PHYSBASE0 + 16);
        indices.extend([msr::MTRR_DEF_TYPE, msr::MTRR_FIX64K_00000, 0x258, 0x259, msr::EFER, msr::FS_BASE]);
        indices.extend(msr::MTRR_FIX4K_C0000..=msr::MTRR_FIX4K_F8000);
        indices.extend(msr::MC0_CTL..msr::MC0_CTL + 40);
        indices.extend([msr::APIC_BASE, msr::MCG_CTL, msr::MCG_STATUS]);
        for index in indices {
            match bench.read(By::Host, index) {
                Read::Gp => panic!("{index:#x} cannot be read"),
                Read::Value(value) => assert_ne!(bench.write(By::Host, index, value), Write::Gp, "{index:#x}"),
                Read::Register(register) => {
                    assert_eq!(bench.write(By::Host, index, 0), Write::Register(register, 0), "{index:#x}");
                }
            }
            // QEMU resets most of them to 0.
            if index != msr::FEATURE_CONTROL {
                assert_ne!(bench.write(By::Host, index, 0), Write::Gp, "{index:#x}");
            }
        }
    }
}

/// What Firecracker and its kin set before the first run.
#[test]
fn boot_msrs_of_the_small_monitors() {
    let mut bench = Bench::new(Vendor::Amd);
    for index in [0x174, 0x175, 0x176, 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0102, 0x10] {
        assert!(matches!(bench.write(By::Host, index, 0), Write::Register(_, 0)), "{index:#x}");
    }
    assert_eq!(bench.write(By::Host, msr::MISC_ENABLE, 1), Write::Done);
    assert_eq!(bench.write(By::Host, msr::MTRR_DEF_TYPE, 0x806), Write::Done);
}

#[test]
fn lists_have_no_duplicates_and_follow_the_host() {
    for vendor in [Vendor::Amd, Vendor::Intel] {
        let mut list: Vec<u32> = index_list(&config(vendor)).collect();
        let count = list.len();
        list.sort_unstable();
        list.dedup();
        assert_eq!(list.len(), count);
        assert!(list.contains(&msr::HWCR));
        assert_eq!(list.contains(&msr::ARCH_CAPABILITIES), vendor == Vendor::Intel);
    }
    let mut poor = config(Vendor::Amd);
    poor.pv_features = 0;
    poor.supported = GuestCaps { vendor: Vendor::Amd, ..GuestCaps::default() };
    let list: Vec<u32> = index_list(&poor).collect();
    for absent in [msr::KVM_STEAL_TIME, msr::KVM_SYSTEM_TIME, msr::TSC_AUX, msr::SPEC_CTRL] {
        assert!(!list.contains(&absent), "{absent:#x}");
    }
    assert_eq!(feature_value(&config(Vendor::Amd), msr::DE_CFG), Some(2));
    assert_eq!(feature_value(&config(Vendor::Intel), msr::DE_CFG), None);
    assert_eq!(feature_value(&config(Vendor::Intel), msr::ARCH_CAPABILITIES), Some(0x2B));
    assert_eq!(feature_value(&config(Vendor::Amd), msr::PAT), None);
    assert_eq!(feature_list(&config(Vendor::Amd)).count(), 3, "an empty list trips a QEMU assert");
}

#[test]
fn unknown_msrs_fault() {
    let mut bench = Bench::new(Vendor::Amd);
    let unknown = [
        0x2,
        0x13,
        0x9E,
        0xE7,
        0xE8,
        0x140,
        0x17C,
        0x1DA,
        0x210,
        0x251,
        0x25A,
        0x270,
        0x278,
        0x2A0,
        0x300,
        0x480,
        0x6E1,
        0x7FF,
        0x900,
        0xDA0,
        0x4000_0000,
        0x4B56_4D02,
        0x4B56_4D05,
        0x4B56_4D06,
        0xC000_0085,
        0xC000_0104,
        0xC001_0114,
        0xC001_0117,
        0xC001_0200,
        0xC001_1020,
        0xC001_1030,
        u32::MAX,
    ];
    for index in unknown {
        for by in [By::Guest, By::Host] {
            assert_eq!(bench.read(by, index), Read::Gp, "{index:#x}");
            assert_eq!(bench.write(by, index, 0), Write::Gp, "{index:#x}");
        }
    }
    // AMD's are not there for a guest of another make, but for HWCR, as in KVM.
    bench.caps.vendor = Vendor::Intel;
    bench.kept(msr::HWCR, &[1 << 24, 0]);
    bench.refused(msr::HWCR, &[1]);
    for index in [msr::SYSCFG, msr::DE_CFG, msr::OSVW_STATUS, msr::K7_EVNTSEL0] {
        assert_eq!(bench.read(By::Guest, index), Read::Gp, "{index:#x}");
        assert_eq!(bench.write(By::Guest, index, 0), Write::Gp, "{index:#x}");
    }
}

#[test]
fn xss_is_zero() {
    let mut bench = Bench::new(Vendor::Intel);
    bench.caps.xsaves = true;
    assert_eq!(bench.read(By::Guest, msr::XSS), Read::Value(0));
    bench.kept(msr::XSS, &[0]);
    bench.refused(msr::XSS, &[1, 1 << 8, 1 << 11, 1 << 63]);
}

#[test]
fn what_linux_reads_at_boot_is_there() {
    let bench = Bench::new(Vendor::Amd);
    for (index, value) in [
        (msr::SYSCFG, 0),
        (msr::HWCR, 0),
        (msr::UCODE_REV, 0x0100_0065),
        (msr::MTRR_CAP, 0x508),
        (msr::PAT, PAT_RESET),
        (msr::MISC_ENABLE, 0x1800),
        (msr::OSVW_ID_LENGTH, 3),
        (msr::OSVW_STATUS, 0),
        (msr::INT_PENDING, 0),
        (msr::DE_CFG, 0),
        (msr::K7_EVNTSEL0, 0),
        (msr::DEBUGCTL, 0),
        (msr::MCG_CAP, 32),
        (msr::RAPL_POWER_UNIT, 0),
    ] {
        assert_eq!(bench.read(By::Guest, index), Read::Value(value), "{index:#x}");
    }
}

#[test]
fn pat() {
    let mut bench = Bench::new(Vendor::Amd);
    bench.kept(msr::PAT, &[0, PAT_RESET, 0x0407_0105_0007_0106]);
    assert_eq!(bench.write(By::Guest, msr::PAT, PAT_RESET), Write::Effect(Effect::Pat(PAT_RESET)));
    for entry in 0..8 {
        for kind in 0..=0xFFu64 {
            let valid = matches!(kind, 0 | 1 | 4 | 5 | 6 | 7);
            assert_eq!(pat_valid(kind << (8 * entry)), valid, "{kind}");
        }
    }
    bench.refused(msr::PAT, &[2, 3, 8, 0x0200_0000_0000_0000]);
    assert_eq!(bench.state.pat(), PAT_RESET);
}

#[test]
fn mtrrs() {
    let mut bench = Bench::new(Vendor::Amd);
    bench.kept(msr::MTRR_DEF_TYPE, &[0xC06, 0x806, 0, 1]);
    bench.refused(msr::MTRR_DEF_TYPE, &[2, 7, 0x100, 0x1006, 1 << 63]);
    for index in [0x250, 0x258, 0x259, 0x268, 0x26B, 0x26F] {
        bench.kept(index, &[0x0606_0606_0606_0606, 0x0001_0405_0606_0504, 0]);
        bench.refused(index, &[2, 0x0300, 7 << 56]);
    }
    for range in 0..8 {
        bench.kept(0x200 + 2 * range, &[0x8000_0006, 0xFFFF_FFFF_F001]);
        bench.refused(0x200 + 2 * range, &[2, 0x106, 1 << 48 | 6]);
        bench.kept(0x201 + 2 * range, &[0xFFFF_8000_0800, 0x8000_0000]);
        bench.refused(0x201 + 2 * range, &[1, 0x400, 1 << 48 | 0x800]);
    }
    bench.refused(msr::MTRR_CAP, &[0x508, 0]);
    assert_eq!(bench.write(By::Host, msr::MTRR_CAP, 0x508), Write::Gp);
}

#[test]
fn machine_checks() {
    let mut bench = Bench::new(Vendor::Amd);
    for bad in [0, 33, 0xFF, 10 | 1 << 9, 10 | 1 << 10, 10 | 1 << 27, u64::MAX] {
        assert_eq!(bench.state.setup_mce(bad), Err(BadMce), "{bad:#x}");
    }
    assert_eq!(bench.read(By::Guest, msr::MCG_CTL), Read::Gp, "no MCG_CTL before the setup");
    assert_eq!(bench.read(By::Host, msr::MCG_CTL), Read::Value(0));
    assert_eq!(bench.write(By::Host, msr::MCG_CTL, 0), Write::Done);
    bench.state.setup_mce(10 | 1 << 8 | 1 << 24).unwrap();
    assert_eq!(bench.read(By::Guest, msr::MCG_CAP), Read::Value(0x0100_010A));
    assert_eq!(bench.read(By::Guest, msr::MCG_CTL), Read::Value(u64::MAX));
    bench.refused(msr::MCG_CTL, &[1, u64::MAX - 1]);
    bench.kept(msr::MCG_CTL, &[0, u64::MAX]);
    bench.kept(msr::MCG_STATUS, &[4, 0]);
    for bank in 0..10 {
        let ctl = msr::MC0_CTL + 4 * bank;
        assert_eq!(bench.read(By::Guest, ctl), Read::Value(u64::MAX));
        bench.kept(ctl, &[0, u64::MAX, u64::MAX - 0x400, u64::MAX - 1]);
        bench.refused(ctl, &[1, u64::MAX - 2]);
        bench.kept(ctl + 1, &[0]);
        bench.refused(ctl + 1, &[1 << 63]);
        assert_eq!(bench.write(By::Host, ctl + 1, 1 << 63), Write::Done);
        bench.kept(ctl + 2, &[0x1234]);
    }
    for beyond in [msr::MC0_CTL + 40, msr::MC0_CTL + 127, msr::MC0_CTL + 128] {
        assert_eq!(bench.read(By::Host, beyond), Read::Gp);
        assert_eq!(bench.write(By::Host, beyond, 0), Write::Gp);
    }
    bench.kept(msr::HWCR, &[1 << 18 | 1 << 24]);
    bench.kept(msr::MC0_CTL + 1, &[1 << 63]);
    // Interrupts for corrected errors are not there: CTL2 is the host's alone.
    assert_eq!(bench.read(By::Guest, msr::MC0_CTL2), Read::Gp);
    assert_eq!(bench.read(By::Host, msr::MC0_CTL2 + 9), Read::Value(0));
    assert_eq!(bench.write(By::Host, msr::MC0_CTL2, 0), Write::Done);
    assert_eq!(bench.write(By::Host, msr::MC0_CTL2, 1 << 30), Write::Gp);
    assert_eq!(bench.read(By::Host, msr::MC0_CTL2 + 10), Read::Gp);
}

#[test]
fn efer_rules() {
    let mut bench = Bench::new(Vendor::Amd);
    let write = |bench: &mut Bench, value| bench.write(By::Guest, msr::EFER, value);
    let to = |value| Write::Register(Register::Hardware(HardwareMsr::Efer), value);
    assert_eq!(write(&mut bench, 0xD01), to(0x901), "LMA is not writable");
    for bad in [efer::SVME, efer::LMSLE, efer::FFXSR, efer::AIBRSE, 2, 1 << 63] {
        assert_eq!(write(&mut bench, bad), Write::Gp, "{bad:#x}");
        assert_eq!(bench.write(By::Host, msr::EFER, bad), Write::Gp, "{bad:#x}");
    }
    bench.efer = efer::LME | efer::LMA | efer::SCE;
    bench.paging = true;
    assert_eq!(write(&mut bench, efer::LME | efer::NXE), to(efer::LME | efer::LMA | efer::NXE));
    assert_eq!(write(&mut bench, efer::NXE), Write::Gp, "LME cannot change under paging");
    assert_eq!(bench.write(By::Host, msr::EFER, efer::NXE), to(efer::NXE | efer::LMA));
    bench.caps.efer = efer::SCE;
    assert_eq!(write(&mut bench, efer::NXE | efer::LME), Write::Gp, "not in the guest's CPUID");
}

#[test]
fn addresses_must_be_canonical() {
    let mut bench = Bench::new(Vendor::Amd);
    let low = 0x0000_8000_0000_0000u64;
    for index in [msr::LSTAR, msr::CSTAR, msr::FS_BASE, msr::GS_BASE, msr::KERNEL_GS_BASE] {
        for by in [By::Guest, By::Host] {
            assert_eq!(bench.write(by, index, low), Write::Gp, "{index:#x}");
            assert!(matches!(bench.write(by, index, low - 1), Write::Register(..)));
            assert!(matches!(bench.write(by, index, 0xFFFF_8000_0000_0000), Write::Register(..)));
        }
    }
    let [esp, cs] = [Register::Hardware(HardwareMsr::SysenterEsp), Register::Hardware(HardwareMsr::SysenterCs)];
    assert_eq!(bench.write(By::Guest, msr::SYSENTER_ESP, 0xFFFF_8880_1234_5678), Write::Register(esp, 0x1234_5678));
    assert_eq!(bench.write(By::Guest, msr::SYSENTER_CS, 1 << 32 | 0x10), Write::Register(cs, 0x10));
    bench.caps.vendor = Vendor::Intel;
    assert_eq!(bench.write(By::Guest, msr::SYSENTER_ESP, low), Write::Register(esp, 0xFFFF_8000_0000_0000));
}

#[test]
fn speculation_control() {
    let mut bench = Bench::new(Vendor::Amd);
    let spec_ctrl = |value| Write::Register(Register::Hardware(HardwareMsr::SpecCtrl), value);
    assert_eq!(bench.write(By::Guest, msr::SPEC_CTRL, 5), spec_ctrl(5));
    assert_eq!(bench.write(By::Guest, msr::SPEC_CTRL, 8), Write::Gp);
    assert_eq!(bench.read(By::Guest, msr::PRED_CMD), Read::Gp, "write-only");
    assert_eq!(bench.write(By::Guest, msr::PRED_CMD, 0), Write::Done);
    assert_eq!(bench.write(By::Guest, msr::PRED_CMD, 1), Write::Effect(Effect::PredCmd(1)));
    assert_eq!(bench.write(By::Guest, msr::PRED_CMD, 0x80), Write::Gp);
    assert_eq!(bench.write(By::Guest, msr::FLUSH_CMD, 1), Write::Gp);
    bench.caps.spec_ctrl = 0;
    bench.caps.pred_cmd = 0;
    assert_eq!(bench.read(By::Guest, msr::SPEC_CTRL), Read::Gp);
    assert_eq!(bench.write(By::Guest, msr::SPEC_CTRL, 0), Write::Gp);
    assert_eq!(bench.write(By::Guest, msr::PRED_CMD, 0), Write::Gp);
    assert_eq!(bench.write(By::Host, msr::SPEC_CTRL, 1), spec_ctrl(1), "the host is not bound by the guest's CPUID");
    bench.config.supported.pred_cmd = 0;
    assert_eq!(bench.write(By::Host, msr::PRED_CMD, 1), Write::Gp, "but by the CPU");

    let mut intel = Bench::new(Vendor::Intel);
    assert_eq!(intel.write(By::Guest, msr::FLUSH_CMD, 1), Write::Effect(Effect::FlushCmd(1)));
    assert_eq!(intel.write(By::Guest, msr::FLUSH_CMD, 3), Write::Gp);
    assert_eq!(intel.read(By::Guest, msr::ARCH_CAPABILITIES), Read::Value(0x2B));
    intel.refused(msr::ARCH_CAPABILITIES, &[0x2B, 0]);
    assert_eq!(intel.write(By::Host, msr::ARCH_CAPABILITIES, 1), Write::Done);
    assert_eq!(intel.read(By::Guest, msr::ARCH_CAPABILITIES), Read::Value(1));
}

#[test]
fn time_stamp_counter() {
    let mut bench = Bench::new(Vendor::Amd);
    assert_eq!(bench.read(By::Guest, msr::TSC), Read::Register(Register::Tsc));
    assert_eq!(bench.write(By::Guest, msr::TSC_ADJUST, 100), Write::Effect(Effect::TscOffset(100)));
    assert_eq!(bench.write(By::Guest, msr::TSC_ADJUST, 40), Write::Effect(Effect::TscOffset(0u64.wrapping_sub(60))));
    assert_eq!(bench.write(By::Host, msr::TSC_ADJUST, 7), Write::Done);
    bench.state.moved_tsc(u64::MAX);
    assert_eq!(bench.read(By::Guest, msr::TSC_ADJUST), Read::Value(6));
    let aux = |value| Write::Register(Register::TscAux, value);
    assert_eq!(bench.write(By::Guest, msr::TSC_AUX, 1 << 32 | 5), aux(5));
    let sfmask = Register::Hardware(HardwareMsr::Sfmask);
    assert_eq!(bench.write(By::Guest, msr::SFMASK, 1 << 32 | 5), Write::Register(sfmask, 1 << 32 | 5));
    bench.caps.vendor = Vendor::Intel;
    assert_eq!(bench.write(By::Guest, msr::TSC_AUX, 1 << 32 | 5), Write::Gp);
    assert_eq!(bench.write(By::Guest, msr::SFMASK, 1 << 32 | 5), Write::Gp);
    bench.caps.tsc_aux = false;
    assert_eq!(bench.write(By::Guest, msr::TSC_AUX, 5), Write::Gp);
    bench.caps.tsc_deadline = false;
    bench.caps.tsc_adjust = false;
    assert_eq!(bench.write(By::Guest, msr::TSC_DEADLINE, 5), Write::Gp);
    assert_eq!(bench.write(By::Guest, msr::TSC_ADJUST, 5), Write::Gp);
    assert_eq!(bench.read(By::Guest, msr::TSC_ADJUST), Read::Gp);
}

#[test]
fn paravirtual_clocks() {
    let mut bench = Bench::new(Vendor::Amd);
    let mut write = |index, value| bench.write(By::Guest, index, value);
    assert_eq!(write(msr::KVM_SYSTEM_TIME_NEW, 0x1001), Write::Effect(Effect::SystemTime(Some(Gpa(0x1000)))));
    assert_eq!(write(msr::KVM_SYSTEM_TIME, 0x1000), Write::Effect(Effect::SystemTime(None)));
    assert_eq!(write(msr::KVM_WALL_CLOCK_NEW, 0x2000), Write::Effect(Effect::WallClock(Gpa(0x2000))));
    assert_eq!(write(msr::KVM_WALL_CLOCK, 0), Write::Done);
    assert_eq!(write(msr::KVM_STEAL_TIME, 0x3041), Write::Effect(Effect::StealTime(Some(Gpa(0x3040)))));
    assert_eq!(write(msr::KVM_STEAL_TIME, 0x3043), Write::Gp);
    assert_eq!(write(msr::KVM_STEAL_TIME, 0x3021), Write::Gp);
    assert_eq!(write(msr::KVM_PV_EOI_EN, 0x4001), Write::Effect(Effect::PvEoi(Some(Gpa(0x4000)))));
    assert_eq!(write(msr::KVM_PV_EOI_EN, 0x4002), Write::Gp);
    assert_eq!(write(msr::KVM_SYSTEM_TIME, 0x5001), Write::Effect(Effect::SystemTime(Some(Gpa(0x5000)))));
    assert_eq!(bench.read(By::Guest, msr::KVM_SYSTEM_TIME_NEW), Read::Value(0x5001));
    assert_eq!(bench.read(By::Guest, msr::KVM_STEAL_TIME), Read::Value(0x3041));
    assert_eq!((bench.state.system_time(), bench.state.steal_time()), (Some(Gpa(0x5000)), Some(Gpa(0x3040))));
    bench.state.init();
    assert_eq!((bench.state.system_time(), bench.state.steal_time()), (None, None));
    bench.config.pv_features = 0;
    for index in [0x11, 0x12, 0x4B56_4D00, 0x4B56_4D01, 0x4B56_4D03, 0x4B56_4D04] {
        assert_eq!(bench.read(By::Guest, index), Read::Gp);
        assert_eq!(bench.write(By::Guest, index, 0x1001), Write::Gp);
    }
}

#[test]
fn read_only_and_forgiving_ones() {
    let mut bench = Bench::new(Vendor::Amd);
    bench.refused(msr::PLATFORM_INFO, &[0, 1]);
    assert_eq!(bench.write(By::Host, msr::PLATFORM_INFO, 5), Write::Done);
    assert_eq!(bench.write(By::Guest, msr::UCODE_REV, 9), Write::Done);
    assert_eq!(bench.read(By::Guest, msr::UCODE_REV), Read::Value(0x0100_0065));
    assert_eq!(bench.write(By::Host, msr::UCODE_REV, 9), Write::Done);
    assert_eq!(bench.read(By::Guest, msr::UCODE_REV), Read::Value(9));
    bench.refused(msr::MISC_ENABLE, &[0, 0x800]);
    assert_eq!(bench.write(By::Guest, msr::MISC_ENABLE, 0x1881), Write::Done);
    assert_eq!(bench.read(By::Guest, msr::MISC_ENABLE), Read::Value(0x1801), "EMON does not stick");
    assert_eq!(bench.write(By::Guest, msr::HWCR, 0x0100_0148), Write::Done);
    assert_eq!(bench.read(By::Guest, msr::HWCR), Read::Value(0x0100_0000));
    bench.refused(msr::HWCR, &[1, 1 << 30, 1 << 35]);
    bench.refused(msr::DE_CFG, &[1, 0x200]);
    bench.kept(msr::DE_CFG, &[0, 2]);
    bench.refused(msr::MMIO_CONF_BASE, &[1]);
    assert_eq!(bench.write(By::Guest, msr::MMIO_CONF_BASE, 0), Write::Done);
    assert_eq!(bench.write(By::Guest, msr::K7_PERFCTR3, 0xABCD), Write::Done);
    assert_eq!(bench.read(By::Guest, msr::K7_PERFCTR3), Read::Value(0));
    assert_eq!(bench.write(By::Guest, msr::DEBUGCTL, 2), Write::Done);
    bench.refused(msr::DEBUGCTL, &[1 << 6, 1 << 14]);
    assert_eq!(bench.read(By::Guest, msr::FEATURE_CONTROL), Read::Gp, "Intel's");
    let mut intel = Bench::new(Vendor::Intel);
    assert_eq!(intel.read(By::Guest, msr::FEATURE_CONTROL), Read::Value(1));
    intel.refused(msr::FEATURE_CONTROL, &[0, 1, 5]);
    assert_eq!(intel.write(By::Host, msr::FEATURE_CONTROL, 5), Write::Gp);
}

#[test]
fn x2apic_numbers() {
    let mut bench = Bench::new(Vendor::Amd);
    assert_eq!(bench.read(By::Guest, 0x80B), Read::Register(Register::X2Apic(0x0B)));
    assert_eq!(bench.write(By::Guest, 0x8FF, 3), Write::Register(Register::X2Apic(0xFF), 3));
    assert_eq!(bench.write(By::Guest, msr::APIC_BASE, u64::MAX), Write::Register(Register::ApicBase, u64::MAX));
}

/// No index and no value may panic, and a refused write may not change anything.
#[test]
fn random_accesses() {
    let mut state = 0x0123_4567_89AB_CDEFu64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bench = Bench::new(Vendor::Amd);
    bench.state.setup_mce(32 | MCE_CAP_SUPPORTED).unwrap();
    let bases = [0u32, 0x200, 0x280, 0x400, 0x800, 0x4B56_4D00, 0xC000_0080, 0xC001_0000, 0xC001_1000];
    for round in 0..300_000u32 {
        let index = bases[random() as usize % bases.len()].wrapping_add(random() as u32 & 0x1FF);
        let value = random() & u64::MAX.checked_shr(random() as u32 & 63).unwrap_or(0);
        let by = if round % 2 == 0 { By::Guest } else { By::Host };
        let before = bench.read(By::Host, index);
        if bench.write(by, index, value) == Write::Gp {
            assert_eq!(bench.read(By::Host, index), before, "{index:#x}");
        }
    }
}

#[test]
fn userspace_may_hide_platform_info_and_paravirtual_msrs() {
    let mut bench = Bench::new(Vendor::Amd);
    assert_eq!(bench.write(By::Host, msr::PLATFORM_INFO, 0x1200), Write::Done);
    assert_eq!(bench.read(By::Guest, msr::PLATFORM_INFO), Read::Value(0x1200));
    bench.platform_info = false;
    assert_eq!(bench.read(By::Guest, msr::PLATFORM_INFO), Read::Gp);
    assert_eq!(bench.read(By::Host, msr::PLATFORM_INFO), Read::Value(0x1200));
    bench.pv_features = kvm_eax::CLOCKSOURCE2;
    assert_eq!(bench.read(By::Guest, msr::KVM_SYSTEM_TIME), Read::Gp);
    assert_eq!(bench.read(By::Guest, msr::KVM_SYSTEM_TIME_NEW), Read::Value(0));
    assert_eq!(bench.write(By::Guest, msr::KVM_STEAL_TIME, 0), Write::Gp);
    for index in [msr::KVM_STEAL_TIME, msr::KVM_PV_EOI_EN] {
        assert_eq!(bench.read(By::Guest, index), Read::Gp);
        assert_eq!(bench.read(By::Host, index), Read::Value(0));
        assert!(matches!(bench.write(By::Host, index, 0), Write::Effect(_)));
        assert_eq!(bench.write(By::Host, index, 0x4001), Write::Gp);
    }
}

#[test]
fn an_unknown_msr_is_told_from_a_wrong_access() {
    let bench = Bench::new(Vendor::Amd);
    let knows = |index| bench.state.knows(&bench.context(By::Guest), index);
    assert!(knows(msr::EFER) && knows(msr::PAT) && knows(msr::PLATFORM_INFO) && knows(msr::PRED_CMD));
    assert!(!knows(0xDEAD_BEEF) && !knows(0x474F_4F00) && !knows(msr::FEATURE_CONTROL));
}

#[test]
fn machine_checks_that_userspace_reports() {
    let mut bench = Bench::new(Vendor::Amd);
    bench.state.setup_mce(10 | 1 << 8).unwrap();
    let (valid, over, uncorrected, corrupt) = (1u64 << 63, 1u64 << 62, 1u64 << 61, 1u64 << 57);
    let error = |bank, status, mcg_status| KvmX86Mce {
        status,
        addr: 0x1234,
        misc: 0x56,
        mcg_status,
        bank,
        ..KvmX86Mce::new_zeroed()
    };
    for bad in [error(10, valid, 0), error(255, valid, 0), error(0, !valid, 0)] {
        assert_eq!(bench.state.report_mce(&bad, true), Err(BadMce));
    }
    let bank_1 = |bench: &mut Bench| {
        [1, 2, 3].map(|n| match bench.read(By::Host, msr::MC0_CTL + 4 + n) {
            Read::Value(value) => value,
            other => panic!("{other:?}"),
        })
    };
    // Corrected ones, and what software may repair: no exception.
    assert_eq!(bench.state.report_mce(&error(1, valid, 0), true), Ok(Reported::Quietly));
    assert_eq!(bank_1(&mut bench), [valid, 0x1234, 0x56]);
    assert_eq!(bench.state.report_mce(&error(1, valid | 7, 0), true), Ok(Reported::Quietly));
    assert_eq!(bank_1(&mut bench)[0], valid | over | 7);
    assert_eq!(bench.state.report_mce(&error(1, valid | uncorrected, 0), true), Ok(Reported::Quietly));
    assert_eq!(bank_1(&mut bench)[0], valid | uncorrected);
    assert_eq!(bench.state.report_mce(&error(1, valid | 9, 0), true), Ok(Reported::Quietly));
    assert_eq!(bank_1(&mut bench)[0], valid | over | uncorrected, "the worse one stays");
    // One that the guest must hear of; not while it handles one, nor when it does not take any.
    let fatal = valid | uncorrected | corrupt;
    assert_eq!(bench.state.report_mce(&error(1, fatal, 5), false), Ok(Reported::Shutdown));
    assert_eq!(bench.state.report_mce(&error(1, fatal, 5), true), Ok(Reported::MachineCheck));
    assert_eq!(bank_1(&mut bench)[0], fatal | over);
    assert_eq!(bench.read(By::Guest, msr::MCG_STATUS), Read::Value(5));
    assert_eq!(bench.state.report_mce(&error(1, fatal, 5), true), Ok(Reported::Shutdown));
    // Reporting is off, in the bank or everywhere.
    assert_eq!(bench.write(By::Guest, msr::MCG_STATUS, 0), Write::Done);
    assert_eq!(bench.write(By::Guest, msr::MC0_CTL + 8, 0), Write::Done);
    assert_eq!(bench.state.report_mce(&error(2, fatal, 5), false), Ok(Reported::Quietly));
    assert_eq!(bench.read(By::Guest, msr::MC0_CTL + 9), Read::Value(0));
    assert_eq!(bench.write(By::Guest, msr::MCG_CTL, 0), Write::Done);
    assert_eq!(bench.state.report_mce(&error(3, fatal, 5), false), Ok(Reported::Quietly));
}
