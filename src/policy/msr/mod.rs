// SPDX-License-Identifier: GPL-2.0
//! The MSR policy: what RDMSR, WRMSR, KVM_GET_MSRS and KVM_SET_MSRS do. SDM Vol. 4, APM Vol. 2 "MSR Cross-Reference".
//!
//! MSRs that are plain state live here. Those that are hardware state, or another room's, come back as a [`Register`],
//! with the value already checked; writes with a consequence come back as an [`Effect`]. An MSR that is on no list
//! raises #GP.
//!
//! Performance counters are those of [`pmu`](super::pmu); without them the old ones read 0 and swallow writes. Not supported:
//! last-branch records, SMM, power management beyond what an old kernel reads at boot, SVM and VMX for guests, bits of XSS, CET, PT.
#![forbid(unsafe_code)]

mod constant;
pub mod filter;
mod list;
mod mce;
mod mtrr;

#[cfg(test)]
mod tests;

pub use list::{feature_list, feature_value, index_list};
pub use mce::{BadMce, Reported, MCE_CAP_SUPPORTED};

use super::{caps::GuestCaps, pmu::PmuCaps};
use crate::abi::{pvclock::KVM_STEAL_TIME_RESERVED, vcpu::KvmX86Mce};
use crate::arch::addr::{is_canonical, Gpa};
use crate::arch::cpuid::{kvm_eax, Vendor};
use crate::arch::{cr::efer, msr};

/// Who reads or writes. Userspace may write what a guest may only read, and sees MSRs that the guest's CPUID hides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Guest,
    Host,
}

/// What is the same for every vCPU on this host.
#[derive(Clone, Copy, Debug)]
pub struct MsrConfig {
    /// What [`supported`](super::cpuid::supported) gives, as [`GuestCaps::derive`] reads it.
    pub supported: GuestCaps,
    /// Paravirtual features that the module has, bits of [`kvm_eax`].
    pub pv_features: u32,
    /// The host's ARCH_CAPABILITIES, less what does not hold for a guest. 0 on AMD.
    pub arch_capabilities: u64,
    /// The host's UCODE_REV (PATCH_LEVEL), a feature MSR.
    pub microcode: u64,
    /// The performance counters that guests can have: another room's MSRs.
    pub pmu: PmuCaps,
}

/// What an access depends on beside the MSRs themselves.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    pub config: &'a MsrConfig,
    pub caps: &'a GuestCaps,
    pub by: By,
    /// EFER as the guest has it.
    pub efer: u64,
    /// CR0.PG.
    pub paging: bool,
    /// Paravirtual features that this guest may use, bits of [`kvm_eax`]; the module may have fewer.
    pub pv_features: u32,
    /// Whether the guest may read PLATFORM_INFO. KVM_CAP_MSR_PLATFORM_INFO.
    pub platform_info: bool,
}

/// State that hardware switches between guest and host, or that the vendor's room switches for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HardwareMsr {
    Efer,
    Star,
    Lstar,
    Cstar,
    Sfmask,
    FsBase,
    GsBase,
    KernelGsBase,
    SysenterCs,
    SysenterEsp,
    SysenterEip,
    /// Kept here; hardware has a copy that follows [`Effect::Pat`].
    Pat,
    SpecCtrl,
}

/// State that lives elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    Hardware(HardwareMsr),
    TscAux,
    /// The guest's TSC. A guest's write moves the offset, and TSC_ADJUST by as much
    /// ([`MsrState::moved_tsc`]); the host's write only the offset.
    Tsc,
    /// The local APIC checks the value.
    ApicBase,
    /// The local APIC's.
    TscDeadline,
    /// x2APIC register at this MMIO offset divided by 16, 0 to FFh: the local APIC checks the value.
    X2Apic(u8),
}

/// What a read comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    Value(u64),
    Register(Register),
    /// #GP in the guest; the end of KVM_GET_MSRS for the host.
    Gp,
}

/// What a write comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    Done,
    /// Put this value, which is valid, there.
    Register(Register, u64),
    /// Done here; this has to follow.
    Effect(Effect),
    Gp,
}

/// What has to follow a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The PAT has this value now.
    Pat(u64),
    /// Add to the offset of the guest's TSC.
    TscOffset(u64),
    /// kvmclock: keep the structure at this address up to date, or stop with `None`.
    SystemTime(Option<Gpa>),
    /// Write the wall clock there, once.
    WallClock(Gpa),
    /// Steal time: keep the structure at this address up to date, or stop with `None`.
    StealTime(Option<Gpa>),
    /// The EOI flag of paravirtual EOI is at this address, or nowhere.
    PvEoi(Option<Gpa>),
    /// Write this to the CPU's PRED_CMD.
    PredCmd(u64),
    /// Write this to the CPU's FLUSH_CMD.
    FlushCmd(u64),
}

/// The MSRs of one vCPU that are plain state.
#[derive(Clone, Debug)]
pub struct MsrState {
    pat: u64,
    mtrr: mtrr::Mtrr,
    mce: mce::Mce,
    misc_enable: u64,
    tsc_adjust: u64,
    microcode: u64,
    arch_capabilities: u64,
    platform_info: u64,
    feature_control: u64,
    power_ctl: u64,
    smi_count: u64,
    hwcr: u64,
    de_cfg: u64,
    osvw: [u64; 2],
    wall_clock: u64,
    system_time: u64,
    steal_time: u64,
    pv_eoi: u64,
}

/// PAT after reset: WB, WT, UC-, UC, twice. SDM Vol. 3 "Page Attribute Table (PAT)".
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// MISC_ENABLE: no branch trace store, no PEBS.
const MISC_ENABLE_READ_ONLY: u64 = 1 << 11 | 1 << 12;
/// MISC_ENABLE: MONITOR and MWAIT are there.
const MISC_ENABLE_MWAIT: u64 = 1 << 18;
/// MISC_ENABLE: performance monitoring available; writes are ignored.
const MISC_ENABLE_EMON: u64 = 1 << 7;
/// UCODE_REV of a new vCPU, as KVM has it.
const MICROCODE_AMD: u64 = 0x0100_0065;
const MICROCODE_INTEL: u64 = 1 << 32;
const FEATURE_CONTROL_LOCKED: u64 = 1 << 0;
/// HWCR: the TSC counts at the P0 frequency.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// HWCR: machine-check status registers may be written.
const HWCR_MC_STATUS_WRITE: u64 = 1 << 18;
/// HWCR bits that kernels set to work around errata that a guest does not have: cache disable for the TLB, flush filter,
/// IGNNE emulation.
const HWCR_IGNORED: u64 = 1 << 3 | 1 << 6 | 1 << 8;
/// DE_CFG: LFENCE is dispatch-serializing.
const DE_CFG_LFENCE: u64 = 1 << 1;
/// DEBUGCTL bits that AMD and Intel define for branch records, single-step on branches and pins. They do nothing here.
const DEBUGCTL_IGNORED: u64 = 0x3F;
const FLUSH_CMD_L1D: u64 = 1;
/// Bit 0 of the addresses that paravirtual MSRs hold.
const PV_ENABLED: u64 = 1;

impl MsrState {
    /// As after power-up. `stuffed`: feature MSRs begin with all that is supported, where KVM does so by default; else with 0.
    pub const fn new(config: &MsrConfig, stuffed: bool) -> Self {
        let microcode = if matches!(config.supported.vendor, Vendor::Amd) { MICROCODE_AMD } else { MICROCODE_INTEL };
        Self {
            pat: PAT_RESET,
            mtrr: mtrr::Mtrr::new(),
            mce: mce::Mce::new(),
            misc_enable: MISC_ENABLE_READ_ONLY,
            tsc_adjust: 0,
            microcode: if stuffed { microcode } else { 0 },
            arch_capabilities: if stuffed { config.arch_capabilities } else { 0 },
            platform_info: 0,
            feature_control: FEATURE_CONTROL_LOCKED,
            power_ctl: 0,
            smi_count: 0,
            hwcr: 0,
            de_cfg: 0,
            // The first three errata of the list are fixed here: idle and port instructions are intercepted.
            osvw: [3, 0],
            wall_clock: 0,
            system_time: 0,
            steal_time: 0,
            pv_eoi: 0,
        }
    }

    /// INIT, which leaves most MSRs alone. SDM Vol. 3 "IA-32 and Intel 64 Processor States Following Power-up, Reset, or INIT".
    pub fn init(&mut self) {
        self.steal_time = 0;
        self.system_time = 0;
        self.pv_eoi = 0;
    }

    /// The guest wrote its TSC, which moved it by `ticks`: TSC_ADJUST moves with it.
    pub fn moved_tsc(&mut self, ticks: u64) {
        self.tsc_adjust = self.tsc_adjust.wrapping_add(ticks);
    }

    /// The page attribute table.
    pub const fn pat(&self) -> u64 {
        self.pat
    }

    /// MISC_ENABLE: MONITOR and MWAIT are there.
    pub const fn mwait(&self) -> bool {
        self.misc_enable & MISC_ENABLE_MWAIT != 0
    }

    /// Where kvmclock is, if the guest turned it on.
    pub const fn system_time(&self) -> Option<Gpa> {
        enabled(self.system_time, 0)
    }

    /// Where steal time is, if the guest turned it on.
    pub const fn steal_time(&self) -> Option<Gpa> {
        enabled(self.steal_time, KVM_STEAL_TIME_RESERVED)
    }

    /// KVM_X86_SETUP_MCE.
    pub fn setup_mce(&mut self, mcg_cap: u64) -> Result<(), BadMce> {
        self.mce.setup(mcg_cap)
    }

    /// KVM_X86_SET_MCE. `takes`: the guest's CR4.MCE.
    pub fn report_mce(&mut self, error: &KvmX86Mce, takes: bool) -> Result<Reported, BadMce> {
        self.mce.report(error, takes)
    }

    /// Whether there is such an MSR at all, whoever may access it: what tells KVM_MSR_EXIT_REASON_INVAL from ..._UNKNOWN.
    pub fn knows(&self, cx: &Context<'_>, index: u32) -> bool {
        let cx = Context { by: By::Host, ..*cx };
        matches!(index, msr::PRED_CMD | msr::FLUSH_CMD | msr::UCODE_WRITE | msr::PATCH_LOADER)
            || self.read(&cx, index) != Read::Gp
    }

    /// RDMSR or KVM_GET_MSRS.
    pub fn read(&self, cx: &Context<'_>, index: u32) -> Read {
        let host = cx.by == By::Host;
        let caps = cx.visible();
        if let Some(register) = register(index) {
            return if cx.register_exists(register) { Read::Register(register) } else { Read::Gp };
        }
        let value = match index {
            msr::PAT => Some(self.pat),
            msr::MISC_ENABLE => Some(self.misc_enable),
            msr::TSC_ADJUST => caps.tsc_adjust.then_some(self.tsc_adjust),
            msr::UCODE_REV => Some(self.microcode),
            msr::ARCH_CAPABILITIES => caps.arch_capabilities.then_some(self.arch_capabilities),
            msr::PLATFORM_INFO => (host || cx.platform_info).then_some(self.platform_info),
            msr::FEATURE_CONTROL => (caps.vendor == Vendor::Intel).then_some(self.feature_control),
            msr::POWER_CTL => Some(self.power_ctl),
            msr::SMI_COUNT => Some(self.smi_count),
            msr::DEBUGCTL => Some(0),
            msr::XSS => caps.xsaves.then_some(0),
            msr::HWCR => Some(self.hwcr),
            msr::DE_CFG => cx.amd().then_some(self.de_cfg),
            msr::OSVW_ID_LENGTH => cx.amd().then_some(self.osvw[0]),
            msr::OSVW_STATUS => cx.amd().then_some(self.osvw[1]),
            msr::KVM_WALL_CLOCK => cx.pv(kvm_eax::CLOCKSOURCE, self.wall_clock),
            msr::KVM_WALL_CLOCK_NEW => cx.pv(kvm_eax::CLOCKSOURCE2, self.wall_clock),
            msr::KVM_SYSTEM_TIME => cx.pv(kvm_eax::CLOCKSOURCE, self.system_time),
            msr::KVM_SYSTEM_TIME_NEW => cx.pv(kvm_eax::CLOCKSOURCE2, self.system_time),
            msr::KVM_STEAL_TIME => cx.pv(kvm_eax::STEAL_TIME, self.steal_time),
            msr::KVM_PV_EOI_EN => cx.pv(kvm_eax::PV_EOI, self.pv_eoi),
            _ => self.mtrr.read(index).or_else(|| self.mce.read(index, host)).or_else(|| constant::read(index, cx)),
        };
        value.map_or(Read::Gp, Read::Value)
    }

    /// WRMSR or KVM_SET_MSRS.
    pub fn write(&mut self, cx: &Context<'_>, index: u32, value: u64) -> Write {
        if let Some(register) = register(index) {
            return cx.write_register(register, value);
        }
        self.write_own(cx, index, value).unwrap_or(Write::Gp)
    }

    /// `None` is #GP.
    fn write_own(&mut self, cx: &Context<'_>, index: u32, value: u64) -> Option<Write> {
        let host = cx.by == By::Host;
        let caps = cx.visible();
        match index {
            msr::PAT => {
                self.pat = pat_valid(value).then_some(value)?;
                return Some(Write::Effect(Effect::Pat(value)));
            }
            msr::PRED_CMD => {
                let valid = caps.pred_cmd != 0 && value & !caps.pred_cmd == 0;
                return valid.then_some(command(value, Effect::PredCmd(value)));
            }
            msr::FLUSH_CMD => {
                return (caps.flush_cmd && value & !FLUSH_CMD_L1D == 0)
                    .then_some(command(value, Effect::FlushCmd(value)));
            }
            msr::MISC_ENABLE => {
                let kept = if host { 0 } else { MISC_ENABLE_EMON };
                if !host && (value ^ self.misc_enable) & MISC_ENABLE_READ_ONLY != 0 {
                    return None;
                }
                self.misc_enable = value & !kept | self.misc_enable & kept;
            }
            msr::TSC_ADJUST => {
                caps.tsc_adjust.then_some(())?;
                let moved = value.wrapping_sub(self.tsc_adjust);
                self.tsc_adjust = value;
                return Some(if host { Write::Done } else { Write::Effect(Effect::TscOffset(moved)) });
            }
            // A guest that loads microcode finds it unchanged.
            msr::UCODE_REV if host => self.microcode = value,
            msr::UCODE_REV => {}
            msr::ARCH_CAPABILITIES => {
                (host && caps.arch_capabilities).then_some(())?;
                self.arch_capabilities = value;
            }
            msr::PLATFORM_INFO => self.platform_info = host.then_some(value)?,
            msr::FEATURE_CONTROL => {
                let locked = self.feature_control & FEATURE_CONTROL_LOCKED != 0;
                (caps.vendor == Vendor::Intel && (host || !locked)).then_some(())?;
                // Nothing that it could unlock is there.
                self.feature_control = (value & !FEATURE_CONTROL_LOCKED == 0).then_some(value)?;
            }
            msr::POWER_CTL => self.power_ctl = value,
            msr::SMI_COUNT => self.smi_count = host.then_some(value)?,
            msr::XSS => (caps.xsaves && value == 0).then_some(())?,
            msr::DEBUGCTL => (value & !DEBUGCTL_IGNORED == 0).then_some(())?,
            msr::HWCR => {
                let value = value & !HWCR_IGNORED;
                let known = HWCR_TSC_FREQ_SEL | HWCR_MC_STATUS_WRITE;
                self.hwcr = (value & !known == 0).then_some(value)?;
            }
            msr::DE_CFG => self.de_cfg = (cx.amd() && value & !cx.config.de_cfg() == 0).then_some(value)?,
            msr::OSVW_ID_LENGTH => self.osvw[0] = cx.amd().then_some(value)?,
            msr::OSVW_STATUS => self.osvw[1] = cx.amd().then_some(value)?,
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => {
                let bit = if index == msr::KVM_WALL_CLOCK { kvm_eax::CLOCKSOURCE } else { kvm_eax::CLOCKSOURCE2 };
                self.wall_clock = cx.pv(bit, value)?;
                // An address of 0 asks for nothing.
                return Some(command(value, Effect::WallClock(Gpa(value))));
            }
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => {
                let bit = if index == msr::KVM_SYSTEM_TIME { kvm_eax::CLOCKSOURCE } else { kvm_eax::CLOCKSOURCE2 };
                self.system_time = cx.pv(bit, value)?;
                return Some(Write::Effect(Effect::SystemTime(enabled(value, 0))));
            }
            msr::KVM_STEAL_TIME => {
                (value & KVM_STEAL_TIME_RESERVED == 0).then_some(())?;
                self.steal_time = cx.pv(kvm_eax::STEAL_TIME, value)?;
                return Some(Write::Effect(Effect::StealTime(enabled(value, 0))));
            }
            msr::KVM_PV_EOI_EN => {
                // The flag is a 32-bit word; bit 0 enables, so bit 1 is left.
                (value & 2 == 0).then_some(())?;
                self.pv_eoi = cx.pv(kvm_eax::PV_EOI, value)?;
                return Some(Write::Effect(Effect::PvEoi(enabled(value, 0))));
            }
            _ => {
                let reserved = if host { &cx.config.supported } else { cx.caps }.reserved_physical();
                let status_writable = host || self.hwcr & HWCR_MC_STATUS_WRITE != 0;
                self.mtrr
                    .write(index, value, reserved)
                    .or_else(|| self.mce.write(index, value, host, status_writable))
                    .unwrap_or_else(|| constant::write(index, value, cx))
                    .then_some(())?;
            }
        }
        Some(Write::Done)
    }
}

impl MsrConfig {
    /// DE_CFG: the one bit that can be told and set.
    const fn de_cfg(&self) -> u64 {
        if self.supported.lfence_serializing {
            DE_CFG_LFENCE
        } else {
            0
        }
    }
}

impl Context<'_> {
    /// Features that count for this access: userspace is not bound by what it told the guest.
    fn visible(&self) -> &GuestCaps {
        match self.by {
            By::Guest => self.caps,
            By::Host => &self.config.supported,
        }
    }

    fn amd(&self) -> bool {
        self.visible().vendor == Vendor::Amd
    }

    /// `value` if the guest has this paravirtual feature. Its CPUID counts only where userspace asked for that:
    /// KVM_CAP_ENFORCE_PV_FEATURE_CPUID. Userspace itself may read 0 there and write it, as in KVM.
    fn pv(&self, feature: u32, value: u64) -> Option<u64> {
        let hidden = self.by == By::Host && value == 0;
        (self.config.pv_features & feature != 0 && (self.pv_features & feature != 0 || hidden)).then_some(value)
    }

    fn register_exists(&self, register: Register) -> bool {
        let caps = self.visible();
        match register {
            Register::TscAux => caps.tsc_aux,
            Register::Hardware(HardwareMsr::SpecCtrl) => caps.spec_ctrl != 0,
            Register::TscDeadline => caps.tsc_deadline,
            _ => true,
        }
    }

    fn write_register(&self, register: Register, value: u64) -> Write {
        if !self.register_exists(register) {
            return Write::Gp;
        }
        let caps = self.visible();
        let checked = match register {
            Register::Hardware(HardwareMsr::Efer) => self.checked_efer(value),
            Register::Hardware(HardwareMsr::Lstar)
            | Register::Hardware(HardwareMsr::Cstar)
            | Register::Hardware(HardwareMsr::FsBase)
            | Register::Hardware(HardwareMsr::GsBase)
            | Register::Hardware(HardwareMsr::KernelGsBase) => is_canonical(value, caps.linear_bits()).then_some(value),
            // AMD has 32 bits of these; Intel 64, and must get a canonical value. As KVM, correct it instead of #GP.
            Register::Hardware(HardwareMsr::SysenterEsp) | Register::Hardware(HardwareMsr::SysenterEip) => {
                Some(match self.caps.vendor {
                    Vendor::Amd => value & 0xFFFF_FFFF,
                    _ => sign_extended(value, caps.linear_bits()),
                })
            }
            Register::Hardware(HardwareMsr::SysenterCs) => Some(value & 0xFFFF_FFFF),
            Register::Hardware(HardwareMsr::SpecCtrl) => (value & !caps.spec_ctrl == 0).then_some(value),
            // AMD ignores the upper halves of these, Intel reserves them.
            Register::Hardware(HardwareMsr::Sfmask) => {
                (self.caps.vendor == Vendor::Amd || value >> 32 == 0).then_some(value)
            }
            Register::TscAux => (self.caps.vendor == Vendor::Amd || value >> 32 == 0).then_some(value & 0xFFFF_FFFF),
            _ => Some(value),
        };
        checked.map_or(Write::Gp, |value| Write::Register(register, value))
    }

    /// EFER as it will be: LMA is not the guest's to write. SDM Vol. 3 "IA-32e Mode Activation", APM Vol. 2 "Activating Long Mode".
    fn checked_efer(&self, value: u64) -> Option<u64> {
        let unknown = value & !self.visible().efer != 0;
        let long_mode_flips = self.paging && (value ^ self.efer) & efer::LME != 0;
        let refused = unknown || (self.by == By::Guest && long_mode_flips);
        (!refused).then_some(value & !efer::LMA | self.efer & efer::LMA)
    }
}

/// Which state elsewhere an MSR is.
fn register(index: u32) -> Option<Register> {
    Some(match index {
        msr::TSC_DEADLINE => Register::TscDeadline,
        msr::X2APIC_FIRST..=msr::X2APIC_LAST => Register::X2Apic((index - msr::X2APIC_FIRST) as u8),
        msr::SPEC_CTRL => Register::Hardware(HardwareMsr::SpecCtrl),
        msr::FS_BASE => Register::Hardware(HardwareMsr::FsBase),
        msr::GS_BASE => Register::Hardware(HardwareMsr::GsBase),
        msr::KERNEL_GS_BASE => Register::Hardware(HardwareMsr::KernelGsBase),
        msr::TSC_AUX => Register::TscAux,
        msr::EFER => Register::Hardware(HardwareMsr::Efer),
        msr::STAR => Register::Hardware(HardwareMsr::Star),
        msr::LSTAR => Register::Hardware(HardwareMsr::Lstar),
        msr::CSTAR => Register::Hardware(HardwareMsr::Cstar),
        msr::SFMASK => Register::Hardware(HardwareMsr::Sfmask),
        msr::SYSENTER_CS => Register::Hardware(HardwareMsr::SysenterCs),
        msr::SYSENTER_ESP => Register::Hardware(HardwareMsr::SysenterEsp),
        msr::SYSENTER_EIP => Register::Hardware(HardwareMsr::SysenterEip),
        msr::TSC => Register::Tsc,
        msr::APIC_BASE => Register::ApicBase,
        _ => return None,
    })
}

/// Whether each of the eight entries names a memory type that exists.
const fn pat_valid(value: u64) -> bool {
    // Types 2 and 3 are reserved, and so is everything above 7.
    let high = value & 0xF8F8_F8F8_F8F8_F8F8;
    let two_or_three = value >> 1 & !(value >> 2) & 0x0101_0101_0101_0101;
    high == 0 && two_or_three == 0
}

/// The address in a paravirtual MSR, without its low bits, if the MSR is enabled.
const fn enabled(value: u64, reserved: u64) -> Option<Gpa> {
    if value & PV_ENABLED != 0 {
        Some(Gpa(value & !(PV_ENABLED | reserved)))
    } else {
        None
    }
}

/// A command register does nothing when 0 is written.
const fn command(value: u64, effect: Effect) -> Write {
    if value == 0 {
        Write::Done
    } else {
        Write::Effect(effect)
    }
}

/// `value` with everything above `bits` copied from the top one of them.
const fn sign_extended(value: u64, bits: u32) -> u64 {
    let shift = 64 - bits;
    ((value << shift) as i64 >> shift) as u64
}
