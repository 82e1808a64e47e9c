// SPDX-License-Identifier: GPL-2.0
//! Which VMX controls a CPU runs guests with: from its capability MSRs to control words and features, or to the reason why not. SDM appendix
//! "VMX Capability Reporting Facility".
//!
//! Wanted on every CPU: EPT with four levels and write-back tables, virtual NMIs, MSR bitmaps, and switching of EFER and PAT by
//! hardware. All else is optional. Tertiary controls and secondary VM-exit controls are not used.
#![forbid(unsafe_code)]

use core::fmt;

use super::timer;
use crate::arch::{
    cr::cr0,
    msr,
    vmcs::{
        caps::{ept_vpid, feature_control, Allowed, Basic, InveptType, InvvpidType, Misc},
        control::{entry, exit, pin, primary, secondary},
    },
};

/// The raw capability MSRs of one CPU. What it does not have is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilityMsrs {
    /// EAX of CPUID leaf 1: some steppings have errata.
    pub signature: u32,
    pub basic: u64,
    pub pin: u64,
    pub primary: u64,
    pub exit: u64,
    pub entry: u64,
    pub misc: u64,
    pub cr0_fixed0: u64,
    pub cr0_fixed1: u64,
    pub cr4_fixed0: u64,
    pub cr4_fixed1: u64,
    pub secondary: u64,
    pub ept_vpid: u64,
    pub true_pin: u64,
    pub true_primary: u64,
    pub true_exit: u64,
    pub true_entry: u64,
}

impl CapabilityMsrs {
    /// Reads those that exist: `rdmsr` is not called for others, which would fault.
    pub fn read(signature: u32, mut rdmsr: impl FnMut(u32) -> u64) -> Self {
        let mut msrs = Self {
            signature,
            basic: rdmsr(msr::VMX_BASIC),
            pin: rdmsr(msr::VMX_PINBASED_CTLS),
            primary: rdmsr(msr::VMX_PROCBASED_CTLS),
            exit: rdmsr(msr::VMX_EXIT_CTLS),
            entry: rdmsr(msr::VMX_ENTRY_CTLS),
            misc: rdmsr(msr::VMX_MISC),
            cr0_fixed0: rdmsr(msr::VMX_CR0_FIXED0),
            cr0_fixed1: rdmsr(msr::VMX_CR0_FIXED1),
            cr4_fixed0: rdmsr(msr::VMX_CR4_FIXED0),
            cr4_fixed1: rdmsr(msr::VMX_CR4_FIXED1),
            ..Self::default()
        };
        if Allowed(msrs.primary).may() & primary::ACTIVATE_SECONDARY != 0 {
            msrs.secondary = rdmsr(msr::VMX_PROCBASED_CTLS2);
            if Allowed(msrs.secondary).may() & (secondary::EPT | secondary::VPID) != 0 {
                msrs.ept_vpid = rdmsr(msr::VMX_EPT_VPID_CAP);
            }
        }
        if Basic(msrs.basic).true_controls() {
            msrs.true_pin = rdmsr(msr::VMX_TRUE_PINBASED_CTLS);
            msrs.true_primary = rdmsr(msr::VMX_TRUE_PROCBASED_CTLS);
            msrs.true_exit = rdmsr(msr::VMX_TRUE_EXIT_CTLS);
            msrs.true_entry = rdmsr(msr::VMX_TRUE_ENTRY_CTLS);
        }
        msrs
    }

    /// What a control word may be. The TRUE MSR tells the whole truth where it exists.
    const fn allowed(&self, word: Word) -> Allowed {
        let known = Basic(self.basic).true_controls();
        Allowed(match word {
            Word::Pin if known => self.true_pin,
            Word::Primary if known => self.true_primary,
            Word::Exit if known => self.true_exit,
            Word::Entry if known => self.true_entry,
            Word::Pin => self.pin,
            Word::Primary => self.primary,
            Word::Exit => self.exit,
            Word::Entry => self.entry,
            Word::Secondary => self.secondary,
        })
    }

    fn may(&self, word: Word, bits: u32) -> bool {
        self.allowed(word).may() & bits == bits
    }
}

/// Whether the firmware lets VMX run outside SMX: `value` is IA32_FEATURE_CONTROL. An unlocked register is for the host to lock.
pub const fn enabled_by_firmware(value: u64) -> bool {
    let wanted = feature_control::LOCKED | feature_control::VMX_OUTSIDE_SMX;
    value & wanted == wanted
}

/// A control word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    Pin,
    Primary,
    Secondary,
    Exit,
    Entry,
}

impl Word {
    const fn name(self) -> &'static str {
        match self {
            Self::Pin => "pin-based execution",
            Self::Primary => "primary execution",
            Self::Secondary => "secondary execution",
            Self::Exit => "VM-exit",
            Self::Entry => "VM-entry",
        }
    }

    /// Bits that are 1 on every CPU and have no meaning.
    const fn reserved(self) -> u32 {
        match self {
            Self::Pin => 0x16,
            Self::Primary => 0x0400_6172,
            Self::Secondary => 0,
            Self::Exit => 0x0003_6DFB,
            Self::Entry => 0x11FB,
        }
    }
}

/// Why this CPU cannot run guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    RegionSize,
    Addresses32,
    NotWriteBack,
    NoSecondaryControls,
    NoVirtualNmis,
    NoMsrBitmaps,
    NoEferSwitch,
    NoPatSwitch,
    NoEpt,
    NoFourLevels,
    NoWriteBackTables,
    NoInvept,
    /// Other controls that must be on cannot be.
    Missing {
        word: Word,
        bits: u32,
    },
    /// Controls that must be off, at least at times, are always on.
    Forced {
        word: Word,
        bits: u32,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RegionSize => "VMX regions are larger than a page",
            Self::Addresses32 => "VMX structures must be below 4 GiB",
            Self::NotWriteBack => "VMX structures are not write-back memory",
            Self::NoSecondaryControls => "no secondary execution controls",
            Self::NoVirtualNmis => "no virtual NMIs",
            Self::NoMsrBitmaps => "no MSR bitmaps",
            Self::NoEferSwitch => "VM entries and exits do not load EFER",
            Self::NoPatSwitch => "VM entries and exits do not load the PAT",
            Self::NoEpt => "no EPT",
            Self::NoFourLevels => "no EPT tables of four levels",
            Self::NoWriteBackTables => "EPT tables cannot be write-back memory",
            Self::NoInvept => "no INVEPT",
            Self::Missing { word, bits } => return write!(f, "{} controls {bits:#x} cannot be on", word.name()),
            Self::Forced { word, bits } => return write!(f, "{} controls {bits:#x} cannot be off", word.name()),
        })
    }
}

/// What the administrator allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Interrupt delivery by hardware.
    pub apicv: bool,
    /// Interrupts that hardware takes while it runs the guest.
    pub posted: bool,
    /// Page-modification logging.
    pub pml: bool,
    /// The preemption timer, if it does not end runs by itself too often on a CPU with a TSC of so many kHz.
    pub preemption_timer: Option<u32>,
    /// Accessed and dirty bits of EPT entries.
    pub accessed_dirty: bool,
    /// Guests in real mode and without paging run on the CPU.
    pub unrestricted_guest: bool,
    /// The host takes its events by FRED: an interrupt that an exit acknowledged finds no gate of an IDT.
    pub fred: bool,
}

impl Options {
    /// Everything that the CPU has.
    pub const ALL: Self = Self {
        apicv: true,
        posted: true,
        pml: true,
        preemption_timer: Some(100_000),
        accessed_dirty: true,
        unrestricted_guest: true,
        fred: false,
    };
}

/// The control words that a new virtual CPU starts with. What comes and goes (windows, APICv, PML, ...) is off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    pub pin: u32,
    pub primary: u32,
    pub secondary: u32,
    pub exit: u32,
    pub entry: u32,
}

/// What may be used beyond the starting controls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// EPT pages of 2 MiB and 1 GiB.
    pub page_2m: bool,
    pub page_1g: bool,
    /// Guests in real mode and without paging run on the CPU. Otherwise software emulates real mode, and hides paging from guests without.
    pub unrestricted_guest: bool,
    /// EPT entries have accessed and dirty bits.
    pub accessed_dirty: bool,
    /// EPT tables of five levels.
    pub five_levels: bool,
    /// The narrowest INVEPT that serves one VM.
    pub invept: InveptType,
    /// VPIDs are on; the narrowest INVVPID that serves one virtual CPU.
    pub vpid: Option<InvvpidType>,
    /// INVVPID of one linear address.
    pub invvpid_address: bool,
    /// The timer counts down when this bit of the TSC changes.
    pub preemption_timer: Option<u32>,
    /// Exits store the timer's value.
    pub saves_preemption_timer: bool,
    /// CR8 is in the virtual-APIC page; otherwise its accesses exit.
    pub tpr_shadow: bool,
    /// An APIC-access page.
    pub apic_access: bool,
    pub apic_registers: bool,
    pub virtual_interrupts: bool,
    pub x2apic_mode: bool,
    /// Needs "acknowledge interrupt on exit": the host's interrupts then arrive as exit information.
    pub posted_interrupts: bool,
    pub pml: bool,
    pub tsc_scaling: bool,
    /// Entries and exits load PERF_GLOBAL_CTRL.
    pub perf_global_ctrl: bool,
    pub monitor_trap_flag: bool,
    pub rdtscp: bool,
    pub invpcid: bool,
    pub xsaves: bool,
    pub wbinvd_exiting: bool,
    pub pause_loop_exiting: bool,
    pub mode_based_execute: bool,
    /// EPT violations tell what the guest's own tables allow.
    pub advanced_exit_info: bool,
    /// ENCLS exits by a bitmap, which must be all ones.
    pub encls_exiting: bool,
    /// A software interrupt or exception may be injected with instruction length 0.
    pub zero_length_injection: bool,
    /// A hardware exception may be injected with or without an error code, whatever its vector.
    pub any_error_code: bool,
}

/// Which bits of a control register VMX operation fixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fixed {
    /// Always 1.
    pub ones: u64,
    /// May be 1.
    pub may: u64,
}

impl Fixed {
    /// The value that hardware gets for the guest's `value`. Where they differ, reads and writes need a shadow.
    #[inline]
    pub const fn apply(self, value: u64) -> u64 {
        value & self.may | self.ones
    }

    /// Whether hardware takes `value` as it is.
    #[inline]
    pub const fn allows(self, value: u64) -> bool {
        self.apply(value) == value
    }
}

/// How this CPU runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// First word of VMXON regions and VMCSs.
    pub revision: u32,
    pub controls: Controls,
    pub features: Features,
    /// For guests: where they are unrestricted, PE and PG are free.
    pub cr0: Fixed,
    pub cr4: Fixed,
}

/// CPUs whose preemption timer does not count as it should, by signature. Intel's specification updates name the errata: AAX65, AAT59, AAU65
/// (2065x), AAO95, AAN92, AAP86 (106E5), AAM126, AAJ124, AAK139 (106Ax), BA86 (206E6); and Xeon E3-1220 v2.
const BROKEN_PREEMPTION_TIMER: [u32; 9] =
    [0x106A0, 0x106A1, 0x106A4, 0x106A5, 0x106E5, 0x20652, 0x20655, 0x206E6, 0x306A8];

/// CPUs whose exits may clear bits 34:32 of PERF_GLOBAL_CTRL, by family and model: errata AAK155, AAP115, AAT100, BC86, BA97.
const BROKEN_PERF_GLOBAL_CTRL: [u32; 5] = [0x106A0, 0x106E0, 0x20650, 0x206C0, 0x206E0];

const PIN: u32 = pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING | pin::VIRTUAL_NMIS;

const PRIMARY: u32 = primary::USE_TSC_OFFSETTING
    | primary::HLT_EXITING
    | primary::RDPMC_EXITING
    | primary::MOV_DR_EXITING
    | primary::UNCONDITIONAL_IO_EXITING
    | primary::USE_MSR_BITMAPS
    | primary::ACTIVATE_SECONDARY;
/// Off at the start; must be possible.
const PRIMARY_LATER: u32 = primary::INTERRUPT_WINDOW_EXITING | primary::NMI_WINDOW_EXITING;
/// CPUs without MONITOR do not have these.
const PRIMARY_OPTIONAL: u32 = primary::MONITOR_EXITING | primary::MWAIT_EXITING;
/// On while a guest without paging runs with it, where guests are restricted.
pub const CR3_EXITING: u32 = primary::CR3_LOAD_EXITING | primary::CR3_STORE_EXITING;
const CR8_EXITING: u32 = primary::CR8_LOAD_EXITING | primary::CR8_STORE_EXITING;

const SECONDARY: u32 = secondary::EPT;
const SECONDARY_OPTIONAL: u32 =
    secondary::RDTSCP | secondary::INVPCID | secondary::XSAVES | secondary::WBINVD_EXITING | secondary::ENCLS_EXITING;

const EXIT: u32 = exit::HOST_ADDRESS_SPACE_SIZE | exit::SAVE_DEBUG_CONTROLS | exit::LOAD_EFER | exit::LOAD_PAT;

const ENTRY: u32 = entry::LOAD_DEBUG_CONTROLS | entry::LOAD_EFER | entry::LOAD_PAT;
/// On when the guest is in IA-32e mode.
const ENTRY_LATER: u32 = entry::IA32E_MODE_GUEST;

/// Chooses, or says what is in the way.
pub fn negotiate(msrs: &CapabilityMsrs, options: Options) -> Result<Config, Refusal> {
    let basic = Basic(msrs.basic);
    for (bad, refusal) in [
        (!(1..=4096).contains(&basic.region_bytes()), Refusal::RegionSize),
        (basic.addresses_32_bits(), Refusal::Addresses32),
        (basic.memory_type() != 6, Refusal::NotWriteBack),
        (!msrs.may(Word::Primary, primary::ACTIVATE_SECONDARY), Refusal::NoSecondaryControls),
        (!msrs.may(Word::Pin, pin::VIRTUAL_NMIS), Refusal::NoVirtualNmis),
        (!msrs.may(Word::Primary, primary::USE_MSR_BITMAPS), Refusal::NoMsrBitmaps),
        (!msrs.may(Word::Exit, exit::LOAD_EFER) || !msrs.may(Word::Entry, entry::LOAD_EFER), Refusal::NoEferSwitch),
        (!msrs.may(Word::Exit, exit::LOAD_PAT) || !msrs.may(Word::Entry, entry::LOAD_PAT), Refusal::NoPatSwitch),
        (!msrs.may(Word::Secondary, secondary::EPT), Refusal::NoEpt),
        (msrs.ept_vpid & ept_vpid::WALK_4 == 0, Refusal::NoFourLevels),
        (msrs.ept_vpid & ept_vpid::POINTER_WB == 0, Refusal::NoWriteBackTables),
    ] {
        if bad {
            return Err(refusal);
        }
    }
    let features = features(msrs, options)?;
    let cr8_exiting = if features.tpr_shadow { 0 } else { CR8_EXITING };
    let vpid = if features.vpid.is_some() { secondary::VPID } else { 0 };
    let (unrestricted, free, later) = match features.unrestricted_guest {
        true => (secondary::UNRESTRICTED_GUEST, cr0::PE | cr0::PG, PRIMARY_LATER),
        false => (0, 0, PRIMARY_LATER | CR3_EXITING),
    };
    let controls = Controls {
        pin: choose(msrs, Word::Pin, PIN, 0, 0)?,
        primary: choose(msrs, Word::Primary, PRIMARY | cr8_exiting, later, PRIMARY_OPTIONAL)?,
        secondary: choose(msrs, Word::Secondary, SECONDARY | vpid | unrestricted, 0, SECONDARY_OPTIONAL)?,
        exit: choose(msrs, Word::Exit, EXIT, 0, 0)?,
        entry: choose(msrs, Word::Entry, ENTRY, ENTRY_LATER, 0)?,
    };
    Ok(Config {
        revision: basic.revision(),
        controls,
        features,
        cr0: Fixed { ones: msrs.cr0_fixed0 & !free, may: msrs.cr0_fixed1 },
        cr4: Fixed { ones: msrs.cr4_fixed0, may: msrs.cr4_fixed1 },
    })
}

/// One control word: `always` on, `later` possible, `optional` on where it can be.
fn choose(msrs: &CapabilityMsrs, word: Word, always: u32, later: u32, optional: u32) -> Result<u32, Refusal> {
    let allowed = msrs.allowed(word);
    let chosen = always | optional & allowed.may() | allowed.must();
    let missing = (always | later | allowed.must()) & !allowed.may();
    if missing != 0 {
        return Err(Refusal::Missing { word, bits: missing });
    }
    let forced = chosen & !(always | optional | word.reserved());
    if forced != 0 {
        return Err(Refusal::Forced { word, bits: forced });
    }
    Ok(chosen)
}

fn features(msrs: &CapabilityMsrs, options: Options) -> Result<Features, Refusal> {
    let ept = |bits: u64| msrs.ept_vpid & bits == bits;
    let may_secondary = |bits| msrs.may(Word::Secondary, bits);
    let misc = Misc(msrs.misc);
    let invept = match (ept(ept_vpid::INVEPT), ept(ept_vpid::INVEPT_SINGLE), ept(ept_vpid::INVEPT_ALL)) {
        (true, true, _) => InveptType::Single,
        (true, false, true) => InveptType::All,
        _ => return Err(Refusal::NoInvept),
    };
    let invvpid = may_secondary(secondary::VPID) && ept(ept_vpid::INVVPID);
    let vpid = match (invvpid, ept(ept_vpid::INVVPID_SINGLE), ept(ept_vpid::INVVPID_ALL)) {
        (true, true, _) => Some(InvvpidType::Single),
        (true, false, true) => Some(InvvpidType::All),
        _ => None,
    };
    let timer = msrs.may(Word::Pin, pin::PREEMPTION_TIMER)
        && !BROKEN_PREEMPTION_TIMER.contains(&msrs.signature)
        && options.preemption_timer.is_some_and(|khz| timer::usable(misc.preemption_timer_shift(), khz));
    // Without stepping and the bits that no model number has.
    let model = msrs.signature & 0x0FFF_0FF0;
    let tpr_shadow = msrs.may(Word::Primary, primary::TPR_SHADOW);
    let unrestricted_guest = options.unrestricted_guest && may_secondary(secondary::UNRESTRICTED_GUEST);
    // Where software runs the guest at times, it has the guest's interrupts, too. CPUs that need it have no APICv.
    let apicv = options.apicv && tpr_shadow && unrestricted_guest;
    let apic_registers = apicv && may_secondary(secondary::APIC_REGISTER_VIRTUALIZATION);
    let virtual_interrupts = apic_registers && may_secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY);
    Ok(Features {
        page_2m: ept(ept_vpid::PAGE_2M),
        page_1g: ept(ept_vpid::PAGE_1G),
        unrestricted_guest,
        accessed_dirty: options.accessed_dirty && ept(ept_vpid::ACCESSED_DIRTY),
        five_levels: ept(ept_vpid::WALK_5),
        invept,
        vpid,
        invvpid_address: vpid.is_some() && ept(ept_vpid::INVVPID_ADDRESS),
        preemption_timer: timer.then(|| misc.preemption_timer_shift()),
        saves_preemption_timer: timer && msrs.may(Word::Exit, exit::SAVE_PREEMPTION_TIMER),
        tpr_shadow,
        apic_access: apicv && may_secondary(secondary::VIRTUALIZE_APIC_ACCESSES),
        apic_registers,
        virtual_interrupts,
        x2apic_mode: apicv && may_secondary(secondary::VIRTUALIZE_X2APIC_MODE),
        posted_interrupts: options.posted
            && !options.fred
            && virtual_interrupts
            && msrs.may(Word::Pin, pin::POSTED_INTERRUPTS)
            && msrs.may(Word::Exit, exit::ACKNOWLEDGE_INTERRUPT),
        pml: options.pml && options.accessed_dirty && may_secondary(secondary::PML) && ept(ept_vpid::ACCESSED_DIRTY),
        tsc_scaling: may_secondary(secondary::TSC_SCALING),
        perf_global_ctrl: msrs.may(Word::Entry, entry::LOAD_PERF_GLOBAL_CTRL)
            && msrs.may(Word::Exit, exit::LOAD_PERF_GLOBAL_CTRL)
            && !BROKEN_PERF_GLOBAL_CTRL.contains(&model),
        monitor_trap_flag: msrs.may(Word::Primary, primary::MONITOR_TRAP_FLAG),
        rdtscp: may_secondary(secondary::RDTSCP),
        invpcid: may_secondary(secondary::INVPCID),
        xsaves: may_secondary(secondary::XSAVES),
        wbinvd_exiting: may_secondary(secondary::WBINVD_EXITING),
        pause_loop_exiting: may_secondary(secondary::PAUSE_LOOP_EXITING),
        mode_based_execute: may_secondary(secondary::MODE_BASED_EXECUTE),
        advanced_exit_info: ept(ept_vpid::ADVANCED_EXIT_INFO),
        encls_exiting: may_secondary(secondary::ENCLS_EXITING),
        zero_length_injection: misc.zero_length_injection(),
        any_error_code: Basic(msrs.basic).any_error_code(),
    })
}
