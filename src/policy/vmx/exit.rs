// SPDX-License-Identifier: GPL-2.0
//! From VMX's exit information to neutral words. SDM "Basic VM-Exit Information", "Information for VM Exits Due to Vectored Events",
//! "Information for VM Exits That Occur During Event Delivery", "Information About NMI Unblocking Due to IRET".
//!
//! Fields are read when they are needed and not before: each costs time on the exit path.
#![forbid(unsafe_code)]

use crate::{
    arch::{
        cr::dr,
        vmcs::{
            event::{InterruptionInfo, Kind},
            exit::{
                self, reason, ApicAccess, CrAccess, CrAccessKind, DrAccess, EptViolation, ExitReason, IoAccess,
                TaskSwitchSource,
            },
            ReadOnly32, ReadOnly64, ReadOnlyNatural, Readable,
        },
        Gpa,
    },
    guest::{
        event::{vector, Event, Exception},
        exit::{NestedFault, PortAccess, RegisterMove, TaskSource, TaskSwitch},
        Exit,
    },
};

/// Where VMCS fields are read: the current VMCS, or a test's table.
pub trait Fields {
    fn read<F: Readable>(&self, field: F) -> F::Value;
}

/// What an exit is, with the words that only VMX has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// For the neutral handlers.
    Guest(Exit),
    /// #DB: the DR6 bits are in the qualification, see [`debug_status`]. For the neutral handlers then.
    Debug(u64),
    /// An NMI arrived for the host: it has not been delivered yet.
    HostNmi,
    /// A machine check hit while the guest ran: it has not been delivered yet.
    HostMachineCheck,
    /// The entry failed after its first checks: the whole reason, and what the qualification says.
    EntryFailure {
        reason: ExitReason,
        qualification: u64,
    },
    PreemptionTimer,
    PmlFull,
    MonitorTrap,
    /// The guest lowered its TPR below the threshold.
    TprBelowThreshold,
    /// The guest accessed the APIC-access page.
    Apic(ApicAccess),
    /// A write to the virtual-APIC page is done; the page has the value at this offset.
    ApicWrite {
        offset: u16,
    },
    /// An EOI by hardware of a vector in the EOI-exit bitmap.
    VirtualizedEoi {
        vector: u8,
    },
    /// The nested tables hold an entry that cannot be.
    EptMisconfiguration(Gpa),
}

/// An exit and what it left undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoded {
    pub exit: VmExit,
    /// Length of the instruction that caused the exit, 1 to 15; `None` if none did.
    pub instruction_bytes: Option<u8>,
    /// What was being delivered when the exit came.
    pub unfinished: Option<Event>,
    /// The guest was in an IRET that had unblocked NMIs already: they are to be blocked again.
    pub blocks_nmis: bool,
}

impl Decoded {
    const fn plain(exit: VmExit) -> Self {
        Self { exit, instruction_bytes: None, unfinished: None, blocks_nmis: false }
    }
}

/// Decodes the exit that `fields` holds.
#[inline]
pub fn decode(fields: &impl Fields) -> Decoded {
    let reason = ExitReason(fields.read(ReadOnly32::ExitReason));
    if reason.entry_failure() {
        let qualification = fields.read(ReadOnlyNatural::ExitQualification);
        return Decoded::plain(VmExit::EntryFailure { reason, qualification });
    }
    let number = reason.basic();
    let qualification = || fields.read(ReadOnlyNatural::ExitQualification);
    let exit = match number {
        reason::EXTERNAL_INTERRUPT | reason::INIT | reason::IO_SMI | reason::OTHER_SMI => Exit::HostInterrupt,
        reason::INTERRUPT_WINDOW => Exit::InterruptWindow,
        reason::NMI_WINDOW => Exit::NmiWindow,
        reason::IO => {
            let access = IoAccess(qualification());
            return instruction(
                fields,
                Exit::Port(PortAccess {
                    port: access.port(),
                    size_bytes: access.size_bytes(),
                    input: access.input(),
                    string: access.string(),
                }),
            );
        }
        reason::CR_ACCESS => return instruction(fields, Exit::ControlRegister(control_register(qualification()))),
        reason::MOV_DR => {
            let access = DrAccess(qualification());
            let (register, write) = (access.register(), access.write());
            return instruction(fields, Exit::DebugRegister(RegisterMove { register, write, gpr: Some(access.gpr()) }));
        }
        reason::RDMSR => return instruction(fields, Exit::Rdmsr),
        reason::WRMSR => return instruction(fields, Exit::Wrmsr),
        reason::CPUID => return instruction(fields, Exit::Cpuid),
        reason::HLT => return instruction(fields, Exit::Hlt),
        reason::VMCALL => return instruction(fields, Exit::Hypercall),
        reason::INVD => return instruction(fields, Exit::Invd),
        reason::WBINVD => return instruction(fields, Exit::Wbinvd),
        reason::PAUSE => return instruction(fields, Exit::Pause),
        reason::XSETBV => return instruction(fields, Exit::Xsetbv),
        reason::RDPMC => return instruction(fields, Exit::Rdpmc),
        reason::RDTSC => return instruction(fields, Exit::Rdtsc),
        reason::RDTSCP => return instruction(fields, Exit::Rdtscp),
        reason::MONITOR => return instruction(fields, Exit::Monitor),
        reason::MWAIT => return instruction(fields, Exit::Mwait),
        reason::GETSEC
        | reason::RSM
        | reason::VMCLEAR..=reason::VMXON
        | reason::INVEPT
        | reason::INVVPID
        | reason::VMFUNC
        | reason::ENCLS
        | reason::ENCLV
        | reason::PCONFIG => Exit::UndefinedInstruction,
        reason::PREEMPTION_TIMER => return Decoded::plain(VmExit::PreemptionTimer),
        reason::MONITOR_TRAP_FLAG => return Decoded::plain(VmExit::MonitorTrap),
        reason::TPR_BELOW_THRESHOLD => return Decoded::plain(VmExit::TprBelowThreshold),
        reason::APIC_WRITE => {
            let offset = (qualification() & 0xFFF) as u16;
            return Decoded::plain(VmExit::ApicWrite { offset });
        }
        reason::VIRTUALIZED_EOI => {
            return Decoded::plain(VmExit::VirtualizedEoi { vector: qualification() as u8 });
        }
        number => return in_delivery(fields, number),
    };
    Decoded::plain(VmExit::Guest(exit))
}

/// An exit that an instruction caused.
#[inline]
fn instruction(fields: &impl Fields, exit: Exit) -> Decoded {
    let length = fields.read(ReadOnly32::InstructionLength) as u8;
    Decoded { instruction_bytes: Some(length), ..Decoded::plain(VmExit::Guest(exit)) }
}

fn control_register(qualification: u64) -> RegisterMove {
    let access = CrAccess(qualification);
    let (write, gpr) = match access.kind() {
        CrAccessKind::MovTo => (true, Some(access.gpr())),
        CrAccessKind::MovFrom => (false, Some(access.gpr())),
        CrAccessKind::Clts | CrAccessKind::Lmsw => (true, None),
    };
    RegisterMove { register: access.register(), write, gpr }
}

/// An exit that may come in the middle of an event's delivery.
fn in_delivery(fields: &impl Fields, number: u16) -> Decoded {
    let vectoring = InterruptionInfo(fields.read(ReadOnly32::IdtVectoringInfo));
    let delivering = vectoring.valid();
    let unfinished = match delivering {
        true => unfinished_event(vectoring, || fields.read(ReadOnly32::IdtVectoringErrorCode)),
        false => None,
    };
    let qualification = || fields.read(ReadOnlyNatural::ExitQualification);
    let mut blocks_nmis = false;
    let exit = match number {
        reason::EXCEPTION_OR_NMI => {
            let info = InterruptionInfo(fields.read(ReadOnly32::InterruptionInfo));
            // Undefined for a double fault, and for an exit in the delivery of an event.
            blocks_nmis =
                info.nmi_unblocking() && info.kind() != Kind::Nmi && info.vector() != vector::DF && !delivering;
            exception(fields, info)
        }
        reason::EPT_VIOLATION => {
            let violation = EptViolation(qualification());
            blocks_nmis = violation.nmi_unblocking() && !delivering;
            VmExit::Guest(Exit::NestedFault(NestedFault {
                gpa: Gpa(fields.read(ReadOnly64::GuestPhysicalAddress)),
                present: violation.present(),
                write: violation.write(),
                execute: violation.fetch(),
                walk: violation.linear_address_valid() && !violation.translated(),
            }))
        }
        reason::PML_FULL => {
            blocks_nmis = EptViolation(qualification()).nmi_unblocking() && !delivering;
            VmExit::PmlFull
        }
        reason::EPT_MISCONFIGURATION => VmExit::EptMisconfiguration(Gpa(fields.read(ReadOnly64::GuestPhysicalAddress))),
        reason::APIC_ACCESS => {
            // Not an instruction's length when an event's delivery or a page walk made the access.
            return Decoded { unfinished, ..Decoded::plain(VmExit::Apic(ApicAccess(qualification()))) };
        }
        reason::TASK_SWITCH => {
            let switch = task_switch(exit::TaskSwitch(qualification()));
            // By an instruction, then: at a task gate INT n, INT1, INT3 or INTO.
            let length = || fields.read(ReadOnly32::InstructionLength) as u8;
            let instruction_bytes = unfinished.is_none().then(length);
            return Decoded {
                instruction_bytes,
                unfinished,
                ..Decoded::plain(VmExit::Guest(Exit::TaskSwitch(switch)))
            };
        }
        reason::TRIPLE_FAULT => VmExit::Guest(Exit::Shutdown),
        number => VmExit::Guest(Exit::Unknown { reason: number.into() }),
    };
    Decoded { exit, instruction_bytes: None, unfinished, blocks_nmis }
}

fn task_switch(qualification: exit::TaskSwitch) -> TaskSwitch {
    let source = match qualification.source() {
        TaskSwitchSource::Call => TaskSource::Call,
        TaskSwitchSource::Iret => TaskSource::Iret,
        TaskSwitchSource::Jmp => TaskSource::Jump,
        TaskSwitchSource::Gate => TaskSource::Gate,
    };
    TaskSwitch { selector: qualification.selector(), source }
}

fn exception(fields: &impl Fields, info: InterruptionInfo) -> VmExit {
    if info.kind() == Kind::Nmi {
        return VmExit::HostNmi;
    }
    let code = || fields.read(ReadOnly32::InterruptionErrorCode);
    let qualification = || fields.read(ReadOnlyNatural::ExitQualification);
    let exception = match info.vector() {
        vector::MC => return VmExit::HostMachineCheck,
        vector::DB => return VmExit::Debug(qualification()),
        // No error code in real mode, where there are no page faults either.
        vector::PF => Exception::page_fault(code(), qualification()),
        number if info.has_error_code() => Exception::with_code(number, code()),
        number => Exception::plain(number),
    };
    VmExit::Guest(Exit::Exception(exception))
}

/// What IDT-vectoring information says was being delivered. `None` for what its instruction raises again, RIP being still at it: INT n,
/// INT1, INT3, INTO. CR2 and DR6 have been set already.
pub fn unfinished_event(info: InterruptionInfo, error_code: impl FnOnce() -> u32) -> Option<Event> {
    match info.kind() {
        Kind::ExternalInterrupt => Some(Event::Interrupt(info.vector())),
        Kind::Nmi => Some(Event::Nmi),
        Kind::HardwareException => Some(Event::Exception(Exception {
            vector: info.vector(),
            error_code: info.has_error_code().then(error_code),
            payload: None,
        })),
        _ => None,
    }
}

/// DR6 after a #DB that exited: the exit leaves the register alone and tells in `qualification` what it would have got. SDM "Exit
/// Qualification for Debug Exceptions".
pub const fn debug_status(dr6: u64, qualification: u64) -> u64 {
    /// Bits that are 0 in DR6 when the thing happened, and 1 in the qualification.
    const INVERTED: u64 = 1 << 11 | 1 << 16;
    let set = qualification & (dr::DR6_TRAPS | dr::DR6_BD | dr::DR6_BS);
    (dr6 & !dr::DR6_TRAPS | set | INVERTED) & !(qualification & INVERTED)
}
