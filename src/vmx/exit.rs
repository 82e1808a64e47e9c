// SPDX-License-Identifier: GPL-2.0
//! From VMX's exit reasons to neutral words. SDM "VM Exits", "Basic VM-Exit Information".
#![forbid(unsafe_code)]

use super::insn::CurrentVmcs;
use crate::{
    arch::{
        vmcs::{
            event::{InterruptionInfo, Kind},
            exit::{reason, CrAccess, CrAccessKind, DrAccess, EptViolation, IoAccess},
            ReadOnly64, ReadOnlyNatural,
        },
        Gpa,
    },
    guest::{
        event::{vector, Event, Exception},
        exit::{NestedFault, PortAccess, RegisterMove},
        Exit,
    },
};

/// Decodes an exit that is neither the host's (NMI, machine check) nor an exception.
#[inline]
pub(super) fn decode(vmcs: CurrentVmcs<'_>, number: u16) -> Exit {
    let qualification = || vmcs.read(ReadOnlyNatural::ExitQualification);
    match number {
        reason::EXTERNAL_INTERRUPT | reason::INIT | reason::IO_SMI | reason::OTHER_SMI => Exit::HostInterrupt,
        reason::EPT_VIOLATION => {
            let what = EptViolation(qualification());
            Exit::NestedFault(NestedFault {
                gpa: Gpa(vmcs.read(ReadOnly64::GuestPhysicalAddress)),
                present: what.present(),
                write: what.write(),
                execute: what.fetch(),
                walk: what.linear_address_valid() && !what.translated(),
            })
        }
        reason::IO => {
            let what = IoAccess(qualification());
            Exit::Port(PortAccess {
                port: what.port(),
                size_bytes: what.size_bytes(),
                input: what.input(),
                string: what.string(),
            })
        }
        reason::RDMSR => Exit::Rdmsr,
        reason::WRMSR => Exit::Wrmsr,
        reason::CPUID => Exit::Cpuid,
        reason::HLT => Exit::Hlt,
        reason::VMCALL => Exit::Hypercall,
        reason::INTERRUPT_WINDOW => Exit::InterruptWindow,
        reason::NMI_WINDOW => Exit::NmiWindow,
        reason::CR_ACCESS => {
            let what = CrAccess(qualification());
            let (write, gpr) = match what.kind() {
                CrAccessKind::MovTo => (true, Some(what.gpr())),
                CrAccessKind::MovFrom => (false, Some(what.gpr())),
                CrAccessKind::Clts | CrAccessKind::Lmsw => (true, None),
            };
            Exit::ControlRegister(RegisterMove { register: what.register(), write, gpr })
        }
        reason::MOV_DR => {
            let what = DrAccess(qualification());
            Exit::DebugRegister(RegisterMove { register: what.register(), write: what.write(), gpr: Some(what.gpr()) })
        }
        reason::INVD => Exit::Invd,
        reason::WBINVD => Exit::Wbinvd,
        reason::PAUSE => Exit::Pause,
        reason::XSETBV => Exit::Xsetbv,
        reason::RDPMC => Exit::Rdpmc,
        reason::RDTSC => Exit::Rdtsc,
        reason::RDTSCP => Exit::Rdtscp,
        reason::MONITOR => Exit::Monitor,
        reason::MWAIT => Exit::Mwait,
        reason::TRIPLE_FAULT => Exit::Shutdown,
        reason::GETSEC
        | reason::RSM
        | reason::VMCLEAR..=reason::VMXON
        | reason::INVEPT
        | reason::INVVPID
        | reason::VMFUNC
        | reason::ENCLS
        | reason::ENCLV
        | reason::PCONFIG => Exit::UndefinedInstruction,
        number => Exit::Unknown { reason: number.into() },
    }
}

/// Whether an exit with this reason was caused by executing an instruction, whose length the CPU tells.
#[inline]
pub(super) fn is_instruction(number: u16) -> bool {
    const MASK: u64 = {
        let mut mask = 0;
        let reasons = [
            reason::CPUID,
            reason::HLT,
            reason::INVD,
            reason::RDPMC,
            reason::RDTSC,
            reason::VMCALL,
            reason::CR_ACCESS,
            reason::MOV_DR,
            reason::IO,
            reason::RDMSR,
            reason::WRMSR,
            reason::MWAIT,
            reason::MONITOR,
            reason::PAUSE,
            reason::RDTSCP,
            reason::WBINVD,
            reason::XSETBV,
        ];
        let mut i = 0;
        while i < reasons.len() {
            mask |= 1 << reasons[i];
            i += 1;
        }
        mask
    };
    number < 64 && MASK >> number & 1 != 0
}

/// Whether an exit with this reason may come in the middle of an event's delivery: then the IDT-vectoring information is worth reading.
#[inline]
pub(super) fn may_cut_delivery_short(number: u16) -> bool {
    matches!(
        number,
        reason::EXCEPTION_OR_NMI
            | reason::EPT_VIOLATION
            | reason::EPT_MISCONFIGURATION
            | reason::TRIPLE_FAULT
            | reason::TASK_SWITCH
            | reason::APIC_ACCESS
            | reason::PML_FULL
    )
}

/// What the IDT-vectoring information says was being delivered. `None` for what its instruction raises again: INT n, INT1, INT3, INTO.
pub(super) fn unfinished_event(info: InterruptionInfo, error_code: impl FnOnce() -> u32) -> Option<Event> {
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

/// The word that delivers a vector, and the error code that goes with it. `protected`: the guest is in protected mode, where alone there are
/// error codes.
pub(super) fn injection(event: Event, protected: bool) -> Option<(InterruptionInfo, u32)> {
    Some(match event {
        Event::Interrupt(vector) => (InterruptionInfo::new(Kind::ExternalInterrupt, vector, false), 0),
        Event::Nmi => (InterruptionInfo::new(Kind::Nmi, vector::NMI, false), 0),
        Event::Exception(exception) => {
            let code = protected
                && matches!(
                    exception.vector,
                    vector::DF | vector::TS | vector::NP | vector::SS | vector::GP | vector::PF | vector::AC
                );
            let info = InterruptionInfo::new(Kind::HardwareException, exception.vector, code);
            (info, exception.error_code.unwrap_or(0) & 0xFFFF)
        }
        // Its instruction runs again.
        Event::Software { .. } => return None,
    })
}
