// SPDX-License-Identifier: GPL-2.0
//! Why a guest exited: basic reasons, and the qualifications that come with them. SDM appendix "VMX Basic Exit Reasons" and "Basic VM-Exit
//! Information".
#![forbid(unsafe_code)]

/// Basic exit reasons: bits 15 to 0 of the exit reason.
pub mod reason {
    pub const EXCEPTION_OR_NMI: u16 = 0;
    pub const EXTERNAL_INTERRUPT: u16 = 1;
    pub const TRIPLE_FAULT: u16 = 2;
    pub const INIT: u16 = 3;
    pub const SIPI: u16 = 4;
    pub const IO_SMI: u16 = 5;
    pub const OTHER_SMI: u16 = 6;
    pub const INTERRUPT_WINDOW: u16 = 7;
    pub const NMI_WINDOW: u16 = 8;
    pub const TASK_SWITCH: u16 = 9;
    pub const CPUID: u16 = 10;
    pub const GETSEC: u16 = 11;
    pub const HLT: u16 = 12;
    pub const INVD: u16 = 13;
    pub const INVLPG: u16 = 14;
    pub const RDPMC: u16 = 15;
    pub const RDTSC: u16 = 16;
    pub const RSM: u16 = 17;
    pub const VMCALL: u16 = 18;
    pub const VMCLEAR: u16 = 19;
    pub const VMLAUNCH: u16 = 20;
    pub const VMPTRLD: u16 = 21;
    pub const VMPTRST: u16 = 22;
    pub const VMREAD: u16 = 23;
    pub const VMRESUME: u16 = 24;
    pub const VMWRITE: u16 = 25;
    pub const VMXOFF: u16 = 26;
    pub const VMXON: u16 = 27;
    pub const CR_ACCESS: u16 = 28;
    pub const MOV_DR: u16 = 29;
    pub const IO: u16 = 30;
    pub const RDMSR: u16 = 31;
    pub const WRMSR: u16 = 32;
    /// Entry failure: guest state.
    pub const INVALID_GUEST_STATE: u16 = 33;
    /// Entry failure: MSR loading.
    pub const MSR_LOADING: u16 = 34;
    pub const MWAIT: u16 = 36;
    pub const MONITOR_TRAP_FLAG: u16 = 37;
    pub const MONITOR: u16 = 39;
    pub const PAUSE: u16 = 40;
    /// Entry failure: machine check.
    pub const MACHINE_CHECK: u16 = 41;
    pub const TPR_BELOW_THRESHOLD: u16 = 43;
    pub const APIC_ACCESS: u16 = 44;
    pub const VIRTUALIZED_EOI: u16 = 45;
    pub const GDTR_IDTR: u16 = 46;
    pub const LDTR_TR: u16 = 47;
    pub const EPT_VIOLATION: u16 = 48;
    pub const EPT_MISCONFIGURATION: u16 = 49;
    pub const INVEPT: u16 = 50;
    pub const RDTSCP: u16 = 51;
    pub const PREEMPTION_TIMER: u16 = 52;
    pub const INVVPID: u16 = 53;
    pub const WBINVD: u16 = 54;
    pub const XSETBV: u16 = 55;
    pub const APIC_WRITE: u16 = 56;
    pub const RDRAND: u16 = 57;
    pub const INVPCID: u16 = 58;
    pub const VMFUNC: u16 = 59;
    pub const ENCLS: u16 = 60;
    pub const RDSEED: u16 = 61;
    pub const PML_FULL: u16 = 62;
    pub const XSAVES: u16 = 63;
    pub const XRSTORS: u16 = 64;
    pub const PCONFIG: u16 = 65;
    pub const SUB_PAGE_PERMISSION: u16 = 66;
    pub const UMWAIT: u16 = 67;
    pub const TPAUSE: u16 = 68;
    pub const LOADIWKEY: u16 = 69;
    pub const ENCLV: u16 = 70;
    pub const ENQCMD_PASID: u16 = 72;
    pub const ENQCMDS_PASID: u16 = 73;
    pub const BUS_LOCK: u16 = 74;
    pub const INSTRUCTION_TIMEOUT: u16 = 75;
    pub const SEAMCALL: u16 = 76;
    pub const TDCALL: u16 = 77;
}

/// The exit reason field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct ExitReason(pub u32);

impl ExitReason {
    pub const BUS_LOCK_DETECTED: u32 = 1 << 26;
    pub const ENCLAVE_MODE: u32 = 1 << 27;
    pub const ENTRY_FAILURE: u32 = 1 << 31;

    /// One of [`reason`].
    #[inline]
    pub const fn basic(self) -> u16 {
        self.0 as u16
    }

    /// The guest did not run: the entry failed after its first checks.
    #[inline]
    pub const fn entry_failure(self) -> bool {
        self.0 & Self::ENTRY_FAILURE != 0
    }
}

/// Exit qualification of an entry failure. SDM "VM-Entry Failures During or After Loading Guest State".
pub mod entry_failure {
    pub const PDPTE: u64 = 2;
    pub const NMI: u64 = 3;
    pub const LINK_POINTER: u64 = 4;
}

/// What a control-register access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrAccessKind {
    MovTo,
    MovFrom,
    Clts,
    Lmsw,
}

/// Exit qualification of a control-register access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct CrAccess(pub u64);

impl CrAccess {
    /// 0, 3, 4 or 8; 0 for CLTS and LMSW.
    #[inline]
    pub const fn register(self) -> u8 {
        (self.0 & 0xF) as u8
    }

    #[inline]
    pub const fn kind(self) -> CrAccessKind {
        match self.0 >> 4 & 3 {
            0 => CrAccessKind::MovTo,
            1 => CrAccessKind::MovFrom,
            2 => CrAccessKind::Clts,
            _ => CrAccessKind::Lmsw,
        }
    }

    /// General-purpose register of a MOV, 0 to 15.
    #[inline]
    pub const fn gpr(self) -> u8 {
        (self.0 >> 8 & 0xF) as u8
    }

    /// LMSW's operand is in memory, at the guest linear address.
    #[inline]
    pub const fn lmsw_memory(self) -> bool {
        self.0 & 1 << 6 != 0
    }

    /// What LMSW loads.
    #[inline]
    pub const fn lmsw_source(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

/// Exit qualification of a MOV to or from a debug register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct DrAccess(pub u64);

impl DrAccess {
    /// 0 to 7.
    #[inline]
    pub const fn register(self) -> u8 {
        (self.0 & 7) as u8
    }

    /// MOV to the debug register.
    #[inline]
    pub const fn write(self) -> bool {
        self.0 & 1 << 4 == 0
    }

    /// General-purpose register, 0 to 15.
    #[inline]
    pub const fn gpr(self) -> u8 {
        (self.0 >> 8 & 0xF) as u8
    }
}

/// Exit qualification of an I/O instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct IoAccess(pub u64);

impl IoAccess {
    /// 1, 2 or 4; the field has no other values.
    #[inline]
    pub const fn size_bytes(self) -> u8 {
        (self.0 & 7) as u8 + 1
    }

    #[inline]
    pub const fn input(self) -> bool {
        self.0 & 1 << 3 != 0
    }

    #[inline]
    pub const fn string(self) -> bool {
        self.0 & 1 << 4 != 0
    }

    #[inline]
    pub const fn rep(self) -> bool {
        self.0 & 1 << 5 != 0
    }

    #[inline]
    pub const fn port(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

/// Exit qualification of an EPT violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct EptViolation(pub u64);

impl EptViolation {
    #[inline]
    pub const fn read(self) -> bool {
        self.0 & 1 << 0 != 0
    }

    /// A data write; with EPT's accessed and dirty bits on also any access to a guest paging structure.
    #[inline]
    pub const fn write(self) -> bool {
        self.0 & 1 << 1 != 0
    }

    #[inline]
    pub const fn fetch(self) -> bool {
        self.0 & 1 << 2 != 0
    }

    /// The EPT entries allow something: a translation is present.
    #[inline]
    pub const fn present(self) -> bool {
        self.0 & 7 << 3 != 0
    }

    /// The guest linear address field is valid.
    #[inline]
    pub const fn linear_address_valid(self) -> bool {
        self.0 & 1 << 7 != 0
    }

    /// The access was to the translation of a linear address, and not to a paging structure. Meaningful only with a valid linear address.
    #[inline]
    pub const fn translated(self) -> bool {
        self.0 & 1 << 8 != 0
    }

    /// The exit undid an IRET's unblocking of NMIs. Meaningful only when it did not happen in the delivery of an event.
    #[inline]
    pub const fn nmi_unblocking(self) -> bool {
        self.0 & 1 << 12 != 0
    }
}

/// What started a task switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskSwitchSource {
    Call,
    Iret,
    Jmp,
    /// A task gate in the IDT.
    Gate,
}

/// Exit qualification of a task switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct TaskSwitch(pub u64);

impl TaskSwitch {
    /// Selector of the new task's TSS.
    #[inline]
    pub const fn selector(self) -> u16 {
        self.0 as u16
    }

    #[inline]
    pub const fn source(self) -> TaskSwitchSource {
        match self.0 >> 30 & 3 {
            0 => TaskSwitchSource::Call,
            1 => TaskSwitchSource::Iret,
            2 => TaskSwitchSource::Jmp,
            _ => TaskSwitchSource::Gate,
        }
    }
}

/// What accessed the APIC-access page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicAccessKind {
    /// A linear access: data read by an instruction.
    Read,
    /// A linear access: data written by an instruction.
    Write,
    /// A linear access: instruction fetch.
    Fetch,
    /// A linear access in the delivery of an event.
    Event,
    /// An access by guest-physical address, in the delivery of an event.
    PhysicalEvent,
    /// An access by guest-physical address, for an instruction.
    Physical,
    /// A number that the manual does not know.
    Unknown,
}

/// Exit qualification of an access to the APIC-access page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct ApicAccess(pub u64);

impl ApicAccess {
    /// Offset in the page; undefined for an access by guest-physical address.
    #[inline]
    pub const fn offset(self) -> u16 {
        (self.0 & 0xFFF) as u16
    }

    #[inline]
    pub const fn kind(self) -> ApicAccessKind {
        match self.0 >> 12 & 0xF {
            0 => ApicAccessKind::Read,
            1 => ApicAccessKind::Write,
            2 => ApicAccessKind::Fetch,
            3 => ApicAccessKind::Event,
            10 => ApicAccessKind::PhysicalEvent,
            15 => ApicAccessKind::Physical,
            _ => ApicAccessKind::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_reason() {
        let reason = ExitReason(0x8000_0021);
        assert!(reason.entry_failure());
        assert_eq!(reason.basic(), self::reason::INVALID_GUEST_STATE);
        assert!(!ExitReason(ExitReason::BUS_LOCK_DETECTED | 30).entry_failure());
    }

    #[test]
    fn control_register_access() {
        let mov = CrAccess(0x0F14);
        assert_eq!((mov.register(), mov.kind(), mov.gpr()), (4, CrAccessKind::MovFrom, 15));
        assert_eq!(CrAccess(0x108).kind(), CrAccessKind::MovTo);
        assert_eq!(CrAccess(0x20).kind(), CrAccessKind::Clts);
        let lmsw = CrAccess(0x1234_0070);
        assert_eq!((lmsw.kind(), lmsw.lmsw_memory(), lmsw.lmsw_source()), (CrAccessKind::Lmsw, true, 0x1234));
    }

    #[test]
    fn debug_register_access() {
        let read = DrAccess(0x0316);
        assert_eq!((read.register(), read.write(), read.gpr()), (6, false, 3));
        assert!(DrAccess(0x0007).write());
    }

    #[test]
    fn io_access() {
        let io = IoAccess(0x03F8_0008);
        assert_eq!((io.port(), io.size_bytes(), io.input(), io.string()), (0x3F8, 1, true, false));
        let io = IoAccess(0xFFFF_0033);
        assert_eq!((io.port(), io.size_bytes(), io.input(), io.string(), io.rep()), (0xFFFF, 4, false, true, true));
        assert_eq!(IoAccess(1).size_bytes(), 2);
    }

    #[test]
    fn ept_violation() {
        let missing_write = EptViolation(0x182);
        assert!(missing_write.write() && !missing_write.present() && missing_write.translated());
        let fetch = EptViolation(0x9AC);
        assert!(fetch.fetch() && !fetch.read() && fetch.present());
        assert!(EptViolation(0x1000).nmi_unblocking());
    }

    #[test]
    fn task_switch_and_apic_access() {
        let switch = TaskSwitch(0xC000_0040);
        assert_eq!((switch.selector(), switch.source()), (0x40, TaskSwitchSource::Gate));
        assert_eq!(TaskSwitch(0x4000_0000).source(), TaskSwitchSource::Iret);
        let access = ApicAccess(0x10B0);
        assert_eq!((access.offset(), access.kind()), (0xB0, ApicAccessKind::Write));
        assert_eq!(ApicAccess(0xF000).kind(), ApicAccessKind::Physical);
        assert_eq!(ApicAccess(0x4000).kind(), ApicAccessKind::Unknown);
    }
}
