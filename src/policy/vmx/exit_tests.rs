// SPDX-License-Identifier: GPL-2.0
//! Tests of the exit decoder. A table that lacks a field fails the test that reads it: nothing is read in vain.
#![forbid(unsafe_code)]

use std::{cell::RefCell, collections::BTreeMap, vec::Vec};

use super::{
    exit::{debug_status, Decoded, Fields, VmExit},
    *,
};
use crate::{
    arch::{
        vmcs::{
            exit::{reason, ApicAccess, ExitReason},
            ReadOnly32, ReadOnly64, ReadOnlyNatural, Readable,
        },
        Gpa,
    },
    guest::{
        event::vector,
        exit::{NestedFault, PortAccess, RegisterMove, TaskSource, TaskSwitch},
        Event, Exception, Exit,
    },
};

#[derive(Default)]
struct Table {
    values: BTreeMap<u32, u64>,
    unread: RefCell<Vec<u32>>,
}

impl Table {
    fn new(reason: impl Into<u32>) -> Self {
        Self::default().with(ReadOnly32::ExitReason, u64::from(reason.into()))
    }

    fn with(mut self, field: impl Readable, value: u64) -> Self {
        self.values.insert(field.encoding(), value);
        self.unread.borrow_mut().push(field.encoding());
        self
    }

    fn qualification(self, value: u64) -> Self {
        self.with(ReadOnlyNatural::ExitQualification, value)
    }

    fn length(self, value: u64) -> Self {
        self.with(ReadOnly32::InstructionLength, value)
    }

    fn info(self, value: u64) -> Self {
        self.with(ReadOnly32::InterruptionInfo, value)
    }

    fn vectoring(self, value: u64) -> Self {
        self.with(ReadOnly32::IdtVectoringInfo, value)
    }

    fn gpa(self, value: u64) -> Self {
        self.with(ReadOnly64::GuestPhysicalAddress, value)
    }

    /// Decodes; every field of the table must have been read.
    fn decode(self) -> Decoded {
        let decoded = exit::decode(&self);
        assert!(self.unread.borrow().is_empty(), "not read: {:#x?}", self.unread);
        decoded
    }

    fn exit(self) -> VmExit {
        self.decode().exit
    }

    fn guest(self) -> Exit {
        match self.exit() {
            VmExit::Guest(exit) => exit,
            exit => panic!("{exit:?}"),
        }
    }
}

impl Fields for Table {
    fn read<F: Readable>(&self, field: F) -> F::Value {
        let encoding = field.encoding();
        self.unread.borrow_mut().retain(|&unread| unread != encoding);
        let value = self.values.get(&encoding).unwrap_or_else(|| panic!("read of field {encoding:#x}"));
        F::value(*value)
    }
}

#[test]
fn exits_without_more_information() {
    for (number, exit) in [
        (reason::EXTERNAL_INTERRUPT, Exit::HostInterrupt),
        (reason::INIT, Exit::HostInterrupt),
        (reason::OTHER_SMI, Exit::HostInterrupt),
        (reason::INTERRUPT_WINDOW, Exit::InterruptWindow),
        (reason::NMI_WINDOW, Exit::NmiWindow),
        (reason::VMCLEAR, Exit::UndefinedInstruction),
        (reason::VMXON, Exit::UndefinedInstruction),
        (reason::INVVPID, Exit::UndefinedInstruction),
        (reason::ENCLS, Exit::UndefinedInstruction),
        (reason::GETSEC, Exit::UndefinedInstruction),
    ] {
        assert_eq!(Table::new(number).decode(), Decoded::plain_guest(exit), "{number}");
    }
    for (number, exit) in [
        (reason::PREEMPTION_TIMER, VmExit::PreemptionTimer),
        (reason::MONITOR_TRAP_FLAG, VmExit::MonitorTrap),
        (reason::TPR_BELOW_THRESHOLD, VmExit::TprBelowThreshold),
    ] {
        assert_eq!(Table::new(number).exit(), exit);
    }
}

impl Decoded {
    fn plain_guest(exit: Exit) -> Self {
        Self { exit: VmExit::Guest(exit), instruction_bytes: None, unfinished: None, blocks_nmis: false }
    }
}

#[test]
fn instructions_have_lengths() {
    for (number, exit) in [
        (reason::CPUID, Exit::Cpuid),
        (reason::HLT, Exit::Hlt),
        (reason::VMCALL, Exit::Hypercall),
        (reason::RDMSR, Exit::Rdmsr),
        (reason::WRMSR, Exit::Wrmsr),
        (reason::RDPMC, Exit::Rdpmc),
        (reason::RDTSC, Exit::Rdtsc),
        (reason::RDTSCP, Exit::Rdtscp),
        (reason::INVD, Exit::Invd),
        (reason::WBINVD, Exit::Wbinvd),
        (reason::PAUSE, Exit::Pause),
        (reason::XSETBV, Exit::Xsetbv),
        (reason::MONITOR, Exit::Monitor),
        (reason::MWAIT, Exit::Mwait),
    ] {
        let decoded = Table::new(number).length(3).decode();
        assert_eq!(decoded, Decoded { instruction_bytes: Some(3), ..Decoded::plain_guest(exit) }, "{number}");
    }
}

#[test]
fn port_access() {
    let out = PortAccess { port: 0x3F8, size_bytes: 1, input: false, string: false };
    assert_eq!(Table::new(reason::IO).qualification(0x03F8_0000).length(2).guest(), Exit::Port(out));
    let rep_insd = PortAccess { port: 0x1F0, size_bytes: 4, input: true, string: true };
    assert_eq!(Table::new(reason::IO).qualification(0x01F0_003B).length(2).guest(), Exit::Port(rep_insd));
}

#[test]
fn register_moves() {
    for (qualification, wanted) in [
        (0x0300, RegisterMove { register: 0, write: true, gpr: Some(3) }),
        (0x0F08, RegisterMove { register: 8, write: true, gpr: Some(15) }),
        (0x0013, RegisterMove { register: 3, write: false, gpr: Some(0) }),
        (0x0020, RegisterMove { register: 0, write: true, gpr: None }),
        (0x1234_0030, RegisterMove { register: 0, write: true, gpr: None }),
    ] {
        let exit = Table::new(reason::CR_ACCESS).qualification(qualification).length(3).guest();
        assert_eq!(exit, Exit::ControlRegister(wanted), "{qualification:#x}");
    }
    let read = RegisterMove { register: 6, write: false, gpr: Some(1) };
    assert_eq!(Table::new(reason::MOV_DR).qualification(0x0116).length(3).guest(), Exit::DebugRegister(read));
    let write = RegisterMove { register: 7, write: true, gpr: Some(2) };
    assert_eq!(Table::new(reason::MOV_DR).qualification(0x0207).length(3).guest(), Exit::DebugRegister(write));
}

fn violation(qualification: u64) -> Table {
    Table::new(reason::EPT_VIOLATION).qualification(qualification).gpa(0xFEE0_0300)
}

#[test]
fn nested_faults() {
    let fault = NestedFault { gpa: Gpa(0xFEE0_0300), write: false, execute: false, present: false, walk: false };
    for (qualification, wanted) in [
        (0x181, fault),
        (0x182, NestedFault { write: true, ..fault }),
        (0x184, NestedFault { execute: true, ..fault }),
        (0x1AA, NestedFault { write: true, present: true, ..fault }),
        (0x081, NestedFault { walk: true, ..fault }),
        // MOV CR3 of a PAE guest loads its PDPTEs: no linear address, and not a walk of one.
        (0x001, fault),
    ] {
        let exit = violation(qualification).vectoring(0).guest();
        assert_eq!(exit, Exit::NestedFault(wanted), "{qualification:#x}");
    }
}

#[test]
fn an_iret_that_faults_blocks_nmis_again() {
    assert!(violation(0x1181).vectoring(0).decode().blocks_nmis);
    assert!(!violation(0x0181).vectoring(0).decode().blocks_nmis);
    // Undefined in the delivery of an event.
    assert!(!violation(0x1181).vectoring(0x8000_0031).decode().blocks_nmis);
    assert!(Table::new(reason::PML_FULL).qualification(0x1000).vectoring(0).decode().blocks_nmis);
    let exception = |info| Table::new(reason::EXCEPTION_OR_NMI).vectoring(0).info(info);
    let code = |table: Table| table.with(ReadOnly32::InterruptionErrorCode, 0);
    assert!(code(exception(0x8000_1B0D)).decode().blocks_nmis);
    assert!(!code(exception(0x8000_0B0D)).decode().blocks_nmis);
    assert!(!code(exception(0x8000_1B08)).decode().blocks_nmis, "undefined for #DF");
    assert!(!exception(0x8000_1202).decode().blocks_nmis, "an NMI's exit did not run an IRET");
}

#[test]
fn exceptions() {
    let table = |info| Table::new(reason::EXCEPTION_OR_NMI).vectoring(0).info(info);
    assert_eq!(table(0x8000_0306).guest(), Exit::Exception(Exception::UD));
    let protection = table(0x8000_0B0D).with(ReadOnly32::InterruptionErrorCode, 0x18);
    assert_eq!(protection.guest(), Exit::Exception(Exception::with_code(vector::GP, 0x18)));
    assert_eq!(table(0x8000_030D).guest(), Exit::Exception(Exception::plain(vector::GP)), "real mode");
    let fault = table(0x8000_0B0E).with(ReadOnly32::InterruptionErrorCode, 2).qualification(0xFFFF_8000_0000_1234);
    assert_eq!(fault.guest(), Exit::Exception(Exception::page_fault(2, 0xFFFF_8000_0000_1234)));
    assert_eq!(table(0x8000_0301).qualification(0x4001).exit(), VmExit::Debug(0x4001));
    assert_eq!(table(0x8000_0202).exit(), VmExit::HostNmi);
    assert_eq!(table(0x8000_0312).exit(), VmExit::HostMachineCheck);
}

#[test]
fn debug_status_register() {
    const INIT: u64 = 0xFFFF_0FF0;
    assert_eq!(debug_status(INIT, 0x4000), INIT | 0x4000);
    assert_eq!(debug_status(INIT | 0xF, 0x2), INIT | 0x2, "breakpoint bits are of this time");
    assert_eq!(debug_status(INIT | 0x4000, 0x2001), INIT | 0x6001, "the others stay");
    assert_eq!(debug_status(INIT, 1 << 11), INIT & !(1 << 11), "bus lock");
    assert_eq!(debug_status(INIT & !(1 << 16), 1), INIT | 1, "not in a transaction this time");
    assert_eq!(debug_status(INIT, u64::MAX) >> 32, 0);
}

#[test]
fn interrupted_deliveries() {
    for (info, wanted) in [
        (0x8000_0031, Some(Event::Interrupt(0x31))),
        (0x8000_0202, Some(Event::Nmi)),
        (0x8000_0306, Some(Event::Exception(Exception::UD))),
        (0x8000_0301, Some(Event::Exception(Exception::plain(vector::DB)))),
        // INT n, INT1 and INT3 run again.
        (0x8000_0480, None),
        (0x8000_0501, None),
        (0x8000_0603, None),
        // Not valid.
        (0x0000_0031, None),
    ] {
        assert_eq!(violation(0x182).vectoring(info).decode().unfinished, wanted, "{info:#x}");
    }
    let with_code = |number| Table::new(number).vectoring(0x8000_0B0D).with(ReadOnly32::IdtVectoringErrorCode, 0x10);
    let unfinished = Some(Event::Exception(Exception::with_code(vector::GP, 0x10)));
    assert_eq!(with_code(reason::EPT_VIOLATION).qualification(0x182).gpa(0).decode().unfinished, unfinished);
    assert_eq!(with_code(reason::APIC_ACCESS).qualification(0x3000).decode().unfinished, unfinished);
    assert_eq!(with_code(reason::TASK_SWITCH).qualification(0).decode().unfinished, unfinished);
    assert_eq!(with_code(reason::TRIPLE_FAULT).guest(), Exit::Shutdown);
}

#[test]
fn task_switches() {
    let decode =
        |qualification, vectoring| Table::new(reason::TASK_SWITCH).qualification(qualification).vectoring(vectoring);
    let switch = |selector, source| VmExit::Guest(Exit::TaskSwitch(TaskSwitch { selector, source }));
    for (number, source) in [(0, TaskSource::Call), (1, TaskSource::Iret), (2, TaskSource::Jump), (3, TaskSource::Gate)]
    {
        // An instruction: INT n, if it is through a gate.
        let decoded = decode(number << 30 | 0x48, 0).length(2).decode();
        assert_eq!(decoded.exit, switch(0x48, source));
        assert_eq!((decoded.instruction_bytes, decoded.unfinished), (Some(2), None));
    }
    let software = decode(3 << 30 | 0x48, 0x8000_0603).length(1).decode();
    assert_eq!((software.instruction_bytes, software.unfinished), (Some(1), None));
    let interrupt = decode(3 << 30 | 0x48, 0x8000_0031).decode();
    assert_eq!((interrupt.instruction_bytes, interrupt.unfinished), (None, Some(Event::Interrupt(0x31))));
    let fault = decode(3 << 30 | 0x48, 0x8000_0B08).with(ReadOnly32::IdtVectoringErrorCode, 0).decode();
    assert_eq!(fault.unfinished, Some(Event::Exception(Exception::with_code(vector::DF, 0))));
}

#[test]
fn apic_virtualization() {
    let access = Table::new(reason::APIC_ACCESS).vectoring(0).qualification(0x10B0).exit();
    assert_eq!(access, VmExit::Apic(ApicAccess(0x10B0)));
    assert_eq!(Table::new(reason::APIC_WRITE).qualification(0x300).exit(), VmExit::ApicWrite { offset: 0x300 });
    assert_eq!(Table::new(reason::VIRTUALIZED_EOI).qualification(0x51).exit(), VmExit::VirtualizedEoi { vector: 0x51 });
}

#[test]
fn failures() {
    let exit = Table::new(0x8000_0021_u32).qualification(3).exit();
    assert_eq!(exit, VmExit::EntryFailure { reason: ExitReason(0x8000_0021), qualification: 3 });
    let misconfigured = Table::new(reason::EPT_MISCONFIGURATION).vectoring(0).gpa(0x5000).exit();
    assert_eq!(misconfigured, VmExit::EptMisconfiguration(Gpa(0x5000)));
    let pml = Table::new(reason::PML_FULL).vectoring(0).qualification(0).exit();
    assert_eq!(pml, VmExit::PmlFull);
    for number in [reason::INVLPG, reason::GDTR_IDTR, reason::SIPI, 0xFFFF] {
        assert_eq!(Table::new(number).vectoring(0).guest(), Exit::Unknown { reason: number.into() });
    }
}

/// Answers everything with noise.
struct Noise(RefCell<u64>);

impl Fields for Noise {
    fn read<F: Readable>(&self, _: F) -> F::Value {
        let mut state = self.0.borrow_mut();
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        F::value(*state >> (*state & 31))
    }
}

#[test]
fn noise_is_decoded_to_something_that_can_be() {
    let noise = Noise(RefCell::new(0x9E37_79B9_7F4A_7C15));
    for _ in 0..100_000 {
        let decoded = exit::decode(&noise);
        if let Some(Event::Exception(exception)) = decoded.unfinished {
            assert!(event::injection(Event::Exception(exception), true).unwrap().info.vector() < 32);
        }
        match decoded.exit {
            VmExit::Guest(Exit::Port(access)) => assert!((1..=8).contains(&access.size_bytes)),
            VmExit::Guest(Exit::ControlRegister(access) | Exit::DebugRegister(access)) => {
                assert!(access.register < 16 && access.gpr.is_none_or(|gpr| gpr < 16));
            }
            VmExit::Apic(access) => assert!(access.offset() < 4096),
            _ => {}
        }
    }
}
