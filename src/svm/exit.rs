// SPDX-License-Identifier: GPL-2.0
//! From SVM's exit codes to neutral words. APM Vol. 2, Appendix C "SVM Intercept Exit Codes".
#![forbid(unsafe_code)]

use crate::{
    arch::{
        vmcb::{event, exit_code as code, Control},
        Gpa,
    },
    glue::cpu::{self, IrqsOff},
    guest::{
        event::{vector, Event, Exception},
        exit::{NestedFault, PortAccess, RegisterMove},
        Exit,
    },
};

/// Decodes the exit that `control` holds. A machine check goes to the host at once.
#[inline]
pub(super) fn decode(control: &Control, decode_assists: bool, irqs: &IrqsOff) -> Exit {
    let info = control.exit_info_1;
    match control.exit_code {
        code::INTR => Exit::HostInterrupt,
        code::NPF => Exit::NestedFault(NestedFault {
            gpa: Gpa(control.exit_info_2),
            present: info & 1 != 0,
            write: info & 2 != 0,
            execute: info & 0x10 != 0,
            // Bit 33: the fault was met while walking the guest's own tables.
            walk: info & 1 << 33 != 0,
        }),
        code::MSR if info & 1 == 0 => Exit::Rdmsr,
        code::MSR => Exit::Wrmsr,
        code::IOIO => Exit::Port(PortAccess {
            port: (info >> 16) as u16,
            size_bytes: (info >> 4 & 7) as u8,
            input: info & 1 != 0,
            string: info & 1 << 2 != 0,
        }),
        code::CPUID => Exit::Cpuid,
        code::HLT => Exit::Hlt,
        code::VMMCALL => Exit::Hypercall,
        code::VINTR => Exit::InterruptWindow,
        code::IRET => Exit::NmiReturn,
        code::NMI => Exit::HostNmi,
        // The host's SMM or INIT handling happens as soon as the global interrupt flag is set again, which it is.
        code::SMI | code::INIT | code::FERR_FREEZE => Exit::HostInterrupt,
        code::WBINVD => Exit::Wbinvd,
        code::INVD => Exit::Invd,
        code::PAUSE => Exit::Pause,
        code::XSETBV => Exit::Xsetbv,
        code::RDPMC => Exit::Rdpmc,
        code::MONITOR => Exit::Monitor,
        code::MWAIT | code::MWAIT_ARMED => Exit::Mwait,
        code::SHUTDOWN => Exit::Shutdown,
        number @ code::CR_READ..=0x1F => Exit::ControlRegister(RegisterMove {
            register: number as u8 & 0xF,
            write: number >= code::CR_WRITE,
            gpr: assisted_gpr(info, decode_assists && info & 1 << 63 != 0),
        }),
        number @ code::DR_READ..=0x3F => Exit::DebugRegister(RegisterMove {
            register: number as u8 & 0xF,
            write: number >= code::DR_WRITE,
            gpr: assisted_gpr(info, decode_assists),
        }),
        number @ code::EXCEPTION..=0x5F => exception(number as u8 & 0x1F, info, control.exit_info_2, irqs),
        code::RSM
        | code::INVLPGA
        | code::VMRUN
        | code::VMLOAD
        | code::VMSAVE
        | code::STGI
        | code::CLGI
        | code::SKINIT
        | code::RDPRU
        | code::INVLPGB
        | code::INVLPGB_ILLEGAL
        | code::MCOMMIT
        | code::TLBSYNC => Exit::UndefinedInstruction,
        reason => Exit::Unknown { reason },
    }
}

fn assisted_gpr(info: u64, valid: bool) -> Option<u8> {
    valid.then_some(info as u8 & 0xF)
}

fn exception(number: u8, code: u64, address: u64, irqs: &IrqsOff) -> Exit {
    match number {
        vector::MC => {
            cpu::deliver_machine_check(irqs);
            Exit::HostInterrupt
        }
        vector::PF => Exit::Exception(Exception::page_fault(code as u32, address)),
        vector::DF | vector::TS | vector::NP | vector::SS | vector::GP | vector::AC => {
            Exit::Exception(Exception::with_code(number, code as u32))
        }
        _ => Exit::Exception(Exception::plain(number)),
    }
}

/// What `exit_int_info` says was being delivered; INT n with `interrupt_as_int` was an interrupt. `None` for what its instruction raises
/// again: INT3 and INTO, and other INT n.
pub(super) fn unfinished_event(info: u32, error_code: u32, interrupt_as_int: Option<u8>) -> Option<Event> {
    let number = info as u8;
    match info >> event::TYPE_SHIFT & 7 {
        event::TYPE_INTERRUPT => Some(Event::Interrupt(number)),
        event::TYPE_NMI => Some(Event::Nmi),
        event::TYPE_EXCEPTION if number == vector::BP || number == vector::OF => None,
        event::TYPE_EXCEPTION => Some(Event::Exception(Exception {
            vector: number,
            error_code: (info & event::ERROR_CODE_VALID != 0).then_some(error_code),
            payload: None,
        })),
        event::TYPE_SOFTWARE if interrupt_as_int == Some(number) => Some(Event::Interrupt(number)),
        // INT n: RIP still points at it.
        _ => None,
    }
}
